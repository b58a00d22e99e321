"""What tests of webhooks share: receivers on real ports, a folder for the spool, a clock that only sleeping moves."""

from __future__ import annotations

import asyncio
import functools
import os
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from serve_app import webhook
from serve_app.webhook import Webhooks, WebhookSettings

AUDIO = b"RIFF....the audio of a caller"
ORDER = {"language": "de", "note": "größer"}


@dataclass(frozen=True)
class Post:
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


Handler = Callable[[web.Request, int], Awaitable[web.StreamResponse]]  # (request, how many there were before)


class Receiver:
    """An HTTP server on a port of this host that keeps what it is sent; `how` answers, 204 without it."""

    def __init__(self, how: Handler | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.posts: list[Post] = []
        self._how, self._tls = how, tls

    async def __aenter__(self) -> Receiver:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._take)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._tls).start()
        self.port = self._runner.addresses[0][1]
        self.origin = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.posts.append(Post(request.path_qs, headers, await request.read()))
        if self._how is None:
            return web.Response(status=204)
        return await self._how(request, len(self.posts) - 1)


def always(status: int, **headers: str) -> Handler:
    async def answer(request: web.Request, before: int) -> web.Response:
        return web.Response(status=status, headers={name.replace("_", "-"): text for name, text in headers.items()})

    return answer


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = time.time()
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """A test that is a coroutine, in a loop of its own."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))  # type: ignore[arg-type]

    return run


async def forever(*_: object) -> Any:
    await asyncio.Event().wait()


async def transcribed(request_id: str, order: dict[str, Any], audio: Path) -> dict[str, Any]:
    return {"request_id": request_id, "order": order, "bytes": len(audio.read_bytes())}


def failed(request_id: str, why: str) -> dict[str, Any]:
    return {"request_id": request_id, "failed": why}


def names(**addresses: str) -> Callable[[str], Awaitable[Sequence[str]]]:
    async def resolve(host: str) -> Sequence[str]:
        if host.partition(".")[0] not in addresses:
            raise OSError("no such name")
        return addresses[host.partition(".")[0]].split()

    return resolve


@dataclass
class Bench:
    """A folder for the spool, and what callers send."""

    folder: Path

    @property
    def spool(self) -> Path:
        return self.folder / "spool"

    def settings(self, *allow: str, **more: Any) -> WebhookSettings:
        return WebhookSettings(**{"allow": allow, "spool": self.spool} | more)

    def audio(self, data: bytes = AUDIO) -> Path:
        path = self.folder / f"upload-{os.urandom(4).hex()}"
        path.write_bytes(data)
        return path

    @asynccontextmanager
    async def running(
        self, settings: WebhookSettings, answer: webhook.Answer = transcribed, **more: Any
    ) -> AsyncIterator[Webhooks]:
        clock = more.setdefault("clock", Clock())
        hooks = Webhooks(settings, answer, failed, **{"sleep": clock.sleep} | more)
        try:
            await hooks.start()
            yield hooks
        finally:
            await hooks.close(0)

    def left(self) -> list[str]:
        """What lies in the spool, but for its lock."""
        found = [str(path.relative_to(self.spool)) for path in self.spool.rglob("*")]
        return sorted(set(found) - {"lock", "jobs", "dead"})


async def until(condition: Callable[[], object], within_s: float = 120.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def ended(hooks: Webhooks) -> Callable[[], bool]:
    return lambda: hooks.counts()["pending"] + hooks.counts()["undelivered"] == 0


async def one(bench: Bench, hooks: Webhooks, url: str, request_id: str = "request-1") -> None:
    """Accept a job, and wait for its end."""
    await hooks.accept(request_id, url, ORDER, bench.audio())
    await until(ended(hooks))


class Door:
    """A port of this host that counts who connects, whatever they say."""

    def __init__(self) -> None:
        self.connections = 0

    async def __aenter__(self) -> Door:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        writer.close()
        await writer.wait_closed()
