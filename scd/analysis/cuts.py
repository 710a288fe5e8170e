"""The probes that cut: skipped layers, layers blind to the past, layers left out."""

import copy
from contextlib import ExitStack

from scd.analysis import figures
from scd.analysis.bench import Bench, Variant
from scd.analysis.fine_tune import fine_tuning
from scd.analysis.hooks import all_blocks, past_blocks, step_blocks
from scd.analysis.quality import LEVELS
from scd.analysis.report import Section
from scd.analysis.surgery import frame_diagonal, layers_skipped, left_out
from scd.models import SCD

TOLERANCE = 0.05  # increase of the loss at which a surgery counts as harmless
GENTLE = 0.1  # of the training's learning rate, for a short fine-tune
PAPER_MIDDLE = (8 / 30, 22 / 30)  # the layers that the paper skips


def skip_ranges(layers: int) -> list[tuple[int, int]]:
    """Early, middle and late blocks; the middle as the paper's 8 to 22 of 30."""
    low, high = (round(share * layers) for share in PAPER_MIDDLE)
    low, high = max(low, 1), min(high, layers - 1)
    ranges = [(0, low), (low, high), (high, layers)]
    return [(first, last) for first, last in ranges if first < last]


def full_steps(steps: int) -> list[int]:
    """How many steps run whole before layers are skipped."""
    return sorted({max(1, steps // 8), max(1, steps // 4), max(1, steps // 2)} - {steps})


def skip_layers(bench: Bench) -> Section:
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
        f"What skipping costs in PSNR: {told}.",
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


def skip_count(bench: Bench) -> int:
    return len(skip_ranges(len(step_blocks(bench.model)))) * len(full_steps(bench.steps))


def blind_layers(bench: Bench) -> Section:
    """Frame-diagonal attention in the last k layers, before and after a short fine-tune."""
    model, blocks = bench.model, past_blocks(bench.model)
    layers = len(blocks)
    ks = list(range(1, layers + 1))
    variants = {}
    for k in ks:
        with frame_diagonal(blocks[layers - k :], bench.tokens):
            variants[k] = bench.measure(f"last {k}", model)
    tuned = {}
    for k in tuned_ks(bench):
        trained = copy.deepcopy(model)
        with ExitStack() as stack:
            stack.enter_context(
                frame_diagonal(past_blocks(trained)[layers - k :] if k else [], bench.tokens)
            )
            rate = GENTLE * bench.loaded.options.optim.lr
            for _ in fine_tuning(
                trained, bench.loaded.codec, bench.loaded.options, bench.fine_tune, rate
            ):
                bench.bar.update()
            tuned[k] = bench.measure(f"last {k}, {bench.fine_tune} steps on", trained)
    positions = [0, *ks]
    lines = {"as it is": [{0: bench.untouched, **variants}.get(k) for k in positions]}
    if tuned:
        name = f"after {bench.fine_tune} steps of fine-tuning"
        lines[name] = [tuned.get(k) for k in positions]
    panels: figures.Panels = {
        "loss, increase in %": {
            name: [None if v is None else (100 * bench.loss_increase(v), 0.0) for v in line]
            for name, line in lines.items()
        },
        **bench.frame_panels(lines),
    }
    blind = blind_depth(bench, variants)
    part = "encoder layers" if isinstance(model, SCD) else "layers"
    told = f"the last {blind}" if blind else "none"
    finding = (
        f"Of {layers} {part}, {told} can be cut off from the past at a loss at "
        f"most {100 * TOLERANCE:.0f} % higher; the last one: "
        f"{100 * bench.loss_increase(variants[1]):+.1f} %, all {layers}: "
        f"{100 * bench.loss_increase(variants[layers]):+.1f} %."
    )
    if tuned:
        control = bench.loss_increase(tuned[0])
        told = ", ".join(
            f"{k}: {100 * bench.loss_increase(v):+.1f} %" for k, v in tuned.items() if k
        )
        finding += (
            f" After {bench.fine_tune} steps of fine-tuning, last {told}; the untouched model "
            f"after as many steps: {100 * control:+.1f} %."
        )
    return Section(
        "frame_diagonal",
        "Layers that do not see the past",
        finding,
        f"The causal mask of the last k {part} replaced by a frame-diagonal one. Loss: mean over "
        f"the increases at σ = {', '.join(f'{level:g}' for level in LEVELS)}, the same noise for "
        f"all. Fine-tuning: the training's objective and data, {GENTLE:g} of its learning rate; "
        f"the model with k = 0 is trained as long, as a control.",
        {
            "frame_diagonal": figures.differences(
                positions,
                panels,
                f"last k {part} without the past",
                f"Against the untouched model (n = {len(bench.clips)})",
            )
        },
        bench.table([*variants.values(), *tuned.values()]),
        {
            "blind_layers": blind,
            "tolerance": TOLERANCE,
            "variants": [bench.numbers(variant) for variant in variants.values()],
            "fine_tuned": [bench.numbers(variant) for variant in tuned.values()],
        },
    )


def blind_count(bench: Bench) -> int:
    return len(past_blocks(bench.model)) + len(tuned_ks(bench)) * (bench.fine_tune + 2)


def blind_depth(bench: Bench, variants: dict[int, Variant]) -> int:
    """The largest k up to which every cut keeps the loss within `TOLERANCE`."""
    depth = 0
    for k in sorted(variants):
        if bench.loss_increase(variants[k]) > TOLERANCE:
            break
        depth = k
    return depth


def tuned_ks(bench: Bench) -> list[int]:
    """k that are fine-tuned: none, the paper's sixth (5 of 30), half, and all."""
    layers = len(past_blocks(bench.model))
    if not bench.fine_tune:
        return []
    return sorted({0, max(1, round(layers / 6)), max(1, layers // 2), layers})


def leave_out(bench: Bench) -> Section:
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
        f"Least is lost without {least.name} ({100 * bench.loss_increase(least):+.1f} %), most "
        f"without {most.name} ({100 * bench.loss_increase(most):+.0f} %).",
        f"The layer hands its tokens on unchanged; loss under teacher forcing, n = "
        f"{len(bench.clips)} clips, the same noise for all.",
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
