"""What is committed, and so what is still to do. No rename, no append, no clock: objects that are put once.

    _run/data/NAME.parquet         rows of `schema.DATA`; nobody reads it without
    _run/ledger/NAME.json          its ledger object, put after it, which names it and says what is in it
    _run/snapshots/N.parquet       the winners when the tables were made the Nth time, pinned

A Unit that was committed twice has one winner: one that is `ok` beats one that failed (so a retry can mend); among
equals the one in the newest snapshot, else the smallest object name; but among failed ones the latest round of
retries. The same objects give the same winners in whatever order they are listed or read.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import schema
from pipeline.output import LEDGER, number
from pipeline.store import Store
from pipeline.types import Recording

log = logging.getLogger(__name__)

DATA = "_run/data"
SNAPSHOTS = "_run/snapshots"

# One row per Unit: what a ledger object says of it, and which object that is.
ENTRIES = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("recording_id", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("is_last", pa.bool_(), nullable=False),
        pa.field("ok", pa.bool_(), nullable=False),
        pa.field("kind", pa.string()),  # of the failure
        pa.field("n_samples", pa.int64(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("size", pa.int64()),  # of the input, as is `etag`, where a listing told
        pa.field("etag", pa.string()),
        pa.field("object", pa.string(), nullable=False),  # NAME
        pa.field("round", pa.int32(), nullable=False),  # 0: the run itself; 1, 2 ...: retries of what failed
        pa.field("pinned", pa.bool_(), nullable=False),
    ]
)
_SAID = ("recording_id", "index", "is_last", "ok", "kind", "n_samples", "uri", "size", "etag")

RECORDINGS = pa.schema(
    [
        ("recording_id", pa.string()),
        ("shard", pa.int32()),
        ("status", pa.string()),  # ok, failed or partial
        ("n_units", pa.int32()),  # that count: all of a partial one's, else those up to the last
        ("n_samples", pa.int64()),  # in these
        ("size", pa.int64()),
        ("etag", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Committed:
    """What one commit wrote."""

    name: str  # of the data and of the ledger object; "": nothing was to be written
    units: int = 0
    failed: int = 0
    n_samples: int = 0


def commit(
    store: Store,
    units: pa.Table,
    n_shards: int,
    *,
    round: int = 0,
    name: str | None = None,
    between: Callable[[pa.Table], None] | None = None,
) -> Committed:
    """Put `units` (of `schema.UNITS`) and then the object that names them, both under a random name: an attempt never
    overwrites another, and a writer that dies between the two puts leaves a data object that nobody reads.

    `round` is 0 but for retries (`Ledger.next_round`); `between` is called after the first put and is for fault
    injection. Raises `TypeError` with both schemas where `units` have another, `StoreError` where the store refuses.
    """
    units = schema.conform(units, schema.UNITS)
    if not units.num_rows:
        return Committed("")
    table = _with_shard(units, n_shards)
    name = name or uuid.uuid4().hex
    raw = _data_object(table)
    store.put(data_path(name), raw)
    if between is not None:
        between(table)
    store.put(ledger_path(name), to_ledger(name, table, round, bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest()))
    failed = table.num_rows - table["failure"].null_count
    return Committed(name, table.num_rows, failed, pc.sum(table["n_samples"]).as_py())


@dataclass(frozen=True, slots=True)
class Resume:
    """What is there already, by recording id."""

    ok: frozenset[str]  # nothing left to do
    failed: Mapping[str, frozenset[int]]  # done, but not well: a retry redoes all Units but these
    partial: Mapping[str, frozenset[int]]  # begun: a run redoes all Units but these
    inputs: Mapping[str, tuple[int | None, str | None]]  # size and etag of what was read

    def is_changed(self, recording: Recording) -> bool:
        """Whether other bytes lie under this id now than when it was done, as far as listings tell."""
        size, etag = self.inputs.get(recording.id, (None, None))
        return _differ(size, recording.size) or _differ(etag, recording.etag)


class Ledger:
    """The winners among all that was committed to `store`. `refresh` reads what is new since the last time."""

    def __init__(self, store: Store, n_shards: int) -> None:
        self.store, self.n_shards = store, n_shards
        self.snapshot = 0  # number of the one that the winners start from; 0: none
        self.winners = ENTRIES.empty_table()  # sorted by recording id and index, one row per Unit
        self._newest = 0  # number of the newest snapshot, also if it is half a one
        self._read: set[str] = set()  # objects that the winners take account of

    @classmethod
    def read(cls, store: Store, n_shards: int) -> Ledger:
        ledger = cls(store, n_shards)
        ledger.refresh()
        return ledger

    def refresh(self) -> int:
        """Read what was committed since; returns the number of objects. An unreadable one is being written now, or
        its writer was killed over it: it is not committed, and looked at again the next time."""
        self._rebase()
        new = sorted(name for name in self.store.sizes(LEDGER) if name.removesuffix(".json") not in self._read)
        tables = []
        for path, raw in self.store.get_all(f"{LEDGER}/{name}" for name in new if name.endswith(".json")):
            name = path.rsplit("/", 1)[1].removesuffix(".json")
            entries = _parse(name, raw, self.n_shards)
            if entries is not None:
                tables.append(entries)
                self._read.add(name)
        if tables:
            self.winners = winners(pa.concat_tables([self.winners, *tables]))
        return len(tables)

    def pin(self) -> int:
        """Write the winners as a snapshot, unless they are one, and return its number.

        From then on they stay, whatever is committed: tables made of a snapshot can be made again.
        """
        while not pc.all(self.winners["pinned"], min_count=0).as_py() or self.snapshot == 0:
            pinned = _pinned(self.winners)
            if self.store.create(_snapshot(self._newest + 1), _to_parquet(pinned)):
                self._newest += 1
                self.winners, self.snapshot = pinned, self._newest
            else:
                self.refresh()  # another one was quicker: start from there
        return self.snapshot

    def recordings(self) -> pa.Table:
        """One row of `RECORDINGS` for each recording that was begun, sorted by id."""
        groups = _Groups(self.winners)
        counted = groups.counted()
        samples = np.where(counted, _numpy(self.winners["n_samples"]), 0)
        failed = groups.any(counted & ~_numpy(self.winners["ok"]))
        status = np.where(groups.complete, np.where(failed, "failed", "ok"), "partial")
        first = self.winners.take(pa.array(groups.starts))
        columns = {
            "recording_id": first["recording_id"],
            "shard": first["shard"],
            "status": pa.array(status.tolist(), pa.string()),
            "n_units": pa.array(groups.sum(counted.astype(np.int64)), pa.int32()),
            "n_samples": pa.array(groups.sum(samples), pa.int64()),
            "size": first["size"],
            "etag": first["etag"],
        }
        return pa.table(columns, schema=RECORDINGS)

    def resume(self) -> Resume:
        """What a run, or a retry, need not do again."""
        rows = self.recordings()
        columns = (rows[name].to_pylist() for name in ("recording_id", "status", "size", "etag"))
        ids: dict[str, set[str]] = {"ok": set(), "failed": set(), "partial": set()}
        inputs = {}
        for recording_id, status, size, etag in zip(*columns, strict=True):
            ids[status].add(recording_id)
            if size is not None or etag is not None:
                inputs[recording_id] = (size, etag)
        failed, partial = self._units(ids["failed"], only_ok=True), self._units(ids["partial"], only_ok=False)
        return Resume(ok=frozenset(ids["ok"]), failed=failed, partial=partial, inputs=inputs)

    def next_round(self) -> int:
        """The number that a retry commits under."""
        return int(pc.max(self.winners["round"]).as_py() or 0) + 1

    def _units(self, ids: set[str], *, only_ok: bool) -> dict[str, frozenset[int]]:
        mine = self.winners.filter(pc.is_in(self.winners["recording_id"], pa.array(ids, pa.string())))
        units: dict[str, set[int]] = {recording_id: set() for recording_id in ids}
        for row in mine.select(["recording_id", "index", "ok"]).to_pylist():
            if row["ok"] or not only_ok:
                units[row["recording_id"]].add(row["index"])
        return {recording_id: frozenset(indices) for recording_id, indices in units.items()}

    def _rebase(self) -> None:
        """Start again from the newest snapshot that was written to its end, if it is newer than ours."""
        there = sorted(map(number, self.store.sizes(SNAPSHOTS)))
        self._newest = max([self._newest, *there])
        for one in reversed([one for one in there if one > self.snapshot]):
            pinned = _from_parquet(self.store.get(_snapshot(one)))
            if pinned is not None:
                self.winners, self.snapshot = winners(pinned), one
                self._read = set(pc.unique(pinned["object"]).to_pylist())
                return


def read_snapshot(store: Store, snapshot: int, shard: int) -> pa.Table:
    """The rows of `ENTRIES` of one shard that count: the Units of complete recordings, sorted by id and index."""
    with store.open(_snapshot(snapshot)) as file:
        return published(winners(pq.read_table(file, schema=ENTRIES, filters=[("shard", "=", shard)])))


def published(entries: pa.Table) -> pa.Table:
    """Of sorted winners, the Units of complete recordings: 0 ... k where k is the first that says it is the last."""
    groups = _Groups(entries)
    return entries.filter(pa.array(groups.counted() & np.repeat(groups.complete, groups.sizes)))


def winners(entries: pa.Table) -> pa.Table:
    """One row per Unit, sorted by recording id and index; which one, the head of this file says."""
    ok = entries["ok"]
    ranked = (
        entries.append_column("failed", pc.invert(ok))
        .append_column("late", pc.if_else(ok, 0, pc.negate(entries["round"])))
        .append_column("loose", pc.invert(entries["pinned"]))
    )
    by = ["recording_id", "index", "failed", "late", "loose", "object"]
    order = pc.sort_indices(ranked, sort_keys=[(name, "ascending") for name in by])
    entries = entries.take(order).combine_chunks()
    return entries.filter(pa.array(begins(entries, "recording_id", "index")))


def to_ledger(name: str, table: pa.Table, round: int, **about: Any) -> bytes:
    """The ledger object for the data object `name` with the rows `table` (of `schema.DATA`)."""
    units = []
    for row in table.select(["recording_id", "index", "is_last", "n_samples", "recording", "failure"]).to_pylist():
        recording, failure = row.pop("recording"), row.pop("failure")
        kind = failure["kind"] if failure else None
        units.append(
            row | {"ok": kind is None, "kind": kind} | {key: recording[key] for key in ("uri", "size", "etag")}
        )
    said = {"format": 1, "data": data_path(name), **about, "round": round, "units": units}
    return json.dumps(said, ensure_ascii=False).encode()


def data_path(name: str) -> str:
    return f"{DATA}/{name}.parquet"


def ledger_path(name: str) -> str:
    return f"{LEDGER}/{name}.json"


def _with_shard(units: pa.Table, n_shards: int) -> pa.Table:
    shards = [schema.shard_of(recording_id, n_shards) for recording_id in units["recording_id"].to_pylist()]
    return units.append_column(schema.DATA.field("shard"), pa.array(shards, pa.int32())).cast(schema.DATA)


def _data_object(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _parse(name: str, raw: bytes | None, n_shards: int) -> pa.Table | None:
    try:
        said = json.loads(raw or b"")
        rows = [
            {key: unit[key] for key in _SAID}
            | {"shard": schema.shard_of(unit["recording_id"], n_shards), "round": said["round"]}
            | {"object": name, "pinned": False}
            for unit in said["units"]
        ]
        return pa.Table.from_pylist(rows, schema=ENTRIES)
    except (ValueError, KeyError, TypeError, AttributeError):
        log.warning("%s does not parse: not counted as committed", ledger_path(name))
        return None


def _snapshot(snapshot: int) -> str:
    return f"{SNAPSHOTS}/{snapshot:06d}.parquet"


def _pinned(entries: pa.Table) -> pa.Table:
    yes = pa.array(np.ones(len(entries), np.bool_))
    return entries.set_column(ENTRIES.get_field_index("pinned"), ENTRIES.field("pinned"), yes)


def _to_parquet(entries: pa.Table) -> bytes:
    """Sorted by shard, so that who reads one shard fetches a few row groups."""
    sink = io.BytesIO()
    by_shard = entries.sort_by([("shard", "ascending"), ("recording_id", "ascending"), ("index", "ascending")])
    pq.write_table(by_shard, sink, compression="zstd", row_group_size=50_000)
    return sink.getvalue()


def _from_parquet(raw: bytes | None) -> pa.Table | None:
    try:
        return pq.read_table(pa.BufferReader(raw or b""), schema=ENTRIES)
    except (pa.ArrowInvalid, OSError):
        return None


def _differ(before: Any, now: Any) -> bool:
    return before is not None and now is not None and before != now


class _Groups:
    """The recordings in sorted winners: `starts` and `sizes` of their runs of rows, and which are `complete`."""

    def __init__(self, entries: pa.Table) -> None:
        self.starts = np.flatnonzero(begins(entries, "recording_id"))
        self.sizes = np.diff(np.append(self.starts, len(entries)))
        index = _numpy(entries["index"])
        self.rank = np.arange(len(entries)) - np.repeat(self.starts, self.sizes)
        # Indices are distinct and sorted, so a Unit at its own rank has all others before it.
        never = np.iinfo(np.int64).max
        ends = np.where(_numpy(entries["is_last"]) & (index == self.rank), self.rank, never)
        self.last = np.minimum.reduceat(ends, self.starts) if len(self.starts) else np.zeros(0, np.int64)
        self.complete: NDArray[np.bool_] = self.last < never

    def counted(self) -> NDArray[np.bool_]:
        """[rows] the Units up to the last one, of complete recordings and of partial ones."""
        counted: NDArray[np.bool_] = self.rank <= np.repeat(self.last, self.sizes)
        return counted

    def any(self, rows: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return self.sum(rows.astype(np.int64)) > 0

    def sum(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.add.reduceat(rows, self.starts) if len(self.starts) else np.zeros(0, np.int64)


def begins(entries: pa.Table, *columns: str) -> NDArray[np.bool_]:
    """[rows] whether a row differs from the one before it in any of `columns`."""
    begins = np.zeros(len(entries), np.bool_)
    begins[:1] = True
    for name in columns:
        column = entries[name]
        begins[1:] |= _numpy(pc.not_equal(column.slice(1), column.slice(0, max(0, len(column) - 1))))
    return begins


def _numpy(column: pa.ChunkedArray) -> NDArray[Any]:
    values: NDArray[Any] = column.to_numpy()
    return values
