"""Linear layers whose weights a rollout on the CPU lays out once, as the processor likes them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from scd.utils.precision import has_bf16, without_autocast

# The layout that oneDNN chooses for about this many rows serves 16 to 2000 of them equally well.
PACKED_FOR_ROWS = 256
# Without AVX-512, oneDNN's GELU takes three times as long as the same in six simple operations
# (256 rows of 4096: 3.1 against 1.0 ms); with it, a third.
FUSES_GELU = torch.backends.cpu.get_cpu_capability() == "AVX512"

_in_use: ContextVar[Mapping[nn.Module, Tensor] | None] = ContextVar("packed weights", default=None)


class Linear(nn.Linear):
    """`nn.Linear`, with packed weights inside `PackedWeights.in_use`.

    Of bf16 weights it takes float32 inputs too: a residual stream may be more exact than they are.
    """

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """x·Wᵀ + b, and of that, where asked for, the tanh-GELU."""
        if self.weight.dtype == torch.bfloat16:
            x = x.bfloat16()
        if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            packed = (_in_use.get() or {}).get(self)
            if packed is not None and packed.dtype == x.dtype:
                fused = gelu and FUSES_GELU
                activation: Any = ("gelu", [], "tanh") if fused else ("none", [], "")
                y = torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, *activation)
                return _gelu_(y) if gelu and not fused else y
        y = super().forward(x)
        return nn.functional.gelu(y, approximate="tanh") if gelu else y


class Float32Linear(nn.Linear):
    """`nn.Linear` in float32, whatever autocast or the type of its weights says."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device):
            return nn.functional.linear(x.float(), self.weight.float(), self.bias.float())


def _gelu_(y: Tensor) -> Tensor:
    """Take the tanh-GELU of y in place, as y·sigmoid(2u) with u = √(2/π)·(y + 0.044715·y³)."""
    u = y.square().mul_(0.0713548162726).add_(1.5957691216057).mul_(y)
    return y.mul_(u.sigmoid_())


class PackedWeights:
    """The weights of a model's `Linear` layers as they are now, laid out for oneDNN.

    A plain product lays its weights out anew at every call. On an AMD EPYC, 64 to 256 rows of 1024
    values take 1.3 to 3 times as long so in float32, and 1.1 to 1.3 times in bfloat16. The packed
    weights take their size in memory once more. Nothing is packed off the CPU.
    """

    def __init__(self, model: nn.Module):
        self._of: dict[nn.Module, Tensor] = {}
        if not torch.backends.mkldnn.is_available():
            return
        for layer in model.modules():
            if isinstance(layer, Linear) and _packable(layer.weight):
                weight = layer.weight.detach()
                self._of[layer] = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within the block, and this thread, the layers multiply by the packed weights."""
        token = _in_use.set(self._of)
        try:
            yield
        finally:
            _in_use.reset(token)


def _packable(weight: Tensor) -> bool:
    # A sharded weight is a parameter of another type.
    plain = type(weight) is nn.Parameter and weight.device.type == "cpu"
    return plain and (
        weight.dtype == torch.float32
        or (weight.dtype == torch.bfloat16 and has_bf16(weight.device))
    )
