"""What one watches of a training: held-out losses, speed, traces of steps, TensorBoard, wandb."""

import gzip
import json
import shutil
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image

from scd.data.lists import read_list, write_list
from scd.errors import ScdError
from scd.flow.objective import LEVELS
from scd.models.autoencoder import PixelCodec, load_codec
from scd.models.load import build_world_model, load_checkpoint_for_use
from scd.options import Options, load_options
from scd.training import launch, performance, world_model_task
from scd.training.encode import encode_dataset
from scd.training.launch import make_accelerator
from scd.training.performance import ThroughputMeter, peak_flops
from scd.training.run_log import draw_loss_curve, read_log
from scd.training.step_cost import ClipCost, clip_cost, estimate_step
from scd.training.world_model_task import HeldOutLoss
from scd.utils import tracking
from tests.test_training import assert_same_state, train

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
DENSE = [
    *("model.type=causal_dit", "model.layers=4"),
    *("model.encoder_layers=0", "model.decoder_layers=0"),
]
NAMES = ["loss", *(f"loss_at_{level:g}" for level in LEVELS)]

pytestmark = pytest.mark.usefixtures("fresh_accelerate", "one_thread")


@pytest.fixture
def options(doom_root, tmp_path):
    def make(*overrides: str) -> Options:
        small = [
            *(f"data.root={doom_root}", f"output_root={tmp_path}", "name=watched"),
            *("data.source=video", "data.frames=4", "autoencoder.path=null"),
            *("model.patch_size=16", "model.heads=1"),
            *("model.encoder_layers=1", "model.decoder_layers=1"),
            *("train.steps=6", "train.batch_size=2", "train.save_every=2", "train.log_every=1"),
            *("train.workers=0", "train.mixed_precision=fp32"),
            *("eval.context_frames=4", "eval.new_frames=2", "eval.videos=2"),
        ]
        return load_options(ROOT / "options/scd_doom_tiny.yml", [*small, *overrides])

    return make


# --- Loss on held-out clips


def held_out_of(options: Options) -> HeldOutLoss:
    task = launch.build_task(options, make_accelerator(options))
    assert task.held_out is not None
    return task.held_out


def test_the_held_out_loss_is_always_of_the_same_clips_and_noise(options, monkeypatch):
    o = options("train.val_loss_every=2")
    model = build_world_model(o, PixelCodec()).eval()
    loss = held_out_of(o)
    found = loss(model, "fp32")
    assert list(found) == NAMES
    assert found["loss"] == pytest.approx(np.mean([found[name] for name in NAMES[1:]]))
    assert loss(model, "fp32") == held_out_of(o)(model, "fp32") == found
    assert held_out_of(options("train.val_loss_every=2", "seed=1"))(model, "fp32") != found
    # Each of the clips counts, and each as much.
    alone = []
    for number in range(2):
        monkeypatch.setattr(
            world_model_task, "split_between_processes", lambda _, number=number: [number]
        )
        alone.append(held_out_of(o)(model, "fp32"))
    assert alone[0] != alone[1]
    for name in NAMES:
        assert found[name] == pytest.approx((alone[0][name] + alone[1][name]) / 2, rel=1e-12)


def test_each_held_out_clip_has_its_own_start_and_noise(options, doom_root, tmp_path):
    """Also where two are of the same video."""
    own = shutil.copytree(doom_root, tmp_path / "doom")
    write_list(own / "val.json", 2 * read_list(own / "val.json")[:1])
    o = options(f"data.root={own}", "train.val_loss_every=1")
    model, loss = build_world_model(o, PixelCodec()).eval(), held_out_of(o)
    first, second = loss.clips
    assert not torch.equal(first["latents"], second["latents"])
    assert loss._errors(model, 0, first, "fp32") != loss._errors(model, 1, first, "fp32")


