"""The benchmark's arithmetic and output; the cases here are too small for meaningful timings."""

import itertools
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scd.benchmark import cases, machine, rollouts, runner
from scd.benchmark.cases import ACTIONS, CHANNELS, SIDE, DataCase, LongRolloutCase, RolloutCase
from scd.benchmark.data_loading import (
    SETTING,
    clips_consumed,
    flops_of_clip,
    moving_camera,
    worker_counts,
)
from scd.benchmark.machine import Machine, frame_floor
from scd.benchmark.rollouts import build
from scd.errors import ScdError
from scd.models import cpu
from scd.options import RolloutOptions, load_options
from scd.rollout import Rollout


@pytest.mark.parametrize("guidance", ["none", "context"])
@pytest.mark.parametrize("encoder_layers", [3, 0])
def test_the_floor_counts_what_a_frame_computes(encoder_layers, guidance, monkeypatch):
    """Against torch's own counter; what the floor leaves out (embeddings) is a few percent."""
    if not encoder_layers and guidance == "context":
        pytest.skip("the dense baseline has no context to perturb")
    # The counter does not know the packed product.
    monkeypatch.setattr(cpu.PackedWeights, "__init__", lambda self, model: setattr(self, "_of", {}))
    case = RolloutCase(
        "tiny", heads=2, encoder_layers=encoder_layers, decoder_layers=2, context=5, steps=3,
        guidance=guidance,
    )  # fmt: skip
    rollout = Rollout(build(case), RolloutOptions(case.steps, guidance=guidance), case.context + 1)
    actions = torch.randint(ACTIONS, (case.context + 1, 1))
    rollout.reset(torch.randn(1, case.context, CHANNELS, SIDE, SIDE), actions[:-1].T)
    with FlopCounterMode(display=False) as counter:
        rollout.step(actions[-1])
    assert counter.get_total_flops() == pytest.approx(frame_floor(case).flops, rel=0.04)


def test_the_floor_is_operations_or_bytes():
    case = RolloutCase("x", dtype="bfloat16")
    floor = frame_floor(case)
    assert floor.seconds(Machine(1.0, 1e12, 1e30)) == pytest.approx(floor.flops / 1e12)
    assert floor.seconds(Machine(1.0, 1e30, 1e9)) == pytest.approx(floor.bytes / 1e9)
    assert frame_floor(replace(case, dtype="float32")).bytes == 2 * floor.bytes


def test_the_floor_reads_weights_once_a_step_and_the_cache_once_a_layer():
    width, keys = 128, SIDE**2 * 5
    layer, cache = 12 * width**2 * 4, 2 * keys * width * 4  # bytes
    scd = RolloutCase("x", heads=2, encoder_layers=3, decoder_layers=2, context=5, steps=4)
    assert frame_floor(scd).bytes == 3 * (layer + cache) + 4 * 2 * layer
    dense = replace(scd, encoder_layers=0, guidance="none")
    assert frame_floor(dense).bytes == (4 + 1) * 2 * (layer + cache)


def test_the_first_run_is_a_warmup(monkeypatch):
    now, taken = [0.0], iter([9.0, 1.0, 2.0])
    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def run():
        now[0] += next(taken)

    assert machine.seconds(run, 2, torch.device("cpu")) == [1.0, 2.0]


@pytest.mark.parametrize("times", [[2.0, 1.0], [1.0, 2.0]])
def test_the_better_of_plain_and_packed_products_counts(times, monkeypatch):
    measured = iter([*times, 1.0])
    monkeypatch.setattr(machine, "seconds", lambda *_: [next(measured)])
    found = machine.measure_machine(torch.float32, torch.device("cpu"))
    product = 2 * 2048**3
    assert (found.plain_flops, found.best_flops) == (product / times[0], product / 1.0)


