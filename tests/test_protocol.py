"""The evaluation protocol, on recorded Doom and an untrained model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from scd.data.clips import clip_folder
from scd.data.video import VideoFile
from scd.errors import ScdError
from scd.evaluation import protocol, weights
from scd.evaluation.frame_metrics import psnr
from scd.evaluation.protocol import (
    MODEL,
    OTHER,
    REPEAT,
    Row,
    evaluate,
    read_evaluation_batch,
    swap_new_actions,
    table,
)
from scd.models.autoencoder import PixelCodec
from scd.models.build import build_world_model
from scd.options import load_options

ROOT = Path(__file__).parent.parent
SWAPPED = "turn left and turn right swapped"


@pytest.fixture(scope="module")
def options(doom_root, tmp_path_factory):
    return load_options(
        ROOT / "options/scd_doom_tiny.yml",
        [
            f"data.root={doom_root}",
            "data.source=video",
            "autoencoder.path=null",
            "model.patch_size=16",
            "model.heads=1",
            "rollout.steps=2",
            "eval.context_frames=4",
            "eval.new_frames=6",
            "eval.videos=3",
            "eval.batch_size=2",
            "eval.trajectories=2",
            "eval.seeds=[0,5]",
            f"output_root={tmp_path_factory.mktemp('out')}",
        ],
    )


@pytest.fixture(scope="module")
def model(options):
    torch.manual_seed(0)
    model = build_world_model(options, PixelCodec())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture
def data(options):
    return clip_folder(options, options.data.val_list, "video")


@pytest.fixture
def no_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("SCD_CACHE", str(tmp_path / "empty"))


def test_rows_files_and_missing_metrics(options, model, data, no_weights, tmp_path):
    found = evaluate(model, PixelCodec(), data, options, tmp_path)
    assert list(found.rows) == [MODEL, SWAPPED, REPEAT, OTHER]
    assert set(found.missing) == {"lpips", "fvd"}
    assert "scd fetch-weights" in found.missing["fvd"]
    assert all("lpips" not in row and "fvd" not in row for row in found.rows.values())
    assert found.protocol["videos"] == 3
    assert found.protocol["seeds"] == [0, 5]
    assert len(found.rows[MODEL]["psnr_by_frame"]) == 6
    names = {path.name for path in tmp_path.glob("*")}
    assert {"00000.mp4", "00001.mp4", "00002.mp4", "grid.png"} <= names
    json.dumps(found.as_dict())
    text = table(found)
    assert "fvd is missing" in text
    assert text.count("\n| ") == 5  # ruler and four rows below the head
    # What is written is what was measured: generated left, real right.
    video = VideoFile(tmp_path / "00000.mp4")
    assert len(video) == 10
    frame = video.frames(np.array([9]))[0].astype(float)
    real = read_evaluation_batch(data, [0], options, torch.device("cpu"))["video"][0, 9]
    right = frame[2::4, -256:][:, 2::4] / 255
    assert np.abs(right - real.permute(1, 2, 0).numpy()).mean() < 0.03


def test_batch_size_does_not_matter(options, model, data, no_weights, tmp_path, monkeypatch):
    results = []
    for size in (1, 3):
        monkeypatch.setattr(options.eval, "batch_size", size)
        results.append(evaluate(model, PixelCodec(), data, options, tmp_path).rows)
    for name in results[0]:
        for metric, value in results[0][name].items():
            assert np.allclose(value, results[1][name][metric], rtol=1e-3), (name, metric)


def test_repeat_row_is_the_last_context_frame(options, model, data, no_weights, tmp_path):
    found = evaluate(model, PixelCodec(), data, options, tmp_path)
    clips = read_evaluation_batch(data, [0, 1, 2], options, torch.device("cpu"))["video"]
    expected = psnr(clips[:, 3:4].expand(-1, 6, -1, -1, -1), clips[:, 4:]).mean()
    assert found.rows[REPEAT]["psnr"] == pytest.approx(float(expected), rel=1e-5)


def test_swap_changes_only_the_frames_to_come(options):
    actions = torch.tensor([[0, 1, 2, 3, 1, 2, 0, 3, 1, 2]])
    swapped = swap_new_actions(actions, options)
    assert swapped.tolist() == [[0, 1, 2, 3, 2, 1, 0, 3, 2, 1]]


def test_best_of_trajectories():
    """Mean over frames, best of a video's trajectories, mean over videos."""
    row = Row(2)
    first = torch.tensor([[1.0, 3.0], [10.0, 10.0]])  # two videos, two frames
    second = torch.tensor([[4.0, 4.0], [0.0, 0.0]])
    row.add(0, {"psnr": first, "lpips": first}, None)
    row.add(1, {"psnr": second, "lpips": second}, None)
    result = row.result(None)
    assert result["psnr"] == pytest.approx((4 + 10) / 2)
    assert result["lpips"] == pytest.approx((2 + 0) / 2)


def test_other_clips_are_other_clips(options, data):
    device = torch.device("cpu")
    ours = read_evaluation_batch(data, [0, 1], options, device)
    again = read_evaluation_batch(data, [1, 0], options, device)
    others = read_evaluation_batch(data, [2, 3], options, device)
    assert torch.equal(ours["video"], again["video"].flip(0))
    assert not torch.equal(ours["video"], others["video"])


def test_too_few_clips_are_refused(options, data, monkeypatch):
    monkeypatch.setattr(options.eval, "new_frames", 36)  # with 4 given, all 40: one clip a file
    with pytest.raises(ScdError, match="too few"):
        read_evaluation_batch(data, [len(data)], options, torch.device("cpu"))


def test_all_metrics_with_real_weights(options, model, data, tmp_path):
    if not (weights.weights_path("i3d").exists() and weights.weights_path("lpips").exists()):
        pytest.skip("the metrics' weights are not in the cache: scd fetch-weights")
    found = evaluate(model, PixelCodec(), data, options, tmp_path)
    assert not found.missing
    assert set(found.weights) == {"lpips", "i3d"}
    for name in (MODEL, SWAPPED, REPEAT, OTHER):
        assert np.isfinite(found.rows[name]["fvd"])
    # An untrained model is worse than repetition, and that worse than real clips.
    assert found.rows[MODEL]["fvd"] > found.rows[REPEAT]["fvd"]
    assert found.rows[MODEL]["lpips"] > found.rows[REPEAT]["lpips"]
    assert protocol.table(found).count("–") == 5  # other clips have no frame metrics
