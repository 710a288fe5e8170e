"""A recommended split of a dense model: time per frame, and how the splits' training begins."""

import math
import shlex
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from scd.analysis import figures
from scd.analysis.html_report import Section
from scd.analysis.measurements import relative_increase
from scd.analysis.probed_model import TOLERANCE, ProbedModel
from scd.analysis.split import Split, split_model, split_options
from scd.errors import ScdError
from scd.evaluation.compare import Candidate, time_frames
from scd.flow.objective import LEVELS
from scd.models import CausalDiT, CausalWorldModel
from scd.models.load import build_world_model
from scd.options import Options
from scd.utils.table import Table

FALLING = 0.95  # a loss below this part of what it was halfway: training has not settled yet


@dataclass
class Initialization:
    """A model to begin training with, its time per frame, and its loss during the first steps.

    `losses`: training step -> loss (n, levels).
    """

    name: str
    options: Options
    parameters: int
    seconds: float
    losses: dict[int, Tensor] = field(default_factory=dict)


def suggest_split(probed: ProbedModel, steady: int, maskable: int, arguments: list[str]) -> Section:
    """Measure splits of a dense model, and suggest one: size, seconds per frame, first losses.

    Args:
        steady: the deepest layer with the same features at most steps.
        maskable: how many of the last layers can do without attention to the past.
        arguments: of the probe's command line, which `scd split` needs as well.
    """
    options, layers = probed.loaded.options, len(probed.model.blocks)
    depth = decoder_depth(layers, steady)
    dense, splits, randoms = _train_candidates(probed, candidates(layers, depth))
    ratios = {split: _ratio(init, dense, probed.fine_tune)[0] for split, init in splits.items()}
    seconds = {split: init.seconds for split, init in splits.items()}
    chosen = fastest_good(ratios, seconds) if probed.fine_tune else next(iter(splits))
    begin = ["scd", "split", str(probed.loaded.source["path"])]
    out = ["--out", f"{options.output}_split"]
    command = shlex.join([*begin, *arguments, *chosen.arguments, *out])
    everything = [dense, *splits.values(), *randoms.values()]
    steps = options.rollout.steps
    finding = (
        f"{describe_depth(layers, steady, maskable)}Suggested: {splits[chosen].name}, "
        f"{1000 * seconds[chosen]:.0f} ms per frame, compared with {1000 * dense.seconds:.0f} ms "
        f"for the dense model ({steps} steps, on this machine)."
    )
    rule = "nothing was trained (--fine-tune 0), so that depth is suggested"
    if probed.fine_tune:
        finding += _describe_training(probed, splits, randoms, dense)
        rule = (
            f"that depth, half of it, the shallowest, and the paper's first and last layers are "
            f"trained for {probed.fine_tune} steps, on the same clips, at the training's full "
            f"learning rates after a short warmup; of those within {100 * TOLERANCE:.0f} % of the "
            f"best loss, the fastest is suggested"
        )
    title = f"The first training steps of an SCD (n = {len(probed.clips)} clips)"
    curves = {
        init.name: [(step, *_ratio(init, dense, step)) for step in init.losses]
        for init in everything[1:]
    }
    return Section(
        "suggestion",
        "A split of this model",
        finding,
        f"The rule: the decoder gets the layers after the last one with the same features at most "
        f"steps (the first section); {rule}. To make it: `{command}`. Loss: the ratio to the dense "
        f"model's, mean over σ = {', '.join(f'{level:g}' for level in LEVELS)}. Time: batch 1, in "
        f"latents, median, on this machine.",
        {"split": figures.training_curves(curves, title)} if probed.fine_tune else {},
        _table(everything, dense, layers),
        {
            "rows": [_to_json(init, dense) for init in everything],
            "wanted_decoder_layers": depth,
            "blind_layers": maskable,
            "split": vars(chosen),
            "command": command,
            "rollout_steps": steps,
        },
    )


def decoder_depth(layers: int, steady: int) -> int:
    """Choose the number of decoder layers: those after the last one that is steady.

    What changes at every step belongs in the decoder, which gets the past through the context.
    """
    return min(max(layers - steady, 1), layers - 1)


