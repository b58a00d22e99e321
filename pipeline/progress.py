"""How far a run is, while it runs: a bar on a terminal, elsewhere a log line a minute; a line for what fails.

Everything is read from the ledger, so what is shown is committed and survives a crash. A ledger that takes long to
read is read seldom: looking costs at most a twentieth of the time. Changes nothing and decides nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pipeline.entries import begins
from pipeline.errors import MurmurError
from pipeline.ledger import Ledger
from pipeline.output import Output
from pipeline.report_page import length
from pipeline.stopwatch import Rate
from pipeline.types import seconds

log = logging.getLogger(__name__)

LOG_EVERY_S = 60.0
LOOK_EVERY_S = 2.0
_SHOWN_AT_ONCE = 1_024  # recordings that have failed, as objects
_PATIENCE = 20  # a look that took so long is not taken again for so many times that

Failed = dict[str, Any]  # recording_id, kind, stage, attempts


@dataclass(frozen=True, slots=True)
class Step:
    """How far a run is: recordings ended, those of them that failed, audio committed since it began."""

    done: int
    failed: int
    audio_s: float


class Standing:
    """How far a run is that is to do `total` recordings in `round`, as the ledger says.

    It has the output's lease: what has ended since it began, it has ended itself, and no list of ids is needed.
    """

    def __init__(self, output: Output, total: int, round: int) -> None:
        self.total = total
        self._ledger = Ledger.read(output.store, output.run.n_shards)
        self.round = round
        self._before = self._step()

    @property
    def units(self) -> pa.Table:
        """The winning Units as of the last look."""
        return self._ledger.winners

    def look(self) -> Step:
        self._ledger.refresh()
        now, before = self._step(), self._before
        return Step(now.done - before.done, now.failed - before.failed, now.audio_s - before.audio_s)

    def _step(self) -> Step:
        """All that has ended by now, but for what is still to be retried."""
        rows = self._ledger.recordings()
        ended = rows.filter(pc.not_equal(rows["status"], "partial"))
        ended = ended.filter(pc.invert(pc.is_in(ended["recording_id"], self._waiting())))
        failed = pc.sum(pc.equal(ended["status"], "failed")).as_py() or 0
        return Step(len(ended), failed, self._audio_s())

    def _waiting(self) -> pa.Array:
        """Recordings with a Unit that failed in an earlier round and was not redone yet."""
        units = self._ledger.winners
        old = pc.and_(pc.invert(units["ok"]), pc.less(units["round"], self.round))
        return units.filter(old)["recording_id"].combine_chunks()

    def _audio_s(self) -> float:
        units = self._ledger.winners
        mine = pc.greater_equal(units["round"], self.round)
        return seconds(pc.sum(units.filter(mine)["n_samples"]).as_py() or 0)


@dataclass(frozen=True, slots=True)
class News:
    """What has ended since the look before."""

    ok: int
    failed: int
    failures: Counter[tuple[str, str | None]]  # recordings by the kind and the stage of what failed first


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast, and how long still."""

    rtfx: float  # of the last minute, all devices together
    overall: float  # since the run began
    left_s: float | None  # None: nothing tells yet

    def __str__(self) -> str:
        left = "time left unknown" if self.left_s is None else f"{duration(self.left_s)} left"
        return f"RTFx {self.rtfx:.1f} ({self.overall:.1f} overall), {left}"


