"""The catalog of a play server: its worlds, start clips and actions, and the sliders' limits."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

from scd.errors import ScdError
from scd.play.starts import Action, Start, has_doom_actions, load_starts
from scd.play.worlds import (
    ModelWorld,
    Pretrained,
    RealWorld,
    Settings,
    World,
    load_pretrained,
)

MAX_SEED = 2**31 - 1
REAL = "real"  # the world of Doom itself
IDLE = ("none", "noop", "no-op", "no_op", "idle", "nothing")  # names of the idle action


@dataclass(frozen=True)
class Catalog:
    """Everything that players can choose from.

    Args:
        models: name of a world -> its model; the first one is shown at the beginning.
        missing: name of a world that is not available -> reason.
        real: whether Doom itself can be shown beside the models.
    """

    models: dict[str, Pretrained]
    starts: list[Start]
    missing: dict[str, str] = field(default_factory=dict)
    real: bool = False

    @property
    def first(self) -> Pretrained:
        return next(iter(self.models.values()))

    @property
    def worlds(self) -> list[str]:
        """The names of the worlds; messages refer to a world by its position in this list."""
        return [*self.models, *([REAL] if self.real else [])]

    @property
    def size(self) -> int:
        return self.first.options.data.frame_size

    @property
    def actions(self) -> list[str]:
        return self.first.options.data.action_names

    @property
    def action_vectors(self) -> bool:
        """Whether an action is a vector of keys, any number of which can be held at once."""
        return self.first.model.has_vectors

    @property
    def idle(self) -> int | None:
        """The action of a player who presses nothing; None: no action stands for that."""
        if self.action_vectors:
            return None
        names = [name.lower() for name in self.actions]
        return next((names.index(name) for name in IDLE if name in names), None)

    def action(self, held: frozenset[int]) -> Action | None:
        """Choose the action of a player who holds these; None: none, and the worlds wait."""
        if self.action_vectors:
            return tuple(float(number in held) for number in range(len(self.actions)))
        return next(iter(held), self.idle)

    @property
    def settings(self) -> Settings:
        """The first model's own settings, for a world without a server."""
        return Settings(self.first.steps, self.first.guidance_scale)

    def start(self, name: str) -> Start:
        """Look up a start clip.

        Raises:
            ScdError: there is none of this name.
        """
        for start in self.starts:
            if start.name == name:
                return start
        raise ScdError(f"no start {name!r}; there are {', '.join(s.name for s in self.starts)}")

    def make_world(self, name: str) -> World:
        """Create a world.

        Raises:
            ScdError: there is none of this name, or it does not start.
        """
        if name in self.models:
            return ModelWorld(self.models[name])
        if name != REAL or not self.real:
            why = self.missing.get(name, f"there are {', '.join(self.worlds)}")
            raise ScdError(f"no world {name!r} ({why})")
        return RealWorld(self.size)


def load_catalog(
    model: Path, baseline: Path | None, starts: Path, overrides: list[str] | None = None
) -> Catalog:
    """Load the models and the start clips.

    Args:
        baseline: another model to show beside the first; None: no other.

    Raises:
        ScdError: a folder is missing or damaged, or the two models do not fit each other.
    """
    models = {"model": load_pretrained(model, overrides)}
    missing = {}
    if baseline is None:
        missing["baseline"] = "start the server with scd play --baseline DIR"
    else:
        models["baseline"] = load_pretrained(baseline, overrides)
        first, other = (
            (o.data.frame_size, o.data.action_names, o.model.condition)
            for o in (m.options for m in models.values())
        )
        if first != other:
            raise ScdError(f"{baseline}: its actions or frame size differ from those of {model}")
    options = models["model"].options
    size, count = options.data.frame_size, len(options.data.action_names)
    clips = load_starts(starts, size, count, models["model"].model.has_vectors)
    # Doom itself needs the simulator's actions, and start clips that it can replay.
    real = has_doom_actions(options) and all(start.seed is not None for start in clips)
    if real and importlib.util.find_spec("vizdoom") is None:
        real, missing[REAL] = False, "the package vizdoom is not installed"
    return Catalog(models, clips, missing, real)
