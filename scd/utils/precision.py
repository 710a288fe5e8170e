"""Choose the precision of arithmetic by what a run wants and what its device does fast.

bfloat16 halves the time of a matrix product where the device has instructions for it. Where it has
none, bfloat16 is emulated: 20 to 100 times slower than float32 on x86 processors without AVX-512.
TF32 is float32 whose factors a GPU rounds to 10 bits of mantissa (bfloat16 has 7): eight times the
rate on an A100 or H100. Training, encoding, the optimizer, metrics, rollouts and benchmarks all ask
here.
"""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from functools import cache
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from scd.errors import ScdError

Precision = Literal["fp32", "tf32", "bf16"]
Module = TypeVar("Module", bound=nn.Module)
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
PROBE_SIZE = 256  # side of the matrices that are multiplied to find out
PROBES = 20


def resolve_precision(wanted: str, device: torch.device) -> Precision:
    """Resolve a precision option to `fp32`, `tf32` or `bf16` on a device.

    Args:
        wanted: `auto`: the fastest that the device has; `bf16`: always obeyed, with one line on
            stderr where the device only emulates it; `tf32`: `fp32` on a device without it; `fp32`.
    """
    if wanted == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    if wanted == "bf16":
        if not has_bf16(device):
            _warn_of_emulation(device)
        return "bf16"
    return "tf32" if wanted == "tf32" and has_tf32(device) else "fp32"


def has_bf16(device: torch.device) -> bool:
    """Check whether the device multiplies bfloat16 at least as fast as float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and _cpu_has_bf16()


def has_tf32(device: torch.device) -> bool:
    """Check whether the device multiplies in TF32: NVIDIA's from Ampere on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Compute matrix products and convolutions in bf16 within the block, if that is `precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Switch autocast off within the block: compute in the types that tensors have."""
    if not torch.amp.is_autocast_available(device.type):  # `meta` has none
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Multiply and convolve float32 tensors in TF32 within the block, if that is `precision`.

    Else exactly: by itself, torch convolves in TF32 on a GPU, and multiplies as the last caller of
    `torch.set_float32_matmul_precision` wished.
    """
    backends: Any = torch.backends  # mypy does not know what follows
    operators = (
        backends.cudnn.conv,
        backends.mkldnn.conv,
        backends.cuda.matmul,
        backends.mkldnn.matmul,
    )
    before = [operator.fp32_precision for operator in operators]
    try:
        for operator in operators:
            operator.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        yield
    finally:
        for operator, value in zip(operators, before, strict=True):
            operator.fp32_precision = value


def precision_for(module: Any, wanted: str) -> str:
    """Resolve the precision of a model's rollouts: the default does not widen weights in bf16."""
    unsaid = wanted == "fp32"  # the default
    in_bf16 = module.dtype == torch.bfloat16
    return resolve_precision("auto" if in_bf16 and unsaid else wanted, module.device)


def with_weights_in(module: Module, precision: str) -> Module:
    """Return a diffusers model, or a copy of it, whose weights have a resolved precision's type.

    What diffusers keeps in float32 when it reads the model stays as it is.

    Raises:
        ScdError: the weights are sharded, and of another type.
    """
    dtype = DTYPES[precision]
    if module.dtype == dtype:
        return module
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        raise ScdError(
            f"rollout.precision={precision}, but these weights are sharded in {module.dtype}, and "
            f"sharded ones cannot be converted: set rollout.precision to that of the training"
        )
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    converted: dict[int, torch.Tensor] = {}  # which `deepcopy` takes for the copies of these
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() and not kept & set(name.split(".")):
            copy = tensor.detach().to(dtype)
            if isinstance(tensor, nn.Parameter):
                copy = nn.Parameter(copy, tensor.requires_grad)
            converted[id(tensor)] = copy
    return deepcopy(module, converted)


@cache
def _cpu_has_bf16() -> bool:
    """Ask oneDNN for bfloat16 kernels, then time them: some only convert to float32."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    a = torch.randn(PROBE_SIZE, PROBE_SIZE)
    fp32, bf16 = _fastest_of_each(a, a.bfloat16())
    return bf16 <= fp32


def _fastest_of_each(*matrices: torch.Tensor) -> list[float]:
    """Time squares of each matrix in turn; returns the seconds of the fastest of each.

    So a busy neighbour slows them alike, and hardly ever all of one kind.
    """
    fastest = [math.inf] * len(matrices)
    for _ in range(PROBES):
        for number, matrix in enumerate(matrices):
            started = time.perf_counter()
            _ = matrix @ matrix
            fastest[number] = min(fastest[number], time.perf_counter() - started)
    return fastest


@cache
def _warn_of_emulation(device: torch.device) -> None:
    print(
        f"note: bf16 was asked for, but this device ({device.type}) only emulates it"
        + (": expect 20 to 100 times the time of fp32" if device.type == "cpu" else "")
        + "; `auto` would take fp32",
        file=sys.stderr,
    )
