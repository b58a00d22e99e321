"""What every request passes, before any route: its id, its token, its headers, the meters, the log line, the last word.

Plain ASGI, so that bodies and streams pass through as they come; and `turn_away`, which a connection asks before it
makes a request of a head. An answer that is ready before its body has come is sent at once, and what still comes is
thrown away for a moment: a connection that is closed with unread bytes in it takes the answer with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from functools import partial

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.connection import LINGER_BYTES, LINGER_S, Refusal
from serve_app.context import App, Context
from serve_app.errors import Answer, NotReadyError, RefusedError, answer
from serve_app.limits import BusyError

log = logging.getLogger(__name__)

OPEN = (
    "/",
    "/healthz",
    "/readyz",
    "/metrics",
    "/docs",
    "/openapi.json",
)  # need no token; nothing of a caller's is there
OPEN_FOLDERS = ("/page/", "/docs/")
LONGEST_METHOD = 16  # in a log line: a head has room for one of 32 KB
WITH_AUDIO = ("/v1/inference/{model}", *(
    f"{prefix}/audio/{task}" for prefix in ("/v1", "/v1/openai") for task in ("transcriptions", "translations")
))  # fmt: skip
ROUTES = (*WITH_AUDIO, "/v1/models", "/v1/openai/models", "/models/list", "/v1/webhooks", *OPEN)
SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


class Door:
    """The application behind its door."""

    def __init__(self, inner: ASGIApp, app: App) -> None:
        self._inner, self._app = inner, app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._inner(scope, receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)
        else:  # a websocket: there are none
            await send({"type": "websocket.close", "code": 1000})

    def turn_away(self, method: str, path: str, headers: Headers) -> Refusal | None:
        """The answer to a request that is refused for its head alone; None for another."""
        route = route_of(path)
        try:
            self._refuse(method, path, route, headers)
        except (RefusedError, BusyError) as error:
            context = Context(self._app)
            said = self._answer(error, path, context)
            own = {"X-Request-Id": context.id, **SAFE}
            return Refusal(said, own, partial(self._ended, context, method, route, str(said.status)))
        return None

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = Context(self._app)
        scope["murmur"] = context
        passage = _Passage(scope, receive, send, context)
        method, path = scope["method"], scope["path"]
        route = route_of(path)
        try:
            with self._app.meters.in_flight.track_inprogress():
                try:
                    self._refuse(method, path, route, Headers(scope=scope))
                    await self._inner(scope, passage.receive, passage.send)
                except ClientDisconnect:
                    context.kind = "gone"
                except (RefusedError, BusyError) as error:
                    await passage.answer(self._answer(error, path, context))
                except asyncio.CancelledError:  # by the server, whose time to drain is over
                    if passage.status is None:
                        await passage.answer(self._answer(NotReadyError("not ready: shutting down"), path, context))
                    raise
                except Exception:  # whatever it is, the caller was told, and the next one is served
                    log.exception("request %s", context.id)
                    context.kind = "internal"
                    if not passage.is_complete:  # the connection's end is all that is left to say it with
                        raise ConnectionError("an answer broke off") from None
                await passage.linger()
        finally:
            status = "gone" if context.kind == "gone" else str(passage.status or "gone")
            self._ended(context, method, route, status, passage.n_read)

    def _answer(self, error: Exception, path: str, context: Context) -> Answer:
        said = answer(error, openai=is_openai(path), busy_status=self._app.limits.busy_status)
        context.kind = said.kind
        return said

    def _ended(self, context: Context, method: str, route: str, status: str, n_read: int) -> None:
        """Counted, and in the log: a request and its answer, after so many bytes of its body."""
        meters = self._app.meters
        meters.requests.labels(route, status).inc()
        meters.seconds.labels(route).observe(time.monotonic() - context.began)
        meters.body_bytes.inc(n_read)
        if context.kind:
            meters.refused.labels(context.kind).inc()
        if route not in OPEN:
            self._log(method, route, status, context.kind, n_read, context)

    @staticmethod
    def _log(method: str, route: str, status: str, kind: str, body_bytes: int, context: Context) -> None:
        """One line a request: neither its token, nor its address, nor what was said."""
        figures = {"body_bytes": body_bytes, "audio_s": round(context.audio_s, 3), "runtime_ms": context.runtime_ms()}
        said = {"request": context.id, "route": route, "status": status, **figures} | ({"kind": kind} if kind else {})
        more = ", ".join(
            f"{name} {value}" for name, value in said.items() if name not in ("request", "route", "status")
        )
        log.info("%s %s: %s (%s), %s", method[:LONGEST_METHOD], route, status, context.id, more, extra=said)

    def _refuse(self, method: str, path: str, route: str, headers: Headers) -> None:
        """Raises what is refused whatever the route, and who comes with audio while there is no room: before anything
        of the body is read, and by three layers less than the route would, since many are refused at once."""
        is_open = path in OPEN or path.startswith(OPEN_FOLDERS)
        if not is_open and not self._app.tokens.allows(headers):
            raise RefusedError(401, "a token is needed: Authorization: Bearer TOKEN", "invalid_api_key")
        if "content-length" in headers and "transfer-encoding" in headers:
            raise RefusedError(400, "Content-Length and Transfer-Encoding exclude each other")
        if headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
            raise RefusedError(415, "Content-Encoding: bodies are taken as they are only")
        if route in WITH_AUDIO and method == "POST":
            self._app.gate.refuse_arrival()


class _Passage:
    """One request's messages on their way in and out."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, context: Context) -> None:
        headers = Headers(scope=scope)
        self._receive, self._send, self._context = receive, send, context
        self._all_read = not int(_number(headers.get("content-length", "0"))) and "transfer-encoding" not in headers
        self.n_read = 0
        self.status: int | None = None
        self.is_complete = False  # the answer
        self._last: Message | None = None  # kept back while bytes come

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self.n_read += len(message.get("body", b""))
            self._all_read = self._all_read or not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self._context.id
            for name, value in SAFE.items():
                headers.setdefault(name, value)
            if not self._all_read:
                headers["Connection"] = "close"
        elif not message.get("more_body", False):
            self.is_complete = True
            if not self._all_read:
                self._last = {"type": "http.response.body", "body": b"", "more_body": False}
                message = {**message, "more_body": True}
        await self._send(message)

    async def answer(self, said: Answer) -> None:
        """What is refused here, before any route."""
        body = said.to_bytes()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **said.headers}
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": said.status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    async def linger(self) -> None:
        """Throw away what still comes, for a moment, and then end the answer."""
        if self._last is None:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                n_before = self.n_read
                while not self._all_read and self.n_read - n_before < LINGER_BYTES:
                    if (await self.receive())["type"] == "http.disconnect":
                        break
        await self._send(self._last)


def route_of(path: str) -> str:
    """A name from a fixed list for any path, or metrics would grow with what callers make up."""
    if path.startswith("/v1/inference/"):
        return ROUTES[0]
    return path if path in ROUTES else "/page" if path.startswith("/page/") else "other"


def is_openai(path: str) -> bool:
    """Whether errors on this path look as OpenAI's."""
    return path.startswith(("/v1/audio", "/v1/openai", "/v1/models", "/models"))


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 1
