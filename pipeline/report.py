"""What a run did, for a person at a terminal: a summary, a table of recordings; how far it is.

Reads the public tables and the ledger; changes nothing. Figures come from what is committed, never from what was
sent off: a number shown here survives a crash.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import figures, report_page
from pipeline.config import Config
from pipeline.errors import EXIT_FAILED, EXIT_OK, MurmurError
from pipeline.figures import STAGES, Figures
from pipeline.finalize import Success
from pipeline.logs import one_line
from pipeline.output import Output
from pipeline.report_page import length
from pipeline.scoring import Score, word_score


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

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"rtfx": round(self.rtfx, 2)}


@dataclass(frozen=True, slots=True)
class Summary:
    """The end of a run: its own work, and what lies in the output now."""

    counts: dict[str, int]  # inputs, ok, failed, skipped, missing, unlisted
    audio_s: float  # of all recordings in the tables
    work: Work | None  # None: nothing was to be done
    exit_code: int
    start_s: float = 0.0  # reading the inputs, looking the model over, starting or joining Ray
    finalize_s: float = 0.0

    @classmethod
    def of(
        cls, success: Success, work: Work | None, exit_code: int, start_s: float = 0.0, finalize_s: float = 0.0
    ) -> Summary:
        return cls(success.counts, success.audio_s, work, exit_code, start_s, finalize_s)

    def to_json(self) -> dict[str, Any]:
        work = self.work.to_json() if self.work else None
        clock = {"start_s": round(self.start_s, 3), "finalize_s": round(self.finalize_s, 3)}
        return {**self.counts, "audio_s": self.audio_s, **clock, "this_run": work}


def exit_code(counts: Mapping[str, int], config: Config) -> int:
    """0 while the failed recordings are within `max_failed_fraction` of the inputs and none is missing, else 3."""
    allowed = config.max_failed_fraction * counts["inputs"]
    return EXIT_OK if counts["failed"] <= allowed and not counts["missing"] else EXIT_FAILED


def why_failed(counts: Mapping[str, int], config: Config) -> str:
    """The sentence to exit code 3."""
    if counts["missing"]:
        return f"exit code {EXIT_FAILED}: {number_of(counts['missing'])} missing"
    return (
        f"exit code {EXIT_FAILED}: {counts['failed']} of {number_of(counts['inputs'])} failed, more than"
        f" max_failed_fraction ({config.max_failed_fraction:g}) allows"
    )


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


def show_summary(summary: Summary, output: Output, console: Console) -> None:
    """What the run did and how long that took, whether every second is accounted for, what failed most."""
    console.print(f"{counted(summary.counts)}; {length(summary.audio_s)} of audio")
    work = summary.work
    if work is None:
        console.print("nothing was left to do")
    else:
        console.print(
            f"this run: {length(work.audio_s)} of audio in {work.wall_s:.1f} s, RTFx {work.rtfx:.1f}"
            f" (wall clock from the first decode to the last commit; {work.pools})"
        )
        console.print(
            f"time: {summary.start_s:.1f} s to start, {work.wall_s:.1f} s of work, {summary.finalize_s:.1f} s for the"
            " tables"
        )
    end = figures.end_of(recordings_table(output, figures.END_COLUMNS))
    if summary.counts["ok"]:
        console.print(report_page.coverage_line(end.audio, end.unaccounted))
    if end.failures:
        console.print("failed: " + ", ".join(f"{n} {kind}" for kind, n in end.failures.most_common(8)))


def counted(counts: Mapping[str, int]) -> str:
    """`_SUCCESS`'s counts in words; what is zero and should be is left out."""
    rare = {"skipped": "skipped", "missing": "missing", "unlisted": "no longer listed"}
    parts = [f"{counts['ok']} ok", f"{counts['failed']} failed"]
    parts += [f"{counts[key]} {words}" for key, words in rare.items() if counts[key]]
    return f"{number_of(counts['inputs'])}: {', '.join(parts)}"


def number_of(recordings: int) -> str:
    return "1 recording" if recordings == 1 else f"{recordings} recordings"


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
    return set(_failed(output)["recording_id"].to_pylist())


def show_failures(output: Output, console: Console, limit: int = 20) -> None:
    """What failed and why, a line a recording."""
    rows = _failed(output)
    for row in rows.slice(0, limit).to_pylist():  # of what may be all of a large run
        why = report_page.reason(row["recording_id"], row["error_message"])
        line = f"{row['recording_id']}: {row['error_kind']}: {why}"
        console.print(one_line(line), style="red", markup=False, highlight=False)
    if len(rows) > limit:
        console.print(f"... and {len(rows) - limit} more: see `error_message` in {output.store}/recordings")


def _failed(output: Output) -> pa.Table:
    rows = recordings_table(output, ["recording_id", "status", "error_kind", "error_message"])
    return rows.filter(pc.equal(rows["status"], "failed")).sort_by("recording_id")


# ---- a look at an output, also while a run goes on


def show_figures(found: Figures, console: Console) -> None:
    """What `murmur report` says at a terminal; the page says more."""
    counts = found.counts
    console.print(
        f"{counts['inputs']} recordings listed: {counts['ok']} ok, {counts['failed']} failed,"
        f" {counts['partial']} begun, {counts['waiting']} waiting"
    )
    console.print(
        f"{length(found.audio['committed_s'] or 0.0)} of audio committed, model {found.model}", highlight=False
    )
    if counts["ok"] + counts["failed"]:
        console.print(report_page.coverage_line(found.audio, found.unaccounted))
        console.print(report_page.fallback_line(found))
    for table in _figure_tables(found):
        if table.row_count:
            console.print()
            console.print(table)
    for row in found.failures:
        for one in row["examples"]:
            why = report_page.reason(one["recording_id"], one["error_message"])
            line = f"  {one['recording_id']}: {row['kind']}: {why}"
            console.print(Text(one_line(line)), style="red", highlight=False)
    hint = "" if found.tables == "complete" else "; `murmur finalize` brings them up to date"
    console.print(f"tables: {found.tables}{hint}")


def _figure_tables(found: Figures) -> Iterator[Table]:
    total = sum(found.stages.values()) or 1.0
    stages = ((STAGES[name], f"{s:.1f} s", f"{100 * s / total:.0f} %") for name, s in found.stages.items() if s)
    yield _figure_table("time by stage, of all workers", "", "", rows=stages)
    languages = (
        (row["language"], str(row["recordings"]), length(row["audio_s"]), report_page.probability(row["probability"]))
        for row in found.languages
    )
    yield _figure_table("language", "recordings", "audio", "probability", rows=languages)
    flags = ((row["flag"], str(row["recordings"]), str(row["segments"])) for row in found.flags)
    yield _figure_table("flag", "recordings", "segments", rows=flags)
    uncovered = (
        (row["recording_id"], length(row["uncovered_speech_s"]), length(row["speech_s"])) for row in found.coverage[:5]
    )
    yield _figure_table("most speech without text", "without", "of", rows=uncovered)
    slowest = ((row["recording_id"], length(row["audio_s"]), f"{row['total_s']:.1f} s") for row in found.slowest[:5])
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
