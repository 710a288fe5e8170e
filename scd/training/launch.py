"""Launch a run: processes, precision and sharding; then build the task and train it."""

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
    FullyShardedDataParallelPlugin,
    ProjectConfiguration,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from scd.errors import ScdError
from scd.options import Options
from scd.training.tasks import Task
from scd.training.trainer import Trainer
from scd.training.watchdog import last_word, lost_process_ends_run
from scd.utils.files import remove_unfinished
from scd.utils.locks import hold_lock
from scd.utils.precision import DTYPES, resolve_precision
from scd.utils.processes import agree_on_precision, error_barrier, join, take_accelerate_settings
from scd.utils.tracking import trackers_of

# For another process that is alive (see `scd.training.watchdog`): the main one may write a
# large checkpoint to a slow disk. Torch's own for gloo.
LONGEST_WAIT = timedelta(minutes=30)
UNSAID = ("", "0", "no", "false", "none", "default")  # values that ask for nothing


def run_precision(options: Options) -> str:
    """Resolve `train.mixed_precision` to what all processes of the run have: `fp32` or `bf16`."""
    device = join(LONGEST_WAIT).device
    mine = resolve_precision(options.train.mixed_precision, device)
    return agree_on_precision(mine)


def sharding_plugin(precision: str) -> FullyShardedDataParallelPlugin | None:
    """Set up FSDP2 as the launcher's variables say; None where they do not ask for it.

    Accelerate's own policy would sum gradients over the processes, and round inputs and loss, in
    bf16. This one does all of it in float32, as data parallel training does; only the weights
    travel in bf16.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[precision], reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


def make_accelerator(options: Options) -> Accelerator:
    """Join the processes and devices of this run, as `accelerate launch` set them up.

    What its variables say beyond that does not count; where they contradict the options, one line
    tells.
    """
    ignored = take_accelerate_settings()
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
        if value.lower() not in (*UNSAID, *decided.get(name, ()))
    ]
    if contradict and join(LONGEST_WAIT).is_main_process:
        print(
            f"note: {', '.join(contradict)}: not used, the options file alone decides",
            file=sys.stderr,
        )
    return Accelerator(
        mixed_precision=mixed_precision,
        fsdp_plugin=sharding_plugin(precision),
        log_with=trackers_of(options, "train") or None,
        project_config=ProjectConfiguration(str(options.output), str(options.output / "trackers")),
        cpu=not torch.cuda.is_available(),
    )


def refuse_missing_compiler(device: torch.device) -> None:
    """Tell before the first step that `train.compile` has nothing to compile with.

    Raises:
        ScdError: there is no C++ compiler for inductor's CPU code, or no C compiler, with which
            Triton builds what launches its kernels.
    """
    variable, names = ("CC", ("gcc", "clang", "cc"))
    if device.type == "cpu":
        variable, names = ("CXX", ("g++", "clang++", "c++"))
    chosen = os.environ.get(variable)
    if not any(map(shutil.which, [chosen] if chosen else names)):
        raise ScdError(
            f"train.compile=true needs a compiler, and there is no {chosen or names[0]}: install "
            f"one, name one in {variable}, or set train.compile=false"
        )


LOCK = "run.lock"  # in an experiment's folder, held by its run


def run_experiment(options: Options) -> None:
    """Train what the options describe; see `Trainer` for what it writes, and for errors.

    Raises:
        ScdError: another run is going on in the same folder.
    """
    accelerator = make_accelerator(options)
    if options.train.compile:
        refuse_missing_compiler(accelerator.device)
    main = accelerator.is_main_process
    with ExitStack() as held:
        held.enter_context(sums_in_fixed_order(accelerator.device))
        held.enter_context(lost_process_ends_run(PartialState(), options.output))
        with error_barrier():
            if main:
                busy = f"{options.output}: a run is going on here"
                advice = "wait for it, stop it, or choose another name=..."
                held.enter_context(hold_lock(options.output / LOCK, busy, advice))
                remove_unfinished(options.output)
        with last_word(options.output, main):
            Trainer(options, build_task(options, accelerator), accelerator).run()


@contextmanager
def sums_in_fixed_order(device: torch.device) -> Iterator[None]:
    """On the CPU, the same gradients to the bit every time; other devices go on as they are.

    A compiled embedding would add up its gradient in whatever order the threads come.
    """
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        settings.fill_uninitialized_memory = False  # it would write all memory twice
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


def build_task(options: Options, accelerator: Accelerator) -> Task:
    if options.task == "autoencoder":
        from scd.training.autoencoder_task import AutoencoderTask

        return AutoencoderTask(options, accelerator.device)
    from scd.training.world_model_task import WorldModelTask

    return WorldModelTask(options, accelerator.device)
