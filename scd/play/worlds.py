"""Worlds that obey the same actions: that of a model, and the real one that it learned from.

A world is an environment whose past its caller keeps, so that it can be restored to any frame.
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
from scd.models.load import load_folder, refuse_wan_folder
from scd.models.world_model import WorldModel
from scd.options import OPTIONS_FILE, Guidance, Options, load_options
from scd.play.starts import Action, Start
from scd.rollout import Rollout
from scd.utils.paths import why_missing
from scd.utils.seeding import generator

MAX_STEPS = 16  # that a player can choose, and that a model begins with
MAX_GUIDANCE = 4.0  # likewise
MAX_REPLAY = 1500  # frames of Doom that are replayed to restore one; takes about two seconds
MAX_ACTIONS = 256  # one byte in a picture message


@dataclass(frozen=True)
class Settings:
    """What a player can change while playing.

    Args:
        steps: denoising steps a frame; None: each model's own number.
        guidance_scale: 1 is no guidance; None: each model's own scale.
    """

    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0


class Times(NamedTuple):
    """The parts of a frame's time, in milliseconds."""

    encoder: float = 0.0  # the model's part that runs once per frame
    denoising: float = 0.0  # all steps
    decoding: float = 0.0  # the autoencoder: latents to pixels


NO_TIMES = Times()


@dataclass(frozen=True)
class View:
    """One world's view of a frame, with what the world needs to go on from it.

    Args:
        picture: (H, W, 3) uint8.
        latents: (C, h, w), of a model's frame.
        over: the world has ended, or could not be restored: its picture stands still.
    """

    picture: np.ndarray
    latents: Tensor | None = None
    times: Times = NO_TIMES
    over: bool = False


def frame_seed(seed: int, number: int) -> int:
    """Choose the seed of the noise of a frame, by its number in the timeline."""
    return generator("cpu", "play", seed, number).initial_seed()


class World(Protocol):
    """An environment whose past is kept by its caller."""

    def reset(self, start: Start, settings: Settings) -> list[View]:
        """Begin with a start clip: return the views of its frames, and be at the last one."""
        ...

    def restore(
        self, past: Sequence[View], actions: Sequence[Action], complete: bool, settings: Settings
    ) -> None:
        """Go to the last frame of a past, and continue from there with these settings.

        Args:
            past: views of this world, as far back as they are stored.
            actions: the action that led to each view.
            complete: whether the past begins with the start clip's first frame.
        """
        ...

    def step(self, action: Action, number: int) -> View:
        """Generate the next frame, which has this number in the timeline."""
        ...

    def close(self) -> None:
        """Free what the world holds."""
        ...


class ModelWorld:
    """The world of a model: a rollout with a sliding window.

    A frame is a function of the past, its action, the settings and (seed, frame number) alone.
    """

    def __init__(self, pretrained: "Pretrained"):
        self.pretrained = pretrained
        self._generator = torch.Generator()
        self._encoded_at = 0.0
        self._settings: Settings
        self._newest: View | None = None
        self._rollout: Rollout

    @torch.no_grad()
    def reset(self, start: Start, settings: Settings) -> list[View]:
        """Begin with a start clip; see `World`."""
        video = torch.from_numpy(start.frames).movedim(-1, 1)[None].float() / 255
        latents = self.pretrained.codec.encode(video.to(self.pretrained.model.device))[0]
        views = [View(p, z) for p, z in zip(start.frames, latents, strict=True)]
        self.restore(views, start.actions, True, settings)
        return views

    def restore(
        self, past: Sequence[View], actions: Sequence[Action], complete: bool, settings: Settings
    ) -> None:
        """Encode the past again; see `World`.

        Frames that have left the window shaped those in it, since every layer reaches one window
        further back. So (layers × (window − 1) + 1) frames are needed, all but the newest encoded.
        """
        model, options, s = self.pretrained.model, self.pretrained.options.rollout, settings
        if past[-1] is self._newest and s == replace(self._settings, seed=s.seed):
            self._settings = s  # already there, and the seed only changes the noise to come
            return
        self._settings, self._newest = s, past[-1]
        own = self.pretrained
        scale = own.guidance_scale if s.guidance_scale is None else s.guidance_scale
        options = replace(
            options,
            # Every frame can be the first of a rollout, after a rewind, and stays what it was.
            first_frame_steps=0,
            steps=own.steps if s.steps is None else s.steps,
            guidance=own.guidance if scale != 1.0 else "none",
            guidance_scale=scale,
        )
        self._rollout = Rollout(model, options)
        self._rollout.on_encoded = self._note_encoded
        reach = model.cached_layers * (self._rollout.window.frames - 1) + 1
        latents = torch.stack([view.latents for view in past[-reach:] if view.latents is not None])
        known = torch.tensor([actions[-reach:]])
        self._rollout.reset(latents[None], known, generator=self._generator)

    def step(self, action: Action, number: int) -> View:
        """Generate the next frame; see `World`."""
        self._generator.manual_seed(frame_seed(self._settings.seed, number))
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
        """Do nothing: a model holds no resources."""

    def _note_encoded(self) -> None:
        self._encoded_at = self._now()

    def _now(self) -> float:
        if self.pretrained.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class RealWorld:
    """ViZDoom itself, in the episode that the start clip is from.

    Raises:
        ScdError: ViZDoom is not installed or does not start.
    """

    def __init__(self, size: int):
        self._simulator = DoomSimulator(size)
        self._seed = 0
        self._newest: View | None = None

    def reset(self, start: Start, settings: Settings) -> list[View]:
        """Replay the start clip, whose video shows the same frames compressed; see `World`."""
        assert start.seed is not None  # else the catalog has no real world
        self._seed = start.seed
        return self._replay(start.actions)

    def restore(
        self, past: Sequence[View], actions: Sequence[Action], complete: bool, settings: Settings
    ) -> None:
        """Replay the episode, if its past is complete and not too long; see `World`."""
        if past[-1] is self._newest:
            return
        self._newest = replace(past[-1], over=True)
        if complete and not past[-1].over and len(past) <= MAX_REPLAY:
            with suppress(Exception):  # see `step`
                self._replay(actions)
                if not self._newest.over:  # it is there; a change of settings replays nothing
                    self._newest = past[-1]

    def step(self, action: Action, number: int) -> View:
        """Take the action in Doom; see `World`."""
        assert self._newest is not None  # `reset` comes first
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
        """End the simulator's process."""
        self._simulator.close()

    def _replay(self, actions: Sequence[Action]) -> list[View]:
        views = [View(self._simulator.reset(self._seed))]
        self._newest = views[0]
        views += [self.step(action, number) for number, action in enumerate(actions[1:], 1)]
        return views


