"""Lists, videos, actions, latents, the order of clips: right on good files, clear on bad ones."""

import errno
import gc
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import decord
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from scd.data import latents as latent_files
from scd.data.clips import ClipFolder, read_actions, with_float_pixels
from scd.data.latents import LatentHeader, latent_header, read_latents, write_latents
from scd.data.lists import ClipEntry, read_list, write_list
from scd.data.loader import StepSampler, TrainingClips
from scd.data.video import VideoFile, VideoWriter, write_video
from scd.data.video_checks import identity_of
from scd.errors import ScdError
from scd.models.autoencoder import encoder_hash, load_codec
from scd.options import Options, load_options
from scd.training import encode
from scd.training.encode import encode_dataset
from scd.utils import files
from scd.utils.files import (
    read_json,
    remove_unfinished,
    write_atomically,
    write_folder_atomically,
    write_json,
)

ROOT = Path(__file__).parent.parent
REAL_CLIPS = ROOT.parent / "shared/real_clips"


def refused(path: Path, act: Callable[[], object]) -> str:
    """What `act` complains about: one line that names the file."""
    with pytest.raises(ScdError) as caught:
        act()
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < len(str(path)) + 300
    return message


@pytest.fixture
def root(doom_root: Path, tmp_path: Path) -> Path:
    """A recording that may be changed."""
    shutil.copytree(doom_root, tmp_path / "doom")
    return tmp_path / "doom"


# --- Files


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, lambda aside: aside.write_text("old"))

    def fail(error: BaseException) -> Callable[[Path], object]:
        def write(aside: Path) -> None:
            aside.write_text("half of the n")
            raise error

        return write

    message = refused(path, lambda: write_atomically(path, fail(OSError(28, "No space left"))))
    assert "No space left" in message
    for error in (KeyboardInterrupt(), ValueError("no")):
        with pytest.raises(type(error)):
            write_atomically(path, fail(error))
    refused(path, lambda: write_atomically(path, lambda aside: None))  # wrote nothing
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, lambda aside: aside.write_text("new"))
    assert path.read_text() == "new"


def test_a_file_may_have_the_longest_of_names(tmp_path: Path) -> None:
    """As long as systems allow, although what goes beside it has a longer ending."""
    path = tmp_path / f"{'x' * 251}.txt"
    write_atomically(path, lambda aside: aside.write_text("new"))
    assert list(tmp_path.iterdir()) == [path]


def test_an_old_folder_comes_back_where_the_new_one_cannot_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = tmp_path / "folder", Path.rename
    write_folder_atomically(folder, lambda aside: (aside / "old").write_text(""))

    def fail(path: Path, to: Path) -> Path:
        if path.suffix == ".new":
            raise OSError(errno.EIO, "broken")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ScdError, match="folder: cannot be written"):
        write_folder_atomically(folder, lambda aside: (aside / "new").write_text(""))
    assert sorted(tmp_path.rglob("*")) == [folder, folder / "old"]


def test_a_linked_folder_is_replaced_where_it_lies(tmp_path: Path) -> None:
    link, disk = tmp_path / "here/folder", tmp_path / "disk/folder"
    link.parent.mkdir()
    link.symlink_to(disk)
    for name in ("first", "second"):  # at first the link leads nowhere
        write_folder_atomically(link, lambda aside, name=name: (aside / name).write_text(""))
        assert link.is_symlink() and [path.name for path in disk.iterdir()] == [name]
    stale = link.with_name(".folder.17.old")
    stale.symlink_to(disk)
    remove_unfinished(link.parent)
    assert not stale.is_symlink() and list(link.parent.iterdir()) == [link] and any(disk.iterdir())


