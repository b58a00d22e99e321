"""What a request may take, and who is let in: windows, bytes, seconds. Nothing is waited for before it was admitted.

The unit is the encoder window: a request cut into windows of 1 s costs thirty times its audio in windows of 30 s. Knows
neither HTTP nor an engine; an error here becomes a status in `errors.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass

from pipeline.config import LimitsConfig
from pipeline.errors import MurmurError
from pipeline.stopwatch import Rate
from pipeline.types import SAMPLE_RATE, DecodeOptions, Unit

READ_S = 30.0  # that any body may take to come, and
READ_BYTES_PER_S = 16_384  # a second more for as many bytes: slower clients hold a connection for nothing
IN_FLIGHT_PER_LANE, QUEUED_PER_LANE = 2, 8
LONGEST_PAUSE_S = 60  # that anybody is told to stay away for


class BusyError(MurmurError):
    """Too much is being done already; `retry_after_s` is when there may be room."""

    kind = "busy"

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooLargeError(MurmurError):
    kind = "too_large"


class TooSlowError(MurmurError):
    kind = "too_slow"


class DeadlineError(MurmurError):
    kind = "deadline"


class Gate:
    """The windows of all requests: those in the engines, those decoded and waiting; and requests without any yet.

    A request that was admitted is not refused later: it is one window until its audio is decoded, and then as many as
    its Units have. Those that wait go on in the order in which they came.
    """

    def __init__(self, limits: LimitsConfig, lanes: int) -> None:
        self._limits = limits
        self.in_flight = self.queued = 1
        self.size(lanes)
        self.running = 0  # windows in the engines
        self.waiting = 0  # windows of Units that wait to go in
        self.requests = 0  # admitted, not ended
        self._unknown = 0  # of these, without a Unit at the moment: one window each
        self._queue = asyncio.Lock()  # fair: who came first goes in first, also with much
        self._changed = asyncio.Condition()
        self._done = Rate()

    def size(self, lanes: int) -> None:
        """Where no number is set: twice as many windows in the engines as they have lanes, four times that waiting."""
        self.in_flight = self._limits.in_flight_windows or IN_FLIGHT_PER_LANE * lanes
        queued = self._limits.queued_windows
        self.queued = QUEUED_PER_LANE * lanes if queued is None else queued

    @property
    def outstanding(self) -> int:
        return self.running + self.waiting + self._unknown

    def refuse_if_full(self) -> None:
        """Raises `BusyError`. Asked before a body is read, too: who is refused anyway need not send it."""
        if self.outstanding >= self.in_flight + self.queued:
            raise BusyError(
                f"busy: {self.outstanding} windows are being transcribed or wait for it, and no more are taken",
                self.pause_s(),
            )

    @contextmanager
    def admitted(self, *, waits: bool = False) -> Iterator[Ticket]:
        """A request, for the body of the statement. `waits`: one whose answer nobody waits for is never refused."""
        if not waits:
            self.refuse_if_full()
        ticket = Ticket(self)
        self.requests += 1
        self._unknown += 1
        try:
            yield ticket
        finally:
            self.requests -= 1
            self._unknown -= not ticket.windows

    def pause_s(self) -> int:
        """When there may be room: what is ahead, at the rate of the last minute."""
        rate = self._done.now()
        ahead = self.outstanding - self.in_flight - self.queued + 1
        return max(1, min(LONGEST_PAUSE_S, round(ahead / rate) if rate else 1))

    @asynccontextmanager
    async def _inside(self, ticket: Ticket, windows: int) -> AsyncIterator[None]:
        self._unknown -= not ticket.windows
        ticket.windows += windows
        self.waiting += windows
        try:
            async with self._queue, self._changed:
                await self._changed.wait_for(lambda: self.running < self.in_flight)
                self.waiting -= windows
                self.running += windows
        except BaseException:
            self.waiting -= windows
            self._left(ticket, windows)
            raise
        try:
            yield
            self._done.add(windows)
        finally:
            self.running -= windows
            self._left(ticket, windows)
            await asyncio.shield(self._tell())

    def _left(self, ticket: Ticket, windows: int) -> None:
        ticket.windows -= windows
        self._unknown += not ticket.windows

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


@dataclass(slots=True)
class Ticket:
    """An admitted request."""

    gate: Gate
    windows: int = 0  # of its Units in the engine or waiting

    def inside(self, windows: int) -> AbstractAsyncContextManager[None]:
        """Async context: waits for room, and within the body so many windows are in the engine."""
        return self.gate._inside(self, windows)


class Deadline:
    """One for a request: `seconds`, and as much more as the audio lasts that was decoded so far."""

    def __init__(self, seconds: float) -> None:
        self._began, self._seconds, self._audio_s = time.monotonic(), seconds, 0.0
        self._timeout: asyncio.Timeout | None = None

    @property
    def _left_s(self) -> float:
        return self._began + self._seconds + self._audio_s - time.monotonic()

    def decoded(self, audio_s: float) -> None:
        self._audio_s += audio_s
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time() + self._left_s)

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """The body is given up when the time is over. Raises `DeadlineError`."""
        try:
            async with asyncio.timeout(max(0.0, self._left_s)) as timeout:
                self._timeout = timeout
                yield
        except TimeoutError:
            if not timeout.expired():
                raise
            limit = f"{self._seconds:.0f} s and the audio's own length (limits.deadline_s)"
            raise DeadlineError(f"not done within {limit}") from None


def n_windows(unit: Unit, options: DecodeOptions) -> int:
    """Encoder windows that a Unit takes, about."""
    return max(1, -(-unit.n_samples // (options.chunk_length_s * SAMPLE_RATE)))
