"""What the routes share: the application's parts, and one request's way through them.

Holds no route and no engine.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect, Request

from pipeline.config import LimitsConfig
from pipeline.engine import Heard
from pipeline.errors import MurmurError
from pipeline.types import DecodeOptions, Transcript, seconds
from serve_app.auth import Tokens
from serve_app.bodies import Bodies, Body
from serve_app.errors import ModelNotFoundError
from serve_app.limits import Deadline, Gate, Ticket
from serve_app.meters import Meters
from serve_app.serving import Job, Model, Readers, refuse_failed, transcribe
from serve_app.webhook import Webhooks

FIRST = "whisper-1"  # what clients of OpenAI's call a model: the first of ours


@dataclass
class App:
    """The application's parts, for as long as it runs."""

    models: Sequence[Model]
    tokens: Tokens
    limits: LimitsConfig
    gate: Gate
    readers: Readers
    meters: Meters
    price_per_minute: float
    canary_s: float
    engine_timeout_s: float
    bodies: Bodies = field(init=False)
    webhooks: Webhooks | None = None
    draining: bool = False
    failure: MurmurError | None = None  # why it did not start
    standing: dict[str, str | None] = field(default_factory=dict)  # model id → why it is not ready

    def find(self, id: str) -> Model:
        """The model with this id. Raises `ModelNotFoundError`."""
        for model in self.models:
            if model.id == id:
                return model
        raise ModelNotFoundError(
            f"no model {id[:100]!r} is served here; there is: {', '.join(m.id for m in self.models)}"
        )

    def find_openai(self, id: str | None) -> Model:
        return self.models[0] if id in (None, FIRST) else self.find(id or "")

    def why_not_ready(self) -> str | None:
        """None: every model has decoded something lately."""
        if self.draining:
            return "shutting down"
        for model in self.models:
            reason = self.standing.get(model.id, "not asked yet")
            if reason is not None:
                return f"{model.id}: {reason}"
        return None


@dataclass
class Context:
    """One request."""

    app: App
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    began: float = field(default_factory=time.monotonic)
    audio_s: float = 0.0  # that was transcribed for it
    kind: str = ""  # of what it was refused for

    @property
    def gate(self) -> Gate:
        return self.app.gate

    def runtime_ms(self) -> int:
        return max(1, math.floor(1000 * (time.monotonic() - self.began)))

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[Body]:
        """The request's body, read where there may be room for it. Raises what `Bodies.read` does, and `BusyError`."""
        async with AsyncExitStack() as stack:
            with self.gate.arriving():
                body = await stack.enter_async_context(self.app.bodies.read(request))
            yield body

    @staticmethod
    def ignored(names: Sequence[str]) -> dict[str, str]:
        """The header that names what was ignored; a name that no header can hold, or end with, is written out."""
        safe = [
            name.encode("unicode_escape").decode()[:60].replace(",", "%2C").replace(" ", "%20") or '""'
            for name in names[:20]
        ]
        return {"Murmur-Ignored": ", ".join(safe)} if names else {}

    async def transcribe(
        self, request: Request, model: Model, options: DecodeOptions, audio: Path, heard: Heard | None = None
    ) -> Transcript:
        """The Transcript of an upload, while its caller waits; given up when that one goes away.

        Raises `BusyError`, `NotReadyError`, `DeadlineError`, `EngineError`, `RefusedError` for audio that cannot be
        read, `ClientDisconnect`.
        """
        with self.gate.admitted() as ticket:
            return await self.run(request, ticket, model, options, audio, heard)

    async def run(
        self,
        request: Request,
        ticket: Ticket,
        model: Model,
        options: DecodeOptions,
        audio: Path,
        heard: Heard | None = None,
    ) -> Transcript:
        async with while_there(request):
            return await self._transcribed(ticket, model, options, audio, heard)

    async def answered(self, model: Model, options: DecodeOptions, audio: Path) -> Transcript:
        """As `transcribe`, for a webhook: nobody waits, so it is never refused for others."""
        with self.gate.admitted(waits=True) as ticket:
            return await self._transcribed(ticket, model, options, audio, None)

    async def _transcribed(
        self, ticket: Ticket, model: Model, options: DecodeOptions, audio: Path, heard: Heard | None
    ) -> Transcript:
        job = Job(self.id, audio, model, options, self.app.limits.audio_s, heard)
        transcript = await transcribe(job, self.app.readers, ticket, Deadline(self.app.limits.deadline_s))
        refuse_failed(transcript)
        self.audio_s = seconds(transcript.duration)
        self.app.meters.audio_s.inc(self.audio_s)
        return transcript


@asynccontextmanager
async def while_there(request: Request) -> AsyncIterator[None]:
    """The body is given up when the caller goes away; its own body was read to the end. Raises `ClientDisconnect`."""
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        watching.cancel()


def request_context(request: Request) -> Context:
    context: Any = request.scope["murmur"]
    assert isinstance(context, Context)
    return context