def test_a_long_rollout_is_timed_by_the_frame(monkeypatch):
    ticks = itertools.count()  # a second for each tenth of the frames
    monkeypatch.setattr(rollouts, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    case = LongRolloutCase("tiny", frames=20, window=2)
    result = rollouts.run_long_rollout(case, torch.device("cpu"))
    assert result["frame_seconds"] == [0.5] * 10


@pytest.mark.parametrize("bf16", [True, False])
def test_table_json_and_plots(tmp_path, monkeypatch, capsys, bf16):
    monkeypatch.setattr(runner, "has_bf16", lambda device: bf16)
    machine = {"plain_flops": 2e11, "best_flops": 3e11, "bytes": 1e10}
    figures = {"peak_bytes": 10**9, "floor_seconds": 0.5, "machine": machine}
    starts = {"prefill_seconds": 1.5, "first_frame_seconds": 2.0}
    stream = starts | {"frame_seconds": [1.0, 1.1, 3.0]} | figures
    results = {
        "RolloutCase": stream | {"decode_seconds": [0.1, 0.15, 0.9]},
        "TrainCase": {"step_seconds": [1.0, 2.0, 3.0]} | figures,
        "LongRolloutCase": {"frame_seconds": [0.02] * 10, "bytes_after_each_tenth": [10**6] * 10},
        "DataCase": {
            "rates": [{"workers": 0, "clips_per_second": 20.0, "cpu_seconds_a_clip": 0.05}],
            "file_bytes": 3e6,
            "taken": {"clips_per_second": 40.0},
        },
    }
    monkeypatch.setattr(
        runner, "_in_own_process", lambda case, folder: results[type(case).__name__]
    )
    runner.benchmark(tmp_path, None, plots=True)
    text = (tmp_path / "benchmark.md").read_text(encoding="utf-8")
    assert "1.100" in text and "0.80" in text and "200 / 300" in text and "2.20" in text
    written = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    skipped = [case for case in cases.TABLE if runner._in_bf16(case) and not bf16]
    assert len(written["cases"]) == len(cases.TABLE) - len(skipped)
    printed = capsys.readouterr().out
    assert all(f"only emulates bf16: {case.name}" in printed for case in skipped)
    plotted = {entry["case"]["dtype"] for entry in written["by_context"]}
    assert plotted == {"bfloat16" if bf16 else "float32"}
    assert len(written["by_steps"]) == 2 * len(cases.STEPS)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    with pytest.raises(ScdError, match="'SCD-XXL': no case contains this"):
        runner.benchmark(tmp_path, "SCD-XXL", plots=False)
    if not bf16:
        with pytest.raises(ScdError, match="none of these cases can run, since this device"):
            runner.benchmark(tmp_path, ", bf16", plots=False)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(
    "suffix, stored, bytes_each",
    [
        (".safetensors", "float32", 8 * 32 * 2 * 2 * 4),
        (".safetensors", "bfloat16", 8 * 32 * 2 * 2 * 2),
        (".pt", "float32", 8 * 32 * 2 * 2 * 4),
        (".mp4", "float32", 0),
    ],
)
def test_data_go_through_the_loader_of_training(
    suffix, stored, bytes_each, tmp_path, monkeypatch, capsys
):
    case = DataCase(
        "data: tiny", suffix, stored, frames=4, clips=3, episode=8, size=32, workers=[0, 1],
        seconds=0.0,
    )  # fmt: skip
    monkeypatch.setattr(cases, "TABLE", [case])
    # In this process: another one would load torch once more.
    monkeypatch.setattr(
        runner, "_in_own_process",
        lambda case, folder: runner.run_case("DataCase", vars(case), str(folder)),
    )  # fmt: skip
    runner.benchmark(tmp_path, "data", plots=False)
    (result,) = json.loads((tmp_path / "benchmark.json").read_text())["cases"]
    assert [rate["workers"] for rate in result["rates"]] == [0, 1]
    assert all(rate["clips_per_second"] > 0 for rate in result["rates"])
    # Beside the latents or the video: headers, and eight actions in an npz.
    assert bytes_each + 8 * 8 < result["file_bytes"] < bytes_each + 8 * 8 + 5000
    assert result["taken"]["clips_per_second"] == pytest.approx(
        8 * 989e12 * 0.4 / result["flops_of_clip"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| data: tiny") for line in lines) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"benchmark.json", "benchmark.md"}


def test_a_case_that_fails_costs_no_other(tmp_path, monkeypatch, capsys):
    chosen = [case for case in cases.TABLE if isinstance(case, LongRolloutCase)] * 3
    result = {"frame_seconds": [0.01], "bytes_after_each_tenth": [1e6], "peak_bytes": 1}
    outcomes = iter([result, ScdError("killed by SIGKILL"), result])

    def run(case, folder):
        if isinstance(outcome := next(outcomes), ScdError):
            raise outcome
        return outcome

    monkeypatch.setattr(runner, "_in_own_process", run)
    monkeypatch.setattr(cases, "TABLE", chosen)
    with pytest.raises(ScdError, match="failed: "):
        runner.benchmark(tmp_path, None, False)
    assert "killed by SIGKILL" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "benchmark.json").read_text())["cases"]) == 2
    assert (tmp_path / "benchmark.md").read_text().count(chosen[0].name) == 2
    assert not list(tmp_path.glob("*unfinished*"))


