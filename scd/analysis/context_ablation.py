"""Context ablation: is SCD's context sufficient, and does the decoder use it?

The decoder gets a swapped, zeroed, shuffled or delayed context, or one whose encoder saw less past.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from scd.analysis import figures
from scd.analysis.html_report import Section
from scd.analysis.measurements import Intervention, ProbeClips
from scd.analysis.probed_model import TOLERANCE, ProbedModel, percent
from scd.flow.objective import LEVELS
from scd.models import SCD
from scd.utils.seeding import generator


def swap(context: Tensor) -> Tensor:
    """Give each clip its neighbor's context, (B, F, N, D)."""
    return context.roll(1, dims=0)


def zero(context: Tensor) -> Tensor:
    """Set the context to zero."""
    return torch.zeros_like(context)


def shuffle(context: Tensor) -> Tensor:
    """Permute the tokens, all frames alike: what is there is kept, where it is gets lost."""
    order = torch.randperm(context.shape[2], generator=generator("cpu", "probe shuffle"))
    return context[:, :, order.to(context.device)]


def delay(context: Tensor) -> Tensor:
    """Give each frame the context of the frame before it; the first one keeps its own."""
    return torch.cat([context[:, :1], context[:, :-1]], dim=1)


ABLATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "one frame late": delay,
    "tokens shuffled": shuffle,
    "of another clip": swap,
    "zero": zero,
}


def probe_context(probed: ProbedModel) -> Section:
    """Ablate the context of the first new frame, and shorten the encoder's history."""
    model, clips = probed.model, probed.clips.cut(1)
    assert isinstance(model, SCD)
    one_frame = ProbedModel(probed.loaded, clips, probed.steps, probed.progress, last_frame=True)
    context = encode_contexts(model, clips)
    contexts = {name: ablate(context) for name, ablate in ABLATIONS.items()}
    history = {f"{k} newest frame{'s' * (k > 1)}": k for k in history_lengths(clips.known)}
    contexts |= {name: encode_last_context(model, clips, k) for name, k in history.items()}
    ablated = {
        name: one_frame.measure(name, model, intervention=replace_context(model, other, clips))
        for name, other in contexts.items()
    }
    cost = {name: one_frame.loss_increase(measurement) for name, measurement in ablated.items()}
    costs = "; ".join(f"{name}: {percent(cost[name])}" for name in ABLATIONS)
    of_history = {frames: cost[name] for name, frames in history.items()}
    return Section(
        "context",
        "Is the context sufficient, and used?",
        f"Increase of the loss with a wrong context (n = {len(clips)} clips): {costs}. "
        f"{describe_history(of_history, clips.known)}",
        f"The decoder of the frame after {clips.known} real ones gets another context: that of the "
        f"frame before, its own with the tokens shuffled, that of another clip, zeros, or the "
        f"encoder's output given only the newest of the {clips.known} frames. The loss is that of "
        f"this frame alone, with the same noise for all; frames take {probed.steps} steps. "
        f"eval.context_frames=… probes longer histories.",
        {
            "context": figures.loss_increase(
                one_frame.loss_percent([*ablated.values()]),
                LEVELS,
                [*ablated],
                f"Loss with another context, increase in % (n = {len(clips)})",
            )
        },
        one_frame.table([*ablated.values()]),
        {
            "variants": [one_frame.to_json(m) for m in (one_frame.unmodified, *ablated.values())],
            "history": of_history,
        },
    )


def count_context(known: int) -> int:
    """Count the measurements of `probe_context`, for the progress bar."""
    return len(ABLATIONS) + len(history_lengths(known)) + 1  # and the unmodified model


def history_lengths(known: int) -> list[int]:
    """List the numbers of frames to shorten the history to: 1, 2, 4, … below `known`."""
    return [2**power for power in range(known) if 2**power < known]


@torch.no_grad()
def encode_contexts(model: SCD, clips: ProbeClips) -> Tensor:
    """Encode the context of every frame that can be predicted, (n, F', N, D)."""
    contexts = []
    for clip in clips.parts(1):
        conditions = clip.conditions(model)
        following = None if conditions is None else conditions[:, model.first_predicted :]
        contexts.append(model.encoder(clip.latents[:, :-1], following))
    return torch.cat(contexts)


def encode_last_context(model: SCD, clips: ProbeClips, frames: int) -> Tensor:
    """Encode the last frame's context from only `frames` frames before it, (n, 1, N, D)."""
    newest = slice(-frames - 1, None)
    actions = None if clips.actions is None else clips.actions[:, newest]
    clips = replace(clips, latents=clips.latents[:, newest], actions=actions)
    return encode_contexts(model, clips)[:, -1:]


def replace_context(model: SCD, context: Tensor, clips: ProbeClips) -> Intervention:
    """Make the intervention under which the decoder gets this context.

    Args:
        context: (n, F', N, D), of every predicted frame of `clips`; or (n, 1, N, D), of the last
            frame alone, whose loss is then the only one to measure.
        clips: with one new frame, so that a rollout makes the last one.
    """

    @contextmanager
    def intervention(part: ProbeClips) -> Iterator[None]:
        given = context[clips.numbers.index(part.numbers[0]) :][: len(part)]
        # At the output norm, because rollouts call the encoder's parts one by one.
        handle = model.encoder.norm_out.register_forward_hook(
            lambda module, args, out: given[:, -out.shape[1] :].type_as(out).expand_as(out)
        )
        try:
            yield
        finally:
            handle.remove()

    return intervention


def describe_history(costs: dict[int, tuple[float, float]], known: int) -> str:
    """Summarize how much of the past the context carries.

    Args:
        costs: frames that the encoder saw -> increase of the loss compared with all `known`.
    """
    increases = ", ".join(f"{frames}: {percent(cost)}" for frames, cost in costs.items())
    costly = [k for k, (mean, _) in costs.items() if not mean <= TOLERANCE]
    enough = min((k for k in costs if k > max(costly, default=0)), default=None)
    verdict = (
        f"frames before the newest {enough} reduce the loss by less than {100 * TOLERANCE:.0f} %"
        if enough is not None
        else f"the longest of these costs more than {100 * TOLERANCE:.0f} %"
    )
    return f"With an encoder that sees only the newest of {known} frames: {increases}; {verdict}."
