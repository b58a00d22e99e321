"""Data objects: rows of `schema.DATA` as Arrow streams, one to an object or many in a row.

What a commit writes is one small stream. When thousands have come together they are merged: one object of many
streams, each with some rows of one shard in the order of the tables, so that who builds a shard reads a few ranges and
not every object. A stream is a *piece*: object, first byte, end, SHA-256. Every piece is checked against its hash
whenever it is read. Knows a store and `entries`; which rows count is the ledger's.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import schema
from pipeline.entries import begins, to_numpy
from pipeline.errors import StoreError
from pipeline.store import Store

DATA = "_run/data"

# Of a few rows in 60 columns, zstd and threads take six times as long, for 5 % fewer bytes.
_WRITE = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
_READ = pa.ipc.IpcReadOptions(use_threads=False)

_PIECE_ROWS = 256  # of a merged object: some 100 kB
_GROUP_OBJECTS = 2_000  # merged into one, at most,
_GROUP_BYTES = 16 << 20  # compressed: five to ten times that in memory
_PORTION_BYTES = 16 << 20  # of rows that are held at once when a shard is built
_REQUEST_BYTES = 4 << 20  # pieces that lie side by side are asked for together, up to so much


@dataclass(frozen=True, slots=True)
class Piece:
    data: str
    start: int
    stop: int
    sha256: bytes

    def damage(self, raw: bytes | None) -> str | None:
        """What is wrong with its bytes, in words; None if nothing is."""
        if raw is None:
            return "is gone"
        if len(raw) < self.stop - self.start:
            return "is damaged (cut short)"
        return None if hashlib.sha256(raw).digest() == self.sha256 else "is damaged (other bytes than were written)"


def data_path(name: str) -> str:
    return f"{DATA}/{name}.arrow"


def to_bytes(rows: pa.Table) -> bytes:
    """`rows` of `schema.DATA` as one stream."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, schema.DATA, options=_WRITE) as writer:
        writer.write_table(rows)
    return sink.getvalue()


def from_bytes(raw: bytes) -> pa.Table:
    with pa.ipc.open_stream(pa.py_buffer(raw), options=_READ) as reader:
        return reader.read_all()


def read_object(store: Store, name: str) -> pa.Table:
    """All rows of an object that was not merged."""
    raw = store.get(data_path(name))
    if raw is None:
        raise StoreError(f"{data_path(name)} is gone")
    return from_bytes(raw)


def pieces_of(entries: pa.Table) -> list[Piece]:
    """Where the rows of `entries` lie, every piece once, in the order of their objects."""
    columns = (entries[name].to_pylist() for name in ("data", "start", "stop", "sha256"))
    pieces = {Piece(*values) for values in zip(*columns, strict=True)}
    return sorted(pieces, key=lambda piece: (piece.data, piece.start))


def read_pieces(store: Store, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, bytes | None]]:
    """Each of `pieces`, sorted, with its bytes as they are: fewer where the object is short, None where it is gone."""
    requests = list(_requests(pieces))
    ranges = ((data_path(some[0].data), some[0].start, some[-1].stop) for some in requests)
    for some, (_, raw) in zip(requests, store.get_ranges(ranges), strict=True):
        for piece in some:
            at = piece.start - some[0].start
            yield piece, None if raw is None else raw[at : at + piece.stop - piece.start]


def read_rows(store: Store, entries: pa.Table) -> pa.Table:
    """The rows of `schema.DATA` that `entries` stand for, in their order.

    Not by their `shard`: a driver that lost the race to begin the output may have counted in other shards. Raises
    `StoreError` that names the object where one is gone or damaged.
    """
    keys = ("data", "start", "recording_id", "index")
    place = {key: row for row, key in enumerate(zip(*(entries[name].to_pylist() for name in keys), strict=True))}
    tables, found = [schema.DATA.empty_table()], np.full(len(entries), -1, np.int64)
    n_rows = 0
    for piece, raw in read_pieces(store, pieces_of(entries)):
        damage = piece.damage(raw)
        if damage or raw is None:
            raise StoreError(f"{data_path(piece.data)} {damage}; see `murmur verify`")
        table = from_bytes(raw)
        if not table.schema.equals(schema.DATA):
            raise StoreError(f"{data_path(piece.data)} was written by another version of Murmuration")
        for row, unit in enumerate(_units(table)):
            at = place.get((piece.data, piece.start, *unit))
            if at is not None and found[at] < 0:  # the first of two of the same Unit
                found[at] = n_rows + row
        tables.append(table)
        n_rows += len(table)
    lacking = np.flatnonzero(found < 0)
    if len(lacking):
        name = entries["data"][int(lacking[0])].as_py()
        raise StoreError(f"{data_path(name)} lacks {len(lacking)} committed Units; see `murmur verify`")
    return pa.concat_tables(tables).combine_chunks().take(pa.array(found))


