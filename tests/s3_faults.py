"""An S3 server that has bad days: an HTTP proxy before a good one, which refuses, cuts off and lets keys expire.

    with Faults(upstream, refused=0.1, cut=0.02) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.url

Which requests are hit follows from `seed` and their order. What is cut was done by the server all the same: the body
of the answer ends half way, or, where it has none, the connection without an answer.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from types import TracebackType

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

_ERROR = """<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>{code}</Code><Message>{message}</Message><Resource>{path}</Resource><RequestId>0</RequestId></Error>"""
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-encoding", "content-length", "date", "server"}


class Faults:
    """The proxy; `url` is its address while it is open, and every setting may be changed meanwhile."""

    def __init__(
        self,
        upstream: str,
        *,
        refused: float = 0.0,  # fraction of the requests that are answered by 503 SlowDown and not passed on
        cut: float = 0.0,  # fraction of the requests whose answer is cut off
        expires_after: int | None = None,  # requests, from then on 403 ExpiredToken
        denied: bool = False,  # 403 InvalidAccessKeyId from the start
        seed: int = 0,
    ) -> None:
        self.upstream = upstream.rstrip("/")
        self.refused, self.cut, self.expires_after, self.denied = refused, cut, expires_after, denied
        self.seen: Counter[str] = Counter()  # passed, refused, cut, denied, expired
        self.url = ""
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._ready, self._end = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    def __enter__(self) -> Faults:
        self._thread.start()
        if not self._ready.wait(timeout=30):
            raise RuntimeError("the proxy did not start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(timeout=30)
        self._loop.close()

    @property
    def requests(self) -> int:
        return self.seen.total()

    async def _serve(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        async with aiohttp.ClientSession(auto_decompress=False) as self._session:
            self._ready.set()
            await self._end.wait()
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if self.denied:
            return self._refusal(request, "denied", 403, "InvalidAccessKeyId", "The key does not exist in our records.")
        if self.expires_after is not None and self.requests >= self.expires_after:
            return self._refusal(request, "expired", 403, "ExpiredToken", "The provided token has expired.")
        chance = self._random.random()
        if chance < self.refused:
            return self._refusal(request, "refused", 503, "SlowDown", "Please reduce your request rate.")
        async with self._session.request(
            request.method,
            self.upstream + request.raw_path,
            headers={name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP},
            data=body,
            allow_redirects=False,
        ) as answer:
            raw = await answer.read()
            headers = CIMultiDict((n, v) for n, v in answer.headers.items() if n.lower() not in _HOP_BY_HOP)
            if request.method == "HEAD":  # the length of what is not sent
                headers["Content-Length"] = answer.headers.get("Content-Length", "0")
            whole = web.Response(status=answer.status, headers=headers, body=raw or None)
        if chance < self.refused + self.cut:
            self.seen["cut"] += 1
            return await self._half(request, whole, raw)
        self.seen["passed"] += 1
        return whole

    def _refusal(self, request: web.Request, kind: str, status: int, code: str, message: str) -> web.Response:
        self.seen[kind] += 1
        text = "" if request.method == "HEAD" else _ERROR.format(code=code, message=message, path=request.path)
        return web.Response(status=status, text=text, content_type="application/xml")

    async def _half(self, request: web.Request, whole: web.Response, raw: bytes) -> web.StreamResponse:
        half = web.StreamResponse(status=whole.status, headers=whole.headers)
        if len(raw) > 1:
            half.content_length = len(raw)
            await half.prepare(request)
            await half.write(raw[: len(raw) // 2])
        if request.transport is not None:
            request.transport.close()
        return half
