"""`scd benchmark`: run every case in a process of its own; write a table, plots, and JSON."""

import json
import signal
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scd.benchmark import cases
from scd.benchmark.cases import (
    Case,
    DataCase,
    LongRolloutCase,
    RolloutCase,
    TrainCase,
    WanCase,
    WanStreamCase,
)
from scd.errors import ScdError
from scd.utils.environment import environment
from scd.utils.files import write_atomically, write_json
from scd.utils.precision import has_bf16
from scd.utils.table import Table

UNFINISHED = "benchmark-unfinished"  # until every case was tried, an earlier benchmark stays


def benchmark(folder: Path, only: str | None, plots: bool) -> None:
    """Run the cases whose name contains `only`, and with `plots` those of the plots.

    Cases in bf16 are skipped on a device that only emulates it, and streams of Wan's pictures
    without a GPU: they would run for hours.

    Args:
        only: None: all cases but those that run on request alone.

    Raises:
        ScdError: no case has such a name, none can run here, or a case failed.
    """
    gpu = torch.cuda.is_available()
    bf16 = has_bf16(torch.device("cuda" if gpu else "cpu"))
    chosen = _choose(only, gpu, bf16)
    done: list[Case] = []
    results: list[dict[str, Any]] = []
    failed: list[str] = []
    figures: dict[str, Any] = {"environment": environment()}
    text = ""
    for case in chosen:  # what was measured is kept, whatever happens to the next case
        try:
            results.append(_in_own_process(case, folder))
        except ScdError as error:
            print(f"failed: {error}", file=sys.stderr)
            failed.append(case.name)
            continue
        done.append(case)
        text = "\n\n".join(table.markdown() for table in _tables(done, results))
        figures["cases"] = _with_cases(done, results)
        _write(folder, UNFINISHED, figures, text)
    try:
        if plots:
            dtype = "bfloat16" if bf16 else "float32"
            for plotted in (cases.by_context, cases.by_steps):
                plot = plotted(dtype)
                figures[plotted.__name__] = _with_cases(
                    plot, [_in_own_process(case, folder) for case in plot]
                )
                _write(folder, UNFINISHED, figures, text)
            plot_scaling(folder / "scaling.png", figures["by_context"], figures["by_steps"])
    except ScdError as error:
        print(f"failed: {error}", file=sys.stderr)
        failed.append("the plots")
    if done or "by_context" in figures:
        _write(folder, "benchmark", figures, text)
        for kind in ("json", "md"):
            (folder / f"{UNFINISHED}.{kind}").unlink(missing_ok=True)
        print(f"\n{text}\n\nfigures: {folder}/benchmark.json, benchmark.md")
    if failed:
        raise ScdError(f"failed: {'; '.join(failed)}")


def _choose(only: str | None, gpu: bool, bf16: bool) -> list[Case]:
    """Find the cases to run on a device that is a GPU or not, with fast bf16 or not."""
    known = cases.TABLE if only is None else [*cases.TABLE, *cases.ON_REQUEST]
    chosen = [case for case in known if only is None or only in case.name]
    if not chosen:
        names = "; ".join(case.name for case in known)
        raise ScdError(f"--only {only!r}: no case contains this; there are {names}")
    for why, skipped in (
        ("this device only emulates bf16", _in_bf16 if not bf16 else None),
        ("this machine has no GPU", _on_gpu if not gpu else None),
    ):
        if skipped is None:
            continue
        for case in filter(skipped, chosen):
            print(f"skipped, since {why}: {case.name}")
        chosen = [case for case in chosen if not skipped(case)]
        if not chosen:
            raise ScdError(f"--only {only!r}: none of these cases can run, since {why}")
    return chosen


def _write(folder: Path, name: str, figures: dict[str, Any], text: str) -> None:
    write_json(folder / f"{name}.json", figures)
    write_atomically(
        folder / f"{name}.md", lambda aside: aside.write_text(text + "\n", encoding="utf-8")
    )


def run_case(kind: str, arguments: dict[str, Any], folder: str) -> dict[str, Any]:
    """Run one case in this process, with temporary files in `folder`.

    Args:
        kind: name of the case's class.
        arguments: fields of the case.
    """
    if kind == DataCase.__name__:
        from scd.benchmark.data_loading import run_data

        return run_data(DataCase(**arguments), Path(folder))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if kind in (WanCase.__name__, WanStreamCase.__name__):
        from scd.benchmark.wan import run_wan, run_wan_stream

        if kind == WanCase.__name__:
            return run_wan(WanCase(**arguments), device)
        return run_wan_stream(WanStreamCase(**arguments), device)
    if kind == TrainCase.__name__:
        from scd.benchmark.train_step import run_training

        return run_training(TrainCase(**arguments), device)
    from scd.benchmark.rollouts import run_long_rollout, run_rollout

    if kind == LongRolloutCase.__name__:
        return run_long_rollout(LongRolloutCase(**arguments), device)
    return run_rollout(RolloutCase(**arguments), device)


def _in_bf16(case: Case) -> bool:
    return getattr(case, "dtype", None) == "bfloat16"


def _on_gpu(case: Case) -> bool:
    return isinstance(case, WanStreamCase)


