"""Seconds a frame against context length and against steps."""

import statistics
from pathlib import Path
from typing import Any

from scd.files import write_whole

COLOURS = {"SCD-M": "#0072b2", "Causal DiT-M": "#d55e00"}  # told apart by colour-blind readers too


def draw_scaling(
    path: Path, by_context: list[dict[str, Any]], by_steps: list[dict[str, Any]]
) -> None:
    """Two panels, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = zip(
        figure.subplots(1, 2),
        (by_context, by_steps),
        (("context", "context frames"), ("steps", "denoising steps")),
        strict=True,
    )
    for axes, results, (key, label) in panels:
        for name, colour in COLOURS.items():
            mine = [r for r in results if r["case"]["name"].startswith(name)]
            x = [r["case"][key] for r in mine]
            y = [statistics.median(r["frame_seconds"]) for r in mine]
            axes.plot(x, y, "o-", color=colour, label=name)
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds a frame")
        ticks = sorted({r["case"][key] for r in results})
        axes.set_xticks(ticks, labels=list(map(str, ticks)), minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(True, which="both", alpha=0.3)
    one = by_context[0]["case"]
    other = by_steps[0]["case"]
    figure.axes[0].set_title(f"{one['steps']} steps")
    figure.axes[1].set_title(f"{other['context']} context frames")
    figure.axes[0].legend()
    write_whole(path, lambda aside: figure.savefig(aside, dpi=110))
