"""A request's audio to its Transcript: the three steps of `pipeline.transcribe`, beside those of all other requests.

    read_units (in a thread)  →  model.submit, two Units of a request at most  →  stitch

Segments are passed on as they are decided, in their order. `Model` is what a route knows of an engine: here, in this
process, or a deployment's replicas (`deployment.py`). Knows neither HTTP nor Ray.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline import channels, flags, logs
from pipeline.config import Config
from pipeline.engine import Engine, EngineInfo, EngineLoad, Heard
from pipeline.errors import EngineError, TooLongError
from pipeline.stitch import stitch
from pipeline.types import DecodeOptions, Recording, Segment, Transcript, Unit, UnitResult, samples, seconds
from pipeline.units import read_units
from pipeline.windows import n_windows
from serve_app.errors import RefusedError
from serve_app.limits import Deadline, Ticket

CANARY_S = 30.0  # an idle engine decodes a window this often
BRIEF_S = 30.0  # a request of no more audio has the engine's courtesy
HELD_UNITS = 2  # of one request, with their PCM, in this process or in the engine
OPEN_DECODERS = 32  # files being read at once; each has a decoder's process


@dataclass(frozen=True, slots=True)
class Standing:
    """What an engine is doing, and when it was last seen to work."""

    load: EngineLoad
    proven_s: float  # since it last ended a window

    def why_not(self, canary_s: float, engine_timeout_s: float) -> str | None:
        """Why it is not ready; None: it is."""
        if self.load.idle_s > engine_timeout_s:
            return f"the engine has stood still for {self.load.idle_s:.0f} s"
        if not self.load.busy and not self.load.queued and self.proven_s > max(4 * canary_s, 60.0):
            return f"the engine was last seen to work {self.proven_s:.0f} s ago"
        return None


class Model(Protocol):
    """A model that is served: its id, how its requests are decoded, and its engines."""

    id: str
    config: Config  # what a request does not say

    @property
    def info(self) -> EngineInfo:
        """Raises `NotReadyError` until an engine is there."""
        ...

    @property
    def lanes(self) -> int:
        """Of all its engines; 1 until that is known."""
        ...

    async def submit(
        self, unit: Unit, options: DecodeOptions, heard: Heard | None = None, brief: bool = False
    ) -> UnitResult:
        """One Unit, beside all others; giving up the await frees its lanes. `heard` is called in this loop.

        `brief` ones are given way to (`Engine.submit`).
        Raises `EngineError`, `ConfigError`, or `NotReadyError` where the engines are gone.
        """
        ...

    async def standing(self) -> Standing:
        """Raises where no engine answers."""
        ...


class LocalModel:
    """`Model` of an engine in this process, for whoever serves without Ray, and for tests."""

    def __init__(self, id: str, config: Config, engine: Engine) -> None:
        self.id, self.config, self._engine = id, config, engine
        self._proven_at = time.monotonic()

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def lanes(self) -> int:
        return self._engine.info.lanes

    async def submit(
        self, unit: Unit, options: DecodeOptions, heard: Heard | None = None, brief: bool = False
    ) -> UnitResult:
        loop = asyncio.get_running_loop()

        def tell(segments: Sequence[Segment]) -> None:
            if heard is not None:
                loop.call_soon_threadsafe(heard, segments)

        result = await self._engine.submit(unit, options, tell if heard is not None else None, brief)
        self._proven_at = time.monotonic()
        return result

    async def standing(self) -> Standing:
        if not self._engine.n_windows and time.monotonic() - self._proven_at > CANARY_S:
            await asyncio.to_thread(prove, self._engine)
            self._proven_at = time.monotonic()
        return Standing(self._engine.load(), time.monotonic() - self._proven_at)


def prove(engine: Engine) -> None:
    """Decode a second of noise: what is loaded works, and the dispatcher lives. Raises `EngineError`."""
    noise = np.random.default_rng(0).integers(-2000, 2000, samples(1.0)).astype(np.int16)
    engine.decode([noise], DecodeOptions(language="en", temperature_fallback=False, max_tokens=8))


@dataclass(frozen=True, slots=True)
class Job:
    """One request's audio, and how it is to be decoded."""

    id: str
    audio: Path
    model: Model
    options: DecodeOptions
    audio_s: int  # the most that is decoded
    heard: Heard | None = None


