"""Intervene in a model: hooks on its blocks and attention; layers skipped, blinded or left out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from scd.models import SCD, WorldModel
from scd.models.attention import full_attention
from scd.models.layers import Attend
from scd.models.world_model import FrameDenoiser

CLEAN_PASS = -1  # the "step" in which the newest clean frame is encoded


def step_blocks(model: WorldModel) -> list[nn.Module]:
    """The blocks that run at every denoising step."""
    return list(model.decoder.blocks if isinstance(model, SCD) else model.blocks)


def past_blocks(model: WorldModel) -> list[nn.Module]:
    """The blocks that see past frames."""
    return list(model.encoder.blocks if isinstance(model, SCD) else model.blocks)


def all_blocks(model: WorldModel) -> dict[str, nn.Module]:
    """Every block by the name that reports call it."""
    if isinstance(model, SCD):
        parts = {"encoder": model.encoder.blocks, "decoder": model.decoder.blocks}
    else:
        parts = {"layer": model.blocks}
    return {
        f"{part} {number}": block
        for part, blocks in parts.items()
        for number, block in enumerate(blocks, 1)
    }


class StepClock:
    """`step`: of the rollout, from 0; `CLEAN_PASS`; or None during prefill."""

    step: int | None = None


@contextmanager
def step_clock(
    model: WorldModel, see: Callable[[int, Tensor, Tensor], None] | None = None
) -> Iterator[StepClock]:
    """A clock that goes while the model makes frames.

    Args:
        see: gets every step's number, noisy frames and velocities, (B, 1, C, H, W).
    """
    clock = StepClock()
    before, plain = model.__dict__.get("begin_frame"), model.begin_frame

    def begin_frame(*args: Any, **kwargs: Any) -> FrameDenoiser:
        clock.step = CLEAN_PASS
        denoiser = plain(*args, **kwargs)
        clock.step = None

        def timed(noisy: Tensor, step: int, *inputs: Tensor) -> Tensor:
            clock.step = step
            velocity = denoiser.velocity(noisy, step, *inputs)
            clock.step = None
            if see is not None:
                see(step, noisy, velocity)
            return velocity

        return denoiser._replace(velocity=timed)

    model.begin_frame = begin_frame  # type: ignore[method-assign]
    try:
        yield clock
    finally:
        if before is None:
            del model.begin_frame
        else:  # another clock goes on
            model.begin_frame = before  # type: ignore[method-assign]


@contextmanager
def block_outputs(
    blocks: Iterable[nn.Module], change: Callable[[int, Tensor, Tensor], Tensor | None]
) -> Iterator[None]:
    """Show every block's run to `change`, and let it replace what comes out.

    Args:
        change: number of the block, tokens that went in and that came out, both (B, F, N, D) and
            of the same tokens -> what shall come out instead; None: leave it.
    """
    with ExitStack() as stack:
        for number, block in enumerate(blocks):

            def hook(_: nn.Module, args: tuple, out: Tensor, number: int = number) -> Tensor | None:
                return change(number, args[0][:, :, -out.shape[2] :], out)

            stack.enter_context(_removed_after(block.register_forward_hook(hook)))
        yield


@contextmanager
def attention_of(
    blocks: Iterable[nn.Module], change: Callable[[int, Attend], Attend]
) -> Iterator[None]:
    """Put another attention in the place of every block's own: `change(number, attend)`."""
    with ExitStack() as stack:
        for number, block in enumerate(blocks):

            def hook(_: nn.Module, args: tuple, number: int = number) -> tuple:
                x, rotary, attend, *rest = args
                return (x, rotary, change(number, attend), *rest)

            attention = block.attention
            assert isinstance(attention, nn.Module)
            stack.enter_context(_removed_after(attention.register_forward_pre_hook(hook)))
        yield


@contextmanager
def _removed_after(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


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
