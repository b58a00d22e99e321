"""What a run still has to do, in the order and the portions in which it is handed out.

The longest recordings first: one of ten hours begun last would leave a cluster waiting for it alone. Only what is
needed of each recording is held, as JSON, some 400 bytes of a driver's memory for a line of the manifest. Knows the
ledger, and nothing of Ray.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.ledger import Ledger, data_path
from pipeline.types import Recording, seconds

log = logging.getLogger(__name__)

MAX_ROWS, MAX_S = 32, 600  # of one block, the work of one decode task

# Bytes of a second of audio, to guess a length from a size: 16 kHz int16, half of that, 96 kbit/s for the rest.
_BYTES_PER_S = {"wav": 32_000, "aiff": 32_000, "flac": 16_000}
_OTHER_BYTES_PER_S = 12_000

TODO = pa.schema(
    [
        ("recording", pa.string()),  # JSON of every field of `Recording`
        ("done", pa.list_(pa.int32())),  # its Units that are committed already
        ("gap_start", pa.int64()),  # the sample at which the first Unit that is not done begins; see `Item`
    ]
)


@dataclass(frozen=True, slots=True)
class Item:
    """A recording and what of it is done."""

    recording: str  # JSON
    done: tuple[int, ...] = ()
    # Where the first Unit that is not done begins: there a failure is booked if the audio cannot be read any more.
    # None: it is not booked, as in a retry, where one stands already.
    gap_start: int | None = None
    hint_s: float | None = None  # the manifest's length
    estimate_s: float | None = None  # that, else a guess from the size


def item(recording: Recording, done: Iterable[int] = (), gap_start: int | None = None) -> Item:
    return Item(to_json(recording), tuple(sorted(done)), gap_start, hint_s(recording), estimate_s(recording))


def to_json(recording: Recording) -> str:
    return json.dumps(dataclasses.asdict(recording))


def from_json(text: str) -> Recording:
    return Recording(**json.loads(text))


def missing(listed: Iterable[Item], ledger: Ledger) -> list[Item]:
    """Of `listed`, those that are neither done nor failed; the Units that a killed run left of them stay."""
    resume = ledger.resume()
    starts = _gap_starts(ledger, resume.partial.keys())
    found, changed = [], 0
    for it in listed:
        recording = from_json(it.recording)
        changed += resume.is_changed(recording)
        if recording.id in resume.partial:
            found.append(item(recording, resume.partial[recording.id], starts[recording.id]))
        elif recording.id not in resume.ok and recording.id not in resume.failed:
            found.append(it)
    if changed:
        log.warning("%d recordings have other bytes now than when they were read; they are not read again", changed)
    return found


def failed(listed: Sequence[Item], ledger: Ledger) -> list[Item]:
    """The failed ones among `listed`, or all that the ledger knows, with the Units of each that are well."""
    well = ledger.resume().failed
    recordings = (from_json(it.recording) for it in listed) if listed else _committed(ledger, well.keys())
    return [item(recording, well[recording.id]) for recording in recordings if recording.id in well]


def again(recordings: Iterable[str], ledger: Ledger, round: int) -> list[Item]:
    """What is left to do of these recordings (JSON) in the run (`round` 0), or the retry, that has begun with them."""
    of = {from_json(text).id: text for text in recordings}
    rows = _units(ledger, of, "index", "is_last", "ok", "round")
    by_id = {name: list(units) for name, units in groupby(rows, key=lambda row: row["recording_id"])}
    starts = {} if round else _gap_starts(ledger, of)
    left = []
    for name, text in of.items():
        done = {unit["index"]: unit["is_last"] for unit in by_id.get(name, ()) if unit["ok"] or unit["round"] >= round}
        last = min((index for index, is_last in done.items() if is_last), default=None)
        if last is None or any(index not in done for index in range(last)):
            left.append(item(from_json(text), done, None if round else starts.get(name)))
    return left


def in_order(items: Iterable[Item]) -> list[Item]:
    """The longest first; those of unknown length after them, in the manifest's order."""
    return sorted(items, key=lambda it: -(it.estimate_s or 0.0))