def test_an_old_folder_makes_room_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while it is deleted leaves no half of it."""
    folder, deleted, delete = tmp_path / "folder", [], shutil.rmtree

    def record(path: Path, **how: bool) -> None:
        deleted.append(path)
        delete(path, **how)

    write_folder_atomically(folder, lambda aside: (aside / "old").write_text(""))
    monkeypatch.setattr(files.shutil, "rmtree", record)
    write_folder_atomically(folder, lambda aside: (aside / "new").write_text(""))
    assert deleted and folder not in deleted
    assert sorted(tmp_path.rglob("*")) == [folder, folder / "new"]


def test_those_who_may_read_other_files_may_read_weights(tmp_path: Path) -> None:
    """Since 0.8, safetensors makes its files readable for their owner alone."""
    before = os.umask(0o027)
    try:
        file, folder = tmp_path / "a.safetensors", tmp_path / "folder"
        write_atomically(file, lambda aside: save_file({"x": torch.zeros(1)}, aside))
        write_folder_atomically(folder, lambda aside: save_file({}, aside / "b.safetensors"))
    finally:
        os.umask(before)
    for path in (file, folder / "b.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o640
        assert list(path.parent.glob("*.mode")) == []


def test_a_colon_in_a_path_names_no_protocol(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    frames = np.zeros((4, 16, 16, 3), np.uint8)
    write_video(Path("cat: at once.mp4"), frames, 10)
    with VideoWriter(Path("cat: in pieces.mp4"), 16, 16, 10) as writer:
        writer.write(frames)
    assert all(len(VideoFile(path)) == 4 for path in Path().glob("cat: *.mp4"))
    assert len(list(Path().iterdir())) == 2


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("")
    folder.mkdir()
    video = np.zeros((2, 8, 8, 3), np.uint8)
    # A folder without permission does not stop root; /proc stops anybody.
    for path in (file / "x", file / "x/y", folder, Path("/proc/scd/x")):
        refused(path, lambda path=path: write_json(path, [1]))
        refused(path, lambda path=path: write_video(path, video, 8))
        refused(path, lambda path=path: write_latents(path, torch.zeros(1, 1, 1, 1), "hash"))
    assert "is not a folder" in refused(file, lambda: write_json(file / "x", 1))
    assert sorted(tmp_path.rglob("*")) == [file, folder]


def test_links_are_replaced_and_devices_stay(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(target)
    write_json(target, [0])
    write_json(link, [1])  # others may share what it led to, as in the hub's cache
    assert not link.is_symlink() and read_json(target) == [0] and read_json(link) == [1]
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as pool:
        read = pool.submit(pipe.read_text)
        write_json(pipe, [2])
        assert json.loads(read.result()) == [2] and pipe.is_fifo()
    with open(target, "r+") as opened:  # as /dev/stdout leads to a file that a shell has opened
        (stdout := tmp_path / "stdout").symlink_to(f"/proc/self/fd/{opened.fileno()}")
        write_json(stdout, [4])
    assert stdout.is_symlink() and read_json(target) == [4]
    stdout.unlink()
    with pytest.raises(ScdError, match="full: cannot be written"):
        write_json(Path("/dev/full"), [3])
    assert Path("/dev/full").is_char_device()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "target"]


def test_a_failing_encoder_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "v.mp4"
    path.write_text("old")
    bad = tmp_path / "ffmpeg"
    bad.write_text("#!/bin/sh\ncat >/dev/null\necho one >&2\necho disk is full >&2\nexit 1\n")
    bad.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(bad))
    video = np.zeros((2, 8, 8, 3), np.uint8)
    assert "disk is full" in refused(path, lambda: write_video(path, video, 8))
    bad.write_text("#!/bin/sh\nexit 3\n")  # closes its input at once
    assert "status 3" in refused(path, lambda: write_video(path, np.tile(video, (1, 99, 99, 1)), 8))
    assert path.read_text() == "old" and sorted(tmp_path.iterdir()) == [bad, path]


# --- Lists


def test_lists_come_back(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    entries = [ClipEntry("a.mp4", "a.npz", "a.pt", 3), ClipEntry(latent_path="sub/b.pt")]
    write_list(path, entries)
    assert read_list(path) == entries
    assert read_json(path)[1] == {"latent_path": "sub/b.pt"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not valid JSON"),
        ("[", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("\x00", "not valid JSON"),
        ("{}", "non-empty JSON array"),
        ("[]", "non-empty JSON array"),
        ("3", "non-empty JSON array"),
        ('["a.mp4"]', "entry 0 is not an object"),
        ('[{"video_path": "a"}, {"video": "a"}]', "entry 1 has an unknown field 'video'; known:"),
        ('[{"video_path": 3}]', "entry 0: video_path must be str, not 3"),
        ('[{"video_path": ["' + 999 * "a" + '"]}]', "entry 0: video_path must be str"),
        ('[{"video_path": "a", "label": "b"}]', "entry 0: label must be int, not 'b'"),
        ('[{"video_path": "a", "label": true}]', "entry 0: label must be int, not True"),
        ('[{"video_path": "a", "label": 1.0}]', "entry 0: label must be int, not 1.0"),
        ('[{"label": 1}]', "entry 0 has neither video_path nor latent_path"),
        ('[{"video_path": "/etc/passwd"}]', "a path below the data root"),
        ('[{"video_path": "a/../../b"}]', "a path below the data root"),
        ('[{"video_path": ""}]', "a path below the data root"),
        ('[{"video_path": "a\\nb"}]', "a path below the data root"),
    ],
)
def test_a_wrong_list_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "list.json"
    path.write_text(text)
    assert complaint in refused(path, lambda: read_list(path))


def test_a_list_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.json", tmp_path):
        refused(path, lambda path=path: read_list(path))
    (tmp_path / "l.json").write_bytes(b"\xff\xfe")
    refused(tmp_path / "l.json", lambda: read_list(tmp_path / "l.json"))


def test_a_list_without_what_the_model_needs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "l.json"
    write_list(path, [ClipEntry("a.mp4", "a.npz", "a.pt", 1), ClipEntry("a.mp4")])
    for source, condition, missing in [
        ("latents", "none", "latent_path"),
        ("video", "action", "action_path"),
        ("video", "label", "label"),
    ]:
        message = refused(path, lambda s=source, c=condition: ClipFolder(tmp_path, "l.json", s, c))
        assert f"entry 1 has no {missing}" in message


# --- Videos


@pytest.mark.parametrize(("height", "width"), [(64, 64), (63, 61), (256, 258), (1, 301)])
def test_videos_come_back(tmp_path: Path, height: int, width: int) -> None:
    path = tmp_path / "v.mp4"
    ramp = np.linspace(0, 200, height)[:, None] / 2 + np.linspace(0, 200, width) / 2
    frames = np.stack([np.stack([ramp, ramp, ramp], -1) + 5 * i for i in range(6)]).astype(np.uint8)
    write_video(path, frames, 8.75)
    video = VideoFile(path)
    assert len(video) == 6
    back = video.frames(np.array([5, 0, 3]))
    assert back.shape == (3, height, width, 3)
    error = np.abs(back.astype(int) - frames[[5, 0, 3]])
    assert error.mean() < 2  # of 255; frames are 5 apart
    refused(path, lambda: video.frames(np.array([0, 6])))


@pytest.mark.parametrize(
    ("height", "width", "kind"),
    [
        (64, 64, "yuv444p"),
        (301, 400, "yuv444p"),
        (100, 400, "yuv420p"),
        (400, 100, "yuv420p"),
    ],
)
def test_only_small_or_odd_videos_have_full_chroma(
    tmp_path: Path, height: int, width: int, kind: str
) -> None:
    write_video(tmp_path / "v.mp4", np.zeros((2, height, width, 3), np.uint8), 8)
    assert next(imageio_ffmpeg.read_frames(tmp_path / "v.mp4"))["pix_fmt"].startswith(kind)


def test_enlarged_pixels_are_squares(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 8, 16, 3), dtype=np.uint8)
    write_video(tmp_path / "v.mp4", frames, 8, crf=0, enlarge=4)
    back = VideoFile(tmp_path / "v.mp4").frames(np.arange(2))
    assert np.array_equal(back, frames.repeat(4, axis=1).repeat(4, axis=2))


def test_widths_that_the_decoder_cannot_read_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    write_video(path, np.zeros((2, 64, 72, 3), np.uint8), 8)
    assert "of this width" in refused(path, lambda: VideoFile(path).frames(np.arange(2)))


def test_frames_that_are_no_pictures_are_refused(tmp_path: Path) -> None:
    for frames in (np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3), np.float32)):
        with pytest.raises(ValueError, match="at least one frame of uint8"):
            write_video(tmp_path / "v.mp4", frames, 8)


def test_broken_videos_are_refused(root: Path, capfd: pytest.CaptureFixture) -> None:
    path = root / "train/00000.mp4"
    whole = path.read_bytes()
    garbage = np.random.default_rng(0).integers(0, 256, len(whole), dtype=np.uint8).tobytes()
    start = whole.index(b"mdat") + 4
    blank = whole[:start] + bytes(len(whole) // 2) + whole[start + len(whole) // 2 :]
    folder = ClipFolder(root, "train.json", "video")
    for broken in (b"", whole[:1], whole[: len(whole) // 2], whole[:-500], garbage, blank, b"hi\n"):
        path.write_bytes(broken)
        refused(path, lambda: folder.read(0, 8))
    path.unlink()
    refused(path, lambda: folder.read(0, 8))
    path.mkdir()
    refused(path, lambda: folder.read(0, 8))
    assert "[mov,mp4" not in capfd.readouterr().err  # ffmpeg's own words


def test_damaged_videos_read_or_are_refused(root: Path) -> None:
    path = root / "train/00000.mp4"
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(int(rng.integers(1, 8))):
            damaged[rng.integers(len(whole))] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            VideoFile(path).frames(np.arange(0, 40, 8))
            outcomes.add("read")
        except ScdError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_readers_survive_a_fork(doom_root: Path) -> None:
    """One that was left in a reference cycle is collected in a worker, without its threads."""
    cycle: list = [VideoFile(doom_root / "train/00000.mp4")]
    cycle.append(cycle)
    gc.disable()
    try:
        del cycle
        worker = multiprocessing.get_context("fork").Process(target=gc.collect)
        worker.start()
    finally:
        gc.enable()
    worker.join(20)
    exit_code = worker.exitcode
    worker.kill()
    assert exit_code == 0


def test_too_short_a_video_is_refused(root: Path) -> None:
    folder = ClipFolder(root, "train.json", "video")
    assert folder.length(0) == 40
    assert folder.read(0, 40)["video"].shape == (40, 3, 64, 64)
    assert folder.read(0, 5, stride=9)["video"].shape == (5, 3, 64, 64)
    path = root / "train/00000.mp4"
    assert "40 frames, but the clip needs 41" in refused(path, lambda: folder.read(0, 41))
    assert "needs 41" in refused(path, lambda: folder.read(0, 5, stride=10))


# --- Actions and labels


def save_npz(**arrays: object) -> Callable[[Path], object]:
    return lambda path: np.savez_compressed(path, **arrays)


@pytest.mark.parametrize(
    ("write", "complaint"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(b""), "not an npz file"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "not an npz file"),
        (lambda path: path.write_text("up\ndown\n"), "not an npz file"),
        (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00"), "not an npz file"),
        (save_npz(action=np.zeros(40, int)), "'actions'"),
        (save_npz(actions=np.array([{}] * 40)), "Object arrays cannot be loaded"),
        (save_npz(actions=np.zeros(40)), "must be integers"),
        (save_npz(actions=np.zeros((40, 1), int)), "needs integers, one per frame"),
        (save_npz(actions=np.zeros(0, int)), "must be integers, one per frame"),
        (save_npz(actions=np.zeros(39, int)), "39 actions for 40 frames"),
        (save_npz(actions=np.arange(40) % 5), "actions 0 to 4, but the model knows 0 to 3"),
        (save_npz(actions=np.arange(40) % 3 - 1), "actions -1 to 1"),
        (save_npz(actions=np.full(40, 2**64 - 1, np.uint64)), "actions -1"),
    ],
)
def test_wrong_actions_are_refused(root: Path, write: Callable, complaint: str) -> None:
    folder = ClipFolder(root, "train.json", "video", "action", 4)
    assert folder.read(0, 8)["actions"].dtype == torch.int64
    path = root / "train/00000.npz"
    write(path)
    assert complaint in refused(path, lambda: folder.read(0, 8))


def test_damaged_actions_read_or_are_refused(root: Path) -> None:
    path = root / "train/00000.npz"
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refusals = 0
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[rng.integers(len(whole))] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            read_actions(path)
        except ScdError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refusals += 1
    assert refusals > 20


def test_labels_are_checked(root: Path) -> None:
    entries = [replace(e, label=n + 1) for n, e in enumerate(read_list(root / "train.json"))]
    write_list(root / "train.json", entries)
    folder = ClipFolder(root, "train.json", "video", "label", 3)
    assert folder.read(1, 2)["label"] == 2
    message = refused(root / "train.json", lambda: folder.read(2, 2))
    assert "entry 2 has label 3, but the model knows 0 to 2" in message


# --- Clips


def test_a_clip_is_cut_from_its_files(root: Path) -> None:
    folder = ClipFolder(root, "val.json", "video", "action", 4)
    whole, clip = folder.read(1, 40), folder.read(1, 4, 3, np.random.default_rng(5))
    start = int(np.random.default_rng(5).integers(40 - 9))
    frames = torch.arange(start, start + 10, 3)
    assert torch.equal(clip["video"], whole["video"][frames])
    assert torch.equal(clip["actions"], whole["actions"][frames])
    assert whole["video"].min() >= 0 and 0.5 < whole["video"].max() <= 1
    assert len({clip.unique().numel() for clip in whole["video"]}) > 1


def test_clips_start_at_every_frame_they_fit_after(tmp_path: Path) -> None:
    numbered = torch.arange(12.0).reshape(12, 1, 1, 1)
    write_latents(tmp_path / "l.safetensors", numbered, "hash")
    write_list(tmp_path / "l.json", [ClipEntry(latent_path="l.safetensors")])
    folder = ClipFolder(tmp_path, "l.json", "latents")
    clips = [folder.read(0, 3, 2, np.random.default_rng(n))["latents"] for n in range(100)]
    assert {int(clip[0]) for clip in clips} == set(range(8))  # of 12 frames, a clip spans 5
    assert all(torch.equal(clip.flatten().diff(), torch.full((2,), 2.0)) for clip in clips)
    assert folder.read(0, 3, 2)["latents"].flatten().tolist() == [0, 2, 4]


def test_clips_of_another_size_are_refused(root: Path) -> None:
    """They could not be stacked into a batch."""
    write_video(root / "train/00001.mp4", np.zeros((8, 64, 32, 3), np.uint8), 8)
    entries = read_list(root / "train.json")
    for number, entry in enumerate(entries):
        write_latents(root / f"{number}.pt.safetensors", torch.zeros(8, 4, 8, 8 - number), "hash")
        entries[number] = replace(entry, latent_path=f"{number}.pt.safetensors")
    write_list(root / "train.json", entries)
    for source, name in [("video", "train/00001.mp4"), ("latents", "1.pt.safetensors")]:
        folder = ClipFolder(root, "train.json", source)
        folder.read(0, 8)
        message = refused(root / name, lambda f=folder: f.read(1, 8))
        assert "but those of other clips" in message
        folder.read(0, 8)


@pytest.fixture(scope="module")
def clips(doom_root: Path) -> TrainingClips:
    return TrainingClips(ClipFolder(doom_root, "train.json", "video", "action", 4), 3, 2, seed=7)


def batches(clips: TrainingClips, sampler: StepSampler, workers: int) -> list[dict]:
    return list(DataLoader(clips, batch_sampler=sampler, num_workers=workers))


def test_workers_have_no_say_in_the_clips(clips: TrainingClips) -> None:
    loaded = [batches(clips, StepSampler(2, 0, 1, 0, 5), workers) for workers in (0, 1, 2)]
    for other in loaded[1:]:
        assert len(other) == len(loaded[0]) == 5
        for a, b in zip(loaded[0], other, strict=True):
            assert a.keys() == b.keys() == {"sample", "video", "actions"}
            assert all(torch.equal(a[key], b[key]) for key in a)
    resumed = batches(clips, StepSampler(2, 0, 1, 3, 5), 0)
    assert all(torch.equal(resumed[0][key], loaded[0][3][key]) for key in resumed[0])
    again = clips[4]
    assert torch.equal(again["video"], loaded[0][2]["video"][0])


def test_processes_share_what_one_would_see(clips: TrainingClips) -> None:
    together = batches(clips, StepSampler(6, 0, 1, 2, 4), 0)
    apart = [batches(clips, StepSampler(2, rank, 3, 2, 4), 0) for rank in range(3)]
    for step, whole in enumerate(together):
        for key in whole:
            parts = torch.cat([process[step][key] for process in apart])
            assert torch.equal(whole[key], parts)
    assert len(StepSampler(2, 1, 3, 2, 4)) == 2


def test_an_epoch_visits_each_entry_once(tmp_path: Path) -> None:
    class Numbers(ClipFolder):
        def read_bytes(self, number, frames, stride=1, rng=None, framing_rng=None):
            return {"number": torch.tensor(number), "start": torch.tensor(rng.integers(10**6))}

    write_list(tmp_path / "l.json", [ClipEntry(video_path=f"{n}.mp4") for n in range(50)])
    clips = TrainingClips(Numbers(tmp_path, "l.json", "video"), 2, 1, seed=0)
    epochs = [[int(clips[50 * epoch + n]["number"]) for n in range(50)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({int(clips[n]["start"]) for n in range(200)}) > 190
    other = TrainingClips(clips.folder, 2, 1, seed=1)
    assert [int(other[n]["number"]) for n in range(50)] != epochs[0]
    backwards = [int(clips[n]["number"]) for n in reversed(range(100))]
    assert backwards[::-1] == epochs[0] + epochs[1]


def test_an_error_in_a_worker_stays_one_line(root: Path) -> None:
    """A data loader sends it on as `ExceptionWrapper`, its traceback as the message."""
    path = root / "train/00000.npz"
    path.write_text("")
    folder = ClipFolder(root, "train.json", "video", "action", 4)
    try:
        folder.read(0, 3)
    except ScdError:
        sent = ExceptionWrapper(where="in DataLoader worker process 0")
    assert "Traceback" in sent.exc_msg
    assert refused(path, sent.reraise) == f"{path}: not an npz file"


# --- Latents


class Attack:
    """Writes a file when an ordinary unpickler reads it."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.target, "owned")


