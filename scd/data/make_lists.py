"""Write a training and a validation list for any folder of videos, with actions and labels."""

import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from scd.data.clips import read_actions
from scd.data.lists import ClipEntry, path_problem, write_list
from scd.data.video_checks import VideoChecks, slow_reading_note
from scd.errors import ScdError
from scd.utils.files import npz_keys, read_json, write_json
from scd.utils.paths import why_missing

VIDEO_SUFFIXES = (".mp4", ".avi", ".webm", ".mkv", ".mov", ".m4v")
CLASSES = "classes.json"
# UCF-101
TEST_GROUPS = range(15, 22)
EVERY = 10
BALANCED_VIDEOS = 2048


@dataclass(frozen=True)
class ListRequest:
    """The arguments of `make_lists`.

    Args:
        root: folder that is searched for videos; the paths in the lists are relative to it.
        train_list, val_list: names of the list files, which are written into `root`.
        split: `fraction`, or a key of `SPLITS`.
        val_fraction: share of the videos for validation, with `fraction`.
        labels: label each video with the class of the folder that it lies in.
    """

    root: Path
    train_list: str = "train.json"
    val_list: str = "val.json"
    split: str = "fraction"
    val_fraction: float = 0.05
    labels: bool = False


def make_lists(request: ListRequest) -> None:
    """Write a training and a validation list, and print how many clips they hold.

    A video `x.mp4` gets the actions of `x.npz` beside it; an `.npz` with `video` is a clip itself.
    Linked folders are followed, each folder once. Every video is decoded and checked
    (`scd.data.video_checks`). Videos that cannot be read, have fewer actions than frames, or have
    a name that a list cannot hold, are named and left out. Classes are numbered in alphabetical
    order, without regard to case; `classes.json` names them.

    Raises:
        ScdError: a list exists already, or fewer than two videos can be used.
    """
    root = request.root
    targets = [root / request.train_list, root / request.val_list]
    if targets[0].resolve() == targets[1].resolve():
        raise ScdError(f"{targets[0]}: is to be both lists: give --val-list another name")
    for path in targets:
        if path.exists():
            raise ScdError(
                f"{path}: exists already: move it away, or choose other names with --train-list "
                f"and --val-list"
            )
    if not 0 < request.val_fraction < 1:
        raise ScdError(f"--val-fraction must lie between 0 and 1, not {request.val_fraction}")
    entries = dict(_clips(root, _files(root)))
    if not entries:
        kinds = ", ".join((*VIDEO_SUFFIXES, ".npz"))
        raise ScdError(f"{root}: no videos below it ({kinds}; an npz needs the key 'video')")
    if request.split == "fraction":
        train, val = _by_fraction(list(entries), request.val_fraction)
    else:
        train, val = SPLITS[request.split](list(entries))
    classes = None
    if request.labels or request.split != "fraction":
        entries, classes = _with_labels(root, entries)
    checks = VideoChecks(root)
    try:
        broken = _broken(checks, entries)
    finally:
        checks.save()
    for video, problem in broken.items():
        print(f"left out: {problem}", file=sys.stderr)
        del entries[video]
    halves = [[entries[v] for v in videos if v in entries] for videos in (train, val)]
    if not all(halves):
        raise ScdError(f"{root}: {len(entries)} usable videos are too few for two lists")
    if classes is not None:
        write_json(root / CLASSES, classes)
    for path, half in zip(targets, halves, strict=True):
        write_list(path, half)
        print(f"{path}: {_summary(half)}")
        if slow := checks.in_order(str(entry.video_path) for entry in half):
            print(slow_reading_note(path, root, slow))
    if broken:
        print(f"left out as broken: {len(broken)}, named above")


