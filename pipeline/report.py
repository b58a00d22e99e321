"""What a run did, for a person at a terminal: a summary, a table of recordings, word error rates, progress.

Reads the public tables and the ledger; changes nothing. Figures come from what is committed, never from what was
sent off: a number shown here survives a crash.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pipeline import report_page
from pipeline.config import Config
from pipeline.errors import EXIT_FAILED, EXIT_OK, MurmurError
from pipeline.figures import STAGES, Figures
from pipeline.finalize import Success
from pipeline.ledger import Ledger
from pipeline.logs import one_line
from pipeline.output import Output
from pipeline.scoring import Score, word_score
from pipeline.types import seconds

log = logging.getLogger(__name__)

_LOG_EVERY_S = 60.0
_LOOK_EVERY_S = 2.0


@dataclass(frozen=True, slots=True)
class Work:
    """What one run did itself."""

    recordings: int
    audio_s: float  # committed
    wall_s: float  # from the first task to the last commit: loading the model included, starting Ray not
    pools: str  # "1 engine on 2 CPU each, ..."

    @property
    def rtfx(self) -> float:
        return self.audio_s / self.wall_s


@dataclass(frozen=True, slots=True)
class Summary:
    """The end of a run: its own work, and what lies in the output now."""

    counts: dict[str, int]  # inputs, ok, failed, skipped, missing, unlisted
    audio_s: float  # of all recordings in the tables
    work: Work | None  # None: nothing was to be done
    exit_code: int

    @classmethod
    def of(cls, success: Success, work: Work | None, exit_code: int) -> Summary:
        return cls(success.counts, success.audio_s, work, exit_code)

    def to_json(self) -> dict[str, Any]:
        work = asdict(self.work) | {"rtfx": round(self.work.rtfx, 2)} if self.work else None
        return {**self.counts, "audio_s": self.audio_s, "this_run": work}


def exit_code(counts: Mapping[str, int], config: Config) -> int:
    """0 while the failed recordings are within `max_failed_fraction` of the inputs and none is missing, else 3."""
    allowed = config.max_failed_fraction * counts["inputs"]
    return EXIT_OK if counts["failed"] <= allowed and not counts["missing"] else EXIT_FAILED


# ---- tables of a finished or running output


def recordings_table(output: Output, columns: Sequence[str] | None = None) -> pa.Table:
    """The public `recordings` of an output, as far as it was finalised; sorted by id within each file."""
    store = output.store
    tables = []
    for name in sorted(store.sizes("recordings")):
        with store.open(f"recordings/{name}") as file:
            tables.append(pq.ParquetFile(file).read(columns))
    if not tables:
        raise MurmurError(f"output {store} has no tables yet: run `murmur finalize {store}`")
    return pa.concat_tables(tables)


def show_summary(summary: Summary, console: Console) -> None:
    console.print(f"{counted(summary.counts)}; {hours(summary.audio_s)} of audio")
    work = summary.work
    if work is None:
        console.print("nothing was left to do")
    else:
        console.print(
            f"this run: {hours(work.audio_s)} of audio in {work.wall_s:.1f} s, RTFx {work.rtfx:.1f}"
            f" (wall clock from the first decode to the last commit; {work.pools})"
        )


def counted(counts: Mapping[str, int]) -> str:
    """`_SUCCESS`'s counts in words; what is zero and should be is left out."""
    rare = {"skipped": "skipped", "missing": "missing", "unlisted": "no longer listed"}
    parts = [f"{counts['ok']} ok", f"{counts['failed']} failed"]
    parts += [f"{counts[key]} {words}" for key, words in rare.items() if counts[key]]
    return f"{number_of(counts['inputs'])}: {', '.join(parts)}"


def number_of(recordings: int) -> str:
    return "1 recording" if recordings == 1 else f"{recordings} recordings"


def hours(audio_s: float) -> str:
    return f"{audio_s:.1f} s" if audio_s < 600 else f"{audio_s / 3600:.2f} h"


def show_recordings(output: Output, console: Console, limit: int = 50) -> None:
    """A row a recording: language, length, text, WER where there is a reference, and what went wrong."""
    rows = recordings_table(output).sort_by("recording_id").to_pylist()
    table = Table("recording", "lang", "seconds", "text", "WER", "status", box=None, pad_edge=False, expand=True)
    table.columns[3].ratio = 1
    for name in ("seconds", "WER"):
        next(c for c in table.columns if c.header == name).justify = "right"
    for column in table.columns:
        column.no_wrap = True
        column.overflow = "ellipsis"
    for row in rows[:limit]:
        table.add_row(
            Text(one_line(row["recording_id"])),
            row["language"] or "-",
            f"{row['duration_s']:.1f}",
            Text(row["text"] or "(no speech)" if row["status"] == "ok" else row["text"]),
            wer_of(row),
            _status(row),
        )
    console.print(table)
    if len(rows) > limit:
        console.print(f"... and {len(rows) - limit} more")


