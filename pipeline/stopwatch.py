"""Where the time of a decode task goes: seconds of this process by stage, and what of them each Unit took.

    with spending("vad"): ...            where the work is done, however deep
    for unit, spent in clocked(units):   where Units come out

For display only: nothing is decided by these figures, and no public table holds them. One decode task runs in a
process at a time; elsewhere (an endpoint, a notebook) the seconds add up and nobody asks for them. Knows no stage.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
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
