"""Shared by the tests of play: a small pretrained model, start clips, and a player."""

import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from websockets.asyncio.client import ClientConnection, connect

from scd.data.lists import ClipEntry, write_list
from scd.data.video import write_video
from scd.models import SCD, CausalDiT, WorldModel
from scd.models.autoencoder import LatentCodec, load_codec
from scd.pipeline import SCDPipeline
from scd.play.catalog import Catalog
from scd.play.messages import HEADER, WORLD_HEADER
from scd.play.starts import Action, Start
from scd.play.worlds import Settings, View, load_pretrained

ACTIONS = ["none", "turn left", "turn right", "forward"]
WINDOW = 4


def pretrained_folder(
    folder: Path,
    autoencoder: str,
    kind: str = "scd",
    actions: Sequence[str] = ACTIONS,
    condition: str = "action",
) -> Path:
    """Save a random model of 64x64 pixels with a window of 4 frames."""
    torch.manual_seed(0)
    shared: dict[str, Any] = {"channels": 8, "patch_size": 4, "heads": 1}
    shared |= {"condition": condition, "num_conditions": len(actions), "prediction": "data"}
    layers: dict[str, int] = {"layers": 2}
    model: WorldModel = CausalDiT(**layers, **shared)
    if kind == "scd":
        layers = {"encoder_layers": 2, "decoder_layers": 1}
        model = SCD(**layers, **shared)
    for parameter in model.parameters():  # fresh modulation is zero: actions would do nothing
        torch.nn.init.normal_(parameter, std=0.1)
    codec = load_codec(autoencoder)
    assert isinstance(codec, LatentCodec)
    SCDPipeline(model, codec.autoencoder).save_pretrained(folder)
    options = {
        "name": f"tiny_{kind}",
        "task": "world_model",
        "data": {"root": "nowhere", "frame_size": 64, "action_names": list(actions)},
        "autoencoder": {"path": "elsewhere"},
        "model": {"type": kind, "patch_size": 4, "heads": 1, "condition": condition}
        | {"num_conditions": len(actions), **layers},
        "flow": {"prediction": "data"},
        "train": {"steps": 1, "batch_size": 1},
        "rollout": {"steps": 2, "guidance": "none", "guidance_scale": 1.0, "window": WINDOW},
        "eval": {"context_frames": 1, "new_frames": 1},
    }
    (folder / "options.yml").write_text(yaml.safe_dump(options), encoding="utf-8")
    return folder


def some_start(name: str = "here", seed: int = 1_000_000, frames: int = 6) -> Start:
    """Make a start clip of noise."""
    rng = np.random.default_rng(0)
    actions = tuple(int(action) for action in rng.integers(0, 4, frames))
    return Start(name, actions, rng.integers(0, 256, (frames, 64, 64, 3), np.uint8), seed)


def own_data(root: Path, clips: int, frames: int, actions: int, size: int = 64) -> None:
    """Write videos of noise with actions, and their validation list."""
    rng = np.random.default_rng(0)
    entries = []
    for number in range(clips):
        pictures = rng.integers(0, 256, (frames, size, size, 3), np.uint8)
        write_video(root / f"{number}.mp4", pictures, 10, crf=0)
        np.savez(root / f"{number}.npz", actions=rng.integers(0, actions, frames))
        entries.append(ClipEntry(f"{number}.mp4", f"{number}.npz"))
    write_list(root / "val.json", entries)


def small_catalog(root: Path, autoencoder: str) -> Catalog:
    """Load a model and a baseline, without ViZDoom."""
    models = {
        name: load_pretrained(pretrained_folder(root / name, autoencoder, kind))
        for name, kind in (("model", "scd"), ("baseline", "causal_dit"))
    }
    starts = [some_start(), some_start("there", 1_000_001)]
    return Catalog(models, starts, {"real": "not in this test"})


class StillWorld:
    """A world that shows the start's last frame at once, and notes its steps and its end.

    Args:
        late: number of a frame that takes longer, and its seconds.
    """

    def __init__(self, late: tuple[int, float] = (0, 0.0)):
        self.late = late
        self.stepped: list[float] = []
        self.closed = False

    def reset(self, start: Start, settings: Settings) -> list[View]:
        views = [View(picture) for picture in start.frames]
        self._view = views[-1]
        return views

    def restore(
        self, past: Sequence[View], actions: Sequence[Action], complete: bool, settings: Settings
    ) -> None:
        pass

    def step(self, action: Action, number: int) -> View:
        self.stepped.append(time.monotonic())
        if number == self.late[0]:
            time.sleep(self.late[1])
        return self._view

    def close(self) -> None:
        self.closed = True


class Player:
    """A connected client that follows the protocol."""

    def __init__(self, socket: ClientConnection):
        self.socket = socket

    async def send(self, kind: str, **fields: Any) -> None:
        await self.socket.send(json.dumps({"type": kind, **fields}))

    async def receive(self, kind: str) -> dict[str, Any]:
        """Receive the next JSON message, of this type; pictures before it are confirmed."""
        while True:
            message = await self.socket.recv()
            if isinstance(message, str):
                fields = json.loads(message)
                if fields["type"] == "alive":
                    continue
                assert fields["type"] == kind, fields
                return fields
            await self.send("seen", serial=read(message)["serial"])

    async def picture(self, seen: bool = True) -> dict[str, Any]:
        """Receive the next picture; JSON messages before it are ignored."""
        while True:
            message = await self.socket.recv()
            if isinstance(message, bytes):
                picture = read(message)
                if seen:
                    await self.send("seen", serial=picture["serial"])
                return picture


def read(message: bytes) -> dict[str, Any]:
    """Read a picture message, as README.md describes it."""
    names = ("protocol", "worlds", "action", "flags", "height", "width", "frame", "serial", "seq")
    picture = dict(zip((*names, "made_ms"), HEADER.unpack_from(message), strict=True))
    height, width = picture["height"], picture["width"]
    size, pixels = WORLD_HEADER.size, 3 * height * width
    assert len(message) == HEADER.size + picture["worlds"] * (size + pixels)
    picture["views"] = []
    for at in range(HEADER.size, len(message), size + pixels):
        world, flags, _, *times = WORLD_HEADER.unpack_from(message, at)
        rgb = np.frombuffer(message, np.uint8, pixels, at + size).reshape(height, width, 3)
        picture["views"].append({"world": world, "over": flags, "times": times, "rgb": rgb})
    return picture


@asynccontextmanager
async def playing(host: str, query: str = "", **how: Any) -> AsyncIterator[Player]:
    """Connect a player, and receive everything up to the first picture."""
    async with connect(f"ws://{host}/ws{query}", **how) as socket:
        player = Player(socket)
        player.hello = await player.receive("hello")  # type: ignore[attr-defined]
        player.state = await player.receive("state")  # type: ignore[attr-defined]
        player.first = await player.picture()  # type: ignore[attr-defined]
        yield player
