"""The play server over real sockets: access, messages, pictures, and the ends of sessions."""

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import uvicorn
from starlette.websockets import WebSocketDisconnect, WebSocketState
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from scd import cli
from scd.data.video import VideoFile
from scd.errors import ScdError
from scd.play import access, recording
from scd.play import latency as measuring
from scd.play.access import Limits, RateLimiter, origin_of
from scd.play.catalog import Catalog
from scd.play.history import Frame
from scd.play.latency import measure_latency, running_server
from scd.play.messages import CloseCode, CloseConnection
from scd.play.server import Address, listen, serve
from scd.play.session import Session
from scd.play.session_manager import SessionManager
from scd.play.starts import Action, Start
from scd.play.worlds import Times, View
from tests.play import Player, StillWorld, playing, small_catalog, some_start

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = Limits(max_fps=1000.0, fps=1000.0)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory, tiny_autoencoder_path: str) -> Catalog:
    return small_catalog(tmp_path_factory.mktemp("play"), tiny_autoencoder_path)


def run(test: Callable[[str], Awaitable[None]], catalog: Catalog, **how) -> None:
    """Run a test against a server, for no more than half a minute."""

    async def with_server() -> None:
        async with running_server(catalog, **{"limits": FAST, **how}) as host:
            await asyncio.wait_for(test(host), 30)

    asyncio.run(with_server())


async def closed(player: Player) -> tuple[int, str]:
    """Receive until the server closes the connection; returns code and reason."""
    while True:
        try:
            await player.socket.recv()
        except ConnectionClosed as gone:
            assert gone.rcvd is not None
            return gone.rcvd.code, gone.rcvd.reason


async def quiet(player: Player, seconds: float = 0.3) -> None:
    """Check that nothing arrives."""
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(player.socket.recv(), seconds)


# Playing


def test_heartbeats(catalog):
    async def test(host: str) -> None:
        async with playing(host) as player:
            for _ in range(3):
                assert json.loads(await player.socket.recv()) == {"type": "alive"}

    run(test, catalog, limits=Limits(alive_seconds=0.05))


def test_keys_make_pictures(catalog):
    async def test(host: str) -> None:
        async with playing(host) as player:
            assert player.hello["worlds"] == ["model", "baseline"]
            assert player.hello["actions"][3] == "forward" and not player.hello["resumed"]
            assert player.state["paused"] and player.state["frame"] == 5
            assert np.array_equal(player.first["views"][0]["rgb"], catalog.starts[0].frames[-1])
            assert player.first["flags"] == 3
            await quiet(player)  # paused: nothing is computed
            await player.send("input", action=3, seq=41)
            await player.send("step")
            stepped = await player.picture()
            assert (stepped["frame"], stepped["action"], stepped["seq"]) == (6, 3, 41)
            assert stepped["flags"] == 0 and stepped["made_ms"] > sum(stepped["views"][0]["times"])
            await player.send("pause", paused=False)
            assert not (await player.receive("state"))["paused"]
            for number in range(7, 12):
                assert (await player.picture())["frame"] == number
            # A key that is gone before the next frame still moves one.
            await player.send("settings", fps=5)
            await player.receive("state")
            await player.picture()
            await player.send("input", action=2, seq=42)
            await player.send("input", action=0, seq=43)
            pictures = [await player.picture() for _ in range(3)]
            answer = next(i for i, picture in enumerate(pictures) if picture["seq"] == 43)
            assert [p["action"] for p in pictures[answer:]][:2] in ([2, 0], [2])
            await player.send("pause", paused=True)
            assert (await player.receive("state"))["paused"]
            await quiet(player)

    run(test, catalog)


def test_each_of_several_quick_steps_makes_a_frame(catalog):
    async def test(host: str) -> None:
        async with playing(host) as player:
            for _ in range(4):
                await player.send("step")
            assert [(await player.picture())["frame"] for _ in range(4)] == [6, 7, 8, 9]
            await quiet(player)
            for _ in range(20):
                await player.send("step")
            last = [await player.picture() for _ in range(16)][-1]
            assert last["frame"] < 30  # not all of them waited

    run(test, catalog, limits=replace(FAST, unseen=1))


def test_settings_that_wait_have_one_state_together(catalog):
    async def test(host: str) -> None:
        async with playing(host) as player:
            await player.send("start", start="there", worlds=["model"])  # takes a while
            for seed in (7, 8, 9):
                await player.send("settings", seed=seed)
            assert (await player.receive("state"))["start"] == "there"
            assert (await player.receive("state"))["settings"]["seed"] == 9
            await player.send("keep")
            assert (await player.receive("state"))["branches"]

    run(test, catalog)