def test_the_held_out_loss_falls_where_a_model_is_better(options):
    """An untrained output is 0: the loss is the mean square of ε − x. One that knows ε beats it."""
    o = options("train.val_loss_every=2", "flow.prediction=velocity")
    model = build_world_model(o, PixelCodec()).eval()
    plain = held_out_of(o)(model, "fp32")
    assert len({plain[name] for name in NAMES[1:]}) == 1  # the same noise at all levels
    # At σ = 1 the noisy frame is ε.
    model.decode = lambda noisy, *_: noisy
    assert held_out_of(o)(model, "fp32")["loss_at_1"] < plain["loss_at_1"]


def test_training_on_latents_is_watched_on_videos(
    options, doom_root, tiny_autoencoder_path, tmp_path
):
    own = shutil.copytree(doom_root, tmp_path / "doom")
    common = [f"data.root={own}", f"autoencoder.path={tiny_autoencoder_path}"]
    common += ["model.patch_size=2", "train.val_loss_every=1"]
    encode_dataset(options(*common))
    on_video, on_latents = options(*common), options(*common, "data.source=latents")
    model = build_world_model(on_video, load_codec(tiny_autoencoder_path)).eval()
    found = [held_out_of(o)(model, "fp32") for o in (on_video, on_latents)]
    assert found[0] == found[1]


def test_held_out_clips_that_are_too_short_are_reported_at_once(options, doom_root, tmp_path):
    own = shutil.copytree(doom_root, tmp_path / "doom")
    entries = read_list(own / "val.json")
    write_list(own / "train.json", entries[:1])
    with pytest.raises(ScdError, match=r"40 frames, but the clip needs 41"):
        held_out_of(options(f"data.root={own}", "data.frames=41", "train.val_loss_every=1"))


def test_watching_changes_nothing_and_a_restart_tells_the_same(options):
    """To the bit: weights with and without, and the log of a run that was killed."""
    plain = train(options("name=plain"))
    watched = train(options("name=watched", "train.val_loss_every=2", "train.profile_steps=[2,3]"))
    assert_same_state(plain, watched)
    for stop_after in (3, 5):  # killed before step 6: goes on from step 4
        train(options("name=killed", "train.val_loss_every=2"), stop_after=stop_after)
    log = watched.parent.parent / "killed/log.jsonl"
    # As if the second kill had come between the checkpoint of step 4 and its validation.
    lines = [text for text in log.read_text().splitlines() if '"step": 4, "val_loss"' not in text]
    log.write_text("\n".join(lines) + "\n")
    train(options("name=killed", "train.val_loss_every=2"))
    entries = [
        [entry for entry in read_log(path) if "val_loss" in entry]
        for path in (watched.parent / "log.jsonl", log)
    ]
    assert [entry["step"] for entry in entries[0]] == [2, 4, 6]
    assert all(list(entry) == ["step", *(f"val_{name}" for name in NAMES)] for entry in entries[0])
    assert entries[1] == entries[0]
    # Of the averaged weights of that step.
    ema = load_checkpoint_for_use(watched / "step-00000004/ema.safetensors")
    measured = held_out_of(ema.options)(ema.model, "fp32")
    assert entries[0][1] == {"step": 4, **{f"val_{name}": v for name, v in measured.items()}}


# --- Speed


def test_speed_is_reported_in_the_words_of_the_field(monkeypatch):
    """Two steps of two seconds, of 8 clips on 2 processes; a clip has 10 tokens and 6 TFLOP."""
    monkeypatch.setattr(performance, "_peak_memory", lambda _: {})

    def entry(cost: ClipCost | None, peak: float | None) -> dict[str, float]:
        meter = ThroughputMeter(8, 2, cost, peak)
        for _ in range(2):
            meter.add_step(2.0)
        return meter.report(CPU)

    cost = ClipCost(tokens=10, flops=6 * 10**12)
    assert entry(cost, 48e12) == {
        **{"seconds": 2.0, "clips_per_second": 4.0, "data_wait": 0.0},
        **{"tokens_per_second": 40.0, "tflops": 12.0, "mfu": 0.25},
    }
    assert entry(cost, None).keys() == entry(cost, 48e12).keys() - {"mfu"}
    assert entry(None, 48e12).keys() == {"seconds", "clips_per_second", "data_wait"}


