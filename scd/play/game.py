"""One player's worlds and their history. Any call may take long: none is for an event loop."""

import time
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from scd.errors import ScdError
from scd.play.catalog import MAX_GUIDANCE, MAX_SEED, MAX_STEPS, Catalog
from scd.play.history import Frame, History
from scd.play.starts import Action
from scd.play.worlds import Settings, View, World


class Game:
    """It begins with the first start and the first world."""

    def __init__(self, catalog: Catalog):
        self.catalog = catalog
        self.settings = catalog.settings
        self.names: list[str] = []
        self._worlds: list[World] = []
        self.begin(catalog.starts[0].name, catalog.worlds[:1], self.settings.seed)

    def begin(self, start_name: str, names: list[str], seed: int) -> None:
        """Begin anew: a start, the worlds to show, in the catalog's order, and a seed.

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
            views = list(zip(*(world.begin(start, settings) for world in worlds), strict=True))
        except Exception:
            for world in made.values():
                world.close()
            raise
        self.close()
        self._worlds, self.names, self.start, self.settings = worlds, order, start, settings
        frames = [Frame(i, start.actions[i], of_frame) for i, of_frame in enumerate(views)]
        self.history = History(frames)

    def step(self, action: Action) -> Frame:
        """The next frame of every world.

        Raises:
            ScdError: there is no such action.
        """
        count = len(self.catalog.actions)
        if isinstance(action, tuple) != self.catalog.several:
            raise ScdError(f"action {action} is none of this world, which takes another kind")
        if isinstance(action, tuple) and len(action) != count:
            raise ScdError(f"action {action} is none of {count} components")
        if isinstance(action, int) and action >= count:
            raise ScdError(f"action {action} is none of 0 to {count - 1}")
        number = self.history.newest.number + 1
        views = tuple(world.step(action, number) for world in self._worlds)
        frame = Frame(number, action, views, time.monotonic())
        self.history.append(frame)
        return frame

    def change(self, **changes: Any) -> None:
        """Change settings; worlds go on from where they are.

        Raises:
            ScdError: a value is out of range; nothing has changed then.
        """
        self.settings = self._checked(replace(self.settings, **changes))
        self._go_to_newest()

    def rewind(self, number: int) -> None:
        """See `History.rewind`."""
        self.history.rewind(number)
        self._go_to_newest()

    def return_to(self, moment: int) -> None:
        """See `History.return_to`."""
        self.history.return_to(moment)
        self._go_to_newest()

    def state(self) -> dict[str, Any]:
        """What the page shows of it, ready for JSON."""
        history = self.history
        moments = [
            {
                "moment": moment.number,
                "frame": moment.line[-1].number,
                "shared": history.shared(moment),
                "kept": moment.kept,
            }
            for moment in history.moments
        ]
        return {
            "start": self.start.name,
            "given": len(self.start.actions),
            "worlds": self.names,
            "settings": asdict(self.settings),
            "frame": history.newest.number,
            "oldest": history.oldest,
            "moments": moments,
        }

    def close(self) -> None:
        for world in self._worlds:
            with suppress(Exception):  # a simulator that died by itself
                world.close()
        self._worlds = []

    def _go_to_newest(self) -> None:
        line = self.history.line
        actions = [frame.action for frame in line]
        for place, world in enumerate(self._worlds):
            past: list[View] = [frame.views[place] for frame in line]
            world.go_to(past, actions, self.history.oldest == 0, self.settings)

    @staticmethod
    def _checked(settings: Settings) -> Settings:
        for name, low, high in (
            ("steps", 1, MAX_STEPS),
            ("guidance_scale", 1.0, MAX_GUIDANCE),
            ("seed", 0, MAX_SEED),
        ):
            value = getattr(settings, name)
            if not low <= value <= high:
                raise ScdError(f"{name} is {value}, not within {low} and {high}")
        return settings
