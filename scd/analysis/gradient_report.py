"""The probe of `gradient_paths` in the report: its figure, table and sentences."""

from collections.abc import Callable

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from scd.analysis.figures import COLORS
from scd.analysis.gradient_paths import PAIRS, PATHS, PathGradients, measure_gradients
from scd.analysis.html_report import Section
from scd.analysis.measurements import Estimate, bootstrap
from scd.analysis.probed_model import ProbedModel
from scd.flow.objective import LEVELS
from scd.utils.table import Table

ORTHOGONAL = 0.1  # a cosine that is smaller is called so


def probe_gradients(probed: ProbedModel) -> Section:
    """Compare the gradients of writing context and of denoising, by layer and noise level."""
    n, seed = len(probed.clips), probed.seed
    result = measure_gradients(probed.model, probed.clips, seed, probed.progress.update)
    cosine, between = _of_cosines(result.cosine, seed), _of_cosines(result.between, seed)
    cosine_mean = _of_cosines(result.cosine.mean(dim=1), seed)
    ratio = _of_ratios(result.squares, seed, _norm_ratio)
    ratio_mean = _of_ratios(result.squares, seed, lambda means: _norm_ratio(means).mean(dim=-2))
    numbers = {
        "levels": LEVELS,
        "groups": result.groups,
        "parameters": result.parameters,
        "norms": dict(zip(PATHS, result.squares.mean(dim=0).sqrt(), strict=True)),
        "norm_ratio": {name: values[:, -1] for name, values in ratio._asdict().items()},
        "norm_ratio_mean": {name: values[-1] for name, values in ratio_mean._asdict().items()},
    }
    if result.shares:
        numbers |= {
            "cosine": cosine._asdict(),
            "cosine_mean": cosine_mean._asdict(),
            "between_clips": between._asdict(),
        }
    return Section(
        "gradients",
        "Do writing context and denoising pull the same way?",
        describe_gradients(result, cosine_mean, between, ratio_mean, n),
        f"Gradients of the loss of teacher forcing on whole clips, separately through what is "
        f"computed at clean tokens (writing: keys and values, or the context) and at noisy ones "
        f"(denoising); together they are the gradient of training. Cosines are on the entries of "
        f"parameters that both use, ratios of root mean square norms on all. The noise is the same "
        f"at all levels; means over σ weigh them alike. Two clips: neighbors in the list. "
        f"Intervals: 95 %, bootstrap over {n} clips.",
        {"gradients": gradient_figure(result, cosine, cosine_mean, between, ratio)},
        gradient_table(result, cosine, cosine_mean, ratio_mean) if result.shares else None,
        numbers,
    )


def count_gradients(clips: int) -> int:
    """Count the measurements of `probe_gradients`, for the progress bar."""
    return clips * len(LEVELS)


def gradient_figure(
    result: PathGradients,
    cosine: Estimate,
    cosine_mean: Estimate,
    between: Estimate,
    ratio: Estimate,
) -> Figure:
    """Plot which path uses which parameters, and the ratio of norms; where shared, the cosines.

    Args:
        cosine, ratio: (levels, groups); cosine_mean: (groups,); between: (PAIRS, levels, groups).
    """
    rows = 2 if result.shares else 1
    figure, axes = plt.subplots(
        rows, 2, figsize=(11, 3.7 * rows), layout="constrained", squeeze=False
    )
    _plot_parameters(axes[0, 0], result)
    last = axes[-1, 1]
    _plot_levels(last, Estimate(*(values[:, -1] for values in ratio)), COLORS[0])
    last.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    last.set(ylabel="|g| writing ÷ |g| denoising", title="norms of the two gradients")
    last.set_ylim(bottom=0)
    if result.shares:
        _plot_cosines(axes[0, 1], result.groups, cosine, cosine_mean)
        axis = axes[1, 0]
        of_one = Estimate(*(values[:, -1] for values in cosine))
        _plot_levels(axis, of_one, COLORS[-1], f"{PAIRS[0]}, same clip", "s--")
        for pair, name in enumerate(PAIRS):
            of_pair = Estimate(*(values[pair, :, -1] for values in between))
            _plot_levels(axis, of_pair, COLORS[pair], f"{name}, two clips")
        axis.axhline(0, color="grey", linewidth=0.8, linestyle=":")
        axis.set(ylabel="cosine", title="all shared parameters, by noise level")
        _legend_above(axis, 2)
    figure.suptitle(
        f"Gradients of writing context and of denoising "
        f"(n = {len(result.cosine)} clips; bars: 95 % intervals)"
    )
    return figure


def _plot_parameters(axis: Axes, result: PathGradients) -> None:
    """Stack the parameters of every group by the path that uses them."""
    groups = np.arange(len(result.groups) - 1)
    bottom = np.zeros(len(groups))
    kinds = (("writing only", COLORS[0]), ("both", COLORS[5]), ("denoising only", COLORS[1]))
    for kind, (name, color) in enumerate(kinds):
        millions = result.parameters[:-1, kind].numpy() / 1e6
        axis.bar(groups, millions, bottom=bottom, color=color, label=name)
        bottom += millions
    axis.set_xticks(groups, result.groups[:-1], rotation=35, ha="right")
    axis.set(ylabel="parameters, millions", title="which path uses them")
    _legend_above(axis, 3)


