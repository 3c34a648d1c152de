"""What stands before the application: API key, host names, and limits on the size and time of what comes in."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from sentcompress.serving.limits import ServeLimits
from sentcompress.serving.openai_form import APIError
from sentcompress.serving.try_page import PAGE

log = logging.getLogger(__package__)
OPEN_PATHS = {"/health", *PAGE}
"""Answered without an API key."""
CLOSE = {"connection": "close"}
"""A body that is not read to its end cannot be followed by another request."""


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach a server at this address or name."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """Lets requests through to an application.

    Args:
        app: the application.
        key: that clients must send as ``Authorization: Bearer KEY``; None: anyone may come.
        local: the server listens on loopback, and answers requests to loopback names only, if there is no key: a page
            in a browser could otherwise reach it through a name of its own (DNS rebinding).
        limits: of the server.
        count: called with path and status of each answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        key: str | None,
        local: bool,
        limits: ServeLimits,
        count: Callable[[str, int], None],
    ) -> None:
        self.app, self.key, self.local, self.limits, self.count = app, key, local, limits, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self.app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.count(scope["path"], message["status"])
                if message["status"] >= 400:
                    # Not decoded: %0A would begin a new line of the log.
                    path = scope["raw_path"][:200].decode("ascii", "backslashreplace")
                    log.info("%s %d", path, message["status"])
            await send(message)

        error = self._refusal(scope["path"], Headers(scope=scope))
        if error is not None:
            answer = JSONResponse(error.body, error.status, error.headers | CLOSE)
            await answer(scope, receive, counting)
            return
        await self.app(scope, _Body(receive, self.limits).receive, counting)

    def _refusal(self, path: str, headers: Headers) -> APIError | None:
        if self.key is not None and path not in OPEN_PATHS:
            kind, _, given = headers.get("authorization", "").partition(" ")
            right = secrets.compare_digest(given.strip().encode(), self.key.encode())
            if kind.lower() != "bearer" or not right:
                return APIError(
                    401,
                    "Incorrect API key provided: send it as 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                )
        if self.key is None and self.local and not is_loopback(_host_name(headers.get("host", ""))):
            return APIError(403, "this server answers requests to localhost only", code="wrong_host")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.limits.max_body_bytes:
            return too_large(self.limits)
        return None


def too_large(limits: ServeLimits) -> APIError:
    """The error for a long body."""
    return APIError(
        413,
        f"the body is longer than {limits.max_body_bytes:,} bytes; shorten it, or start the server with a larger "
        "--max-body-bytes",
        code="body_too_large",
    )


def _host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host


class _Body:
    """Receives a body, as long as it is neither too long nor too slow."""

    def __init__(self, receive: Receive, limits: ServeLimits) -> None:
        self._receive, self._limits = receive, limits
        self._size, self._ended = 0, False
        self._until = time.monotonic() + limits.body_seconds

    async def receive(self) -> Message:
        """The next message. Raises HTTPException, which the application makes an answer of."""
        if self._ended:  # what follows is that the client goes away
            return await self._receive()
        try:
            async with asyncio.timeout(max(0, self._until - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(
                408, f"the body did not arrive within {self._limits.body_seconds:g} seconds", CLOSE
            ) from None
        self._size += len(message.get("body", b""))
        self._ended = not message.get("more_body", False)
        if self._size > self._limits.max_body_bytes:
            raise HTTPException(413, str(too_large(self._limits)), CLOSE)
        return message


def timed_protocol(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which also closes connections whose headers do not arrive in time, or that nobody reads."""

    class Timed(H11Protocol):
        unread: asyncio.TimerHandle | None = None
        """Runs while more is waiting to be read than buffers hold."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect_headers()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:  # there is more of a request to come
                self._expect_headers()

        def _expect_headers(self) -> None:
            before = self.cycle

            def close_if_idle() -> None:
                if self.cycle is before and not self.transport.is_closing():
                    self.transport.close()

            self.loop.call_later(seconds, close_if_idle)

        def pause_writing(self) -> None:
            super().pause_writing()
            self.unread = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self.unread is not None:
                self.unread.cancel()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self.unread is not None:
                self.unread.cancel()

    return Timed