def test_frames_made_after_a_rewind_into_the_start_clip_are_not_of_it(catalog):
    async def test(host: str) -> None:
        async with playing(host) as player:
            await player.send("rewind", frame=2)
            shown = await player.picture()
            await player.send("step")
            made = await player.picture()
            assert [(p["frame"], p["flags"]) for p in (shown, made)] == [(2, 3), (3, 0)]

    run(test, catalog)


def test_where_no_action_stands_for_no_key_the_world_waits(catalog):
    model = catalog.first
    data = replace(model.options.data, action_names=["left", "right", "jump", "duck"])
    model = replace(model, options=replace(model.options, data=data))

    async def test(host: str) -> None:
        async with playing(host) as player:
            assert player.hello["idle"] is None and catalog.idle == 0
            await player.send("pause", paused=False)
            await player.receive("state")
            await player.send("step")
            await quiet(player)
            await player.send("input", action=0, seq=1)
            pictures = [await player.picture() for _ in range(3)]
            assert [p["action"] for p in pictures] == [0, 0, 0]
            await player.send("input", seq=2)
            with suppress(TimeoutError):  # those that were under way
                while True:
                    await asyncio.wait_for(player.picture(), 0.3)
            await quiet(player)
            await player.send("pause", paused=True)
            await player.receive("state")
            await player.send("input", action=3, seq=3)  # a tap
            await player.send("input", seq=4)
            await player.send("step")
            assert (await player.picture())["action"] == 3
            await player.send("input", action=4, seq=5)
            assert (await closed(player))[0] == CloseCode.BAD_MESSAGE

    run(test, Catalog({"model": model}, catalog.starts))


def test_commands(catalog):
    async def test(host: str) -> None:
        async with playing(host) as player:
            await player.send("start", start="there", worlds=["baseline", "model"], seed=7)
            state = await player.receive("state")
            assert (state["start"], state["worlds"]) == ("there", ["model", "baseline"])
            assert [view["world"] for view in (await player.picture())["views"]] == [0, 1]
            frames = []
            for seq in range(4):
                await player.send("input", action=seq, seq=seq)
                await player.send("step")
                frames.append(await player.picture())
            await player.send("rewind", frame=7)
            state = await player.receive("state")
            assert state["branches"] == [{"branch": 1, "frame": 9, "shared": 7, "kept": False}]
            shown = await player.picture()
            assert (shown["frame"], shown["flags"]) == (7, 2)
            assert np.array_equal(shown["views"][1]["rgb"], frames[1]["views"][1]["rgb"])
            await player.send("input", action=2, seq=5)
            await player.send("step")  # the same key and seed once more
            again = await player.picture()
            difference = again["views"][0]["rgb"].astype(int) - frames[2]["views"][0]["rgb"]
            assert abs(difference).max() <= 1 and again["frame"] == 8
            await player.send("return", branch=1)
            assert (await player.receive("state"))["frame"] == 9
            await player.picture()
            await player.send("keep")
            assert (await player.receive("state"))["branches"][-1]["kept"]
            await player.send("settings", steps=3, seed=9, fps=30)
            state = await player.receive("state")
            assert state["settings"] == {"steps": 3, "guidance_scale": None, "seed": 9}
            await player.send("start", start="here", worlds=["model"])  # with the same seed
            state = await player.receive("state")
            assert (state["start"], state["settings"]["seed"]) == ("here", 9)
            for wrong in (
                {"kind": "rewind", "frame": 99},
                {"kind": "return", "branch": 99},
                {"kind": "settings", "steps": 99},
                {"kind": "settings", "fps": 0.1},
                {"kind": "settings", "fps": 20, "steps": 99},
                {"kind": "start", "start": "nowhere", "worlds": ["model"]},
            ):
                await player.send(**wrong)
                refused = await player.receive("refused")
                assert refused["what"] == wrong["kind"] and refused["why"]
                after = await player.receive("state")
                assert after == state

    run(test, catalog)


def test_a_slow_reader_waits_and_keeps_nobody_up(catalog):
    async def test(host: str) -> None:
        async with playing(host) as slow, playing(host) as other:
            await slow.send("pause", paused=False)
            await slow.receive("state")
            last = [await slow.picture(seen=False) for _ in range(FAST.unseen)][-1]
            await quiet(slow)
            await other.send("pause", paused=False)
            for _ in range(20):
                picture = await other.picture()
            assert picture["frame"] >= 24
            await slow.send("seen", serial=last["serial"])
            assert (await slow.picture())["frame"] == last["frame"] + 1  # its world had waited

    run(test, catalog)


def test_turns_are_fair(catalog):
    """Two players at full speed, one with two worlds: as many pictures for one as for the other."""

    async def test(host: str) -> None:
        async with playing(host) as one, playing(host) as two:
            await two.send("start", start="here", worlds=["model", "baseline"])
            for player in (one, two):
                await player.send("pause", paused=False)
            counts = [0, 0]

            async def play(number: int, player: Player) -> None:
                while min(counts) < 10:
                    await player.picture()
                    counts[number] += 1

            await asyncio.gather(play(0, one), play(1, two))
            assert max(counts) < 16

    run(test, catalog)


