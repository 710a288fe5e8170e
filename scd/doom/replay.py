"""Enter a recorded episode again, and play on with other keys."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from scd.doom.record import ATTEMPT_SEED, ATTEMPTS, RECORDING, SPLIT_SEEDS
from scd.doom.simulator import KEYS, Action, DoomSimulator
from scd.errors import ScdError
from scd.utils.files import read_json, read_npz

SAME_PLACE = 1e-3  # map units and degrees


class Replay:
    """The episodes of a recording by `scd record`, open to other keys.

    Args:
        root: folder of the recording.

    Raises:
        ScdError: it is not one, or there is no ViZDoom.
    """

    def __init__(self, root: Path):
        if not (root / RECORDING).is_file():
            raise ScdError(
                f"{root}: not recorded by `scd record` ({RECORDING} is missing), so nobody can "
                f"play on in its episodes"
            )
        settings = read_json(root / RECORDING)
        if not isinstance(settings, dict) or not {"actions", "frame_size"} <= settings.keys():
            raise ScdError(f"{root / RECORDING}: not the settings of a recording by `scd record`")
        self.several_keys = settings["actions"] == list(KEYS)
        self._simulator = DoomSimulator(settings["frame_size"])

    @property
    def frame_size(self) -> int:
        """Height and width of the frames."""
        return self._simulator.frame_size

    def play_on(self, episode: Path, frame: int, actions: Iterable[Action]) -> np.ndarray | None:
        """Play other actions after a frame of an episode.

        Args:
            episode: its video or actions, `root/SPLIT/NNNNN.*`.
            frame: the last one that stays as it was recorded.

        Returns:
            The frames that the actions lead to, (n, H, W, 3) uint8; None: the episode ends before.

        Raises:
            ScdError: replaying the recorded actions leads elsewhere than recorded.
        """
        self._enter(episode, frame)
        frames = []
        for action in actions:
            seen = self._simulator.step(self._held(action))
            if seen is None:
                return None
            frames.append(seen)
        return np.stack(frames)

    def _enter(self, episode: Path, frame: int) -> None:
        """Replay an episode up to a frame."""
        path = episode.with_suffix(".npz")
        actions, poses = read_npz(path, "actions"), read_npz(path, "poses")
        split, number = episode.parent.name, episode.stem
        if split in SPLIT_SEEDS and number.isdecimal():
            seed = SPLIT_SEEDS[split] + int(number)
            for attempt in range(ATTEMPTS):
                self._simulator.reset(seed + attempt * ATTEMPT_SEED)
                if not self._is_at(poses[0]):
                    continue
                steps = (self._simulator.step(self._held(a)) for a in actions[1 : frame + 1])
                if all(seen is not None for seen in steps) and self._is_at(poses[frame]):
                    return
        raise ScdError(
            f"{path}: the episode leads elsewhere now: it was recorded by another version, or its "
            f"file was renamed"
        )

    def _is_at(self, pose: np.ndarray) -> bool:
        now = self._simulator.pose
        return bool(np.abs(np.array([now.x, now.y, now.heading]) - pose).max() < SAME_PLACE)

    def _held(self, action: np.ndarray | Action) -> Action:
        return tuple(action) if self.several_keys else int(action)  # type: ignore[arg-type]

    def close(self) -> None:
        """Stop the engine."""
        self._simulator.close()
