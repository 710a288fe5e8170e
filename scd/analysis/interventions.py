"""Intervene in a running model by hooks: skip, mask or bypass its layers, or cut its graph."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from scd.models import SCD, CausalWorldModel
from scd.models.attention import within_frames_attention
from scd.models.layers import Attend
from scd.models.world_model import FrameDenoiser

CLEAN_PASS = -1  # the "step" in which the newest clean frame is encoded into the KV cache


def denoising_blocks(model: CausalWorldModel) -> list[nn.Module]:
    """List the blocks that run at every denoising step."""
    return list(model.decoder.blocks if isinstance(model, SCD) else model.blocks)


def causal_blocks(model: CausalWorldModel) -> list[nn.Module]:
    """List the blocks that attend to past frames."""
    return list(model.encoder.blocks if isinstance(model, SCD) else model.blocks)


def named_blocks(model: CausalWorldModel) -> dict[str, nn.Module]:
    """List every block under its name in reports, such as `encoder 3`."""
    if isinstance(model, SCD):
        parts = {"encoder": model.encoder.blocks, "decoder": model.decoder.blocks}
    else:
        parts = {"layer": model.blocks}
    return {
        f"{part} {number}": block
        for part, blocks in parts.items()
        for number, block in enumerate(blocks, 1)
    }


class CurrentStep:
    """Where a rollout is; `step` counts a frame's denoising steps from 0, is `CLEAN_PASS` between
    frames, and None during prefill."""

    step: int | None = None


@contextmanager
def track_steps(
    model: CausalWorldModel, on_step: Callable[[int, Tensor, Tensor], None] | None = None
) -> Iterator[CurrentStep]:
    """Track which denoising step the model is at, in rollouts inside this context.

    Args:
        on_step: called after every step with its number, the noisy frames and the velocities,
            (B, 1, C, H, W) each.
    """
    current = CurrentStep()
    before, plain = model.__dict__.get("begin_frame"), model.begin_frame

    def begin_frame(*args: Any, **kwargs: Any) -> FrameDenoiser:
        current.step = CLEAN_PASS
        denoiser = plain(*args, **kwargs)
        current.step = None

        def tracked(noisy: Tensor, step: int, *inputs: Tensor) -> Tensor:
            current.step = step
            velocity = denoiser.velocity(noisy, step, *inputs)
            current.step = None
            if on_step is not None:
                on_step(step, noisy, velocity)
            return velocity

        return denoiser._replace(velocity=tracked)

    model.begin_frame = begin_frame  # type: ignore[method-assign]
    try:
        yield current
    finally:
        if before is None:
            del model.begin_frame
        else:  # another tracker is still active
            model.begin_frame = before  # type: ignore[method-assign]


@contextmanager
def hook_block_outputs(
    blocks: Iterable[nn.Module], change: Callable[[int, Tensor, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call `change` after every block, and let it replace the block's output.

    Args:
        change: (block number, input, output) -> new output, or None to keep it. All are hidden
            states (B, F, N, D) of the same tokens.
    """
    with ExitStack() as stack:
        for number, block in enumerate(blocks):

            def hook(_: nn.Module, args: tuple, out: Tensor, number: int = number) -> Tensor | None:
                return change(number, args[0][:, :, -out.shape[2] :], out)

            stack.enter_context(_removed_after(block.register_forward_hook(hook)))
        yield


@contextmanager
def replace_attention(
    blocks: Iterable[nn.Module], change: Callable[[int, Attend], Attend]
) -> Iterator[None]:
    """Replace every block's attention function by `change(block number, function)`."""
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
def cut_context(
    model: CausalWorldModel, clean_tokens: int
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Cut the graph of a teacher-forced forward where noisy tokens read what clean ones wrote.

    A dense model is cut at the keys and values of its clean tokens in every layer, where noisy
    tokens read them; clean tokens go on reading each other's. An SCD is cut at the context.

    Args:
        clean_tokens: of the sequence [clean ‖ noisy] of a dense model.

    Yields:
        A list that the forward fills: what was written, and the leaf that is read in its place.
    """
    cuts: list[tuple[Tensor, Tensor]] = []

    def cut(written: Tensor) -> Tensor:
        read = written.detach().requires_grad_()
        cuts.append((written, read))
        return read

    def cut_keys(number: int, attend: Attend) -> Attend:
        def attend_cut(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k_read, v_read = (
                torch.cat([cut(x[:, :, :clean_tokens]), x[:, :, clean_tokens:]], dim=2)
                for x in (k, v)
            )
            clean = attend(q, k, v)[:, :, :clean_tokens]
            noisy = attend(q, k_read, v_read)[:, :, clean_tokens:]
            return torch.cat([clean, noisy], dim=2)

        return attend_cut

    if isinstance(model, SCD):
        hook = model.encoder.register_forward_hook(lambda module, args, context: cut(context))
        with _removed_after(hook):
            yield cuts
    else:
        with replace_attention(causal_blocks(model), cut_keys):
            yield cuts


@contextmanager
def skip_layers(model: CausalWorldModel, first: int, last: int, full_steps: int) -> Iterator[None]:
    """Skip denoising blocks first..last-1 in rollouts, after a frame's first `full_steps` steps.

    A skipped block adds to its tokens what it added at the last full step. It is still computed:
    this measures what skipping costs in quality, not what it saves in time.
    """
    added: dict[int, Tensor] = {}
    with track_steps(model) as current:

        def reuse(number: int, before: Tensor, out: Tensor) -> Tensor | None:
            if current.step is None or current.step < 0:
                return None
            if current.step < full_steps:
                added[number] = out - before
                return None
            return before + added[number]

        with hook_block_outputs(denoising_blocks(model)[first:last], reuse):
            yield


@contextmanager
def frame_diagonal_attention(blocks: Sequence[nn.Module], tokens_per_frame: int) -> Iterator[None]:
    """Mask the blocks' attention to the tokens of the same frame, in training and in rollouts."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # A KV cache passes the newest frames' keys to a layer, so this holds with and without one.
        return within_frames_attention(q, k, v, k.shape[2] // tokens_per_frame)

    with replace_attention(blocks, lambda number, causal: attend):
        yield


@contextmanager
def bypass(block: nn.Module) -> Iterator[None]:
    """Bypass a block: its output is its input."""
    with hook_block_outputs([block], lambda number, before, out: before):
        yield