def test_an_interrupted_benchmark_leaves_the_one_before(tmp_path, monkeypatch):
    chosen = [case for case in cases.TABLE if isinstance(case, LongRolloutCase)] * 2
    result = {"frame_seconds": [0.01], "bytes_after_each_tenth": [1e6], "peak_bytes": 1}
    outcomes = iter([result])

    def run(case, folder):
        for outcome in outcomes:
            return outcome
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "_in_own_process", run)
    monkeypatch.setattr(cases, "TABLE", chosen)
    (tmp_path / "benchmark.json").write_text("before")
    with pytest.raises(KeyboardInterrupt):
        runner.benchmark(tmp_path, None, False)
    assert (tmp_path / "benchmark.json").read_text() == "before"
    unfinished = json.loads((tmp_path / "benchmark-unfinished.json").read_text())
    assert len(unfinished["cases"]) == 1


def test_a_killed_case_is_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\necho 'UserWarning: lazy' >&2\nkill -9 $$\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(ScdError, match=r"killed by SIGKILL \(out of memory\?\)"):
        runner._in_own_process(cases.TABLE[0], tmp_path)


def test_clips_that_gpus_need():
    assert clips_consumed(2e13) == pytest.approx(158.24)  # 8 x 989e12 x 0.4 / 2e13
    assert clips_consumed(1e12, gpus=1, peak=1e14, utilization=0.5) == pytest.approx(50)


def test_operations_of_a_clip_by_hand():
    """One layer each, no recomputation: products of every token, and attention."""
    overrides = ["model.heads=16", "model.encoder_layers=1", "model.decoder_layers=1"]
    overrides += ["data.frames=3", "flow.noise_draws=1", "train.gradient_checkpointing=false"]
    options = load_options(SETTING, overrides)
    width, tokens = 1024, 64
    products = 2 * tokens * 12 * width**2  # q, k, v, out and the two of the MLP; of a frame
    # Two frames of context, the second sees both; two frames to predict, each beside its context,
    # of which the last layer needs q, k, v alone.
    encoder = 2 * products + 4 * (tokens * tokens + tokens * 2 * tokens) * width
    decoder = 2 * (products + 2 * tokens * 3 * width**2 + 4 * tokens * 2 * tokens * width)
    # Forward and twice that backward; embeddings and modulations are a few percent.
    assert flops_of_clip(options) == pytest.approx(3 * (encoder + decoder), rel=0.05)


def test_worker_counts():
    assert worker_counts(1) == [0, 1]
    assert worker_counts(2) == [0, 1, 2]
    assert worker_counts(6) == [0, 1, 2, 4, 6]
    assert worker_counts(16) == [0, 1, 2, 4, 8, 16]


def test_the_camera_moves_smoothly():
    """Each differs from the one before, but far less than from one long after."""
    video = moving_camera(np.random.default_rng(0), 200, 64).astype(float)
    assert video.shape == (200, 64, 64, 3) and video.std() > 20
    step = [abs(video[n + 1] - video[n]).mean() for n in range(199)]
    far = [abs(video[n + 99] - video[n]).mean() for n in range(101)]
    assert 0 < np.mean(step) < 0.5 * np.mean(far)
