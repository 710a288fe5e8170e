"""ViZDoom as a small deterministic environment: a seed and actions decide the frames."""

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
"""An index of `ACTIONS`; or for each of `KEYS`, whether it is held, 0 or 1."""

ONE_KEY = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))  # by the index of an action

TICS_PER_ACTION = 4  # Doom runs at 35 tics a second, so 8.75 actions a second is real time.
TURN_DEGREES = 11.25  # per action; 32 turns make a full circle
FRAMES_PER_SECOND = 35 / TICS_PER_ACTION
SCREEN_HEIGHT = 240  # pixels that ViZDoom draws; frames are made smaller from it


@dataclass(frozen=True)
class Pose:
    """Player position in map units and heading in degrees, counter-clockwise from east."""

    x: float
    y: float
    heading: float


class DoomSimulator:
    """First-person maze without weapon, HUD or enemies, cropped to a square picture.

    Args:
        frame_size: height and width of the frames in pixels.
        scenario: name of a scenario that the ViZDoom package ships.

    Raises:
        ScdError: ViZDoom is not installed, does not start or has no such scenario.
    """

    def __init__(self, frame_size: int = 64, scenario: str = "my_way_home"):
        if not 1 <= frame_size <= SCREEN_HEIGHT:
            raise ScdError(f"Doom frames have 1 to {SCREEN_HEIGHT} pixels a side, not {frame_size}")
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
        # Delta buttons turn by an exact angle; the plain turn buttons accelerate while held,
        # which would make one action mean two different things.
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
        # The engine reads and leaves settings in the folder where it starts: with none, the frames
        # are the same everywhere and the user's folder stays clean.
        game.set_doom_config_path(os.devnull)
        try:
            with tempfile.TemporaryDirectory() as folder, chdir(folder):
                game.init()
        except Exception as error:
            raise ScdError(f"ViZDoom does not start ({reason(error)})") from error
        self._game = game

    def reset(self, seed: int) -> np.ndarray:
        """Start an episode where the seed says. Returns the first frame, (H, W, 3) uint8."""
        self._game.set_seed(seed)
        self._game.new_episode()
        return self._frame()

    def step(self, action: Action) -> np.ndarray | None:
        """Hold an action for `TICS_PER_ACTION` tics: the frame it leads to, or None at the end.

        Both turns at once are none.
        """
        keys = ONE_KEY[int(action)] if isinstance(action, int | np.integer) else action
        left, right, forward = map(float, keys)
        turn = (right - left) * TURN_DEGREES / TICS_PER_ACTION
        self._game.make_action([int(forward), turn], TICS_PER_ACTION)
        return None if self._game.is_episode_finished() else self._frame()

    @property
    def pose(self) -> Pose:
        return Pose(*(float(v) for v in self._game.get_state().game_variables))

    def walls(self) -> np.ndarray:
        """Blocking wall segments of the map, (n, 4): x1, y1, x2, y2 in map units."""
        sectors = self._game.get_state().sectors
        lines = {
            (line.x1, line.y1, line.x2, line.y2)
            for sector in sectors
            for line in sector.lines
            if line.is_blocking
        }
        return np.array(sorted(lines), dtype=np.float64)

    def items(self) -> np.ndarray:
        """Positions of everything on the map but the player, (n, 2)."""
        objects = self._game.get_state().objects
        places = [(o.position_x, o.position_y) for o in objects if o.name != "DoomPlayer"]
        return np.array(places, dtype=np.float64).reshape(-1, 2)

    def close(self) -> None:
        self._game.close()

    def _frame(self) -> np.ndarray:
        screen = self._game.get_state().screen_buffer
        height, width, _ = screen.shape
        left = (width - height) // 2
        square = Image.fromarray(screen[:, left : left + height])
        size = (self.frame_size, self.frame_size)
        return np.asarray(square.resize(size, Image.Resampling.BOX), dtype=np.uint8)
