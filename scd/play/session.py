"""One player: messages in, pictures out, at a pace, for as long as the player looks.

The session lives longer than a connection: a player who was cut off comes back to it. All work of
the game is done by one thread, which all sessions take turns at: a session asks for one thing at a
time, and whoever asked first is served first.
"""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from typing import Any, TypeVar

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from scd.errors import ScdError
from scd.play.access import Allowance, Limits
from scd.play.catalog import MAX_GUIDANCE, MAX_SEED, MAX_STEPS, Catalog
from scd.play.game import Game
from scd.play.history import Frame
from scd.play.messages import AGAIN, GIVEN, PROTOCOL, Close, Closed, Message, pack, parse
from scd.play.starts import Action

TAP_LASTS = 1.0  # seconds; or a frame, if that is longer
Result = TypeVar("Result")


class Session:
    """Make it with `await Session.open(...)`; then `play` on one connection after another."""

    def __init__(self, game: Game, worker: Executor, limits: Limits):
        self.id = secrets.token_urlsafe(24)
        self.game = game
        self.limits = limits
        self.fps = limits.fps
        self.paused = True
        self.last_input = time.monotonic()
        self._worker = worker
        self._connection: _Connection | None = None

    @classmethod
    async def open(cls, catalog: Catalog, worker: Executor, limits: Limits) -> "Session":
        """A session at the first start, paused."""
        game = await asyncio.get_running_loop().run_in_executor(worker, Game, catalog)
        return cls(game, worker, limits)

    async def play(self, socket: WebSocket) -> None:
        """Serve a connection until it is gone; an older one of this session is closed.

        Raises:
            Closed: the connection is to be closed.
            WebSocketDisconnect: it was.
        """
        if self._connection is not None:
            self._connection.close(Closed(Close.TAKEN_OVER, "another page has taken over"))
        connection = self._connection = _Connection(self, socket)
        self.last_input = time.monotonic()  # coming back is one
        try:
            await connection.run()
        finally:
            if self._connection is connection:
                self._connection = None

    @property
    def connected(self) -> bool:
        return self._connection is not None

    async def work(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Let the thread that all sessions share do something with the game."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, function, *arguments)

    async def close(self) -> None:
        """Free what the game holds; an open connection is closed."""
        if self._connection is not None:
            self._connection.close(Closed(Close.FAULT, "the session has ended"))
        await self.work(self.game.close)

    def hello(self, resumed: bool) -> dict[str, Any]:
        """The first message to a player."""
        catalog, limits = self.game.catalog, self.limits
        return {
            "type": "hello",
            "protocol": PROTOCOL,
            "session": self.id,
            "resumed": resumed,
            "worlds": catalog.worlds,
            "about": {name: model.about for name, model in catalog.models.items()},
            "missing": catalog.missing,
            "starts": [start.name for start in catalog.starts],
            "actions": catalog.actions,
            "idle": catalog.idle,
            "several": catalog.several,
            "size": catalog.size,
            "limits": {
                "steps": [1, MAX_STEPS],
                "guidance_scale": [1.0, MAX_GUIDANCE],
                "seed": [0, MAX_SEED],
                "fps": [limits.min_fps, limits.max_fps],
                "unseen": limits.unseen,
                "alive_seconds": limits.alive,
                "idle_seconds": limits.idle,
                "away_seconds": limits.away,
            },
        }


class _Connection:
    """A session's open connection: one task receives, one plays, one says that it is alive."""

    def __init__(self, session: Session, socket: WebSocket):
        self.session = session
        self.socket = socket
        self._commands: deque[Message] = deque()
        self._news = asyncio.Event()
        self._single_steps = 0
        self._held: frozenset[int] = frozenset()  # numbers of actions
        self._tapped: frozenset[int] = frozenset()
        self._seq = 0
        self._tapped_at = 0.0
        self._serial = self._seen = 0
        self._due = 0.0
        self._allowance = Allowance(session.limits.messages)
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def close(self, why: Closed) -> None:
        """From outside: make `run` raise."""
        if not self._closed.done():
            self._closed.set_exception(why)

    async def run(self) -> None:
        """Raises: see `Session.play`."""
        working = (self._receive(), self._play(), self._live())
        tasks = [asyncio.create_task(work) for work in working]
        try:
            done, _ = await asyncio.wait(
                [*tasks, self._closed], return_when=asyncio.FIRST_COMPLETED
            )
            done.pop().result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if not self._closed.cancel():
                self._closed.exception()  # has been told, or came too late

    async def _receive(self) -> None:
        while True:
            received = await self.socket.receive()
            if received["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(received.get("code") or 1005, received.get("reason"))
            if not self._allowance.take():
                rate = self._allowance.rate
                raise Closed(Close.TOO_MANY_MESSAGES, f"more than {rate:g} messages a second")
            text = received.get("text")
            if text is None:
                raise Closed(Close.BAD_MESSAGE, "messages are text")
            self._take(parse(text))
            self._news.set()

    def _take(self, message: Message) -> None:
        """What needs no work is done at once, the rest in turn with the frames."""
        fields, session = message.fields, self.session
        if message.type == "seen":
            if not self._seen <= fields["serial"] <= self._serial:
                raise Closed(Close.BAD_MESSAGE, "seen: no such picture")
            self._seen = fields["serial"]
            return
        session.last_input = time.monotonic()
        if message.type == "input":
            self._hold(fields, session.last_input)
        elif message.type == "step":
            self._single_steps = 1
        else:
            if len(self._commands) >= self.session.limits.commands:
                raise Closed(Close.TOO_MANY_MESSAGES, "too many commands at once")
            last = self._commands[-1] if self._commands else None
            if last is not None and last.type == message.type == "settings":
                self._commands[-1] = Message("settings", last.fields | fields)  # a dragged slider
            else:
                self._commands.append(message)

    def _hold(self, fields: dict[str, Any], now: float) -> None:
        catalog = self.session.game.catalog
        one_field, other = ("held", "action") if catalog.several else ("action", "held")
        if other in fields:
            raise Closed(Close.BAD_MESSAGE, f"input: this world takes {one_field}, not {other}")
        given = fields.get(one_field, [])
        held = frozenset(given if catalog.several else [given] if one_field in fields else [])
        if any(number >= len(catalog.actions) for number in held):
            raise Closed(Close.BAD_MESSAGE, "input: no such action")
        held -= {catalog.idle}
        # Where only one counts, it is the newest; else a key that was held before is not tapped.
        pressed = held - self._held if catalog.several else held
        if pressed:
            before = self._fresh(now) if catalog.several else frozenset()
            self._tapped, self._tapped_at = before | pressed, now
        self._held, self._seq = held, fields["seq"]

    def _fresh(self, now: float) -> frozenset[int]:
        """What was pressed since the last frame: it moves one frame even if it was released."""
        fresh = now - self._tapped_at < max(TAP_LASTS, 1 / self.session.fps)
        return self._tapped if fresh else frozenset()

    async def _live(self) -> None:
        """Without it a page could not tell a slow or paused server from one that is gone."""
        while True:
            await asyncio.sleep(self.session.limits.alive)
            await self._send_json({"type": "alive"})

    async def _play(self) -> None:
        await self._tell_state()
        await self._show(self.session.game.history.newest, AGAIN)
        while True:
            if self._commands:
                await self._carry_out(self._commands.popleft())
                continue
            now = time.monotonic()
            wait = self.session.last_input + self.session.limits.idle - now
            if wait <= 0:
                raise Closed(Close.IDLE, f"no input for {self.session.limits.idle:g} seconds")
            wanted = self._single_steps or not self.session.paused
            if self._action(now) is None:  # time stands still until a key is pressed
                wanted, self._single_steps = False, 0
            if wanted and self._serial - self._seen < self.session.limits.unseen:
                if self._single_steps or self._due <= now:
                    await self._step(now)
                    continue
                wait = min(wait, self._due - now)
            self._news.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._news.wait()

    async def _step(self, now: float) -> None:
        # A frame that is late does not make those after it hurry.
        self._due = max(self._due + 1 / self.session.fps, now)
        self._single_steps = 0
        action, seq = self._action(now), self._seq
        assert action is not None  # see `_play`
        self._tapped = frozenset()
        if self._held:  # a key that stays down sends nothing, but is playing
            self.session.last_input = now
        frame = await self.session.work(self.session.game.step, action)
        await self._show(frame, 0, seq, 1e3 * (time.monotonic() - now))

    def _action(self, now: float) -> Action | None:
        """Of the next frame; None: nothing is held, and no action stands for that."""
        catalog, fresh = self.session.game.catalog, self._fresh(now)
        return catalog.action(self._held | fresh if catalog.several else self._held or fresh)

    async def _carry_out(self, message: Message) -> None:
        session, fields = self.session, dict(message.fields)
        game, shown = session.game, session.game.history.newest
        try:
            if message.type == "pause":
                session.paused = fields["paused"]
            elif message.type == "start":
                seed = fields.get("seed", game.settings.seed)
                await session.work(game.begin, fields["start"], fields["worlds"], seed)
            elif message.type == "settings":
                self._set_pace(fields.pop("fps", session.fps))
                if fields:
                    await session.work(lambda: game.change(**fields))
            elif message.type == "rewind":
                await session.work(game.rewind, fields["frame"])
            elif message.type == "keep":
                await session.work(game.history.keep)
            elif message.type == "return":
                await session.work(game.return_to, fields["moment"])
        except ScdError as error:
            await self._send_json({"type": "refused", "what": message.type, "why": str(error)})
        await self._tell_state()
        if game.history.newest is not shown:
            await self._show(game.history.newest, AGAIN)

    def _set_pace(self, fps: float) -> None:
        limits = self.session.limits
        if not limits.min_fps <= fps <= limits.max_fps:
            raise ScdError(f"fps is {fps}, not within {limits.min_fps:g} and {limits.max_fps:g}")
        self.session.fps = fps

    async def _tell_state(self) -> None:
        state = await self.session.work(self.session.game.state)
        pace = {"paused": self.session.paused, "fps": self.session.fps}
        await self._send_json({"type": "state", **pace, **state})

    async def _show(self, frame: Frame, flags: int, seq: int = 0, made_ms: float = 0.0) -> None:
        game = self.session.game
        self._serial += 1
        flags |= GIVEN if frame.number < len(game.start.actions) else 0
        worlds = [game.catalog.worlds.index(name) for name in game.names]
        data = pack(frame, worlds, serial=self._serial, seq=seq, flags=flags, made_ms=made_ms)
        await self._send(self.socket.send_bytes(data))

    async def _send_json(self, value: dict[str, Any]) -> None:
        await self._send(self.socket.send_json(value))

    async def _send(self, sending: Any) -> None:
        if self.socket.application_state is not WebSocketState.CONNECTED:
            sending.close()
            raise WebSocketDisconnect(1006)
        try:
            async with asyncio.timeout(self.session.limits.stalled):
                await sending
        except TimeoutError:
            raise Closed(Close.STALLED, "pictures cannot be sent") from None
