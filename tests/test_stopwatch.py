"""Where the time of a decode task goes. The clock is ours: no test waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest

from pipeline import stopwatch
from pipeline.stopwatch import clocked, spending
from pipeline.types import Spent


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    return clock


def test_each_unit_has_what_was_spent_since_the_one_before(clock: Clock) -> None:
    @spending("source")
    def read(seconds: float) -> None:
        clock.now += seconds

    def units() -> Iterator[str]:
        read(2.0)
        read(1.0)
        with spending("vad"):
            clock.now += 0.5
        clock.now += 4.0
        yield "first"
        clock.now += 0.25
        yield "second"

    read(1000.0)  # before: somebody else's
    found = []
    for unit, spent in clocked(units()):
        found.append((unit, spent))
        clock.now += 50.0  # what is done with it is not its making
    assert found == [
        ("first", Spent(source_s=3.0, decode_s=4.0, vad_s=0.5)),
        ("second", Spent(source_s=0.0, decode_s=0.25, vad_s=0.0)),
    ]


def test_what_fails_was_spent_too(clock: Clock) -> None:
    def units() -> Iterator[int]:
        with suppress(OSError), spending("source"):
            clock.now += 1.0
            raise OSError
        yield 0

    assert [spent for _, spent in clocked(units())] == [Spent(source_s=1.0, decode_s=0.0, vad_s=0.0)]
