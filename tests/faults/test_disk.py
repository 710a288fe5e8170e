"""A full disk, a read-only one, data that vanish: one line that says what and where, nothing half
written, what was there before untouched.

Two ways to a full disk: a small one of its own, where mounting is allowed, and a limit on the size
of files, which fails the same calls of the same libraries everywhere.
"""

import json
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from scd.cli import main
from scd.data.latents import write_latents
from scd.data.lists import ClipEntry, read_list, write_list
from scd.data.video import write_video
from scd.errors import ScdError
from scd.evaluation.samples import SampleFolder
from scd.models.scd import SCD
from scd.options import load_options
from scd.training.checkpoint import TrainingState, latest_checkpoint, save_checkpoint
from scd.training.resume import run_identity
from scd.training.run_log import RunLog, read_log
from scd.utils.files import write_json
from tests.faults.test_foreign_files import options_json
from tests.faults.test_sizes import announcing
from tests.faults.trials import FULL

TINY = str(Path(__file__).parent.parent.parent / "options/scd_doom_tiny.yml")
SMALL = ["data.source=video", "data.frames=4", "autoencoder.path=null", "model.patch_size=16"]
SMALL += ["model.heads=1", "model.encoder_layers=1", "model.decoder_layers=1", "train.steps=4"]
SMALL += ["train.batch_size=2", "train.save_every=2", "train.workers=0", "train.compile=false"]
SMALL += ["train.mixed_precision=fp32", "train.sample_every=0", "name=run"]
FRAMES = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)


pytestmark = pytest.mark.usefixtures("fresh_accelerate", "one_thread")


@dataclass
class Disk:
    folder: Path
    full: Callable[[], AbstractContextManager]


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here ({done.stderr.strip()[:80]})")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder))
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(params=["small disk", "limited files"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    if request.param == "limited files":
        return Disk(tmp_path, files_limited)
    folder = request.getfixturevalue("small_disk")
    return Disk(folder, lambda: filled(folder))


@contextmanager
def filled(folder: Path) -> Iterator[None]:
    """The last bytes of a disk taken."""
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            with suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def files_limited() -> Iterator[None]:
    """No file may grow beyond a kilobyte, in this process and in those it starts."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "ballast"
    }


def refused(folder: Path, act: Callable[[], object]) -> str:
    """The message that `act` ends in; it changes no file below the folder."""
    before = tree(folder)
    with pytest.raises(ScdError) as caught:
        act()
    assert tree(folder) == before
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


def small_state(step: int) -> TrainingState:
    model = SCD(3, 16, 1, 1, 1)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    identity = run_identity(load_options(TINY, SMALL), 1)
    moments = {0: {"exp_avg": torch.randn(300, 300)}}
    return TrainingState(step, identity, weights, weights, {"state": moments, "param_groups": []})


def test_what_is_written_to_a_full_disk(disk: Disk) -> None:
    """The same call with and without room: the first one's result survives the second."""
    folder = disk.folder
    identity = {"format": 1, "options": {"data": {"frame_size": 64}}}
    manifest = (identity, {"model": ["model"]})
    protocol = {"videos": 1, "context_frames": 4, "new_frames": 8, "fvd_precision": "fp32"}
    SampleFolder.describe(folder / "samples", *manifest, protocol, {})
    samples = SampleFolder(folder / "samples")
    clip = torch.from_numpy(FRAMES).permute(0, 3, 1, 2).float() / 255
    entries = [ClipEntry(video_path=f"{number:0200d}.mp4") for number in range(40)]
    writers: list[Callable[[int], object]] = [
        lambda n: write_video(folder / "v.mp4", FRAMES, 8),
        lambda n: write_latents(folder / "l.safetensors", torch.rand(12, 8, 8, 8), "me"),
        lambda n: write_list(folder / "train.json", entries),
        lambda n: write_json(folder / "metrics.json", ["x" * 9000]),
        lambda n: samples.write_clip("model", 0, clip),
        lambda n: samples.write_measurement(
            "model", 0, {"lpips": torch.rand(2000)}, {"lpips": None}
        ),
        lambda n: save_checkpoint(folder / "checkpoints", small_state(n), keep=1),
    ]
    for write in writers:
        write(1)
        with disk.full():
            refused(folder, lambda write=write: write(2))  # type: ignore[misc]
    newest = latest_checkpoint(folder / "checkpoints")
    assert newest is not None and newest.name == "step-00000001"


def test_a_log_on_a_full_disk(disk: Disk) -> None:
    log = RunLog(disk.folder / "log.jsonl", 0, enabled=True)
    log.write({"step": 1, "loss": 0.5})
    with disk.full(), pytest.raises(ScdError, match=r"log\.jsonl: cannot be written"):
        for step in range(2, 2000):
            log.write({"step": step, "loss": 0.5})
    entries = read_log(disk.folder / "log.jsonl")
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))


def error_of(capfd: pytest.CaptureFixture, *arguments: str) -> str:
    """The one line that a command ends in."""
    assert main(list(arguments)) == 1
    out, err = capfd.readouterr()
    (line,) = re.findall(r"error: .*\n", err)  # perhaps beside a progress bar
    assert "Traceback" not in out + err
    return line


