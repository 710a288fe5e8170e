"""Frame i is the i-th that decoding in order gives, whatever a file says of its key frames."""

import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from scd.cli import main
from scd.data import video_checks
from scd.data.clips import ClipFolder, clip_folder, with_float_pixels
from scd.data.lists import ClipEntry, read_list, write_list
from scd.data.loader import TrainingClips
from scd.data.sequential_video import InOrderVideo, decode, remedy
from scd.data.video import VideoFile, write_video
from scd.data.video_checks import (
    KEPT,
    WHOLE_BYTES,
    X264_SETTINGS,
    VideoChecks,
    check_video,
    decoder,
    identity_of,
)
from scd.errors import ScdError
from scd.options import load_options
from scd.utils.files import read_json

# Videos of other encoders, whose pictures show their number; README.md there says how.
REPORTS = Path(__file__).parents[2] / "shared" / "reports"
TINY = str(Path(__file__).parent.parent / "options/scd_doom_tiny.yml")
SEEK_WRONGLY = ["hevc_gop30.mp4", "mpeg2.mkv", "h264_bf.avi", "trim_copy_gop25_ss2.9.mp4"]
CANNOT_SEEK = ["av1_svt.mp4", "live_no_duration.webm"]
FRAMES = {
    **{"hevc_gop30.mp4": 200, "mpeg2.mkv": 120, "h264_bf.avi": 120},
    **{"trim_copy_gop25_ss2.9.mp4": 327, "av1_svt.mp4": 60, "live_no_duration.webm": 120},
}
FIRST_SHOWN = {"trim_copy_gop25_ss2.9.mp4": 73}  # it was cut out of a longer one


def drawn(count: int) -> np.ndarray:
    """(count, 64, 64, 3) frames that show their number: ten bits, in two rows of five squares."""
    frames = np.full((count, 64, 64, 3), 20, np.uint8)
    for number in range(count):
        for bit in range(10):
            if number >> bit & 1:
                top, left = bit // 5 * 16, bit % 5 * 12
                frames[number, top : top + 16, left : left + 12] = 230
    return frames


def shown(frames: np.ndarray) -> list[int]:
    """The numbers that frames (n, 64, 64, 3) show."""
    bright = frames.mean(-1) > 127
    bits = [(16 * row + 8, 12 * column + 6) for row in (0, 1) for column in range(5)]
    return [sum(int(frame[bits[k]]) << k for k in range(10)) for frame in bright]


def ffmpeg(*arguments: str | Path) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True)