def _status(row: dict[str, Any]) -> Text:
    if row["status"] == "ok":
        return Text(", ".join(["ok", *row["flags"]]), style="green")
    return Text(f"{row['status']}: {row['error_kind']}", style="red")


def wer_of(row: dict[str, Any]) -> str:
    score = score_of(row)
    if score is None:
        return "-"
    return f"{100 * score.rate:.1f} %" if score.n_reference or score.errors else "-"


def score_of(row: dict[str, Any]) -> Score | None:
    """The word errors of a row of `recordings`; None without a reference or a transcript."""
    if row["reference"] is None or row["status"] != "ok":
        return None
    return word_score(row["reference"], row["text"], row["language"])


def failed_ids(output: Output) -> set[str]:
    return {row["recording_id"] for row in _failed(output)}


def show_failures(output: Output, console: Console, limit: int = 20) -> None:
    """What failed and why, a line a recording."""
    rows = _failed(output)
    for row in rows[:limit]:
        line = f"{row['recording_id']}: {row['error_kind']}: {row['error_message']}"
        console.print(one_line(line), style="red", markup=False, highlight=False)
    if len(rows) > limit:
        console.print(f"... and {len(rows) - limit} more: see `error_message` in {output.store}/recordings")


def _failed(output: Output) -> list[dict[str, Any]]:
    rows = recordings_table(output, ["recording_id", "status", "error_kind", "error_message"])
    failed: list[dict[str, Any]] = rows.filter(pc.equal(rows["status"], "failed")).sort_by("recording_id").to_pylist()
    return failed


# ---- a look at an output, also while a run goes on


def show_figures(found: Figures, console: Console) -> None:
    """What `murmur report` says at a terminal; the page says more."""
    counts = found.counts
    console.print(
        f"{counts['inputs']} recordings listed: {counts['ok']} ok, {counts['failed']} failed,"
        f" {counts['partial']} begun, {counts['waiting']} waiting"
    )
    console.print(
        f"{hours(found.audio['committed_s'] or 0.0)} of audio committed, model {found.model}", highlight=False
    )
    if counts["ok"] + counts["failed"]:
        console.print(report_page.coverage_line(found))
        console.print(report_page.fallback_line(found))
    for table in _figure_tables(found):
        if table.row_count:
            console.print()
            console.print(table)
    for row in found.failures:
        for one in row["examples"]:
            line = f"  {one['recording_id']}: {row['kind']}: {one['error_message']}"
            console.print(Text(one_line(line)), style="red", highlight=False)
    hint = "" if found.tables == "complete" else "; `murmur finalize` brings them up to date"
    console.print(f"tables: {found.tables}{hint}")


def _figure_tables(found: Figures) -> Iterator[Table]:
    total = sum(found.stages.values()) or 1.0
    stages = ((STAGES[name], f"{s:.1f} s", f"{100 * s / total:.0f} %") for name, s in found.stages.items() if s)
    yield _figure_table("time by stage, of all workers", "", "", rows=stages)
    languages = (
        (row["language"], str(row["recordings"]), hours(row["audio_s"]), report_page.probability(row["probability"]))
        for row in found.languages
    )
    yield _figure_table("language", "recordings", "audio", "probability", rows=languages)
    flags = ((row["flag"], str(row["recordings"]), str(row["segments"])) for row in found.flags)
    yield _figure_table("flag", "recordings", "segments", rows=flags)
    uncovered = (
        (row["recording_id"], hours(row["uncovered_speech_s"]), hours(row["speech_s"])) for row in found.coverage[:5]
    )
    yield _figure_table("most speech without text", "without", "of", rows=uncovered)
    slowest = ((row["recording_id"], hours(row["audio_s"]), f"{row['total_s']:.1f} s") for row in found.slowest[:5])
    yield _figure_table("slowest", "audio", "took", rows=slowest)
    failures = ((row["kind"], row["stage"], str(row["recordings"])) for row in found.failures)
    yield _figure_table("failed", "stage", "recordings", rows=failures)


