"""A recommended split of a dense model: its time per frame, and how its training begins."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scd.analysis import figures
from scd.analysis.bench import Bench
from scd.analysis.cuts import TOLERANCE
from scd.analysis.fine_tune import fine_tuning
from scd.analysis.looks import STEADY
from scd.analysis.quality import loss_by_level
from scd.analysis.report import Section
from scd.analysis.split import Split, split_model, split_options
from scd.evaluation.compare import Candidate, time_frames
from scd.evaluation.table import Table
from scd.models import CausalDiT, WorldModel
from scd.models.build import build_world_model
from scd.options import Options


def suggested_split(layers: int, to_end: Tensor, blind: int) -> tuple[Split, str]:
    """The plain split that the probes speak for, and why.

    Args:
        to_end: (1 + layers, steps), similarity of features to the end of the denoising.
        blind: how many of the last layers may lose sight of the past.
    """
    means = to_end[1:].mean(dim=1)
    steady = max((i + 1 for i in range(layers) if means[i] >= STEADY), default=0)
    wanted = layers - steady
    decoder = min(max(min(wanted, blind), 1), layers - 1)
    deepest = f"layer {steady} is the deepest" if steady else "there is none"
    sightless = f"the last {blind} layers stay" if blind else "not even the last layer stays"
    why = (
        f"The decoder gets the layers whose features still change over the steps, but no more than "
        f"can do without the past. Of layers with a mean similarity of {STEADY} to the last step "
        f"but one, {deepest}; {sightless} within {100 * TOLERANCE:.0f} % of the loss without "
        f"the past."
    )
    if wanted > blind:
        why += (
            " So there are layers that change at every step and also need the past: this model is "
            "not separable without loss, and fine-tuning has to make up for it."
        )
    return Split(layers - decoder, decoder), why


@dataclass(frozen=True)
class Start:
    """A model that training begins from."""

    name: str
    model: WorldModel
    options: Options
    split: Split | None = None


def suggest_split(bench: Bench, to_end: Tensor, blind: int) -> Section:
    """The suggestion measured: sizes, seconds a frame, and the first training steps."""
    dense, codec = bench.model, bench.loaded.codec
    assert isinstance(dense, CausalDiT)
    layers = len(dense.blocks)
    plain, why = suggested_split(layers, to_end, blind)
    ends = min(plain.decoder_layers, layers // 2)
    starts = []
    for split in (plain, Split(layers - ends, 2 * ends, "first-and-last")):
        options = split_options(bench.loaded.options, split)
        model = split_model(dense, codec, options, split)
        starts.append(Start(f"split {split.name}", model, options, split))
    torch.manual_seed(bench.seed)
    random = build_world_model(starts[0].options, codec).to(dense.device).eval()
    name = f"random start {plain.encoder_layers}+{plain.decoder_layers}"
    starts.append(Start(name, random, starts[0].options))
    whole = Start("dense", dense, bench.loaded.options)
    seconds = _seconds(bench, [whole, *starts[:2]])
    lines = {start.name: _begin(bench, start) for start in starts}

    final = {start.name: lines[start.name][-1][1] for start in starts}
    better = final[starts[1].name] < (1 - TOLERANCE) * final[starts[0].name]
    chosen = starts[1 if better and bench.fine_tune else 0]
    assert chosen.split is not None and bench.untouched.loss is not None
    steps = bench.loaded.options.rollout.steps
    finding = (
        f"{why} Suggested: {chosen.split.encoder_layers} encoder and "
        f"{chosen.split.decoder_layers} decoder layers ({chosen.split.decoder_from}), "
        f"{1000 * seconds[chosen.name]:.0f} ms a frame against {1000 * seconds['dense']:.0f} ms "
        f"({steps} steps, here)."
    )
    if bench.fine_tune:
        told = ", ".join(f"{name} {loss:.3f}" for name, loss in final.items())
        finding += f" Validation loss after {bench.fine_tune} training steps: {told}."
    command = (
        f"scd split {bench.loaded.source['path']} {chosen.split.arguments} "
        f"--out experiments/{bench.loaded.options.name}_split"
    )
    rows = [
        {
            "name": start.name,
            "layers": layers if start.split is None and start is whole else _sizes(start),
            "parameters": sum(p.numel() for p in start.model.parameters()),
            "seconds_per_frame": seconds.get(start.name, seconds[starts[0].name]),
            "loss_by_step": lines.get(start.name, [(0, float(bench.untouched.loss.mean()))]),
        }
        for start in (whole, *starts)
    ]
    return Section(
        "suggestion",
        "A split of this model",
        finding,
        f"The rule: as many decoder layers as have features below a mean similarity of {STEADY} "
        f"to the last step but one (the noise level of the last is one that training hardly "
        f"meets), at most those that lose {100 * TOLERANCE:.0f} % without the past, at least one; "
        f"first-and-last only if its loss is {100 * TOLERANCE:.0f} % lower. To make it: "
        f"`{command}`. All begin at the training's full learning rate after a short warm-up, on "
        f"the same clips. Time: batch 1, in latents, median.",
        {
            "split": figures.training_lines(
                lines,
                float(bench.untouched.loss.mean()),
                f"How an SCD's training begins (n = {len(bench.clips)} clips)",
            )
        }
        if bench.fine_tune
        else {},
        _table(rows),
        {"rows": rows, "split": vars(chosen.split), "command": command, "rollout_steps": steps},
    )


def suggestion_count(bench: Bench) -> int:
    return 3 * (bench.fine_tune + 1)


def _begin(bench: Bench, start: Start) -> list[tuple[int, float]]:
    """Validation loss at the start, and after a quarter, half and all of the steps."""
    total = bench.fine_tune
    marks = {0, total // 4, total // 2, total}
    points = []
    rate = start.options.optim.lr
    for step in fine_tuning(start.model, bench.loaded.codec, start.options, total, rate):
        if step in marks:
            points.append((step, float(loss_by_level(start.model, bench.clips, bench.seed).mean())))
        bench.bar.update()
    return points


def _seconds(bench: Bench, starts: list[Start]) -> dict[str, float]:
    """For a frame, at the rollout options of the checkpoint."""
    candidates = [
        Candidate(replace(bench.loaded, model=start.model, options=start.options), {}, [])
        for start in starts
    ]
    time_frames(candidates)
    return {start.name: c.frame_seconds for start, c in zip(starts, candidates, strict=True)}


def _sizes(start: Start) -> str:
    m = start.options.model
    return f"{m.encoder_layers}+{m.decoder_layers}"


def _table(rows: list[dict[str, Any]]) -> Table:
    steps = [step for step, _ in rows[-1]["loss_by_step"]]
    heads = ["model", "layers", "parameters", "s/frame", *(f"loss, step {step}" for step in steps)]
    lines = []
    for row in rows:
        losses = [f"{loss:.4f}" for _, loss in row["loss_by_step"]]
        losses += ["–"] * (len(steps) - len(losses))
        size = f"{row['parameters'] / 1e6:.1f} M"
        line = [row["name"], str(row["layers"]), size, f"{row['seconds_per_frame']:.4f}"]
        lines.append([*line, *losses])
    return Table(heads, lines, 1, [])
