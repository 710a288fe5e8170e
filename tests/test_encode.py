"""Encoding on several processes, and the check of latents before training."""

import multiprocessing
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from accelerate import PartialState

from scd.cli import main
from scd.data import video_checks
from scd.data.clips import clip_folder
from scd.data.latents import latent_header, of_another_video, read_latents, write_latents
from scd.data.lists import read_list, write_list
from scd.data.video import VideoFile, write_video
from scd.errors import ScdError
from scd.models.autoencoder import load_codec
from scd.options import Options, load_options
from scd.training import encode
from scd.training.encode import check_training_latents, encode_dataset, encoding_name
from tests.faults.runs import free_port

ROOT = Path(__file__).parent.parent
TINY = ROOT / "options/scd_doom_tiny.yml"


@pytest.fixture
def root(doom_root: Path, tmp_path: Path) -> Path:
    shutil.copytree(doom_root, tmp_path / "doom")
    return tmp_path / "doom"


@pytest.fixture
def overrides(root: Path, tiny_autoencoder_path: str) -> list[str]:
    return [
        f"data.root={root}",
        f"autoencoder.path={tiny_autoencoder_path}",
        "train.mixed_precision=fp32",
    ]


@pytest.fixture
def options(overrides: list[str]) -> Options:
    return load_options(TINY, overrides)