def _figure_table(*heads: str, rows: Iterable[Sequence[str]]) -> Table:
    table = Table(*heads, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, *values in rows:
        table.add_row(Text(one_line(name)), *map(Text, values))
    return table


# ---- word error rates


@dataclass(slots=True)
class Evaluation:
    """Word errors of an output against its references; failed recordings are counted, not scored."""

    by_recording: dict[str, Score] = field(default_factory=dict)
    by_language: dict[str, Score] = field(default_factory=lambda: defaultdict(Score))
    failed: int = 0
    without_reference: int = 0

    @property
    def total(self) -> Score:
        return sum(self.by_recording.values(), Score())

    def to_json(self) -> dict[str, Any]:
        return {
            "wer": self.total.rate if self.by_recording else None,
            "by_language": {language: score.rate for language, score in sorted(self.by_language.items())},
            "words": self.total.n_reference,
            "scored": len(self.by_recording),
            "failed": self.failed,
            "without_reference": self.without_reference,
        }


def evaluate(output: Output) -> Evaluation:
    found = Evaluation()
    columns = ["recording_id", "status", "language", "text", "reference"]
    for row in recordings_table(output, columns).sort_by("recording_id").to_pylist():
        score = score_of(row)
        if score is not None:
            found.by_recording[row["recording_id"]] = score
            found.by_language[row["language"] or "none"] += score
        elif row["reference"] is None:
            found.without_reference += 1
        else:
            found.failed += 1
    return found


def show_evaluation(found: Evaluation, console: Console, limit: int = 50) -> None:
    table = Table("", "words", "subst.", "insert.", "delet.", "WER", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"

    def add(name: str, score: Score, style: str = "") -> None:
        counts = (score.n_reference, score.substitutions, score.insertions, score.deletions)
        table.add_row(Text(name), *map(str, counts), f"{100 * score.rate:.2f} %", style=style)

    worst = sorted(found.by_recording.items(), key=lambda pair: -pair[1].rate)
    for recording_id, score in worst[:limit]:
        add(recording_id, score)
    for language, score in sorted(found.by_language.items()):
        add(f"all of language {language}", score, style="bold")
    if found.by_recording:
        add("all", found.total, style="bold")
        console.print(table)
    console.print(f"{found.failed} failed and {found.without_reference} without a reference are not in these figures")


# ---- progress of a run


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
        self._round = round
        self._before = self._step()

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
        old = pc.and_(pc.invert(units["ok"]), pc.less(units["round"], self._round))
        return units.filter(old)["recording_id"].combine_chunks()

    def _audio_s(self) -> float:
        units = self._ledger.winners
        mine = pc.greater_equal(units["round"], self._round)
        return seconds(pc.sum(units.filter(mine)["n_samples"]).as_py() or 0)


@contextmanager
def progress(standing: Standing, console: Console) -> Iterator[None]:
    """Shows how far the run is while the body runs: a bar on a terminal, elsewhere a log line a minute."""
    ended = threading.Event()
    showing = _bar(standing.total, console) if console.is_terminal else _log_line(standing.total)
    pause_s = _LOOK_EVERY_S if console.is_terminal else _LOG_EVERY_S
    with showing as show:
        thread = threading.Thread(target=_watch, args=(standing, show, ended, pause_s), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _watch(standing: Standing, show: Callable[[Step], None], ended: threading.Event, pause_s: float) -> None:
    while not ended.wait(pause_s):
        began = time.monotonic()
        try:
            show(standing.look())
        except MurmurError as error:  # the store does not answer now; if that lasts, the run itself will say so
            log.warning("progress: %s", error)
        pause_s = max(pause_s, 20 * (time.monotonic() - began))  # a large ledger is read seldom


@contextmanager
def _bar(total: int, console: Console) -> Iterator[Callable[[Step], None]]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[extra]}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    began = time.monotonic()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("recordings", total=total, extra="")

        def show(now: Step) -> None:
            rtfx = now.audio_s / (time.monotonic() - began)
            extra = f"{hours(now.audio_s)}, RTFx {rtfx:.1f}, {now.failed} failed"
            bar.update(task, completed=now.done, extra=extra)

        yield show


@contextmanager
def _log_line(total: int) -> Iterator[Callable[[Step], None]]:
    began = time.monotonic()

    def show(now: Step) -> None:
        elapsed = time.monotonic() - began
        left = f"{elapsed / now.done * (total - now.done):.0f} s left" if now.done else "time left unknown"
        log.info(
            "%d of %d recordings, %s of audio, RTFx %.1f, %d failed, %s",
            *(now.done, total, hours(now.audio_s), now.audio_s / elapsed, now.failed, left),
        )

    yield show
