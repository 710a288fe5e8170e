"""Start clips: the first frames of real episodes, from which worlds continue."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from scd.data.clips import clip_folder
from scd.data.video import VideoFile, write_video
from scd.doom.navigator import FreeSpace
from scd.doom.record import SPLIT_SEEDS, navigator_of, nothing
from scd.doom.simulator import ACTIONS, KEYS, DoomSimulator
from scd.errors import ScdError
from scd.options import Options
from scd.utils.files import read_json, write_folder_atomically, write_json

STARTS_FILE = "starts.json"
MAX_FRAMES = 1000
MOST_CLIPS = 10**6  # a larger number is a slip
Action = int | tuple[float, ...]
"""The number of an action; or the components of an action vector."""


@dataclass(frozen=True)
class Start:
    """A start clip of K frames.

    Args:
        actions: (K,), the action that led to each frame.
        frames: (K, H, W, 3) uint8.
        seed: of the Doom episode that begins with the clip; None for a clip of a data set.
    """

    name: str
    actions: tuple[Action, ...]
    frames: np.ndarray
    seed: int | None = None


def has_doom_actions(options: Options) -> bool:
    """Check by name (with spaces or underscores) whether the actions are the simulator's."""
    known = KEYS if options.model.condition == "action_vector" else ACTIONS
    return [name.replace(" ", "_") for name in options.data.action_names] == list(known)


def load_starts(folder: Path, size: int, num_actions: int, vectors: bool = False) -> list[Start]:
    """Load the clips that `starts.json` lists.

    Args:
        size: height and width that the frames must have.
        vectors: whether an action is a list of `num_actions` numbers, not one number.

    Raises:
        ScdError: the folder, its list or a clip is missing, damaged or of the wrong size.
    """
    listed = read_json(folder / STARTS_FILE)
    if not isinstance(listed, list) or not listed:
        raise ScdError(f"{folder / STARTS_FILE}: expected a list of start clips")
    return [_load_start(folder, entry, size, num_actions, vectors) for entry in listed]


def _load_start(folder: Path, entry: object, size: int, num_actions: int, vectors: bool) -> Start:
    where = folder / STARTS_FILE
    if not isinstance(entry, dict) or entry.keys() - {"seed"} != {"name", "actions"}:
        raise ScdError(
            f"{where}: expected name, actions and optionally seed of a start, not {str(entry)[:80]}"
        )
    name, seed, actions = entry["name"], entry.get("seed"), entry["actions"]
    if not (isinstance(name, str) and name.isidentifier()):
        raise ScdError(f"{where}: start name {str(name)[:40]!r} is not letters, digits and _")
    if seed is not None and type(seed) is not int:
        raise ScdError(f"{where}: seed {str(seed)[:40]!r} of a start is not an integer")
    is_action = partial(_is_vector if vectors else _is_index, num_actions=num_actions)
    if (
        not isinstance(actions, list)
        or not 1 <= len(actions) <= MAX_FRAMES
        or not all(map(is_action, actions))
    ):
        one = f"lists of {num_actions} numbers" if vectors else f"numbers below {num_actions}"
        raise ScdError(f"{where}: start {name}: actions must be a list of {one}")
    video = VideoFile(folder / f"{name}.mp4")
    if len(video) != len(actions):
        raise ScdError(f"{video.path}: {len(video)} frames, but {len(actions)} actions")
    frames = video.frames(np.arange(len(video)))
    if frames.shape[1:] != (size, size, 3):
        raise ScdError(
            f"{video.path}: frames of {frames.shape[1:3]} pixels, but the model has {size}: "
            f"make new clips with `scd starts`"
        )
    return Start(name, _actions(actions), frames, seed)


def _is_index(action: object, num_actions: int) -> bool:
    return type(action) is int and action in range(num_actions)


def _is_vector(action: object, num_actions: int) -> bool:
    return (
        isinstance(action, list)
        and len(action) == num_actions
        and all(type(value) in (int, float) and math.isfinite(value) for value in action)
    )


def _actions(listed: list) -> tuple[Action, ...]:
    return tuple(tuple(action) if isinstance(action, list) else action for action in listed)