@pytest.mark.parametrize("disk", ["small disk", "limited files"][: 1 + FULL], indirect=True)
def test_commands_on_a_full_disk(
    disk: Disk,
    doom_root: Path,
    tiny_autoencoder_path: str,
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SCD_CACHE", str(disk.folder / "no weights of metrics"))
    data = shutil.copytree(doom_root, disk.folder / "data")
    settings = [*SMALL, f"data.root={data}", f"output_root={disk.folder}"]
    encoder = [f"autoencoder.path={tiny_autoencoder_path}", "model.patch_size=2"]
    record = ["record", "--train-episodes", "1", "--val-episodes", "1", "--frames", "8"]
    checkpoint = announcing(disk.folder, json.loads(options_json()))
    evaluate = ["evaluate", str(checkpoint), *settings, "eval.videos=1", "eval.context_frames=2"]
    evaluate += ["eval.new_frames=2", "eval.swapped_actions=[]", "rollout.steps=1"]
    evaluate += ["data.frame_size=64", "data.val_list=train.json"]
    before = tree(disk.folder)
    with disk.full():
        assert "run/evaluation/" in error_of(capfd, *evaluate)
        if disk.full is not files_limited:  # the simulator would not even start
            assert "new/" in error_of(capfd, *record, "--root", str(disk.folder / "new"))
        assert "latents/" in error_of(capfd, "encode", "--opt", TINY, *settings, *encoder)
        assert "run/" in error_of(capfd, "train", "--opt", TINY, *settings)
    after = tree(disk.folder)
    after.pop("run/run.lock")
    # Where small files still fit, the run says that it failed.
    heartbeat = after.pop("run/heartbeat.json", b'{"state": "failed"}')
    assert json.loads(heartbeat)["state"] == "failed"
    assert after == before
    # With room again, all of them work.
    assert main(evaluate) == 0
    before = tree(disk.folder)
    for path in (disk.folder / "run/evaluation").rglob("measured/*/*"):
        path.unlink()  # to be measured again, from the saved samples
    with disk.full():
        assert "run/evaluation/" in error_of(capfd, *evaluate)
    assert main(evaluate) == 0 and tree(disk.folder).keys() == before.keys()
    assert main(["encode", "--opt", TINY, *settings, *encoder]) == 0
    assert main([*record, "--root", str(disk.folder / "new")]) == 0


def test_a_read_only_disk(
    small_disk: Path, doom_root: Path, tiny_autoencoder_path: str, capfd: pytest.CaptureFixture
) -> None:
    data = shutil.copytree(doom_root, small_disk / "data")
    settings = [*SMALL, f"data.root={data}", f"output_root={small_disk}"]
    encoder = [f"autoencoder.path={tiny_autoencoder_path}", "model.patch_size=2"]
    save_checkpoint(small_disk / "checkpoints", small_state(1), keep=1)
    mount("-o", "remount,ro", str(small_disk))
    record = ["record", "--train-episodes", "1", "--val-episodes", "1", "--frames", "8"]
    for command in (
        [*record, "--root", str(small_disk / "new")],
        ["encode", "--opt", TINY, *settings, *encoder],
        ["train", "--opt", TINY, *settings],
        ["make-lists", str(data), "--train-list", "a.json", "--val-list", "b.json"],
    ):
        message = error_of(capfd, *command)
        assert str(small_disk) in message and "Read-only" in message
    told = refused(
        small_disk, lambda: save_checkpoint(small_disk / "checkpoints", small_state(2), 1)
    )
    assert "Read-only" in told


def test_data_that_vanish_while_training(
    doom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Removed after the first step; also a moment later, in a loading process."""
    from scd.training.trainer import Trainer

    plain = Trainer._train_step
    for workers in (0, 2):
        data = shutil.copytree(doom_root, tmp_path / "data", dirs_exist_ok=True)

        def vanishing(self: Trainer, *arguments: object, data: Path = data) -> object:
            if self.step == 1:
                shutil.rmtree(data)
            return plain(self, *arguments)

        monkeypatch.setattr(Trainer, "_train_step", vanishing)
        settings = [*SMALL, f"data.root={data}", f"output_root={tmp_path}", f"name=gone{workers}"]
        settings += [f"train.workers={workers}", "train.steps=200"]
        message = error_of(capfd, "train", "--opt", TINY, *settings)
        assert f"{data}/train/" in message and "no such" in message


def test_data_of_wrong_lengths(
    doom_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    data = shutil.copytree(doom_root, tmp_path / "data")
    train = ["train", "--opt", TINY, *SMALL, f"data.root={data}", f"output_root={tmp_path}"]
    assert "40 frames, but the clip needs 41" in error_of(capfd, *train, "data.frames=41")
    entries = read_list(data / "train.json")
    actions = np.load(data / str(entries[0].action_path))["actions"]
    for entry in entries:
        np.savez(data / str(entry.action_path), actions=actions[:39])
    message = error_of(capfd, *train)
    assert f"{data}/train/" in message and "39 actions for 40 frames" in message
    for entry in entries:
        np.savez(data / str(entry.action_path), actions=np.append(actions, 0))  # one too many
    assert main(train) == 0
    for entry in entries:
        (data / str(entry.video_path)).unlink()
    message = error_of(capfd, *train, "name=other")
    assert f"{data}/train/" in message and "no such video" in message
    listed = json.loads((data / "train.json").read_text())
    (data / "train.json").write_text(json.dumps([*listed, {"label": 3}]))
    message = error_of(capfd, *train, "name=other")
    assert f"{data}/train.json: entry 3 has neither video_path nor latent_path" in message