def test_the_pace_is_kept(catalog):
    async def test(host: str) -> None:
        async with playing(host) as player:
            await player.send("settings", fps=25)
            await player.send("pause", paused=False)
            await player.picture()
            begun = time.monotonic()
            for _ in range(20):
                await player.picture()
            assert time.monotonic() - begun > 0.7

    run(test, catalog)


def test_single_steps_leave_the_clock_alone(catalog, monkeypatch):
    monkeypatch.setattr(Catalog, "make_world", lambda *_: StillWorld())

    async def test(host: str) -> None:
        async with playing(host) as player:
            await player.send("settings", fps=2)
            for _ in range(10):
                await player.send("step")
                await player.picture()
            begun = time.monotonic()
            await player.send("pause", paused=False)
            await player.picture()
            assert time.monotonic() - begun < 2  # half a second, on an idle machine

    run(test, catalog)


def test_no_burst_follows_a_late_frame(catalog, monkeypatch):
    """Frame 8 takes two and a half frames' time."""
    world = StillWorld(late=(8, 0.5))
    monkeypatch.setattr(Catalog, "make_world", lambda *_: world)

    async def test(host: str) -> None:
        async with playing(host) as player:
            await player.send("settings", fps=5)
            await player.send("pause", paused=False)
            while (await player.picture())["frame"] < 14:
                pass

    run(test, catalog)
    after = np.diff(world.stepped)[8 - 6 :]  # the first frame that is made has number 6
    assert after[0] >= 0.5 and after[1:].min() > 0.05


# Messages that end a session


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ("no json", 4400),
        (b"\x00\x01", 4400),
        ('{"type": "input", "action": 4, "seq": 1}', 4400),
        ('{"type": "seen", "serial": 9}', 4400),
        (json.dumps({"type": "step", "x": "x" * 5000}), 1009),
    ],
)
def test_a_wrong_message_ends_its_session_only(catalog, sent, code):
    async def test(host: str) -> None:
        async with playing(host) as wrong, playing(host) as right:
            await wrong.socket.send(sent)
            actual, reason = await closed(wrong)
            assert actual == code and (reason or code == 1009)
            await right.send("step")
            assert (await right.picture())["frame"] == 6
            # The session is gone, and its host free.
            async with playing(host, f"?session={wrong.hello['session']}") as new:
                assert not new.hello["resumed"]

    run(test, catalog)


def test_too_many_messages(catalog):
    async def test(host: str) -> None:
        async with playing(host) as player:
            for seq in range(300):
                await player.send("input", action=0, seq=seq)
            assert (await closed(player))[0] == 4429

    run(test, catalog)


def test_too_many_commands_that_wait(catalog, monkeypatch):
    """While frame 6 is made, which takes half a second."""
    monkeypatch.setattr(Catalog, "make_world", lambda *_: StillWorld(late=(6, 0.5)))

    async def test(host: str) -> None:
        async with playing(host) as player:
            await player.send("step")
            for _ in range(FAST.queued_commands + 2):
                await player.send("keep")
            assert await closed(player) == (4429, "too many commands at once")

    run(test, catalog)


def test_a_burst_after_silence_is_no_longer_than_any(monkeypatch):
    now = 0.0
    monkeypatch.setattr(access, "time", SimpleNamespace(monotonic=lambda: now))
    limiter = RateLimiter(10.0)
    now = 60.0
    assert [limiter.allow() for _ in range(15)] == [True] * 10 + [False] * 5


def test_idle_players_are_sent_away(catalog):
    async def test(host: str) -> None:
        async with playing(host) as player:
            await player.send("pause", paused=False)  # watching is no input
            begun = time.monotonic()
            with pytest.raises(ConnectionClosed) as gone:
                while True:
                    await player.picture()
            assert gone.value.rcvd is not None and gone.value.rcvd.code == 4408
            assert "no input for 0.5 seconds" in gone.value.rcvd.reason
            assert time.monotonic() - begun < 2

    run(test, catalog, limits=Limits(idle_seconds=0.5))


def test_holding_a_key_is_playing(catalog):
    async def test(host: str) -> None:
        async with playing(host) as player:
            await player.send("pause", paused=False)
            await player.send("input", action=3, seq=1)
            begun = time.monotonic()
            while time.monotonic() - begun < 1:
                await player.picture()

    run(test, catalog, limits=Limits(idle_seconds=0.5))


def test_a_fault_ends_its_session_only(catalog, caplog):
    async def test(host: str) -> None:
        async with playing(host) as one, playing(host) as two:
            await one.send("start", start="here", worlds=["baseline"])
            await one.receive("state")
            await one.send("step")
            code, reason = await closed(one)
            assert (code, reason) == (4500, "an error on the server ended this session")
            await two.send("step")
            assert (await two.picture())["frame"] == 6

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog.models["baseline"].model, "begin_frame", None)
        run(test, catalog)
    assert "a session failed" in caplog.text


