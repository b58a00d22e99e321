"""How far a run is: counted from the ledger, told in time left, and a line of the log for what fails."""

from __future__ import annotations

import io
import logging
from collections import Counter
from pathlib import Path

import pytest
from commits import begin, failed, ok, put, unreadable
from rich.console import Console

from pipeline import progress as module
from pipeline import stopwatch
from pipeline.output import LEDGER, Output
from pipeline.progress import News, Pace, Standing, Step, duration, progress
from pipeline.stopwatch import Rate
from pipeline.store import Store


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return begin(Store.at(str(tmp_path / "out")))


def test_progress_counts_what_ended_since_the_run_began(output: Output) -> None:
    put(output.store, ok("before"), ok("begun", 0, last=False))
    standing = Standing(output, total=4, round=0)
    assert (standing.total, standing.look()) == (4, Step(0, 0, 0.0))
    put(output.store, ok("new", 0, last=False))
    assert standing.look() == Step(0, 0, 10.0)
    put(output.store, ok("begun", 1), failed("bad"))
    assert standing.look() == Step(2, 1, 30.0)
    put(output.store, ok("new", 1))
    put(output.store, ok("new", 1))  # twice: Ray ran it again
    assert standing.look() == Step(3, 1, 40.0)


def test_progress_of_a_retry_waits_for_each_unit_that_failed(output: Output) -> None:
    put(output.store, failed("a", 0, last=False), ok("a", 1, last=False), failed("a", 2), failed("b"))
    standing = Standing(output, total=2, round=1)
    assert standing.look() == Step(0, 0, 0.0)
    put(output.store, ok("a", 0, last=False), round=1)
    assert standing.look() == Step(0, 0, 10.0)
    put(output.store, failed("b"), round=1)  # no better than before, but done
    assert standing.look() == Step(1, 1, 20.0)
    put(output.store, ok("a", 2), round=1)
    assert standing.look() == Step(2, 1, 30.0)


@pytest.fixture
def quiet() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def test_what_ended_is_told_once_and_each_failure_is_a_line(
    output: Output, quiet: Console, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOG_EVERY_S", 0.01)
    put(output.store, unreadable("before"))
    told: list[News] = []
    with caplog.at_level(logging.INFO, logger="pipeline"), progress(Standing(output, 4, 0), quiet, tell=told.append):
        put(output.store, ok("a"), failed("b", 0, last=False, kind="non_finite"), failed("b", 1), unreadable("c"))
    put(output.store, ok("d"))  # after: not its own
    assert (sum(news.ok for news in told), sum(news.failed for news in told)) == (1, 2)
    failures = sum((news.failures for news in told), Counter())
    assert failures == {("non_finite", "engine"): 1, ("damaged_audio", "decode"): 1}
    warned = [record for record in caplog.records if record.levelname == "WARNING"]
    assert [(record.__dict__["recording"], record.getMessage()) for record in warned] == [
        ("b", "failed: non_finite in engine, 1 attempt"),
        ("c", "failed: damaged_audio in decode, 2 attempts"),
    ]
    last = [record.getMessage() for record in caplog.records if record.levelname == "INFO"][-1]
    assert last.startswith("3 of 4 recordings, 30.0 s of audio, 2 failed, RTFx ")


def test_a_retry_that_fails_again_is_told_again(
    output: Output, quiet: Console, caplog: pytest.LogCaptureFixture
) -> None:
    put(output.store, unreadable("a"), unreadable("b"))
    told: list[News] = []
    with progress(Standing(output, 2, round=1), quiet, tell=told.append):
        put(output.store, unreadable("a"), ok("b"), round=1)
    assert [getattr(record, "recording", "") for record in caplog.records if record.levelname == "WARNING"] == ["a"]
    assert (sum(news.ok for news in told), sum(news.failed for news in told)) == (1, 1)


def test_a_bar_on_a_terminal(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.01)
    terminal = Console(file=io.StringIO(), force_terminal=True, width=160)
    with progress(Standing(output, 2, 0), terminal, to_do_s=20.0):
        put(output.store, ok("a"), failed("b"))
    assert isinstance(terminal.file, io.StringIO)
    shown = terminal.file.getvalue()
    assert "2/2" in shown
    assert "1 failed" in shown
    assert "RTFx" in shown
    assert "0 s left" in shown


def test_a_store_that_does_not_answer_is_only_said(
    output: Output, quiet: Console, caplog: pytest.LogCaptureFixture
) -> None:
    with progress(Standing(output, 1, 0), quiet):
        folder = Path(output.store.uri, LEDGER)
        folder.symlink_to(folder)  # whoever lists it goes in circles
    assert "progress: " in caplog.text


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_the_speed_of_this_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    rate = Rate()
    assert (rate.now(), rate.overall()) == (0.0, 0.0)
    for _ in range(120):  # two minutes at 10
        clock.now += 1
        rate.add(10.0)
    assert (rate.now(), rate.overall()) == (10.0, 10.0)
    for _ in range(60):  # one at 2
        clock.now += 1
        rate.add(2.0)
    assert rate.now() == 2.0
    assert rate.overall() == pytest.approx(1320 / 180)
    clock.now += 600  # it hangs
    assert rate.now() == 0.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (89, "89 s"),
        (90, "2 min"),
        (5000, "83 min"),
        (5400, "1 h 30 min"),
        (12_345, "3 h 26 min"),
        (200_000, "2 d 8 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_pace_in_words() -> None:
    assert str(Pace(12.34, 10.0, 3000.0)) == "RTFx 12.3 (10.0 overall), 50 min left"
    assert str(Pace(0.0, 0.0, None)) == "RTFx 0.0 (0.0 overall), time left unknown"


def test_nothing_is_left_where_all_has_ended(
    output: Output, quiet: Console, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an unknown time, where all failed, nor what file sizes promised."""
    monkeypatch.setattr(module, "LOG_EVERY_S", 0.01)
    with caplog.at_level(logging.INFO, logger="pipeline"), progress(Standing(output, 1, 0), quiet, to_do_s=100.0):
        put(output.store, unreadable("a"))
    assert caplog.messages[-1].endswith("1 failed, RTFx 0.0 (0.0 overall), 0 s left")
