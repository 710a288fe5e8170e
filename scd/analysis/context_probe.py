"""SCD's context: is it sufficient, and does the decoder use it? Swap, zero, shuffle, delay it, or
let the encoder see less of the past."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from scd.analysis import figures
from scd.analysis.html_report import Section
from scd.analysis.probe_clips import ProbeClips
from scd.analysis.probed_model import TOLERANCE, ProbedModel, percent
from scd.analysis.quality import Around
from scd.flow.objective import LEVELS
from scd.models import SCD
from scd.utils.seeding import generator

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


def change_context(bench: ProbedModel) -> Section:
    """Swap, zero, shuffle and delay the context of the first new frame; shorten its history."""
    model, clips = bench.model, bench.clips.cut(1)
    assert isinstance(model, SCD)
    of_one = ProbedModel(bench.loaded, clips, bench.steps, bench.bar, last_frame=True)
    right = contexts(model, clips)
    given = {name: change(right) for name, change in CHANGES.items()}
    history = {f"{k} newest frame{'s' * (k > 1)}": k for k in shorter(clips.known)}
    given |= {name: of_newest(model, clips, frames) for name, frames in history.items()}
    variants = {
        name: of_one.measure(name, model, around=context_given(model, context, clips))
        for name, context in given.items()
    }
    cost = {name: of_one.loss_increase(variant) for name, variant in variants.items()}
    told = "; ".join(f"{name}: {percent(cost[name])}" for name in CHANGES)
    of_history = {frames: cost[name] for name, frames in history.items()}
    return Section(
        "context",
        "Is the context sufficient, and used?",
        f"What a wrong context costs, in loss (n = {len(clips)} clips): {told}. "
        f"{told_history(of_history, clips.known)}",
        f"The decoder of the frame after {clips.known} real ones gets another context: that of the "
        f"frame before, its own with the tokens in another order, that of another clip, zeros, or "
        f"what the encoder makes of only the newest of the {clips.known} frames. The loss is of "
        f"this frame alone, the same noise for all; frames in {bench.steps} steps. "
        f"eval.context_frames=… asks about longer histories.",
        {
            "context": figures.loss_increase(
                of_one.loss_percent([*variants.values()]),
                LEVELS,
                [*variants],
                f"Loss under another context, increase in % (n = {len(clips)})",
            )
        },
        of_one.table([*variants.values()]),
        {
            "variants": [of_one.numbers(v) for v in (of_one.untouched, *variants.values())],
            "history": of_history,
        },
    )


def change_count(known: int) -> int:
    return len(CHANGES) + len(shorter(known)) + 1  # and the right one


def shorter(known: int) -> list[int]:
    """1, 2, 4, … frames, fewer than those given."""
    return [2**power for power in range(known) if 2**power < known]


def told_history(costs: dict[int, tuple[float, float]], known: int) -> str:
    """How much past the context carries.

    Args:
        costs: frames that the encoder was given -> increase of the loss against all `known`.
    """
    told = ", ".join(f"{frames}: {percent(cost)}" for frames, cost in costs.items())
    enough = min((k for k, (mean, _) in costs.items() if mean <= TOLERANCE), default=None)
    verdict = (
        f"what lies before the newest {enough} gains less than {100 * TOLERANCE:.0f} %"
        if enough is not None
        else f"each of these loses more than {100 * TOLERANCE:.0f} %"
    )
    return f"With an encoder that sees only the newest of {known} frames: {told}; {verdict}."