# Places, leaving and coming back


def test_a_session_that_fails_to_open_takes_no_place(catalog, monkeypatch):
    async def test(host: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Catalog, "make_world", None)
            async with connect(f"ws://{host}/ws") as socket:
                assert (await closed(Player(socket)))[0] == 4500
        async with playing(host) as player:
            assert player.first["frame"] == 5

    run(test, catalog, max_sessions=1)


def test_more_players_than_places(catalog):
    """Six players on two places: the others wait in a queue, and all get to play."""

    async def test(host: str) -> None:
        queue = []

        async def visit(number: int) -> None:
            await asyncio.sleep(0.02 * number)
            async with connect(f"ws://{host}/ws") as socket:
                player = Player(socket)
                while True:
                    message = json.loads(await socket.recv())
                    if message["type"] == "hello":
                        break
                    if message["type"] == "busy":  # and not a heartbeat
                        queue.append((number, message["before"]))
                        assert message["places"] == 2
                await player.send("pause", paused=False)
                for _ in range(5):
                    await player.picture()
                await asyncio.sleep(0.2)

        await asyncio.gather(*map(visit, range(6)))
        assert {number for number, _ in queue} == {2, 3, 4, 5}
        assert (5, 3) in queue and (5, 0) in queue  # the queue moved

    run(test, catalog, limits=Limits(max_fps=1000, fps=1000, away_seconds=0.05))


def test_a_full_queue(catalog, monkeypatch):
    monkeypatch.setattr("scd.play.session_manager.MAX_WAITING", 1)

    async def test(host: str) -> None:
        async with playing(host):
            async with connect(f"ws://{host}/ws") as waiting:
                assert json.loads(await waiting.recv())["before"] == 0
                async with connect(f"ws://{host}/ws") as third:
                    code, reason = await closed(Player(third))
                    assert code == 4503 and "1 players are waiting" in reason
            # A player who stops waiting leaves the queue.
            async with connect(f"ws://{host}/ws") as next_one:
                assert json.loads(await next_one.recv())["type"] == "busy"

    run(test, catalog, max_sessions=1)


def test_who_comes_just_when_a_place_is_free_waits_behind_the_others(catalog):
    class Visitor:
        application_state = WebSocketState.CONNECTED

        def __init__(self) -> None:
            self.leaving = asyncio.Event()
            self.told: list[str] = []

        async def receive(self) -> dict[str, str]:
            await self.leaving.wait()
            return {"type": "websocket.disconnect"}

        async def send_json(self, value: dict[str, str]) -> None:
            self.told.append(value["type"])

        async def send_bytes(self, value: bytes) -> None:
            pass

    async def until(done: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not done():
                await asyncio.sleep(0.01)

    async def test() -> None:
        with ThreadPoolExecutor(1) as worker:
            manager = SessionManager(lambda: Session.open(catalog, worker, FAST), 1, 60.0)
            first, second, third = (Visitor() for _ in range(3))
            served = [asyncio.create_task(manager.serve(v, None)) for v in (first, second)]
            await until(lambda: "hello" in first.told and "busy" in second.told)
            first.leaving.set()
            with pytest.raises(WebSocketDisconnect):
                await served[0]
            served.append(asyncio.create_task(manager.serve(third, None)))
            await until(lambda: "hello" in second.told + third.told)
            assert "hello" in second.told and "hello" not in third.told
            for visitor in (second, third):
                visitor.leaving.set()
            await asyncio.gather(*served, return_exceptions=True)
            await manager.close()

    asyncio.run(test())


def test_pictures_that_cannot_be_sent(catalog):
    """A connection that takes nothing more, though the player says that pictures are seen."""

    class Stuck:
        application_state = WebSocketState.CONNECTED

        async def receive(self) -> None:
            await asyncio.Event().wait()

        send_json = send_bytes = lambda self, value: asyncio.Event().wait()

    async def test() -> None:
        with ThreadPoolExecutor(1) as worker:
            session = await Session.open(catalog, worker, Limits(stalled_seconds=0.1))
            with pytest.raises(CloseConnection) as why:
                await asyncio.wait_for(session.play(Stuck()), 5)
            assert why.value.code is CloseCode.STALLED

    asyncio.run(test())


@pytest.mark.parametrize("how", ["leaves", "dies"])
def test_a_player_comes_back(catalog, how):
    async def test(host: str) -> None:
        async with playing(host) as player:
            session = player.hello["session"]
            await player.send("input", action=3, seq=1)
            for _ in range(3):
                await player.send("step")
                last = await player.picture()
            if how == "dies":
                player.socket.transport.abort()
        await asyncio.sleep(0.05)
        async with playing(host, f"?session={session}") as back:
            assert back.hello["resumed"] and back.hello["session"] == session
            assert back.first["frame"] == last["frame"] == 8
            assert np.array_equal(back.first["views"][0]["rgb"], last["views"][0]["rgb"])
            await back.send("step")
            assert (await back.picture())["action"] == 0  # no key is held any more
        await asyncio.sleep(1.2)
        async with playing(host, f"?session={session}") as late:
            assert not late.hello["resumed"] and late.hello["session"] != session

    run(test, catalog, max_sessions=1, limits=Limits(away_seconds=1.0))


def test_coming_back_is_playing(catalog, monkeypatch):
    later = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + later)
    monkeypatch.setattr("scd.play.session.time", clock)

    async def test(host: str) -> None:
        nonlocal later
        async with playing(host) as player:
            await player.send("step")
            await player.picture()
        later = 2 * FAST.idle_seconds
        async with playing(host, f"?session={player.hello['session']}") as back:
            assert back.hello["resumed"]
            await back.send("step")
            assert (await back.picture())["frame"] == 7

    run(test, catalog)


