"""What a run leaves beside its checkpoints: options, environment, log and loss curve."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from scd.environment import environment
from scd.errors import ScdError
from scd.files import write_json, write_whole
from scd.options import OPTIONS_FILE, Options, options_to_dict, options_to_yaml
from scd.training.resume import flat_options


def write_run_files(
    output: Path, options: Options, accelerator: Accelerator, precision: str
) -> dict[str, Any]:
    """Write `options.yml` (resolved) and `environment.json`.

    Returns:
        What the log begins with: device, precision and number of processes.
    """
    found = environment()
    used = {
        "device": found["device"],
        "precision": precision,
        "processes": accelerator.num_processes,
    }
    text = options_to_yaml(options)
    write_whole(output / OPTIONS_FILE, lambda aside: aside.write_text(text, encoding="utf-8"))
    write_json(output / "environment.json", {**found, **used})
    return used


def for_trackers(options: Options) -> dict[str, str | int | float | bool]:
    """Options as the trackers want them: dotted names and plain values."""
    flat = flat_options(options_to_dict(options))
    return {k: v if isinstance(v, int | float | bool) else str(v) for k, v in flat.items()}


class RunLog:
    """Entries with a `step`, one JSON object a line; numbers that are not finite become null.

    A continued run drops what an interrupted one had logged beyond the checkpoint.

    Args:
        path: `log.jsonl`, or another of its kind.
        step: of the checkpoint.
        enabled: on the main process.
    """

    def __init__(self, path: Path, step: int, enabled: bool):
        self.path = path
        self.enabled = enabled
        if enabled and self.path.exists():
            kept = [entry for entry in read_log(self.path) if entry["step"] <= step]
            text = "".join(json.dumps(entry) + "\n" for entry in kept)
            write_whole(self.path, lambda aside: aside.write_text(text, encoding="utf-8"))

    def write(self, entry: dict[str, Any]) -> None:
        if self.enabled:
            known = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in entry.items()
            }
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(known) + "\n")
            except OSError as error:
                raise ScdError(f"{self.path}: cannot be written ({error})") from error

    def write_where_it_changed(self, entry: dict[str, Any]) -> None:
        """Write what a run computes on and with, unless the last such entry says the same."""
        before = read_log(self.path) if self.path.exists() else []
        said = [{**old, "step": entry["step"]} for old in before if "precision" in old]
        if said[-1:] != [entry]:
            self.write(entry)

    def has(self, key: str, step: int) -> bool:
        """Whether an entry of this step has this key."""
        if not self.path.exists():
            return False
        return any(e["step"] == step and key in e for e in read_log(self.path))

    def draw(self) -> None:
        """Write `loss.png` beside the log."""
        if self.enabled and self.path.exists():
            draw_loss_curve(self.path, self.path.with_name("loss.png"))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a run's log; damaged lines, as a last one cut off by a kill, are left out."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and type(entry.get("step")) is int:
            entries.append(entry)
    return entries


def draw_loss_curve(log: Path, picture: Path) -> None:
    """Loss over steps with its moving average, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    entries = [entry for entry in read_log(log) if entry.get("loss") is not None]
    if not entries:
        return
    steps, losses = zip(*((entry["step"], entry["loss"]) for entry in entries), strict=True)
    half = max(len(losses) // 40, 1)  # of the window that is averaged over
    smooth = [float(np.mean(losses[max(i - half, 0) : i + half + 1])) for i in range(len(losses))]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8)
    axis.plot(steps, smooth, color="tab:blue")
    axis.set(xlabel="step", ylabel="training loss", yscale="log")
    axis.grid(alpha=0.3, which="both")
    write_whole(picture, lambda aside: figure.savefig(aside, dpi=110))
    plt.close(figure)
