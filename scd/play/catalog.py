"""Collect what a server can show: worlds, start clips, actions, and the limits of the sliders."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

from scd.errors import ScdError
from scd.play.starts import Action, Start, are_dooms, load_starts
from scd.play.worlds import (
    ModelWorld,
    Pretrained,
    RealWorld,
    Settings,
    World,
    load_pretrained,
)

MAX_STEPS = 16
MAX_GUIDANCE = 4.0
MAX_SEED = 2**31 - 1
REAL = "real"  # Doom itself
IDLE = ("none", "noop", "no-op", "no_op", "idle", "nothing")  # names, in lower case


@dataclass(frozen=True)
class Catalog:
    """All that players can choose from.

    Args:
        models: by the name of their world, the first one is what a player begins with.
        missing: worlds that cannot be had, and why.
        real: Doom itself can be shown beside the models.
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
        """Names; a world's place is its number on the wire."""
        return [*self.models, *([REAL] if self.real else [])]

    @property
    def size(self) -> int:
        return self.first.options.data.frame_size

    @property
    def actions(self) -> list[str]:
        return self.first.options.data.action_names

    @property
    def several(self) -> bool:
        """Whether several of the actions can be held at once: a frame has a vector of them."""
        return self.first.model.has_vectors

    @property
    def idle(self) -> int | None:
        """The action of a player who presses nothing; None: no action of its own."""
        if self.several:
            return None
        names = [name.lower() for name in self.actions]
        return next((names.index(name) for name in IDLE if name in names), None)

    def action(self, held: frozenset[int]) -> Action | None:
        """What a player does who holds these actions; None: nothing, worlds stand still."""
        if self.several:
            return tuple(float(number in held) for number in range(len(self.actions)))
        return next(iter(held), self.idle)

    @property
    def settings(self) -> Settings:
        """What a player begins with."""
        options = self.first.options.rollout
        scale = options.guidance_scale if options.guidance != "none" else 1.0
        return Settings(min(options.steps, MAX_STEPS), min(max(scale, 1.0), MAX_GUIDANCE))

    def start(self, name: str) -> Start:
        """Raises: ScdError: there is no such start."""
        for start in self.starts:
            if start.name == name:
                return start
        raise ScdError(f"start {name!r} is none of {', '.join(s.name for s in self.starts)}")

    def make_world(self, name: str) -> World:
        """Raises: ScdError: there is no such world, or it does not start."""
        if name in self.models:
            return ModelWorld(self.models[name])
        if name != REAL or not self.real:
            why = self.missing.get(name, f"there are {', '.join(self.worlds)}")
            raise ScdError(f"no world {name!r} ({why})")
        return RealWorld(self.size)


def load_catalog(
    model: Path, baseline: Path | None, starts: Path, overrides: list[str] | None = None
) -> Catalog:
    """Load everything.

    Args:
        baseline: None: only the model.

    Raises:
        ScdError: a folder is missing or damaged, or the two models do not fit each other.
    """
    models = {"model": load_pretrained(model, overrides)}
    missing = {}
    if baseline is None:
        missing["baseline"] = "none was given: scd play --baseline DIR"
    else:
        models["baseline"] = load_pretrained(baseline, overrides)
        first, other = (
            (o.data.frame_size, o.data.action_names, o.model.condition)
            for o in (m.options for m in models.values())
        )
        if first != other:
            raise ScdError(f"{baseline}: other actions or another frame size than {model}")
    options = models["model"].options
    size, count = options.data.frame_size, len(options.data.action_names)
    found = load_starts(starts, size, count, models["model"].model.has_vectors)
    # A model of Doom has the simulator's actions, and begins in episodes that can be played anew.
    real = are_dooms(options) and all(start.seed is not None for start in found)
    if real and importlib.util.find_spec("vizdoom") is None:
        real, missing[REAL] = False, "the package vizdoom is not installed"
    return Catalog(models, found, missing, real)
