"""Surgeries: a model with layers skipped, blind to the past, or left out. Each within a `with`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from einops import rearrange
from torch import Tensor, nn

from scd.analysis.hooks import attention_of, block_outputs, step_blocks, step_clock
from scd.models import WorldModel
from scd.models.attention import full_attention


@contextmanager
def layers_skipped(model: WorldModel, first: int, last: int, full_steps: int) -> Iterator[None]:
    """In rollouts, after the first `full_steps` steps of a frame, blocks first..last-1 do not look.

    Each adds to its tokens what it added at the last full step. (Of the blocks that run at every
    step; they are computed all the same, only their result is not used.)
    """
    added: dict[int, Tensor] = {}
    with step_clock(model) as clock:

        def reuse(number: int, before: Tensor, out: Tensor) -> Tensor | None:
            if clock.step is None or clock.step < 0:
                return None
            if clock.step < full_steps:
                added[number] = out - before
                return None
            return before + added[number]

        with block_outputs(step_blocks(model)[first:last], reuse):
            yield


@contextmanager
def frame_diagonal(blocks: Sequence[nn.Module], tokens_per_frame: int) -> Iterator[None]:
    """The blocks' tokens see those of their own frame only, in training, loss and rollouts."""
    attend = partial(own_frame_attention, tokens_per_frame=tokens_per_frame)
    with attention_of(blocks, lambda number, causal: attend):
        yield


def own_frame_attention(q: Tensor, k: Tensor, v: Tensor, tokens_per_frame: int) -> Tensor:
    """(B, heads, F·N, head_dim) each. A cache gives a layer the newest frames' keys, so this holds
    with and without one."""
    batch = q.shape[0]
    q, k, v = (rearrange(x, "b h (f n) d -> (b f) h n d", n=tokens_per_frame) for x in (q, k, v))
    return rearrange(full_attention(q, k, v), "(b f) h n d -> b h (f n) d", b=batch)


@contextmanager
def left_out(block: nn.Module) -> Iterator[None]:
    """The block hands its tokens on as they are."""
    with block_outputs([block], lambda number, before, out: before):
        yield
