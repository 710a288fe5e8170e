"""Start clips: the first frames of real episodes, from which worlds go on."""

from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from scd.data.video import VideoFile, write_video
from scd.doom.navigator import FreeSpace, Navigator
from scd.doom.record import SPLIT_SEEDS
from scd.doom.simulator import FRAMES_PER_SECOND, NONE, DoomSimulator
from scd.errors import ScdError
from scd.files import read_json, write_json

LISTED = "starts.json"
MAX_FRAMES = 1000


@dataclass(frozen=True)
class Start:
    """A clip to go on from.

    Args:
        seed: of the Doom episode that begins so.
        actions: (K,), the action that led to each frame; the first one is `none`.
        frames: (K, H, W, 3) uint8.
    """

    name: str
    seed: int
    actions: tuple[int, ...]
    frames: np.ndarray


def load_starts(folder: Path, size: int, num_actions: int) -> list[Start]:
    """The clips that `starts.json` lists.

    Args:
        size: height and width that the frames must have.

    Raises:
        ScdError: the folder, its list or a clip is missing, damaged or of another size.
    """
    listed = read_json(folder / LISTED)
    if not isinstance(listed, list) or not listed:
        raise ScdError(f"{folder / LISTED}: expected a list of start clips")
    return [_load_start(folder, entry, size, num_actions) for entry in listed]


def _load_start(folder: Path, entry: object, size: int, num_actions: int) -> Start:
    where = folder / LISTED
    if not isinstance(entry, dict) or entry.keys() != {"name", "seed", "actions"}:
        raise ScdError(f"{where}: a start has name, seed and actions, not {str(entry)[:80]}")
    name, seed, actions = entry["name"], entry["seed"], entry["actions"]
    if not (isinstance(name, str) and name.isidentifier() and type(seed) is int):
        raise ScdError(f"{where}: name {str(name)[:40]!r} or seed {str(seed)[:40]!r} of a start")
    known = range(num_actions)
    if (
        not isinstance(actions, list)
        or not 1 <= len(actions) <= MAX_FRAMES
        or not all(type(action) is int and action in known for action in actions)
    ):
        raise ScdError(f"{where}: start {name}: actions are a list of numbers below {num_actions}")
    video = VideoFile(folder / f"{name}.mp4")
    if len(video) != len(actions):
        raise ScdError(f"{video.path}: {len(video)} frames, but {len(actions)} actions")
    frames = video.frames(np.arange(len(video)))
    if frames.shape[1:] != (size, size, 3):
        raise ScdError(f"{video.path}: frames of {frames.shape[1:3]} pixels, the model has {size}")
    return Start(name, seed, tuple(actions), frames)


def record_starts(folder: Path, episodes: dict[str, int], frames: int, size: int = 64) -> None:
    """Record the first frames of validation episodes, as `scd record` plays and compresses them.

    Args:
        episodes: name of a start -> number of the episode.

    Raises:
        ScdError: ViZDoom is missing, an episode ends too early, or the folder cannot be written.
    """
    entries = []
    with closing(DoomSimulator(size)) as simulator:
        simulator.reset(0)
        pose = simulator.pose
        space = FreeSpace(simulator.walls(), simulator.items(), (pose.x, pose.y))
        for name, episode in episodes.items():
            seed = SPLIT_SEEDS["val"] + episode
            navigator = Navigator(space, np.random.default_rng(seed))
            pictures, actions = [simulator.reset(seed)], [NONE]
            while len(pictures) < frames:
                actions.append(navigator.act(simulator.pose))
                picture = simulator.step(actions[-1])
                if picture is None:
                    raise ScdError(f"{name}: episode {episode} ends before {frames} frames")
                pictures.append(picture)
            start = Start(name, seed, tuple(actions), np.stack(pictures))
            write_video(folder / f"{name}.mp4", start.frames, FRAMES_PER_SECOND)
            entries.append({k: v for k, v in asdict(start).items() if k != "frames"})
    write_json(folder / LISTED, entries)
