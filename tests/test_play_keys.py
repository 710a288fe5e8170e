"""Play of a world whose actions are vectors of held keys: start clips, frames, messages."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from websockets.exceptions import ConnectionClosed

from scd.doom.simulator import DoomSimulator
from scd.errors import ScdError
from scd.options import load_options
from scd.play import latency as measuring
from scd.play.access import Limits
from scd.play.catalog import Catalog, load_catalog
from scd.play.game import Game
from scd.play.latency import measure_latency, running_server
from scd.play.starts import load_starts, make_starts
from scd.play.worlds import RealWorld, Settings
from tests.play import Player, playing, pretrained_folder

ROOT = Path(__file__).parents[1]
KEYS = ["turn left", "turn right", "forward"]
FRAMES = 6
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_autoencoder_path: str) -> Path:
    """Make a model of keys, one of the same names that takes one at a time, and starts in Doom."""
    root = tmp_path_factory.mktemp("keys")
    for name, condition in (("keys", "action_vector"), ("one_key", "action")):
        pretrained_folder(root / name, tiny_autoencoder_path, actions=KEYS, condition=condition)
    options = load_options(ROOT / "options/scd_doom_keys_tiny.yml")
    make_starts(options, root / "starts", {"one": 1, "two": 3}, frames=FRAMES, doom=True)
    return root


@pytest.fixture(scope="module")
def catalog(root: Path) -> Catalog:
    return load_catalog(root / "keys", None, root / "starts")


def run(test: Callable[[str], Awaitable[None]], catalog: Catalog) -> None:
    async def with_server() -> None:
        async with running_server(catalog, limits=Limits(max_fps=1000.0, fps=1000.0)) as host:
            await asyncio.wait_for(test(host), 30)

    asyncio.run(with_server())


def test_starts_in_doom_are_played_with_keys(root: Path, catalog: Catalog) -> None:
    assert catalog.worlds == ["model", "real"] and catalog.action_vectors and catalog.idle is None
    (start, _) = catalog.starts
    assert all(len(action) == 3 for action in start.actions) and start.seed == 1_000_001
    keys = [*start.actions, (1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.0, 0.0, 0.0)]
    with closing(RealWorld(64)) as world, closing(DoomSimulator(64)) as simulator:
        simulator.reset(start.seed)
        expected = [simulator.step(action) for action in keys[1:]]
        world.reset(start, Settings(1, 1.0))
        pictures = [world.step(action, 0).picture for action in keys[FRAMES:]]
        assert all(map(np.array_equal, pictures, expected[FRAMES - 1 :]))


@pytest.mark.parametrize(
    "actions",
    [[0] * FRAMES, [[0, 1]] * FRAMES, [[0, 1, "1"]] * FRAMES, [[0, 1, float("inf")]] * FRAMES],
)
def test_starts_that_are_wrong(root: Path, tmp_path: Path, actions: list) -> None:
    entry = {"name": "one", "actions": actions}
    (tmp_path / "starts.json").write_text(json.dumps([entry]))
    with pytest.raises(ScdError, match="actions must be a list of lists of 3 numbers"):
        load_starts(tmp_path, 64, 3, vectors=True)


def test_worlds_of_another_kind_do_not_stand_beside_it(root: Path) -> None:
    with pytest.raises(ScdError, match="its actions or frame size differ"):
        load_catalog(root / "keys", root / "one_key", root / "starts")


def test_frames_of_the_model_are_those_of_its_rollout(catalog: Catalog) -> None:
    """After the start's actions, under two keys and under none; in any order of going back."""
    with closing(Game(catalog)) as game:
        both, none = (1.0, 0.0, 1.0), (0.0, 0.0, 0.0)
        first = [game.step(action).views[0].latents for action in (both, none)]
        game.rewind(FRAMES - 1)
        game.step((1.0, 0.0, 0.0))
        game.rewind(FRAMES - 1)
        again = [game.step(action).views[0].latents for action in (both, none)]
        for one, other in zip(first, again, strict=True):
            assert isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
            assert (one - other).abs().max() < 1e-4
        for wrong, message in (
            (1, "actions of this world are vectors"),
            ((1.0, 0.0), "not have 3 comp"),
        ):
            with pytest.raises(ScdError, match=message):
                game.step(wrong)


def test_a_message_holds_two_keys(catalog: Catalog) -> None:
    async def test(host: str) -> None:
        async with playing(host) as player:
            assert player.hello["action_vectors"] and player.hello["actions"] == KEYS

            async def actions_after(*inputs: list[int]) -> list[int]:
                """Return the actions of two frames after these inputs, as bits."""
                for held in inputs:
                    await player.send("input", held=held, seq=7)
                actions = []
                for _ in range(2):
                    await player.send("step")
                    actions.append((await player.picture())["action"])
                return actions

            assert await actions_after([0, 2]) == [0b101, 0b101]
            assert await actions_after([2]) == [0b100, 0b100]
            # A key that was pressed and is gone again still moves one frame, beside what is held.
            assert await actions_after([2, 1], [2]) == [0b110, 0b100]
            assert await actions_after([2, 1], []) == [0b010, 0]  # but not one that was held before
            assert await actions_after([]) == [0, 0]  # nothing held is an action too
            assert await actions_after([0], [0, 2], []) == [0b101, 0]

    run(test, catalog)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"action": 1}, "takes held, not action"),
        ({"held": [3]}, "no such action"),
        ({"held": [-1]}, "held is not a valid numbers"),
        ({"held": 1}, "held is not a valid numbers"),
    ],
)
def test_messages_that_end_the_connection(catalog: Catalog, fields: dict, reason: str) -> None:
    async def test(host: str) -> None:
        async with playing(host) as player:
            await player.send("input", **fields, seq=1)
            assert reason in await reason_of(player)

    run(test, catalog)


def test_a_world_of_one_key_at_a_time_takes_no_set(root: Path) -> None:
    options = load_options(root / "one_key/options.yml")
    starts = [{"name": "two", "actions": [0] * FRAMES}]
    (root / "starts_of_one").mkdir()
    (root / "starts_of_one/starts.json").write_text(json.dumps(starts))
    (root / "starts_of_one/two.mp4").write_bytes((root / "starts/two.mp4").read_bytes())
    catalog = load_catalog(root / "one_key", None, root / "starts_of_one")
    assert not catalog.action_vectors and catalog.actions == options.data.action_names

    async def test(host: str) -> None:
        async with playing(host) as player:
            await player.send("input", held=[0], seq=1)
            assert "takes action, not held" in await reason_of(player)

    run(test, catalog)


async def reason_of(player: Player) -> str:
    while True:
        try:
            await player.socket.recv()
        except ConnectionClosed as gone:
            assert gone.rcvd is not None and gone.rcvd.code == 4400
            return gone.rcvd.reason


def test_it_can_be_measured(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "PRESSES", 2)
    assert measure_latency(catalog, 2)["results"][0]["frames"] == 2
