"""The evaluation protocol, on recorded Doom and an untrained model."""

import json
import math
import os
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageDraw
from safetensors.torch import load_file, save_file
from torch.nn.functional import adaptive_avg_pool2d

from scd.cli import main
from scd.data.clips import ClipFolder, clip_folder
from scd.data.lists import ClipEntry, write_list
from scd.data.video import VideoFile
from scd.doom.replay import Replay
from scd.errors import ScdError
from scd.evaluation import (
    compare,
    frechet_distance,
    generate,
    measure,
    metric_weights,
    metrics,
    pictures,
    protocol,
)
from scd.evaluation.compare import Candidate, compare_checkpoints, comparison
from scd.evaluation.evaluate import (
    evaluate,
    evaluate_checkpoint,
    measure_folder,
    sweep_combinations,
)
from scd.evaluation.evaluate import measure as measure_saved
from scd.evaluation.frame_metrics import psnr
from scd.evaluation.metric_weights import MetricUnavailable
from scd.evaluation.metrics import (
    EXTRACTORS,
    METRICS,
    AvailableMetrics,
    ClipStatistic,
    FrameMetric,
    SetMetric,
    Setting,
    TrajectoryMetric,
)
from scd.evaluation.pictures import write_grid
from scd.evaluation.protocol import (
    AUTOENCODED,
    AUTOENCODED_SET,
    MODEL,
    OTHER,
    OTHER_KEYS,
    OTHER_KEYS_AUTOENCODED,
    OTHER_KEYS_AUTOENCODED_SET,
    OTHER_KEYS_SET,
    OTHER_SET,
    REAL_SET,
    REPEAT,
    REPEAT_SET,
    play_with_other_keys,
    predict_frames,
    read_evaluation_batch,
    swap_new_actions,
)
from scd.evaluation.report import write_samples
from scd.evaluation.samples import EVALUATIONS, SampleFolder, identity, identity_name, siblings
from scd.evaluation.summary import make_row, missing_notes, rollout_text, tables
from scd.models.autoencoder import PixelCodec, load_codec
from scd.models.load import LoadedModel, build_world_model
from scd.options import RolloutOptions, load_options, options_from_json, options_to_dict
from scd.utils import precision as arithmetic
from scd.utils.processes import error_barrier, processes
from tests.faults.runs import run_processes

ROOT = Path(__file__).parent.parent
SWAPPED = "turn left and turn right swapped, one trajectory"  # of a model with two
FEW = ["eval.videos=1", "eval.trajectories=1", "eval.seeds=[0]", "eval.swapped_actions=[]"]
CPU = torch.device("cpu")
UNSAVED = {"path": None, "sha256": None, "step": None}


pytestmark = pytest.mark.usefixtures("fresh_accelerate", "one_thread")


def make_options(doom_root, output_root):
    return load_options(
        ROOT / "options/scd_doom_tiny.yml",
        [
            f"data.root={doom_root}",
            "data.source=video",
            "autoencoder.path=null",
            "model.patch_size=16",
            "model.heads=1",
            "model.encoder_layers=1",
            "model.decoder_layers=1",
            "rollout.steps=2",
            "eval.context_frames=3",
            "eval.new_frames=4",
            "eval.videos=3",
            "eval.batch_size=2",
            "eval.trajectories=2",
            "eval.seeds=[0,5]",
            "eval.saved_videos=1",
            f"output_root={output_root}",
        ],
    )


def make_model(options):
    torch.manual_seed(0)
    model = build_world_model(options, PixelCodec())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


@pytest.fixture
def options(doom_root, tmp_path):
    return make_options(doom_root, tmp_path)


@pytest.fixture
def model(options):
    return make_model(options)


@pytest.fixture(scope="module")
def whole(doom_root, tmp_path_factory):
    """An evaluation that was never interrupted, without the metrics' weights: folder, result."""
    folder = tmp_path_factory.mktemp("whole")
    options = make_options(doom_root, folder)
    data = clip_folder(options, options.data.val_list, "video")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCD_CACHE", str(folder / "empty"))
        found = evaluate(make_model(options), PixelCodec(), data, options, folder, UNSAVED)
    return folder, found


@pytest.fixture
def checkpoint(options, model, tmp_path):
    path = tmp_path / "ema.safetensors"
    metadata = {"options": json.dumps(options_to_dict(options)), "step": "7"}
    save_file(model.state_dict(), path, metadata)
    return path


@pytest.fixture
def data(options):
    return clip_folder(options, options.data.val_list, "video")


@pytest.fixture
def no_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("SCD_CACHE", str(tmp_path / "empty"))


@pytest.fixture
def registry():
    """The metrics, to be changed; put back afterwards, in their order, which tables follow."""
    before = dict(METRICS)
    yield METRICS
    METRICS.clear()
    METRICS.update(before)


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder but the report, which names versions and the commit."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "metrics.json"
    }


def only_evaluation(output: Path) -> Path:
    (folder,) = (output / "evaluation").iterdir()
    return folder


def rows_of(file: Path) -> dict:
    return json.loads(file.read_text())["rows"]


# --- The protocol


def test_rows_and_missing_metrics(whole):
    _, found = whole
    assert list(found.rows) == [MODEL, SWAPPED, REPEAT, OTHER]
    assert set(found.missing) == {"lpips", "fvd", "kvd", "diversity"}
    assert "scd fetch-weights" in found.missing["lpips"]
    assert "9 frames" in found.missing["fvd"]
    assert all("lpips" not in row and "fvd" not in row for row in found.rows.values())
    assert found.protocol["videos"] == 3
    assert found.protocol["seeds"] == [0, 5]
    assert len(found.rows[MODEL]["psnr_by_frame"]) == 4
    json.dumps(found.as_dict())
    both = tables(found)
    text = both["evaluation"].markdown()
    assert "fvd is missing" in text
    assert text.count("\n| ") == 5  # ruler and four rows below the head
    assert both["evaluation over time"].markdown().count("\n| ") == 5


def test_batch_size_hardly_matters(whole, options, model, data, no_weights, tmp_path):
    """Rounded to 8 bits, a pixel here and there differs by 1/255."""
    options.eval.batch_size = 3
    found = evaluate(model, PixelCodec(), data, options, tmp_path, UNSAVED)
    for name, values in whole[1].rows.items():
        for metric, value in values.items():
            assert np.allclose(value, found.rows[name][metric], rtol=1e-3), (name, metric)


def test_repeat_row_is_the_last_context_frame(whole, options, data):
    clips = read_evaluation_batch(data, [0, 1, 2], options, CPU)["video"]
    expected = psnr(clips[:, 2:3].expand(-1, 4, -1, -1, -1), clips[:, 3:]).mean()
    assert whole[1].rows[REPEAT]["psnr"] == pytest.approx(float(expected), rel=1e-5)


