"""Access to the play server: allowed origins, and the limits of a session."""

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
    """Middleware that refuses requests from web pages of other origins.

    Args:
        local: the server is only for this machine: a request that names another host is refused,
            since it comes from a page whose name was made to resolve to here (DNS rebinding).
        origins: origins (see `origin_of`) under which a proxy shows the server. Their pages may use
            it, and requests may name their hosts, whatever host the proxy itself names.
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
            return "this server only answers to localhost and to the hosts of --allow-origin"
        own = not origin or _split(origin).netloc == host
        if not own and origin not in self.origins:
            return "pages of another origin may not use this server; see --allow-origin"
        return None


def origin_of(address: str) -> str:
    """Extract the origin of an address, as browsers write it: `https://name[:port]`.

    Raises:
        ScdError: it is not an http or https address.
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
    """Check whether a host name or address can only be reached from this machine."""
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
    """The limits of a session.

    Args:
        idle_seconds: without input from the player, before the session ends.
        away_seconds: that a disconnected player has to come back.
        stalled_seconds: that sending a picture may take.
        alive_seconds: between two heartbeats.
        unseen: pictures sent that the player has not confirmed; then no more are made.
        messages_per_second: from the player.
        queued_commands: that wait to be executed. As many single steps can wait to be made.
        fps: frames per second at the beginning.
    """

    idle_seconds: float = 300.0
    away_seconds: float = 60.0
    stalled_seconds: float = 20.0
    alive_seconds: float = 2.0
    unseen: int = 3
    messages_per_second: float = 200.0
    queued_commands: int = 16
    min_fps: float = 1.0
    max_fps: float = 60.0
    fps: float = 10.0


class RateLimiter:
    """A token bucket: `rate` events per second, with bursts of up to one second's worth."""

    def __init__(self, rate: float):
        self.rate = rate
        self._tokens = rate
        self._updated = time.monotonic()

    def allow(self) -> bool:
        """Count an event, and return whether it is within the rate."""
        now = time.monotonic()
        self._tokens = min(self.rate, self._tokens + self.rate * (now - self._updated)) - 1
        self._updated = now
        return self._tokens >= 0