LATENTS = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0))


def test_latents_come_back(tmp_path: Path) -> None:
    path = tmp_path / "sub/l.safetensors"
    write_latents(path, LATENTS.permute(0, 1, 3, 2), "hash")
    assert torch.equal(read_latents(path), LATENTS.permute(0, 1, 3, 2))
    assert latent_header(path) == LatentHeader("hash", (5, 2, 3, 3))
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode  # readable like any file
    torch.save(LATENTS.half(), tmp_path / "l.pt")
    assert torch.equal(read_latents(tmp_path / "l.pt"), LATENTS.half())
    torch.save(torch.nn.Parameter(LATENTS), tmp_path / "l.pt")
    assert not read_latents(tmp_path / "l.pt").requires_grad


@pytest.mark.filterwarnings("ignore")
def test_latents_that_run_code_are_refused(tmp_path: Path) -> None:
    path, target = tmp_path / "l.pt", tmp_path / "owned"
    for value in (Attack(target), {"latents": Attack(target)}, [LATENTS, Attack(target)]):
        for zipped in (True, False):
            torch.save(value, path, _use_new_zipfile_serialization=zipped)
            assert "refused: expected a plain tensor" in refused(path, lambda: read_latents(path))
            assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()  # the attack works where nobody minds


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_broken_latents_are_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"l.{ending}"

    def write(latents: torch.Tensor) -> None:
        torch.save(latents, path) if ending == "pt" else save_file({"latents": latents}, path)

    write(LATENTS)
    whole = path.read_bytes()
    for broken in (b"", whole[:9], whole[: len(whole) // 2], whole[:-20], b"\x00" * 99, b"no\nno"):
        path.write_bytes(broken)
        refused(path, lambda: read_latents(path))
        assert latent_header(path) is None
    for bad in (float("nan"), float("inf")):
        write(torch.where(LATENTS > 1, bad, LATENTS))
        assert "not finite" in refused(path, lambda: read_latents(path))
    for wrong in (LATENTS.int(), LATENTS[0], LATENTS[None], LATENTS.to(torch.complex64)):
        write(wrong)
        assert "expected one floating-point tensor" in refused(path, lambda: read_latents(path))
    path.unlink()
    refused(path, lambda: read_latents(path))
    assert latent_header(path) is None
    path.mkdir()
    refused(path, lambda: read_latents(path))


def test_tensors_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "l.pt"
    for wrong in (LATENTS.to_sparse(), LATENTS.to("meta"), {"latents": LATENTS}, [LATENTS], None):
        torch.save(wrong, path)
        assert "expected" in refused(path, lambda: read_latents(path))


# --- Encoding


@pytest.fixture
def options(root: Path, tiny_autoencoder_path: str) -> Options:
    return load_options(
        ROOT / "options/scd_doom_tiny.yml",
        [
            f"data.root={root}",
            f"autoencoder.path={tiny_autoencoder_path}",
            "train.mixed_precision=fp32",
        ],
    )


def test_encoded_latents_are_those_of_the_videos(
    root: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "CHUNK_FRAMES", 16)  # 40 frames: two whole chunks and a rest
    before = read_list(root / "train.json")
    encode_dataset(options)
    entries = read_list(root / "train.json")
    assert [replace(entry, latent_path=None) for entry in entries] == before
    assert read_json(root / "val.json") == [
        {"video_path": f"val/0000{n}.mp4", "action_path": f"val/0000{n}.npz"} for n in range(2)
    ]
    made_by = encoder_hash(str(options.autoencoder.path))
    codec = load_codec(options.autoencoder.path)
    videos = ClipFolder(root, "train.json", "video", "action", 4)
    latents = ClipFolder(root, "train.json", "latents", "action", 4)
    for number, entry in enumerate(entries):
        path = root / str(entry.latent_path)
        assert path.is_relative_to(root / "latents" / made_by[:12])
        identity = identity_of(root / str(entry.video_path))
        assert latent_header(path) == LatentHeader(made_by, (40, 8, 8, 8), identity)
        pixels, encoded = videos.read(number, 40), latents.read(number, 40)
        assert torch.equal(pixels["actions"], encoded["actions"])
        with torch.no_grad():
            alone = codec.encode(pixels["video"][None, 7:8])[0, 0]  # frame 7 has latent 7
            direct = codec.encode(pixels["video"][None])[0]
        # fp32; kernels differ with the batch, frames by far more
        torch.testing.assert_close(codec.scale(encoded["latents"]), direct, atol=1e-4, rtol=1e-4)
        distance = (direct - alone).abs().flatten(1).amax(1)
        assert distance[7] < 1e-4 and distance[[6, 8]].min() > 1e-2
    a, b = (folder.read(0, 9, 1, np.random.default_rng(1)) for folder in (videos, latents))
    assert torch.equal(a["actions"], b["actions"])
    with torch.no_grad():
        direct = codec.encode(a["video"][None])[0]
    torch.testing.assert_close(codec.scale(b["latents"]), direct, atol=1e-4, rtol=1e-4)


def test_what_is_encoded_is_not_encoded_again(
    root: Path, options: Options, tiny_autoencoder_path: str, tmp_path: Path
) -> None:
    encode_dataset(options)
    listed = (root / "train.json").read_bytes()
    paths = sorted((root / "latents").rglob("*.safetensors"))
    assert len(paths) == 3
    stamps = [path.stat().st_mtime_ns for path in paths]
    encode_dataset(options)
    assert [path.stat().st_mtime_ns for path in paths] == stamps
    assert (root / "train.json").read_bytes() == listed
    paths[0].write_bytes(paths[0].read_bytes()[:-9])  # damaged
    write_latents(paths[1], torch.zeros(40, 8, 8, 8), "another autoencoder")
    encode_dataset(options)
    changed = [path.stat().st_mtime_ns != stamp for path, stamp in zip(paths, stamps, strict=True)]
    assert changed == [True, True, False]
    assert read_latents(paths[0]).shape == (40, 8, 8, 8) and read_latents(paths[1]).any()


def test_half_precision_encodes_nearly_the_same(root: Path, options: Options) -> None:
    encode_dataset(options)
    path = root / str(read_list(root / "train.json")[0].latent_path)
    exact = read_latents(path)
    path.unlink()
    options.train.mixed_precision = "bf16"
    encode_dataset(options)
    error = (read_latents(path) - exact).norm() / exact.norm()
    assert 0 < error < 0.03  # bf16 keeps 8 bits


def test_videos_of_one_name_keep_their_latents_apart(root: Path, options: Options) -> None:
    shutil.copy(root / "train/00001.mp4", root / "train/00000.avi")
    write_list(root / "train.json", [ClipEntry(f"train/00000.{e}") for e in ("mp4", "avi")])
    encode_dataset(options)
    paths = [root / str(entry.latent_path) for entry in read_list(root / "train.json")]
    assert not torch.equal(read_latents(paths[0]), read_latents(paths[1]))


def test_what_cannot_be_encoded_is_named(root: Path, options: Options, tmp_path: Path) -> None:
    before = (root / "train.json").read_bytes()
    path = root / "train/00001.mp4"
    write_video(path, np.zeros((4, 60, 64, 3), np.uint8), 8)
    message = refused(path, lambda: encode_dataset(options))
    assert "60x64 pixels, but data.frame_size is 64" in message
    path.unlink()
    refused(path, lambda: encode_dataset(options))
    assert (root / "train.json").read_bytes() == before
    write_list(root / "train.json", [ClipEntry(latent_path="a.pt")])
    refused(root / "train.json", lambda: encode_dataset(options))
    nowhere = tmp_path / "nowhere"
    options.autoencoder.path = str(nowhere)
    refused(nowhere, lambda: encode_dataset(options))
    options.autoencoder.path = None
    with pytest.raises(ScdError, match=r"autoencoder\.path is null"):
        encode_dataset(options)


def test_a_damaged_autoencoder_is_refused(tiny_autoencoder_path: str, tmp_path: Path) -> None:
    path = tmp_path / "autoencoder"
    shutil.copytree(tiny_autoencoder_path, path)
    weights = path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    dropped = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != dropped}, weights)
    assert dropped in refused(path, lambda: load_codec(str(path)))
    save_file({k: v[:1] for k, v in tensors.items()}, weights)
    refused(path, lambda: load_codec(str(path)))
    weights.write_bytes(b"\x00" * 100)
    refused(path, lambda: load_codec(str(path)))
    weights.unlink()
    refused(path, lambda: load_codec(str(path)))
    (path / "config.json").write_text(json.dumps({"latent_channels": "many"}))
    refused(path, lambda: load_codec(str(path)))
    (path / "config.json").write_text("{")
    refused(path, lambda: load_codec(str(path)))


