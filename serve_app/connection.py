"""One connection, as uvicorn's h11 protocol has it, and what that lets a client do without an end.

- The head of a request may have `HEAD_BYTES` and take `HEAD_S`, from the first moment on and after every answer: half a
  head, or nothing, would otherwise be waited for as long as the client lives.
- Where the process has as many connections as it can bear, the one that was idle longest makes room for a new one.
- An answer that is read slower than `UNREAD_BYTES` in `UNREAD_S` is given up, with what is kept for it.
- Bytes that are all line ends, as chunks of one byte are, cost a thousand times what they weigh: such a client is
  listened to half of the time at most, a little at once, so that the others are answered meanwhile.
- What is no HTTP is told so in JSON.
- A request with a body that is refused for its head (`Turnstile`) is answered while the head is read, and what comes of
  the body is thrown away as it is. Where 200 are refused at once on two cores all of them wait for what each costs, and
  a task, three messages and h11's checks of them were half of it.

Knows nothing of what is asked or answered.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import h11
import numpy as np
from starlette.datastructures import Headers
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve_app.errors import Answer, RefusedError, answer

HEAD_S, HEAD_BYTES = 30.0, 32 << 10
UNREAD_S, UNREAD_BYTES = 60.0, 64 << 10
MANY_LINES, SLICE = 1000, 8 << 10  # line ends in what is read at once (256 KB), and bytes that are then taken at once
LINGER_S, LINGER_BYTES = 2.0, 16 << 20  # for what still comes of a body whose answer is already sent
MOST = 10_000
_DESCRIPTORS = 4  # that one connection may need: itself, its upload, a decoder's pipes


def most_connections() -> int:
    """At once, in this process."""
    return min(MOST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _DESCRIPTORS)


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that needs no body. `ended` is called when the connection is done with it, with the number of bytes
    that came of the body nevertheless."""

    answer: Answer
    headers: dict[str, str]
    ended: Callable[[int], None]


Turnstile = Callable[[str, str, Headers], Refusal | None]  # a request's method, path and headers: None lets it pass


def connections(turnstile: Turnstile) -> type[Connection]:
    """The connections of a server that asks `turnstile` first."""
    return type("Connection", (Connection,), {"turnstile": staticmethod(turnstile)})


class Connection(H11Protocol):
    """uvicorn's, with an end to everything."""

    turnstile: Turnstile

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.conn = _Requests(self._turned_away)
        self._away: _Away | None = None  # who asked here was turned away
        self._since = time.monotonic()  # it was last idle
        self._head: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._later: asyncio.TimerHandle | None = None
        self._held = b""  # read, and not looked at yet
        self._await_head()
        if len(self.connections) > most_connections():
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._unread, self._later):
            if timer is not None:
                timer.cancel()
        if self._away is not None:
            self._away.end()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn leaves it where the connection broke

    def data_received(self, data: bytes) -> None:
        if self._away is not None:
            if self._away.take(len(data)):
                self.transport.close()
        elif self._later is not None or _has_many_lines(data):
            self._held += data
            self.transport.pause_reading()
            if self._later is None:
                self._take_some()
        else:
            self._take(data)

    def shutdown(self) -> None:
        if self._away is not None:
            self.transport.close()
        else:
            super().shutdown()

    def on_response_complete(self) -> None:
        self._since = time.monotonic()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "not a valid HTTP request")

    @property
    def is_idle(self) -> bool:
        """Nothing is being answered here."""
        return self.cycle is None or self.cycle.response_complete

    def _turned_away(self, request: h11.Request) -> bool:
        """Whether this request, the length of whose body is told, was answered without it."""
        headers = Headers(raw=list(request.headers))
        length = headers.get("content-length", "0")
        if request.method != b"POST" or length == "0" or "transfer-encoding" in headers:
            return False
        path = unquote(request.target.partition(b"?")[0].decode("ascii"))
        refusal = self.turnstile("POST", path, headers)
        if refusal is None:
            return False
        dated = {name.decode(): value.decode() for name, value in self.server_state.default_headers}
        self.transport.write(refusal.answer.to_wire({**dated, **refusal.headers}))
        close = self.loop.call_later(LINGER_S, self.transport.close)
        self._away = _Away(refusal, min(int(length), LINGER_BYTES), close)
        if self._away.take(len(self.conn.trailing_data[0])):
            self.transport.close()
        return True

    def _take(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def _take_some(self) -> None:
        """A slice of what is held, and the next after as long as this one took."""
        self._later = None
        if self.transport.is_closing():
            return
        data, self._held = self._held[:SLICE], self._held[SLICE:]
        began = time.monotonic()
        self._take(data)
        if self._held:
            self.transport.pause_reading()  # the application, which wants more, may have resumed it
            self._later = self.loop.call_later(time.monotonic() - began, self._take_some)
        elif not self.flow.read_paused:
            self.transport.resume_reading()

    def _await_head(self) -> None:
        """Whether a head is awaited, or begun and not there yet: then there is an end to it."""
        awaited = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        if awaited and self._head is None:
            self._head = self.loop.call_later(HEAD_S, self._no_head)
        elif not awaited and self._head is not None:
            self._head.cancel()
            self._head = None

    def _no_head(self) -> None:
        if self.conn.trailing_data[0]:
            self._refuse(408, f"the head of the request did not come within {HEAD_S:.0f} s")
        else:
            self.transport.close()

    def _make_room(self) -> None:
        idle = [one for one in self.connections if isinstance(one, Connection) and one.is_idle and one is not self]
        if idle:
            min(idle, key=lambda one: one._since).transport.abort()
        else:
            self._refuse(503, "busy: too many connections", {"Retry-After": "1"})

    def _watch_reader(self) -> None:
        before = self.transport.get_write_buffer_size()

        def look() -> None:
            if before - self.transport.get_write_buffer_size() < UNREAD_BYTES:
                self.transport.abort()
            else:
                self._watch_reader()

        self._unread = self.loop.call_later(UNREAD_S, look)

    def _refuse(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        """An answer that is no application's; where one has begun, the end of the connection has to say it."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            said = answer(RefusedError(status, message), openai=False)
            self.transport.write(said.to_wire({"X-Content-Type-Options": "nosniff", **(headers or {})}))
        self.transport.close()


class _Requests(h11.Connection):
    """h11's server side, which keeps to itself what `turned_away` has answered."""

    def __init__(self, turned_away: Callable[[h11.Request], bool]) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
        self._turned_away = turned_away

    def next_event(self) -> Any:
        event = super().next_event()
        return h11.NEED_DATA if isinstance(event, h11.Request) and self._turned_away(event) else event


class _Away:
    """What is left of a connection whose request was turned away: bytes to throw away, and a moment to do it in."""

    def __init__(self, refusal: Refusal, awaited: int, timer: asyncio.TimerHandle) -> None:
        self._refusal, self._awaited, self._timer = refusal, awaited, timer
        self._n_read = 0

    def take(self, n_bytes: int) -> bool:
        """Whether there is nothing to wait for any more."""
        self._n_read += n_bytes
        return self._n_read >= self._awaited

    def end(self) -> None:
        self._timer.cancel()
        self._refusal.ended(self._n_read)


def _has_many_lines(data: bytes) -> bool:
    """Whether it holds more than MANY_LINES line ends.

    To count them in 100 KB of audio took 0.13 ms, a third of what a refusal costs. Line feeds alone are counted in a
    tenth of that, and audio has too few of them.
    """
    n_feeds = np.count_nonzero(np.frombuffer(data, np.uint8) == ord("\n"))
    return bool(n_feeds > MANY_LINES) and data.count(b"\r\n") > MANY_LINES
