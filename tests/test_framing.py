"""Scaling, cropping and mirroring of videos, and clips that are kept in npz files."""

import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from scd.data.clips import ClipFolder, clip_folder
from scd.data.framing import Framing, resize_shorter
from scd.data.latents import read_latents
from scd.data.lists import ClipEntry, read_list, write_list
from scd.data.loader import (
    FRAMING_STREAM,
    HELD_OUT_STREAM,
    ORDER_STREAM,
    START_STREAM,
    StepSampler,
    TrainingClips,
)
from scd.data.video import NpzVideo, write_video
from scd.errors import ScdError
from scd.evaluation.protocol import EVALUATION_STREAM
from scd.models.autoencoder import load_codec
from scd.options import load_options
from scd.training.encode import encode_dataset
from scd.utils.files import read_npz

ROOT = Path(__file__).parent.parent
PATH = Path("clip.mp4")


def numbered(frames: int, height: int, width: int) -> torch.Tensor:
    """Channel 0 holds a pixel's row, channel 1 its column, channel 2 the frame."""
    video = torch.zeros(frames, 3, height, width, dtype=torch.uint8)
    video[:, 0] = torch.arange(height)[:, None]
    video[:, 1] = torch.arange(width)
    video[:, 2] = torch.arange(frames)[:, None, None]
    return video


# --- Geometry


def test_the_center_is_taken_without_a_draw() -> None:
    out = Framing(4, resize_shorter=6, mirror=True)(numbered(3, 6, 11), PATH)
    assert out.shape == (3, 3, 4, 4)
    assert out[0, 0, :, 0].tolist() == [1, 2, 3, 4]  # of 0..5
    assert out[0, 1, 0].tolist() == [3, 4, 5, 6]  # of 0..10, not mirrored


def test_draws_reach_every_place_and_both_sides() -> None:
    framing = Framing(4, resize_shorter=6, mirror=True)
    video, places = numbered(3, 6, 8), set()
    for seed in range(300):
        out = framing(video, PATH, np.random.default_rng(seed))
        steps = out[0, 1, 0].int().diff().unique().tolist()
        assert steps in ([1], [-1])
        # One geometry for all frames, which stay in order.
        assert torch.equal(out[:, :2], out[:1, :2].expand(3, -1, -1, -1))
        assert out[:, 2, 0, 0].tolist() == [0, 1, 2]
        places.add((int(out[0, 0].min()), int(out[0, 1].min()), steps[0]))
    assert places == {(top, left, s) for top in range(3) for left in range(5) for s in (1, -1)}
    for seed in range(20):
        still = Framing(4, resize_shorter=6)(video, PATH, np.random.default_rng(seed))
        assert still[0, 1, 0].int().diff().tolist() == [1, 1, 1]


def test_another_size_is_refused_where_nothing_scales() -> None:
    framing = Framing(8)
    assert torch.equal(framing(numbered(2, 8, 8), PATH), numbered(2, 8, 8))
    for height, width in ((8, 9), (9, 8), (16, 16)):
        with pytest.raises(ScdError, match=rf"{PATH}: frames of {height}x{width}.*resize_shorter"):
            framing(numbered(2, height, width), PATH)


def test_scaling_keeps_the_shape_of_things_and_does_not_alias() -> None:
    assert resize_shorter(numbered(1, 240, 320), 64).shape[-2:] == (64, 85)
    assert resize_shorter(numbered(1, 320, 240), 64).shape[-2:] == (85, 64)
    assert resize_shorter(numbered(1, 240, 320), 128).shape[-2:] == (128, 171)  # of 170.7
    assert resize_shorter(numbered(1, 20, 30), 40).shape[-2:] == (40, 60)
    ramp = resize_shorter(numbered(1, 128, 128), 32)[0, 1, 0].float()
    assert (ramp - (torch.arange(32) * 4 + 1.5)).abs()[2:-2].max() <= 1
    stripes = (numbered(1, 128, 128) % 2) * 255  # of one pixel: grey from afar
    for side in (32, 40):  # by a whole factor, taps may cancel the stripes anyway
        grey = resize_shorter(stripes, side)[0, 1, :, 1:-1].float()
        assert (grey - 127.5).abs().max() < 4


def test_the_name_tells_crops_apart() -> None:
    """Latents of an experiment lie in a folder of this name."""
    names = [Framing(32, resize_shorter=40, width=width).name for width in (None, 48, 64)]
    assert names == [f"-resize40-crop{crop}" for crop in ("32", "32x48", "32x64")]
    assert Framing(32, width=48).name == ""


