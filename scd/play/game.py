"""One player's game: the shown worlds, their settings and their history.

Every method may block for long, so none of them belongs on an event loop.
"""

import time
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from scd.errors import ScdError
from scd.play.catalog import MAX_SEED, Catalog
from scd.play.history import Frame, History
from scd.play.starts import Action
from scd.play.worlds import MAX_GUIDANCE, MAX_STEPS, Settings, View, World


class Game:
    """Worlds that one player moves through, at first the first world at the first start clip."""

    def __init__(self, catalog: Catalog):
        self.catalog = catalog
        self.settings = Settings()
        self.names: list[str] = []
        self._worlds: list[World] = []
        self.reset(catalog.starts[0].name, catalog.worlds[:1], self.settings.seed)

    def reset(self, start_name: str, names: list[str], seed: int) -> None:
        """Begin again from a start clip, with these worlds, in the catalog's order, and a seed.

        Raises:
            ScdError: there is no such start, world or seed; nothing has changed then.
        """
        start = self.catalog.start(start_name)
        settings = self._checked(replace(self.settings, seed=seed))
        made: dict[str, World] = {}
        try:
            for name in sorted(set(names), key=names.index):
                made[name] = self.catalog.make_world(name)
            order = sorted(made, key=self.catalog.worlds.index)
            worlds = [made[name] for name in order]
            views = list(zip(*(world.reset(start, settings) for world in worlds), strict=True))
        except Exception:
            for world in made.values():
                world.close()
            raise
        self.close()
        self._worlds, self.names, self.start, self.settings = worlds, order, start, settings
        frames = [Frame(i, start.actions[i], of_frame) for i, of_frame in enumerate(views)]
        self.history = History(frames)

    def step(self, action: Action) -> Frame:
        """Generate the next frame of every world.

        Raises:
            ScdError: the worlds have no such action.
        """
        count = len(self.catalog.actions)
        if isinstance(action, tuple) != self.catalog.action_vectors:
            kind = "vectors" if self.catalog.action_vectors else "numbers"
            raise ScdError(f"action {action} does not fit: the actions of this world are {kind}")
        if isinstance(action, tuple) and len(action) != count:
            raise ScdError(f"action {action} does not have {count} components")
        if isinstance(action, int) and action >= count:
            raise ScdError(f"action {action} is not in 0..{count - 1}")
        number = self.history.newest.number + 1
        views = tuple(world.step(action, number) for world in self._worlds)
        frame = Frame(number, action, views, time.monotonic())
        self.history.append(frame)
        return frame

    def change(self, **changes: Any) -> None:
        """Change settings; the worlds go on from the newest frame.

        Raises:
            ScdError: a value is out of range; nothing has changed then.
        """
        self.settings = self._checked(replace(self.settings, **changes))
        self._restore_worlds()

    def rewind(self, number: int) -> None:
        """Go back to a frame; see `History.rewind`."""
        self.history.rewind(number)
        self._restore_worlds()

    def return_to(self, branch: int) -> None:
        """Go to the end of a branch; see `History.return_to`."""
        self.history.return_to(branch)
        self._restore_worlds()

    def state(self) -> dict[str, Any]:
        """Collect what the page shows of the game, ready for JSON."""
        history = self.history
        branches = [
            {
                "branch": branch.number,
                "frame": branch.frames[-1].number,
                "shared": history.last_shared(branch),
                "kept": branch.kept,
            }
            for branch in history.branches
        ]
        return {
            "start": self.start.name,
            "given": len(self.start.actions),
            "worlds": self.names,
            "settings": asdict(self.settings),
            "frame": history.newest.number,
            "oldest": history.oldest,
            "branches": branches,
        }

    def close(self) -> None:
        """Close all worlds."""
        for world in self._worlds:
            with suppress(Exception):  # a simulator that has already died
                world.close()
        self._worlds = []

    def _restore_worlds(self) -> None:
        """Bring every world to the newest frame of the timeline."""
        timeline = self.history.timeline
        actions = [frame.action for frame in timeline]
        for index, world in enumerate(self._worlds):
            past: list[View] = [frame.views[index] for frame in timeline]
            world.restore(past, actions, self.history.oldest == 0, self.settings)

    @staticmethod
    def _checked(settings: Settings) -> Settings:
        for name, low, high in (
            ("steps", 1, MAX_STEPS),
            ("guidance_scale", 1.0, MAX_GUIDANCE),
            ("seed", 0, MAX_SEED),
        ):
            value = getattr(settings, name)
            if value is not None and not low <= value <= high:
                raise ScdError(f"{name} is {value}, but must be between {low} and {high}")
        return settings
