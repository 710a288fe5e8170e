"""Record episodes: mp4 videos, one action per frame, list files, and a map of visited places."""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from tqdm import tqdm

from scd.data.lists import ClipEntry, read_list, write_list
from scd.data.video import write_video
from scd.data.video_checks import VideoChecks
from scd.doom.navigator import FreeSpace, KeyNavigator, Navigator
from scd.doom.simulator import (
    ACTIONS,
    FRAMES_PER_SECOND,
    KEYS,
    NONE,
    ONE_KEY,
    Action,
    DoomSimulator,
)
from scd.errors import ScdError, Stopped
from scd.utils.files import read_json, read_npz, write_atomically, write_json
from scd.utils.signals import stop_request
from scd.utils.startup import usable_cores

SPLIT_SEEDS = {"train": 0, "val": 1_000_000}  # first episode seed of each split; no overlap
ATTEMPT_SEED = 10_000_000
ATTEMPTS = 100
RECORDING = "recording.json"  # the settings of a recording
SPLIT_SIZE_LIMIT = 1_000_000
COVERAGE_CELL = 32  # map units
MAX_SIMULATORS = 8  # each is a process of its own; more would wait for this one's Python


def record_dataset(
    root: Path, train_episodes: int, val_episodes: int, frames: int, size: int, keys: bool = False
) -> None:
    """Record both splits under `root`, skipping episodes that exist already.

    A list that is longer already keeps all its episodes.

    Writes `train.json`, `val.json`, `recording.json` (the settings), `coverage.png`, and for every
    episode `SPLIT/NNNNN.mp4` and `.npz` with `actions` (int64, one per frame; action i leads to
    frame i, so action 0 is `none`) and `poses` (x, y, heading at each frame).

    Args:
        keys: hold several keys at once; `actions` are then uint8 (F, 3), 1 for each of the
            simulator's `KEYS` that is held.

    Raises:
        ScdError: `root` holds a recording with other settings, or the numbers are out of range.
        Stopped: see `_record_episodes`.
    """
    counts = {"train": train_episodes, "val": val_episodes}
    if max(counts.values()) > SPLIT_SIZE_LIMIT or min(counts.values()) < 1 or frames < 2:
        raise ScdError(
            f"record: between 1 and {SPLIT_SIZE_LIMIT} episodes per split, of at least 2 frames "
            f"each, not {counts} episodes of {frames} frames"
        )
    names = KEYS if keys else ACTIONS
    settings = {"frames": frames, "frame_size": size, "actions": list(names)}
    note = root / RECORDING
    noted = read_json(note) if note.exists() else None
    if noted != settings and any(any(root.glob(f"{split}/*.mp4")) for split in counts):
        why = "a recording with other settings" if noted else "episodes of unknown settings"
        raise ScdError(f"{root} holds {why} ({note}): choose another folder")
    with closing(DoomSimulator(size)) as simulator:
        if noted != settings:
            write_json(note, settings)
        simulator.reset(0)
        pose = simulator.pose
        space = FreeSpace(simulator.walls(), simulator.items(), (pose.x, pose.y))
        news = [
            _record_split(root, split, n, frames, size, space, keys) for split, n in counts.items()
        ]
        if any(news) or not (root / "coverage.png").exists():
            _draw_coverage(root, simulator.walls(), names)


def _record_split(
    root: Path,
    split: str,
    count: int,
    frames: int,
    size: int,
    space: FreeSpace,
    keys: bool,
) -> bool:
    """Record the missing episodes of a split and list them all; return whether the list changed."""
    list_path = root / f"{split}.json"
    listed = read_list(list_path) if list_path.exists() else []
    known = {entry.video_path: entry for entry in listed}  # with the latents `scd encode` made
    names = [f"{split}/{episode:05d}" for episode in range(count)]
    asked_for = {f"{name}.mp4" for name in names}
    kept = [entry for entry in listed if entry.video_path not in asked_for]
    missing = {
        episode: name
        for episode, name in enumerate(names)
        if not ((root / f"{name}.mp4").exists() and (root / f"{name}.npz").exists())
    }
    if missing:
        seeds = {root / name: SPLIT_SEEDS[split] + episode for episode, name in missing.items()}
        _record_episodes(seeds, frames, size, space, keys, f"record {split}")
    recorded = [f"{name}.mp4" for name in missing.values()]
    for video_path in recorded:
        known.pop(video_path, None)
    entries = [known.get(f"{n}.mp4", ClipEntry(f"{n}.mp4", f"{n}.npz")) for n in names] + kept
    if kept:
        print(f"{list_path}: keeps its {len(entries)} episodes, more than {count}", file=sys.stderr)
    if entries == listed:
        return False
    checks = VideoChecks(root)
    checks.check_alike(recorded)
    checks.check_all(str(entry.video_path) for entry in entries)
    write_list(list_path, entries)
    return True


