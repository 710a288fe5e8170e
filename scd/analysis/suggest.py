"""A recommended split of a dense model: its time per frame, and how its training begins."""

import shlex
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from scd.analysis import figures
from scd.analysis.html_report import Section
from scd.analysis.probed_model import TOLERANCE, ProbedModel
from scd.analysis.quality import increase
from scd.analysis.split import Split, split_model, split_options
from scd.evaluation.compare import Candidate, time_frames
from scd.flow.objective import LEVELS
from scd.models import CausalDiT, WorldModel
from scd.models.load import build_world_model
from scd.options import Options
from scd.utils.table import Table

FALLING = 0.95  # of the loss after half the steps: below, training has hardly begun to settle


def wanted_decoder(layers: int, steady: int) -> int:
    """Decoder layers that the features speak for: those behind the last one that is steady.

    What changes at every step belongs in the decoder, which gets the past through the context.
    """
    return min(max(layers - steady, 1), layers - 1)


def candidates(layers: int, wanted: int) -> list[Split]:
    """Plain splits with the wanted decoder, half of it and the shallowest, and the paper's."""
    half = max(1, wanted // 2)
    plain = [Split(layers - depth, depth) for depth in sorted({wanted, half, 1}, reverse=True)]
    return [*plain, Split(layers - half, 2 * half, "first-and-last")]


def fastest_good(losses: dict[Split, float], seconds: dict[Split, float]) -> Split:
    """The fastest of those whose loss is within `TOLERANCE` of the best."""
    best = min(losses.values())
    good = [split for split, loss in losses.items() if loss <= (1 + TOLERANCE) * best]
    return min(good, key=lambda split: seconds[split])


@dataclass
class Start:
    """A model that training begins from, and what it reached.

    `losses`: training step -> loss (n, levels).
    """

    name: str
    options: Options
    parameters: int
    seconds: float
    losses: dict[int, Tensor] = field(default_factory=dict)


def suggest_split(bench: ProbedModel, steady: int, blind: int, arguments: list[str]) -> Section:
    """Splits measured: sizes, seconds a frame, and the first training steps.

    Args:
        steady: the deepest layer whose features are the same at most steps.
        blind: how many of the last layers can do without the past.
        arguments: of the probe's command line, that `scd split` has to know as well.
    """
    options, layers = bench.loaded.options, len(bench.model.blocks)
    wanted = wanted_decoder(layers, steady)
    whole, starts, randoms = _begun(bench, candidates(layers, wanted))
    ratios = {split: _ratio(start, whole, bench.fine_tune)[0] for split, start in starts.items()}
    seconds = {split: start.seconds for split, start in starts.items()}
    chosen = fastest_good(ratios, seconds) if bench.fine_tune else next(iter(starts))
    begin = ["scd", "split", str(bench.loaded.source["path"])]
    out = ["--out", f"{options.output}_split"]
    command = shlex.join([*begin, *arguments, *chosen.arguments, *out])
    everything = [whole, *starts.values(), *randoms.values()]
    steps = options.rollout.steps
    finding = (
        f"{told_reason(layers, steady, blind)}Suggested: {starts[chosen].name}, "
        f"{1000 * seconds[chosen]:.0f} ms a frame against {1000 * whole.seconds:.0f} ms of the "
        f"dense model ({steps} steps, here)."
    )
    rule = "nothing was trained (--fine-tune 0), so that depth is suggested"
    if bench.fine_tune:
        finding += _told_training(bench, starts, randoms, whole)
        rule = (
            f"that depth, half of it, the shallowest, and the paper's first and last layers are "
            f"trained for {bench.fine_tune} steps, on the same clips at the training's full "
            f"learning rates after a short warm-up, and of those within {100 * TOLERANCE:.0f} % of "
            f"the best loss the fastest is suggested"
        )
    title = f"How an SCD's training begins (n = {len(bench.clips)} clips)"
    lines = {
        start.name: [(step, *_ratio(start, whole, step)) for step in start.losses]
        for start in everything[1:]
    }
    return Section(
        "suggestion",
        "A split of this model",
        finding,
        f"The rule: the decoder gets the layers behind the last one whose features are the same at "
        f"most steps (the first section); {rule}. To make it: `{command}`. Loss: the ratio to the "
        f"dense model's, mean over σ = {', '.join(f'{level:g}' for level in LEVELS)}. Time: batch "
        f"1, in latents, median, here.",
        {"split": figures.training_lines(lines, title)} if bench.fine_tune else {},
        _table(everything, whole, layers),
        {
            "rows": [_numbers(start, whole) for start in everything],
            "wanted_decoder_layers": wanted,
            "blind_layers": blind,
            "split": vars(chosen),
            "command": command,
            "rollout_steps": steps,
        },
    )


def suggestion_count(bench: ProbedModel, steady: int) -> int:
    """What the bar counts."""
    layers = len(bench.model.blocks)
    trained = 2 * len(candidates(layers, wanted_decoder(layers, steady)))
    return trained * (bench.fine_tune + 1) if bench.fine_tune else 0


def told_reason(layers: int, steady: int, blind: int) -> str:
    """Which decoder the features speak for, and whether that is without loss."""
    wanted = wanted_decoder(layers, steady)
    told = (
        f"Layer {steady} is the last of {layers} with the same features at most steps"
        if steady
        else f"None of the {layers} layers has the same features at most steps"
    )
    told += f", which speaks for {wanted} decoder layer{'s' * (wanted > 1)}. "
    if wanted > blind:
        can = f"only the last {blind} can" if blind else "none of the layers can"
        told += (
            f"Warning: {can} do without the past at {100 * TOLERANCE:.0f} % of loss, so "
            f"fine-tuning has to bring the past to the decoder through the context. "
        )
    return told


def _told_training(
    bench: ProbedModel, starts: dict[Split, Start], randoms: dict[Split, Start], whole: Start
) -> str:
    total = bench.fine_tune

    def told(group: dict[Split, Start]) -> str:
        shares = {start.name: _ratio(start, whole, total) for start in group.values()}
        return ", ".join(
            f"{name} {mean:.2f} ± {error:.2f}" for name, (mean, error) in shares.items()
        )

    text = (
        f" Loss after {total} training steps, as a multiple of the dense model's (n = "
        f"{len(bench.clips)} clips): {told(starts)}; of the same shapes, {told(randoms)}."
    )
    falling = [
        _ratio(start, whole, total)[0] < FALLING * _ratio(start, whole, total // 2)[0]
        for start in starts.values()
    ]
    if any(falling):
        text += (
            f" {sum(falling)} of {len(falling)} splits still fall quickly: a longer --fine-tune "
            f"may rank them otherwise."
        )
    return text


def _begun(
    bench: ProbedModel, splits: list[Split]
) -> tuple[Start, dict[Split, Start], dict[Split, Start]]:
    """The dense model, and every split and a random start of its shape as far as they get."""
    dense, codec, options = bench.model, bench.loaded.codec, bench.loaded.options
    assert isinstance(dense, CausalDiT) and bench.untouched.loss is not None
    of_split = {split: split_options(options, split) for split in splits}
    models: dict[Split, WorldModel] = {
        split: split_model(dense, codec, own, split) for split, own in of_split.items()
    }
    of_dense, *times = _seconds(
        bench, [(dense, options), *((models[split], own) for split, own in of_split.items())]
    )
    whole = Start("dense", options, _size(dense), of_dense, {0: bench.untouched.loss})
    starts, randoms = {}, {}
    for (split, own), seconds in zip(of_split.items(), times, strict=True):
        model = models.pop(split)
        starts[split] = Start(f"split {split.name}", own, _size(model), seconds)
        _begin(bench, starts[split], model)
        torch.manual_seed(bench.seed)
        model = build_world_model(own, codec).to(dense.device).eval()
        name = f"random start {split.encoder_layers}+{split.decoder_layers}"
        randoms[split] = Start(name, own, _size(model), seconds)
        _begin(bench, randoms[split], model)
    return whole, starts, randoms


def _begin(bench: ProbedModel, start: Start, model: WorldModel) -> None:
    """Train; the loss at the start, and after half and all of the steps."""
    total = bench.fine_tune
    marks = {0, total // 2, total}
    for step in bench.train(model, start.options) if total else [0]:
        if step in marks:
            start.losses[step] = bench.loss(model)


def _ratio(start: Start, whole: Start, step: int) -> tuple[float, float]:
    """Divide the loss by that of the dense model; with its standard error."""
    more, error = increase(start.losses[step], whole.losses[0])
    return 1 + more, error


def _seconds(bench: ProbedModel, models: list[tuple[WorldModel, Options]]) -> list[float]:
    """For a frame, at the rollout options of the checkpoint."""
    timed = [Candidate(replace(bench.loaded, model=m, options=o), {}, []) for m, o in models]
    time_frames(timed)
    return [candidate.frame_seconds for candidate in timed]


def _size(model: WorldModel) -> int:
    return sum(p.numel() for p in model.parameters())


def _numbers(start: Start, whole: Start) -> dict[str, Any]:
    return {
        "name": start.name,
        "parameters": start.parameters,
        "seconds_per_frame": start.seconds,
        "steps": [
            {
                "step": step,
                "loss_by_level": loss.mean(dim=0),
                "loss_over_dense": _ratio(start, whole, step),
            }
            for step, loss in start.losses.items()
        ],
    }


def _table(starts: list[Start], whole: Start, layers: int) -> Table:
    marks = [*starts[-1].losses]
    heads = ["model", "layers", "parameters", "s/frame"]
    heads += [f"loss ÷ dense, step {step}" for step in marks]
    lines = []
    for start in starts:
        m = start.options.model
        size = str(layers) if start is whole else f"{m.encoder_layers}+{m.decoder_layers}"
        ratios = [
            "{:.2f} ± {:.2f}".format(*_ratio(start, whole, step)) if step in start.losses else "–"
            for step in marks
        ]
        parameters = f"{start.parameters / 1e6:.1f} M"
        lines.append([start.name, size, parameters, f"{start.seconds:.4f}", *ratios])
    return Table(heads, lines, 1, [])