def candidates(layers: int, depth: int) -> list[Split]:
    """List splits with a decoder of that depth, half of it or 1, and one from both ends."""
    half = max(1, depth // 2)
    plain = [Split(layers - count, count) for count in sorted({depth, half, 1}, reverse=True)]
    return [*plain, Split(layers - half, 2 * half, "first-and-last")]


def fastest_good(losses: dict[Split, float], seconds: dict[Split, float]) -> Split:
    """Choose the fastest split whose loss is within `TOLERANCE` of the best.

    Raises:
        ScdError: every training has diverged.
    """
    best = min((loss for loss in losses.values() if math.isfinite(loss)), default=math.nan)
    if math.isnan(best):
        raise ScdError("the training of every split has diverged: lower optim.lr")
    good = [split for split, loss in losses.items() if loss <= (1 + TOLERANCE) * best]
    return min(good, key=lambda split: seconds[split])


def count_suggestion(probed: ProbedModel, steady: int) -> int:
    """Count the training steps of `suggest_split`, for the progress bar."""
    layers = len(probed.model.blocks)
    trained = 2 * len(candidates(layers, decoder_depth(layers, steady)))
    return trained * (probed.fine_tune + 1) if probed.fine_tune else 0


def describe_depth(layers: int, steady: int, maskable: int) -> str:
    """Explain the decoder depth that the features suggest, and warn if it needs the past."""
    depth = decoder_depth(layers, steady)
    text = (
        f"Layer {steady} is the last of {layers} with the same features at most steps"
        if steady
        else f"None of the {layers} layers has the same features at most steps"
    )
    text += f", which suggests {depth} decoder layer{'s' * (depth > 1)}. "
    if depth > maskable:
        can = f"only the last {maskable} can" if maskable else "none of the layers can"
        text += (
            f"Warning: {can} do without attention to the past at {100 * TOLERANCE:.0f} % of loss, "
            f"so fine-tuning has to bring the past to the decoder through the context. "
        )
    return text


def _describe_training(
    probed: ProbedModel,
    splits: dict[Split, Initialization],
    randoms: dict[Split, Initialization],
    dense: Initialization,
) -> str:
    total = probed.fine_tune

    def ratios(group: dict[Split, Initialization]) -> str:
        of_name = {init.name: _ratio(init, dense, total) for init in group.values()}
        return ", ".join(
            f"{name} {mean:.2f} ± {error:.2f}" for name, (mean, error) in of_name.items()
        )

    text = (
        f" Loss after {total} training steps, as a multiple of the dense model's (n = "
        f"{len(probed.clips)} clips): {ratios(splits)}; of the same shapes, {ratios(randoms)}."
    )
    falling = [
        _ratio(init, dense, total)[0] < FALLING * _ratio(init, dense, total // 2)[0]
        for init in splits.values()
    ]
    if any(falling):
        text += (
            f" The loss of {sum(falling)} of {len(falling)} splits is still falling quickly: a "
            f"longer --fine-tune may rank them differently."
        )
    return text


def _train_candidates(
    probed: ProbedModel, splits: list[Split]
) -> tuple[Initialization, dict[Split, Initialization], dict[Split, Initialization]]:
    """Time and train every split, and a random initialization of each shape.

    Returns:
        The dense model, the splits, and the random initializations.
    """
    model, codec, options = probed.model, probed.loaded.codec, probed.loaded.options
    assert isinstance(model, CausalDiT) and probed.unmodified.loss is not None
    of_split = {split: split_options(options, split) for split in splits}
    models: dict[Split, CausalWorldModel] = {
        split: split_model(model, codec, own, split) for split, own in of_split.items()
    }
    of_dense, *times = _seconds_per_frame(
        probed, [(model, options), *((models[split], own) for split, own in of_split.items())]
    )
    losses = {0: probed.unmodified.loss}
    dense = Initialization("dense", options, _count_parameters(model), of_dense, losses)
    by_split, randoms = {}, {}
    for (split, own), seconds in zip(of_split.items(), times, strict=True):
        started = models.pop(split)
        name = f"split {split.name}"
        by_split[split] = Initialization(name, own, _count_parameters(started), seconds)
        _train(probed, by_split[split], started)
        torch.manual_seed(probed.seed)
        started = build_world_model(own, codec).to(model.device).eval()
        name = f"random initialization {split.encoder_layers}+{split.decoder_layers}"
        randoms[split] = Initialization(name, own, _count_parameters(started), seconds)
        _train(probed, randoms[split], started)
    return dense, by_split, randoms


def _train(probed: ProbedModel, init: Initialization, model: CausalWorldModel) -> None:
    """Train, and note the loss at the start, after half of the steps, and at the end."""
    total = probed.fine_tune
    marks = {0, total // 2, total}
    for step in probed.train(model, init.options) if total else [0]:
        if step in marks:
            init.losses[step] = probed.loss(model)


def _ratio(init: Initialization, dense: Initialization, step: int) -> tuple[float, float]:
    """Divide the loss at a step by the dense model's; with its standard error."""
    more, error = relative_increase(init.losses[step], dense.losses[0])
    return 1 + more, error


def _seconds_per_frame(
    probed: ProbedModel, models: list[tuple[CausalWorldModel, Options]]
) -> list[float]:
    """Time a frame of each model with the rollout options of the checkpoint."""
    timed = [Candidate(replace(probed.loaded, model=m, options=o), {}, []) for m, o in models]
    time_frames(timed)
    return [candidate.frame_seconds for candidate in timed]


def _count_parameters(model: CausalWorldModel) -> int:
    return sum(p.numel() for p in model.parameters())


def _to_json(init: Initialization, dense: Initialization) -> dict[str, Any]:
    return {
        "name": init.name,
        "parameters": init.parameters,
        "seconds_per_frame": init.seconds,
        "steps": [
            {
                "step": step,
                "loss_by_level": loss.mean(dim=0),
                "loss_over_dense": _ratio(init, dense, step),
            }
            for step, loss in init.losses.items()
        ],
    }


def _table(inits: list[Initialization], dense: Initialization, layers: int) -> Table:
    marks = [*inits[-1].losses]
    heads = ["model", "layers", "parameters", "s/frame"]
    heads += [f"loss ÷ dense, step {step}" for step in marks]
    lines = []
    for init in inits:
        m = init.options.model
        size = str(layers) if init is dense else f"{m.encoder_layers}+{m.decoder_layers}"
        ratios = [
            "{:.2f} ± {:.2f}".format(*_ratio(init, dense, step)) if step in init.losses else "–"
            for step in marks
        ]
        parameters = f"{init.parameters / 1e6:.1f} M"
        lines.append([init.name, size, parameters, f"{init.seconds:.4f}", *ratios])
    return Table(heads, lines, 1, [])