def test_each_report_has_its_own_share_of_waiting(monkeypatch):
    """1 s of 4 for the first batch, 3 s of 4 for the second; the steps between are no waiting."""
    clock = iter([0.0, 1.0, 10.0, 13.0])
    monkeypatch.setattr(performance, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    meter = ThroughputMeter(8, 2, None, None)
    batches = meter.time_waiting(iter([{}, {}]))
    for share in (0.25, 0.75):
        next(batches)
        meter.add_step(4.0)
        assert meter.report(CPU)["data_wait"] == share


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 156),
        ("NVIDIA A100 80GB PCIe", 312, 156),
        ("NVIDIA H100 80GB HBM3", 989, 495),
        ("NVIDIA H100 PCIe", 756, 378),
        ("NVIDIA H200", 989, 495),
        ("NVIDIA B200", 2250, 1125),
        ("NVIDIA L40S", 362, 183),
        ("NVIDIA GeForce RTX 4090", 165, 83),
        # Others than those, and parts of them.
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("NVIDIA GH200 480GB", None, None),
        ("NVIDIA H200 NVL", None, None),
        ("Tesla V100-SXM2-32GB", None, None),
    ],
)
def test_peaks_are_those_of_the_device(monkeypatch, name, bf16, fp32):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    for precision, expected in (("bf16", bf16), ("fp32", fp32)):
        found = peak_flops(torch.device("cuda", 0), precision)
        assert found == (None if expected is None else pytest.approx(1e12 * expected))
    assert peak_flops(CPU, "bf16") is None


@pytest.mark.parametrize(
    "depth",
    [
        ["model.encoder_layers=4", "model.decoder_layers=3"],
        ["model.encoder_layers=1", "model.decoder_layers=3", "model.first_frame=true"],
        DENSE,
    ],
)
def test_what_a_clip_costs(options, depth):
    """What is computed a second time is no work of the model's; few layers tell of many."""
    options = partial(options, *depth)
    o = options("data.frames=5", "train.batch_size=3")
    cost, step = clip_cost(o, PixelCodec()), estimate_step(o, PixelCodec())
    assert (3 * cost.tokens, 3 * cost.flops) == (step.tokens, step.flops)
    again = options("data.frames=5", "train.batch_size=3", "train.gradient_checkpointing=true")
    assert clip_cost(again, PixelCodec()) == cost
    assert estimate_step(again, PixelCodec()).flops > step.flops


@pytest.mark.skipif(torch.cuda.is_available(), reason="about processors")
def test_the_log_tells_speed(options):
    o = options("train.steps=1", "train.batch_size=1", "train.gradient_accumulation=2")
    launch.run_experiment(o)
    entry = read_log(o.output / "log.jsonl")[-1]
    cost = clip_cost(o, PixelCodec())
    rate = 2 / entry["seconds"]  # clips
    assert entry["tokens_per_second"] == pytest.approx(rate * cost.tokens)
    assert entry["tflops"] == pytest.approx(rate * cost.flops / 1e12)
    assert 0 < entry["data_wait"] < 1 and entry["memory_gib"] > 0.1
    assert "mfu" not in entry and "memory_reserved_gib" not in entry


# --- Traces


def names_in(path: Path) -> set[str]:
    with gzip.open(path, "rt") as file:
        return {event["name"] for event in json.load(file)["traceEvents"] if "name" in event}


def test_a_trace_holds_just_its_steps(options):
    o = options("train.profile_steps=[2,3]", "train.steps=4")
    launch.run_experiment(o)
    (path,) = (o.output / "traces").iterdir()
    assert path.name == "steps-2-3.json.gz"
    names = names_in(path)
    assert {name for name in names if name.startswith("training step")} == {
        *("training step 2", "training step 3")
    }
    assert {"Optimizer.step#AdamW.step", "Optimizer.step#Muon.step"} <= names


