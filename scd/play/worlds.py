"""Worlds that obey the same actions: a model's, and the real one it learned from.

A world goes on from a past that its caller keeps, so that it can be put back to any frame.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from scd.doom.simulator import DoomSimulator
from scd.errors import ScdError
from scd.models.autoencoder import Codec
from scd.models.load import load_folder
from scd.models.world_model import WorldModel
from scd.options import OPTIONS_FILE, Guidance, Options, load_options
from scd.play.starts import Action, Start
from scd.rollout import Rollout
from scd.utils.paths import why_missing
from scd.utils.seeding import generator

MAX_REPLAY = 1500  # frames of Doom that are played again to get back to one; about two seconds


MAX_ACTIONS = 256  # one byte on the wire


@dataclass(frozen=True)
class Pretrained:
    """A world model under actions, its autoencoder, and the options they were trained with."""

    folder: Path
    model: WorldModel
    codec: Codec
    options: Options

    @property
    def about(self) -> dict[str, str | int]:
        """What the page tells about it."""
        parameters = sum(p.numel() for p in self.model.parameters())
        return {"kind": type(self.model).__name__, "parameters": parameters}

    @property
    def guidance(self) -> Guidance:
        """The kind of guidance that a scale above 1 turns on."""
        if self.options.rollout.guidance != "none":
            return self.options.rollout.guidance
        return "context" if self.model.has_context else "condition"


@dataclass(frozen=True)
class Settings:
    """What a player can change while playing."""

    steps: int
    guidance_scale: float
    seed: int = 0


class Times(NamedTuple):
    """Milliseconds that a frame took."""

    encoder: float = 0.0  # the model's part that runs once a frame
    denoising: float = 0.0  # all steps
    decoding: float = 0.0  # the autoencoder: latents to pixels


NO_TIMES = Times()


@dataclass(frozen=True)
class View:
    """What a world showed of one frame, and what it needs to go on from there.

    Args:
        picture: (H, W, 3) uint8.
        latents: (C, h, w) of a model's frame.
        over: the world has ended, or cannot be put back here: the picture stands still.
    """

    picture: np.ndarray
    latents: Tensor | None = None
    times: Times = NO_TIMES
    over: bool = False


class World(Protocol):
    """An environment whose past is kept outside."""

    def begin(self, start: Start, settings: Settings) -> list[View]:
        """The frames of a start; the world is then at its last one."""
        ...

    def go_to(
        self, past: Sequence[View], actions: Sequence[Action], whole: bool, settings: Settings
    ) -> None:
        """Be at the last frame of a past, and go on with these settings.

        Args:
            past: views of this world, as far back as they are kept.
            actions: that led to each of them.
            whole: the past begins with the start's first frame.
        """
        ...

    def step(self, action: Action, number: int) -> View:
        """The next frame, the video's frame `number`."""
        ...

    def close(self) -> None: ...