@contextmanager
def progress(
    standing: Standing,
    console: Console,
    *,
    to_do_s: float | None = None,
    tell: Callable[[News], None] | None = None,
) -> Iterator[None]:
    """Shows how far the run is while the body runs, logs each recording that fails, and `tell`s what has ended.

    `to_do_s`: seconds of audio to do, where the lengths are known: then the time left goes by them, else by numbers.
    """
    ended = threading.Event()
    showing = _bar(standing.total, console) if console.is_terminal else _log_line(standing.total)
    pause_s = LOOK_EVERY_S if console.is_terminal else LOG_EVERY_S
    with showing as show:
        watch = _Watch(standing, show, to_do_s, tell)
        thread = threading.Thread(target=watch.until, args=(ended, pause_s), name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            watch.look()  # what ended last is told too


class _Watch:
    """Looks at the ledger now and then, and says what is new."""

    def __init__(
        self,
        standing: Standing,
        show: Callable[[Step, Pace], None],
        to_do_s: float | None,
        tell: Callable[[News], None] | None,
    ) -> None:
        self._standing, self._show, self._to_do_s, self._tell = standing, show, to_do_s, tell
        self._before = Step(0, 0, 0.0)
        self._rate = Rate()
        self._failures = Failures(standing.units, standing.round)

    def until(self, ended: threading.Event, pause_s: float) -> None:
        while not ended.wait(pause_s):
            began = time.monotonic()
            self.look()
            pause_s = max(pause_s, _PATIENCE * (time.monotonic() - began))

    def look(self) -> None:
        try:
            now = self._standing.look()
        except MurmurError as error:  # the store does not answer now; if that lasts, the run itself will say so
            log.warning("progress: %s", error)
            return
        self._rate.add(now.audio_s - self._before.audio_s)
        failures: Counter[tuple[str, str | None]] = Counter()
        for failed in self._failures.new(self._standing.units):
            log_failure(failed)
            failures[failed["kind"], failed["stage"]] += 1
        if self._tell is not None:
            failed_now = now.failed - self._before.failed
            self._tell(News(now.done - self._before.done - failed_now, failed_now, failures))
        self._before = now
        self._show(now, Pace(self._rate.now(), self._rate.overall(), self._left_s(now)))

    def _left_s(self, now: Step) -> float | None:
        rate = self._rate.overall()
        if now.done >= self._standing.total:  # lengths by file sizes may say otherwise
            return 0.0
        if self._to_do_s is not None and rate > 0:
            return max(0.0, self._to_do_s - now.audio_s) / rate
        if now.done and rate > 0:
            return (now.audio_s / rate) / now.done * (self._standing.total - now.done)
        return None


class Failures:
    """Which recordings have failed in this run; each is named once, with the first of its Units that did."""

    def __init__(self, units: pa.Table, round: int) -> None:
        self._round = round
        self._told = self._failed(units)["recording_id"].combine_chunks()  # by a run before

    def new(self, units: pa.Table) -> Iterator[Failed]:
        """Those among the winning `units` that were not named yet; a few as objects at a time, for it may be all."""
        failed = self._failed(units)
        fresh = failed.filter(pc.invert(pc.is_in(failed["recording_id"], self._told)))
        first = fresh.filter(pa.array(begins(fresh, "recording_id")))  # winners are sorted
        self._told = pa.concat_arrays([self._told, first["recording_id"].combine_chunks()])
        shown = first.select(["recording_id", "kind", "stage", "attempts"])
        for batch in shown.to_batches(max_chunksize=_SHOWN_AT_ONCE):
            yield from batch.to_pylist()

    def _failed(self, units: pa.Table) -> pa.Table:
        return units.filter(pc.and_(pc.invert(units["ok"]), pc.greater_equal(units["round"], self._round)))


def log_failure(failed: Failed) -> None:
    """One line of the log: which recording, what, where, after how many attempts; why, the tables say."""
    stage, attempts = failed["stage"] or "?", failed["attempts"] or 1
    log.warning(
        "failed: %s in %s, %d attempt%s",
        *(failed["kind"], stage, attempts, "" if attempts == 1 else "s"),
        extra={"recording": failed["recording_id"], "kind": failed["kind"], "stage": stage, "attempts": attempts},
    )


@contextmanager
def _bar(total: int, console: Console) -> Iterator[Callable[[Step, Pace], None]]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[extra]}"),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("recordings", total=total, extra="")

        def show(now: Step, pace: Pace) -> None:
            said = f"{length(now.audio_s)}, {pace}" if now.audio_s else "nothing has ended yet"
            extra = said + (f", {now.failed} failed" if now.failed else "")
            bar.update(task, completed=now.done, extra=extra)

        yield show


@contextmanager
def _log_line(total: int) -> Iterator[Callable[[Step, Pace], None]]:
    def show(now: Step, pace: Pace) -> None:
        log.info(
            "%d of %d recordings, %s of audio, %d failed, %s", now.done, total, length(now.audio_s), now.failed, pace
        )

    yield show


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 20 min, 2 d 5 h."""
    minutes, hours_ = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    if hours_ < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours_ // 24} d {hours_ % 24} h"