def test_real_frames_through_the_autoencoder(
    options, data, no_weights, tiny_autoencoder_path, tmp_path, monkeypatch
):
    """They are measured beside the model, once for every autoencoder."""
    measured, plain = [], measure._read
    monkeypatch.setattr(measure, "_read", lambda *a: measured.append(a[1]) or plain(*a))
    options.model.patch_size = 1
    options.eval.comparisons = ["repeat", "autoencoder", "other_keys"]

    def evaluated(autoencoder: str, steps: int):
        measured.clear()
        options.autoencoder.path, options.rollout.steps = autoencoder, steps
        codec = load_codec(autoencoder)
        torch.manual_seed(0)
        model = build_world_model(options, codec).eval()
        folder = tmp_path / f"{Path(autoencoder).name}-{steps}" / "evaluation" / "samples"
        return codec, evaluate(model, codec, data, options, folder, UNSAVED)

    codec, found = evaluated(tiny_autoencoder_path, 1)
    real = read_evaluation_batch(data, [0, 1, 2], options, CPU)["video"][:, 3:]
    expected = psnr((codec.decode(codec.encode(real)) * 255).round() / 255, real).mean()
    assert found.rows[AUTOENCODED]["psnr"] == pytest.approx(float(expected), rel=1e-4)
    of_autoencoder = {AUTOENCODED_SET, OTHER_KEYS_AUTOENCODED_SET}
    assert of_autoencoder < set(measured)
    _, again = evaluated(tiny_autoencoder_path, 2)
    assert not of_autoencoder & set(measured)
    for row in (AUTOENCODED, OTHER_KEYS_AUTOENCODED):
        assert again.rows[row] == found.rows[row]
    other = shutil.copytree(tiny_autoencoder_path, tmp_path / "other")
    file = other / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 0.9 for name, tensor in load_file(file).items()}, file)
    _, another = evaluated(str(other), 1)
    for row in (AUTOENCODED, OTHER_KEYS_AUTOENCODED):
        assert another.rows[row] != found.rows[row]
    for row in (REPEAT, OTHER_KEYS):
        assert another.rows[row] == found.rows[row]


def test_videos_to_look_at_are_of_the_last_evaluation(whole, options, tmp_path):
    samples = SampleFolder(whole[0])
    for saved, videos in ((2, ["00000.mp4", "00001.mp4"]), (1, ["00000.mp4"]), (0, [])):
        options.eval.saved_videos = saved
        write_samples(samples, options, tmp_path)
        assert sorted(path.name for path in tmp_path.glob("*.mp4")) == videos
        assert (tmp_path / "grid.png").exists() == bool(videos)


def test_saved_samples_are_found_by_versions_to_come(options, data):
    """An option more in their identity would orphan all samples; add it here if it decides them."""
    options_of_samples = identity("hash", options, data)["options"]
    assert {section: " ".join(sorted(keys)) for section, keys in options_of_samples.items()} == {
        "model": "condition decoder_layers encoder_frame encoder_layers first_frame fusion heads "
        "layers modulate_context modulate_output num_conditions patch_size type",
        "flow": "clean_fraction condition_dropout context_noise encoder_input history_noise "
        "logit_mean logit_std noise_draws own_history prediction prefix_frames sigma_min",
        "rollout": "compile first_frame_steps guidance guidance_interval guidance_noise "
        "guidance_scale precision shift solver spacing steps temperature window window_first",
        "eval": "context_frames new_frames seeds swapped_actions trajectories videos",
        "data": "frame_size frame_stride resize_shorter",
    }


def test_the_name_of_saved_samples_stays_what_it_was(options, tmp_path):
    """It is of contents, not of this machine; another one would orphan all samples."""
    options.eval.videos = 1
    entries = [ClipEntry(f"{name}.mp4", f"{name}.npz") for name in "abc"]
    for entry in entries:
        (tmp_path / entry.video_path).write_bytes(f"video {entry.video_path}".encode())
        (tmp_path / entry.action_path).write_bytes(b"actions")
    write_list(tmp_path / "val.json", entries)
    found = identity("hash", options, ClipFolder(tmp_path, "val.json", "video", "action", 4))
    assert identity_name({**found, "options": {"rollout": {"steps": 2}}}) == "97fc0d11"


def test_swap_changes_only_the_frames_to_come(options):
    actions = torch.tensor([[0, 1, 2, 3, 1, 2, 0, 3, 1, 2]])
    swapped = swap_new_actions(actions, options)
    assert swapped.tolist() == [[0, 1, 2, 3, 2, 1, 0, 3, 2, 1]]


def test_comparisons_are_chosen(whole, options, model, data, no_weights, tmp_path):
    """Left out now, measured later: the folder is the same."""
    for chosen, rows in (
        ([], [MODEL, SWAPPED]),
        (["repeat"], [MODEL, SWAPPED, REPEAT]),
        (["repeat", "autoencoder", "other"], [MODEL, SWAPPED, REPEAT, OTHER]),  # of pixels
    ):
        options.eval.comparisons = chosen
        found = evaluate(model, PixelCodec(), data, options, tmp_path / "samples", UNSAVED)
        assert list(found.rows) == rows
    assert found.rows == whole[1].rows


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scaling_factor", 9.0),
        ("shift_factor", 0.5),
        ("latents_mean", [0.5] * 8),
        ("latents_std", [2.0] * 8),
    ],
)
def test_another_scaling_of_the_latents_is_another_evaluation(
    options, data, tiny_autoencoder_path, tmp_path, key, value
):
    """It is in the config, not in the weights; folders from before it was kept go on."""
    vae = shutil.copytree(tiny_autoencoder_path, tmp_path / "vae")
    options.autoencoder.path = str(vae)
    before = identity("hash", options, data)
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**config, key: value}))
    after = identity("hash", options, data)
    assert before != after and after["scaling"][key] == value
    parts = {MODEL: []}, {}, UNSAVED
    SampleFolder.describe(tmp_path / "new", before, *parts)
    with pytest.raises(ScdError, match="samples of another evaluation; move them away"):
        SampleFolder.describe(tmp_path / "new", after, *parts)
    older = {key: value for key, value in before.items() if key != "scaling"}
    SampleFolder.describe(tmp_path / "older", older, *parts)
    SampleFolder.describe(tmp_path / "older", before, *parts)


@pytest.mark.parametrize("side", [8, 48, 64])
def test_clips_of_widths_that_the_decoder_cannot_read(side, whole, tmp_path):
    samples = SampleFolder(whole[0])
    samples.path, samples.frame_size = tmp_path, side
    clip = torch.randint(256, (samples.frames, 3, side, side)) / 255
    samples.write_clip(REAL_SET, 0, clip)
    assert torch.equal(samples.read_clip(REAL_SET, 0), clip)


@pytest.mark.parametrize(
    ("context_frames", "new_frames", "named"),
    [
        (3, 4, ["given", "+1", "+2", "+3", "+4"]),
        (0, 3, ["+1", "+2", "+3"]),
        (2, 22, ["given", *(f"+{number}" for number in range(2, 23, 2))]),
    ],
)
def test_the_grid_names_its_moments(context_frames, new_frames, named, tmp_path, monkeypatch):
    """From the last frame given to the last one made; two more texts name the rows."""
    texts = []
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda draw, place, text, **how: texts.append(text)
    )
    video = torch.zeros(1, context_frames + new_frames, 3, 8, 8)
    write_grid(tmp_path / "grid.png", video, video, context_frames)
    assert texts == [*named, "generated", "real"]


