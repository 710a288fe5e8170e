"""The probes that only look: features over the steps, attention over the frames."""

import torch
from torch import Tensor

from scd.analysis import figures
from scd.analysis.attention_mass import AttentionMass, attention_mass
from scd.analysis.html_report import Section
from scd.analysis.interventions import past_blocks, step_blocks
from scd.analysis.probed_model import ProbedModel
from scd.analysis.similarity import (
    STEADY,
    STEADY_SHARE,
    Redundancy,
    between_steps,
    plateaus,
    principal_pictures,
    redundancy,
    watch_steps,
)
from scd.flow.sampler import noise_levels
from scd.models import SCD

SHOWN_STEPS = 16  # at most, in the features' pictures
CHANCE = 1.645  # of a rank correlation times √(layers − 1): one random order in 20 is beyond it
FEWEST_LAYERS = 4  # with fewer, every order is likely by chance


def look_at_features(bench: ProbedModel) -> Section:
    """Redundancy across steps, and the features' pictures."""
    model, n, steps = bench.model, len(bench.clips), bench.steps
    trajectory = watch_steps(model, bench.clips, steps, bench.seed)
    found = redundancy(trajectory.features)
    part = "decoder" if isinstance(model, SCD) else "layer"
    names = ["embedding", *(f"{part} {i}" for i in range(1, len(step_blocks(model)) + 1))]
    rows = bench.clips.latents.shape[-2] // model.config.patch_size
    # The last step hardly moves: its estimate is all but the frame that it is given.
    shown = torch.linspace(0, steps - 2, min(steps - 1, SHOWN_STEPS)).round().long()
    levels = noise_levels(steps)
    figure = figures.feature_pictures(
        principal_pictures(trajectory.features, 0)[:, shown],
        bench.loaded.codec.decode(trajectory.estimates[None, shown, 0])[0].cpu(),
        bench.clips.video[0, bench.clips.known].cpu(),
        names,
        [f"{step + 1}\nσ {levels[step]:.2f}" for step in shown.tolist()],
        (rows, trajectory.features.shape[3] // rows),
    )
    bench.bar.update()
    return Section(
        "redundancy",
        "Redundancy across denoising steps",
        told_features(found, names, n, isinstance(model, SCD)),
        f"Hidden tokens of the first new frame after every block, {steps} Euler steps under the "
        f"real history of {bench.clips.known} frames; cosine similarity by token, mean over tokens "
        f"and clips. The same features: above {STEADY}, and at least half way from the similarity "
        f"of two different clips to 1. The finding leaves out the last step, whose noise level of "
        f"0.001 training hardly meets. A part of every feature is the same for all frames: the "
        f"right panel of the curves takes the layer's mean token off. Pictures: of clip "
        f"{bench.clips.numbers[0]}, the three main directions as colours, one basis a layer.",
        {
            "similarity": figures.similarity_matrices(found.similarity, names, n),
            "similarity_to_last": figures.similarity_to_last(
                found.similarity, found.error, found.centred, found.floor, names, n
            ),
            "features": figure,
        },
        numbers={
            "layers": names,
            "similarity": found.similarity,
            "similarity_without_mean": found.centred,
            "standard_error_to_last": found.error,
            "two_steps": between_steps(found.similarity),
            "two_clips": found.floor,
            "plateaus": [vars(plateau) for plateau in plateaus(found)],
            "steady_layers": steady_layers(found),
        },
    )


def look_at_attention(bench: ProbedModel) -> Section:
    """Sparsity across frames."""
    model, n = bench.model, len(bench.clips)
    found = attention_mass(model, bench.clips, bench.steps, bench.seed)
    separate = isinstance(model, SCD)
    layers = len(past_blocks(model))
    names = [f"{'encoder' if separate else 'layer'} {i}" for i in range(1, layers + 1)]
    pictures = {
        "attention": figures.attention_on_past(
            found.past[0], found.past[-1], names, not separate, n
        )
    }
    numbers = {"on_past": found.on_past, "by_new_frame": found.past}
    if found.context is not None:
        pictures["attention_context"] = figures.attention_on_context(found.context, n)
        numbers["decoder_on_context"] = found.context
    bench.bar.update()
    whose = "the newest clean frame, once per frame" if separate else "the noisy frame, every step"
    return Section(
        "attention",
        "Sparsity across frames",
        told_attention(found, n, separate),
        f"Exact attention mass by key frame (softmax over the frames' log-sum-exp), mean over the "
        f"queries of {whose}, and clips. The first new frame has a real history, the last of "
        f"{bench.clips.new_frames} a generated one.",
        pictures,
        numbers=numbers,
    )


def steady_layers(found: Redundancy) -> int:
    """The deepest layer, counted from 1, whose features are the same at most steps; 0: none."""
    wide = [plateau.wide for plateau in plateaus(found)[1:]]
    return max((layer for layer, is_wide in enumerate(wide, 1) if is_wide), default=0)


def told_features(found: Redundancy, names: list[str], n: int, separate: bool) -> str:
    """The finding in words."""
    layers = plateaus(found)[1:]
    widest = max(range(len(layers)), key=lambda layer: layers[layer].share)
    best, name = layers[widest], names[widest + 1]
    if separate:
        begin = "What the decoder repeats at every step: "
    else:
        begin = (
            f"The paper's first finding (a layer with the same features at most steps) "
            f"{'holds' if best.wide else 'does not hold'} here: "
        )
    steps = found.similarity.shape[-1]
    held = (
        f"{name} stays above a similarity of {best.bar:.2f} at {100 * best.share:.0f} % of the "
        f"steps ({best.first} to {best.last} of {steps}; asked for: {100 * STEADY_SHARE:.0f} %)"
        if best.share
        else f"no two steps of any layer are more similar than {best.bar:.2f}"
    )
    pairs = between_steps(found.similarity)[1:].tolist()
    told = ", ".join(f"{name} {value:.2f}" for name, value in zip(names[1:], pairs, strict=True))
    return (
        f"{begin}{held}. Mean similarity of two different steps: {told}; of two different clips at "
        f"one step: {float(found.floor[1:].mean()):.2f} (n = {n} clips)."
    )


def told_attention(found: AttentionMass, n: int, separate: bool) -> str:
    """The finding in words."""
    by_layer = found.on_past.mean(dim=(0, 2))
    past = found.past[0].shape[-1] - 1
    if separate:
        begin = "Of the newest clean frame's attention in the encoder"
    else:
        begin = (
            f"The paper's second finding (the deeper the layer, the less attention to past frames) "
            f"{_told_trend(by_layer)}: of the new frame's attention"
        )
    shares = ", ".join(f"{100 * value:.0f}" for value in by_layer.tolist())
    newest = 100 * float(found.past[0][..., -2].mean())
    told = (
        f"{begin}, layer by layer {shares} % goes to the {past} past frames "
        f"({100 * past / (past + 1):.0f} % if it were uniform), on average {newest:.0f} % to the "
        f"newest of them (n = {n} clips)."
    )
    if found.context is not None:
        told += (
            f" The decoder spends {100 * float(found.context.mean()):.0f} % of its attention on "
            f"the context tokens ({100 * float(found.context[0].mean()):.0f} % at the first step, "
            f"{100 * float(found.context[-1].mean()):.0f} % at the last)."
        )
    return told


def _told_trend(by_layer: Tensor) -> str:
    layers = len(by_layer)
    if layers < FEWEST_LAYERS:
        return f"cannot be judged on {layers} layers"
    trend = rank_correlation(torch.arange(layers), by_layer)
    verdict = "holds" if trend * (layers - 1) ** 0.5 <= -CHANCE else "does not hold"
    return f"{verdict} here (rank correlation with depth {trend:+.2f}, {layers} layers)"


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's, of two vectors without equal values."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])