def _files(root: Path) -> list[Path]:
    """Find videos and arrays below a folder, relative to it, in alphabetical order.

    Linked folders are followed after all others, and no folder is read twice; a linked video is
    left out if it is found by itself. So the search ends where links form a loop, and no clip gets
    into both lists under two names.
    """
    if not root.is_dir():
        raise ScdError(f"{root}: {why_missing(root, 'folder')}")
    found: list[Path] = []
    links: list[Path] = []
    linked_videos: list[Path] = []
    seen: dict[str, Path] = {}

    def refuse(error: OSError) -> None:
        raise ScdError(f"{error.filename}: cannot be read ({error.strerror or error})") from error

    def search(start: Path) -> None:
        for parent, folders, files in os.walk(start, onerror=refuse):
            here = Path(parent)
            if (real := os.path.realpath(here)) in seen:
                print(f"left out: {here}: the same folder as {seen[real]}", file=sys.stderr)
                folders.clear()
                continue
            seen[real] = here
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            links.extend(here / name for name in folders if (here / name).is_symlink())
            for name in files:
                path = here / name
                if name.startswith(".") or path.suffix.lower() not in (*VIDEO_SUFFIXES, ".npz"):
                    continue
                if path.is_symlink() and path.suffix.lower() in VIDEO_SUFFIXES:
                    linked_videos.append(path)
                else:
                    seen[os.path.join(real, name)] = path
                    found.append(path.relative_to(root))

    search(root)
    while links:
        search(links.pop(0))
    for path in sorted(linked_videos):
        if (real := os.path.realpath(path)) in seen:
            print(f"left out: {path}: the same video as {seen[real]}", file=sys.stderr)
        else:
            seen[real] = path
            found.append(path.relative_to(root))
    return sorted(found)


def _clips(root: Path, paths: list[Path]) -> Iterator[tuple[str, ClipEntry]]:
    """Make an entry for each clip among files; yields the path of its video, and the entry."""
    videos = [path for path in paths if path.suffix.lower() in VIDEO_SUFFIXES]
    arrays = {path.with_suffix(".npz"): path for path in paths if path.suffix.lower() == ".npz"}
    beside = {arrays.get(path.with_suffix(".npz")) for path in videos}
    for path in videos:
        actions = arrays.get(path.with_suffix(".npz"))  # or .NPZ
        if actions is not None and not _has_actions(root / actions):
            actions = None
        yield (
            path.as_posix(),
            ClipEntry(path.as_posix(), None if actions is None else actions.as_posix()),
        )
    for path in paths:
        if path.suffix.lower() == ".npz" and path not in beside:
            try:
                keys = npz_keys(root / path)
            except ScdError:
                keys = {"video"}  # opening it raises the same error
            if "video" in keys:
                own = path.as_posix() if "actions" in keys else None
                if keys - {"video", "actions"} and own is None:
                    _note_other_keys(root / path, keys)
                yield path.as_posix(), ClipEntry(path.as_posix(), own)


def _has_actions(path: Path) -> bool:
    """Check that an npz beside a video has actions; name it if it has other arrays instead."""
    try:
        keys = npz_keys(path)
    except ScdError:
        return True  # reading them raises the same error
    if "actions" not in keys:
        _note_other_keys(path, keys)
    return "actions" in keys


def _note_other_keys(path: Path, keys: set[str]) -> None:
    print(f"no actions: {path}: has no key 'actions', but {sorted(keys)}", file=sys.stderr)


