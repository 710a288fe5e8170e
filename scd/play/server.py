"""The play server: routes, tokens, and running it."""

import asyncio
import logging
import secrets
import socket as sockets
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect

from scd.errors import ScdError
from scd.play.access import Limits, OriginCheck, is_local
from scd.play.catalog import Catalog
from scd.play.messages import MAX_BYTES, CloseCode, CloseConnection
from scd.play.recording import MAX_RECORDINGS, record_mp4, start_thumbnail
from scd.play.session import Session
from scd.play.session_manager import SessionManager

STATIC = Path(__file__).parent / "static"
MAX_CONNECTIONS = 100
log = logging.getLogger(__name__)


class Handlers:
    """The answers to what browsers ask for.

    Args:
        token: that every one of them requires; None: no token.
    """

    def __init__(self, catalog: Catalog, manager: SessionManager, token: str | None):
        self._catalog = catalog
        self._manager = manager
        self._token = token
        self._recordings = asyncio.Semaphore(MAX_RECORDINGS)

    async def page(self, request: Request) -> Response:
        if not self._has_token(request):
            return PlainTextResponse(
                "A token is missing: open the complete URL that the server printed.", 403
            )
        return FileResponse(STATIC / "index.html")

    async def start_picture(self, request: Request) -> Response:
        if not self._has_token(request):
            return PlainTextResponse("wrong token", 403)
        try:
            start = self._catalog.start(request.path_params["name"])
        except ScdError as error:
            return PlainTextResponse(str(error), 404)
        return Response(start_thumbnail(start), media_type="image/png")

    async def recording(self, request: Request) -> Response:
        session = self._manager.sessions.get(request.query_params.get("session", ""))
        if not self._has_token(request) or session is None:
            return PlainTextResponse("this session does not exist (any more)", 404)
        return await record_mp4(session, request.query_params, self._recordings)

    async def websocket(self, socket: WebSocket) -> None:
        await socket.accept()
        try:
            if not self._has_token(socket):
                raise CloseConnection(
                    CloseCode.BAD_TOKEN, "open the complete URL that the server printed"
                )
            await self._manager.serve(socket, socket.query_params.get("session"))
        except WebSocketDisconnect:
            pass
        except CloseConnection as end:
            with suppress(RuntimeError, WebSocketDisconnect):  # it may be gone by now
                await socket.close(end.code, end.reason)
        except Exception:
            log.exception("a session failed")
            with suppress(RuntimeError, WebSocketDisconnect):
                await socket.close(CloseCode.FAULT, "an error on the server ended this session")

    def _has_token(self, connection: HTTPConnection) -> bool:
        given, token = connection.query_params.get("token", ""), self._token
        return token is None or secrets.compare_digest(given.encode(), token.encode())


def make_app(
    catalog: Catalog,
    *,
    max_sessions: int = 2,
    token: str | None = None,
    local: bool = True,
    origins: frozenset[str] = frozenset(),
    limits: Limits | None = None,
) -> Starlette:
    """Build the web application.

    Args:
        max_sessions: players at a time; others wait.
        token: that every address except `static/` requires; None: no token.
        local, origins: see `OriginCheck`.
    """
    worker = ThreadPoolExecutor(1, "play")  # computes one frame at a time, with all cores
    limits = limits or Limits()
    manager = SessionManager(
        lambda: Session.open(catalog, worker, limits), max_sessions, limits.alive_seconds
    )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await manager.close()
        worker.shutdown(wait=False, cancel_futures=True)

    handlers = Handlers(catalog, manager, token)
    return Starlette(
        routes=[
            Route("/", handlers.page),
            Route("/starts/{name}.png", handlers.start_picture),
            Route("/recording.mp4", handlers.recording),
            WebSocketRoute("/ws", handlers.websocket),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[Middleware(OriginCheck, local=local, origins=origins)],
        lifespan=lifespan,
    )


@dataclass(frozen=True)
class Address:
    """Where to serve.

    Args:
        token: that visitors need; None: a random one if others can reach the address, else none.
        origins: under which a proxy shows the server to others; see `OriginCheck`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    origins: frozenset[str] = frozenset()

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the address."""
        return is_local(self.host)

    def url(self, port: int) -> str:
        """Make the URL to open; for a server on all interfaces, with this machine's address."""
        host = self.host
        if host in ("0.0.0.0", "::"):
            v6_alone = host == "::" and not sockets.has_dualstack_ipv6()
            host = _own_address(v6_alone) or sockets.gethostname()
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def serve(catalog: Catalog, address: Address, max_sessions: int) -> None:
    """Serve until Ctrl-C.

    Raises:
        ScdError: the address is not available, or no session is allowed.
    """
    if max_sessions < 1:
        raise ScdError(f"play: --sessions {max_sessions}: must be at least 1")
    alone = address.local and not address.origins
    token = address.token or (None if alone else secrets.token_urlsafe(16))
    listening = listen(address)
    app = make_app(
        catalog,
        max_sessions=max_sessions,
        token=token,
        local=address.local,
        origins=address.origins,
    )
    shown = [address.url(listening.getsockname()[1]), *(f"{o}/" for o in sorted(address.origins))]
    urls = " and ".join(url + (f"?token={quote(token, safe='')}" if token else "") for url in shown)
    print(f"serving {catalog.first.folder} at {urls} (Ctrl-C ends)", flush=True)
    uvicorn.Server(server_config(app)).run(sockets=[listening])


def _own_address(v6: bool) -> str | None:
    """Find this machine's address in its network, without sending anything; None: no network."""
    family = sockets.AF_INET6 if v6 else sockets.AF_INET
    nobody = "2001:db8::1" if v6 else "192.0.2.1"  # reserved for documentation
    with suppress(OSError), sockets.socket(family, sockets.SOCK_DGRAM) as probe:
        probe.connect((nobody, 9))
        return str(probe.getsockname()[0])
    return None


def listen(address: Address) -> sockets.socket:
    """Open the listening socket; at `::` also for IPv4, where the system can do that.

    Raises:
        ScdError: the address is not available, or empty.
    """
    if not address.host:  # to the socket it would mean all interfaces
        raise ScdError("play: --host is empty: give an address, or 0.0.0.0 to let others in")
    both = address.host == "::" and sockets.has_dualstack_ipv6()
    try:
        family = sockets.AF_INET6 if ":" in address.host else sockets.AF_INET
        where = (address.host, address.port)
        return sockets.create_server(where, family=family, dualstack_ipv6=both)
    except (OSError, OverflowError, TypeError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ScdError(
            f"cannot serve at {address.host}:{address.port} ({why}): choose another --port "
            f"or --host"
        ) from error


def server_config(app: Starlette) -> uvicorn.Config:
    """Configure uvicorn: messages from players are small, and pictures do not compress."""
    return uvicorn.Config(
        app,
        ws="websockets-sansio",
        ws_max_size=MAX_BYTES,
        ws_per_message_deflate=False,
        access_log=False,  # its lines would contain tokens
        log_level="warning",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=3,
    )