def test_who_leaves_without_a_message_keeps_no_place(catalog):
    async def greeted(socket: ClientConnection) -> None:
        while json.loads(await socket.recv())["type"] != "hello":  # else it waits for the place
            pass

    async def test(host: str) -> None:
        async with connect(f"ws://{host}/ws"):
            pass  # gone before hello
        for _ in range(2):  # and after it
            async with asyncio.timeout(10), connect(f"ws://{host}/ws") as socket:
                await greeted(socket)  # not after away_seconds

    run(test, catalog, max_sessions=1)


def test_another_page_takes_over(catalog):
    async def test(host: str) -> None:
        async with playing(host) as first:
            await first.send("step")
            await first.picture()
            async with playing(host, f"?session={first.hello['session']}") as second:
                assert (await closed(first))[0] == 4409
                assert second.first["frame"] == 6
                await asyncio.sleep(0.2)  # the player of the first page is not away
                await second.send("step")
                assert (await second.picture())["frame"] == 7

    run(test, catalog, limits=replace(FAST, away_seconds=0.1))


def test_the_server_stops_with_players(catalog, monkeypatch):
    world = StillWorld()
    monkeypatch.setattr(Catalog, "make_world", lambda *_: world)

    async def all_of_it() -> None:
        async with running_server(catalog, limits=FAST) as host:
            socket = await connect(f"ws://{host}/ws")
            await Player(socket).send("step")  # so that there is something to come back to
            await Player(socket).picture()
        code, _ = await closed(Player(socket))
        assert code == 1012

    begun = time.monotonic()
    asyncio.run(all_of_it())
    assert time.monotonic() - begun < 6 and world.closed


# Access


def test_pages_and_headers(catalog):
    async def test(address: str) -> None:
        async with httpx.AsyncClient(base_url=f"http://{address}") as browser:
            page = await browser.get("/")
            assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
            assert page.headers["x-content-type-options"] == "nosniff"
            assert "script-src 'self'" in page.headers["content-security-policy"]
            assert (await browser.get("/starts/here.png")).content[:4] == b"\x89PNG"
            for path in (
                *("/starts/nowhere.png", "/nothing", "/static/nothing.js", "/static/"),
                *("/static/../server.py", "/static/%2e%2e/server.py", "/static/..%2fserver.py"),
            ):
                assert (await browser.get(path)).status_code == 404, path
            for host in (
                "evil.example",
                f"evil.example:{address.split(':')[1]}",
                "",
                "127.0.0.1.nip",
            ):
                answer = await browser.get("/", headers={"Host": host})
                assert answer.status_code in (400, 403), host
            for host in ("localhost", "[::1]:8000", "127.0.0.1:1", "127.0.0.2"):
                assert (await browser.get("/", headers={"Host": host})).status_code == 200, host
            for origin in ("http://evil.example", "http://["):
                answer = await browser.get("/", headers={"Origin": origin})
                assert answer.status_code == 403, origin
                assert answer.headers["x-content-type-options"] == "nosniff"

    run(test, catalog)


def test_pages_of_other_origins_cannot_play(catalog):
    async def test(host: str) -> None:
        port = host.split(":")[1]
        for origin in (
            "http://evil.example",
            "null",
            f"http://localhost:{port}",
            f"http://{host}1",
        ):
            with pytest.raises(InvalidStatus) as refused:
                await connect(f"ws://{host}/ws", origin=origin)
            assert refused.value.response.status_code == 403, origin
        async with playing(host, origin=f"http://{host}"):
            pass

    run(test, catalog)


