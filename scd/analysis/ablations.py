"""The probes that cut: skipped layers, layers blind to the past, layers left out."""

import copy
from dataclasses import dataclass

from torch import Tensor

from scd.analysis import figures
from scd.analysis.fine_tune import WARMUP
from scd.analysis.html_report import Section
from scd.analysis.interventions import (
    all_blocks,
    frame_diagonal,
    layers_skipped,
    left_out,
    past_blocks,
    step_blocks,
)
from scd.analysis.probed_model import TOLERANCE, ProbedModel, Variant, percent
from scd.analysis.quality import increase
from scd.flow.objective import LEVELS
from scd.models import SCD

GENTLE = 0.3  # of the training's learning rates, for a short fine-tune
FALLING = 0.9  # of what it was after half the steps: an excess below is still on its way down
PAPER_MIDDLE = (8 / 30, 22 / 30)  # the layers that the paper skips


def skip_ranges(layers: int) -> list[tuple[int, int]]:
    """Early, middle and late blocks; the middle as the paper's 8 to 22 of 30."""
    low, high = (round(share * layers) for share in PAPER_MIDDLE)
    low = max(low, 1)
    high = max(low, min(high, layers - 1))
    ranges = [(0, low), (low, high), (high, layers)]
    return [(first, last) for first, last in ranges if first < last]