# --- Clips that nobody here made


@pytest.fixture(scope="module")
def real_clips() -> Path:
    if not REAL_CLIPS.is_dir():
        pytest.skip(f"{REAL_CLIPS} is absent: no clips of other people to test with")
    return REAL_CLIPS


def test_a_clip_of_ucf101_is_read(real_clips: Path, tmp_path: Path) -> None:
    (tmp_path / "v.mp4").symlink_to(real_clips / "ucf101_cliff_diving.mp4")
    write_list(tmp_path / "l.json", [ClipEntry("v.mp4", label=11)])
    folder = ClipFolder(tmp_path, "l.json", "video", "label", 101)
    assert len(VideoFile(tmp_path / "v.mp4")) == folder.length(0) == 78
    clip = folder.read(0, 16, stride=5)
    assert clip["video"].shape == (16, 3, 240, 320) and clip["label"] == 11
    assert clip["video"].std() > 0.05
    # Neighbours resemble each other and frames differ: seeking decodes what reading on does.
    whole = VideoFile(tmp_path / "v.mp4").frames(np.arange(78))
    assert np.array_equal(VideoFile(tmp_path / "v.mp4").frames(np.array([50]))[0], whole[50])
    assert len({frame.tobytes() for frame in whole}) > 70


def test_actions_of_dmlab_are_read(real_clips: Path) -> None:
    actions = read_actions(real_clips / "dmlab.npz")
    assert actions.shape == (300,) and actions.dtype == np.int64
    assert set(actions.tolist()) == {0, 1, 2}


