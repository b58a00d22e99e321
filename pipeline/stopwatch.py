"""Where time goes: seconds of a decode task by stage, and what of them each Unit took; the speed of this minute.

    with spending("vad"): ...            where the work is done, however deep
    for unit, spent in clocked(units):   where Units come out

For display only: nothing is decided by these figures, and no public table holds them. One decode task runs in a
process at a time; elsewhere (an endpoint, a notebook) the seconds add up and nobody asks for them.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from pipeline.types import Spent

_T = TypeVar("_T")

_lock = threading.Lock()
_spent: defaultdict[str, float] = defaultdict(float)  # stage → seconds since the last `_take`


@contextmanager
def spending(stage: str) -> Iterator[None]:
    """Adds the body's wall time to what this process spends on `stage`; also a decorator."""
    began = time.monotonic()
    try:
        yield
    finally:
        with _lock:
            _spent[stage] += time.monotonic() - began


def clocked(items: Iterable[_T]) -> Iterator[tuple[_T, Spent]]:
    """Each item with what was spent on it: the time until it was there, less what waited for the source or the VAD."""
    _take()
    following = iter(items)
    while True:
        began = time.monotonic()
        try:
            item = next(following)
        except StopIteration:
            return
        total, parts = time.monotonic() - began, _take()
        source_s, vad_s = parts.get("source", 0.0), parts.get("vad", 0.0)
        yield item, Spent(source_s=source_s, decode_s=max(0.0, total - source_s - vad_s), vad_s=vad_s)


def _take() -> dict[str, float]:
    with _lock:
        parts = dict(_spent)
        _spent.clear()
    return parts


class Rate:
    """Seconds of audio for each second of wall clock over the last minute: RTFx as it is now, not since the start."""

    def __init__(self, window_s: float = 60.0) -> None:
        self._window_s = window_s
        self._began = time.monotonic()
        self._total = 0.0
        self._seen: deque[tuple[float, float]] = deque([(self._began, 0.0)])  # when, and all audio by then

    def add(self, audio_s: float) -> None:
        """So much more has come out."""
        self._total += audio_s
        self._seen.append((time.monotonic(), self._total))
        self._forget()

    def now(self) -> float:
        """Over the last minute, or since the beginning where that is less ago; 0 before anything came out."""
        self._forget()
        since, before = self._seen[0]
        elapsed = time.monotonic() - since
        return (self._total - before) / elapsed if elapsed > 0 else 0.0

    def overall(self) -> float:
        elapsed = time.monotonic() - self._began
        return self._total / elapsed if elapsed > 0 else 0.0

    def _forget(self) -> None:
        """The first entry kept is the last one from before the window."""
        horizon = time.monotonic() - self._window_s
        while len(self._seen) > 1 and self._seen[1][0] <= horizon:
            self._seen.popleft()