def portions(entries: pa.Table) -> Iterator[pa.Table]:
    """`entries` of one shard, sorted, in parts of whole recordings whose rows fit in memory together."""
    data, start = entries["data"].to_pylist(), entries["start"].to_pylist()
    sizes = to_numpy(entries["stop"]) - to_numpy(entries["start"])
    _, which, count = np.unique(_numbers(zip(data, start, strict=True)), return_inverse=True, return_counts=True)
    filled = np.cumsum(sizes / count[which]) // _PORTION_BYTES if len(entries) else np.zeros(0)
    recordings = np.flatnonzero(begins(entries, "recording_id"))
    cuts = recordings[np.flatnonzero(np.diff(filled[recordings], prepend=-1.0))].tolist()
    for begin, end in itertools.pairwise([*cuts, len(entries)]):
        yield entries.slice(begin, end - begin)


# ---- merging


def groups(entries: pa.Table) -> Iterator[pa.Table]:
    """Of winners, those that lie in objects of their own, in the portions that `merge` takes."""
    loose = _loose(entries).sort_by("object")
    first = np.flatnonzero(begins(loose, "object"))
    size = (to_numpy(loose["stop"]) - to_numpy(loose["start"]))[first]
    begin, n_objects, n_bytes = 0, 0, 0
    for at, its in zip(first.tolist(), size.tolist(), strict=True):
        if n_objects and (n_objects == _GROUP_OBJECTS or n_bytes + its > _GROUP_BYTES):
            yield loose.slice(begin, at - begin)
            begin, n_objects, n_bytes = at, 0, 0
        n_objects, n_bytes = n_objects + 1, n_bytes + its
    if n_objects:
        yield loose.slice(begin)


def n_loose(entries: pa.Table) -> int:
    """How many objects of their own the rows of `entries` lie in."""
    return len(_loose(entries)["object"].unique())


def merge(store: Store, entries: pa.Table) -> pa.Table:
    """Write the rows of `entries` as one object, and return `entries` as they are now, in another order.

    The object counts from when a snapshot says that they lie there.
    """
    entries = entries.sort_by([(name, "ascending") for name in ("shard", "recording_id", "index")])
    rows, name, whole = read_rows(store, entries), uuid.uuid4().hex, io.BytesIO()
    starts, stops, hashes = [], [], []
    shards = np.flatnonzero(begins(entries, "shard")).tolist()
    for begin, end in itertools.pairwise([*shards, len(entries)]):
        for at in range(begin, end, _PIECE_ROWS):
            n = min(_PIECE_ROWS, end - at)
            raw = to_bytes(rows.slice(at, n))
            starts += [whole.tell()] * n
            whole.write(raw)
            stops += [whole.tell()] * n
            hashes += [hashlib.sha256(raw).digest()] * n
    store.put(data_path(name), whole.getvalue())
    now: dict[str, list[Any]] = {"data": [name] * len(entries), "start": starts, "stop": stops, "sha256": hashes}
    for column, values in now.items():
        at = entries.schema.get_field_index(column)
        field = entries.schema.field(at)
        entries = entries.set_column(at, field, pa.array(values, field.type))
    return entries


def _loose(entries: pa.Table) -> pa.Table:
    return entries.filter(pc.equal(entries["data"], entries["object"]))


def _requests(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Sorted pieces in runs that lie side by side."""
    some: list[Piece] = []
    for piece in pieces:
        joins = some and (some[-1].data, some[-1].stop) == (piece.data, piece.start)
        if some and not (joins and piece.stop - some[0].start <= _REQUEST_BYTES):
            yield some
            some = []
        some.append(piece)
    if some:
        yield some


def _units(table: pa.Table) -> Iterator[tuple[str, int]]:
    return zip(table["recording_id"].to_pylist(), table["index"].to_pylist(), strict=True)


def _numbers(keys: Iterator[Any]) -> list[int]:
    """A number for each key, the same for equal ones."""
    seen: dict[Any, int] = {}
    return [seen.setdefault(key, len(seen)) for key in keys]
