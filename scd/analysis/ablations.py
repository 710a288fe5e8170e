"""Ablations of layers: skip them after the first steps, mask their attention to the past, or bypass
them."""

import copy
from dataclasses import dataclass

from torch import Tensor

from scd.analysis import figures
from scd.analysis.html_report import Section
from scd.analysis.interventions import (
    bypass,
    causal_blocks,
    denoising_blocks,
    frame_diagonal_attention,
    named_blocks,
    skip_layers,
)
from scd.analysis.measurements import relative_increase
from scd.analysis.probed_model import TOLERANCE, WARMUP, Measurement, ProbedModel, percent
from scd.flow.objective import LEVELS
from scd.models import SCD

LR_SCALE = 0.3  # factor on the training's learning rates, in a short fine-tune
FALLING = 0.9  # a loss increase below this part of what it was halfway is still falling
PAPER_SKIPPED = (8 / 30, 22 / 30)  # the range of layers that the paper skips


# Layer skipping


def probe_layer_skipping(probed: ProbedModel) -> Section:
    """Skip ranges of layers after the first steps of a frame, and compare the frames."""
    model = probed.model
    part = "decoder block" if isinstance(model, SCD) else "layer"
    whole = full_steps(probed.steps)
    curves: dict[str, list[Measurement | None]] = {}
    for first, last in skip_ranges(len(denoising_blocks(model))):
        which = f"{part} {last}" if last == first + 1 else f"{part}s {first + 1}–{last}"
        curves[which] = []
        for full in whole:
            with skip_layers(model, first, last, full):
                name = f"{which} after {full} of {probed.steps} steps"
                curves[which].append(probed.measure(name, model, loss=False))
    skipped = [measured for curve in curves.values() for measured in curve if measured is not None]
    costs = {m.name: probed.difference(m, "psnr") for m in skipped[:: len(whole)]}
    text = ", ".join(f"{name}: {cost[0]:+.2f} ± {cost[1]:.2f} dB" for name, cost in costs.items())
    return Section(
        "skipped",
        "Skipping layers after the first steps",
        f"Change in PSNR when layers are skipped (n = {len(probed.clips)} clips): {text}.",
        "After the first s steps of a frame, the blocks of a range add to their tokens what they "
        "added at step s. The larger s, the less is skipped.",
        {
            "skipped": figures.differences(
                whole,
                probed.frame_panels(curves),
                "full steps before skipping",
                f"Layers skipped, compared with none (n = {len(probed.clips)})",
            )
        },
        probed.table(skipped),
        {"variants": [probed.to_json(measured) for measured in skipped]},
    )


def skip_ranges(layers: int) -> list[tuple[int, int]]:
    """Split the blocks into early, middle and late ranges; the paper's middle is 8 to 22 of 30."""
    low, high = (round(fraction * layers) for fraction in PAPER_SKIPPED)
    low = max(low, 1)
    high = max(low, min(high, layers - 1))
    ranges = [(0, low), (low, high), (high, layers)]
    return [(first, last) for first, last in ranges if first < last]