def blocks(items: Sequence[Item], tasks: int) -> Iterator[pa.Table]:
    """`items` in portions of at most MAX_ROWS recordings and MAX_S seconds, a longer recording alone.

    Few items make smaller ones, so that each of `tasks` decode tasks has several to take.
    """
    rows = max(1, min(MAX_ROWS, len(items) // (4 * tasks)))
    block: list[Item] = []
    length_s = 0.0
    for it in items:
        its_s = it.estimate_s or 0.0
        if block and (len(block) == rows or length_s + its_s > MAX_S):
            yield _table(block)
            block, length_s = [], 0.0
        block.append(it)
        length_s += its_s
    if block:
        yield _table(block)


def hint_s(recording: Recording) -> float | None:
    """The length that the manifest says, in seconds."""
    return seconds(recording.length) if recording.length is not None else recording.duration_s


def estimate_s(recording: Recording) -> float | None:
    """That, or a guess from the size; None where neither is known."""
    hint = hint_s(recording)
    if hint is not None or recording.size is None:
        return hint
    suffix = recording.uri.partition("?")[0].rpartition(".")[2].lower()
    return recording.size / _BYTES_PER_S.get(suffix, _OTHER_BYTES_PER_S)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What is to do, as far as hints and sizes tell."""

    inputs: int
    missing: int
    hinted_s: float  # by the manifest's own lengths
    guessed_s: float  # by sizes, where it gives no length
    unknown: int  # recordings of which neither is known

    @classmethod
    def of(cls, listed: Sequence[Item], missing: Sequence[Item]) -> Estimate:
        hinted = sum(it.hint_s or 0.0 for it in missing)
        guessed = sum(it.estimate_s or 0.0 for it in missing if it.hint_s is None)
        return cls(len(listed), len(missing), hinted, guessed, sum(it.estimate_s is None for it in missing))


def _table(items: Sequence[Item]) -> pa.Table:
    rows = [{"recording": it.recording, "done": it.done, "gap_start": it.gap_start} for it in items]
    return pa.Table.from_pylist(rows, schema=TODO)


def _gap_starts(ledger: Ledger, ids: Iterable[str]) -> Mapping[str, int]:
    """For each of `ids` the samples in its Units 0, 1 ... up to the first that is missing."""
    starts = {}
    for recording_id, units in groupby(_units(ledger, ids, "index", "n_samples"), key=lambda row: row["recording_id"]):
        start = 0
        for expected, unit in enumerate(units):
            if unit["index"] != expected:
                break
            start += unit["n_samples"]
        starts[recording_id] = start
    return starts


def _committed(ledger: Ledger, ids: Iterable[str]) -> Iterator[Recording]:
    """The recordings as they were committed: with all of their manifest line, the address without its secrets."""
    objects: dict[str, set[str]] = {}
    for row in _units(ledger, ids, "index", "object"):
        if row["index"] == 0:
            objects.setdefault(row["object"], set()).add(row["recording_id"])
    for name, wanted in objects.items():
        with ledger.store.open(data_path(name)) as file:
            table = pq.ParquetFile(file).read(["recording"])
        rows = {row["id"]: row for row in table["recording"].to_pylist() if row["id"] in wanted}
        yield from (Recording(**row) for row in rows.values())


def _units(ledger: Ledger, ids: Iterable[str], *columns: str) -> list[dict[str, Any]]:
    """These columns of the winning Units of `ids`, sorted by recording and index."""
    mine = ledger.winners.filter(pc.is_in(ledger.winners["recording_id"], pa.array(list(ids), pa.string())))
    rows: list[dict[str, Any]] = mine.select(["recording_id", *columns]).to_pylist()
    return rows