def test_other_clips_of_the_same_episodes_are_told_of(data, capsys):
    for videos, others, told in ((1, True, ""), (2, False, ""), (2, True, "2 are parts of the")):
        protocol.note_repeats(data, videos, others)
        message = capsys.readouterr().err
        assert told in message and bool(told) == bool(message)


def test_a_metric_that_is_missing_somewhere_is_told_of_there():
    some, few = {"fvd": "clips are short", "lpips": "not here"}, {"lpips": "not here"}
    assert missing_notes([("steps=1", some), ("steps=2", few)]) == [
        "fvd is missing for steps=1: clips are short",
        "lpips is missing: not here",
    ]


def test_another_precision_is_another_measurement(
    options, model, data, no_weights, tmp_path, monkeypatch
):
    """The samples stay, both are kept, and the table says with what it was measured."""
    calls = fake_features(monkeypatch)
    options.eval.new_frames = 6
    heads = []
    for precision in ("fp32", "bf16", "bf16", "fp32"):
        calls.clear()
        options.eval.fvd_precision = precision
        found = evaluate(model, PixelCodec(), data, options, tmp_path / "samples", UNSAVED)
        used = {precision for _, precision in calls}
        heads.append((used, tables(found)["evaluation"].heads[-2:]))
    bf16 = ["FVD ↓ (n=3, bf16)", "KVD ↓ (n=3, bf16)"]
    fp32 = ["FVD ↓ (n=3)", "KVD ↓ (n=3)"]
    assert heads == [({"fp32"}, fp32), ({"bf16"}, bf16), (set(), bf16), (set(), fp32)]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, True),
        ({"fvd_precision": "bf16"}, False),
        ({"videos": 3}, False),
        ({"context_frames": 2}, False),
        ({"new_frames": 3}, False),
    ],
)
def test_measurements_are_taken_from_evaluations_measured_alike(change, found, tmp_path):
    made_of = {"format": 1, "data": "hash", "options": {"data": {"frame_size": 32}}}
    alike = {"videos": 2, "context_frames": 1, "new_frames": 4, "fvd_precision": "fp32"}
    one, other = (tmp_path / name / EVALUATIONS / "samples" for name in ("one", "other"))
    SampleFolder.describe(one, made_of, {MODEL: ["model-seed-0"]}, alike, UNSAVED)
    SampleFolder.describe(other, made_of, {MODEL: ["model-seed-0"]}, {**alike, **change}, UNSAVED)
    assert [folder.path for folder in siblings(SampleFolder(one))] == [other] * found


def test_precision_is_part_of_what_samples_are(monkeypatch, checkpoint, no_weights, options):
    """Of `auto`, what the device has: another device never goes on with these samples."""
    folders = {}
    for has_bf16, wanted in ((True, "auto"), (False, "auto"), (True, "bf16"), (True, "tf32")):
        monkeypatch.setattr(arithmetic, "_cpu_has_bf16", lambda has_bf16=has_bf16: has_bf16)
        evaluate_checkpoint(checkpoint, None, [*FEW, f"rollout.precision={wanted}"])
        found = json.loads((options.output / "metrics.json").read_text())
        folders[has_bf16, wanted] = found["protocol"]["rollout_precision"]
    assert list(folders.values()) == ["bf16", "fp32", "bf16", "fp32"]
    assert len(list((options.output / EVALUATIONS).iterdir())) == 2


def test_changed_actions_are_another_evaluation(
    doom_root, checkpoint, no_weights, options, tmp_path
):
    """Of the same number, in files of the same size."""
    root = tmp_path / "changed"
    shutil.copytree(doom_root, root)
    here = [*FEW, f"data.root={root}"]
    evaluate_checkpoint(checkpoint, None, here)
    for path in (root / "val").glob("*.npz"):
        actions = np.load(path)["actions"]
        np.savez(path, actions=actions)
        size = path.stat().st_size
        evaluate_checkpoint(checkpoint, None, here)  # other bytes, whatever they hold
        np.savez(path, actions=(actions + 1) % 4)
        assert path.stat().st_size == size
    before = len(list((options.output / EVALUATIONS).iterdir()))
    evaluate_checkpoint(checkpoint, None, here)
    assert len(list((options.output / EVALUATIONS).iterdir())) == before + 1


def test_validating_in_bf16_leaves_what_is_trained(model, options, tiny_autoencoder_path):
    codec = load_codec(tiny_autoencoder_path)
    options.rollout.precision = "bf16"
    loaded = LoadedModel(model, codec, options, UNSAVED)
    used = loaded.for_rollouts()
    assert (codec.precision, used.codec.precision) == ("fp32", "bf16")
    assert (loaded.model.dtype, used.model.dtype) == (torch.float32, torch.bfloat16)
    video = torch.rand(1, 2, 3, 64, 64)
    exact, rough = codec.encode(video), used.codec.encode(video)
    assert exact.dtype == rough.dtype == torch.float32
    assert 1e-4 < (rough - exact).norm() / exact.norm() < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.encode(video), exact)  # as in training, under autocast


def test_best_of_trajectories():
    """Mean over frames, best of a video's trajectories, mean over videos."""
    first = torch.tensor([[1.0, 3.0], [10.0, 10.0]])  # two videos, two frames
    second = torch.tensor([[4.0, 4.0], [0.0, 0.0]])
    result = make_row([{"psnr": x, "lpips": x} for x in (first, second)], {})
    assert result["psnr"] == pytest.approx((4 + 10) / 2)
    assert result["lpips"] == pytest.approx((2 + 0) / 2)


def test_the_first_frames_and_each_frame_alone():
    """The first four: best of a video's trajectories; one frame: mean of all trajectories."""
    first = torch.tensor([[1.0, 3, 5, 7, 50, 60], [10, 10, 10, 10, 10, 10]])
    second = torch.tensor([[3.0, 5, 7, 9, 20, 30], [0, 0, 0, 0, 0, 0]])
    row = make_row([{"psnr": first}, {"psnr": second}], {})
    assert row["psnr_first_4"] == pytest.approx((6 + 10) / 2)
    assert row["psnr_by_frame"] == pytest.approx([3.5, 4.5, 5.5, 6.5, 20, 25])


@pytest.mark.parametrize(
    ("frames", "quarters"),
    [(3, [1, 2, 3]), (6, [1.5, 3.5, 5, 6]), (10, [2, 5, 7.5, 9.5])],
)
def test_quarters_are_four_where_frames_are(frames, quarters):
    values = torch.arange(1.0, frames + 1).expand(2, -1)
    row = make_row([{"motion": values}], {"motion": torch.ones(2, frames)})
    assert row["motion_by_quarter"] == pytest.approx(quarters)


@pytest.mark.parametrize(("metric", "worse"), [("psnr", -1.0), ("ssim", -1.0), ("lpips", 1.0)])
def test_a_worse_trajectory_changes_nothing(metric, worse):
    values = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    alone = make_row([{metric: values}], {})
    both = make_row([{metric: values}, {metric: values + worse}], {})
    assert both[metric] == alone[metric] and both[f"{metric}_first_4"] == alone[f"{metric}_first_4"]
    better = make_row([{metric: values}, {metric: values - worse}], {})
    assert better[metric] != alone[metric]


