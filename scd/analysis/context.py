"""SCD's context: is it sufficient, and does the decoder use it? Swap, zero, shuffle, delay it, or
let the encoder see less of the past."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from scd.analysis.clips import ProbeClips
from scd.analysis.quality import Around
from scd.models import SCD
from scd.seeding import generator

Change = Callable[[Tensor], Tensor]


def of_another_clip(context: Tensor) -> Tensor:
    """Contexts (B, F, N, D): each clip gets its neighbour's."""
    return context.roll(1, dims=0)


def zeroed(context: Tensor) -> Tensor:
    return torch.zeros_like(context)


def tokens_shuffled(context: Tensor) -> Tensor:
    """One permutation of the tokens for all frames: what is there is kept, where it is is lost."""
    order = torch.randperm(context.shape[2], generator=generator("cpu", "probe shuffle"))
    return context[:, :, order.to(context.device)]


def delayed(context: Tensor) -> Tensor:
    """The context of the frame before; the first one keeps its own."""
    return torch.cat([context[:, :1], context[:, :-1]], dim=1)


CHANGES: dict[str, Change] = {
    "one frame late": delayed,
    "tokens shuffled": tokens_shuffled,
    "of another clip": of_another_clip,
    "zero": zeroed,
}


@torch.no_grad()
def contexts(model: SCD, clips: ProbeClips) -> Tensor:
    """Encode the context of every frame that can be predicted, (n, F', N, D)."""
    found = []
    for clip in clips.parts(1):
        conditions = clip.conditions(model)
        following = None if conditions is None else conditions[:, model.first_predicted :]
        found.append(model.encoder(clip.latents[:, :-1], following))
    return torch.cat(found)


def of_newest(model: SCD, clips: ProbeClips, frames: int) -> Tensor:
    """`contexts` of the last frame alone, the encoder given only so many frames before it."""
    newest = slice(-frames - 1, None)
    actions = None if clips.actions is None else clips.actions[:, newest]
    clips = replace(clips, latents=clips.latents[:, newest], actions=actions)
    return contexts(model, clips)[:, -1:]


def context_given(model: SCD, context: Tensor, clips: ProbeClips) -> Around:
    """For `loss_by_level` and `FrameJudge`: the decoder gets these contexts (n, F', N, D) of clips,
    or these of the last frame (n, 1, N, D), which is then the only one to look at.

    A rollout makes the last frame: `clips` have one new one.
    """

    @contextmanager
    def around(part: ProbeClips) -> Iterator[None]:
        given = context[clips.numbers.index(part.numbers[0]) :][: len(part)]
        # The output norm, because rollouts call the encoder's parts one by one.
        handle = model.encoder.norm_out.register_forward_hook(
            lambda module, args, out: given[:, -out.shape[1] :].type_as(out).expand_as(out)
        )
        try:
            yield
        finally:
            handle.remove()

    return around
