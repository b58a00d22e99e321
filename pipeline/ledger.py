"""What is committed, and so what is still to do. No rename, no append, no clock: objects that are put once.

    _run/data/NAME.arrow           rows of `schema.DATA`; nobody reads it without
    _run/ledger/NAME.json          its ledger object, put after it, which names it and says what is in it
    _run/snapshots/N.parquet       the winners when the tables were made the Nth time, pinned, and where their rows lie
    _run/void/NAME.json            what does not count any more, whoever says so

Which of two attempts at a Unit wins, `entries.winners` says. Three things follow for whoever tidies up here:

A snapshot stands for the ledger objects that it took account of: they are not read again, and may be removed once
*two* snapshots stand for them, so that one that is damaged later costs nothing. A reader that lists the ledger while
they are being removed misses them; so it looks for a newer snapshot after it has read, and then starts from that.

Data objects are merged (`pieces`) before a snapshot is pinned, which says where every row lies from then on. Until
it is, the merged object is one that nobody names, and the winners lie where they lay.

A data object that nobody names may be one whose writer sleeps, on a machine that was paused, say, and will put its
ledger object tomorrow. So it is voided first and removed after: the late ledger object then counts for nothing, and
its Units are simply not done. The same goes for a data object that was found damaged. A recording whose audio was
replaced is voided as of a round: Units that were committed in an earlier one do not count, whenever they come, and
runs from then on commit in that round or a later one.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.entries import ENTRIES, RECORDINGS, Groups, published, to_numpy, winners
from pipeline.output import LEDGER, number
from pipeline.pieces import data_path, to_bytes
from pipeline.store import Store
from pipeline.types import Recording
from pipeline.void import Void, void

log = logging.getLogger(__name__)

SNAPSHOTS = "_run/snapshots"

_SAID = ("recording_id", "index", "is_last", "ok", "kind", "n_samples", "size", "etag")
_SHOWN = ("stage", "attempts", "source_s", "decode_s", "vad_s", "engine_s")
_PARSED_ROWS = 4_096  # held as Python objects at once, 3 KB each


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

    `round` is `Ledger.round`, or `Ledger.next_round` for retries; `between` is called after the first put and is for
    fault injection. Raises `TypeError` with both schemas where `units` have another, `StoreError` where the store
    refuses.
    """
    units = schema.conform(units, schema.UNITS)
    if not units.num_rows:
        return Committed("")
    table = _with_shard(units, n_shards)
    name = name or uuid.uuid4().hex
    raw = to_bytes(table)
    began = time.monotonic()
    store.put(data_path(name), raw)
    clock = _rounded({"at": time.time(), "commit_s": (time.monotonic() - began) / table.num_rows})
    if between is not None:
        between(table)
    digest = hashlib.sha256(raw).hexdigest()
    store.put(ledger_path(name), to_ledger(name, table, round, bytes=len(raw), sha256=digest, **clock))
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
        self.void = Void()
        self.half: set[str] = set()  # ledger objects that did not parse the last time
        self._newest = 0  # number of the newest snapshot, also if it is half a one
        self._read: set[str] = set()  # objects that the winners take account of
        self._is_pinned = True  # whether the winners are what the snapshot says

    @classmethod
    def read(cls, store: Store, n_shards: int) -> Ledger:
        ledger = cls(store, n_shards)
        ledger.refresh()
        return ledger

    @property
    def round(self) -> int:
        """What a run commits under: 0 until recordings were to be read again."""
        return max(self.void.recordings.values(), default=0)

    def next_round(self) -> int:
        """What a retry commits under."""
        return max(int(pc.max(self.winners["round"]).as_py() or 0), self.round) + 1

    def refresh(self) -> int:
        """Read what was committed since; returns the number of objects. An unreadable one is being written now, or
        its writer was killed over it: it is not committed, and looked at again the next time."""
        count = 0
        while True:
            self._see_voids()
            self._rebase()
            count += self._read_new()
            if self._last_snapshot() <= self._newest:
                return count

    def pin(self, *, again: bool = False) -> int:
        """Write the winners as a snapshot, unless they are one (or even so: `again`), and return its number.

        From then on they stay, whatever is committed: tables made of a snapshot can be made again.
        """
        while again or not self._is_pinned or self.snapshot == 0:
            pinned, following = _pinned(self.winners), self._newest + 1
            created = self.store.create(snapshot_path(following), _to_parquet(pinned))
            # A number is free again when its snapshot was superseded and removed: who slept until then is too late.
            if created and self._last_snapshot() <= following:
                self.winners, self.snapshot, self._newest, self._is_pinned = pinned, following, following, True
                again = False
            else:
                self.refresh()  # another one was quicker: start from there
        return self.snapshot

    def move(self, entries: pa.Table) -> None:
        """Rows of winners lie elsewhere now, as `entries` say. It counts once it is pinned."""
        self.winners, self._is_pinned = winners(entries), False

    def covered(self) -> frozenset[str]:
        """The ledger objects that the winners take account of."""
        return frozenset(self._read)

    def read_again(self, ids: Collection[str], *, dry_run: bool = False) -> None:
        """Nothing that was committed of these recordings counts any more: other audio lies there now. With `dry_run`
        only this ledger takes it so."""
        recordings = dict.fromkeys(ids, self.next_round())
        if dry_run:
            self.winners = Void(recordings=recordings).without(self.winners)
        else:
            void(self.store, "other audio", recordings=recordings)
            self.refresh()

    def recordings(self) -> pa.Table:
        """One row of `RECORDINGS` for each recording that was begun, sorted by id."""
        groups = Groups(self.winners)
        counted = groups.counted()
        samples = np.where(counted, to_numpy(self.winners["n_samples"]), 0)
        failed = groups.any(counted & ~to_numpy(self.winners["ok"]))
        status = np.where(groups.complete, np.where(failed, 1, 0), 2)
        first = self.winners.take(pa.array(groups.starts))
        columns = {
            "recording_id": first["recording_id"],
            "shard": first["shard"],
            "status": pa.array(["ok", "failed", "partial"]).take(pa.array(status)),
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

    def _units(self, ids: set[str], *, only_ok: bool) -> dict[str, frozenset[int]]:
        mine = self.winners.filter(pc.is_in(self.winners["recording_id"], pa.array(ids, pa.string())))
        units: dict[str, set[int]] = {recording_id: set() for recording_id in ids}
        for row in mine.select(["recording_id", "index", "ok"]).to_pylist():
            if row["ok"] or not only_ok:
                units[row["recording_id"]].add(row["index"])
        return {recording_id: frozenset(indices) for recording_id, indices in units.items()}

    def _see_voids(self) -> None:
        """What counts no more may have beaten something that does: a new void makes the winners be read afresh."""
        seen = self.void.read(self.store)
        if seen is not self.void:
            self.winners, self.snapshot, self._read, self._is_pinned = ENTRIES.empty_table(), 0, set(), True
            self.void = seen

    def _rebase(self) -> None:
        """Start again from the newest snapshot that was written to its end, if it is newer than ours."""
        there = sorted(map(number, self.store.sizes(SNAPSHOTS)))
        self._newest = max([self._newest, *there])
        for one in reversed([one for one in there if one > self.snapshot]):
            pinned = read_whole_snapshot(self.store, one)
            if pinned is not None:
                valid = self.void.without(pinned)
                self.winners, self.snapshot = winners(valid), one
                self._read = set(pc.unique(valid["object"]).to_pylist())
                self._is_pinned = len(valid) == len(pinned)
                return

    def _read_new(self) -> int:
        new = sorted(name for name in self.store.sizes(LEDGER) if name.removesuffix(".json") not in self._read)
        tables: list[pa.Table] = []
        rows: list[dict[str, Any]] = []
        count = 0
        self.half = set()
        for path, raw in self.store.get_all(f"{LEDGER}/{name}" for name in new if name.endswith(".json")):
            name = path.rsplit("/", 1)[1].removesuffix(".json")
            found = _parse(name, raw, self.n_shards)
            if found is None:
                self.half.add(name)
                continue
            rows += found
            count += 1
            self._read.add(name)
            if len(rows) >= _PARSED_ROWS:
                tables.append(pa.Table.from_pylist(rows, schema=ENTRIES))
                rows = []
        if count:
            tables.append(pa.Table.from_pylist(rows, schema=ENTRIES))
            self.winners = winners(pa.concat_tables([self.winners, *map(self.void.without, tables)]))
            self._is_pinned = self._is_pinned and bool(pc.all(self.winners["pinned"], min_count=0).as_py())
        return count

    def _last_snapshot(self) -> int:
        return max(map(number, self.store.sizes(SNAPSHOTS)), default=0)


def read_whole_snapshot(store: Store, snapshot: int) -> pa.Table | None:
    """All rows of `ENTRIES` that a snapshot holds; None where it is gone or half a one."""
    try:
        return pq.ParquetFile(pa.BufferReader(store.get(snapshot_path(snapshot)) or b"")).read().cast(ENTRIES)
    except (pa.ArrowInvalid, ValueError, OSError):
        return None


def read_snapshot(store: Store, snapshot: int, shard: int) -> pa.Table:
    """The rows of `ENTRIES` of one shard that count: the Units of complete recordings, sorted by id and index."""
    with store.open(snapshot_path(snapshot)) as file:
        return published(winners(pq.read_table(file, schema=ENTRIES, filters=[("shard", "=", shard)])))


def to_ledger(name: str, table: pa.Table, round: int, **about: Any) -> bytes:
    """The ledger object for the data object `name` with the rows `table` (of `schema.DATA`)."""
    units = []
    columns = ["recording_id", "index", "is_last", "n_samples", "recording", "failure", "spent"]
    for row in table.select(columns).to_pylist():
        recording, failure, spent = row.pop("recording"), row.pop("failure"), row.pop("spent") or {}
        why = {key: failure[key] for key in ("kind", "stage", "attempts")} if failure else {"kind": None}
        its = {key: recording[key] for key in ("uri", "size", "etag")}
        units.append(row | {"ok": failure is None} | why | its | _rounded(spent))
    said = {"format": 1, "data": data_path(name), **about, "round": round, "units": units}
    return json.dumps(said, ensure_ascii=False).encode()


def _rounded(spent: Mapping[str, float | None]) -> dict[str, float]:
    return {stage: round(value, 6) for stage, value in spent.items() if value is not None}


def ledger_path(name: str) -> str:
    return f"{LEDGER}/{name}.json"


def _with_shard(units: pa.Table, n_shards: int) -> pa.Table:
    shards = [schema.shard_of(recording_id, n_shards) for recording_id in units["recording_id"].to_pylist()]
    return units.append_column(schema.DATA.field("shard"), pa.array(shards, pa.int32())).cast(schema.DATA)


def _parse(name: str, raw: bytes | None, n_shards: int) -> list[dict[str, Any]] | None:
    """The rows of `ENTRIES` that a ledger object stands for; None where it is half a one."""
    try:
        said = json.loads(raw or b"")
        piece = {"data": name, "start": 0, "stop": int(said["bytes"]), "sha256": bytes.fromhex(said["sha256"])}
        common = piece | {"object": name, "round": int(said["round"]), "pinned": False}
        common |= {"at": said.get("at"), "commit_s": said.get("commit_s")}
        return [
            {key: unit[key] for key in _SAID}
            | {key: unit.get(key) for key in _SHOWN}
            | {"shard": schema.shard_of(unit["recording_id"], n_shards)}
            | common
            for unit in said["units"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        log.warning("%s does not parse: not counted as committed", ledger_path(name))
        return None


def snapshot_path(snapshot: int) -> str:
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


def _differ(before: Any, now: Any) -> bool:
    return before is not None and now is not None and before != now