class Readers:
    """The threads that read and cut audio: as many as there are cores, whatever number of requests they read for."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "reader")
        self._open = asyncio.Semaphore(OPEN_DECODERS)
        flags.get_ready()  # or the first answer would hold up the loop for it

    @asynccontextmanager
    async def units(self, job: Job) -> AsyncIterator[AsyncIterator[Unit | UnitResult]]:
        """The Units of a request's audio, one read for each that is asked for."""
        loop = asyncio.get_running_loop()
        config = job.model.config.model_copy(update={"algorithm": job.options.algorithm, "max_audio_s": job.audio_s})
        async with self._open:
            items = read_units(Recording(id=job.id, uri=str(job.audio)), config)

            def next_item() -> Unit | UnitResult | None:
                with logs.about(job.id):
                    return next(items, None)

            last: list[Future[Unit | UnitResult | None]] = []  # the read that was begun last

            async def read() -> AsyncGenerator[Unit | UnitResult, None]:
                while True:
                    last[:] = [self._pool.submit(next_item)]
                    item = await asyncio.wrap_future(last[0])
                    if item is None:
                        return
                    yield item

            async def close() -> None:
                """A thread may still be at it where the request was given up: that is waited for, in no other one."""
                await reading.aclose()
                await asyncio.gather(*map(asyncio.wrap_future, last), return_exceptions=True)
                await loop.run_in_executor(self._pool, items.close)  # type: ignore[attr-defined]

            reading = read()
            try:
                yield reading
            finally:
                await asyncio.shield(asyncio.ensure_future(close()))

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


async def transcribe(job: Job, readers: Readers, ticket: Ticket, deadline: Deadline) -> Transcript:
    """The Transcript of a request's audio; what cannot be read makes a failed one.

    Raises `EngineError`, `ConfigError`, `NotReadyError`, `DeadlineError`.
    """
    results: list[UnitResult] = []
    running: deque[asyncio.Task[UnitResult]] = deque()
    in_order = InOrder(job.heard)
    async with deadline.kept(), readers.units(job) as units:
        try:
            async for item in units:
                if isinstance(item, UnitResult):
                    results.append(item)
                    continue
                deadline.decoded(seconds(item.n_samples))
                running.append(asyncio.create_task(_submitted(item, job, ticket, in_order)))
                while len(running) >= HELD_UNITS:  # the next one is read beside the one in the engine
                    results.append(await running.popleft())
                del item
            while running:
                results.append(await running.popleft())
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
    return stitch(results)


async def _submitted(unit: Unit, job: Job, ticket: Ticket, in_order: InOrder) -> UnitResult:
    with logs.about(job.id):
        parts = channels.split(unit)
        async with ticket.inside(len(parts) * n_windows(unit.n_samples, job.options)):
            # Of several channels segments are in order only when all are there.
            heard = in_order.of(unit.index) if job.heard is not None and len(parts) == 1 else None
            is_all = unit.is_last and unit.index == 0
            brief = is_all and seconds(unit.n_samples) <= BRIEF_S
            submitted = (job.model.submit(part, job.options, heard, brief) for part in parts)
            result = channels.merge(await asyncio.gather(*submitted))
        if result.failure is not None:
            raise EngineError(f"{result.failure.kind}: {result.failure.message}")
    in_order.ended(result)
    return result


@dataclass
class InOrder:
    """Passes segments on as they are decided, those of a Unit after all of the Units before it."""

    heard: Heard | None
    _turn: int = 0
    _held: dict[int, list[Segment]] = field(default_factory=dict)
    _told: dict[int, int] = field(default_factory=dict)
    _results: dict[int, UnitResult] = field(default_factory=dict)

    def of(self, index: int) -> Heard:
        def heard(segments: Sequence[Segment]) -> None:
            self._held.setdefault(index, []).extend(segments)
            self._pass_on()

        return heard

    def ended(self, result: UnitResult) -> None:
        self._results[result.index] = result
        self._pass_on()

    def _pass_on(self) -> None:
        if self.heard is None:
            return
        while True:
            result = self._results.get(self._turn)
            known = list(result.segments) if result is not None else self._held.get(self._turn, [])
            told = self._told.get(self._turn, 0)
            if known[told:]:
                self.heard(known[told:])
                self._told[self._turn] = len(known)
            if result is None:
                return
            for of in (self._held, self._told, self._results):
                of.pop(self._turn, None)
            self._turn += 1


async def next_told(
    queue: asyncio.Queue[Sequence[Segment]], deciding: asyncio.Future[Any], within_s: float | None = None
) -> Sequence[Segment]:
    """The next segments in the queue; none where they do not come `within_s`, or when all is decided."""
    waiting = asyncio.ensure_future(queue.get())
    try:
        await asyncio.wait({waiting, deciding}, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        return waiting.result() if waiting.done() else ()
    finally:
        waiting.cancel()


def refuse_failed(transcript: Transcript) -> None:
    """Raises what a failed Transcript is over HTTP, where no words of it are an answer.

    The message loses the name that the file has here.
    """
    failure = transcript.failure
    if failure is None:
        return
    message = failure.message.replace(f"{transcript.recording.uri}: ", "").replace("max_audio_s", "limits.audio_s")
    raise RefusedError(413 if failure.kind == TooLongError.kind else 400, f"audio: {message}", failure.kind)
