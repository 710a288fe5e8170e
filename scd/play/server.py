"""The server: routes, who may come in, and running it."""

import asyncio
import logging
import secrets
import socket as sockets
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

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
from scd.play.lobby import Lobby
from scd.play.messages import MAX_BYTES, Close, Closed
from scd.play.recording import MAX_RECORDINGS, record_mp4, start_png
from scd.play.session import Session

STATIC = Path(__file__).parent / "static"
MAX_CONNECTIONS = 100
log = logging.getLogger(__name__)


def make_app(
    catalog: Catalog,
    *,
    places: int = 2,
    token: str | None = None,
    local: bool = True,
    origins: frozenset[str] = frozenset(),
    limits: Limits | None = None,
) -> Starlette:
    """The application.

    Args:
        places: players at a time.
        token: what every address but those of `static/` asks for; None: nothing is asked for.
        local, origins: whom it answers to (see `OriginCheck`).
    """
    worker = ThreadPoolExecutor(1, "play")  # one frame is computed at a time, with all cores
    limits = limits or Limits()
    lobby = Lobby(lambda: Session.open(catalog, worker, limits), places, limits.alive)
    recordings = asyncio.Semaphore(MAX_RECORDINGS)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await lobby.close()
        worker.shutdown(wait=False, cancel_futures=True)

    def admitted(connection: HTTPConnection) -> bool:
        given = connection.query_params.get("token", "")
        return token is None or secrets.compare_digest(given.encode(), token.encode())

    async def page(request: Request) -> Response:
        if not admitted(request):
            return PlainTextResponse(
                "This address needs its token: open the whole URL that the server printed.", 403
            )
        return FileResponse(STATIC / "index.html")

    async def start_picture(request: Request) -> Response:
        if not admitted(request):
            return PlainTextResponse("wrong token", 403)
        try:
            start = catalog.start(request.path_params["name"])
        except ScdError as error:
            return PlainTextResponse(str(error), 404)
        return Response(start_png(start), media_type="image/png")

    async def recording(request: Request) -> Response:
        session = lobby.sessions.get(request.query_params.get("session", ""))
        if not admitted(request) or session is None:
            return PlainTextResponse("no such session (any more)", 404)
        return await record_mp4(session, request.query_params, recordings)

    async def websocket(socket: WebSocket) -> None:
        await socket.accept()
        try:
            if not admitted(socket):
                raise Closed(Close.BAD_TOKEN, "open the whole URL that the server printed")
            await lobby.serve(socket, socket.query_params.get("session"))
        except WebSocketDisconnect:
            pass
        except Closed as closed:
            with suppress(RuntimeError, WebSocketDisconnect):  # gone in the meantime
                await socket.close(closed.code, closed.reason)
        except Exception:
            log.exception("a session ended by a fault")
            with suppress(RuntimeError, WebSocketDisconnect):
                await socket.close(Close.FAULT, "a fault of the server ended this session")

    return Starlette(
        routes=[
            Route("/", page),
            Route("/starts/{name}.png", start_picture),
            Route("/recording.mp4", recording),
            WebSocketRoute("/ws", websocket),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[Middleware(OriginCheck, local=local, origins=origins)],
        lifespan=lifespan,
    )


@dataclass(frozen=True)
class Address:
    """Where to serve; `token` is what an address that others can reach asks for.

    Args:
        origins: under which a proxy shows the server to others, see `OriginCheck`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    origins: frozenset[str] = frozenset()

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        return is_local(self.host)

    def url(self, port: int) -> str:
        """What to open; for a server at every address, this machine's own in its network."""
        host = self.host
        if host in ("0.0.0.0", "::"):
            host = _own_address() or sockets.gethostname()
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def serve(catalog: Catalog, address: Address, places: int) -> None:
    """Serve until Ctrl-C.

    Raises:
        ScdError: the address cannot be had, or there is no place for a player.
    """
    if places < 1:
        raise ScdError(f"play: {places} sessions, but at least one player needs a place")
    alone = address.local and not address.origins
    token = address.token or (None if alone else secrets.token_urlsafe(16))
    listening = listen(address)
    app = make_app(
        catalog, places=places, token=token, local=address.local, origins=address.origins
    )
    shown = [address.url(listening.getsockname()[1]), *(f"{o}/" for o in sorted(address.origins))]
    urls = " and ".join(url + (f"?token={token}" if token else "") for url in shown)
    print(f"serving {catalog.first.folder} at {urls} (Ctrl-C ends)", flush=True)
    uvicorn.Server(config(app)).run(sockets=[listening])


def _own_address() -> str | None:
    """Of the interface that leads out of this machine; nothing is sent. None: there is none."""
    with sockets.socket(sockets.AF_INET, sockets.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # an address for documentation, which nobody has
        return str(probe.getsockname()[0])
    return None


def listen(address: Address) -> sockets.socket:
    """Raises: ScdError: the address cannot be had."""
    try:
        family = sockets.AF_INET6 if ":" in address.host else sockets.AF_INET
        return sockets.create_server((address.host, address.port), family=family)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise ScdError(
            f"{address.host}:{address.port} cannot be served at ({why}): choose another --port "
            f"or --host"
        ) from error


def config(app: Starlette) -> uvicorn.Config:
    """How uvicorn runs it: messages in are small, and pictures do not compress."""
    return uvicorn.Config(
        app,
        ws="websockets-sansio",
        ws_max_size=MAX_BYTES,
        ws_per_message_deflate=False,
        access_log=False,  # its lines would hold tokens
        log_level="warning",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=3,
    )
