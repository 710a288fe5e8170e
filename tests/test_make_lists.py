"""`scd make-lists`: any folder of videos, and the splits of UCF-101."""

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from scd.cli import main
from scd.data.clips import read_actions
from scd.data.lists import ClipEntry, read_list, write_list
from scd.data.make_lists import ListRequest, latte_split, make_lists, mcvd_split
from scd.data.video import write_video
from scd.data.video_checks import KEPT
from scd.errors import ScdError
from scd.utils.files import read_json

CLASSES = ("Archery", "HammerThrow", "Hammering", "YoYo")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A video of 6 frames."""
    path = tmp_path_factory.mktemp("video") / "v.mp4"
    write_video(path, np.full((6, 16, 16, 3), 99, np.uint8), 8)
    return path.read_bytes()


@pytest.fixture
def video(encoded: bytes) -> Callable[[Path], None]:
    """Writes it to a path."""

    def write(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)

    return write


@pytest.fixture
def root(tmp_path: Path, video: Callable[[Path], None]) -> Path:
    for number in range(10):
        video(tmp_path / f"walks/{number}.mp4")
        np.savez(tmp_path / f"walks/{number}.npz", actions=np.zeros(6, np.int64))
    video(tmp_path / "runs/silent.avi")
    np.savez(tmp_path / "runs/game.npz", video=np.zeros((6, 16, 16, 3), np.uint8), actions=[0] * 6)
    np.savez(tmp_path / "runs/notes.npz", notes=[1])
    video(tmp_path / ".hidden/x.mp4")
    return tmp_path


def test_what_is_there_is_listed(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["make-lists", str(root), "--val-fraction", "0.25"]) == 0
    train, val = read_list(root / "train.json"), read_list(root / "val.json")
    assert (len(train), len(val)) == (9, 3)
    by_video = {str(entry.video_path): entry for entry in train + val}
    assert by_video["walks/3.mp4"] == ClipEntry("walks/3.mp4", "walks/3.npz")
    assert by_video["runs/silent.avi"] == ClipEntry("runs/silent.avi")
    assert by_video["runs/game.npz"] == ClipEntry("runs/game.npz", "runs/game.npz")
    assert len(by_video) == 12
    out = capsys.readouterr().out
    assert f"{root / 'train.json'}: 9 clips" in out and f"{root / 'val.json'}: 3 clips" in out
    assert not (root / "classes.json").exists()


def test_the_split_is_a_function_of_the_names(root: Path, video: Callable[[Path], None]) -> None:
    main(["make-lists", str(root), "--val-fraction", "0.25"])
    first = {entry.video_path for entry in read_list(root / "val.json")}
    names = ["--train-list", "t.json", "--val-list", "v.json", "--val-fraction", "0.25"]
    assert main(["make-lists", str(root), *names]) == 0
    assert (root / "v.json").read_bytes() == (root / "val.json").read_bytes()
    video(root / "walks/new.mp4")
    (root / "t.json").unlink()
    (root / "v.json").unlink()
    main(["make-lists", str(root), *names])
    assert len(first & {entry.video_path for entry in read_list(root / "v.json")}) >= 2


def test_the_share_is_rounded_to_the_nearest_number_of_videos(root: Path) -> None:
    assert main(["make-lists", str(root), "--val-fraction", "0.15"]) == 0
    assert len(read_list(root / "val.json")) == 2  # of 1.8


def test_one_video_is_left_to_train_on(tmp_path: Path, video: Callable[[Path], None]) -> None:
    for number in range(5):
        video(tmp_path / f"{number}.mp4")
    assert main(["make-lists", str(tmp_path), "--val-fraction", "0.95"]) == 0
    assert len(read_list(tmp_path / "train.json")) == 1


def test_two_lists_are_two_files(root: Path, capsys: pytest.CaptureFixture) -> None:
    same = ["--train-list", "a.json", "--val-list", "./a.json"]
    assert main(["make-lists", str(root), *same]) == 1
    assert "is to be both lists" in capsys.readouterr().err


def test_lists_are_not_overwritten(root: Path, capsys: pytest.CaptureFixture) -> None:
    (root / "val.json").write_text("mine")
    assert main(["make-lists", str(root)]) == 1
    assert "val.json: exists already" in capsys.readouterr().err
    assert (root / "val.json").read_text() == "mine" and not (root / "train.json").exists()


def test_labels_are_the_folders_in_alphabetical_order(
    root: Path, video: Callable[[Path], None]
) -> None:
    video(root / "Standing/0.mp4")
    assert main(["make-lists", str(root), "--labels"]) == 0
    assert read_json(root / "classes.json") == ["runs", "Standing", "walks"]
    entries = read_list(root / "train.json") + read_list(root / "val.json")
    assert {(str(e.video_path).split("/")[0], e.label) for e in entries} == {
        ("runs", 0),
        ("Standing", 1),
        ("walks", 2),
    }
    # Another class would give the lists' numbers to others.
    video(root / "ambles/0.mp4")
    others = ["--train-list", "t.json", "--val-list", "v.json"]
    assert main(["make-lists", str(root), "--labels", *others]) == 1
    assert read_json(root / "classes.json") == ["runs", "Standing", "walks"]
    assert not (root / "t.json").exists()
    shutil.rmtree(root / "ambles")
    assert main(["make-lists", str(root), "--labels", *others]) == 0


def test_suffixes_of_any_case(root: Path) -> None:
    for name in ("walks/3.npz", "runs/game.npz"):
        (root / name).rename((root / name).with_suffix(".NPZ"))
    assert main(["make-lists", str(root)]) == 0
    entries = read_list(root / "train.json") + read_list(root / "val.json")
    actions = {str(entry.video_path): entry.actions_in for entry in entries}
    assert actions["walks/3.mp4"] == "walks/3.NPZ"
    assert actions["runs/game.NPZ"] == "runs/game.NPZ"


def test_broken_videos_are_named_and_left_out(root: Path, capsys: pytest.CaptureFixture) -> None:
    whole = (root / "walks/1.mp4").read_bytes()
    (root / "walks/1.mp4").write_bytes(whole[: len(whole) // 2])
    np.savez(root / "walks/2.npz", actions=np.zeros(5, np.int64))
    np.savez(root / "walks/3.npz", actions=np.zeros(7, np.int64))  # more than frames: no harm
    (root / "runs/torn.npz").write_bytes(b"PK")
    assert main(["make-lists", str(root), "--val-fraction", "0.25"]) == 0
    told = capsys.readouterr()
    for name in ("walks/1.mp4", "walks/2.npz: 5 actions for 6 frames", "runs/torn.npz"):
        assert f"left out: {root / name}" in told.err
    assert "left out as broken: 3" in told.out
    listed = {e.video_path for n in ("train", "val") for e in read_list(root / f"{n}.json")}
    assert len(listed) == 10 and not listed & {"walks/1.mp4", "walks/2.mp4", "runs/torn.npz"}


def test_a_stopped_run_keeps_its_checks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("scd.data.make_lists.read_actions", stopped)
    with pytest.raises(KeyboardInterrupt):
        make_lists(ListRequest(root))
    assert "walks/0.mp4" in read_json(root / KEPT)["videos"]


@pytest.mark.parametrize(
    ("files", "arguments", "complaint"),
    [
        ([], [], "no videos below it"),
        (["a.mp4"], [], "too few for two lists"),
        (["x/a.mp4"], ["--labels"], "too few for two lists"),
        (["a.mp4", "b.mp4"], ["--labels"], "a.mp4: lies in no class folder"),
        (["a.mp4", "b.mp4"], ["--val-fraction", "1"], "between 0 and 1"),
        (["x/a.mp4"], ["--split", "ucf101-mcvd"], "not named as in UCF-101"),
    ],
)
def test_what_cannot_be_listed_is_reported(
    tmp_path: Path,
    video: Callable[[Path], None],
    capsys: pytest.CaptureFixture,
    files: list[str],
    arguments: list[str],
    complaint: str,
) -> None:
    for name in files:
        video(tmp_path / name)
    assert main(["make-lists", str(tmp_path), *arguments]) == 1
    assert complaint in capsys.readouterr().err
    lists = {path.name for path in tmp_path.glob("*.json")} - {KEPT}  # checks are kept
    assert not lists
    assert main(["make-lists", str(tmp_path / "no")]) == 1


def ucf101(clips: int = 4) -> list[str]:
    """Names as in UCF-101: 25 groups a class, of some clips each."""
    return [
        f"{name}/v_{name}_g{group:02d}_c{clip:02d}.avi"
        for name in CLASSES
        for group in range(1, 26)
        for clip in range(1, clips + 1)
    ]


def test_the_mcvd_split() -> None:
    train, val = mcvd_split(ucf101()[::-1])
    assert len(train) == 4 * 18 * 4
    assert all(f"_g{group}_" not in name for name in train for group in range(15, 22))
    # 112 test videos, of which eleven tens are whole: places 0, 10, ... 100, class by class.
    assert len(val) == 11
    assert val[:4] == [
        "Archery/v_Archery_g15_c01.avi",
        "Archery/v_Archery_g17_c03.avi",
        "Archery/v_Archery_g20_c01.avi",
        "Hammering/v_Hammering_g15_c03.avi",  # before HammerThrow: case does not count
    ]


def test_the_mcvd_split_has_the_published_size() -> None:
    """Official list 3 has 3 696 test videos; a tenth of them is 369."""
    names = [f"A/v_A_g15_c{clip:04d}.avi" for clip in range(3696)]
    assert len(mcvd_split(names)[1]) == 369


def test_the_latte_split() -> None:
    videos = ucf101(6)[:-100]  # the last class has fewer
    train, val = latte_split(videos)
    assert sorted(train) == sorted(videos) and len(val) == len(videos)
    for count in (4, 7, 50, 200):
        seen = Counter(name.split("/")[0] for name in val[:count])
        assert max(seen.values()) - min(seen.values()) <= 1 and len(seen) == 4
    many = [
        f"{c}/v_{c}_g{g:02d}_c{k:02d}.avi" for c in CLASSES for g in range(99) for k in range(9)
    ]
    assert len(latte_split(many)[1]) == 2048
    with pytest.raises(ScdError, match=r"x\.avi: not named"):
        latte_split(["Archery/x.avi"])


def test_a_split_is_written_with_labels(tmp_path: Path, video: Callable[[Path], None]) -> None:
    for name in CLASSES:
        for group in (1, 15, 16, 20):
            for clip in range(1, 4):
                video(tmp_path / f"{name}/v_{name}_g{group:02d}_c{clip:02d}.avi")
    assert main(["make-lists", str(tmp_path), "--split", "ucf101-mcvd"]) == 0
    assert read_json(tmp_path / "classes.json") == ["Archery", "Hammering", "HammerThrow", "YoYo"]
    train, val = read_list(tmp_path / "train.json"), read_list(tmp_path / "val.json")
    assert (len(train), len(val)) == (12, 3)
    assert [entry.label for entry in train] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert val[1] == ClipEntry("Hammering/v_Hammering_g15_c02.avi", label=1)


@pytest.mark.parametrize(
    "name",
    [
        "Screen Recording at 9.41.07\u202fAM",  # as macOS calls them
        "a\u00a0b",
        "a\u3000b",
        "\U0001f469\u200d\U0001f4bb",  # a woman, a joiner, a laptop
        "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",  # England
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",  # Persian, with a non-joiner
        "a\uf022b",  # how shared folders write a colon
        "\U000104ff",  # of no use in Unicode so far
        "x" * 251,
    ],
)
def test_any_name_is_listed_and_read_again(name: str, tmp_path: Path) -> None:
    for path in (tmp_path / f"{name}.mp4", tmp_path / "other.mp4"):
        write_video(path, np.zeros((6, 32, 32, 3), np.uint8), 8)
    assert main(["make-lists", str(tmp_path), "--val-fraction", "0.5"]) == 0
    names = {read_list(tmp_path / f"{part}.json")[0].video_path for part in ("train", "val")}
    assert names == {f"{name}.mp4", "other.mp4"}
    for part in ("train", "val"):
        assert main(["validate", "--list", str(tmp_path / f"{part}.json")]) == 0


def test_names_that_no_list_holds_are_left_out(tmp_path: Path, video, capfd) -> None:
    good = [f"{number}.mp4" for number in range(6)]
    for name in (b"caf\xe9.mp4", b"line\nbreak.mp4", b"bell\x07.mp4"):
        video(tmp_path / os.fsdecode(name))
    for name in good:
        video(tmp_path / name)
    assert main(["make-lists", str(tmp_path), "--val-fraction", "0.5"]) == 0
    listed = [read_list(tmp_path / f"{part}.json") for part in ("train", "val")]
    assert sorted(str(e.video_path) for entries in listed for e in entries) == good
    err = capfd.readouterr().err
    assert "caf\\udce9.mp4' is not UTF-8: rename it" in err and "\x07" not in err
    assert err.count("has control characters or line breaks: rename it") == 2


def test_a_list_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    for name in ("a\nb.mp4", "../a.mp4", "/a.mp4", "caf\udce9.mp4", "x" * 256):
        with pytest.raises(ScdError, match="entry 0"):
            write_list(tmp_path / "list.json", [ClipEntry(name)])
    assert not (tmp_path / "list.json").exists()


def test_linked_folders_are_followed_and_no_folder_twice(tmp_path: Path, video, capfd) -> None:
    root, disk = tmp_path / "root", tmp_path / "disk"
    video(root / "here/1.mp4")
    video(disk / "2.mp4")
    video(disk / "deep/3.mp4")
    (root / "disk").symlink_to(disk)
    (root / "again").symlink_to(root / "here")  # before it in the alphabet
    (root / "0.mp4").symlink_to(root / "here/1.mp4")
    (root / "4.mp4").symlink_to(disk / "2.mp4")
    video(tmp_path / "elsewhere.mp4")
    (root / "5.mp4").symlink_to(tmp_path / "elsewhere.mp4")
    (disk / "deep/loop").symlink_to(root)
    assert main(["make-lists", str(root), "--val-fraction", "0.4"]) == 0
    listed = [read_list(root / f"{part}.json") for part in ("train", "val")]
    assert sorted(str(e.video_path) for entries in listed for e in entries) == [
        "5.mp4",
        "disk/2.mp4",
        "disk/deep/3.mp4",
        "here/1.mp4",
    ]
    err = capfd.readouterr().err
    assert f"left out: {root / 'again'}: the same folder as {root / 'here'}" in err
    assert f"left out: {root / 'disk/deep/loop'}: the same folder as {root}" in err
    assert f"left out: {root / '0.mp4'}: the same video as {root / 'here/1.mp4'}" in err
    assert f"left out: {root / '4.mp4'}: the same video as {root / 'disk/2.mp4'}" in err


def test_arrays_beside_a_video_that_are_no_actions_are_named(tmp_path: Path, video, capfd) -> None:
    for number in range(2):
        video(tmp_path / f"{number}.mp4")
        np.savez(tmp_path / f"{number}.npz", poses=np.zeros((6, 4)), mouse=[1])
    np.savez(tmp_path / "2.npz", video=np.zeros((6, 16, 16, 3), np.uint8), action=[0] * 6)
    assert main(["make-lists", str(tmp_path), "--val-fraction", "0.4"]) == 0
    listed = [read_list(tmp_path / f"{part}.json") for part in ("train", "val")]
    entries = sorted((e for part in listed for e in part), key=lambda e: str(e.video_path))
    assert entries == [ClipEntry("0.mp4"), ClipEntry("1.mp4"), ClipEntry("2.npz")]
    err = capfd.readouterr().err
    assert f"{tmp_path / '0.npz'}: has no key 'actions', but ['mouse', 'poses']" in err
    assert f"{tmp_path / '2.npz'}: has no key 'actions', but ['action', 'video']" in err
    with pytest.raises(ScdError, match=r"0\.npz: has no key 'actions', but \['mouse', 'poses'\]"):
        read_actions(tmp_path / "0.npz")
