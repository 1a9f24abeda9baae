"""The web application: the endpoint and the page behind checks of Host, Origin and size."""

import asyncio
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

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
    inner = Starlette(routes=[*api.routes(engine), *page.routes(engine, rankings)],
                      exception_handlers={HTTPException: api.missing})
    return Guard(inner, {*LOOPBACK, *hosts})


def server(app: ASGIApp, log_level: str = "warning") -> uvicorn.Server:
    """Build the server of an application, bounded in connections and in time."""
    return uvicorn.Server(uvicorn.Config(
        app, http=Patient, log_level=log_level, access_log=False, timeout_keep_alive=10,
        limit_concurrency=512, server_header=False))


class Patient(H11Protocol):
    """A connection that is closed where a request's head is not whole within PATIENCE."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Wait for the first request."""
        super().connection_made(transport)
        self._wait(True)

    def data_received(self, data: bytes) -> None:
        """Read on; a head that has begun, of the first request or a later one, is waited for."""
        super().data_received(data)
        self._wait(self.conn.their_state is h11.IDLE)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._wait(False)
        super().connection_lost(exc)

    def _wait(self, on: bool) -> None:
        if on and self._late is None:
            self._late = self.loop.call_later(api.PATIENCE, self.transport.close)
        elif not on and self._late is not None:
            self._late.cancel()
            self._late = None


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
        if _split(f"//{host}")[1] not in self.hosts:
            await PlainTextResponse("this server has another name", 421)(scope, receive, send)
            return
        if origin is not None and _split(origin)[0] != host:
            await PlainTextResponse("asked by another site", 403)(scope, receive, send)
            return

        async def bound(message) -> None:
            if message["type"] == "http.response.start":
                kept = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *kept]}
            await send(message)

        await self.inner(scope, receive, bound)


def _split(url: str) -> tuple[str, str]:
    """Give a URL's host with and without its port; nothing for what is no URL."""
    try:
        found = urlsplit(url)
        return found.netloc, found.hostname or ""
    except ValueError:
        return "", ""