@pytest.fixture(scope="module")
def reports() -> Path:
    if not REPORTS.is_dir():
        pytest.skip(f"{REPORTS} is absent: no videos of other encoders to test with")
    return REPORTS


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole.mp4`, as the project writes it; put into avi, and cut, without coding it anew."""
    root = tmp_path_factory.mktemp("generated")
    write_video(root / "whole.mp4", drawn(400), 25)
    ffmpeg("-i", root / "whole.mp4", "-c", "copy", root / "copied.avi")
    ffmpeg("-ss", "12.5", "-i", root / "whole.mp4", "-c", "copy", root / "cut.mp4")
    still = np.concatenate([drawn(20), np.full((180, 64, 64, 3), 99, np.uint8)])
    write_video(root / "still.mp4", still, 25)
    for video in root.iterdir():
        actions = video.with_suffix(".npz")
        np.savez(actions, actions=np.arange(400))
    return root


def check_clips(root: Path, first_shown: dict[str, int], kinds: int = 1024) -> None:
    """Random training clips and those of evaluation show the frames that their actions count.

    Args:
        kinds: of actions: they start again at 0 after so many.
    """
    for list_file in ("train.json", "val.json"):
        folder = ClipFolder(root, list_file, "video", "action", kinds)
        training = TrainingClips(folder, frames=6, stride=3, seed=1)
        clips = [(training.number(sample), training[sample]) for sample in range(6 * len(folder))]
        clips += [(number, folder.read(number, 40)) for number in range(len(folder))]
        for number, clip in ((number, with_float_pixels(clip)) for number, clip in clips):
            video = str(folder.entries[number].video_path)
            pictures = (clip["video"].permute(0, 2, 3, 1) * 255).numpy()
            offset = first_shown.get(Path(video).name, 0)
            counted = [(n - offset) % kinds for n in shown(pictures)]
            assert counted == clip["actions"].tolist(), video


def test_clips_of_other_encoders(
    reports: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, frames in FRAMES.items():
        shutil.copy(reports / name, tmp_path)
        np.savez((tmp_path / name).with_suffix(".npz"), actions=np.arange(frames))
        if name in SEEK_WRONGLY:  # or this test shows nothing
            video = VideoFile(tmp_path / name)
            places = np.arange(5, frames, 13)
            seeks = [VideoFile(tmp_path / name).frames(places[i : i + 1])[0] for i in range(9)]
            offset = FIRST_SHOWN.get(name, 0)
            assert len(video) != frames or shown(np.stack(seeks)) != list(places[:9] + offset)
    shutil.copy(reports / "audio_only.mp4", tmp_path)
    assert main(["make-lists", str(tmp_path), "--val-fraction", "0.4"]) == 0
    told = capsys.readouterr()
    assert "audio_only.mp4: has no pictures, perhaps only sound" in told.err
    for half in ("train.json", "val.json"):
        assert f"{half}: slow videos: 3. Seeking in them fails or yields other frames" in told.out
    assert told.out.count("To make a fast one that replaces a slow one: ffmpeg -i ") == 2
    checks = read_json(tmp_path / KEPT)["videos"]
    assert {name: check["frames"] for name, check in checks.items()} == FRAMES
    assert not any(check["random_access"] for check in checks.values())
    check_clips(tmp_path, FIRST_SHOWN)
    # What was found is kept: nothing is decoded to find it again.
    monkeypatch.setattr("scd.data.video_checks.decode", lambda path: pytest.fail(str(path)))
    check_clips(tmp_path, FIRST_SHOWN)


def test_actions_beside_the_videos_of_other_encoders(reports: Path, tmp_path: Path) -> None:
    """Without lists' checks, and with the actions as they came."""
    names = SEEK_WRONGLY
    for name in names:
        for file in (name, f"{Path(name).stem}.npz"):
            shutil.copy(reports / file, tmp_path)
    entries = [ClipEntry(name, f"{Path(name).stem}.npz") for name in names]
    write_list(tmp_path / "train.json", entries)
    write_list(tmp_path / "val.json", entries[::-1])
    check_clips(tmp_path, FIRST_SHOWN, kinds=4)
    assert not (tmp_path / KEPT).exists()


def test_generated_clips(generated: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = tmp_path / "data"
    shutil.copytree(generated, root)
    (root / "still.mp4").unlink()
    first = shown(next(InOrderVideo(root / "cut.mp4", 1, (64, 64)).chunks(1)))[0]
    assert 290 < first < 320
    assert main(["make-lists", str(root), "--val-fraction", "0.4"]) == 0
    checks = VideoChecks(root)
    assert checks.check("whole.mp4").random_access and checks.check("whole.mp4").frames == 400
    assert isinstance(checks.open("whole.mp4"), VideoFile)
    assert checks.check("cut.mp4").frames == 400 - first < len(VideoFile(root / "cut.mp4"))
    assert not checks.check("cut.mp4").random_access
    assert not checks.check("copied.avi").random_access
    check_clips(root, {"cut.mp4": first})


def test_a_cut_video_of_one_key_frame(tmp_path: Path) -> None:
    """Nowhere to seek to, but more frames told than there are."""
    write_video(tmp_path / "whole.mp4", np.repeat(drawn(5) // 4, 4, axis=0), 25)
    ffmpeg("-ss", "0.4", "-i", tmp_path / "whole.mp4", "-c", "copy", tmp_path / "cut.mp4")
    told = VideoFile(tmp_path / "cut.mp4")
    assert told.key_frames == [0] and len(told) == 20
    check = VideoChecks(tmp_path).check("cut.mp4")
    assert check.frames == 10 and not check.random_access


def test_repeated_pictures_are_frames(generated: Path) -> None:
    check = VideoChecks(generated).check("still.mp4")
    assert check.frames == 200 and check.random_access and check.fps == 25


def test_colors_that_another_decoder_rounds_otherwise(
    generated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another(path: Path) -> object:
        found = decode(path)
        return type(found)([s + 1 for s in found.sums], found.height, found.width, found.fps)

    monkeypatch.setattr("scd.data.video_checks.decode", another)
    checks = VideoChecks(generated)
    checked = [checks.check(name).random_access for name in ("whole.mp4", "copied.avi")]
    monkeypatch.undo()
    assert checked == [True, False]


@pytest.mark.parametrize("axis", [1, 2])
def test_mirrored_videos_are_read_as_players_show_them(tmp_path: Path, axis: int) -> None:
    write_video(tmp_path / "plain.mp4", drawn(20), 25)
    flip = ["-display_vflip:v:0", "-display_hflip:v:0"][axis - 1]
    ffmpeg(flip, "-i", tmp_path / "plain.mp4", "-c", "copy", tmp_path / "mirrored.mp4")
    (tmp_path / "plain.mp4").unlink()
    frames = VideoChecks(tmp_path).open("mirrored.mp4").frames(np.arange(20))
    assert shown(np.flip(frames, axis)) == list(range(20))


def test_frames_behind_a_change_of_size(tmp_path: Path) -> None:
    """Counted from the beginning, not from where the size changed."""
    small, large = drawn(30), np.repeat(np.repeat(drawn(60)[:, :, :], 2, 1), 2, 2)[:, :96, :96]
    for name, frames in (("small", small), ("large", large)):
        write_video(tmp_path / f"{name}.mp4", frames, 25)
        ffmpeg("-i", tmp_path / f"{name}.mp4", "-c", "copy", tmp_path / f"{name}.ts")
    both = (tmp_path / "small.ts").read_bytes() + (tmp_path / "large.ts").read_bytes()
    (tmp_path / "both.ts").write_bytes(both)
    video = InOrderVideo(tmp_path / "both.ts", 90, (64, 64))
    straight = np.concatenate(list(video.chunks(16)))
    assert len(straight) == 90
    indices = np.arange(40, 46)
    assert np.array_equal(video.frames(indices), straight[indices])


def test_what_another_decoder_found_does_not_count(
    generated: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copy(generated / "whole.mp4", tmp_path)
    VideoChecks(tmp_path).check_all(["whole.mp4"])
    assert "whole.mp4" in VideoChecks(tmp_path)
    monkeypatch.setattr("scd.data.video_checks.decoder", lambda: "decord2 9.9")
    assert "whole.mp4" not in VideoChecks(tmp_path)


def test_a_video_that_was_replaced_is_checked_again(generated: Path, tmp_path: Path) -> None:
    shutil.copy(generated / "cut.mp4", tmp_path / "v.mp4")
    VideoChecks(tmp_path).check_all(["v.mp4"])
    assert "v.mp4" in VideoChecks(tmp_path) and "w.mp4" not in VideoChecks(tmp_path)
    kept = VideoChecks(tmp_path).check("v.mp4")
    shutil.copy(tmp_path / "v.mp4", tmp_path / "w.mp4")  # a copy is the same
    assert VideoChecks(tmp_path).check("w.mp4") == kept
    shutil.copy(generated / "whole.mp4", tmp_path / "v.mp4")
    checks = VideoChecks(tmp_path)
    assert len(checks.open("v.mp4")) == 400 and checks.check("v.mp4").random_access
    checks.save()
    assert VideoChecks(tmp_path)._kept["v.mp4"].frames == 400


def test_checks_that_another_process_saves_meanwhile_stay(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, drawn(4), 25)
    one, other = VideoChecks(tmp_path), VideoChecks(tmp_path)
    one.check("a.mp4")
    other.check("b.mp4")
    one.save()
    other.save()
    assert read_json(tmp_path / KEPT)["videos"].keys() == {"a.mp4", "b.mp4"}


def test_both_ends_of_a_large_file_identify_it(tmp_path: Path) -> None:
    for name, place in (("whole", None), ("copy", None), ("first", 0), ("last", -1)):
        content = bytearray(2 * WHOLE_BYTES)
        if place is not None:
            content[place] = 1
        (tmp_path / name).write_bytes(content)
    whole, copy, first, last = (
        identity_of(tmp_path / name) for name in ("whole", "copy", "first", "last")
    )
    assert whole == copy and len({whole, first, last}) == 3


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"videos": {"v.mp4": 1}}', '{"videos": {"v.mp4": {"frames": 3}}}', "{"]
)
def test_a_damaged_file_of_checks_is_refused(tmp_path: Path, text: str) -> None:
    text = text.replace('{"videos"', f'{{"decoder": "{decoder()}", "videos"')
    (tmp_path / KEPT).write_text(text)
    with pytest.raises(ScdError, match=KEPT):
        assert "v.mp4" in VideoChecks(tmp_path)


def test_only_videos_encoded_like_the_first_share_its_check(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), np.uint8)
    write_video(tmp_path / "first.mp4", frames, 8)
    write_video(tmp_path / "alike.mp4", frames[::-1], 8)
    write_video(tmp_path / "short.mp4", frames[:59], 8)
    write_video(tmp_path / "small.mp4", frames[:, :32], 8)
    write_video(tmp_path / "fast.mp4", frames, 9)
    write_video(tmp_path / "coarse.mp4", frames, 8, crf=20)
    whole = (tmp_path / "alike.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    settings = X264_SETTINGS.search(whole)
    assert settings is not None and b"open_gop=0" in settings[0] and b"keyint=24" in settings[0]
    (tmp_path / "mute.mp4").write_bytes(whole.replace(b"x264 - core", b"x265 - core"))
    videos = sorted(path.name for path in tmp_path.glob("*.mp4"))
    checks = VideoChecks(tmp_path)
    checks.check_alike(["first.mp4", *videos])
    assert checks.new.keys() == {"first.mp4", "alike.mp4"}
    for name, check in checks.new.items():
        assert check == check_video(tmp_path / name, identity_of(tmp_path / name))
    checks = VideoChecks(tmp_path)
    checks.check_alike(["mute.mp4", *videos])  # nothing is known of its encoder
    assert checks.new.keys() == {"mute.mp4"}


def test_nothing_is_like_a_video_that_cannot_be_sought_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, np.zeros((4, 32, 32, 3), np.uint8), 8)
    monkeypatch.setattr(video_checks, "_seeking_is_right", lambda *_: False)
    video_checks.check_video.cache_clear()
    checks = VideoChecks(tmp_path)
    checks.check_alike(["a.mp4", "b.mp4"])
    assert checks.new.keys() == {"a.mp4"} and checks.in_order(["a.mp4"]) == ["a.mp4"]
    video_checks.check_video.cache_clear()


def test_reading_in_order(generated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = InOrderVideo(generated / "whole.mp4", 400, (64, 64))
    assert shown(video.frames(np.array([301, 0, 7, 301]))) == [301, 0, 7, 301]
    assert [shown(part)[0] for part in video.chunks(150)] == [0, 150, 300]
    assert [len(part) for part in video.chunks(150)] == [150, 150, 100]
    with pytest.raises(ScdError, match="400 frames, so there is no frame 400"):
        video.frames(np.array([400]))
    longer = InOrderVideo(generated / "whole.mp4", 402, (64, 64))
    for read in (lambda: longer.frames(np.arange(390, 402)), lambda: list(longer.chunks(100))):
        with pytest.raises(ScdError, match=r"damaged video .decoding ended at frame 400 of 402"):
            read()
    monkeypatch.setattr("scd.data.video.MAX_ARRAY_BYTES", 4 * 64 * 64 * 3)
    assert video.frames(np.arange(4)).shape == (4, 64, 64, 3)
    with pytest.raises(ScdError, match="5 frames of 64x64 pixels are more than"):
        video.frames(np.arange(5))


@pytest.mark.parametrize("name", ["copied.avi", "cut.mp4", *SEEK_WRONGLY, *CANNOT_SEEK])
def test_the_remedy_helps(
    generated: Path, tmp_path: Path, request: pytest.FixtureRequest, name: str
) -> None:
    origin = generated if (generated / name).exists() else request.getfixturevalue("reports")
    shutil.copy(origin / name, tmp_path / f"a {name}")  # a name to quote
    ffmpeg(*shlex.split(remedy(tmp_path / f"a {name}"))[1:])
    checks = VideoChecks(tmp_path)
    before, after = checks.check(f"a {name}"), checks.check(f"a {Path(name).stem}-new.mp4")
    assert after.random_access and after.frames == before.frames
    places = np.array([3, after.frames // 2, after.frames - 1])
    new = checks.open(f"a {Path(name).stem}-new.mp4").frames(places)
    assert shown(new) == shown(checks.open(f"a {name}").frames(places))


@pytest.mark.parametrize(
    ("suffix", "told"), [("avi", "a video without a single frame"), ("mp4", "has no pictures")]
)
def test_a_video_without_frames_is_reported(tmp_path: Path, suffix: str, told: str) -> None:
    write_video(tmp_path / "v.mp4", drawn(5), 25)
    ffmpeg("-i", tmp_path / "v.mp4", "-c", "copy", "-frames:v", "0", tmp_path / f"none.{suffix}")
    with pytest.raises(ScdError, match=rf"none\.{suffix}: {told}"):
        VideoChecks(tmp_path).check(f"none.{suffix}")


@pytest.fixture
def validate(tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[[Path], tuple[str, dict]]:
    """Output and report of `scd validate` for a list."""

    def run(list_path: Path) -> tuple[str, dict]:
        report = tmp_path / "report.json"
        assert main(["validate", "--list", str(list_path), "--json", str(report)]) == 0
        return capsys.readouterr().out, read_json(report)

    return run


def test_validate_tells_what_is_slow_and_of_another_rate(
    generated: Path, tmp_path: Path, validate: Callable[[Path], tuple[str, dict]]
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for name in ("whole.mp4", "copied.avi"):
        shutil.copy(generated / name, root)
    write_video(root / "ntsc.mp4", drawn(40), 24.98)
    write_list(root / "l.json", [ClipEntry(n) for n in ("whole.mp4", "copied.avi", "ntsc.mp4")])
    out, report = validate(root / "l.json")
    assert "l.json: slow videos: 1. Seeking in them fails or yields other frames" in out
    assert remedy(root / "copied.avi") in out
    assert report["lists"][0]["in_order"] == ["copied.avi"]
    assert len(report["warnings"]) == 1  # 24.98 and 25 are no difference
    assert (root / KEPT).exists()
    write_video(root / "slow.mp4", drawn(40), 10)
    write_list(root / "l.json", [ClipEntry(name) for name in ("whole.mp4", "slow.mp4")])
    out, report = validate(root / "l.json")
    assert report["lists"][0]["fps"] == {"10.0": 1, "25.0": 1}
    assert [line for line in report["warnings"] if "10 to 25 frames per second" in line]
    assert "25: 1, 10: 1" in out


def test_videos_that_are_not_checked_yet_are_reported(
    doom_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = tmp_path / "doom"
    shutil.copytree(doom_root, root)
    options = load_options(TINY, [f"data.root={root}"])
    clip_folder(options, "train.json", "video")
    assert not capsys.readouterr().err  # the recorder checks what it lists
    (root / KEPT).unlink()
    clip_folder(options, "train.json", "video")
    assert "3 of 3 videos are not checked yet" in capsys.readouterr().err
    assert len(read_list(root / "train.json")) == 3