def test_other_clips_are_other_clips(options, data):
    ours = read_evaluation_batch(data, [0, 1], options, CPU)
    again = read_evaluation_batch(data, [1, 0], options, CPU)
    others = read_evaluation_batch(data, [2, 3], options, CPU)
    assert torch.equal(ours["video"], again["video"].flip(0))
    assert not torch.equal(ours["video"], others["video"])


def test_noise_is_of_the_clip_and_the_seed_whatever_the_batch(options, model, data):
    batch = read_evaluation_batch(data, [0, 1], options, CPU)
    alone = {key: values[1:] for key, values in batch.items()}

    def predicted(batch, numbers, seed):
        return predict_frames(model, PixelCodec(), options, batch, numbers, seed)[-1]

    ours = predicted(batch, [0, 1], 0)
    assert (predicted(alone, [1], 0) - ours).abs().max() < 1.5 / 255
    for number, seed in ((0, 0), (1, 5)):
        assert (predicted(alone, [number], seed) - ours).abs().mean() > 0.01


def test_doom_is_played_on_with_other_keys(options, model, data, no_weights, tmp_path, monkeypatch):
    """From where a clip's context ends, with the keys of the new frames of the next clip."""
    options.eval.comparisons = ["other_keys"]
    known, played = options.eval.context_frames, []
    play_on = Replay.play_on

    def watched(replay, episode, frame, actions):
        frames = play_on(replay, episode, frame, actions)
        played.append((episode, frame, actions, frames))
        return frames

    monkeypatch.setattr(Replay, "play_on", watched)
    found = evaluate(model, PixelCodec(), data, options, tmp_path, UNSAVED)
    assert [*found.rows] == [MODEL, SWAPPED, OTHER_KEYS]
    described = {"sharpness", "motion", "sharpness_by_quarter", "motion_by_quarter"}
    assert set(found.rows[OTHER_KEYS]) == described  # no frame has a partner to be compared with
    batch = read_evaluation_batch(data, [0, 1, 2], options, CPU)
    samples = SampleFolder(tmp_path)
    for number, (episode, frame, actions, frames) in enumerate(played):
        assert (np.array(actions) == batch["actions"][(number + 1) % 3, known:].numpy()).all()
        real = VideoFile(episode).frames(np.array([frame]))[0]
        assert torch.equal(
            torch.from_numpy(real).permute(2, 0, 1), batch["video"][number, known - 1] * 255
        )
        clip = samples.read_clip(OTHER_KEYS_SET, number)
        assert torch.equal(clip[:known], batch["video"][number, :known])
        assert (clip[known:] * 255 == torch.from_numpy(frames).permute(0, 3, 1, 2)).all()
    assert len(played) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frame_size": 32}, "data.frame_size=64 data.frame_stride=1"),
        ({"frame_stride": 2}, "data.frame_size=64 data.frame_stride=1"),
        ({"videos": 1}, "eval.videos of 2 or more"),
    ],
)
def test_other_keys_need_clips_as_they_were_recorded(options, data, change, message):
    for name, value in change.items():
        setattr(options.eval if name == "videos" else options.data, name, value)
    with pytest.raises(ScdError, match=message):
        play_with_other_keys(data, options, [0], CPU)


def test_too_few_clips_are_refused_before_anything_is_made(options, model, data, tmp_path):
    options.eval.new_frames = 37  # with 3 given, all 40: one clip a file
    with pytest.raises(ScdError, match="too few"):
        evaluate(model, PixelCodec(), data, options, tmp_path, UNSAVED)
    assert not list(tmp_path.rglob("*.mp4"))


def test_a_prediction_that_is_not_finite_is_reported(
    options, model, data, no_weights, tmp_path, monkeypatch
):
    plain = generate.predict_frames

    def broken(*arguments):
        predicted = plain(*arguments)
        numbers = arguments[4]
        if 1 in numbers:
            predicted[numbers.index(1), -1, 0, 0, 0] = math.nan
        return predicted

    monkeypatch.setattr(generate, "predict_frames", broken)
    with pytest.raises(ScdError, match="model-seed-0: the prediction of video 1 is not finite"):
        evaluate(model, PixelCodec(), data, options, tmp_path, UNSAVED)
    assert [path.name for path in (tmp_path / "model-seed-0").iterdir()] == ["00000.mp4"]


def test_videos_from_nothing(options, model, data, no_weights, tmp_path, monkeypatch):
    """Without context there is nothing to repeat, and no real frame to compare with."""
    seen = []

    def fake(model, settings, context, num_frames, *_, **__):
        seen.append(tuple(context.shape))
        return torch.zeros(len(context), num_frames, *context.shape[2:])

    monkeypatch.setattr(protocol, "continue_videos", fake)
    options.eval.context_frames = 0
    found = evaluate(model, PixelCodec(), data, options, tmp_path, UNSAVED)
    assert set(seen) == {(2, 0, 3, 64, 64), (1, 0, 3, 64, 64)}
    assert list(found.rows) == [MODEL, SWAPPED, OTHER]
    over_time = {"sharpness", "sharpness_by_quarter", "motion", "motion_by_quarter"}
    assert all(values.keys() == over_time for values in found.rows.values())
    assert found.rows[MODEL]["sharpness"] == 0  # black
    compared = {k for k, m in metrics.METRICS.items() if not isinstance(m, metrics.ClipStatistic)}
    assert set(found.missing) == compared


# --- Any metric: one entry


def fake_features(monkeypatch) -> list[tuple[int, str]]:
    """Let the mean color of each quarter of a frame stand for I3D: (frames, precision) of calls."""
    calls = []

    def features(videos, precision):
        calls.append((videos.shape[1], precision))
        return adaptive_avg_pool2d(videos.mean(dim=1), 2).flatten(1)

    def hash_of(weights: str) -> str:
        if weights == "lpips":
            raise MetricUnavailable("not here")
        return weights

    monkeypatch.setitem(EXTRACTORS, "i3d", features)
    monkeypatch.setattr(metrics, "weights_hash", hash_of)
    return calls


