"""Matplotlib figures of a probe report, in colors that color-blind readers can tell apart.

Amounts are in cividis, categories in the colors of Okabe and Ito.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
COLORMAP = "cividis"

Panels = dict[str, dict[str, list[tuple[float, float] | None]]]
"""Panel -> curve -> (mean, standard error) at each position, or None where a curve has no point."""

plt.rcParams.update(
    {"font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False}
)


def similarity_matrices(similarity: Tensor, names: Sequence[str], n: int) -> Figure:
    """Plot the similarity of every two steps, (layers, T, T), as a square for each layer."""
    columns = min(len(names), 4)
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.5 * columns + 0.8, 2.55 * rows + 0.5), layout="constrained"
    )
    low = min(0.0, float(similarity.min()))
    flat = np.atleast_1d(axes).flatten()
    for axis, matrix, name in zip(flat, similarity, names, strict=False):
        shown = axis.imshow(matrix, vmin=low, vmax=1, cmap=COLORMAP, origin="lower")
        axis.set_title(name)
        _steps(axis.xaxis, len(matrix))
        _steps(axis.yaxis, len(matrix))
    for axis in flat[len(names) :]:
        axis.axis("off")
    figure.supxlabel("denoising step (1 = pure noise)")
    figure.supylabel("denoising step")
    figure.colorbar(shown, ax=axes, label="cosine similarity", shrink=0.8)
    figure.suptitle(f"Features at two steps of a frame (n = {n} clips)")
    return figure


def similarity_to_last(
    similarity: Tensor,
    error: Tensor,
    centered: Tensor,
    between_clips: Tensor,
    names: Sequence[str],
    n: int,
) -> Figure:
    """Plot each layer's similarity to the last steps.

    Args:
        similarity, centered: (layers, T, T).
        error: (layers, T), standard error of the similarity to the last step.
        between_clips: (layers,), drawn as dashes at the right edge.
    """
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained", sharey=True)
    steps = np.arange(1, similarity.shape[1] + 1)
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(names)))
    for axis, values, title in (
        (axes[0], similarity[:, :, -1], "to the last step (σ 0.001)"),
        (axes[1], similarity[:, :, -2], "to the second to last"),
        (axes[2], centered[:, :, -2], "to the second to last, without the layer's mean token"),
    ):
        for layer, name in enumerate(names):
            axis.plot(steps, values[layer], color=colors[layer], marker=".", label=name)
        axis.set(xlabel="denoising step (1 = pure noise)", title=title)
        axis.axhline(0.95, color="grey", linewidth=0.8, linestyle=":")
        axis.grid(alpha=0.25)
        _steps(axis.xaxis, len(steps), first=1)
    for layer in range(len(names)):
        to_last = similarity[layer, :, -1]
        low, high = to_last - error[layer], to_last + error[layer]
        axes[0].fill_between(steps, low, high, color=colors[layer], alpha=0.15, linewidth=0)
        for axis in axes[:2]:
            axis.plot(steps[-1] + 0.9, between_clips[layer], "_", color=colors[layer], markersize=9)
    axes[0].set_ylabel("cosine similarity")
    axes[2].legend(fontsize=8, frameon=False)
    figure.suptitle(
        f"Similarity of features to those of the last steps (n = {n}; band: standard error; "
        f"dashes at the right: two different clips; dotted: 0.95)",
        fontsize=10,
    )
    return figure


def feature_pictures(
    pictures: Tensor,
    frames: Tensor,
    real: Tensor,
    names: Sequence[str],
    steps: Sequence[str],
    side: tuple[int, int],
) -> Figure:
    """Show the clean frame as each step estimates it, and below it the features of every layer.

    Args:
        pictures: (layers, T, N, 3).
        frames: (T, 3, H, W), real: (3, H, W), all in [0, 1].
        steps: titles of the T columns.
        side: rows and columns of tokens.
    """
    columns = pictures.shape[1]
    # In inches: pictures of one size, with room for the names on the left and the title above.
    width, height = 0.72 * (columns + 1) + 1.0, 0.74 * (len(names) + 1) + 1.05
    width = max(width, 5.5)
    figure, axes = plt.subplots(
        len(names) + 1,
        columns + 1,
        figsize=(width, height),
        gridspec_kw={
            "wspace": 0.06,
            "hspace": 0.06,
            "left": 0.95 / width,
            "right": 0.995,
            "top": 1 - 0.95 / height,
            "bottom": 0.01,
        },
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_visible(False)
    for step in range(columns):
        axes[0, step].imshow(frames[step].permute(1, 2, 0))
        axes[0, step].set_title(steps[step], fontsize=8)
        for layer in range(len(names)):
            axes[layer + 1, step].imshow(pictures[layer, step].unflatten(0, side))
    axes[0, -1].imshow(real.permute(1, 2, 0))
    axes[0, -1].set_title("real", fontsize=8)
    for row, name in enumerate(["estimate", *names]):
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle(
        "The clean frame as estimated at each denoising step and noise level,\n"
        "and the features' three principal components as colors (one basis per layer)",
        fontsize=10,
    )
    return figure


def attention_on_past(
    mass: Tensor, last: Tensor, layer_names: Sequence[str], steps: bool, n: int
) -> Figure:
    """Plot the attention on past frames by layer, by step or head, and by distance.

    Args:
        mass, last: of the first and the last new frame, (passes, layers, heads, frames).
        steps: whether the passes are denoising steps, to plot instead of heads.
    """
    past = mass.shape[-1] - 1
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9), layout="constrained")
    by_head = mass[..., :-1].sum(-1).mean(0)  # (layers, heads)
    layers = np.arange(1, len(layer_names) + 1)
    axes[0].plot(layers, by_head.mean(1), color=COLORS[0], marker="o", label="first new frame")
    later = last[..., :-1].sum(-1).mean(dim=(0, 2))
    axes[0].plot(layers, later, color=COLORS[1], marker="s", linestyle="--", label="last new frame")
    for head in range(by_head.shape[1]):
        axes[0].plot(layers, by_head[:, head], ".", color=COLORS[0], alpha=0.4, markersize=5)
    uniform = past / (past + 1)
    axes[0].axhline(uniform, color="grey", linestyle=":", linewidth=1, label="uniform attention")
    axes[0].set(xlabel="layer", ylabel="attention on past frames", ylim=(0, 1), xticks=layers)
    axes[0].set_title("by layer (dots: heads of the first)")
    axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    if steps:
        shown = axes[1].imshow(
            mass[..., :-1].sum(-1).mean(-1).T,
            aspect="auto",
            cmap=COLORMAP,
            vmin=0,
            vmax=1,
            origin="lower",
            extent=(0.5, len(mass) + 0.5, 0.5, len(layers) + 0.5),
        )
        axes[1].set(xlabel="denoising step (1 = pure noise)", ylabel="layer", yticks=layers)
        axes[1].set_title("on past frames, by step")
    else:
        shown = axes[1].imshow(
            by_head,
            aspect="auto",
            cmap=COLORMAP,
            vmin=0,
            vmax=1,
            origin="lower",
            extent=(0.5, by_head.shape[1] + 0.5, 0.5, len(layers) + 0.5),
        )
        heads = np.arange(1, by_head.shape[1] + 1)
        axes[1].set(xlabel="head", ylabel="layer", xticks=heads, yticks=layers)
        axes[1].set_title("on past frames, by head")
    figure.colorbar(shown, ax=axes[1], label="fraction of attention")
    distances = np.arange(past + 1)[::-1]
    by_distance = mass.mean(dim=(0, 2))  # (layers, frames)
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(layers)))
    for row, name, color in zip(by_distance, layer_names, colors, strict=True):
        axes[2].plot(distances, row, color=color, marker=".", label=name)
    axes[2].axhline(1 / (past + 1), color="grey", linestyle=":", linewidth=1)
    axes[2].set(xlabel="frames back (0 = its own tokens)", ylabel="fraction of attention")
    axes[2].set_title("first new frame, by distance")
    axes[2].legend(frameon=False, fontsize=7, ncols=2)
    figure.suptitle(f"Where the new frame's attention goes (n = {n} clips)")
    return figure


def attention_on_context(mass: Tensor, n: int) -> Figure:
    """Plot the decoder's attention on the context, (T, layers, heads), by step."""
    figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
    steps = np.arange(1, len(mass) + 1)
    for layer in range(mass.shape[1]):
        color = COLORS[layer % len(COLORS)]
        axis.plot(
            steps, mass[:, layer].mean(-1), color=color, marker="o", label=f"decoder {layer + 1}"
        )
        axis.plot(steps, mass[:, layer], ".", color=color, alpha=0.3, markersize=4)
    axis.axhline(0.5, color="grey", linestyle=":", linewidth=1)
    axis.set(
        xlabel="denoising step (1 = pure noise)", ylabel="attention on the context", ylim=(0, 1)
    )
    axis.set_title(f"Decoder: attention on the context tokens (dots: heads; n = {n})")
    axis.legend(frameon=False, fontsize=8)
    _steps(axis.xaxis, len(steps), first=1)
    return figure