def _plot_cosines(axis: Axes, groups: list[str], cosine: Estimate, cosine_mean: Estimate) -> None:
    """Plot the cosines of every group, a color for each noise level and black for their mean."""
    positions = np.arange(len(groups))
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(LEVELS)))
    series = [
        *((Estimate(*(v[i] for v in cosine)), colors[i], f"σ {s:g}") for i, s in enumerate(LEVELS)),
        (cosine_mean, "black", "mean"),
    ]
    for number, (estimate, color, name) in enumerate(series):
        beside = positions + 0.1 * (number - len(LEVELS) / 2)
        style = {"color": color, "fmt": "D" if name == "mean" else "o", "markersize": 4}
        axis.errorbar(beside, estimate.mean, _bars(estimate), label=name, capsize=1.5, **style)
    axis.axhline(0, color="grey", linewidth=0.8, linestyle=":")
    axis.set_xticks(positions, groups, rotation=35, ha="right")
    axis.set(ylabel="cosine", title="shared parameters, same clip")
    _legend_above(axis, 4)


def _plot_levels(
    axis: Axes, estimate: Estimate, color: str, name: str = "", style: str = "o-"
) -> None:
    """Plot an estimate (levels,) over the noise level."""
    axis.errorbar(
        LEVELS, estimate.mean, _bars(estimate), fmt=style, color=color, capsize=2, label=name
    )
    axis.set(xlabel="noise level σ", xticks=LEVELS)
    axis.grid(alpha=0.25)


def _legend_above(axis: Axes, columns: int) -> None:
    """Place the legend above what is plotted."""
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.25 * (high - low))
    axis.legend(frameon=False, fontsize=8, ncols=columns, loc="upper center")


def _bars(estimate: Estimate) -> Tensor:
    """Make the lengths of error bars below and above the mean, (2, …)."""
    below, above = estimate.mean - estimate.low, estimate.high - estimate.mean
    return torch.stack([below, above]).clamp(min=0)


def _of_cosines(values: Tensor, seed: int) -> Estimate:
    return Estimate(*(bound.clamp(-1, 1) for bound in bootstrap(values, seed)))


def _of_ratios(values: Tensor, seed: int, ratio: Callable[[Tensor], Tensor]) -> Estimate:
    """Estimate what is above 0 by its logarithm, so that its interval is too."""
    tiny = torch.finfo(torch.double).tiny
    found = bootstrap(values, seed, lambda means: ratio(means).clamp(min=tiny).log())
    return Estimate(*(bound.exp() for bound in found))


def _norm_ratio(squares: Tensor) -> Tensor:
    """Divide the norms of both paths, from mean squares (…, 2, levels, groups)."""
    write, denoise = squares.unbind(dim=-3)
    return (write / denoise.clamp(min=torch.finfo(squares.dtype).tiny)).sqrt()


def gradient_table(
    result: PathGradients, cosine: Estimate, cosine_mean: Estimate, ratio_mean: Estimate
) -> Table:
    """Tabulate cosines and ratios of norms, a line for each group of parameters."""
    shown = [0, LEVELS.index(0.5), len(LEVELS) - 1]
    heads = ["", "shared", "cosine, mean over σ", *(f"σ = {LEVELS[level]:g}" for level in shown)]
    heads.append("norms, writing ÷ denoising")
    lines = []
    for group, name in enumerate(result.groups):
        share = result.parameters[group, 1] / result.parameters[group].sum().clamp(min=1)
        lines.append(
            [
                name,
                f"{100 * float(share):.0f} %",
                interval_text(cosine_mean, group),
                *(interval_text(cosine, (level, group)) for level in shown),
                interval_text(ratio_mean, group, ".2f"),
            ]
        )
    return Table(heads, lines, 1, [])


def interval_text(estimate: Estimate, index: int | tuple[int, ...], form: str = "+.3f") -> str:
    """Write one entry of an estimate as `+0.012 [+0.003, +0.021]`."""
    mean, low, high = (format(float(values[index]), form) for values in estimate)
    return mean if low == "nan" else f"{mean} [{low}, {high}]"


def describe_gradients(
    result: PathGradients, cosine_mean: Estimate, between: Estimate, ratio_mean: Estimate, n: int
) -> str:
    """Summarize how both gradients compare, in sentences."""
    write, both, denoise = (number / 1e6 for number in result.parameters[-1].tolist())
    ratio = f"{interval_text(ratio_mean, -1, '.2f')} times the norm of that of denoising"
    means = f"mean over noise levels, n = {n} clips"
    if not result.shares:
        return (
            f"Writing context and denoising share no parameter ({write:.2f} and {denoise:.2f} M), "
            f"so nothing can be in conflict. The gradient of writing has {ratio} ({means})."
        )
    mean, low, high = (float(values[-1]) for values in cosine_mean)
    if abs(mean) < ORTHOGONAL:
        verdict = "all but orthogonal"
    elif low <= 0 <= high:
        verdict = "neither in conflict nor in agreement beyond chance"
    else:
        verdict = "in conflict" if mean < 0 else "in agreement"
    lowest = int(cosine_mean.mean[:-1].argmin())
    of_pairs = between.mean[..., -1]  # (PAIRS, levels)
    strongest = int(of_pairs[1:].mean(dim=0).argmax())
    two_clips = ", ".join(
        f"{name} {interval_text(between, (pair, strongest, -1), '+.2f')}"
        for pair, name in enumerate(PAIRS)
    )
    return (
        f"Both use {100 * both / (write + both + denoise):.0f} % of the parameters. There the two "
        f"gradients are {verdict}: cosine {interval_text(cosine_mean, -1)} ({means}); lowest: "
        f"{result.groups[lowest]}, {interval_text(cosine_mean, lowest)}. Between two clips, at "
        f"σ = {LEVELS[strongest]:g}, where they have most in common: {two_clips}. The gradient of "
        f"writing has {ratio}."
    )
