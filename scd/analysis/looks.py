"""The probes that only look: features over the steps, attention over the frames."""

import torch

from scd.analysis import figures
from scd.analysis.attention_mass import attention_mass
from scd.analysis.bench import Bench
from scd.analysis.hooks import past_blocks, step_blocks
from scd.analysis.redundancy import principal_pictures, redundancy, watch_steps
from scd.analysis.report import Section
from scd.models import SCD

STEADY = 0.95  # similarity that counts as "the same features"; the paper's figure
SHOWN_STEPS = 16  # at most, in the features' pictures


def look_at_features(bench: Bench) -> Section:
    """Redundancy across steps, and the features' pictures."""
    model, n, steps = bench.model, len(bench.clips), bench.steps
    trajectory = watch_steps(model, bench.clips, steps, bench.seed)
    found = redundancy(trajectory.features)
    part = "decoder" if isinstance(model, SCD) else "layer"
    names = ["embedding", *(f"{part} {i}" for i in range(1, len(step_blocks(model)) + 1))]
    share = (found.to_last[1:, :-1] > STEADY).float().mean(dim=1)
    best = int(share.argmax())
    typical = found.similarity[1:].mean(dim=(1, 2))
    verdict = "holds" if float(share[best]) >= 0.8 else "does not hold"
    finding = (
        f"The paper's first finding {verdict} here: {names[best + 1]} keeps a similarity above "
        f"{STEADY} to the last step at {100 * float(share[best]):.0f} % of the earlier steps, more "
        f"than any other (in the paper: a middle layer at 80 %). Mean similarity of two steps: "
        f"{', '.join(f'{n} {v:.2f}' for n, v in zip(names[1:], typical.tolist(), strict=True))}; "
        f"of two different clips at one step: {float(found.floor[1:].mean()):.2f}."
    )
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
            "steady_share": share,
        },
    )


def look_at_attention(bench: Bench) -> Section:
    """Sparsity across frames."""
    model, n = bench.model, len(bench.clips)
    found = attention_mass(model, bench.clips, bench.steps, bench.seed)
    separate = isinstance(model, SCD)
    layers = len(past_blocks(model))
    names = [f"{'encoder' if separate else 'layer'} {i}" for i in range(1, layers + 1)]
    by_layer = found.on_past.mean(dim=(0, 2))
    frames = found.past[0].shape[-1]
    uniform = (frames - 1) / frames
    order = torch.arange(layers, dtype=torch.float)
    slope = float(torch.corrcoef(torch.stack([order, by_layer]))[0, 1]) if layers > 2 else 0.0
    verdict = "holds" if slope < -0.5 and by_layer[-1] < by_layer[0] - 0.1 else "does not hold"
    text = ", ".join(f"{100 * value:.0f}" for value in by_layer.tolist())
    newest = 100 * float(found.past[0][..., -2].mean())
    finding = (
        f"The paper's second finding (deeper layers attend less to the past) {verdict} here: of "
        f"the new frame's attention, by layer {text} % goes to the {frames - 1} past frames "
        f"({100 * uniform:.0f} % if it were uniform), and {newest:.0f} % on average to the newest "
        f"of them."
    )
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