def _by_fraction(videos: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """Hold out a share for validation, ordering videos by a hash of their names.

    So the split is the same on every machine, and adding videos moves few of the others.
    """
    queue = sorted(videos, key=lambda video: hashlib.sha256(os.fsencode(video)).digest())
    count = min(max(1, round(fraction * len(videos))), len(videos) - 1)  # one trains
    return sorted(queue[count:]), sorted(queue[:count])


def _with_labels(
    root: Path, entries: dict[str, ClipEntry]
) -> tuple[dict[str, ClipEntry], list[str]]:
    """Label entries with the classes of their folders; return them, and the classes in order."""
    names = {video: PurePosixPath(video).parent.name for video in entries}
    if "" in names.values():
        video = next(video for video, name in names.items() if not name)
        raise ScdError(f"{root / video}: lies in no class folder, so it has no label")
    classes = sorted(set(names.values()), key=lambda name: (name.casefold(), name))
    path = root / CLASSES
    if path.exists() and read_json(path) != classes:
        raise ScdError(
            f"{path}: numbers other classes than these folders: move it away, if no list needs its "
            f"numbers any more"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    return {video: replace(e, label=numbers[names[video]]) for video, e in entries.items()}, classes


def _broken(checks: VideoChecks, entries: dict[str, ClipEntry]) -> dict[str, str]:
    """Check all videos; return those that cannot be used, each with the reason."""
    root = checks.root

    def problem(entry: ClipEntry) -> str | None:
        for name in (entry.video_path, entry.action_path):
            if name is not None and (wrong := path_problem(name)) is not None:
                return f"{str(root / name)!r} {wrong}"
        try:
            frames = len(checks.open(str(entry.video_path)))
            if entry.action_path is not None:
                actions = len(read_actions(root / entry.action_path))
                if actions < frames:
                    return f"{root / entry.action_path}: {actions} actions for {frames} frames"
        except ScdError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        problems = pool.map(problem, entries.values())
        bar = tqdm(problems, total=len(entries), desc="check", unit="clip", dynamic_ncols=True)
        return {video: text for video, text in zip(entries, bar, strict=True) if text}


def _summary(entries: list[ClipEntry]) -> str:
    with_actions = sum(entry.action_path is not None for entry in entries)
    text = f"{len(entries)} clip{'s' * (len(entries) > 1)}, {with_actions} with actions"
    labels = Counter(entry.label for entry in entries if entry.label is not None)
    if labels:
        text += f", {len(labels)} classes of {min(labels.values())} to {max(labels.values())}"
    return text


def mcvd_split(videos: list[str]) -> tuple[list[str], list[str]]:
    """Split UCF-101 for prediction as MCVD does (arXiv 2205.09853).

    It is the official split 3 with every tenth test video. Training: all 9 624 videos outside
    groups 15 to 21. Validation: the 3 696 others in order of class, group and clip, those at places
    0, 10, 20, … as long as ten remain: 369.

    Raises:
        ScdError: a video is not named as in UCF-101.
    """
    placed = sorted(videos, key=_place)
    train = [video for video in placed if _place(video)[1] not in TEST_GROUPS]
    test = [video for video in placed if _place(video)[1] in TEST_GROUPS]
    return train, test[: len(test) // EVERY * EVERY : EVERY]


def latte_split(videos: list[str]) -> tuple[list[str], list[str]]:
    """Split UCF-101 for generation by class as Latte does (arXiv 2401.03048): all videos train.

    FVD is computed against 2 048 videos of the training set, as usual for generation. In that list
    the classes take turns (the first video of each class, then the second of each, …), so any first
    n videos hold every class equally often, give or take one.

    Raises:
        ScdError: a video is not named as in UCF-101.
    """
    placed = sorted(videos, key=_place)
    by_class: dict[str, list[str]] = {}
    for video in placed:
        by_class.setdefault(_place(video)[0], []).append(video)
    turns = chain.from_iterable(zip_longest(*by_class.values()))
    return placed, [video for video in turns if video is not None][:BALANCED_VIDEOS]


SPLITS = {"ucf101-mcvd": mcvd_split, "ucf101-latte": latte_split}


def _place(video: str) -> tuple[str, int, int]:
    """Parse class, group and clip from a path; classes sort without case, as the official ones."""
    path = PurePosixPath(video)
    match = re.fullmatch(r"v_\w+_g(\d+)_c(\d+)", path.stem)
    if match is None:
        raise ScdError(f"{video}: not named as in UCF-101 (v_<Class>_g01_c01.avi)")
    return path.parent.name.casefold(), int(match[1]), int(match[2])