@pytest.fixture(scope="module")
def wide_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 videos of 48x80 pixels whose columns can be told apart, in both lists, with labels."""
    root = tmp_path_factory.mktemp("wide")
    for name in "abc":
        shades = np.linspace(20, 230, 80)[None, :] * np.ones((48, 1))
        frames = np.stack([np.stack([shades, shades, shades], -1) for _ in range(10)])
        write_video(root / f"{name}.mp4", frames.astype(np.uint8), 8)
    for name in ("train.json", "val.json"):
        write_list(root / name, [ClipEntry(f"{n}.mp4", label=i) for i, n in enumerate("abc")])
    return root


def wide_options(root: Path, *overrides: str):
    return load_options(
        ROOT / "options/scd_doom_tiny.yml",
        [
            f"data.root={root}",
            "data.source=video",
            "data.resize_shorter=40",
            "data.frame_size=32",
            "data.mirror=true",
            "data.action_names=[]",
            "model.condition=label",
            "model.num_conditions=3",
            "eval.swapped_actions=[]",
            *overrides,
        ],
    )


def test_crops_are_a_function_of_seed_and_sample(wide_root: Path) -> None:
    def load(workers: int, seed: int = 5) -> list[torch.Tensor]:
        folder = clip_folder(wide_options(wide_root), "train.json", "video")
        clips = TrainingClips(folder, 4, 1, seed)
        sampler = StepSampler(2, 0, 1, 0, 4)
        loader = DataLoader(clips, batch_sampler=sampler, num_workers=workers)
        return [batch["video"].float() for batch in loader]

    alone, with_workers, other = load(0), load(2), load(0, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(alone, with_workers, strict=True))
    assert alone[0].shape == (2, 4, 3, 32, 32)
    assert any(not torch.equal(a, b) for a, b in zip(alone, other, strict=True))
    slopes = [float(clip[0, 0, 0].diff().sum()) for batch in alone for clip in batch]
    assert min(slopes) < 0 < max(slopes)  # some are mirrored


def test_no_two_draws_share_a_stream() -> None:
    """Where a clip begins would tell where it is cropped."""
    streams = [ORDER_STREAM, START_STREAM, FRAMING_STREAM, HELD_OUT_STREAM, EVALUATION_STREAM]
    assert len(set(streams)) == len(streams)


def test_evaluation_and_latents_see_the_center(
    wide_root: Path, tmp_path: Path, tiny_autoencoder_path: str
) -> None:
    root = tmp_path / "wide"
    shutil.copytree(wide_root, root)
    options = wide_options(
        root,
        "data.mirror=false",
        f"autoencoder.path={tiny_autoencoder_path}",
        "train.mixed_precision=fp32",
    )
    folder = clip_folder(options, "val.json", "video")
    clip = folder.read(0, 4, rng=np.random.default_rng(0))["video"]
    assert float((clip[..., 15] + clip[..., 16]).mean()) == pytest.approx(250 / 255, abs=0.02)
    encode_dataset(options)
    path = root / str(read_list(root / "train.json")[0].latent_path)
    assert path.parent.name.endswith("-resize40-crop32")
    codec = load_codec(tiny_autoencoder_path)
    direct = codec.encode(clip[None])[0, 0]
    torch.testing.assert_close(codec.scale(read_latents(path))[0], direct, atol=1e-4, rtol=1e-4)


# --- Clips in npz files


def write_clip(path: Path, frames: int = 12, **others: np.ndarray) -> np.ndarray:
    video = numbered(frames, 8, 8).permute(0, 2, 3, 1).numpy()
    np.savez_compressed(path, video=video, **others)
    return video


def test_npz_clips_look_like_videos(tmp_path: Path) -> None:
    video = write_clip(tmp_path / "clip.npz", actions=np.arange(12) % 3)
    np.savez(tmp_path / "other.npz", actions=np.ones(12, int))
    write_list(
        tmp_path / "l.json",
        [ClipEntry("clip.npz"), ClipEntry("clip.npz", "other.npz"), ClipEntry("clip.npz", None)],
    )
    folder = ClipFolder(tmp_path, "l.json", "video", "action", 3)
    assert folder.length(0) == 12
    clip = folder.read(0, 4, rng=np.random.default_rng(3))
    start = int(np.random.default_rng(3).integers(9))
    expected = torch.from_numpy(video[start : start + 4]).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(clip["video"], expected)
    assert clip["actions"].tolist() == [i % 3 for i in range(start, start + 4)]
    assert folder.read(1, 4)["actions"].tolist() == [1, 1, 1, 1]
    assert np.array_equal(NpzVideo(tmp_path / "clip.npz").frames(np.array([7, 0])), video[[7, 0]])
    with pytest.raises(ScdError, match="12 frames, so there is no frame 12"):
        NpzVideo(tmp_path / "clip.npz").frames(np.array([0, 12]))


def announcing(shape: tuple[int, ...]) -> bytes:
    """An npz whose header announces an array that is not there."""
    header, archive = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("video.npy", header.getvalue())
    return archive.getvalue()


@pytest.mark.parametrize(
    ("write", "complaint"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(b"no zip"), "not an npz file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "not an npz file"),
        (lambda path: np.savez(path, frames=np.zeros(3)), "'video'"),
        (lambda path: np.savez(path, video=np.zeros((3, 8, 8, 3))), "must be uint8"),
        (lambda path: np.savez(path, video=np.zeros((3, 8, 8), np.uint8)), "must be uint8"),
        (lambda path: np.savez(path, video=np.zeros((0, 8, 8, 3), np.uint8)), "must be uint8"),
        (lambda path: np.savez(path, video=np.array([{}])), "must be uint8"),
        (lambda path: path.write_bytes(announcing((9, 8, 8, 3))), "no npz file with a key"),
        (lambda path: path.write_bytes(announcing((2**40, 8, 8, 3))), "read at once"),
        (lambda path: write_clip(path, 3), "3 frames, but the clip needs 4"),
    ],
)
def test_wrong_npz_clips_are_refused(tmp_path: Path, write: Callable, complaint: str) -> None:
    path = tmp_path / "clip.npz"
    write_clip(path)
    write_list(tmp_path / "l.json", [ClipEntry("clip.npz")])
    folder = ClipFolder(tmp_path, "l.json", "video")
    folder.read(0, 4)
    write(path)
    with pytest.raises(ScdError) as caught:
        folder.read(0, 4)
    assert str(path) in str(caught.value) and complaint in str(caught.value)


def test_large_arrays_are_refused_before_they_are_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", actions=np.zeros(1000, np.int64))
    assert read_npz(tmp_path / "a.npz", "actions").shape == (1000,)
    with pytest.raises(ScdError, match=r"a\.npz: 'actions' has .* GiB"):
        read_npz(tmp_path / "a.npz", "actions", most=7999)
