"""One player's session: messages in, pictures out, at the chosen frames per second.

A session outlives its connection: a player who was cut off comes back to it. One worker thread does
the work of all games. A session asks it for one thing at a time, and requests are served in order.
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
from scd.play.access import Limits, RateLimiter
from scd.play.catalog import MAX_SEED, Catalog
from scd.play.game import Game
from scd.play.held_actions import HeldActions
from scd.play.history import Frame
from scd.play.messages import (
    AGAIN,
    GIVEN,
    PROTOCOL,
    CloseCode,
    CloseConnection,
    Message,
    pack_picture,
    parse_message,
)
from scd.play.worlds import MAX_GUIDANCE, MAX_STEPS

Result = TypeVar("Result")


class Session:
    """A player's game; open it with `await Session.open(...)`, then `play` on its connections."""

    def __init__(self, game: Game, worker: Executor, limits: Limits):
        self.id = secrets.token_urlsafe(24)
        self.game = game
        self.limits = limits
        self.fps = limits.fps
        self.paused = True
        self.heard = False  # whether the player has ever sent a message
        self.last_input = time.monotonic()
        self._worker = worker
        self._connection: _Connection | None = None

    @classmethod
    async def open(cls, catalog: Catalog, worker: Executor, limits: Limits) -> "Session":
        """Open a session at the first start clip, paused."""
        game = await asyncio.get_running_loop().run_in_executor(worker, Game, catalog)
        return cls(game, worker, limits)

    async def play(self, socket: WebSocket) -> None:
        """Serve a connection until it ends; an older one of this session is closed.

        Raises:
            CloseConnection: the connection is to be closed.
            WebSocketDisconnect: the other side has closed it.
        """
        if self._connection is not None:
            self._connection.close(
                CloseConnection(CloseCode.TAKEN_OVER, "another page has taken over")
            )
        connection = self._connection = _Connection(self, socket)
        self.last_input = time.monotonic()  # coming back counts as input
        try:
            await connection.run()
        finally:
            if self._connection is connection:
                self._connection = None

    @property
    def connected(self) -> bool:
        return self._connection is not None

    async def run_in_worker(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run a function of the game in the thread that all sessions share."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, function, *arguments)

    async def close(self) -> None:
        """Close the connection, if one is open, and the game."""
        if self._connection is not None:
            self._connection.close(CloseConnection(CloseCode.FAULT, "the session has ended"))
        await self.run_in_worker(self.game.close)

    def hello(self, resumed: bool) -> dict[str, Any]:
        """Make the first message to a player."""
        about = offers(self.game.catalog, self.limits)
        return {"type": "hello", "session": self.id, "resumed": resumed, **about}


def offers(catalog: Catalog, limits: Limits) -> dict[str, Any]:
    """List what players can choose from, as the hello message says it."""
    return {
        "protocol": PROTOCOL,
        "worlds": catalog.worlds,
        "about": {name: model.about for name, model in catalog.models.items()},
        "missing": catalog.missing,
        "starts": [start.name for start in catalog.starts],
        "actions": catalog.actions,
        "idle": catalog.idle,
        "action_vectors": catalog.action_vectors,
        "size": catalog.size,
        "limits": {
            "steps": [1, MAX_STEPS],
            "guidance_scale": [1.0, MAX_GUIDANCE],
            "seed": [0, MAX_SEED],
            "fps": [limits.min_fps, limits.max_fps],
            "unseen": limits.unseen,
            "alive_seconds": limits.alive_seconds,
            "idle_seconds": limits.idle_seconds,
            "away_seconds": limits.away_seconds,
        },
    }


class _Connection:
    """A session's open connection, with one task that receives, one that plays, and a heartbeat."""

    def __init__(self, session: Session, socket: WebSocket):
        self.session = session
        self.socket = socket
        self._commands: deque[Message] = deque()
        self._wakeup = asyncio.Event()  # set by every message
        self._steps = 0  # single ones that wait to be made
        self._held = HeldActions(session.game.catalog)
        self._serial = self._seen = 0  # of the newest picture that was sent, and confirmed
        self._next_frame_at = 0.0
        self._rate = RateLimiter(session.limits.messages_per_second)
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def close(self, why: CloseConnection) -> None:
        """Make `run` raise `why`; called from outside."""
        if not self._closed.done():
            self._closed.set_exception(why)

    async def run(self) -> None:
        """Serve the connection until it ends; raises what `Session.play` raises."""
        tasks = [asyncio.create_task(t) for t in (self._receive(), self._play(), self._beat())]
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
                self._closed.exception()  # raised above, or too late to matter

    # Messages from the player

    async def _receive(self) -> None:
        while True:
            received = await self.socket.receive()
            if received["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(received.get("code") or 1005, received.get("reason"))
            if not self._rate.allow():
                raise CloseConnection(
                    CloseCode.TOO_MANY_MESSAGES, f"more than {self._rate.rate:g} messages a second"
                )
            self.session.heard = True
            text = received.get("text")
            if text is None:
                raise CloseConnection(CloseCode.BAD_MESSAGE, "messages must be text")
            self._handle(parse_message(text))
            self._wakeup.set()

    def _handle(self, message: Message) -> None:
        """Handle a message at once if it needs no work, else queue it as a command."""
        fields, session = message.fields, self.session
        if message.type == "seen":
            if not self._seen <= fields["serial"] <= self._serial:
                raise CloseConnection(CloseCode.BAD_MESSAGE, "seen: no such picture")
            self._seen = fields["serial"]
            return
        session.last_input = time.monotonic()
        if message.type == "input":
            self._held.update(fields, session.last_input, session.fps)
        elif message.type == "step":
            self._steps = min(self._steps + 1, session.limits.queued_commands)
        else:
            if len(self._commands) >= session.limits.queued_commands:
                raise CloseConnection(CloseCode.TOO_MANY_MESSAGES, "too many commands at once")
            last = self._commands[-1] if self._commands else None
            if last is not None and last.type == message.type == "settings":
                self._commands[-1] = Message("settings", last.fields | fields)  # a dragged slider
            else:
                self._commands.append(message)

    # Pictures to the player

    async def _beat(self) -> None:
        """Send heartbeats, so that the page can tell a paused server from one that is gone."""
        while True:
            await asyncio.sleep(self.session.limits.alive_seconds)
            await self._send_json({"type": "alive"})

    async def _play(self) -> None:
        """Execute commands, and generate frames when they are due."""
        session = self.session
        await self._send_state()
        await self._send_picture(session.game.history.newest, AGAIN)
        while True:
            if self._commands:
                await self._execute(self._commands.popleft())
                continue
            now = time.monotonic()
            wait = session.last_input + session.limits.idle_seconds - now
            if wait <= 0:
                raise CloseConnection(
                    CloseCode.IDLE, f"no input for {session.limits.idle_seconds:g} seconds"
                )
            wanted = self._steps > 0 or not session.paused
            if self._held.action(now, session.fps) is None:  # the world waits for a key
                wanted, self._steps = False, 0
            if wanted and self._serial - self._seen < session.limits.unseen:
                if self._steps or self._next_frame_at <= now:
                    await self._step(now)
                    continue
                wait = min(wait, self._next_frame_at - now)
            self._wakeup.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wakeup.wait()

    async def _step(self, now: float) -> None:
        session = self.session
        # A frame that is a little late keeps the rhythm. After a later one, or a single step, it
        # begins anew, so that the following frames do not come in a burst.
        late = now - self._next_frame_at
        anew = self._steps > 0 or late > 0.5 / session.fps
        self._next_frame_at = (now if anew else self._next_frame_at) + 1 / session.fps
        self._steps = max(self._steps - 1, 0)
        action, seq = self._held.action(now, session.fps), self._held.seq
        assert action is not None  # see `_play`
        self._held.clear_taps()
        if self._held:  # a key that stays down sends no messages, but counts as input
            session.last_input = now
        frame = await session.run_in_worker(session.game.step, action)
        await self._send_picture(frame, 0, seq, 1e3 * (time.monotonic() - now))

    async def _execute(self, message: Message) -> None:
        session, fields = self.session, dict(message.fields)
        game, shown = session.game, session.game.history.newest
        try:
            if message.type == "pause":
                session.paused = fields["paused"]
            elif message.type == "start":
                seed = fields.get("seed", game.settings.seed)
                await session.run_in_worker(game.reset, fields["start"], fields["worlds"], seed)
            elif message.type == "settings":
                fps = self._checked_fps(fields.pop("fps", session.fps))
                if fields:
                    await session.run_in_worker(lambda: game.change(**fields))
                session.fps = fps  # last: a refused message changes nothing
            elif message.type == "rewind":
                await session.run_in_worker(game.rewind, fields["frame"])
            elif message.type == "keep":
                await session.run_in_worker(game.history.keep)
            elif message.type == "return":
                await session.run_in_worker(game.return_to, fields["branch"])
        except ScdError as error:
            await self._send_json({"type": "refused", "what": message.type, "why": str(error)})
        await self._send_state()
        if game.history.newest is not shown:
            await self._send_picture(game.history.newest, AGAIN)

    def _checked_fps(self, fps: float) -> float:
        low, high = self.session.limits.min_fps, self.session.limits.max_fps
        if not low <= fps <= high:
            raise ScdError(f"fps is {fps}, but must be between {low:g} and {high:g}")
        return fps

    async def _send_state(self) -> None:
        state = await self.session.run_in_worker(self.session.game.state)
        pace = {"paused": self.session.paused, "fps": self.session.fps}
        await self._send_json({"type": "state", **pace, **state})

    async def _send_picture(
        self, frame: Frame, flags: int, seq: int = 0, made_ms: float = 0.0
    ) -> None:
        game = self.session.game
        self._serial += 1
        flags |= GIVEN if frame.made is None else 0
        worlds = [game.catalog.worlds.index(name) for name in game.names]
        data = pack_picture(
            frame, worlds, serial=self._serial, seq=seq, flags=flags, made_ms=made_ms
        )
        await self._send(self.socket.send_bytes(data))

    async def _send_json(self, value: dict[str, Any]) -> None:
        await self._send(self.socket.send_json(value))

    async def _send(self, sending: Any) -> None:
        if self.socket.application_state is not WebSocketState.CONNECTED:
            sending.close()
            raise WebSocketDisconnect(1006)
        try:
            async with asyncio.timeout(self.session.limits.stalled_seconds):
                await sending
        except TimeoutError:
            raise CloseConnection(CloseCode.STALLED, "pictures cannot be sent") from None