def full_steps(steps: int) -> list[int]:
    """List how many steps run in full before layers are skipped."""
    return sorted({max(1, steps // 8), max(1, steps // 4), max(1, steps // 2)} - {steps})


def count_skipping(probed: ProbedModel) -> int:
    """Count the measurements of `probe_layer_skipping`, for the progress bar."""
    return len(skip_ranges(len(denoising_blocks(probed.model)))) * len(full_steps(probed.steps))


# Attention masking


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned model as measured, and its loss (n, levels) after half of the steps."""

    measured: Measurement
    halfway: Tensor

    @property
    def loss(self) -> Tensor:
        assert self.measured.loss is not None
        return self.measured.loss


def probe_attention_mask(probed: ProbedModel) -> Section:
    """Mask attention to the past in the last k layers, before and after a short fine-tune."""
    model, blocks = probed.model, causal_blocks(probed.model)
    layers = len(blocks)
    ks = list(range(1, layers + 1))
    masked = {}
    for k in ks:
        with frame_diagonal_attention(blocks[layers - k :], probed.tokens):
            masked[k] = probed.measure(f"last {k}", model)
    tuned = {k: _fine_tune_masked(probed, k) for k in fine_tuned_depths(probed)}
    cost = {k: probed.loss_increase(measured) for k, measured in masked.items()}
    recovered = {k: relative_increase(tuned[k].loss, tuned[0].loss) for k in tuned if k}
    halfway = {k: relative_increase(tuned[k].halfway, tuned[0].halfway) for k in tuned if k}
    positions = [0, *ks]
    tuned_measured = {k: fine_tuned.measured for k, fine_tuned in tuned.items()}
    curves = {"as is": [{0: probed.unmodified, **masked}.get(k) for k in positions]}
    losses: dict[str, list[tuple[float, float] | None]] = {
        "as is": [(0.0, 0.0), *(_in_percent(cost[k]) for k in ks)]
    }
    if tuned:
        name = f"after {probed.fine_tune} steps of fine-tuning"
        curves[name] = [tuned_measured.get(k) for k in positions]
        against_control = {0: (0.0, 0.0), **recovered}
        losses[name] = [
            _in_percent(against_control[k]) if k in against_control else None for k in positions
        ]
    part = "encoder layers" if isinstance(model, SCD) else "layers"
    depth = maskable_depth(cost, recovered)
    return Section(
        "frame_diagonal",
        "Layers without attention to the past",
        describe_masking(layers, part, len(probed.clips), cost)
        + describe_recovery(layers, probed.fine_tune, recovered, halfway),
        f"The causal mask of the last k {part} is replaced by a frame-diagonal one. Loss: mean of "
        f"the increases at σ = {', '.join(f'{level:g}' for level in LEVELS)}, with the same noise "
        f"for all. Fine-tuning: the training's objective, data and optimizer, at {LR_SCALE:g} of "
        f"its learning rates; the model with k = 0 is trained for as long, as the control that the "
        f"others are compared with.",
        {
            "frame_diagonal": figures.differences(
                positions,
                {"loss, increase in %": losses, **probed.frame_panels(curves)},
                f"last k {part} without attention to the past",
                f"Compared with the unmodified model (n = {len(probed.clips)})",
            )
        },
        probed.table([*masked.values(), *tuned_measured.values()]),
        {
            "blind_layers": depth,
            "tolerance": TOLERANCE,
            "variants": [probed.to_json(measured) for measured in masked.values()],
            "fine_tuned": [probed.to_json(measured) for measured in tuned_measured.values()],
            "fine_tuned_against_control": recovered,
            "halfway_against_control": halfway,
        },
    )


def _fine_tune_masked(probed: ProbedModel, k: int) -> FineTuned:
    """Fine-tune a copy of the model without attention to the past in its last k layers."""
    trained = copy.deepcopy(probed.model)
    blocks = causal_blocks(trained)
    with frame_diagonal_attention(blocks[len(blocks) - k :], probed.tokens):
        for step in probed.train(trained, probed.loaded.options, LR_SCALE):
            if step == probed.fine_tune // 2:
                halfway = probed.loss(trained)
        name = f"last {k}, {probed.fine_tune} steps on"
        return FineTuned(probed.measure(name, trained), halfway)


def _in_percent(increase: tuple[float, float]) -> tuple[float, float]:
    return 100 * increase[0], 100 * increase[1]


def fine_tuned_depths(probed: ProbedModel) -> list[int]:
    """List the k to fine-tune: 0 as the control, the paper's sixth of the layers, and half."""
    layers = len(causal_blocks(probed.model))
    return sorted({0, paper_depth(layers), max(1, layers // 2)}) if probed.fine_tune else []


def paper_depth(layers: int) -> int:
    """Scale the paper's masked depth, the last 5 of 30 layers, to another number of layers."""
    return max(1, round(layers / 6))


def count_masking(probed: ProbedModel) -> int:
    """Count the measurements and training steps of `probe_attention_mask`."""
    tuned = len(fine_tuned_depths(probed)) * (probed.fine_tune + 2)
    return len(causal_blocks(probed.model)) + tuned


def maskable_depth(
    cost: dict[int, tuple[float, float]], recovered: dict[int, tuple[float, float]]
) -> int:
    """Find the largest k up to which all are within `TOLERANCE`, at once or after the fine-tune.

    Args:
        cost, recovered: k -> increase of the loss and its standard error.
    """
    deepest = 0
    for increases in (cost, recovered):
        for k in sorted(increases):
            if not increases[k][0] <= TOLERANCE:
                break
            deepest = max(deepest, k)
    return deepest


def describe_masking(layers: int, part: str, n: int, cost: dict[int, tuple[float, float]]) -> str:
    """Summarize what masking costs without fine-tuning."""
    return (
        f"Without attention to the past in the last of {layers} {part} the loss changes by "
        f"{percent(cost[1])}, in all {layers} by {percent(cost[layers])} (n = {n} clips)."
    )


def describe_recovery(
    layers: int,
    steps: int,
    recovered: dict[int, tuple[float, float]],
    halfway: dict[int, tuple[float, float]],
) -> str:
    """Summarize whether a short fine-tune makes up for the mask, as the paper claims."""
    if not recovered:
        return ""
    increases = ", ".join(f"last {k}: {percent(increase)}" for k, increase in recovered.items())
    k = paper_depth(layers)
    excess, before = recovered[k][0], halfway[k][0]
    if excess <= TOLERANCE:
        verdict = f"holds for {_last(k)}"
    elif steps < 2 * WARMUP:
        verdict = f"is undecided: {steps} steps are hardly more than the warmup"
    elif excess < FALLING * before:
        verdict = (
            f"is undecided: {steps} steps are too few, the loss without {_last(k)} is still "
            f"falling ({100 * before:+.1f} % after half of them)"
        )
    else:
        verdict = f"does not hold for {_last(k)}"
    return (
        f" After {steps} steps of fine-tuning, compared with the unmodified model trained for as "
        f"long: {increases}. The paper's claim that a short fine-tune makes up for it (here: "
        f"within {100 * TOLERANCE:.0f} %) {verdict}."
    )


def _last(k: int) -> str:
    return "the last layer" if k == 1 else f"the last {k} layers"


# Layer removal


def probe_layer_removal(probed: ProbedModel) -> Section:
    """Bypass each layer in turn, and measure the loss without it."""
    removed = []
    for name, block in named_blocks(probed.model).items():
        with bypass(block):
            removed.append(probed.measure(name, probed.model, frames=False))
    increase = probed.loss_percent(removed)
    order = increase.mean(axis=1).argsort()
    least, most = removed[order[0]], removed[order[-1]]
    return Section(
        "left_out",
        "Removing each layer",
        f"Removing {least.name} changes the loss least ({percent(probed.loss_increase(least))}), "
        f"removing {most.name} most ({percent(probed.loss_increase(most))}); "
        f"n = {len(probed.clips)}.",
        "The layer's output is its input. The loss is that of teacher forcing, with the same noise "
        "for all.",
        {
            "left_out": figures.loss_increase(
                increase,
                LEVELS,
                [measured.name for measured in removed],
                f"Loss without a layer, increase in % (n = {len(probed.clips)})",
            )
        },
        numbers={"variants": [probed.to_json(measured) for measured in removed]},
    )