def test_training_videos_stay_in_bytes_up_to_the_device(clips: TrainingClips) -> None:
    clip = clips[4]
    assert clip["video"].dtype == torch.uint8
    start, _ = (np.random.default_rng([clips.seed, stream, 4]) for stream in (2, 4))
    whole = clips.folder.read(clips.number(4), 3, 2, start)
    assert whole["video"].dtype == torch.float32
    found = with_float_pixels(clip)
    assert torch.equal(found["video"], whole["video"])
    assert with_float_pixels(found) is found  # floats stay
    assert torch.equal(found["actions"], whole["actions"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_latent_that_is_not_finite_is_detected(value, dtype, tmp_path):
    latents = torch.randn(3, 2, 4, 4).to(dtype)
    for name in ("first", "middle", "last"):
        path, wrong = tmp_path / f"{name}.safetensors", latents.clone()
        wrong.flatten()[{"first": 0, "middle": 50, "last": -1}[name]] = value
        path.write_bytes(save({"latents": wrong}))
        assert "not finite" in refused(path, lambda path=path: read_latents(path))


def test_a_clip_of_latents_opens_each_of_its_files_once(tmp_path, monkeypatch):
    write_latents(tmp_path / "0.safetensors", torch.randn(6, 2, 4, 4), "x")
    np.savez(tmp_path / "0.npz", actions=np.zeros(6, dtype=np.int64))
    entry = ClipEntry(latent_path="0.safetensors", action_path="0.npz")
    write_list(tmp_path / "train.json", [entry])
    folder = ClipFolder(tmp_path, "train.json", "latents", "action", 4)
    opened = []
    for module, name in ((latent_files, "safe_open"), (files, "_open_npz")):
        plain = getattr(module, name)

        def counting(path, plain=plain, **settings):
            opened.append(Path(path).name)
            return plain(path, **settings)

        monkeypatch.setattr(module, name, counting)
    folder.read(0, 3)
    assert sorted(opened) == ["0.npz", "0.safetensors"]


def test_keyframes_are_near(tmp_path):
    """Of pictures that hardly change: a coder left to itself makes one in 250."""
    frames = np.random.default_rng(0).integers(256, size=(1, 64, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "still.mp4", frames.repeat(100, axis=0), 20)
    keyframes = decord.VideoReader(str(tmp_path / "still.mp4")).get_key_indices()
    assert np.diff([*keyframes, 100]).max() <= 24