@pytest.mark.parametrize("better", ["↓", "↑"])
def test_a_metric_is_one_entry(
    better, options, model, data, no_weights, registry, tmp_path, monkeypatch
):
    """Measured, summarized and shown without a change elsewhere, each kind in its own way."""

    def mse(videos, real):
        return (videos - real).square().mean(dim=(2, 3, 4))

    entries = {
        "mse": FrameMetric(title="MSE", better=better, decimals=4, function=mse, first_frames=True),
        "brightness": ClipStatistic(
            title="brightness", decimals=2, function=lambda videos: videos.mean(dim=(2, 3, 4))
        ),
        "shift": SetMetric(
            title="shift",
            decimals=3,
            features="color",
            function=lambda a, b: float((a.mean(dim=0) - b.mean(dim=0)).norm()),
        ),
        "spread": TrajectoryMetric(title="spread", better="↑", decimals=4, function=mse),
        "large": FrameMetric(title="large", better="↑", decimals=1, smallest=999, function=mse),
    }
    registry.update(entries)
    monkeypatch.setitem(EXTRACTORS, "color", lambda videos, precision: videos.mean(dim=(1, 3, 4)))
    found = evaluate(model, PixelCodec(), data, options, tmp_path, UNSAVED)
    samples = SampleFolder(tmp_path)

    def read(set_):
        return torch.stack([samples.read_clip(set_, number) for number in range(3)])

    real, *made = (read(set_) for set_ in (REAL_SET, "model-seed-0", "model-seed-5"))
    errors = torch.stack([mse(m[:, 3:], real[:, 3:]).mean(dim=1) for m in made])
    best = errors.amin(dim=0) if better == "↓" else errors.amax(dim=0)
    row = found.rows[MODEL]
    assert row["mse"] == pytest.approx(float(best.mean()), rel=1e-5)
    new = torch.stack(made)[:, :, 3:]
    assert row["brightness"] == pytest.approx(float(new.mean() / real[:, 3:].mean()), rel=1e-5)
    last = float(new[:, :, -1].mean() / real[:, -1].mean())
    assert row["brightness_by_quarter"][3] == pytest.approx(last, rel=1e-5)
    shifts = [float((real - m).mean(dim=(0, 1, 3, 4)).norm()) for m in made]
    assert row["shift"] == pytest.approx(np.mean(shifts), rel=1e-4)
    between = mse(made[0][:, 3:], made[1][:, 3:])
    assert row["spread"] == pytest.approx(float(between.mean()), rel=1e-5)
    assert row["spread_by_quarter"] == pytest.approx(between.mean(dim=0).tolist(), rel=1e-5)
    assert all("spread" not in found.rows[name] for name in (SWAPPED, REPEAT, OTHER))
    assert found.missing["large"] == "large needs frames of 999 pixels a side or more"
    first, second = tables(found).values()
    assert {f"MSE {better}", f"MSE +1…+4 {better}", "shift ↓ (n=3)"} < set(first.heads)
    assert {"brightness →1", "spread ↑", "spread by quarter"} < set(second.heads)
    assert "MSE" not in " ".join(second.heads)


def test_trajectories_are_compared_with_the_next_seed(tmp_path, registry, no_weights):
    """Three seeds are two pairs, whatever their number; one seed twice is no pair at all."""
    registry["spread"] = TrajectoryMetric(
        title="spread", better="↑", decimals=3, function=lambda a, b: (a - b).abs().mean((2, 3, 4))
    )
    gray = {"model-seed-0": 0.0, "model-seed-5": 51 / 255, "model-seed-7": 204 / 255}
    identity = {"format": 1, "options": {"data": {"frame_size": 32}}}
    protocol_ = {"videos": 2, "context_frames": 1, "new_frames": 4, "fvd_precision": "fp32"}

    def spread(names):
        folder = tmp_path / str(names)
        row = [f"model-seed-{name}" for name in names]
        SampleFolder.describe(folder, identity, {MODEL: row}, protocol_, UNSAVED)
        for set_ in (REAL_SET, *row):
            for number in range(2):
                clip = torch.full((5, 3, 32, 32), gray.get(set_, 0.5))
                SampleFolder(folder).write_clip(set_, number, clip)
        found = measure_saved(SampleFolder(folder))
        return found.rows[MODEL].get("spread"), found.missing.get("spread")

    assert spread([0, 5]) == (pytest.approx(0.2), None)
    assert spread([0, 5, 7]) == (pytest.approx((0.2 + 0.6) / 2), None)
    needs = "spread needs two different seeds: eval.trajectories=2 or more"
    assert spread([5]) == spread([5, 5]) == (None, needs)


def test_rollouts_in_words():
    few = RolloutOptions(2, "consistency", "even", first_frame_steps=4, guidance="none", window=8)
    assert rollout_text(few) == (
        "2 steps (4 for the first new frame), consistency, spacing even, no guidance, window of 8 "
        "frames, fp32"
    )
    assert rollout_text(RolloutOptions(8)).startswith("8 steps, euler, ")
    assert ", temperature 0.7, " in rollout_text(RolloutOptions(8, temperature=0.7))


def test_sharpness_and_motion_of_known_clips(whole):
    """A repeated frame stands still and is sharp; other real clips are much like the real ones."""
    rows = whole[1].rows
    assert rows[REPEAT]["motion"] == 0 and rows[REPEAT]["motion_by_quarter"] == [0, 0, 0]
    assert len(rows[REPEAT]["sharpness_by_quarter"]) == 4
    for name in (REPEAT, OTHER):
        assert 0.5 < rows[name]["sharpness"] < 2
    assert 0.3 < rows[OTHER]["motion"] < 3


def test_still_real_clips_have_no_ratio():
    """Nothing divides by zero; the table has a dash."""
    row = make_row([{"motion": torch.ones(2, 4)}], {"motion": torch.zeros(2, 4)})
    assert row == {"motion": None, "motion_by_quarter": [None] * 4}
    assert METRICS["motion"].format(None) == "–"


def test_windows_of_the_new_frames(options, model, data, no_weights, tmp_path, monkeypatch):
    """Each is compared with the same frames of the real clips, and measured only on request."""
    calls = fake_features(monkeypatch)
    options.eval.new_frames = 20

    def evaluated(windows):
        calls.clear()
        options.eval.windows = windows
        found = evaluate(model, PixelCodec(), data, options, tmp_path, UNSAVED)
        return found, {frames for frames, _ in calls}

    plain, lengths = evaluated(0)
    assert lengths == {23} and "fvd_by_window" not in plain.rows[MODEL]
    found, lengths = evaluated(2)
    assert lengths == {10}
    samples, features = SampleFolder(tmp_path), EXTRACTORS["i3d"]
    real, model_, seconds = (
        torch.stack([samples.read_clip(set_, number) for number in range(3)])
        for set_ in (REAL_SET, "model-seed-0", "model-seed-5")
    )
    for window, frames in enumerate([slice(3, 13), slice(13, 23)]):
        real_features = features(real[:, frames], "fp32")
        distances = [
            frechet_distance(real_features, features(clips[:, frames], "fp32"))
            for clips in (model_, seconds)
        ]
        by_window = found.rows[MODEL]["fvd_by_window"][window]
        assert by_window == pytest.approx(np.mean(distances), rel=1e-5)
    assert len(found.rows[OTHER]["kvd_by_window"]) == 2
    assert "FVD by window ↓ (n=3)" in tables(found)["evaluation over time"].heads
    assert {k: v for k, v in found.rows[MODEL].items() if k in plain.rows[MODEL]} == (
        plain.rows[MODEL]
    )
    assert evaluated(0) == (plain, set())  # nothing is measured twice
    assert evaluated(2) == (found, set())
    short, lengths = evaluated(3)
    assert not lengths and "fvd_by_window" not in short.rows[MODEL]
    assert short.missing["fvd_by_window"] == (
        "FVD needs windows of 9 frames or more, these have 6: lower eval.windows"
    )
    with pytest.raises(ScdError, match=r"eval\.windows must not be negative"):
        load_options(ROOT / "options/scd_doom_tiny.yml", ["eval.windows=-1"])


