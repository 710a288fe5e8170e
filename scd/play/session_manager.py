"""The sessions of a server: a limited number at a time, a queue for others, and reconnection."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from starlette.websockets import WebSocket, WebSocketDisconnect

from scd.play.messages import CloseCode, CloseConnection
from scd.play.session import Session

MAX_WAITING = 16
# Close codes for broken rules of websockets or size limits: after these, no player comes back.
PROTOCOL_ERRORS = {1002, 1003, 1007, 1008, 1009}


class SessionManager:
    """Assigns connections to sessions.

    Args:
        open_session: opens a new session.
        max_sessions: sessions at a time; further players wait in a queue.
        alive_seconds: between two heartbeats to those who wait.
    """

    def __init__(
        self,
        open_session: Callable[[], Awaitable[Session]],
        max_sessions: int,
        alive_seconds: float,
    ):
        self.sessions: dict[str, Session] = {}
        self.max_sessions = max_sessions
        self._open_session = open_session
        self._alive_seconds = alive_seconds
        self._opening = 0
        self._queue: list[object] = []
        self._queue_moved = asyncio.Event()
        self._expiring: dict[str, asyncio.TimerHandle] = {}  # sessions whose player is away
        self._closing: set[asyncio.Task[None]] = set()

    async def serve(self, socket: WebSocket, wanted: str | None) -> None:
        """Serve an accepted connection until it ends.

        Args:
            wanted: id of the session to come back to; a new one is opened if it does not exist.

        Raises:
            CloseConnection: the connection is to be closed.
            WebSocketDisconnect: the other side has closed it.
        """
        session = self.sessions.get(wanted or "")
        resumed = session is not None
        if session is None:
            heartbeat = asyncio.create_task(self._beat(socket))
            try:
                session = await self._new_session(socket)
            finally:
                heartbeat.cancel()
        self._cancel_expiry(session)
        ended = True
        try:
            await socket.send_json(session.hello(resumed))
            await session.play(socket)
        except CloseConnection as end:
            ended = end.code is not CloseCode.TAKEN_OVER
            raise
        except WebSocketDisconnect as gone:
            # A player who has never sent a message has nothing to come back to.
            ended = gone.code in PROTOCOL_ERRORS or not session.heard
            raise
        finally:
            if ended:
                self._end(session)
            elif not session.connected:
                self._cancel_expiry(session)
                loop = asyncio.get_running_loop()
                away = session.limits.away_seconds
                self._expiring[session.id] = loop.call_later(away, self._end_if_away, session)

    async def close(self) -> None:
        """End all sessions."""
        for session in list(self.sessions.values()):
            self._end(session)
        await asyncio.gather(*self._closing, return_exceptions=True)

    async def _beat(self, socket: WebSocket) -> None:
        """Send heartbeats, so that a waiting page can tell a full server from one that is gone."""
        with suppress(WebSocketDisconnect, RuntimeError):
            while True:
                await asyncio.sleep(self._alive_seconds)
                await socket.send_json({"type": "alive"})

    async def _new_session(self, socket: WebSocket) -> Session:
        """Wait in the queue for a place, then open a session."""
        if len(self._queue) >= MAX_WAITING:
            raise CloseConnection(
                CloseCode.BUSY, f"all places are taken, and {MAX_WAITING} players are waiting"
            )
        ticket = object()
        self._queue.append(ticket)
        gone = asyncio.create_task(_until_gone(socket))
        try:
            while not gone.done():
                moved = self._queue_moved  # before looking, so that no move is missed while sending
                before = self._queue.index(ticket)
                if before == 0 and len(self.sessions) + self._opening < self.max_sessions:
                    break
                await socket.send_json(
                    {"type": "busy", "places": self.max_sessions, "before": before}
                )
                moving = asyncio.create_task(moved.wait())
                await asyncio.wait([gone, moving], return_when=asyncio.FIRST_COMPLETED)
                moving.cancel()
            if gone.done():
                raise WebSocketDisconnect(1006)
            self._opening += 1
        finally:
            gone.cancel()
            self._queue.remove(ticket)
            self._wake_queue()
        try:
            session = await self._open_session()
            self.sessions[session.id] = session
        finally:
            self._opening -= 1
            self._wake_queue()
        return session

    def _wake_queue(self) -> None:
        self._queue_moved.set()
        self._queue_moved = asyncio.Event()

    def _cancel_expiry(self, session: Session) -> None:
        if handle := self._expiring.pop(session.id, None):
            handle.cancel()

    def _end_if_away(self, session: Session) -> None:
        if not session.connected:
            self._end(session)

    def _end(self, session: Session) -> None:
        self._cancel_expiry(session)
        if self.sessions.pop(session.id, None) is not None:
            task = asyncio.get_running_loop().create_task(session.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        self._wake_queue()


async def _until_gone(socket: WebSocket) -> None:
    """Wait until a socket disconnects; messages are ignored until then."""
    with suppress(WebSocketDisconnect, RuntimeError):
        while (await socket.receive())["type"] != "websocket.disconnect":
            pass