def _record_episodes(
    seeds: dict[Path, int], frames: int, size: int, space: FreeSpace, keys: bool, progress: str
) -> None:
    """Play and write episodes side by side.

    Args:
        seeds: of each episode, by its file name without ending.

    Raises:
        Stopped: a signal asked for it; what is written is whole, and no simulator is left behind.
    """
    free: SimpleQueue[DoomSimulator] = SimpleQueue()

    def record(stem: Path) -> None:
        simulator = free.get()
        try:
            played = _play_episode(simulator, space, seeds[stem], frames, keys)
        finally:
            free.put(simulator)
        _write_episode(stem, *played)

    with stop_request() as request, ExitStack() as stack:
        # While an episode is compressed, its simulator plays the next.
        count = min(max(len(usable_cores()) // 2, 1), len(seeds), MAX_SIMULATORS)
        for _ in range(count):
            free.put(stack.enter_context(closing(DoomSimulator(size))))
        pool = ThreadPoolExecutor(2 * count)
        stack.callback(pool.shutdown, cancel_futures=True)
        for _ in tqdm(pool.map(record, seeds), desc=progress, total=len(seeds), unit="episode"):
            if request.signal is not None:
                break
        if request.signal is not None:
            why = f"{progress}: stopped by {request.signal.name}; run the same command to go on"
            print(why, file=sys.stderr)
            raise Stopped(why)


def _play_episode(
    simulator: DoomSimulator, space: FreeSpace, seed: int, frames: int, keys: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Play an episode; return frames (F, H, W, 3), actions (F,) or (F, 3) and poses (F, 3)."""
    for attempt in range(ATTEMPTS):
        # An episode ends early when the player touches the vest. The next attempt is a function of
        # the seed as well.
        start_seed = seed + attempt * ATTEMPT_SEED
        navigator = navigator_of(space, start_seed, keys)
        video, poses = [simulator.reset(start_seed)], [simulator.pose]
        actions: list[Action] = [nothing(keys)]
        while len(video) < frames:
            action = navigator.act(poses[-1])
            frame = simulator.step(action)
            if frame is None:
                break
            video.append(frame)
            poses.append(simulator.pose)
            actions.append(action)
        else:
            table = np.array([(p.x, p.y, p.heading) for p in poses])
            return np.stack(video), np.array(actions, np.uint8 if keys else np.int64), table
    raise ScdError(
        f"record: episode seed {seed} ended before {frames} frames in {ATTEMPTS} attempts"
    )


def navigator_of(space: FreeSpace, seed: int, keys: bool) -> Navigator:
    """Make the policy of an episode."""
    return (KeyNavigator if keys else Navigator)(space, np.random.default_rng(seed))


def nothing(keys: bool) -> Action:
    """Return the action at the first frame of an episode: none."""
    return ONE_KEY[NONE] if keys else NONE


def _write_episode(stem: Path, video: np.ndarray, actions: np.ndarray, poses: np.ndarray) -> None:
    # The video last: an episode counts as recorded when both files exist.
    write_atomically(
        stem.with_suffix(".npz"),
        lambda aside: np.savez_compressed(aside, actions=actions, poses=poses),
    )
    write_video(stem.with_suffix(".mp4"), video, FRAMES_PER_SECOND)


def _draw_coverage(root: Path, walls: np.ndarray, names: Sequence[str]) -> None:
    """Draw `coverage.png`: how often each place was visited and each action taken, by split."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    low, high = walls.reshape(-1, 2).min(axis=0), walls.reshape(-1, 2).max(axis=0)
    bins = np.ceil((high - low) / COVERAGE_CELL).astype(int)
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
    for axis, split in zip(axes, SPLIT_SEEDS, strict=True):
        paths = [root / str(entry.action_path) for entry in read_list(root / f"{split}.json")]
        places = np.concatenate([read_npz(path, "poses")[:, :2] for path in paths])
        actions = np.concatenate([read_npz(path, "actions") for path in paths])
        area = np.stack([low, high], axis=1)
        counts, *_ = np.histogram2d(places[:, 0], places[:, 1], bins=list(bins), range=area)
        picture = axis.imshow(
            np.log10(np.where(counts > 0, counts, np.nan)).T,
            extent=area.ravel().tolist(),
            origin="lower",
            cmap="viridis",
        )
        for x1, y1, x2, y2 in walls:
            axis.plot([x1, x2], [y1, y2], color="black", linewidth=1.5)
        taken = actions if actions.ndim == 2 else np.eye(len(names))[actions]  # (F, names)
        share = taken.mean(axis=0)
        listed = ", ".join(f"{name} {s:.0%}" for name, s in zip(names, share, strict=True))
        axis.set_title(f"{split}: {len(paths)} episodes, {len(actions)} frames\n{listed}", size=9)
        axis.set_axis_off()
        figure.colorbar(picture, ax=axis, label="visits, log10", shrink=0.8)
    write_atomically(root / "coverage.png", lambda aside: figure.savefig(aside, dpi=90))
    plt.close(figure)
