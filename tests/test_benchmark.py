"""The benchmark's arithmetic and its output; it times nothing here."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scd.benchmark import cases, run
from scd.benchmark.cases import ACTIONS, CHANNELS, SIDE, StreamCase
from scd.benchmark.floor import frame_floor
from scd.benchmark.machine import Machine
from scd.benchmark.streaming import build
from scd.errors import ScdError
from scd.models import linear
from scd.options import RolloutOptions
from scd.rollout import Rollout


@pytest.mark.parametrize("guidance", ["none", "context"])
@pytest.mark.parametrize("encoder_layers", [3, 0])
def test_the_floor_counts_what_a_frame_computes(encoder_layers, guidance, monkeypatch):
    """Against torch's own counter; what the floor leaves out (embeddings) is a few percent."""
    if not encoder_layers and guidance == "context":
        pytest.skip("the dense baseline has no context to perturb")
    # The counter does not know the packed product.
    monkeypatch.setattr(
        linear.PackedWeights, "__init__", lambda self, model: setattr(self, "_of", {})
    )
    case = StreamCase(
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
    case = StreamCase("x", dtype="bfloat16")
    floor = frame_floor(case)
    assert floor.seconds(Machine(1.0, 1e12, 1e30)) == pytest.approx(floor.flops / 1e12)
    assert floor.seconds(Machine(1.0, 1e30, 1e9)) == pytest.approx(floor.bytes / 1e9)
    assert frame_floor(replace(case, dtype="float32")).bytes == 2 * floor.bytes


@pytest.mark.parametrize("bf16", [True, False])
def test_table_json_and_plots(tmp_path, monkeypatch, capsys, bf16):
    monkeypatch.setattr(run, "has_bf16", lambda device: bf16)
    machine = {"plain_flops": 2e11, "best_flops": 3e11, "bytes": 1e10}
    figures = {"peak_bytes": 10**9, "floor_seconds": 0.5, "machine": machine}
    starts = {"prefill_seconds": 1.5, "first_frame_seconds": 2.0}
    stream = starts | {"frame_seconds": [1.0, 1.1, 3.0]} | figures
    results = {
        "StreamCase": stream | {"decode_seconds": [0.1, 0.15, 0.2]},
        "TrainCase": {"step_seconds": [1.0, 2.0, 3.0]} | figures,
        "EndlessCase": {"frame_seconds": [0.02] * 10, "bytes_after_each_tenth": [10**6] * 10},
    }
    monkeypatch.setattr(run, "_in_own_process", lambda case: results[type(case).__name__])
    run.benchmark(tmp_path, None, plots=True)
    text = (tmp_path / "benchmark.md").read_text(encoding="utf-8")
    assert "1.100" in text and "0.80" in text and "200 / 300" in text and "2.20" in text
    written = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    left_out = [case for case in cases.TABLE if case.dtype == "bfloat16" and not bf16]
    assert len(written["cases"]) == len(cases.TABLE) - len(left_out)
    said = capsys.readouterr().out
    assert all(f"only emulates bf16: {case.name}" in said for case in left_out)
    plotted = {entry["case"]["dtype"] for entry in written["by_context"]}
    assert plotted == {"bfloat16" if bf16 else "float32"}
    assert len(written["by_steps"]) == 2 * len(cases.STEPS)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    with pytest.raises(ScdError, match="no case contains 'SCD-XXL'"):
        run.benchmark(tmp_path, "SCD-XXL", plots=False)
    if not bf16:
        with pytest.raises(ScdError, match="all cases that contain 'bf16' are in bf16"):
            run.benchmark(tmp_path, "bf16", plots=False)