def test_windows_are_of_equal_length():
    setting = Setting(videos=2, context_frames=5, new_frames=11, frame_size=8, windows=3)
    assert setting.window_slices() == [slice(5, 8), slice(8, 11), slice(12, 15)]


def test_metrics_are_added_to_old_measurements(
    options, model, data, no_weights, registry, tmp_path, monkeypatch
):
    """Samples measured before a metric was there: only that metric is computed."""
    calls = fake_features(monkeypatch)
    options.eval.new_frames = 6
    new = {name: registry.pop(name) for name in ("kvd", "sharpness", "motion")}
    old = evaluate(model, PixelCodec(), data, options, tmp_path / "a", UNSAVED)
    registry.update(new)
    for path in (tmp_path / "a").rglob("*.safetensors"):  # hashes by weights, used or not
        hashes = json.dumps({"i3d": "i3d", "unused": "abc"}, sort_keys=True)
        save_file(load_file(path), path, {"weights": hashes})
    calls.clear()
    found = evaluate(model, PixelCodec(), data, options, tmp_path / "a", UNSAVED)
    assert not calls
    whole = evaluate(model, PixelCodec(), data, options, tmp_path / "b", UNSAVED)
    assert found.rows == whole.rows
    for name, row in old.rows.items():
        assert row.items() <= found.rows[name].items() and "sharpness" in found.rows[name]
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_features_of_other_weights_are_computed_again(
    options, model, data, no_weights, registry, tmp_path, monkeypatch
):
    """Also those of windows, which were saved under other weights than the whole clips' since."""
    calls = fake_features(monkeypatch)
    del registry["lpips"], registry["diversity"]
    options.eval.new_frames = 20
    lengths = []
    for weights, windows in (("one", 2), ("one", 0), ("other", 0), ("other", 2)):
        calls.clear()
        monkeypatch.setattr(metrics, "weights_hash", lambda name, weights=weights: weights)
        options.eval.windows = windows
        evaluate(model, PixelCodec(), data, options, tmp_path, UNSAVED)
        lengths.append({frames for frames, _ in calls})
    assert lengths == [{23, 10}, set(), {23}, {10}]


# --- Saved samples


def test_samples_are_the_pixels_to_the_bit(whole, options, model, data):
    samples = SampleFolder(whole[0])
    clips = read_evaluation_batch(data, [0, 1, 2, 3, 4, 5], options, CPU)
    for number in range(3):
        assert torch.equal(samples.read_clip("real", number), clips["video"][number])
        assert torch.equal(samples.read_clip("other", number), clips["video"][3 + number])
    numbers = [0, 1]  # the first batch
    batch = {key: value[:2] for key, value in clips.items()}
    predicted = protocol.predict_frames(model, PixelCodec(), options, batch, numbers, 5)
    clips = torch.cat([batch["video"][:, :3], predicted], dim=1)
    for number in numbers:
        assert torch.equal(samples.read_clip("model-seed-5", number), clips[number])


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (128, 128)])
def test_any_pixels_survive_saving(size, tmp_path):
    noise = torch.randint(0, 256, (5, 3, *size), generator=torch.Generator().manual_seed(0))
    protocol_ = {"videos": 1, "context_frames": 2, "new_frames": 3, "fvd_precision": "fp32"}
    identity = {"format": 1, "options": {"data": {"frame_size": 64}}}
    SampleFolder.describe(tmp_path, identity, {}, protocol_, UNSAVED)
    samples = SampleFolder(tmp_path)
    samples.write_clip("real", 0, noise / 255)
    assert torch.equal(samples.read_clip("real", 0), noise / 255)


@pytest.mark.parametrize(
    ("stage", "done", "clips", "measured"),
    [("write_clip", 6 + 1, 7, 0), ("write_measurement", 4, 6 + 9, 4)],
)
def test_killed_and_resumed_equals_uninterrupted(
    stage, done, clips, measured, whole, options, model, data, no_weights, tmp_path, monkeypatch
):
    """Killed in the midst of a batch: 6 real clips and one prediction, or all and 4 metrics."""
    plain, calls = getattr(SampleFolder, stage), []

    def write_or_die(*arguments):
        if len(calls) == done:
            raise KeyboardInterrupt
        calls.append(arguments)
        plain(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SampleFolder, stage, write_or_die)
        evaluate(model, PixelCodec(), data, options, tmp_path, UNSAVED)
    assert len(list(tmp_path.rglob("*.mp4"))) == clips
    assert len(list(tmp_path.rglob("*.safetensors"))) == measured
    found = evaluate(model, PixelCodec(), data, options, tmp_path, UNSAVED)
    assert found.rows == whole[1].rows
    assert contents(tmp_path) == contents(whole[0])