def full_steps(steps: int) -> list[int]:
    """How many steps run whole before layers are skipped."""
    return sorted({max(1, steps // 8), max(1, steps // 4), max(1, steps // 2)} - {steps})


def skip_layers(bench: ProbedModel) -> Section:
    """Blocks skipped after the first steps of a frame."""
    model = bench.model
    part = "decoder block" if isinstance(model, SCD) else "layer"
    whole = full_steps(bench.steps)
    lines: dict[str, list[Variant | None]] = {}
    for first, last in skip_ranges(len(step_blocks(model))):
        which = f"{part} {last}" if last == first + 1 else f"{part}s {first + 1}–{last}"
        lines[which] = []
        for full in whole:
            with layers_skipped(model, first, last, full):
                name = f"{which} after {full} of {bench.steps} steps"
                lines[which].append(bench.measure(name, model, loss=False))
    variants = [variant for line in lines.values() for variant in line if variant is not None]
    costs = {v.name: bench.difference(v, "psnr") for v in variants[:: len(whole)]}
    told = ", ".join(f"{name}: {cost[0]:+.2f} ± {cost[1]:.2f} dB" for name, cost in costs.items())
    return Section(
        "skipped",
        "Skipping layers after the first steps",
        f"What skipping costs in PSNR (n = {len(bench.clips)} clips): {told}.",
        "After the first s steps of a frame the blocks of a range add to their tokens what they "
        "added at step s. A larger s leaves more to the untouched model.",
        {
            "skipped": figures.differences(
                whole,
                bench.frame_panels(lines),
                "whole steps before skipping",
                f"Skipped layers against none skipped (n = {len(bench.clips)})",
            )
        },
        bench.table(variants),
        {"variants": [bench.numbers(variant) for variant in variants]},
    )


def skip_count(bench: ProbedModel) -> int:
    return len(skip_ranges(len(step_blocks(bench.model)))) * len(full_steps(bench.steps))


def blind_layers(bench: ProbedModel) -> Section:
    """Frame-diagonal attention in the last k layers, before and after a short fine-tune."""
    model, blocks = bench.model, past_blocks(bench.model)
    layers = len(blocks)
    ks = list(range(1, layers + 1))
    variants = {}
    for k in ks:
        with frame_diagonal(blocks[layers - k :], bench.tokens):
            variants[k] = bench.measure(f"last {k}", model)
    tuned = {k: _tuned(bench, k) for k in tuned_ks(bench)}
    cut = {k: bench.loss_increase(variant) for k, variant in variants.items()}
    recovered = {k: increase(_loss(tuned[k]), _loss(tuned[0])) for k in tuned if k}
    halfway = {k: increase(tuned[k].halfway, tuned[0].halfway) for k in tuned if k}
    positions = [0, *ks]
    measured = {k: t.variant for k, t in tuned.items()}
    lines = {"as it is": [{0: bench.untouched, **variants}.get(k) for k in positions]}
    losses: dict[str, list[tuple[float, float] | None]] = {
        "as it is": [(0.0, 0.0), *(_in_percent(cut[k]) for k in ks)]
    }
    if tuned:
        name = f"after {bench.fine_tune} steps of fine-tuning"
        lines[name] = [measured.get(k) for k in positions]
        against = {0: (0.0, 0.0), **recovered}
        losses[name] = [_in_percent(against[k]) if k in against else None for k in positions]
    part = "encoder layers" if isinstance(model, SCD) else "layers"
    blind = blind_depth(cut, recovered)
    return Section(
        "frame_diagonal",
        "Layers that do not see the past",
        told_blind(layers, part, len(bench.clips), cut)
        + told_recovery(layers, bench.fine_tune, recovered, halfway),
        f"The causal mask of the last k {part} replaced by a frame-diagonal one. Loss: mean over "
        f"the increases at σ = {', '.join(f'{level:g}' for level in LEVELS)}, the same noise for "
        f"all. Fine-tuning: the training's objective, data and optimiser, at {GENTLE:g} of its "
        f"learning rates; the model with k = 0 is trained as long, and its loss is what those of "
        f"the others are held against.",
        {
            "frame_diagonal": figures.differences(
                positions,
                {"loss, increase in %": losses, **bench.frame_panels(lines)},
                f"last k {part} without the past",
                f"Against the untouched model (n = {len(bench.clips)})",
            )
        },
        bench.table([*variants.values(), *measured.values()]),
        {
            "blind_layers": blind,
            "tolerance": TOLERANCE,
            "variants": [bench.numbers(variant) for variant in variants.values()],
            "fine_tuned": [bench.numbers(variant) for variant in measured.values()],
            "fine_tuned_against_control": recovered,
            "halfway_against_control": halfway,
        },
    )


@dataclass(frozen=True)
class Tuned:
    """A variant after the fine-tune, and its loss (n, levels) after half of the steps."""

    variant: Variant
    halfway: Tensor


def _tuned(bench: ProbedModel, k: int) -> Tuned:
    """The model blind to the past in its last k layers, fine-tuned."""
    trained = copy.deepcopy(bench.model)
    blocks = past_blocks(trained)
    with frame_diagonal(blocks[len(blocks) - k :], bench.tokens):
        for step in bench.train(trained, bench.loaded.options, GENTLE):
            if step == bench.fine_tune // 2:
                halfway = bench.loss(trained)
        return Tuned(bench.measure(f"last {k}, {bench.fine_tune} steps on", trained), halfway)


def _loss(tuned: Tuned) -> Tensor:
    assert tuned.variant.loss is not None
    return tuned.variant.loss


def _in_percent(share: tuple[float, float]) -> tuple[float, float]:
    return 100 * share[0], 100 * share[1]


def blind_count(bench: ProbedModel) -> int:
    return len(past_blocks(bench.model)) + len(tuned_ks(bench)) * (bench.fine_tune + 2)


def blind_depth(
    cut: dict[int, tuple[float, float]], recovered: dict[int, tuple[float, float]]
) -> int:
    """The largest k within `TOLERANCE` of the loss, at once or after the fine-tune.

    Args:
        cut, recovered: k -> increase of the loss and its standard error.
    """
    fits = [k for of_k in (cut, recovered) for k, (mean, _) in of_k.items() if mean <= TOLERANCE]
    return max(fits, default=0)


def told_blind(layers: int, part: str, n: int, cut: dict[int, tuple[float, float]]) -> str:
    """What cutting layers off from the past costs at once."""
    return (
        f"Cut off from the past, the last of {layers} {part} costs {percent(cut[1])} of loss, all "
        f"{layers} cost {percent(cut[layers])} (n = {n} clips)."
    )


def told_recovery(
    layers: int,
    steps: int,
    recovered: dict[int, tuple[float, float]],
    halfway: dict[int, tuple[float, float]],
) -> str:
    """The paper's claim of a short fine-tune, held against the control."""
    if not recovered:
        return ""
    told = ", ".join(f"last {k}: {percent(share)}" for k, share in recovered.items())
    k = paper_depth(layers)
    excess, before = recovered[k][0], halfway[k][0]
    if excess <= TOLERANCE:
        verdict = f"holds for {_last(k)}"
    elif steps < 2 * WARMUP:
        verdict = f"is not decided: {steps} steps are hardly more than the warmup"
    elif excess < FALLING * before:
        verdict = (
            f"is not decided: {steps} steps are too few to tell, the loss without {_last(k)} still "
            f"falls ({100 * before:+.1f} % after half of them)"
        )
    else:
        verdict = f"does not hold for {_last(k)}"
    return (
        f" After {steps} steps of fine-tuning, against the untouched model trained as long: {told}."
        f" The paper's claim that a short fine-tune makes up for it (here: within "
        f"{100 * TOLERANCE:.0f} %) {verdict}."
    )


def _last(k: int) -> str:
    return "the last layer" if k == 1 else f"the last {k} layers"


def paper_depth(layers: int) -> int:
    """The last sixth of the layers: 5 of 30 in the paper."""
    return max(1, round(layers / 6))


def tuned_ks(bench: ProbedModel) -> list[int]:
    """k that are fine-tuned: none, the paper's sixth, and half."""
    layers = len(past_blocks(bench.model))
    return sorted({0, paper_depth(layers), max(1, layers // 2)}) if bench.fine_tune else []


def leave_out(bench: ProbedModel) -> Section:
    """Each layer in turn."""
    variants = []
    for name, block in all_blocks(bench.model).items():
        with left_out(block):
            variants.append(bench.measure(name, bench.model, frames=False))
    increase = bench.loss_percent(variants)
    order = increase.mean(axis=1).argsort()
    least, most = variants[order[0]], variants[order[-1]]
    return Section(
        "left_out",
        "Leaving out each layer",
        f"Least is lost without {least.name} ({percent(bench.loss_increase(least))} of loss), most "
        f"without {most.name} ({percent(bench.loss_increase(most))}); n = {len(bench.clips)}.",
        "The layer hands its tokens on unchanged; loss under teacher forcing, the same noise for "
        "all.",
        {
            "left_out": figures.loss_increase(
                increase,
                LEVELS,
                [variant.name for variant in variants],
                f"Loss without a layer, increase in % (n = {len(bench.clips)})",
            )
        },
        numbers={"variants": [bench.numbers(variant) for variant in variants]},
    )