def test_behind_a_proxy(catalog):
    """The address that the proxy shows is allowed, whatever host it names itself; no other is."""
    origin = "https://name-8000.preview.example"

    async def test(address: str) -> None:
        for host in (address, "name-8000.preview.example"):
            headers = {"Host": host}
            async with httpx.AsyncClient(base_url=f"http://{address}", headers=headers) as browser:
                for page, status in ((origin, 200), ("https://evil.example", 403)):
                    asked = {"Origin": page}
                    answer = await browser.get("/?token=secret", headers=asked)
                    assert answer.status_code == status, (host, page)
                assert (await browser.get("/")).status_code == 403  # it asks for the token
        async with httpx.AsyncClient(base_url=f"http://{address}") as browser:
            elsewhere = {"Host": "evil.example"}
            answer = await browser.get("/?token=secret", headers=elsewhere)
            assert answer.status_code == 403
        async with playing(address, "?token=secret", origin=origin):
            pass

    run(test, catalog, token="secret", origins=frozenset([origin]))


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        ("https://Play.Example.org/", "https://play.example.org"),
        ("https://play.example.org:443/walk?x=1", "https://play.example.org"),
        ("http://host:8080", "http://host:8080"),
        ("play.example.org", None),
        ("*", None),
        ("https://", None),
        ("https://player@play.example.org", None),
    ],
)
def test_origins(given, origin):
    if origin is None:
        with pytest.raises(ScdError, match="the address that the browser shows"):
            origin_of(given)
    else:
        assert origin_of(given) == origin


def test_a_token(catalog):
    async def test(host: str) -> None:
        async with httpx.AsyncClient(base_url=f"http://{host}") as browser:
            for query in ("", "?token=", "?token=wrong", "?token=s%C3%A9cret"):
                assert (await browser.get(f"/{query}")).status_code == 403
                assert (await browser.get(f"/starts/here.png{query}")).status_code == 403
                async with connect(f"ws://{host}/ws{query}") as socket:
                    assert (await closed(Player(socket)))[0] == 4401
            assert (await browser.get("/?token=secret")).status_code == 200
            # Any name of this machine, but no other page.
            named = {"Host": "player.example"}
            assert (await browser.get("/?token=secret", headers=named)).status_code == 200
            foreign = {"Origin": "http://evil.example"}
            assert (await browser.get("/?token=secret", headers=foreign)).status_code == 403
            async with playing(host, "?token=secret") as player:
                assert player.first["frame"] == 5
                video = f"/recording.mp4?session={player.hello['session']}"
                assert (await browser.get(video)).status_code == 404
                assert (await browser.get(f"{video}&token=wrong")).status_code == 404
                assert (await browser.get(f"{video}&token=secret")).status_code == 200

    run(test, catalog, token="secret", local=False)


@pytest.mark.parametrize(
    ("given", "query"),
    [
        ({}, ""),
        ({"token": "chosen"}, r"\?token=chosen"),
        ({"token": "a+b&c#%25"}, r"\?token=a%2Bb%26c%23%2525"),
        ({"origins": frozenset(["https://play.example"])}, r"\?token=[\w-]{22}"),
    ],
)
def test_only_this_machine_alone_needs_no_token(catalog, monkeypatch, capsys, given, query):
    """Unless one is chosen; every printed address can be opened."""
    served = []

    def run(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        served.append(server.config.app)
        sockets[0].close()

    monkeypatch.setattr("uvicorn.Server.run", run)
    address = Address(port=0, **given)
    serve(catalog, address, 1)
    urls = re.findall(r"https?://\S+", capsys.readouterr().out)
    assert len(urls) == 1 + len(address.origins)

    async def statuses(url: str) -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(served[0])) as browser:
            headers = {"Origin": url.partition("/?")[0].rstrip("/")}
            asked = (url, url.partition("?")[0])
            return [(await browser.get(u, headers=headers)).status_code for u in asked]

    for url in urls:
        assert re.fullmatch(rf"https?://[\w.:]+/{query}", url)
        assert asyncio.run(statuses(url)) == [200, 403 if query else 200]


@pytest.mark.parametrize(
    "hosts", [("127.0.0.1", "localhost", "::1"), ("0.0.0.0", "::", "example.org", "192.168.0.2")]
)
def test_which_addresses_are_local(hosts):
    assert {Address(host).local for host in hosts} == {hosts[0] == "127.0.0.1"}


def test_the_printed_address_can_be_opened():
    assert Address().url(8000) == "http://127.0.0.1:8000/"
    assert Address("::1").url(1) == "http://[::1]:1/"
    for everywhere in ("0.0.0.0", "::"):
        assert re.fullmatch(r"http://[\w.-]+:8000/", Address(everywhere).url(8000))
        assert "0.0.0.0" not in Address(everywhere).url(8000)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 beside IPv4 here")
def test_the_address_of_all_interfaces_answers_to_ipv4_and_ipv6():
    with listen(Address("::", 0)) as listening:
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, listening.getsockname()[1]), 5).close()


