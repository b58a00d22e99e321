"""Rows about committed Units: which of two attempts wins, and which recordings are whole. Pure, on Arrow tables.

A Unit that was committed twice has one winner: one that is `ok` beats one that failed (so a retry can mend); among
equals the one in the newest snapshot, else the smallest object name; but among failed ones the latest round of
retries. The same rows give the same winners in whatever order they come.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

# One row per Unit: what a ledger object says of it, which object that is, and where the Unit's row lies now.
ENTRIES = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("recording_id", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("is_last", pa.bool_(), nullable=False),
        pa.field("ok", pa.bool_(), nullable=False),
        pa.field("kind", pa.string()),  # of the failure
        pa.field("n_samples", pa.int64(), nullable=False),
        pa.field("size", pa.int64()),  # of the input, as is `etag`, where a listing told
        pa.field("etag", pa.string()),
        pa.field("object", pa.string(), nullable=False),  # NAME of the commit
        pa.field("round", pa.int32(), nullable=False),  # 0: the run itself; 1, 2 ...: retries of what failed
        pa.field("pinned", pa.bool_(), nullable=False),
        pa.field("data", pa.string(), nullable=False),  # NAME of the data object: `object`, until they are merged
        pa.field("start", pa.int64(), nullable=False),  # the piece of it, in bytes, that holds the row
        pa.field("stop", pa.int64(), nullable=False),
        pa.field("sha256", pa.binary(32), nullable=False),  # of the piece
        # To be shown, never to decide by; null in entries of before there were such columns.
        pa.field("stage", pa.string()),  # of the failure, as is `attempts`
        pa.field("attempts", pa.int32()),
        pa.field("at", pa.float64()),  # when it was committed, in seconds since 1970
        *(pa.field(name, pa.float32()) for name in ("source_s", "decode_s", "vad_s", "engine_s")),  # `types.Spent`
        pa.field("commit_s", pa.float32()),  # its share of putting the data object
    ]
)

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
    first = begins(entries, "recording_id", "index")
    if not first.all():
        entries = entries.filter(pa.array(first))
    pa.default_memory_pool().release_unused()  # of a large ledger the copies on the way are hundreds of megabytes
    return entries


def published(entries: pa.Table) -> pa.Table:
    """Of sorted winners, the Units of complete recordings: 0 ... k where k is the first that says it is the last."""
    groups = Groups(entries)
    return entries.filter(pa.array(groups.counted() & np.repeat(groups.complete, groups.sizes)))


def begins(entries: pa.Table, *columns: str) -> NDArray[np.bool_]:
    """[rows] whether a row differs from the one before it in any of `columns`."""
    begins = np.zeros(len(entries), np.bool_)
    begins[:1] = True
    for name in columns:
        column = entries[name]
        begins[1:] |= to_numpy(pc.not_equal(column.slice(1), column.slice(0, max(0, len(column) - 1))))
    return begins


def to_numpy(column: pa.ChunkedArray) -> NDArray[Any]:
    values: NDArray[Any] = column.to_numpy()
    return values


class Groups:
    """The recordings in sorted winners: `starts` and `sizes` of their runs of rows, and which are `complete`."""

    def __init__(self, entries: pa.Table) -> None:
        self.starts = np.flatnonzero(begins(entries, "recording_id"))
        self.sizes = np.diff(np.append(self.starts, len(entries)))
        index = to_numpy(entries["index"])
        self.rank = np.arange(len(entries)) - np.repeat(self.starts, self.sizes)
        # Indices are distinct and sorted, so a Unit at its own rank has all others before it.
        never = np.iinfo(np.int64).max
        ends = np.where(to_numpy(entries["is_last"]) & (index == self.rank), self.rank, never)
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
