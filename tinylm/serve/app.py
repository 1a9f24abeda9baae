"""The web application: the endpoint and the page behind checks of Host, Origin and size."""

from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tinylm.serve import api, page
from tinylm.serve.engine import Engine

LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; "
                               "form-action 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin", "cache-control": "no-store"}


def application(engine: Engine, hosts: Iterable[str] = (),
                rankings: Path | None = None) -> ASGIApp:
    """Build the application; it answers on loopback names and on `hosts` only.

    What a person ranks is appended to the file `rankings`.
    """
    inner = Starlette(routes=[*api.routes(engine), *page.routes(engine, rankings)])
    return Guard(inner, {*LOOPBACK, *hosts})


class Guard:
    """Refuse what another site, or a name bound to our address, makes a browser ask."""

    def __init__(self, inner: ASGIApp, hosts: set[str]):
        self.inner, self.hosts = inner, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request, then pass it on with the headers that bind a browser."""
        if scope["type"] != "http":
            await self.inner(scope, receive, send)
            return
        headers = Request(scope).headers
        host, origin = headers.get("host", ""), headers.get("origin")
        if _name(f"//{host}") not in self.hosts:
            await PlainTextResponse("this server has another name", 421)(scope, receive, send)
            return
        if origin is not None and urlsplit(origin).netloc != host:
            await PlainTextResponse("asked by another site", 403)(scope, receive, send)
            return

        async def bound(message) -> None:
            if message["type"] == "http.response.start":
                kept = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *kept]}
            await send(message)

        await self.inner(scope, receive, bound)


def _name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