def named_clips(clips: str, names: str | None = None) -> dict[str, int]:
    """Parse `--clips` and `--names`: name of a start -> number of its clip.

    Args:
        clips: `8` for the first 8 clips, or the numbers of clips, `3,17,40`.
        names: `lamps,red_gate,machines`; None: the clips are named by their numbers.

    Raises:
        ScdError: the clips or names are malformed, or their counts differ.
    """
    try:
        numbers = [int(part) for part in clips.split(",")]
    except ValueError:
        numbers = []
    if any(number > MOST_CLIPS for number in numbers):
        raise ScdError(f"--clips {clips}: no data set has so many clips")
    if len(numbers) == 1:
        numbers = list(range(numbers[0]))
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise ScdError(f"--clips {clips}: give how many, or different clip numbers such as 3,17,40")
    parsed = [f"clip_{number}" for number in numbers] if names is None else names.split(",")
    if len(set(parsed)) < len(parsed) or len(parsed) != len(numbers):
        raise ScdError(f"--names {names}: give {len(numbers)} different names, one for each clip")
    if wrong := [name for name in parsed if not name.isidentifier()]:
        raise ScdError(f"--names: {wrong[0]!r} must consist of letters, digits and _")
    return dict(zip(parsed, numbers, strict=True))


def make_starts(
    options: Options,
    folder: Path,
    clips: Mapping[str, int],
    frames: int,
    doom: bool = False,
) -> None:
    """Write a folder of start clips for `scd play --starts`, in place of an older one.

    Args:
        clips: name of a start -> number of a clip in the validation list, from 0.
        frames: number of frames of each clip, from its beginning.
        doom: replay the validation episodes of these numbers in ViZDoom, so that Doom can be shown
            beside a model.

    Raises:
        ScdError: the options have no actions, a clip is missing or too short, or the folder holds
            something else or cannot be written.
    """
    if options.task != "world_model" or not options.model.has_actions:
        raise ScdError("starts: only a world model under actions can be played")
    if doom and not has_doom_actions(options):
        raise ScdError(
            f"starts: --doom needs the data.action_names {', '.join(ACTIONS)} (with "
            f"action_vector: {', '.join(KEYS)})"
        )
    if not 1 <= frames <= MAX_FRAMES:
        raise ScdError(f"starts: --frames {frames}: must be 1 to {MAX_FRAMES}")
    if folder.exists() and not (folder / STARTS_FILE).is_file():
        raise ScdError(f"{folder} exists and has no {STARTS_FILE}: choose another folder")
    starts = (_replay_doom if doom else _cut_clips)(options, clips, frames)
    write_folder_atomically(folder, lambda aside: _write(aside, starts, options.data.fps))
    print(f"{folder}: {len(clips)} starts of {frames} frames: {', '.join(clips)}")


def _write(folder: Path, starts: Iterable[Start], fps: float) -> None:
    entries = []
    for start in starts:
        write_video(folder / f"{start.name}.mp4", start.frames, fps)
        entry = asdict(start)
        entries.append({k: v for k, v in entry.items() if k != "frames" and v is not None})
    write_json(folder / STARTS_FILE, entries)


def _cut_clips(options: Options, clips: Mapping[str, int], frames: int) -> Iterator[Start]:
    """Cut the first frames of validation clips, scaled and cropped as the model sees them."""
    data = clip_folder(options, options.data.val_list, "video")
    if max(clips.values()) >= len(data):
        raise ScdError(
            f"--clips: {data.list_path} has clips 0 to {len(data) - 1}, but no clip "
            f"{max(clips.values())}"
        )
    for name, number in clips.items():
        clip = data.read(number, frames)
        pictures = (clip["video"] * 255).round().byte().movedim(1, -1)
        yield Start(name, _actions(clip["actions"].tolist()), pictures.contiguous().numpy())


def _replay_doom(options: Options, clips: Mapping[str, int], frames: int) -> Iterator[Start]:
    """Replay the first frames of validation episodes, as `scd record` plays them."""
    keys = options.model.condition == "action_vector"
    with closing(DoomSimulator(options.data.frame_size)) as simulator:
        simulator.reset(0)
        pose = simulator.pose
        space = FreeSpace(simulator.walls(), simulator.items(), (pose.x, pose.y))
        for name, episode in clips.items():
            seed = SPLIT_SEEDS["val"] + episode
            navigator = navigator_of(space, seed, keys)
            pictures, actions = [simulator.reset(seed)], [nothing(keys)]
            while len(pictures) < frames:
                actions.append(navigator.act(simulator.pose))
                picture = simulator.step(actions[-1])
                if picture is None:
                    raise ScdError(f"{name}: episode {episode} ends before {frames} frames")
                pictures.append(picture)
            yield Start(name, tuple(actions), np.stack(pictures), seed)