def differences(positions: Sequence[float], panels: Panels, xlabel: str, title: str) -> Figure:
    """Plot panels of curves over the same positions, with error bars."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.1 * len(panels), 3.7), layout="constrained", squeeze=False
    )
    for axis, (ylabel, curves) in zip(axes[0], panels.items(), strict=True):
        for number, (name, values) in enumerate(curves.items()):
            points = [(x, *v) for x, v in zip(positions, values, strict=True) if v is not None]
            x, mean, error = zip(*points, strict=True)
            axis.errorbar(
                x,
                mean,
                error,
                color=COLORS[number],
                marker="os^D"[number % 4],
                capsize=2,
                label=name,
            )
        axis.axhline(0, color="grey", linewidth=0.8, linestyle=":")
        axis.set(xlabel=xlabel, ylabel=ylabel, xticks=list(positions))
        axis.grid(alpha=0.25)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    return figure


def loss_increase(
    values: np.ndarray, levels: Sequence[float], names: Sequence[str], title: str
) -> Figure:
    """Plot the increase of the loss in percent, (rows, levels), as a colored table."""
    figure, axis = plt.subplots(
        figsize=(1.0 * len(levels) + 3, 0.36 * len(names) + 1.6), layout="constrained"
    )
    shown = axis.imshow(
        np.log10(np.clip(values, 1, 1000)), aspect="auto", cmap=COLORMAP, vmin=0, vmax=3
    )
    for row in range(len(names)):
        for column in range(len(levels)):
            value = values[row, column]
            color = "black" if value > 40 else "white"
            axis.text(
                column,
                row,
                f"{value:+.1f}" if abs(value) < 10 else f"{value:+.0f}",
                ha="center",
                va="center",
                color=color,
                fontsize=8,
            )
    axis.set_yticks(range(len(names)), names)
    axis.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
    axis.set(xlabel="noise level σ")
    bar = figure.colorbar(shown, ax=axis, label="increase of the loss, %")
    bar.set_ticks([0, 1, 2, 3], labels=["≤ 1", "10", "100", "≥ 1000"])
    figure.suptitle(title, fontsize=10)
    return figure


def training_curves(curves: dict[str, list[tuple[int, float, float]]], title: str) -> Figure:
    """Plot the loss over training steps.

    Args:
        curves: name -> (step, ratio to the dense model's loss, standard error) at some steps;
            first the splits, then in the same order random initializations of the same shapes.
    """
    figure, axis = plt.subplots(figsize=(7, 4.6), layout="constrained")
    shapes = len(curves) // 2
    for number, (name, points) in enumerate(curves.items()):
        steps, losses, errors = zip(*points, strict=True)
        axis.errorbar(
            steps,
            losses,
            errors,
            color=COLORS[number % shapes],
            marker="os^D"[number % shapes],
            linestyle="-" if number < shapes else "--",
            capsize=2,
            label=name,
        )
    axis.axhline(1, color="grey", linestyle=":", linewidth=1, label="the dense model")
    axis.set(xlabel="training steps", ylabel="validation loss ÷ dense", yscale="log", title=title)
    axis.set_xticks(steps)
    axis.grid(alpha=0.25, which="both")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def _steps(axis: Any, count: int, first: int = 0) -> None:
    """Label a few steps, counted from 1."""
    at = np.unique(np.linspace(0, count - 1, min(count, 4)).round().astype(int))
    axis.set_ticks(at + first, [str(i + 1) for i in at])
