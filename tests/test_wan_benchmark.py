"""The benchmark of Wans: what it counts and what it times; tiny cases, whose times mean nothing."""

import statistics
from dataclasses import asdict, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scd.benchmark import cases, runner, wan
from scd.benchmark.cases import ON_REQUEST, WAN_MODELS, WanCase, WanStreamCase
from scd.benchmark.wan import (
    empty_model,
    filled_at_random,
    flops_of_frame,
    run_wan_stream,
    sharing_models,
    steady_rollout,
    wan_tables,
)
from scd.errors import ScdError
from scd.wan import CausalWan, SCDWan

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SMALL = {"heads": 2, "head_dim": 12, "ffn_dim": 96, "text_dim": 32, "text_length": 8}
SMALL |= {"layers": 6, "encoder_layers": 4, "decoder_first": 1, "decoder_last": 2}
TINY = WanCase(
    name="wan, tiny",
    models=WAN_MODELS,
    height=32,
    width=64,
    past=3,
    steps=[2, 1],
    frames=2,
    **SMALL,
)
STREAM = WanStreamCase(**{**asdict(TINY), "models": WAN_MODELS[1:2]}, vae={"base_dim": 2}, starts=2)


@pytest.mark.parametrize("name", WAN_MODELS)
def test_the_operations_of_a_steady_frame(name):
    """Against torch's own counter; the window's attention differs by a frame in some passes."""
    model = sharing_models(replace(TINY, models=[name]), "fp32", CPU)[name]
    counted = flops_of_frame(TINY, name)
    for steps in TINY.steps:
        rollout = steady_rollout(TINY, model, steps, "fp32")
        held = rollout.cache.frames
        rollout.step()
        with FlopCounterMode(display=False) as counter:
            assert torch.isfinite(rollout.step()).all()
        assert rollout.cache.frames == held + 2 > rollout.window.frames
        assert counter.get_total_flops() == pytest.approx(counted[steps], rel=0.02)


def test_models_share_weights_of_wans_own_places():
    models = sharing_models(TINY, "bf16", CPU)
    dense, one, other = (models[name] for name in WAN_MODELS[:3])
    assert isinstance(dense, CausalWan) and isinstance(one, SCDWan)
    places = {tensor.data_ptr() for tensor in dense.state_dict().values()}
    own = {name for name, t in other.state_dict().items() if t.data_ptr() not in places}
    assert own == {"decoder.fuse.weight", "decoder.fuse.bias"}
    assert one.decoder.blocks[2].ffn.net[2].weight.data_ptr() == (
        dense.blocks[5].ffn.net[2].weight.data_ptr()
    )
    assert dense.dtype == torch.bfloat16 == one.dtype
    assert one.decoder.scale_shift_table.dtype == torch.float32  # as diffusers keeps it


def test_random_weights_keep_activations():
    model = filled_at_random(empty_model(TINY, "dense", "fp32"), CPU)
    out = model.velocity(
        torch.randn(1, 2, 16, 4, 8),
        torch.randn(1, 2, 16, 4, 8),
        torch.full((1, 2), 500.0),
        text=torch.randn(1, 8, 32),
    )
    assert 0.1 < out.std() < 10


def test_wans_by_the_command(tmp_path, monkeypatch, capsys):
    """In turn, as a table and JSON; streams need a GPU; without --only there are no Wans."""
    monkeypatch.setattr(cases, "ON_REQUEST", [TINY, replace(STREAM, name="wan stream, tiny")])
    monkeypatch.setattr(
        runner,
        "_in_own_process",
        lambda case, folder: runner.run_case(type(case).__name__, asdict(case), str(folder)),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    timed, frame_seconds = [], wan.frame_seconds
    monkeypatch.setattr(
        wan,
        "frame_seconds",
        lambda rollout, *a: timed.append(rollout) or frame_seconds(rollout, *a),
    )
    runner.benchmark(tmp_path, "wan", plots=False)
    turn = len(WAN_MODELS) * len(TINY.steps)
    assert len(set(map(id, timed[-turn:]))) == turn and timed[-turn:] == timed[-2 * turn : -turn]
    printed = capsys.readouterr().out
    assert "skipped, since this machine has no GPU: wan stream, tiny" in printed
    table = (tmp_path / "benchmark.md").read_text()
    assert table.count("\n| dense") == 2 and table.count("\n| noise, middle") == 2
    with pytest.raises(
        ScdError, match="none of these cases can run, since this machine has no GPU"
    ):
        runner.benchmark(tmp_path, "wan stream", plots=False)
    assert not any("wan" in case.name for case in cases.TABLE)


def test_the_table_divides_dense_by_separable():
    rows = [
        {"model": name, "steps": 4, "parameters": 10**9, "flops": flops} | {
            "once_seconds": [0.1] * 3, "frame_seconds": times
        }
        for name, flops, times in (
            ("dense", 3 * 10**12, [9.0, 4.0, 5.0]), ("shift, middle", 10**12, [2.0, 2.5, 8.0])
        )
    ]  # fmt: skip
    machine = {"plain_flops": 5e11, "best_flops": 1e12, "bytes": 1e10}
    result = {"precision": "bf16", "rows": rows, "peak_bytes": 7 * 10**9, "machine": machine}
    (table,) = wan_tables([(TINY, result)])
    cells = ["shift, middle (1.00 B)", "4", "2.500", "8.000", "0.100", "1", "1.000", "2.50"]
    assert table.lines[1] == [*cells, "2.00", "3.00"]
    assert table.lines[0][-2:] == ["1.00", "1.00"]


def test_streams_of_pictures(monkeypatch):
    stream, taken = wan.SCDWanPipeline.stream, []

    def count(*arguments, **given):
        taken.append(0)
        for pictures in stream(*arguments, **given):
            taken[-1] += 1
            yield pictures

    monkeypatch.setattr(wan.SCDWanPipeline, "stream", count)
    result = run_wan_stream(STREAM, CPU)
    # Streams of a first picture, one as warmup; then one whose window is full when it is timed.
    full = STREAM.past + 1
    assert taken == ([1] * (STREAM.starts + 1) + [full + STREAM.frames + 1]) * len(STREAM.steps)
    assert result["pictures"] == 4 and len(result["decode_seconds"]) == STREAM.frames
    for steps, row in zip(STREAM.steps, result["rows"], strict=True):
        assert (
            row["steps"] == steps
            and row["flops"] == flops_of_frame(STREAM, "shift, token_concat")[steps]
        )
        assert len(row["first_seconds"]) == 2 and len(row["frame_seconds"]) == 2
        assert min(row["first_seconds"] + row["frame_seconds"]) > 0 < row["peak_bytes"]
    (table,) = wan_tables([(STREAM, result)])
    frame = statistics.median(result["rows"][0]["frame_seconds"])
    assert table.lines[0][6] == f"{4 / frame:.1f}"


def test_the_real_cases_are_of_wans_size():
    """By arithmetic: 1.42 and 1.68 billion parameters, and the work of the paper's comparison."""
    counts = {}
    for name in WAN_MODELS[:3]:
        model = empty_model(ON_REQUEST[0], name, "bf16")
        counts[name] = sum(p.numel() for p in model.parameters()) / 1e9
    assert counts["dense"] == pytest.approx(1.42, abs=0.005)
    assert counts["shift, token_concat"] == pytest.approx(1.68, abs=0.005)
    assert {case.models[0] for case in ON_REQUEST[1:]} == set(WAN_MODELS)
    assert all((case.width, case.height) == (832, 480) for case in ON_REQUEST[1:])
