"""The least that a frame can cost: its floating-point operations and its bytes."""

from dataclasses import dataclass

from scd.benchmark.cases import SIDE, StreamCase
from scd.benchmark.machine import Machine

TOKENS = SIDE**2


@dataclass(frozen=True)
class Floor:
    """Of one frame, without embeddings, norms and modulations."""

    flops: int  # matrix products and attention
    bytes: int  # weights, once a step, and the cache, once a layer and pass

    def seconds(self, machine: Machine) -> float:
        """Whichever takes longer at the machine's rates."""
        return max(self.flops / machine.best_flops, self.bytes / machine.bytes)


def frame_floor(case: StreamCase) -> Floor:
    width = 64 * case.heads
    number = {"float32": 4, "bfloat16": 2}[case.dtype]  # bytes
    branches = 1 if case.guidance == "none" else 2
    products = 2 * 12 * width**2  # of one token in one layer
    weights = 12 * width**2 * number  # of one layer
    keys = TOKENS * case.context
    cache = 2 * keys * width * number  # of one layer
    over_past = TOKENS * products + 4 * TOKENS * (keys + TOKENS) * width
    if not case.encoder_layers:  # every step and one more pass, for the finished frame
        passes = case.decoder_layers * (branches * case.steps + 1)
        layers = case.decoder_layers * (case.steps + 1)
        return Floor(passes * over_past, layers * weights + passes * cache)
    both = 2 * TOKENS  # context and noisy tokens; of the last layer, the noisy ones after q, k, v
    layer = both * products + 4 * both * both * width
    last = TOKENS * products + TOKENS * 2 * 3 * width**2 + 4 * TOKENS * both * width
    step = (case.decoder_layers - 1) * layer + last
    return Floor(
        case.encoder_layers * over_past + branches * case.steps * step,
        case.encoder_layers * (weights + cache) + case.steps * case.decoder_layers * weights,
    )