def encode_twice(
    rank: int, port: int, folder: Path, whole: Path, broken: Path, arguments: list[str]
) -> None:
    """One of two processes. The first time a video is broken, the second time it is mended."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    os.environ.update({key: str(value) for key, value in environment.items()})
    torch.set_num_threads(1)
    PartialState._reset_state()
    with open(folder / f"{rank}.txt", "w") as file, redirect_stdout(file), redirect_stderr(file):
        first = main(arguments)
        PartialState().wait_for_everyone()
        if rank == 0:
            shutil.copy(whole, broken)
        PartialState().wait_for_everyone()
        print(f"first {first}, second {main(arguments)}")


def test_two_processes_share_the_work_and_tell_of_failures(
    root: Path, options: Options, overrides: list[str], tmp_path: Path
) -> None:
    broken, whole = root / "train/00001.mp4", tmp_path / "whole.mp4"
    shutil.copy(broken, whole)
    broken.write_bytes(whole.read_bytes()[:1000])
    listed = (root / "train.json").read_bytes()
    port, arguments = free_port(), ["encode", "--opt", str(TINY), *overrides]
    # Forked, as data loading workers are: interpreters of their own would take ten times longer.
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=encode_twice, args=(rank, port, tmp_path, whole, broken, arguments))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(120)
    finally:
        for process in processes:
            process.kill()
    told = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    for text in told:
        assert "first 1, second 0" in text, text
    # Process 1 has the broken video, the second of three; process 0 hears of it.
    assert f"error: {broken}: not a readable video" in told[1]
    assert "process 1 failed: " in told[0]
    assert "clip/s" in told[0] and "clip/s" not in told[1]  # one progress bar
    entries = read_list(root / "train.json")
    assert [e.video_path for e in entries] == [f"train/0000{n}.mp4" for n in range(3)]
    together = [read_latents(root / str(entry.latent_path)) for entry in entries]
    (root / "train.json").write_bytes(listed)
    shutil.rmtree(root / "latents")
    encode_dataset(options)
    for entry, latents in zip(entries, together, strict=True):
        alone = read_latents(root / str(entry.latent_path))
        torch.testing.assert_close(alone, latents, atol=1e-4, rtol=1e-4)
    assert read_list(root / "train.json") == entries


@pytest.mark.parametrize("most", [encode.PREFETCH_BYTES, 0], ids=["whole videos", "first frames"])
def test_prefetching_changes_nothing(most, root: Path, options: Options, monkeypatch) -> None:
    monkeypatch.setattr(encode, "CHUNK_FRAMES", 16)  # of videos with 40
    found = []
    for options.train.workers in (0, 1, 4):
        monkeypatch.setattr(encode, "PREFETCH_BYTES", most)
        shutil.rmtree(root / "latents", ignore_errors=True)
        encode_dataset(options)
        found.append([read_latents(p) for p in sorted((root / "latents").rglob("*.safetensors"))])
        assert len(found[-1]) == 3
    for plain, one_thread, four_threads in zip(*found, strict=True):
        assert torch.equal(one_thread, plain) and torch.equal(four_threads, plain)


def test_the_next_video_is_read_while_one_is_encoded(options: Options, monkeypatch) -> None:
    read, encoded = [Event() for _ in range(3)], []
    plain_frames, plain_encode = encode._frames, encode._encode_video

    def frames(video, framing):
        found = plain_frames(video, framing)
        read[int(video.path.stem)].set()
        return found

    def encode_video(*arguments):
        following = read[len(encoded) + 1 :][:1]
        assert all(event.wait(60) for event in following)
        encoded.append(plain_encode(*arguments))
        return encoded[-1]

    monkeypatch.setattr(encode, "_frames", frames)
    monkeypatch.setattr(encode, "_encode_video", encode_video)
    options.train.workers = 1
    encode_dataset(options)
    assert len(encoded) == 3


def test_an_error_loses_no_checks(root: Path, options: Options, monkeypatch) -> None:
    """The next run decodes only what the last one did not get to."""
    entries = read_list(root / "train.json")
    last = root / str(entries[-1].video_path)
    good = last.read_bytes()
    last.write_bytes(b"broken")
    (root / "video_checks.json").unlink(missing_ok=True)
    with pytest.raises(ScdError, match=last.name):
        encode_dataset(options)
    last.write_bytes(good)
    checked, check = [], video_checks.check_video
    monkeypatch.setattr(
        video_checks, "check_video", lambda path, *a: (checked.append(path), check(path, *a))[1]
    )
    encode_dataset(options)
    assert checked == [last]


def test_prompts_have_nothing_to_encode(options: Options) -> None:
    prompts = replace(options, data=replace(options.data, source="prompts"))
    with pytest.raises(ScdError, match="no videos to encode"):
        encode_dataset(prompts)


def test_a_video_that_is_listed_twice_is_encoded_once(root: Path, options: Options) -> None:
    first = read_list(root / "train.json")[0]
    write_list(root / "train.json", [first, replace(first, label=1)])
    encode_dataset(options)
    one, other = read_list(root / "train.json")
    assert one.latent_path == other.latent_path and other.label == 1


def test_latents_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    latents = torch.zeros(2, 1, 1, 1)
    latents[1] = float("nan")
    with pytest.raises(ScdError, match=r"l\.safetensors: .* not finite; not written"):
        write_latents(tmp_path / "l.safetensors", latents, "hash")
    assert not list(tmp_path.iterdir())


def test_the_main_process_alone_checks_latents(root, options, monkeypatch):
    encode_dataset(options)
    codec = load_codec(options.autoencoder.path)
    folder = clip_folder(options, "train.json", "latents")
    (root / str(folder.entries[0].latent_path)).unlink()
    monkeypatch.setattr(PartialState, "is_main_process", False)
    check_training_latents(folder, codec, options)
    assert folder.frame_shape == (8, 8, 8)  # which every process goes by
    monkeypatch.setattr(PartialState, "is_main_process", True)
    with pytest.raises(ScdError, match="missing or damaged"):
        check_training_latents(folder, codec, options)


def test_every_entry_is_checked_before_training(root: Path, options: Options) -> None:
    encode_dataset(options)
    codec = load_codec(options.autoencoder.path)
    folder = clip_folder(options, "train.json", "latents")
    check_training_latents(folder, codec, options)
    last = root / str(folder.entries[-1].latent_path)
    whole, latents = last.read_bytes(), read_latents(last)

    def complaint() -> str:
        with pytest.raises(ScdError) as caught:
            check_training_latents(folder, codec, options)
        assert str(last) in str(caught.value)
        return str(caught.value)

    write_latents(last, latents, "another")
    assert "made by another autoencoder" in complaint()
    for wrong in (latents[:, :4], latents[..., :4]):
        write_latents(last, wrong, encoding_name(options))
        assert "but the autoencoder and data.frame_size make 8x8x8" in complaint()
    last.write_bytes(whole[:-8])
    assert "missing or damaged" in complaint()
    last.unlink()
    assert "missing or damaged" in complaint()
    last.write_bytes(whole)
    check_training_latents(folder, codec, options)
    options.data.frame_size = 128
    with pytest.raises(ScdError, match=r"latents of 8x8x8, but .* make 8x16x16"):
        check_training_latents(folder, codec, options)
    options.data.frame_size, options.data.resize_shorter = 64, 64
    with pytest.raises(ScdError, match=r"another data\.resize_shorter"):
        check_training_latents(folder, codec, options)


def test_published_latents_say_nothing_of_their_origin(root: Path, options: Options) -> None:
    entries = read_list(root / "train.json")
    for number, side in enumerate((8, 8, 4)):
        torch.save(torch.zeros(40, 8, side, side), root / f"{number}.pt")
        entries[number] = replace(entries[number], latent_path=f"{number}.pt")
    write_list(root / "train.json", entries)
    codec = load_codec(options.autoencoder.path)
    check_training_latents(clip_folder(options, "train.json", "latents"), codec, options)
    write_list(root / "train.json", entries[::-1])
    with pytest.raises(ScdError, match=r"2\.pt: latents of 8x4x4"):
        check_training_latents(clip_folder(options, "train.json", "latents"), codec, options)


def test_a_video_that_was_replaced_is_encoded_again(
    root: Path, options: Options, overrides: list[str], capsys: pytest.CaptureFixture
) -> None:
    """By one of the same name and length; training and validate refuse what is older."""
    encode_dataset(options)
    folder = clip_folder(options, "train.json", "latents")
    codec = load_codec(str(options.autoencoder.path))
    check_training_latents(folder, codec, options)
    first, second = (folder.entries[i] for i in (0, 1))
    replaced, other = root / str(first.video_path), root / str(second.video_path)
    frames = VideoFile(other).frames(np.arange(len(VideoFile(replaced))))
    write_video(replaced, frames, 8.75)
    os.utime(replaced, (0, 0))  # as one that was made long before, but of another size
    before = [read_latents(root / str(entry.latent_path)) for entry in (first, second)]
    with pytest.raises(ScdError, match=r"latents of another video, .* has changed: run scd encode"):
        check_training_latents(folder, codec, options)
    assert main(["validate", "--opt", str(TINY), *overrides]) == 1
    assert "latents of another video" in capsys.readouterr().out
    kept = (root / str(second.latent_path)).stat().st_mtime_ns
    encode_dataset(options)
    after = [read_latents(root / str(entry.latent_path)) for entry in (first, second)]
    assert not torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])
    assert (root / str(second.latent_path)).stat().st_mtime_ns == kept  # nothing else was
    check_training_latents(folder, codec, options)


def test_a_video_of_the_same_size_that_was_replaced(root: Path, options: Options) -> None:
    """At a run's start it is read again if it is younger than its latents; by encode always."""
    encode_dataset(options)
    folder = clip_folder(options, "train.json", "latents")
    codec = load_codec(str(options.autoencoder.path))
    entry = folder.entries[0]
    path, video = root / str(entry.latent_path), root / str(entry.video_path)
    header = latent_header(path)
    data = bytearray(video.read_bytes())
    data[-1] ^= 1
    video.write_bytes(data)
    with pytest.raises(ScdError, match="latents of another video"):
        check_training_latents(folder, codec, options)
    os.utime(video, (0, 0))
    check_training_latents(folder, codec, options)
    assert of_another_video(header, path, video) is not None
    write_latents(
        path, read_latents(path), encoding_name(options)
    )  # as older ones, it says nothing
    assert of_another_video(latent_header(path), path, video) is None


@pytest.mark.parametrize("name", ["x" * 239, "x" * 240, "x" * 251, "\u3042" * 83])
def test_videos_of_the_longest_names_have_latents(name: str, root: Path, options: Options) -> None:
    """A file's name has 255 bytes at most, and latents' names are longer than their videos'."""
    first = read_list(root / "train.json")[0]
    (root / str(first.video_path)).rename(root / f"{name}.mp4")
    write_list(root / "train.json", [replace(first, video_path=f"{name}.mp4")])
    encode_dataset(options)
    [entry] = read_list(root / "train.json")
    assert len(read_latents(root / str(entry.latent_path))) == 40
    assert len(Path(str(entry.latent_path)).name.encode()) <= 255
    assert not [path.name for path in root.rglob(".*") if path.is_file()]
    before = (root / str(entry.latent_path)).stat().st_mtime_ns
    encode_dataset(options)  # it is there already
    assert (root / str(entry.latent_path)).stat().st_mtime_ns == before
