"""Who may come in from a browser, and what a browser may do with what it gets."""

from ipaddress import ip_address
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; connect-src 'self'; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # addresses may hold a token
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Door:
    """Middleware. A web page of another origin is refused, whatever it asks for.

    Args:
        local: the server is this machine's own: a request that names another host is refused. It
            comes from a page whose name was made to point here (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, local: bool):
        self.app = app
        self.local = local

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
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.local and not is_local(_split(f"//{host}").hostname or ""):
            return "this server answers only to localhost"
        if origin is not None and _split(origin).netloc.lower() != host.lower():
            return "a page of another origin may not use this server"
        return None


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
