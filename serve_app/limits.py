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

READ_S = 30.0  # that any body may take to come, and
READ_BYTES_PER_S = 16_384  # a second more for as many bytes: slower clients hold a connection for nothing
IN_FLIGHT_PER_LANE, QUEUED_PER_LANE = 2, 8
FRESH_S = 1.0
SHARE = 8  # a request takes so small a part of the room at most
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

    A request that was admitted is not refused later. It counts as many windows as its Units have that were decoded and
    are not done, one at least, and `1 / SHARE` of all there is room for at most: nobody shuts the others out, be it
    with four hours of audio cut into seconds. Likewise in the engines: everybody's first Unit goes in while there is
    room for `SHARE` such, in order of arrival, since the lanes are shared fairly over what is in them; a request's next
    Unit, which only keeps the lanes filled, where the windows in the engines are few. A clip of ten seconds waited 18 s
    for the two Units of a long one when windows alone were counted.
    """

    def __init__(self, limits: LimitsConfig, lanes: int) -> None:
        self._limits = limits
        self.in_flight = self.queued = 1
        self.size(lanes)
        self.running = 0  # windows in the engines
        self.waiting = 0  # windows of Units that wait to go in
        self._tickets: set[Ticket] = set()  # of requests that were admitted and have not ended
        self._arrivals: dict[object, float] = {}  # requests whose body is being read: when they came
        self._firsts = 0  # of `running`, what requests' first Units count
        self._lines = asyncio.Lock(), asyncio.Lock()  # for first Units, and for others; fair: who came first goes first
        self._changed = asyncio.Condition()
        self._done = Rate()

    def size(self, lanes: int) -> None:
        """Where no number is set: twice as many windows in the engines as they have lanes, four times that waiting."""
        self.in_flight = self._limits.in_flight_windows or IN_FLIGHT_PER_LANE * lanes
        queued = self._limits.queued_windows
        self.queued = QUEUED_PER_LANE * lanes if queued is None else queued

    @property
    def requests(self) -> int:
        return len(self._tickets)

    @property
    def outstanding(self) -> int:
        """Windows of all requests, as they count for admission."""
        most = _part(self.in_flight + self.queued)
        return sum(min(max(1, ticket.windows), most) for ticket in self._tickets)

    def refuse_if_full(self) -> None:
        """Raises `BusyError`."""
        outstanding = self.outstanding
        if outstanding >= self.in_flight + self.queued:
            raise BusyError(
                f"busy: {outstanding} windows are being transcribed or wait for it, and no more are taken",
                self.pause_s(),
            )

    def refuse_arrival(self) -> None:
        """Raises `BusyError` before a body is read, which who is refused anyway need not send.

        Refused are requests where others are refused, and where twice as many as there is room for have begun in the
        last second. Who takes longer over a body does not count: slow clients may not keep the others out.
        """
        self.refuse_if_full()
        now = time.monotonic()
        fresh = sum(now - began < FRESH_S for began in self._arrivals.values())
        if self.outstanding + fresh >= 2 * (self.in_flight + self.queued):
            raise BusyError(f"busy: {fresh} requests are arriving, and there is not room for so many", self.pause_s())

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """A request whose body is read, for the body of the statement. Raises `BusyError`."""
        self.refuse_arrival()
        key = object()
        self._arrivals[key] = time.monotonic()
        try:
            yield
        finally:
            del self._arrivals[key]

    @contextmanager
    def admitted(self, *, waits: bool = False) -> Iterator[Ticket]:
        """A request, for the body of the statement. `waits`: one whose answer nobody waits for is never refused."""
        if not waits:
            self.refuse_if_full()
        ticket = Ticket(self)
        self._tickets.add(ticket)
        try:
            yield ticket
        finally:
            self._tickets.remove(ticket)

    def pause_s(self) -> int:
        """When there may be room: what is ahead, at the rate of the last minute."""
        rate = self._done.now()
        ahead = self.outstanding - self.in_flight - self.queued + 1
        return max(1, min(LONGEST_PAUSE_S, round(ahead / rate) if rate else 1))

    @asynccontextmanager
    async def _inside(self, ticket: Ticket, windows: int) -> AsyncIterator[None]:
        counted = 0 if ticket.windows else min(windows, _part(self.in_flight))
        ticket.windows += windows
        try:
            await self._enter(windows, counted)
            try:
                yield
                self._done.add(windows)
            finally:
                self.running -= windows
                self._firsts -= counted
        finally:
            ticket.windows -= windows
            await asyncio.shield(self._tell())

    async def _enter(self, windows: int, counted: int) -> None:
        """Wait for room. `counted`: what a first Unit counts; 0: it is none."""
        self.waiting += windows
        try:
            async with self._lines[not counted], self._changed:
                await self._changed.wait_for(lambda: (self._firsts if counted else self.running) < self.in_flight)
        finally:
            self.waiting -= windows
        self.running += windows
        self._firsts += counted

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _part(of: int) -> int:
    return max(1, of // SHARE)


@dataclass(slots=True, eq=False)
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
