"""The probes that only look: features over the steps, attention over the frames."""

import torch

from scd.analysis import figures
from scd.analysis.attention_mass import AttentionMass, attention_mass
from scd.analysis.bench import Bench
from scd.analysis.hooks import past_blocks, step_blocks
from scd.analysis.redundancy import Redundancy, principal_pictures, redundancy, watch_steps
from scd.analysis.report import Section
from scd.models import SCD

STEADY = 0.95  # similarity that counts as "the same features"; the paper's figure
STEADY_SHARE = 0.8  # of the steps, in the paper
SHOWN_STEPS = 16  # at most, in the features' pictures


def look_at_features(bench: Bench) -> Section:
    """Redundancy across steps, and the features' pictures."""
    model, n, steps = bench.model, len(bench.clips), bench.steps
    trajectory = watch_steps(model, bench.clips, steps, bench.seed)
    found = redundancy(trajectory.features)
    part = "decoder" if isinstance(model, SCD) else "layer"
    names = ["embedding", *(f"{part} {i}" for i in range(1, len(step_blocks(model)) + 1))]
    finding = _told_features(found, names, isinstance(model, SCD))
    rows = bench.clips.latents.shape[-2] // model.config.patch_size
    shown = torch.linspace(0, steps - 1, min(steps, SHOWN_STEPS)).round().long()
    figure = figures.feature_pictures(
        principal_pictures(trajectory.features, 0)[:, shown],
        bench.loaded.codec.decode(trajectory.estimates[None, shown, 0])[0].cpu(),
        bench.clips.video[0, bench.clips.known].cpu(),
        names,
        (rows, trajectory.features.shape[3] // rows),
    )
    bench.bar.update()
    return Section(
        "redundancy",
        "Redundancy across denoising steps",
        finding,
        f"Hidden tokens of the first new frame after every block, {steps} Euler steps under the "
        f"real history of {bench.clips.known} frames; cosine similarity by token, mean over tokens "
        f"and {n} clips. A part of every feature is the same for all frames: the right panel takes "
        f"the layer's mean token off. Pictures: the three main directions as colours, one basis a "
        f"layer.",
        {
            "similarity": figures.similarity_matrices(found.similarity, names, n),
            "similarity_to_last": figures.similarity_to_last(
                found.to_last, found.error, found.centred[:, :, -1], found.floor, names, n
            ),
            "features": figure,
        },
        numbers={
            "layers": names,
            "similarity": found.similarity,
            "similarity_without_mean": found.centred,
            "standard_error_to_last": found.error,
            "two_clips": found.floor,
        },
    )


def look_at_attention(bench: Bench) -> Section:
    """Sparsity across frames."""
    model, n = bench.model, len(bench.clips)
    found = attention_mass(model, bench.clips, bench.steps, bench.seed)
    separate = isinstance(model, SCD)
    layers = len(past_blocks(model))
    names = [f"{'encoder' if separate else 'layer'} {i}" for i in range(1, layers + 1)]
    finding = _told_attention(found, separate)
    pictures = {
        "attention": figures.attention_on_past(
            found.past[0], found.past[-1], names, not separate, n
        )
    }
    numbers = {"on_past": found.on_past, "by_new_frame": found.past}
    if found.context is not None:
        pictures["attention_context"] = figures.attention_on_context(found.context, n)
        numbers["decoder_on_context"] = found.context
        finding += (
            f" The decoder spends {100 * float(found.context.mean()):.0f} % of its attention on "
            f"the context tokens ({100 * float(found.context[0].mean()):.0f} % at the first step, "
            f"{100 * float(found.context[-1].mean()):.0f} % at the last)."
        )
    bench.bar.update()
    whose = "the newest clean frame, once per frame" if separate else "the noisy frame, every step"
    return Section(
        "attention",
        "Sparsity across frames",
        finding,
        f"Exact attention mass by key frame (softmax over the frames' log-sum-exp), mean over the "
        f"queries of {whose}, and {n} clips. The first new frame has a real history, the last of "
        f"{bench.clips.new_frames} a generated one.",
        pictures,
        numbers=numbers,
    )


def _told_features(found: Redundancy, names: list[str], separate: bool) -> str:
    """The finding in words.

    The last step of a rollout has a noise level of its own, 0.001, that training hardly meets: so
    the similarity to the step before it is told as well.
    """
    steady = [(found.similarity[1:, :end, end] > STEADY).float().mean(dim=1) for end in (-1, -2)]
    shares = []
    for share in steady:
        best = int(share.argmax())
        held = f"{names[best + 1]} at {100 * float(share[best]):.0f} % of the steps before"
        shares.append(held if float(share[best]) else "no block at any step")
    pairs = found.similarity[1:].mean(dim=(1, 2)).tolist()
    told = ", ".join(f"{name} {value:.2f}" for name, value in zip(names[1:], pairs, strict=True))
    if separate:
        begin = "What the decoder repeats at every step: "
    else:
        verdict = "holds" if float(steady[0].max()) >= STEADY_SHARE else "does not hold"
        begin = (
            f"The paper's first finding (a middle layer above {STEADY} at {100 * STEADY_SHARE:.0f} "
            f"% of the steps) {verdict} here: "
        )
    return (
        f"{begin}a similarity above {STEADY} to the last step has {shares[0]}, to the last but one "
        f"{shares[1]}. Mean similarity of two steps: {told}; "
        f"of two different clips at one step: {float(found.floor[1:].mean()):.2f}."
    )


def _told_attention(found: AttentionMass, separate: bool) -> str:
    """The finding in words."""
    by_layer = found.on_past.mean(dim=(0, 2))
    past = found.past[0].shape[-1] - 1
    if separate:
        begin = "Of the newest clean frame's attention in the encoder"
    else:
        falls = by_layer[-1] < by_layer[0] and by_layer.argmin() == len(by_layer) - 1
        begin = (
            f"The paper's second finding (the deeper the layer, the less attention to past frames) "
            f"{'holds' if falls else 'does not hold'} here: of the new frame's attention"
        )
    shares = ", ".join(f"{100 * value:.0f}" for value in by_layer.tolist())
    newest = 100 * float(found.past[0][..., -2].mean())
    return (
        f"{begin}, layer by layer {shares} % goes to the {past} past frames "
        f"({100 * past / (past + 1):.0f} % if it were uniform), on average {newest:.0f} % to the "
        f"newest of them."
    )
