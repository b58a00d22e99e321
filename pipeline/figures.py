"""A run in figures: what `murmur report` shows, from the ledger, the data objects and the tables; it changes nothing.

Recordings that the tables hold as the ledger has them are counted there, a shard at a time; those committed since, or
all while there are no tables, are stitched from their data objects as finalise would. Everything is summed up as it
streams by: a million recordings leave histograms, counters and short lists of the most telling ones.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import schema
from pipeline.entries import published
from pipeline.finalize import Success, read_success, transcripts
from pipeline.journal import Driver, read_drivers
from pipeline.ledger import Ledger
from pipeline.output import Output, newest_inputs
from pipeline.types import SAMPLE_RATE, seconds

Row = dict[str, Any]

STAGES = {
    "source_s": "waiting for the store",
    "decode_s": "decoding",
    "vad_s": "finding speech",
    "engine_s": "in the engine",
    "commit_s": "committing",
}
N_LISTED = 15  # recordings in a list of the slowest, the least covered ...
N_EXAMPLES = 3  # of each kind of failure
N_FLAGGED = 5  # recordings named for each flag
MOST_BINS = 96  # of the throughput's time axis
PAUSE_BINS, PAUSE_S = 8, 60  # a silence of more bins, and of more seconds, is cut out of that axis
BIN_S = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 43200, 86400)
_BATCH = 50_000  # rows of a table looked at at once
_STITCHED = 2_000  # recordings

_RECORDINGS = [
    "recording_id", "status", "language", "language_probability", "duration_s", "decoded_s", "skipped_s", "speech_s",
    "uncovered_speech_s", "n_windows", "n_fallbacks", "flags", "error_kind", "error_stage", "error_message",
    "attempts",
]  # fmt: skip
_SEGMENTS = ["recording_id", "avg_logprob", "compression_ratio", "no_speech_prob", "temperature", "flags"]


@dataclass(frozen=True, slots=True)
class Histogram:
    """`counts[i]` values in [edges[i], edges[i + 1]); the first and the last hold what lies beyond, too."""

    edges: list[float]
    counts: list[int]


@dataclass(slots=True)
class Figures:
    """Everything that a report shows; `to_json` is `murmur report --json`."""

    output: str
    made: float  # seconds since 1970
    model: str
    model_revision: str | None
    fingerprint: str
    keys: dict[str, Any]  # what a result depends on
    settings: dict[str, Any]
    tables: str  # complete, behind or none
    counts: dict[str, int]  # inputs, ok, failed, partial, waiting, unlisted
    audio: dict[str, float | None]  # seconds: duration, decoded, skipped, speech, uncovered_speech, committed
    unaccounted: int  # recordings with decoded + skipped != duration: none, by law
    throughput: list[dict[str, float]]  # bins: start (s since 1970), width_s, audio_s
    stages: dict[str, float]  # seconds of all workers together
    languages: list[Row]
    durations: Histogram
    failures: list[Row]
    decoding: dict[str, Any]  # windows, fallbacks, temperatures
    confidence: dict[str, Histogram]
    flags: list[Row]
    coverage: list[Row]
    slowest: list[Row]
    drivers: list[Driver] = field(default_factory=list)

    def to_json(self) -> Row:
        """The counts, and under `figures` all there is."""
        failures: Counter[str] = Counter()
        for row in self.failures:
            failures[row["kind"]] += row["recordings"]
        head = {"model": self.model, **self.counts, "audio_s": self.audio["committed_s"], "failures": dict(failures)}
        return {**head, "tables": self.tables, "figures": asdict(self)}


def figures(output: Output) -> Figures:
    """Look at an output as it is now. Raises `StoreError` where it cannot be read."""
    ledger = Ledger.read(output.store, output.run.n_shards)
    begun, success = ledger.recordings(), read_success(output.store)
    facts = _Facts(output, ledger, begun, success)
    totals = _Totals()
    for recordings, segments in facts:
        totals.add(recordings, segments)
    return Figures(
        output=str(output.store),
        made=time.time(),
        model=output.run.model,
        model_revision=output.run.model_revision,
        fingerprint=output.run.fingerprint,
        keys=output.run.keys,
        settings=output.run.settings,
        tables=tables_state(success, begun),
        counts=_counts(output, begun),
        audio=totals.audio | {"committed_s": seconds(pc.sum(begun["n_samples"]).as_py() or 0)},
        unaccounted=totals.unaccounted,
        throughput=throughput(ledger.winners),
        stages=_stages(ledger.winners),
        languages=totals.languages(),
        durations=totals.durations.histogram(),
        failures=totals.failures(),
        decoding=totals.decoding(),
        confidence={name: bins.histogram() for name, bins in totals.confidence.items()},
        flags=totals.flags(),
        coverage=[row | facts.longest_gap(row["recording_id"]) for row in totals.uncovered.rows()],
        slowest=_slowest(ledger.winners),
        drivers=read_drivers(output.store),
    )


@dataclass(frozen=True, slots=True)
class End:
    """What the table of recordings says of a run that has ended."""

    audio: dict[str, float | None]  # as in `Figures`
    unaccounted: int
    failures: Counter[str]  # recordings, by kind


END_COLUMNS = ["error_kind", "duration_s", "decoded_s", "skipped_s", "speech_s", "uncovered_speech_s"]


def end_of(recordings: pa.Table) -> End:
    """Sums over the `END_COLUMNS` of all recordings."""
    totals = _Totals()
    totals.add_audio(recordings)
    kinds = pc.drop_null(recordings["error_kind"]).value_counts().to_pylist()
    return End(totals.audio, totals.unaccounted, Counter({pair["values"]: pair["counts"] for pair in kinds}))


def tables_state(success: Success | None, begun: pa.Table) -> str:
    """Whether the tables say what the ledger does: complete, behind, or none."""
    if success is None:
        return "none"
    ended = pc.sum(pc.not_equal(begun["status"], "partial")).as_py() or 0
    published = sum(success.counts[status] for status in ("ok", "failed", "skipped", "unlisted"))
    return "complete" if success.complete and published == ended else "behind"


def _counts(output: Output, begun: pa.Table) -> dict[str, int]:
    """Of the newest list of inputs: how many there are, and how far; `unlisted`: done, and in that list no more."""
    name = newest_inputs(output.store)
    listed = pa.chunked_array([[]], pa.string())
    if name is not None:
        with output.store.open(name) as file:
            listed = pq.ParquetFile(file).read(["recording_id"])["recording_id"]
    status = begun["status"].filter(pc.is_in(begun["recording_id"], listed.combine_chunks()))
    counts = {pair["values"]: pair["counts"] for pair in status.value_counts().to_pylist()}
    found = {name: counts.get(name, 0) for name in ("ok", "failed", "partial")}
    waiting, unlisted = len(listed) - len(status), len(begun) - len(status)
    return {"inputs": len(listed), **found, "waiting": waiting, "unlisted": unlisted}


# ---- where the facts come from


class _Facts:
    """(recordings, segments) of all complete recordings as tables with the public columns, some thousands at a time."""

    def __init__(self, output: Output, ledger: Ledger, begun: pa.Table, success: Success | None) -> None:
        self._output, self._ledger = output, ledger
        ended = begun.filter(pc.not_equal(begun["status"], "partial"))["recording_id"]
        is_level = success is not None and not success.rewriting and success.snapshot == ledger.snapshot
        if is_level:
            loose = ledger.winners.filter(pc.invert(ledger.winners["pinned"]))["recording_id"].unique()
            self._fresh = ended.filter(pc.is_in(ended, loose)).combine_chunks()  # committed since the tables
        else:
            self._fresh = ended.combine_chunks()
        self._tables = range(output.run.n_shards) if is_level else range(0)

    def __iter__(self) -> Iterator[tuple[pa.Table, pa.Table]]:
        none = {"recordings": _empty(schema.RECORDINGS, _RECORDINGS), "segments": _empty(schema.SEGMENTS, _SEGMENTS)}
        for shard in self._tables:
            yield from ((rows, none["segments"]) for rows in self._read("recordings", shard, _RECORDINGS))
            yield from ((none["recordings"], rows) for rows in self._read("segments", shard, _SEGMENTS))
        units = published(self._units(self._fresh))
        for shard in units["shard"].unique().to_pylist():
            whole = transcripts(self._output.store, units.filter(pc.equal(units["shard"], shard)))
            yield from (self._stitched(some) for some in _batched(whole, _STITCHED))

    def longest_gap(self, recording_id: str) -> Row:
        """The longest stretch of decoded audio in which no segment says anything: `start` and `end` in seconds."""
        if pc.is_in(pa.scalar(recording_id), self._fresh).as_py() or not self._tables:
            (one,) = transcripts(self._output.store, published(self._units(pa.array([recording_id]))))
            row = schema.recording_row(one, model="", model_revision=None, options_fingerprint="")
            segments = list(schema.segment_rows(one))
        else:
            (row,) = self._find("recordings", recording_id, ["duration_s", "skipped"])
            segments = self._find("segments", recording_id, ["start", "end"])
        taken = [(part["start"], part["end"]) for part in itertools.chain(row["skipped"], segments)]
        return longest_gap(taken, row["duration_s"])

    def _stitched(self, some: Sequence[Any]) -> tuple[pa.Table, pa.Table]:
        run = self._output.run
        rows = [
            schema.recording_row(one, model=run.model, model_revision=None, options_fingerprint=run.fingerprint)
            for one in some
        ]
        segments = [row for one in some for row in schema.segment_rows(one)]
        recordings = schema.to_table(rows, schema.RECORDINGS).select(_RECORDINGS)
        return recordings, schema.to_table(segments, schema.SEGMENTS).select(_SEGMENTS)

    def _read(self, table: str, shard: int, columns: list[str]) -> Iterator[pa.Table]:
        with self._output.store.open(self._path(table, shard)) as file:
            for batch in pq.ParquetFile(file).iter_batches(_BATCH, columns=columns):
                rows = pa.Table.from_batches([batch])
                yield rows.filter(pc.invert(pc.is_in(rows["recording_id"], self._fresh)))

    def _find(self, table: str, recording_id: str, columns: list[str]) -> list[Row]:
        shard = schema.shard_of(recording_id, self._output.run.n_shards)
        with self._output.store.open(self._path(table, shard)) as file:
            found = pq.read_table(file, columns=columns, filters=[("recording_id", "=", recording_id)])
        rows: list[Row] = found.to_pylist()
        return rows

    def _path(self, table: str, shard: int) -> str:
        return f"{table}/part-{shard:05d}-of-{self._output.run.n_shards:05d}.parquet"

    def _units(self, ids: pa.Array) -> pa.Table:
        winners = self._ledger.winners
        return winners.filter(pc.is_in(winners["recording_id"], ids))


def longest_gap(taken: Iterable[tuple[float, float]], duration_s: float) -> Row:
    """The longest part of [0, duration_s) that is in none of `taken`."""
    at, gap = 0.0, (0.0, 0.0)
    for start, end in sorted([*taken, (duration_s, duration_s)]):
        if start - at > gap[1] - gap[0]:
            gap = (at, start)
        at = max(at, end)
    return {"start": gap[0], "end": gap[1]}


def _batched(items: Iterable[Any], n: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while some := list(itertools.islice(rest, n)):
        yield some


def _empty(of: pa.Schema, columns: Sequence[str]) -> pa.Table:
    return of.empty_table().select(list(columns))


# ---- what is summed up


class _Totals:
    """Sums over recordings and segments as they come by; its size does not depend on how many there are."""

    def __init__(self) -> None:
        self.audio: dict[str, float | None] = dict.fromkeys(("duration_s", "decoded_s", "skipped_s"), 0.0)
        self.audio |= dict.fromkeys(("speech_s", "uncovered_speech_s"))  # None: no VAD was run
        self.unaccounted = 0
        self.durations = _Bins([0, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 18000, 36000, 86400])
        self.confidence = {
            "avg_logprob": _Bins(np.round(np.arange(-2.0, 0.01, 0.1), 1).tolist()),
            "no_speech_prob": _Bins(np.round(np.arange(0.0, 1.01, 0.05), 2).tolist()),
            "compression_ratio": _Bins(np.round(np.arange(0.0, 4.01, 0.2), 1).tolist()),
        }
        self.uncovered = _Top("uncovered_speech_s", ["recording_id", "duration_s", "speech_s", "uncovered_speech_s"])
        self._languages: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0, 0])
        self._failures: Counter[tuple[str, str]] = Counter()
        self._examples: defaultdict[tuple[str, str], list[Row]] = defaultdict(list)
        self._windows = self._fallbacks = 0
        self._temperatures: Counter[float] = Counter()
        self._flagged: defaultdict[str, dict[str, int]] = defaultdict(lambda: {"recordings": 0, "segments": 0})
        self._flag_examples: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, recordings: pa.Table, segments: pa.Table) -> None:
        if len(recordings):
            self.add_audio(recordings)
            self._add_languages(recordings)
            self._add_failures(recordings)
            self._add_flags(recordings, "recordings")
            self.durations.add(recordings["duration_s"])
            self.uncovered.add(recordings)
            self._windows += pc.sum(recordings["n_windows"]).as_py()
            self._fallbacks += pc.sum(recordings["n_fallbacks"]).as_py()
        if len(segments):
            self._add_flags(segments, "segments")
            for name, bins in self.confidence.items():
                bins.add(segments[name])
            for pair in pc.round(segments["temperature"], 1).value_counts().to_pylist():
                self._temperatures[round(pair["values"], 1)] += pair["counts"]

    def languages(self) -> list[Row]:
        """The most hours first."""
        rows = [
            {"language": name, "recordings": int(n), "audio_s": s, "probability": total / known if known else None}
            for name, (n, s, total, known) in self._languages.items()
        ]
        return sorted(rows, key=lambda row: -row["audio_s"])

    def failures(self) -> list[Row]:
        """The most frequent first."""
        return [
            {"kind": kind, "stage": stage, "recordings": n, "examples": self._examples[kind, stage]}
            for (kind, stage), n in self._failures.most_common()
        ]

    def decoding(self) -> dict[str, Any]:
        temperatures = {f"{value:g}": n for value, n in sorted(self._temperatures.items())}
        return {"windows": self._windows, "fallbacks": self._fallbacks, "segments_by_temperature": temperatures}

    def flags(self) -> list[Row]:
        """The most frequent first."""
        rows = [
            {"flag": flag, **counts, "examples": self._flag_examples[flag]} for flag, counts in self._flagged.items()
        ]
        return sorted(rows, key=lambda row: (-row["recordings"], -row["segments"], row["flag"]))

    def add_audio(self, rows: pa.Table) -> None:
        for name, before in self.audio.items():
            total = pc.sum(rows[name]).as_py()
            self.audio[name] = before if total is None else (before or 0.0) + total
        lost = pc.abs(pc.subtract(pc.add(rows["decoded_s"], rows["skipped_s"]), rows["duration_s"]))
        self.unaccounted += pc.sum(pc.greater(lost, 1 / SAMPLE_RATE)).as_py() or 0

    def _add_languages(self, rows: pa.Table) -> None:
        heard = rows.filter(pc.equal(rows["status"], "ok"))
        by = heard.group_by("language").aggregate(
            [("duration_s", "count"), ("duration_s", "sum"), ("language_probability", "sum"),
             ("language_probability", "count")]
        )  # fmt: skip
        for row in by.to_pylist():
            one = self._languages[row["language"] or "none"]
            one[0] += row["duration_s_count"]
            one[1] += row["duration_s_sum"]
            one[2] += row["language_probability_sum"] or 0.0
            one[3] += row["language_probability_count"]

    def _add_failures(self, rows: pa.Table) -> None:
        failed = rows.filter(pc.equal(rows["status"], "failed"))
        for row in failed.group_by(["error_kind", "error_stage"]).aggregate([("recording_id", "count")]).to_pylist():
            kind, stage = row["error_kind"], row["error_stage"]
            self._failures[kind, stage] += row["recording_id_count"]
            room = N_EXAMPLES - len(self._examples[kind, stage])
            if room > 0:
                mine = pc.and_(pc.equal(failed["error_kind"], kind), pc.equal(failed["error_stage"], stage))
                columns = ["recording_id", "error_message", "attempts"]
                self._examples[kind, stage] += failed.filter(mine).select(columns).slice(0, room).to_pylist()

    def _add_flags(self, rows: pa.Table, grain: str) -> None:
        rows = rows.combine_chunks()
        flags, at = pc.list_flatten(rows["flags"]), pc.list_parent_indices(rows["flags"])
        for pair in flags.value_counts().to_pylist():
            flag = pair["values"]
            self._flagged[flag][grain] += pair["counts"]
            examples = self._flag_examples[flag]
            if len(examples) < N_FLAGGED:
                mine = at.filter(pc.equal(flags, flag)).slice(0, 50)
                ids = rows["recording_id"].take(mine).to_pylist()
                self._flag_examples[flag] = list(dict.fromkeys([*examples, *ids]))[:N_FLAGGED]


class _Bins:
    """A histogram in the making."""

    def __init__(self, edges: list[float]) -> None:
        self._edges = np.array(edges, np.float64)
        self._counts = np.zeros(len(edges) - 1, np.int64)

    def add(self, column: pa.ChunkedArray) -> None:
        values = _floats(pc.drop_null(column))
        inside = np.clip(np.searchsorted(self._edges, values, side="right") - 1, 0, len(self._counts) - 1)
        self._counts += np.bincount(inside, minlength=len(self._counts))

    def histogram(self) -> Histogram:
        return Histogram(self._edges.tolist(), self._counts.tolist())


class _Top:
    """The rows with the largest values above 0 in one column."""

    def __init__(self, by: str, columns: Sequence[str]) -> None:
        self._by, self._columns = by, list(columns)
        self._rows: pa.Table | None = None

    def add(self, rows: pa.Table) -> None:
        some = rows.select(self._columns).filter(pc.greater(rows[self._by], 0))
        self._rows = _largest(some if self._rows is None else pa.concat_tables([self._rows, some]), self._by)

    def rows(self) -> list[Row]:
        rows: list[Row] = [] if self._rows is None else self._rows.to_pylist()
        return rows


def _largest(rows: pa.Table, by: str) -> pa.Table:
    """The N_LISTED rows with the largest values; among equals the ids decide, so that two looks agree."""
    order = [(by, "descending"), ("recording_id", "ascending")]
    return rows.take(pc.select_k_unstable(rows, N_LISTED, sort_keys=order)) if len(rows) else rows


# ---- what the ledger knows of time


def throughput(winners: pa.Table) -> list[dict[str, float]]:
    """Seconds of audio committed in each of at most `MOST_BINS` bins of wall time, in order; long pauses left out.

    A bin is as wide as the time in which something happened asks for, not the days between two runs.
    """
    known = winners.filter(pc.is_valid(winners["at"]))
    if not len(known):
        return []
    at, audio_s = _floats(known["at"]), _floats(known["n_samples"]) / SAMPLE_RATE
    for width in BIN_S:
        bins, where = np.unique(np.floor(at / width).astype(np.int64), return_inverse=True)
        sums = np.bincount(where, weights=audio_s)
        gaps, longest = np.diff(bins), max(PAUSE_BINS, PAUSE_S // width)
        shown = len(bins) + int(np.where(gaps <= longest, gaps - 1, 0).sum())
        if shown <= MOST_BINS or width == BIN_S[-1]:
            break
    by_bin = dict(zip(bins.tolist(), sums.tolist(), strict=True))
    filled = {b for first, gap in zip(bins.tolist(), gaps.tolist(), strict=False) if gap <= longest
              for b in range(first, first + gap)} | by_bin.keys()  # fmt: skip
    return [{"start": float(b * width), "width_s": float(width), "audio_s": by_bin.get(b, 0.0)} for b in sorted(filled)]


def _stages(winners: pa.Table) -> dict[str, float]:
    return {name: float(pc.sum(winners[name]).as_py() or 0.0) for name in STAGES}


def _slowest(winners: pa.Table) -> list[Row]:
    """The recordings that took the most seconds of all stages together."""
    sums = winners.group_by("recording_id").aggregate([(name, "sum") for name in ("n_samples", *STAGES)])
    parts: Mapping[str, NDArray[np.float64]] = {name: _floats(sums[f"{name}_sum"].fill_null(0)) for name in STAGES}
    table = pa.table(
        {
            "recording_id": sums["recording_id"],
            "audio_s": _floats(sums["n_samples_sum"]) / SAMPLE_RATE,
            **parts,
            "total_s": sum(parts.values(), np.zeros(len(sums))),
        }
    )
    rows: list[Row] = _largest(table.filter(pc.greater(table["total_s"], 0)), "total_s").to_pylist()
    return rows


def _floats(column: pa.ChunkedArray) -> NDArray[np.float64]:
    values: NDArray[np.float64] = column.cast(pa.float64()).to_numpy()
    return values
