"""Control access to the play server: allowed origins, and limits of what a player may take."""

import time
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scd.errors import ScdError

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; connect-src 'self'; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # addresses may hold a token
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class OriginCheck:
    """Middleware. A web page of another origin is refused, whatever it asks for.

    Args:
        local: the server is this machine's own: a request that names another host is refused. It
            comes from a page whose name was made to point here (DNS rebinding).
        origins: addresses under which a proxy shows the server, as `origin_of` gives them: their
            pages may use it, and their hosts be named, whatever host the proxy itself names.
    """

    def __init__(self, app: ASGIApp, local: bool, origins: frozenset[str] = frozenset()):
        self.app = app
        self.local = local
        self.origins = origins
        self.hosts = {origin.partition("://")[2] for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        problem = self._problem(Headers(scope=scope))
        if problem is not None:
            await PlainTextResponse(problem, 403)(scope, receive, with_headers)
            return
        await self.app(scope, receive, with_headers)

    def _problem(self, headers: Headers) -> str | None:
        host, origin = headers.get("host", "").lower(), headers.get("origin", "").lower()
        known = host in self.hosts or is_local(_split(f"//{host}").hostname or "")
        if self.local and not known:
            return "this server answers only to localhost, and to what --allow-origin names"
        own = not origin or _split(origin).netloc == host
        if not own and origin not in self.origins:
            return "a page of another origin may not use this server; see --allow-origin"
        return None


def origin_of(address: str) -> str:
    """The origin of an address, as browsers write it: `https://name[:port]`.

    Raises:
        ScdError: it is none.
    """
    parts = _split(address.lower())
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ScdError(
            f"--allow-origin {address}: give the address that the browser shows, such as "
            f"https://play.example.org"
        )
    default = {"http": ":80", "https": ":443"}[parts.scheme]
    return f"{parts.scheme}://{parts.netloc.removesuffix(default)}"


def is_local(host: str) -> bool:
    """Whether a name or address is this machine's own, which no other can reach."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # such as "http://["
        return urlsplit("")


@dataclass(frozen=True)
class Limits:
    """Of a session; seconds where nothing else is said."""

    idle: float = 300.0  # without input from the player
    away: float = 60.0  # a cut-off player can come back
    stalled: float = 20.0  # a picture that cannot be sent
    alive: float = 2.0  # between two signs of life
    unseen: int = 3  # pictures under way; no further one is made before one of them was seen
    messages: float = 200.0  # a second
    commands: int = 16  # waiting to be carried out
    min_fps: float = 1.0
    max_fps: float = 60.0
    fps: float = 10.0  # at the beginning


class Allowance:
    """So many a second, of which those of one second can be saved up."""

    def __init__(self, rate: float):
        self.rate = rate
        self._left = rate
        self._at = time.monotonic()

    def take(self) -> bool:
        """One; or False where nothing is left."""
        now = time.monotonic()
        self._left = min(self.rate, self._left + self.rate * (now - self._at)) - 1
        self._at = now
        return self._left >= 0