def test_without_both_at_once_the_printed_address_is_one_of_ipv6(monkeypatch):
    monkeypatch.setattr("scd.play.server.sockets.has_dualstack_ipv6", lambda: False)
    monkeypatch.setattr("scd.play.server._own_address", lambda v6: "fd00::2" if v6 else "10.0.0.2")
    assert Address("::").url(8000) == "http://[fd00::2]:8000/"
    assert Address("0.0.0.0").url(8000) == "http://10.0.0.2:8000/"


def test_an_empty_host_is_refused():
    with pytest.raises(ScdError, match="--host is empty"):
        listen(Address(host="", port=0))


def test_a_port_in_use(catalog):
    taken = socket.create_server(("127.0.0.1", 0))
    with taken, pytest.raises(ScdError, match=r"in use.*choose another --port"):
        listen(Address(port=taken.getsockname()[1]))
    with pytest.raises(ScdError, match=r"cannot serve at 127\.0\.0\.1:99999"):
        listen(Address(port=99999))


def test_the_command_reports_what_is_missing(tmp_path: Path, capsys):
    assert cli.main(["play", "--model", str(tmp_path / "none")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "no such folder" in error and error.count("\n") == 1


def test_numbers_that_cannot_be(catalog):
    with pytest.raises(ScdError, match="--sessions 0: must be at least 1"):
        serve(catalog, Address(port=0), max_sessions=0)
    with pytest.raises(ScdError, match="--measure 0: must be at least 1"):
        measure_latency(catalog, 0)


# Recording and measuring


def test_a_recording(catalog, tmp_path, monkeypatch):
    def full_disk(*_: object, **__: object) -> None:
        raise ScdError("no space left")

    async def test(host: str) -> None:
        async with (
            playing(host) as player,
            httpx.AsyncClient(base_url=f"http://{host}", timeout=20) as browser,
        ):
            await player.send("start", start="there", worlds=["model", "baseline"])
            for _ in range(6):
                await player.send("step")
                last = await player.picture()
                while last["flags"]:
                    last = await player.picture()
            query = {"session": player.hello["session"]}
            for name, bounds, count in (("all", {}, 12), ("part", {"first": 3, "last": 7}, 5)):
                answer = await browser.get("/recording.mp4", params={**query, **bounds})
                assert answer.status_code == 200
                assert answer.headers["content-type"] == "video/mp4"
                assert answer.headers["first-frame"] == str(bounds.get("first", 0))
                path = tmp_path / f"{name}.mp4"
                path.write_bytes(answer.content)
                video = VideoFile(path)
                assert len(video) == count
                assert video.frames(np.array([0])).shape == (1, 256, 512, 3)
                if name == "all":
                    shown = video.frames(np.array([11]))[0, 2::4, 2::4].astype(int)
                    both = np.hstack([view["rgb"] for view in last["views"]])
                    assert np.abs(shown - both).mean() < 12  # halved chroma of noise
            with monkeypatch.context() as patch:
                patch.setattr(recording, "write_video", full_disk)
                answer = await browser.get("/recording.mp4", params=query)
                assert (answer.status_code, answer.text) == (500, "no space left")
            for wrong, status in (
                ({"session": "x"}, 404),
                ({}, 404),
                ({**query, "first": "x"}, 400),
                ({**query, "first": 50}, 400),
            ):
                answer = await browser.get("/recording.mp4", params=wrong)
                assert answer.status_code == status

    run(test, catalog)


@pytest.mark.parametrize(
    ("name", "attached"),
    [
        ("here", 'attachment; filename="here-0-5.mp4"'),
        ("Höhle_湖", "attachment; filename*=UTF-8''H%C3%B6hle_%E6%B9%96-0-5.mp4"),
    ],
)
def test_a_recording_has_the_name_of_its_start(catalog, name, attached):
    async def test(host: str) -> None:
        async with (
            playing(host) as player,
            httpx.AsyncClient(base_url=f"http://{host}", timeout=20) as browser,
        ):
            query = {"session": player.hello["session"]}
            answer = await browser.get("/recording.mp4", params=query)
            assert (answer.status_code, answer.headers["content-disposition"]) == (200, attached)

    run(test, Catalog({"model": catalog.first}, [some_start(name)]))


def test_a_recording_is_as_fast_as_it_was_played():
    times = [None, None, 10.0, 10.25, 10.5, 60.0, 60.25, 61.0]  # given ones, a pause, a late one
    frames = [Frame(number, 0, (), made) for number, made in enumerate(times)]
    assert recording.played_fps(frames) == 4
    assert recording.played_fps(frames[:3]) is None


@pytest.mark.parametrize("gap", [0.99, 1.2, 3.0])
def test_a_recording_of_a_slow_model_is_as_slow(gap):
    times = [gap * number + 100 * (number > 5) for number in range(10)]  # with one pause
    frames = [Frame(number, 0, (), made) for number, made in enumerate(times)]
    assert recording.played_fps(frames) == pytest.approx(1 / gap)


def test_too_many_recordings_at_once(catalog, monkeypatch):
    finish = threading.Event()

    def slow(*_: object, **__: object) -> None:
        finish.wait(10)
        raise ScdError("finished")

    monkeypatch.setattr(recording, "write_video", slow)

    async def test(host: str) -> None:
        async with (
            playing(host) as player,
            httpx.AsyncClient(base_url=f"http://{host}", timeout=20) as browser,
        ):
            video = f"/recording.mp4?session={player.hello['session']}"
            asked = [
                asyncio.create_task(browser.get(video)) for _ in range(recording.MAX_RECORDINGS + 1)
            ]
            first, _ = await asyncio.wait(asked, timeout=5, return_when=asyncio.FIRST_COMPLETED)
            finish.set()
            answers = await asyncio.gather(*asked)
            assert [task.result().status_code for task in first] == [503]
            assert sorted(answer.status_code for answer in answers)[:-1] == [500, 500]

    run(test, catalog)


def test_a_recording_is_no_faster_than_one_may_play(catalog, monkeypatch):
    """Single steps can be made faster than that."""
    monkeypatch.setattr(Catalog, "make_world", lambda *_: StillWorld())
    rates = []
    monkeypatch.setattr(recording, "_mp4", lambda frames, fps: rates.append(fps) or b"")

    async def test(host: str) -> None:
        async with playing(host) as player, httpx.AsyncClient() as browser:
            for _ in range(3):
                await player.send("step")
                await player.picture()
            session = {"session": player.hello["session"]}
            await browser.get(f"http://{host}/recording.mp4", params=session)

    run(test, catalog, limits=Limits(min_fps=0.1, max_fps=0.5, fps=0.5))
    assert rates == [0.5]


def test_measuring(catalog, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "PRESSES", 2)
    results = measure_latency(catalog, 4)["results"]
    assert [result["worlds"] for result in results] == [
        ["model"],
        ["baseline"],
        ["model", "baseline"],
    ]
    for result in results:
        assert result["pictures_per_second"] > 0
        assert len(result["parts_ms"]["encoder"]) == len(result["worlds"])
        assert 0 < result["key_to_picture_ms"][0] <= result["key_to_picture_ms"][1]
    table, figures = capsys.readouterr().out.strip().rsplit("\n", 1)
    assert "model + baseline" in table and json.loads(figures)["results"] == results


def test_measuring_a_fast_world(catalog, monkeypatch):
    """It confirms more frames a second than a player may send messages."""
    monkeypatch.setattr(measuring, "PRESSES", 2)
    monkeypatch.setattr(Catalog, "make_world", lambda *_: StillWorld())
    (result,) = measure_latency(Catalog({"model": catalog.first}, catalog.starts), 1000)["results"]
    assert result["pictures_per_second"] > 0


def test_measuring_a_world_of_known_times(catalog, monkeypatch):
    """On a clock that only its frames move, the slow first ones more, and waits before a key."""
    now = 0.0
    sessions = []

    class KnownWorld(StillWorld):
        def step(self, action: Action, number: int) -> View:
            nonlocal now
            now += 1000.0 if number < 6 + measuring.WARM_UP else 0.01
            return replace(super().step(action, number), times=Times(1.0, 2.0, 3.0))

    def wait() -> float:
        nonlocal now
        now += 100.0
        return 0.0

    async def noted(*given) -> Session:
        sessions.append(await opened(*given))
        return sessions[-1]

    opened = Session.open
    chance = SimpleNamespace(randrange=lambda count: 0, random=wait)
    monkeypatch.setattr(Session, "open", noted)
    monkeypatch.setattr(Catalog, "make_world", lambda *_: KnownWorld())
    monkeypatch.setattr(measuring, "PRESSES", 2)
    monkeypatch.setattr(measuring, "random", SimpleNamespace(Random=lambda seed: chance))
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: now))
    (result,) = measure_latency(Catalog({"model": catalog.first}, catalog.starts), 10)["results"]
    assert result["parts_ms"] == {"encoder": [1.0], "denoising": [2.0], "decoding": [3.0]}
    assert result["pictures_per_second"] > 50  # 100, but for those made and not yet sent
    assert max(result["key_to_picture_ms"]) < 1000
    assert sessions[0].fps == measuring.UNLIMITED.fps  # at the end: while keys are timed


def test_measuring_a_world_of_large_pictures(catalog, monkeypatch):
    """One of more than 1 MiB, the most that the library takes by default."""
    monkeypatch.setattr(measuring, "PRESSES", 1)
    monkeypatch.setattr(Catalog, "make_world", lambda *_: StillWorld())
    start = Start("large", (0,), np.zeros((1, 640, 640, 3), np.uint8))
    (result,) = measure_latency(Catalog({"model": catalog.first}, [start]), 1)["results"]
    assert result["pictures_per_second"] > 0