def test_what_an_evaluation_leaves_and_that_nothing_is_done_twice(
    options, checkpoint, data, no_weights, capsys
):
    evaluate_checkpoint(checkpoint)
    first = capsys.readouterr().out
    names = {path.name for path in (options.output / "samples").iterdir()}
    assert names == {"00000.mp4", "grid.png"}
    assert "| model " in (options.output / "metrics.md").read_text()
    report = json.loads((options.output / "metrics.json").read_text())
    assert report["checkpoint"]["step"] == 7
    assert set(report) > {"protocol", "rows", "missing", "weights", "environment"}
    # What people see is what was measured: generated left, real right.
    video = VideoFile(options.output / "samples/00000.mp4")
    assert len(video) == 7
    frame = video.frames(np.array([6]))[0].astype(float)
    real = read_evaluation_batch(data, [0], options, CPU)["video"][0, 6]
    right = frame[2::4, -256:][:, 2::4] / 255
    assert np.abs(right - real.permute(1, 2, 0).numpy()).mean() < 0.03
    # Again: the same table, and not a clip or a measurement is made anew.
    folder = only_evaluation(options.output)
    assert folder.name.startswith("step-00000007-")
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*/**/0*.*")}
    assert len(times) == 5 * 3 + 6 * 3
    evaluate_checkpoint(checkpoint, None, ["eval.batch_size=3"])
    assert capsys.readouterr().out == first
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_samples_of_another_checkpoint_or_option_are_never_mixed(
    options, checkpoint, model, data, no_weights
):
    evaluate_checkpoint(checkpoint, None, FEW)
    before = contents(only_evaluation(options.output))
    folders = [only_evaluation(options.output)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    metadata = {"options": json.dumps(options_to_dict(options)), "step": "7"}
    save_file(model.state_dict(), checkpoint, metadata)
    for more in ([], ["rollout.steps=1"], ["data.val_list=train.json"]):
        evaluate_checkpoint(checkpoint, None, [*FEW, *more])
        (new,) = set((options.output / "evaluation").iterdir()) - set(folders)
        clip = "model-seed-0/00000.mp4"
        assert all((new / clip).read_bytes() != (old / clip).read_bytes() for old in folders)
        folders.append(new)
    assert contents(folders[0]) == before
    with pytest.raises(ScdError, match="samples of another evaluation"):
        evaluate(model, PixelCodec(), data, options, folders[0], UNSAVED)


def test_frames_too_small_for_a_metric(no_weights):
    """They are reported as missing; nothing stops a training for it."""
    missing = AvailableMetrics(Setting(3, 1, 15, frame_size=28)).missing
    assert "31 pixels" in missing["lpips"] and "ssim" not in missing
    missing = AvailableMetrics(Setting(1, 0, 1, frame_size=2)).missing
    assert "11 pixels" in AvailableMetrics(Setting(3, 1, 15, frame_size=8)).missing["ssim"]
    assert missing["motion"] == "motion needs 2 new frames or more"
    assert missing["sharpness"] == "sharpness needs frames of 3 pixels a side or more"


def test_damaged_folders_are_reported(whole, no_weights, tmp_path, capsys):
    assert main(["measure", str(tmp_path / "nothing")]) == 1
    assert "manifest.json is missing" in capsys.readouterr().err
    folder = Path(shutil.copytree(whole[0], tmp_path / "samples"))
    clip = folder / "swapped/00002.mp4"
    clip.write_bytes(clip.read_bytes()[:200])
    capsys.readouterr()
    assert main(["measure", str(folder)]) == 1
    assert "swapped/00002.mp4" in capsys.readouterr().err.splitlines()[-1]


# --- Many evaluations, many processes


def test_sweep(options, checkpoint, no_weights, capsys):
    sweeps = ["--sweep", "rollout.steps=1,2", "--sweep", "eval.context_frames=1,2"]
    assert main(["evaluate", str(checkpoint), *sweeps, *FEW]) == 0
    shown = capsys.readouterr().out.splitlines()
    lines = [line for line in shown if line.startswith("| ")]
    over_time, lines = lines[6:], lines[:6]
    assert "PSNR" in lines[0] and "motion by quarter" in over_time[0] and len(over_time) == 6
    assert "rollout.steps" in lines[0] and "eval.context_frames" in lines[0]
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in lines[2:]]
    assert cells == [["1", "1"], ["1", "2"], ["2", "1"], ["2", "2"]]
    assert (options.output / "sweep.md").read_text().startswith("\n".join(lines))
    entries = json.loads((options.output / "sweep.json").read_text())["sweep"]
    assert [entry["protocol"]["context_frames"] for entry in entries] == [1, 2, 1, 2]
    assert len({entry["rows"][MODEL]["psnr"] for entry in entries}) == 4
    for entry in entries:
        assert rows_of(Path(entry["samples"]) / "metrics.json") == entry["rows"]
    # A mistake in the last value is told before the first evaluation.
    assert main(["evaluate", str(checkpoint), "--sweep", "rollout.guidance=none,non"]) == 1
    assert "did you mean 'none'" in capsys.readouterr().err


def test_what_no_model_made_is_measured_once(checkpoint, no_weights, monkeypatch, capsys):
    """Real clips and repeated frames are the same under other settings of the rollout, and for
    another experiment beside this one."""
    measured = []
    plain = measure._read

    def watched(samples, set_, numbers):
        measured.append(set_)
        return plain(samples, set_, numbers)

    monkeypatch.setattr(measure, "_read", watched)
    command = ["evaluate", str(checkpoint), *FEW, "eval.context_frames=2"]
    assert main([*command, "rollout.steps=1"]) == 0
    first = set(measured)
    assert {REAL_SET, REPEAT_SET} <= first
    for change in ("rollout.steps=2", "name=another"):
        measured.clear()
        assert main([*command, change]) == 0
        assert measured and not set(measured) & {REAL_SET, OTHER_SET, REPEAT_SET}


def test_sweep_texts():
    assert sweep_combinations([]) == [{}]
    assert sweep_combinations(["a=1,x", "b=[0, 1],[2]"]) == [
        {"a": "1", "b": "[0, 1]"},
        {"a": "1", "b": "[2]"},
        {"a": "x", "b": "[0, 1]"},
        {"a": "x", "b": "[2]"},
    ]
    for wrong in (["a"], ["a="], ["=1"], ["a=[1"], ["a=1", "a=2"]):
        with pytest.raises(ScdError, match="expected key=value"):
            sweep_combinations(wrong)


def evaluate_and_fail(folder: str, *arguments: str) -> None:
    """As one of several processes; then process 1 fails, of which the others shall hear."""
    os.environ["SCD_CACHE"] = f"{folder}/empty"  # no weights here either
    status = main(["evaluate", *arguments])
    try:
        with error_barrier():
            if processes().process_index == 1:
                raise ScdError("no space left")
    except ScdError as error:
        told = Path(folder) / f"told-{processes().process_index}"
        told.write_text(f"{status} of {processes().num_processes}: {error}")


def test_two_processes_give_the_numbers_of_one(options, checkpoint, no_weights, tmp_path):
    arguments = [str(tmp_path), str(checkpoint), f"output_root={tmp_path / 'two'}"]
    printed = run_processes(2, evaluate_and_fail, arguments)
    assert "".join(printed).count("| model ") == 2  # once each of two tables
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        evaluate_checkpoint(checkpoint)
    finally:
        torch.set_num_threads(threads)
    one, two = only_evaluation(options.output), only_evaluation(tmp_path / "two" / options.name)
    assert one.name == two.name
    assert contents(one) == contents(two)
    assert rows_of(one / "metrics.json") == rows_of(two / "metrics.json")
    # A process that fails does not leave the other waiting.
    assert (tmp_path / "told-1").read_text() == "0 of 2: no space left"
    assert (tmp_path / "told-0").read_text() == "0 of 2: process 1 failed: no space left"


# --- Trackers