@dataclass(frozen=True)
class Pretrained:
    """A pretrained world model under actions, its autoencoder, and its experiment's options."""

    folder: Path
    model: WorldModel
    codec: Codec
    options: Options

    @property
    def about(self) -> dict[str, str | int | float]:
        """What the page shows about the model."""
        return {
            "name": self.options.name,
            "kind": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
        }

    @property
    def steps(self) -> int:
        """Its own number of denoising steps, as far as a player could choose it."""
        return min(self.options.rollout.steps, MAX_STEPS)

    @property
    def guidance_scale(self) -> float:
        """Its own scale of guidance, as far as a player could choose it; 1: none."""
        options = self.options.rollout
        scale = options.guidance_scale if options.guidance != "none" else 1.0
        return min(max(scale, 1.0), MAX_GUIDANCE)

    @property
    def guidance(self) -> Guidance:
        """The kind of guidance that a scale above 1 turns on."""
        if self.options.rollout.guidance != "none":
            return self.options.rollout.guidance
        return "context" if self.model.has_context else "condition"


def load_pretrained(folder: Path, overrides: list[str] | None = None) -> Pretrained:
    """Load a folder that `SCDPipeline.save_pretrained` wrote, with its experiment's `options.yml`.

    Args:
        overrides: `key=value`, applied to the options.

    Raises:
        ScdError: the folder or a part of it is missing or damaged, or its model cannot be played.
    """
    if not folder.is_dir():
        raise ScdError(
            f"{folder}: {why_missing(folder, 'folder')}; expected the folder of a pretrained model "
            f"(transformer/, vae/, options.yml)"
        )
    refuse_wan_folder(folder)
    options = load_options(folder / OPTIONS_FILE, overrides)
    check_playable(options, folder / OPTIONS_FILE)
    loaded = load_folder(folder, options).for_rollouts()
    loaded.model.requires_grad_(False)
    return Pretrained(folder, loaded.model, loaded.codec, loaded.options)


def check_playable(options: Options, where: Path) -> None:
    """Refuse options of a model that cannot be played.

    Raises:
        ScdError: says what is missing, and names the file `where` they are from.
    """
    names, rollout = options.data.action_names, options.rollout
    if options.task != "world_model" or not options.model.has_actions:
        raise ScdError(f"{where}: only a world model under actions can be played")
    if options.model.is_bidirectional:
        raise ScdError(
            f"{where}: a {options.model.type} denoises all frames of a clip at once: it cannot be "
            f"played frame by frame"
        )
    if len(names) != options.model.num_conditions:
        raise ScdError(
            f"{where}: {len(names)} data.action_names for {options.model.num_conditions} actions: "
            f"name every action"
        )
    if len(names) > MAX_ACTIONS:
        raise ScdError(f"{where}: {len(names)} actions, but the page supports {MAX_ACTIONS}")
    if rollout.window < 1 or rollout.sink_frames:
        raise ScdError(
            f"{where}: to play for ever, rollout.window must be at least 1 and "
            f"rollout.sink_frames 0, not {rollout.window} and {rollout.sink_frames}"
        )
