"""Launch a run: join its processes, settle precision and sharding, hold its lock, train."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    ProjectConfiguration,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from scd.errors import ScdError
from scd.options import Options
from scd.training.ema import SNAPSHOTS
from scd.training.tasks import build_task
from scd.training.trainer import Trainer
from scd.training.watchdog import lost_process_ends_run, report_outcome
from scd.utils.files import remove_unfinished
from scd.utils.locks import hold_lock
from scd.utils.precision import DTYPES, resolve_precision
from scd.utils.processes import agree_on_precision, error_barrier, join, pop_accelerate_settings
from scd.utils.tracking import trackers_of

# Timeout of collective operations, for processes that are alive (see `scd.training.watchdog`): the
# main one may be writing a large checkpoint to a slow disk. Torch's default for gloo.
LONGEST_WAIT = timedelta(minutes=30)
UNSET = ("", "0", "no", "false", "none", "default")  # values of variables that set nothing
LOCK = "run.lock"  # in an experiment's folder, held by its run


def run_precision(options: Options) -> str:
    """Resolve `train.mixed_precision` to `fp32` or `bf16`, on all processes alike; collective."""
    device = join(LONGEST_WAIT).device
    mine = resolve_precision(options.train.mixed_precision, device)
    return agree_on_precision(mine)


def sharding_plugin(precision: str) -> FullyShardedDataParallelPlugin | None:
    """Configure FSDP2 from the launcher's variables; None if they do not enable it.

    Accelerate's own policy would reduce gradients, and cast inputs and loss, in bf16. This one
    keeps all of that in float32, as data parallel training does; only the weights are gathered in
    bf16.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[precision], reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


def make_accelerator(options: Options) -> Accelerator:
    """Build the accelerator for the processes and devices that `accelerate launch` set up.

    Its other variables are ignored; one line on stderr names those that contradict the options.

    Raises:
        ScdError: it shards a task whose weights every process holds whole, or is to compare.
    """
    ignored = pop_accelerate_settings()
    precision = run_precision(options)
    mixed_precision = {"fp32": "no", "bf16": "bf16"}[precision]
    decided = {
        "ACCELERATE_MIXED_PRECISION": (mixed_precision,),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", str(options.train.gradient_accumulation)),
        "ACCELERATE_DYNAMO_BACKEND": ("inductor",) if options.train.compile else (),
        "ACCELERATE_USE_CPU": () if torch.cuda.is_available() else ("1", "true", "yes"),
    }
    contradict = [
        f"{name}={value}"
        for name, value in sorted(ignored.items())
        if value.lower() not in (*UNSET, *decided.get(name, ()))
    ]
    if contradict and join(LONGEST_WAIT).is_main_process:
        print(
            f"note: {', '.join(contradict)}: ignored, the options file decides",
            file=sys.stderr,
        )
    plugin = sharding_plugin(precision)
    if plugin is not None and options.task == "autoencoder":
        raise ScdError(
            "task=autoencoder is not sharded, its models are small: launch it without fsdp2.yaml "
            "or hsdp.yaml (ACCELERATE_CONFIG)"
        )
    if plugin is not None and options.train.check_weights_every:
        raise ScdError("train.check_weights_every: sharded weights differ by design; set it to 0")
    # A step that updates the critic alone leaves the student without gradients.
    unused = DistributedDataParallelKwargs(
        find_unused_parameters=options.distill.method == "dmd"
        and options.distill.critic_updates > 1
    )
    return Accelerator(
        mixed_precision=mixed_precision,
        kwargs_handlers=[unused],
        fsdp_plugin=plugin,
        log_with=trackers_of(options, "train") or None,
        project_config=ProjectConfiguration(str(options.output), str(options.output / "trackers")),
        cpu=not torch.cuda.is_available(),
    )


def refuse_missing_compiler(device: torch.device) -> None:
    """Refuse `train.compile` before the first step if there is no compiler.

    Raises:
        ScdError: there is no C++ compiler for inductor's CPU code, or no C compiler for the
            launchers of Triton's kernels.
    """
    variable, names = ("CC", ("gcc", "clang", "cc"))
    if device.type == "cpu":
        variable, names = ("CXX", ("g++", "clang++", "c++"))
    chosen = os.environ.get(variable)
    if not any(map(shutil.which, [chosen] if chosen else names)):
        raise ScdError(
            f"train.compile=true needs a compiler, and there is no {chosen or names[0]}: install "
            f"one, set {variable} to one, or set train.compile=false"
        )


def run_experiment(options: Options) -> None:
    """Train the experiment that the options describe; see `Trainer` for its files and errors.

    Raises:
        ScdError: another run is active in the same folder.
    """
    # A CPU is a hundred times as slow with subnormal numbers, of which gradients behind saturated
    # activations are full: a step of an autoencoder's decoder took ten times as long. Threads take
    # this over from the one that starts them, so it comes before any computation.
    torch.set_flush_denormal(True)
    accelerator = make_accelerator(options)
    main = accelerator.is_main_process
    with ExitStack() as held:
        held.enter_context(deterministic_on_cpu(accelerator.device))
        held.enter_context(lost_process_ends_run(PartialState(), options.output))
        with error_barrier():
            if main:
                busy = f"{options.output}: another run is active here"
                advice = "wait for it, stop it, or choose another name=..."
                held.enter_context(hold_lock(options.output / LOCK, busy, advice))
                for folder in (options.output, options.output / SNAPSHOTS):
                    remove_unfinished(folder)
        if main and 1 < options.train.steps < options.optim.warmup_steps:  # one step: a trial
            print(
                f"note: optim.warmup_steps={options.optim.warmup_steps} with train.steps="
                f"{options.train.steps}: the learning rate never reaches optim.lr",
                file=sys.stderr,
            )
        with report_outcome(options.output, main):
            if options.train.compile:
                refuse_missing_compiler(accelerator.device)
            Trainer(options, build_task(options, accelerator), accelerator).run()


@contextmanager
def deterministic_on_cpu(device: torch.device) -> Iterator[None]:
    """Use deterministic algorithms within the block, if the device is the CPU.

    A compiled embedding would sum its gradient in whatever order its threads finish.
    """
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        settings.fill_uninitialized_memory = False  # would write all memory twice
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]
