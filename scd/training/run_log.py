"""Record a run: options and environment, `log.jsonl` and trackers, progress bar and loss curve."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from scd.errors import ScdError
from scd.options import OPTIONS_FILE, Options, options_to_dict, options_to_yaml
from scd.training.performance import ProfilerTrace, ThroughputMeter, peak_flops
from scd.training.resume import clips_per_step, flatten_options
from scd.training.step_cost import ClipCost
from scd.utils.environment import environment
from scd.utils.files import write_atomically, write_json
from scd.utils.processes import error_barrier


class RunLog:
    """A file of JSON lines, each with a `step`; numbers that are not finite become null.

    A resumed run drops the entries that an interrupted one had written beyond the checkpoint.

    Args:
        path: `log.jsonl`, or another file of this kind.
        step: of the checkpoint.
        enabled: on the main process.
    """

    def __init__(self, path: Path, step: int, enabled: bool):
        self.path = path
        self.enabled = enabled
        if enabled and self.path.exists():
            kept = [entry for entry in read_log(self.path) if entry["step"] <= step]
            text = "".join(json.dumps(entry) + "\n" for entry in kept)
            write_atomically(self.path, lambda aside: aside.write_text(text, encoding="utf-8"))

    def write(self, entry: dict[str, Any]) -> None:
        if self.enabled:
            finite = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in entry.items()
            }
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(finite) + "\n")
            except OSError as error:
                raise ScdError(f"{self.path}: cannot be written ({error})") from error

    def has(self, key: str, step: int) -> bool:
        """Check whether an entry of this step has this key."""
        if not self.path.exists():
            return False
        return any(e["step"] == step and key in e for e in read_log(self.path))

    def draw(self) -> None:
        """Write `loss.png` beside the log."""
        if self.enabled and self.path.exists():
            draw_loss_curve(self.path, self.path.with_name("loss.png"))


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the entries of a log; damaged lines, such as one cut off by a kill, are left out."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and type(entry.get("step")) is int:
            entries.append(entry)
    return entries


def record_setup(
    options: Options,
    accelerator: Accelerator,
    precision: str,
    clips: int,
    log: RunLog,
    step: int,
) -> None:
    """Write `options.yml` and `environment.json`; log and print what the run computes on.

    Device, precision and number of processes are logged where they differ from the last time.
    """
    output = options.output
    found = environment()
    used = {
        "device": found["device"],
        "precision": precision,
        "processes": accelerator.num_processes,
    }
    text = options_to_yaml(options)
    write_atomically(output / OPTIONS_FILE, lambda aside: aside.write_text(text, encoding="utf-8"))
    write_json(output / "environment.json", {**found, **used})
    entries = read_log(log.path) if log.path.exists() else []
    logged = [{key: entry.get(key) for key in used} for entry in entries if "precision" in entry]
    if logged[-1:] != [used]:
        log.write({"step": step, **used})
    listed = f"{clips} clips of {options.data.train_list}"
    print(f"{options.name}: training in {precision} on {used['device']}, with {listed}")


def start_trackers(options: Options, accelerator: Accelerator, step: int) -> None:
    """Start the trackers with the options as their configuration; collective.

    Raises:
        ScdError: one of them cannot start.
    """
    flat = flatten_options(options_to_dict(options))
    config = {k: v if isinstance(v, int | float | bool) else str(v) for k, v in flat.items()}
    with error_barrier():
        # TensorBoard drops what a killed run had logged beyond the checkpoint.
        arguments = {"tensorboard": {"purge_step": step + 1}}
        accelerator.init_trackers(options.name, config, arguments)


class StepReporter:
    """Progress bar, throughput and profiler trace of the steps, and their entries in the log.

    A context, which closes the bar and the trace.

    Args:
        cost: of one clip; None: unknown.
        step: the number of steps that are done.
    """

    def __init__(
        self,
        options: Options,
        accelerator: Accelerator,
        precision: str,
        log: RunLog,
        cost: ClipCost | None,
        step: int,
    ):
        main, processes = accelerator.is_main_process, accelerator.num_processes
        self.accelerator = accelerator
        self.log = log
        self.meter = ThroughputMeter(
            clips_per_step(options, processes),
            processes,
            cost,
            peak_flops(accelerator.device, precision),
        )
        self.trace = ProfilerTrace(options.output, options.train.profile_steps, main)
        self.bar = tqdm(
            total=options.train.steps,
            initial=step,
            desc=options.name,
            disable=not main,
            dynamic_ncols=True,
            mininterval=1.0,
        )

    def __enter__(self) -> "StepReporter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.trace.close()
        self.bar.close()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Time and trace the block, which takes this step."""
        with self.trace.step(number):
            began = time.perf_counter()
            yield
            self.meter.add_step(time.perf_counter() - began)
        self.bar.update()

    def log_step(self, step: int, values: dict[str, Tensor], lr: float, applied: bool) -> None:
        """Log a step's values, averaged over the processes, and the throughput; collective."""
        entry = {
            name: float(self.accelerator.reduce(value.float(), "mean"))
            for name, value in values.items()
        }
        entry["lr"] = lr
        entry |= self.meter.report(self.accelerator.device)
        self.bar.set_postfix(loss=f"{entry['loss']:.4f}")
        self.log.write({"step": step, **entry, **({} if applied else {"applied": False})})
        self.accelerator.log({f"train/{k}": v for k, v in entry.items()}, step=step)


def draw_loss_curve(log: Path, picture: Path) -> None:
    """Plot the loss over steps, with its moving average, as a PNG.

    A critic's, where there is one: the student's is added to it in some steps only.
    """
    from matplotlib.figure import Figure

    entries = [entry for entry in read_log(log) if entry.get("loss") is not None]
    if not entries:
        return
    points = [(entry["step"], entry.get("critic_loss", entry["loss"])) for entry in entries]
    steps, losses = zip(*points, strict=True)
    half = max(len(losses) // 40, 1)  # of the averaging window
    smooth = [float(np.mean(losses[max(i - half, 0) : i + half + 1])) for i in range(len(losses))]
    figure = Figure(figsize=(7, 4))
    axis = figure.subplots(gridspec_kw={"left": 0.14, "right": 0.98, "bottom": 0.13, "top": 0.97})
    axis.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8)
    axis.plot(steps, smooth, color="tab:blue")
    # A student that is its own teacher begins with a loss of 0.
    scale = "log" if max(losses) > 0 else "linear"
    axis.set(xlabel="step", ylabel="training loss", yscale=scale)
    axis.grid(alpha=0.3, which="both")
    write_atomically(picture, lambda aside: figure.savefig(aside, dpi=110))
