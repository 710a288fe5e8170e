"""Who plays, who waits for a place, and who may come back."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from starlette.websockets import WebSocket, WebSocketDisconnect

from scd.play.messages import Close, Closed
from scd.play.session import Session

MAX_WAITING = 16
# After these, the other side has broken the rules of websockets or of this server's size limit.
BROKEN = {1002, 1003, 1007, 1008, 1009}


class Lobby:
    """So many places, and a line of those who wait for one.

    Args:
        open_session: makes a new session.
        alive: seconds between two signs of life for those who wait.
    """

    def __init__(self, open_session: Callable[[], Awaitable[Session]], places: int, alive: float):
        self.sessions: dict[str, Session] = {}
        self.places = places
        self._open_session = open_session
        self._alive = alive
        self._opening = 0
        self._waiting: list[object] = []
        self._moved = asyncio.Event()
        self._leaving: dict[str, asyncio.TimerHandle] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def serve(self, socket: WebSocket, wanted: str | None) -> None:
        """Serve an accepted connection to its end: a session to come back to, or a new one.

        Raises:
            Closed: the connection is to be closed.
            WebSocketDisconnect: it was.
        """
        session = self.sessions.get(wanted or "")
        resumed = session is not None
        if session is None:
            living = asyncio.create_task(self._live(socket))
            try:
                session = await self._new_session(socket)
            finally:
                living.cancel()
        self._stop_leaving(session)
        ended = True
        try:
            await socket.send_json(session.hello(resumed))
            await session.play(socket)
        except Closed as closed:
            ended = closed.code is not Close.TAKEN_OVER
            raise
        except WebSocketDisconnect as gone:
            ended = gone.code in BROKEN
            raise
        finally:
            if ended:
                self._end(session)
            elif not session.connected:
                self._stop_leaving(session)
                loop = asyncio.get_running_loop()
                handle = loop.call_later(session.limits.away, self._end_if_away, session)
                self._leaving[session.id] = handle

    async def close(self) -> None:
        """End all sessions."""
        for session in list(self.sessions.values()):
            self._end(session)
        await asyncio.gather(*self._closing, return_exceptions=True)

    async def _live(self, socket: WebSocket) -> None:
        """Without it a page that waits could not tell a full server from one that is gone."""
        with suppress(WebSocketDisconnect, RuntimeError):
            while True:
                await asyncio.sleep(self._alive)
                await socket.send_json({"type": "alive"})

    async def _new_session(self, socket: WebSocket) -> Session:
        if len(self._waiting) >= MAX_WAITING:
            raise Closed(Close.BUSY, f"all places are taken, and {MAX_WAITING} wait for one")
        ticket = object()
        self._waiting.append(ticket)
        gone = asyncio.create_task(_until_gone(socket))
        try:
            while not gone.done():
                moved = self._moved  # before looking, so that nothing is missed while busy is told
                before = self._waiting.index(ticket)
                if before == 0 and self._taken() < self.places:
                    break
                await socket.send_json({"type": "busy", "places": self.places, "before": before})
                moving = asyncio.create_task(moved.wait())
                await asyncio.wait([gone, moving], return_when=asyncio.FIRST_COMPLETED)
                moving.cancel()
            if gone.done():
                raise WebSocketDisconnect(1006)
            self._opening += 1
        finally:
            gone.cancel()
            self._waiting.remove(ticket)
            self._announce()
        try:
            session = await self._open_session()
            self.sessions[session.id] = session
        finally:
            self._opening -= 1
            self._announce()
        return session

    def _taken(self) -> int:
        return len(self.sessions) + self._opening

    def _announce(self) -> None:
        """Wake everyone who waits."""
        self._moved.set()
        self._moved = asyncio.Event()

    def _stop_leaving(self, session: Session) -> None:
        if handle := self._leaving.pop(session.id, None):
            handle.cancel()

    def _end_if_away(self, session: Session) -> None:
        if not session.connected:
            self._end(session)

    def _end(self, session: Session) -> None:
        self._stop_leaving(session)
        if self.sessions.pop(session.id, None) is not None:
            task = asyncio.get_running_loop().create_task(session.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        self._announce()


async def _until_gone(socket: WebSocket) -> None:
    """What is said while waiting is not heard."""
    with suppress(WebSocketDisconnect, RuntimeError):
        while (await socket.receive())["type"] != "websocket.disconnect":
            pass
