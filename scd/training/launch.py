"""Set up what a run computes on: its processes, its precision, the sharding of its weights."""

import os
import shutil
import sys
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    ProjectConfiguration,
    gather_object,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from scd.errors import ScdError
from scd.options import Options
from scd.precision import DTYPES, has_bf16, resolve_precision
from scd.processes import join, same_everywhere, take_accelerate_settings
from scd.tracking import trackers_of

# For another process that is alive (see `scd.training.lost_process`): the main one may write a
# large checkpoint to a slow disk. Torch's own for gloo.
LONGEST_WAIT = timedelta(minutes=30)
UNSAID = ("", "0", "no", "false", "none", "default")  # values that ask for nothing


def run_precision(options: Options) -> str:
    """Resolve `train.mixed_precision` to what all processes of the run have: `fp32` or `bf16`."""
    device = join(LONGEST_WAIT).device
    mine = resolve_precision(options.train.mixed_precision, device)
    return same_everywhere(mine)


def all_have_bf16(device: torch.device) -> bool:
    """Whether every process of the run has fast bf16."""
    return all(gather_object([has_bf16(device)]))


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
