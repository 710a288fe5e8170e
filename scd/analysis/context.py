"""SCD's context: is it sufficient, and does the decoder use it? Swap, zero, shuffle, delay it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
    """Of every frame that can be predicted, (n, F', N, D)."""
    found = []
    for clip in clips.parts(1):
        conditions = clip.conditions(model)
        following = None if conditions is None else conditions[:, model.first_predicted :]
        found.append(model.encoder(clip.latents[:, :-1], following))
    return torch.cat(found)


def context_given(model: SCD, context: Tensor, clips: ProbeClips) -> Around:
    """For `loss_by_level` and `FrameJudge`: the decoder gets these contexts (n, F', N, D) of clips.

    A rollout makes the frame of the last of them: `clips` have one new frame.
    """

    @contextmanager
    def around(part: ProbeClips) -> Iterator[None]:
        given = context[part.first - clips.first :][: len(part)]
        # The output norm, because rollouts call the encoder's parts one by one.
        handle = model.encoder.norm_out.register_forward_hook(
            lambda module, args, out: given[:, -out.shape[1] :].type_as(out)
        )
        try:
            yield
        finally:
            handle.remove()

    return around