class ModelWorld:
    """A model's world: a rollout through a sliding window.

    A frame is a function of the past, its action, the settings and (seed, frame number) alone.
    """

    def __init__(self, pretrained: Pretrained):
        self.pretrained = pretrained
        self._generator = torch.Generator()
        self._encoded_at = 0.0
        self._settings: Settings
        self._newest: View | None = None
        self._rollout: Rollout

    @torch.no_grad()
    def begin(self, start: Start, settings: Settings) -> list[View]:
        """See `World`."""
        video = torch.from_numpy(start.frames).movedim(-1, 1)[None].float() / 255
        latents = self.pretrained.codec.encode(video.to(self.pretrained.model.device))[0]
        views = [View(p, z) for p, z in zip(start.frames, latents, strict=True)]
        self.go_to(views, start.actions, True, settings)
        return views

    def go_to(
        self, past: Sequence[View], actions: Sequence[Action], whole: bool, settings: Settings
    ) -> None:
        """See `World`. What the window no longer holds still shaped what it holds: every layer
        looks one window further back, so that so many frames are taken in again."""
        model, options, s = self.pretrained.model, self.pretrained.options.rollout, settings
        if past[-1] is self._newest and s == replace(self._settings, seed=s.seed):
            self._settings = s  # it is there, and another seed changes no more than the noise
            return
        self._settings, self._newest = s, past[-1]
        guided = self.pretrained.guidance if s.guidance_scale != 1.0 else "none"
        self._rollout = Rollout(
            model,
            replace(options, steps=s.steps, guidance=guided, guidance_scale=s.guidance_scale),
        )
        self._rollout.on_encoded = self._note_encoded
        reach = model.cached_layers * (self._rollout.window.frames - 1) + 1
        latents = torch.stack([view.latents for view in past[-reach:] if view.latents is not None])
        known = torch.tensor([actions[-reach:]])
        self._rollout.reset(latents[None], known, generator=self._generator)

    def step(self, action: Action, number: int) -> View:
        """See `World`."""
        of_frame = generator("cpu", "play", self._settings.seed, number)
        self._generator.manual_seed(of_frame.initial_seed())
        begun = self._now()
        latents = self._rollout.step(torch.tensor([action]))
        denoised = self._now()
        pixels = self.pretrained.codec.decode(latents[:, None])[0, 0]
        picture = (pixels * 255).round().byte().movedim(0, -1).contiguous().cpu().numpy()
        marks = (begun, self._encoded_at, denoised, self._now())
        times = Times(*(1e3 * (b - a) for a, b in pairwise(marks)))
        self._newest = View(picture, latents[0], times)
        return self._newest

    def close(self) -> None:
        """See `World`."""

    def _note_encoded(self) -> None:
        self._encoded_at = self._now()

    def _now(self) -> float:
        if self.pretrained.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class RealWorld:
    """ViZDoom itself, in the episode that the start is from.

    Raises:
        ScdError: ViZDoom is not installed or does not start.
    """

    def __init__(self, size: int):
        self._simulator = DoomSimulator(size)
        self._seed = 0
        self._newest: View | None = None

    def begin(self, start: Start, settings: Settings) -> list[View]:
        """See `World`: the episode's own frames, which the start's video shows compressed."""
        assert start.seed is not None  # else Doom is not offered
        self._seed = start.seed
        return self._replay(start.actions)

    def go_to(
        self, past: Sequence[View], actions: Sequence[Action], whole: bool, settings: Settings
    ) -> None:
        """See `World`: the episode is played again, if it is known whole and not too long."""
        if past[-1] is self._newest:
            return
        self._newest = replace(past[-1], over=True)
        if whole and not past[-1].over and len(past) <= MAX_REPLAY:
            with suppress(Exception):  # see `step`
                self._replay(actions)

    def step(self, action: Action, number: int) -> View:
        """See `World`."""
        assert self._newest is not None  # `begin` comes first
        if not self._newest.over:
            try:
                picture = self._simulator.step(action)
            except Exception:  # ViZDoom is another process, which may die; it raises many kinds
                picture = None
            if picture is None:
                self._newest = replace(self._newest, over=True)
            else:
                self._newest = View(picture)
        return self._newest

    def close(self) -> None:
        """See `World`."""
        self._simulator.close()

    def _replay(self, actions: Sequence[Action]) -> list[View]:
        views = [View(self._simulator.reset(self._seed))]
        self._newest = views[0]
        views += [self.step(action, number) for number, action in enumerate(actions[1:], 1)]
        return views


def load_pretrained(folder: Path, overrides: list[str] | None = None) -> Pretrained:
    """Load what `SCDPipeline.save_pretrained` wrote, with the experiment's `options.yml` beside it.

    Args:
        overrides: `key=value`, on top of the options.

    Raises:
        ScdError: the folder or a part of it is missing or damaged, or its model cannot be played.
    """
    if not folder.is_dir():
        raise ScdError(
            f"{folder}: {why_missing(folder, 'folder')}; --model names one with a pretrained model "
            f"(transformer/, vae/, options.yml)"
        )
    options = load_options(folder / OPTIONS_FILE, overrides)
    _check_playable(options, folder)
    loaded = load_folder(folder, options).for_rollouts()
    loaded.model.requires_grad_(False)
    return Pretrained(folder, loaded.model, loaded.codec, loaded.options)


def _check_playable(options: Options, folder: Path) -> None:
    where, names, rollout = folder / OPTIONS_FILE, options.data.action_names, options.rollout
    if options.task != "world_model" or not options.model.has_actions:
        raise ScdError(f"{where}: only a world model under actions can be played")
    if len(names) != options.model.num_conditions:
        raise ScdError(
            f"{where}: {len(names)} data.action_names for {options.model.num_conditions} actions: "
            f"a player needs a name of each"
        )
    if len(names) > MAX_ACTIONS:
        raise ScdError(f"{where}: {len(names)} actions, but the page knows {MAX_ACTIONS} at most")
    if rollout.window < 1 or rollout.sink_frames:
        raise ScdError(
            f"{where}: to play for ever, rollout.window must be at least 1 and "
            f"rollout.sink_frames 0, not {rollout.window} and {rollout.sink_frames}"
        )
