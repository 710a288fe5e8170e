"""ViZDoom as a deterministic environment: seed and actions determine the frames."""

import os
import tempfile
from contextlib import chdir
from dataclasses import dataclass

import numpy as np
from PIL import Image

from scd.errors import ScdError, reason

KEYS = ("turn_left", "turn_right", "forward")
ACTIONS = ("none", *KEYS)  # one key at a time
NONE, TURN_LEFT, TURN_RIGHT, FORWARD = range(len(ACTIONS))
Action = int | tuple[float, ...]
"""An index of `ACTIONS`; or one number for each of `KEYS`, 1 if it is held, else 0."""

ONE_KEY = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))  # the keys of each of `ACTIONS`

TICS_PER_ACTION = 4  # Doom runs at 35 tics per second: 8.75 actions per second are real time.
TURN_DEGREES = 11.25  # per action; 32 turns make a full circle
FRAMES_PER_SECOND = 35 / TICS_PER_ACTION
SCREEN_HEIGHT = 240  # pixels that ViZDoom renders; frames are scaled down from them


@dataclass(frozen=True)
class Pose:
    """The player's position in map units, and heading in degrees counter-clockwise from east."""

    x: float
    y: float
    heading: float


class DoomSimulator:
    """A first-person maze without weapon, HUD or enemies, cropped to square frames.

    Args:
        frame_size: height and width of the frames in pixels.
        scenario: name of a scenario that the ViZDoom package ships.

    Raises:
        ScdError: ViZDoom is not installed, does not start or has no such scenario.
    """

    def __init__(self, frame_size: int = 64, scenario: str = "my_way_home"):
        if not 1 <= frame_size <= SCREEN_HEIGHT:
            raise ScdError(
                f"Doom frames have 1 to {SCREEN_HEIGHT} pixels per side, not {frame_size}"
            )
        try:
            import vizdoom as vzd
        except ImportError as error:
            raise ScdError(
                f"recording Doom needs the package 'vizdoom' ({error}): pip install vizdoom"
            ) from error
        config = os.path.join(vzd.scenarios_path, f"{scenario}.cfg")
        if not os.path.isfile(config):
            raise ScdError(f"ViZDoom ships no scenario {scenario!r} (looked for {config})")
        self.frame_size = frame_size
        game = vzd.DoomGame()
        game.load_config(config)
        game.set_window_visible(False)
        game.set_screen_resolution(vzd.ScreenResolution.RES_320X240)
        game.set_screen_format(vzd.ScreenFormat.RGB24)
        for render in ("hud", "weapon", "crosshair", "messages", "particles"):
            getattr(game, f"set_render_{render}")(False)
        # Delta buttons turn by an exact angle. The plain turn buttons accelerate while held, so the
        # same action would have different effects.
        game.set_available_buttons([vzd.Button.MOVE_FORWARD, vzd.Button.TURN_LEFT_RIGHT_DELTA])
        game.set_available_game_variables(
            [
                vzd.GameVariable.POSITION_X,
                vzd.GameVariable.POSITION_Y,
                vzd.GameVariable.ANGLE,
            ]
        )
        game.set_sectors_info_enabled(True)
        game.set_objects_info_enabled(True)
        game.set_episode_timeout(0)
        # The engine reads and writes settings in the folder where it starts. Without any, frames
        # are the same on every machine, and the user's folder stays clean.
        game.set_doom_config_path(os.devnull)
        try:
            with tempfile.TemporaryDirectory() as folder, chdir(folder):
                game.init()
        except Exception as error:
            raise ScdError(f"ViZDoom does not start ({reason(error)})") from error
        self._game = game

    def reset(self, seed: int) -> np.ndarray:
        """Start the episode of a seed, and return its first frame, (H, W, 3) uint8."""
        self._game.set_seed(seed)
        self._game.new_episode()
        return self._frame()

    def step(self, action: Action) -> np.ndarray | None:
        """Hold an action for `TICS_PER_ACTION` tics, and return the frame that it leads to.

        Both turns at once cancel out. None: the episode has ended.
        """
        keys = ONE_KEY[int(action)] if isinstance(action, int | np.integer) else action
        left, right, forward = map(float, keys)
        turn = (right - left) * TURN_DEGREES / TICS_PER_ACTION
        self._game.make_action([int(forward), turn], TICS_PER_ACTION)
        return None if self._game.is_episode_finished() else self._frame()

    @property
    def pose(self) -> Pose:
        """Position and heading of the player."""
        return Pose(*(float(v) for v in self._game.get_state().game_variables))

    def walls(self) -> np.ndarray:
        """List the blocking walls of the map, (n, 4): x1, y1, x2, y2 in map units."""
        sectors = self._game.get_state().sectors
        lines = {
            (line.x1, line.y1, line.x2, line.y2)
            for sector in sectors
            for line in sector.lines
            if line.is_blocking
        }
        return np.array(sorted(lines), dtype=np.float64)

    def items(self) -> np.ndarray:
        """List the positions of everything on the map except the player, (n, 2)."""
        objects = self._game.get_state().objects
        places = [(o.position_x, o.position_y) for o in objects if o.name != "DoomPlayer"]
        return np.array(places, dtype=np.float64).reshape(-1, 2)

    def close(self) -> None:
        """Stop the engine."""
        self._game.close()

    def _frame(self) -> np.ndarray:
        screen = self._game.get_state().screen_buffer
        height, width, _ = screen.shape
        left = (width - height) // 2
        square = Image.fromarray(screen[:, left : left + height])
        size = (self.frame_size, self.frame_size)
        return np.asarray(square.resize(size, Image.Resampling.BOX), dtype=np.uint8)