def test_the_table_goes_to_the_trackers(options, checkpoint, no_weights, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    with pytest.raises(ScdError, match=r"train\.trackers is empty"):
        evaluate_checkpoint(checkpoint, track=True)
    for key in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(key, str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    both = "train.trackers=[tensorboard, wandb]"
    evaluate_checkpoint(checkpoint, None, [*FEW, both], track=True)
    (events,) = (options.output / "trackers").rglob("events.out.tfevents*")
    assert b"| model " in events.read_bytes() and b"evaluation/model/psnr" in events.read_bytes()
    assert list(tmp_path.rglob("offline-run-*"))
    wandb.teardown()  # it would write the runs of later tests here


def test_the_script_that_samples_videos(checkpoint, tmp_path, monkeypatch, capsys):
    script = runpy.run_path(str(ROOT / "inference/run_decoupled_16_videos.py"))
    arguments = ["--checkpoint", str(checkpoint), "--num-videos", "2"]
    monkeypatch.setattr("sys.argv", ["script", *arguments, "--opt", "nowhere.yml"])
    assert script["main"]() == 1 and "nowhere.yml: no such options" in capsys.readouterr().err
    arguments += ["--output"]
    monkeypatch.setattr("sys.argv", ["script", *arguments, str(tmp_path / "videos")])
    assert script["main"]() == 0
    found = sorted(path.name for path in (tmp_path / "videos").iterdir())
    assert found == ["00000.mp4", "00001.mp4", "grid.mp4", "grid.png"]
    assert "note: " not in capsys.readouterr().err
    monkeypatch.setattr(pictures, "predict_frames", lambda *a: predict_frames(*a) / 0)
    assert script["main"]() == 1
    assert "the prediction of video 0, 1 is not finite" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("sys.argv", ["script", *arguments, str(tmp_path / "videos")])
    for wrong, message in (("~nobodyx/videos", "no home folder"), ("", "an empty path")):
        monkeypatch.setattr("sys.argv", ["script", *arguments, wrong])
        with pytest.raises(SystemExit):
            script["main"]()
        assert message in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["script", *arguments, str(tmp_path / "file/videos")])
    assert script["main"]() == 1
    told = capsys.readouterr().err
    assert told.strip().splitlines()[-1].startswith("error: ")
    assert "sample:" not in told  # nothing was generated


# --- All metrics


def test_all_metrics_and_their_recomputation(options, checkpoint, tmp_path, capsys):
    if not (
        metric_weights.weights_path("i3d").exists()
        and metric_weights.weights_path("lpips").exists()
    ):
        pytest.skip("the metrics' weights are not in the cache: scd fetch-weights")
    evaluate_checkpoint(checkpoint, None, [*FEW, "eval.videos=2", "eval.new_frames=6"])
    report = json.loads((options.output / "metrics.json").read_text())
    assert set(report["missing"]) == {"diversity"}  # of one seed
    assert set(report["weights"]) == {"lpips", "i3d"}
    rows = report["rows"]
    for name in (MODEL, REPEAT, OTHER):
        assert np.isfinite(rows[name]["fvd"])
    # An untrained model is worse than repetition, and that worse than real clips.
    assert rows[MODEL]["fvd"] > rows[REPEAT]["fvd"]
    assert rows[MODEL]["lpips"] > rows[REPEAT]["lpips"]
    text = (options.output / "metrics.md").read_text()
    other = next(line for line in text.splitlines() if line.startswith(f"| {OTHER} "))
    assert other.split("|")[2].strip() == "–"  # other clips have no frame metrics
    assert "FVD ↓ (n=2)" in text and "KVD ↓ (n=2)" in text and "sharpness →1" in text
    # Without the model and the data, the saved samples alone give the same numbers to the bit.
    folder = only_evaluation(options.output).rename(tmp_path / "elsewhere")
    checkpoint.unlink()
    before = contents(folder)
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(b"")
    measure_folder(folder)
    assert rows_of(folder / "metrics.json") == rows
    assert contents(folder) == before


def test_models_in_one_table(options, doom_root, tmp_path, monkeypatch, capsys):
    """SCD beside the dense baseline; what was not evaluated, or otherwise, is refused."""
    monkeypatch.setenv("SCD_CACHE", str(tmp_path / "empty"))
    dense = ["name=dense", "model.type=causal_dit", "model.encoder_layers=0", "model.layers=2"]
    dense += ["model.decoder_layers=0", "model.fusion=token_concat"]
    paths = []
    framed = ["name=framed", "data.resize_shorter=64"]
    for overrides in ([], dense, ["name=fewer", "eval.videos=2"], framed):
        made = options_from_json(json.dumps(options_to_dict(options)), "made", overrides)
        path = tmp_path / f"{made.name}.safetensors"
        metadata = {"options": json.dumps(options_to_dict(made)), "step": "7"}
        save_file(make_model(made).state_dict(), path, metadata)
        paths.append(path)
    with pytest.raises(
        ScdError, match=r"not evaluated with these options yet; first run ./scripts/inference.sh"
    ):
        compare_checkpoints(paths[:2], tmp_path)
    for path in paths:
        evaluate_checkpoint(path)
    with pytest.raises(ScdError, match="evaluated with different videos: 2, 3"):
        compare_checkpoints(paths[:3], tmp_path)
    with pytest.raises(ScdError, match=r"different data\.resize_shorter: 64, None"):
        compare_checkpoints([paths[0], paths[3]], tmp_path)
    compare_checkpoints(paths[:2], tmp_path)
    table = (tmp_path / "compare.md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert "\nFrames: " in table
    assert "fvd is missing: " in table
    with pytest.raises(ScdError, match="not evaluated with these options yet"):
        compare_checkpoints(paths[:2], tmp_path, ["eval.fvd_precision=bf16"])
    twice = [paths[0], shutil.copy(paths[0], tmp_path / "copy.safetensors")]
    compare_checkpoints(twice, tmp_path / "twice")
    assert "| scd_doom_tiny, step 7 |" in (tmp_path / "twice/compare.md").read_text()
    assert "causal_dit 64 wide, 2 layers" in table and "scd 64 wide, 1+1 layers" in table
    for path in tmp_path.rglob("metrics.json"):
        path.write_text(path.read_text().replace('"fvd_precision"', '"renamed"'))
    with pytest.raises(ScdError, match="another version"):
        compare_checkpoints(paths[:2], tmp_path)
    again = [str(path) for path in paths[:2]] + ["rollout.steps=3"]
    assert main(["compare", *again, "--out", str(tmp_path)]) == 1
    assert ".safetensors rollout.steps=3" in capsys.readouterr().err
    models = json.loads((tmp_path / "compare.json").read_text())["models"]
    assert [len(model["seconds_per_frame"]) for model in models] == [9, 9]
    for model, path in zip(models, paths[:2], strict=True):
        assert model["evaluation"]["checkpoint"]["path"] == str(path)
        assert f"{model['evaluation']['rows']['model']['psnr']:.2f}" in table


def test_models_that_were_evaluated_otherwise_are_refused(tmp_path, monkeypatch):
    keys = ("videos", "context_frames", "new_frames", "seeds", "data_hash", "fvd_precision")
    for key in keys:
        protocols = {name: {**dict.fromkeys(keys, 1), key: name} for name in ("one", "two")}

        def candidate(path, overrides, protocols=protocols):
            return Candidate(None, {"protocol": protocols[path.name]}, [])

        monkeypatch.setattr(compare, "_candidate", candidate)
        with pytest.raises(ScdError, match=f"evaluated with different {key}: one, two"):
            compare_checkpoints([Path("one"), Path("two")], tmp_path)


def test_the_median_time_counts_and_the_fastest_is_the_measure(options, model):
    protocol_ = {"videos": 3, "context_frames": 3, "new_frames": 4, "fvd_precision": "fp32"}
    evaluation = {"protocol": protocol_, "rows": {MODEL: {}}}
    candidates = [
        Candidate(
            LoadedModel(model, PixelCodec(), replace(options, name=name), UNSAVED),
            evaluation,
            seconds,
        )
        for name, seconds in (("slow", [1.0, 1.0, 9.0]), ("fast", [4.5, 0.5, 0.5]))
    ]
    table = comparison(candidates)
    assert table.heads[3:5] == ["s/frame ↓", "ratio"]
    assert [line[3:5] for line in table.lines] == [["1.000", "2.00"], ["0.500", "1.00"]]