@pytest.mark.parametrize("fault", ["killed", "cannot be written"])
def test_a_trace_is_whole_or_absent(options, monkeypatch, fault):
    o = options("train.profile_steps=[2,3]")
    if fault == "killed":
        train(o, stop_after=2)
        train(o)  # goes on from step 2: it has no more of these steps than the last
    else:

        def half(self, path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(performance.profile, "export_chrome_trace", half)
        with pytest.raises(ScdError, match=r"steps-2-3.json.gz: cannot be written \(No space"):
            train(o)
    assert not [path for path in (o.output / "traces").rglob("*") if path.is_file()]
    assert not torch.autograd.profiler._is_profiler_enabled


# --- TensorBoard and wandb


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Iterator[None]:
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    for key in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(key, str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.teardown()  # it would write the runs of later tests here


def runs_in(output: Path) -> list[Path]:
    """The folders that wandb left, oldest first."""
    folders = (output / "trackers/wandb").glob("offline-run-*")
    return sorted(folders, key=lambda path: path.stat().st_mtime_ns)


def records_of(folder: Path) -> Iterator:
    """What wandb would send: protocol buffers in LevelDB's log format, after a head of 7 bytes.

    Waits for the last of them: wandb writes in another process, which may lag behind `finish`.
    """
    deadline = time.monotonic() + 60
    while True:
        records = list(written_records(folder))
        if any(r.WhichOneof("record_type") == "exit" for r in records):
            return iter(records)
        assert time.monotonic() < deadline, "wandb did not end its file"
        time.sleep(0.1)


def written_records(folder: Path) -> Iterator:
    """The records that are whole in the file so far; wandb may be in the middle of the next."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:  # the rest of a block, too short for a head
            place += 2**15 - place % 2**15
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            try:
                yield Record.FromString(whole)
            except DecodeError:  # its bytes are not all there yet
                return
            whole = b""


def history_of(folder: Path) -> list[dict]:
    """Logged values: by name, or by name and field joined with a colon."""
    return [
        {":".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item}
        for r in records_of(folder)
        if r.WhichOneof("record_type") == "history"
    ]


def run_of(folder: Path):
    return next(r.run for r in records_of(folder) if r.WhichOneof("record_type") == "run")


def test_what_wandb_gets(options, offline):
    o = options(
        *("train.steps=2", "train.sample_every=2", "train.val_loss_every=2"),
        *("train.trackers=[wandb]", "train.wandb_project=worlds"),
    )
    train(o)
    (folder,) = runs_in(o.output)
    told = run_of(folder)
    assert (told.project, told.display_name, told.job_type) == ("worlds", "watched", "train")
    history = history_of(folder)
    assert [row["step"] for row in history] == [1, 2, 2, 2, 2]
    log = read_log(o.output / "log.jsonl")
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert [row["train/loss"] for row in history[:2]] == losses
    assert {"train/tokens_per_second", "train/tflops", "train/data_wait"} <= history[0].keys()
    held = next(entry for entry in log if "val_loss" in entry)
    assert {f"val_{name}": history[2][f"val/{name}"] for name in NAMES} == {
        key: value for key, value in held.items() if key != "step"
    }
    assert history[3]["val/psnr"] == log[-1]["validation"]["psnr"]
    pictures = history[4]
    assert pictures["val/grid:caption"] == "generated above real, given frames framed"
    assert pictures["val/videos:captions"] == [
        f"0000{number}: left generated, right real, given frames framed" for number in range(2)
    ]
    sent = [pictures["val/grid:path"], *(v["path"] for v in pictures["val/videos:videos"])]
    samples = o.output / "samples/step-00000002"
    for path, name in zip(sent, ("grid.png", "00000.mp4", "00001.mp4"), strict=True):
        assert (folder / "files" / path).read_bytes() == (samples / name).read_bytes()


def test_a_restarted_run_continues_in_the_same_wandb_run(options, offline):
    """What is done again is told again: wandb would drop it, were the steps its own."""
    tracked = "train.trackers=[wandb]"
    train(options(tracked), stop_after=3)
    pytest.importorskip("wandb").finish()  # what the system does for a process that dies
    AcceleratorState._reset_state()
    train(options(tracked))
    first, second = runs_in(options().output)
    kept = json.loads((options().output / "wandb.json").read_text())["id"]
    assert run_of(first).run_id == run_of(second).run_id == kept
    assert run_of(second).resume
    assert [row["step"] for row in history_of(first)] == [1, 2, 3]
    assert [row["step"] for row in history_of(second)] == [3, 4, 5, 6]
    assert [row["_step"] for row in history_of(second)] == [0, 1, 2, 3]  # left to wandb
    axes = [r.metric for r in records_of(second) if r.WhichOneof("record_type") == "metric"]
    assert ("*", "step") in [(axis.glob_name, axis.step_metric) for axis in axes]
    # In another folder it is another run; so is an evaluation.
    assert tracking._run_id(options("name=other").output / "wandb.json") != kept
    evaluation = tracking.WandB(options(tracked), "evaluation")
    evaluation.start()
    assert evaluation.run.id != kept
    evaluation.finish()


def test_wandb_writes_where_its_user_wants(options, offline, monkeypatch, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.setenv("WANDB_DIR", str(there))
    PartialState()  # accelerate's logging asks for it
    tracker = tracking.WandB(options("train.trackers=[wandb]"), "evaluation")
    tracker.start()
    tracker.finish()
    assert list(there.glob("wandb/offline-run-*")) and not options().output.exists()


def test_a_damaged_wandb_id_is_reported(options, offline):
    o = options("train.trackers=[wandb]")
    o.output.mkdir(parents=True)
    for text in ("{}", "[]", '{"id": 3}', '{"id": "../x"}'):
        (o.output / "wandb.json").write_text(text)
        with pytest.raises(ScdError, match=r"wandb.json: holds no ID of a wandb run; remove it"):
            train(o)


def test_without_a_login_wandb_says_what_to_do(options, offline, monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ScdError, match=r"wandb login.*WANDB_MODE=offline") as caught:
        train(options("train.trackers=[wandb]"))
    assert "\n" not in str(caught.value)


def test_a_tracker_that_is_not_installed_is_named(options, monkeypatch):
    """Accelerate would leave it out without a word."""
    monkeypatch.setattr(tracking, "is_wandb_available", lambda: False)
    with pytest.raises(ScdError, match=r"not installed; run pip install -e '\.\[trackers\]'"):
        make_accelerator(options("train.trackers=[wandb]"))


def test_tensorboard_shows_grids(options):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    o = options(
        *("train.steps=2", "train.sample_every=2", "train.val_loss_every=2"),
        "train.trackers=[tensorboard]",
    )
    train(o)
    (path,) = (o.output / "trackers/watched").glob("events.out.tfevents*")
    events = accumulator.EventAccumulator(str(path)).Reload()
    (grid,) = events.Images("val/grid")
    with Image.open(o.output / "samples/step-00000002/grid.png") as drawn:
        assert (grid.step, grid.width, grid.height) == (2, *drawn.size)
    assert [event.step for event in events.Scalars("train/tokens_per_second")] == [1, 2]
    (loss,) = events.Scalars("val/loss_at_0.5")
    entry = next(e for e in read_log(o.output / "log.jsonl") if "val_loss" in e)
    assert loss.value == pytest.approx(entry["val_loss_at_0.5"])


def test_after_a_kill_tensorboard_has_each_step_once(options):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracked = "train.trackers=[tensorboard]"
    train(options(tracked), stop_after=3)
    AcceleratorState._reset_state()
    train(options(tracked))
    folder = options().output / "trackers/watched"
    assert len(list(folder.glob("events.out.tfevents*"))) == 2  # so step 3 was written twice
    events = accumulator.EventAccumulator(str(folder)).Reload().Scalars("train/loss")
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]
    losses = [e["loss"] for e in read_log(options().output / "log.jsonl") if "loss" in e]
    assert [event.value for event in events] == pytest.approx(losses)


@pytest.mark.parametrize("losses", [[0.0], [0.0, 0.5], [0.5, 0.25]])
def test_every_loss_can_be_plotted(losses, tmp_path):
    """Also that of a student which is still its own teacher."""
    lines = [json.dumps({"step": i, "loss": loss}) for i, loss in enumerate(losses)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_loss_curve(tmp_path / "log.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000
