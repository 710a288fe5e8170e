"""`scd play --measure`: speed and latency, measured by playing through a real connection."""

import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import uvicorn
from websockets.asyncio.client import ClientConnection, connect

from scd.errors import ScdError
from scd.play.access import Limits
from scd.play.catalog import Catalog
from scd.play.messages import HEADER, WORLD_HEADER
from scd.play.server import Address, listen, make_app, server_config
from scd.utils.environment import environment
from scd.utils.table import Table

WARM_UP = 5  # frames
PRESSES = 20
# Every picture is confirmed by a message, and there are keys: twice as many messages as pictures.
UNLIMITED = Limits(max_fps=10_000.0, messages_per_second=20_000.0)
HEADS = ["worlds", "pictures/s", "ms/picture p50", "p95", "encoder", "denoising", "decoding"]
HEADS += ["key to picture, ms p50", "p95"]


def measure_latency(catalog: Catalog, frames: int) -> dict[str, Any]:
    """Measure each world alone, and all together; print a table, and the figures as JSON.

    Pictures per second are as many as can be made. Key to picture is measured at the default
    speed: from sending a key at a random time to the arrival of the first picture that obeys it.

    Raises:
        ScdError: there is no frame to measure.
    """
    if frames < 1:
        raise ScdError(f"play: --measure {frames}: must be at least 1")
    choices = [[name] for name in catalog.worlds]
    choices += [catalog.worlds] if len(choices) > 1 else []
    results = [asyncio.run(_measure(catalog, worlds, frames)) for worlds in choices]
    print("\n" + Table(HEADS, [_row(result) for result in results], 1, []).markdown() + "\n")
    figures = {"results": results, "environment": environment()}
    print(json.dumps(figures))
    return figures


@asynccontextmanager
async def running_server(catalog: Catalog, **how: Any) -> AsyncIterator[str]:
    """Run a server, and yield its `host:port`; takes the arguments of `make_app`."""
    listening = listen(Address(port=0))
    server = uvicorn.Server(server_config(make_app(catalog, **how)))
    running = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        yield "{}:{}".format(*listening.getsockname())
    finally:
        server.should_exit = True
        await running


async def _measure(catalog: Catalog, worlds: Sequence[str], frames: int) -> dict[str, Any]:
    async with (
        running_server(catalog, limits=UNLIMITED) as host,
        connect(f"ws://{host}/ws", max_size=None) as player,  # pictures may be large
    ):
        start = catalog.starts[0].name
        await _send(player, "start", start=start, worlds=worlds)
        await _send(player, "settings", fps=UNLIMITED.max_fps)
        await _send(player, "pause", paused=False)
        arrived, parts = [], []
        random_action = random.Random(0)
        for number in range(WARM_UP + frames):
            if number % 8 == 0:
                action = random_action.randrange(len(catalog.actions))
                await _send(player, "input", **_input(catalog, action), seq=0)
            picture = await _next_picture(player)
            arrived.append(time.perf_counter())
            parts.append(_milliseconds(picture))
        await _send(player, "settings", fps=UNLIMITED.fps)
        waits = []
        for seq in range(1, PRESSES + 1):
            await asyncio.sleep(random_action.random() / UNLIMITED.fps)
            sent = time.perf_counter()
            action = seq % len(catalog.actions)
            await _send(player, "input", **_input(catalog, action), seq=seq)
            while HEADER.unpack_from(await _next_picture(player))[8] != seq:
                pass
            waits.append(1e3 * (time.perf_counter() - sent))
    gaps = 1e3 * np.diff(arrived[WARM_UP - 1 :])
    return {
        "worlds": list(worlds),
        "pictures_per_second": 1e3 / float(gaps.mean()),
        "picture_ms": _quantiles(gaps),
        "parts_ms": {
            name: [statistics.median(of_world) for of_world in zip(*columns, strict=True)]
            for name, columns in zip(
                ("encoder", "denoising", "decoding"),
                zip(*parts[WARM_UP:], strict=True),
                strict=True,
            )
        },
        "key_to_picture_ms": _quantiles(waits),
        "frames": frames,
        "presses": PRESSES,
    }


async def _send(player: ClientConnection, kind: str, **fields: Any) -> None:
    await player.send(json.dumps({"type": kind, **fields}))


def _input(catalog: Catalog, action: int) -> dict[str, Any]:
    """Make the fields of an input message that holds one action."""
    return {"held": [action]} if catalog.action_vectors else {"action": action}


async def _next_picture(player: ClientConnection) -> bytes:
    """Receive pictures, confirming each as seen, up to the next one of a new frame."""
    while True:
        message = await player.recv()
        if isinstance(message, bytes):
            _, _, _, flags, _, _, _, serial, _, _ = HEADER.unpack_from(message)
            await _send(player, "seen", serial=serial)
            if flags == 0:
                return message


def _milliseconds(picture: bytes) -> tuple[tuple[float, ...], ...]:
    """Read the times of encoder, denoising and decoding, each for every world."""
    _, worlds, _, _, height, width, *_ = HEADER.unpack_from(picture)
    size = WORLD_HEADER.size + 3 * height * width
    times = [
        WORLD_HEADER.unpack_from(picture, HEADER.size + size * world)[3:] for world in range(worlds)
    ]
    return tuple(zip(*times, strict=True))


def _quantiles(values: Sequence[float] | np.ndarray) -> list[float]:
    """Compute the median and the 95th percentile."""
    return [float(value) for value in np.quantile(values, [0.5, 0.95])]


def _row(result: dict[str, Any]) -> list[str]:
    parts = [" + ".join(f"{ms:.1f}" for ms in of) for of in result["parts_ms"].values()]
    return [
        " + ".join(result["worlds"]),
        f"{result['pictures_per_second']:.1f}",
        *(f"{ms:.1f}" for ms in result["picture_ms"]),
        *parts,
        *(f"{ms:.0f}" for ms in result["key_to_picture_ms"]),
    ]