def _in_own_process(case: Case, folder: Path) -> dict[str, Any]:
    """Run one case in a new process, so that its peak memory is its own."""
    print(f"{case.name} ...", flush=True)
    code = "import sys, json; from scd.utils.startup import prepare_process; prepare_process(); "
    code += "from scd.benchmark.runner import run_case; "  # as every command begins
    code += "print(json.dumps(run_case(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])))"
    arguments = [type(case).__name__, json.dumps(asdict(case)), str(folder)]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise ScdError(f"{case.name}: killed by {name}{' (out of memory?)' * (name == 'SIGKILL')}")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ScdError(f"{case.name}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _with_cases(chosen: list[Any], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"case": asdict(case), **result} for case, result in zip(chosen, results, strict=True)]


def _tables(chosen: list[Case], results: list[dict[str, Any]]) -> list[Table]:
    pairs = list(zip(chosen, results, strict=True))
    rollouts = [(case, result) for case, result in pairs if isinstance(case, RolloutCase)]
    trainings = [(case, result) for case, result in pairs if isinstance(case, TrainCase)]
    long_rollouts = [(case, result) for case, result in pairs if isinstance(case, LongRolloutCase)]
    data = [(case, result) for case, result in pairs if isinstance(case, DataCase)]
    tables = []
    if rollouts:
        tables.append(_rollout_table(rollouts))
    if trainings:
        heads = ["training step", "s/step", "floor, s", "of the floor", "GFLOP/s", "peak, GB"]
        lines = []
        for case, r in trainings:
            step = statistics.median(r["step_seconds"])
            lines.append([case.name, f"{step:.2f}", *_against_floor(step, r), _gigabytes(r)])
        tables.append(Table(heads, lines, 1, []))
    if long_rollouts:
        heads = ["long rollout", "ms/frame, tenth by tenth", "MB, tenth by tenth"]
        lines = [
            [
                case.name,
                " ".join(f"{1e3 * x:.1f}" for x in r["frame_seconds"]),
                " ".join(f"{x / 1e6:.0f}" for x in r["bytes_after_each_tenth"]),
            ]
            for case, r in long_rollouts
        ]
        tables.append(Table(heads, lines, 1, []))
    if data:
        from scd.benchmark.data_loading import data_table

        tables.append(data_table(data))
    wans = [(case, result) for case, result in pairs if isinstance(case, WanCase)]
    if wans:
        from scd.benchmark.wan import wan_tables

        tables += wan_tables(wans)
    return tables


def _rollout_table(rollouts: list[tuple[RolloutCase, dict[str, Any]]]) -> Table:
    heads = [
        "batch 1",
        "prefill, s",
        "first frame, s",
        "s/frame p50",
        "p95",
        "latent FPS",
        "pixel FPS",
    ]
    heads += ["floor, s", "of the floor", "GFLOP/s", "peak, GB"]
    lines = []
    for case, r in rollouts:
        frame, slow = np.quantile(r["frame_seconds"], [0.5, 0.95])
        decode = statistics.median(r["decode_seconds"])
        starts = [r["prefill_seconds"], r["first_frame_seconds"]]
        lines.append(
            [
                case.name,
                *("–" if start is None else f"{start:.2f}" for start in starts),
                f"{frame:.3f}",
                f"{slow:.3f}",
                f"{1 / frame:.2f}",
                f"{1 / (frame + decode):.2f}",
                *_against_floor(frame, r),
                _gigabytes(r),
            ]
        )
    notes = [
        "Prefill: packing the weights and encoding the context. First frame: including prefill. "
        "Pixel FPS: including decoding to 128x128, one frame at a time.",
        "Floor: the frame's operations at the better rate under GFLOP/s (a plain product of large "
        "matrices / one with packed weights), or its bytes at the machine's rate of copying.",
    ]
    return Table(heads, lines, 1, notes)


def _against_floor(taken: float, r: dict[str, Any]) -> list[str]:
    rates = f"{r['machine']['plain_flops'] / 1e9:.0f} / {r['machine']['best_flops'] / 1e9:.0f}"
    return [f"{r['floor_seconds']:.3f}", f"{taken / r['floor_seconds']:.2f}", rates]


def _gigabytes(r: dict[str, Any]) -> str:
    return f"{r['peak_bytes'] / 1e9:.2f}"


COLORS = {"SCD-M": "#0072b2", "Causal DiT-M": "#d55e00"}  # distinct for color-blind readers


def plot_scaling(
    path: Path, by_context: list[dict[str, Any]], by_steps: list[dict[str, Any]]
) -> None:
    """Plot seconds per frame against context frames and denoising steps, on log axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = zip(
        figure.subplots(1, 2),
        (by_context, by_steps),
        (("context", "context frames"), ("steps", "denoising steps")),
        strict=True,
    )
    for axes, results, (key, label) in panels:
        for name, color in COLORS.items():
            mine = [r for r in results if r["case"]["name"].startswith(name)]
            x = [r["case"][key] for r in mine]
            y = [statistics.median(r["frame_seconds"]) for r in mine]
            axes.plot(x, y, "o-", color=color, label=name)
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds per frame")
        ticks = sorted({r["case"][key] for r in results})
        axes.set_xticks(ticks, labels=list(map(str, ticks)), minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(True, which="both", alpha=0.3)
    one = by_context[0]["case"]
    other = by_steps[0]["case"]
    figure.axes[0].set_title(f"{one['steps']} steps")
    figure.axes[1].set_title(f"{other['context']} context frames")
    figure.axes[0].legend()
    write_atomically(path, lambda aside: figure.savefig(aside, dpi=110))
