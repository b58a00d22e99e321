"""What a run still has to do, in the order and the portions in which it is handed out.

    Listing (all that was asked for)  -  ledger  =  Todo  →  Blocks (an object in the output; Ray gets places in it)

The longest recordings first: one of ten hours begun last would leave a cluster waiting for it alone. Nothing here
grows with the manifest but some twenty bytes a recording: items wait in temporary files, are compared with the ledger
some ten thousand at a time, and reach a decode task from the store, past the driver. Knows the ledger, nothing of Ray.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import uuid
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from cryptography.fernet import Fernet
from numpy.typing import NDArray

from pipeline.entries import begins
from pipeline.errors import StoreError
from pipeline.ledger import Ledger
from pipeline.pieces import portions, read_rows
from pipeline.schema import RECORDING
from pipeline.store import Store
from pipeline.types import SAMPLE_RATE, Recording

MAX_ROWS, MAX_S = 32, 600  # of one block
MAX_TASKS = (
    2_000  # decode tasks of a pass: each costs the driver 40 KB and Ray 10 ms; beyond, a task has several blocks
)
FOLDER = "_run/todo"

_FEW = 2_048  # recordings that are objects at a time
_MANY = 65_536  # rows of Arrow data that are looked at together, some 20 MB
_PAGE = 512  # recordings that are packed together, some 30 KB; a block is a part of a page

# Addresses of what can only be had by reading all that lies before it.
_READ_THROUGH = r"(?i)^parquet://|^tar://.*\.(tgz|gz|bz2|xz|zst)(\?|$)"

# Bytes of a second of audio, to guess a length from a size: 16 kHz int16, half of that, 96 kbit/s for the rest.
_BYTES_PER_S = {"wav|aiff": 32_000, "flac": 16_000}
_OTHER_BYTES_PER_S = 12_000

_FIELDS = tuple(field.name for field in dataclasses.fields(Recording))
ITEM = pa.schema(
    [
        *RECORDING,
        pa.field("done", pa.list_(pa.int32())),  # see `Item`
        pa.field("gap_start", pa.int64()),
    ]
)


PLACE = ("start", "stop", "first", "last")  # of a block; see `Source.read`


@dataclass(frozen=True, slots=True)
class Item:
    """A recording and what of it is done."""

    recording: Recording
    done: frozenset[int] = frozenset()  # its Units that are committed already
    # Where the first Unit that is not done begins: there a failure is booked if the audio cannot be read any more.
    # None: it is not booked, as in a retry, where one stands already.
    gap_start: int | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """What is to do, as far as hints and sizes tell."""

    inputs: int
    missing: int
    hinted_s: float  # by the manifest's own lengths
    guessed_s: float  # by sizes, where it gives no length
    unknown: int  # recordings of which neither is known

    @property
    def audio_s(self) -> float | None:
        """Seconds to do; None where the length of some is not known at all."""
        return None if self.unknown else self.hinted_s + self.guessed_s


def to_json(recording: Recording) -> str:
    return json.dumps(dataclasses.asdict(recording))


def from_json(text: str) -> Recording:
    return Recording(**json.loads(text))


# ---- what is to do


class Listing:
    """All recordings that a run was asked for, in the order given."""

    def __init__(self, recordings: Iterable[Recording]) -> None:
        self._spool = _Spool()
        for some in _few(recordings):
            self._spool.append(_table([Item(recording) for recording in some]))

    def __len__(self) -> int:
        return self._spool.n_rows

    def tables(self) -> Iterator[pa.Table]:
        """Tables of `ITEM`."""
        return self._spool.tables()

    def recordings(self) -> Iterator[Recording]:
        return (item.recording for table in self.tables() for item in _items(table))


class Todo:
    """The items of one pass, in the order they were listed in; `put` orders them and hands them out."""

    def __init__(self, tables: Iterable[pa.Table], n_listed: int | None = None) -> None:
        self._spool = _Spool()
        lengths, neighbours = [np.zeros(0)], [np.zeros(0, np.bool_)]
        hinted, total, unknown = 0.0, 0.0, 0
        for table in tables:
            hint, length_s = _lengths(table)
            hinted += pc.sum(hint).as_py() or 0.0
            total += pc.sum(length_s).as_py() or 0.0
            unknown += length_s.null_count
            lengths.append(pc.fill_null(length_s, 0.0).to_numpy())
            neighbours.append(pc.match_substring_regex(table["uri"], _READ_THROUGH).to_numpy())
            self._spool.append(table)
        self._are_neighbours = np.concatenate(neighbours)
        self._length_s = np.where(self._are_neighbours, 0.0, np.concatenate(lengths))  # 0: listed order is kept
        n_listed = len(self) if n_listed is None else n_listed
        self.estimate = Estimate(n_listed, len(self), hinted, total - hinted, unknown)

    @classmethod
    def of(cls, items: Iterable[Item]) -> Todo:
        return cls(map(_table, _few(items)))

    def __len__(self) -> int:
        return self._spool.n_rows

    def tables(self) -> Iterator[pa.Table]:
        """Tables of `ITEM`."""
        return self._spool.tables()

    @contextmanager
    def put(self, store: Store, tasks: int, max_rows: int = MAX_ROWS) -> Iterator[Blocks]:
        """The items in blocks of at most `max_rows` recordings and MAX_S seconds, a longer recording alone.

        The longest first, those of unknown length after them in the order given. Few items make smaller blocks, so
        that each of `tasks` decode tasks has several to take. What lies in one packed shard or Parquet file stays
        together, in the order given and in larger blocks: who reads the last of it reads all of it.

        The blocks are one object of `store`, there until the body ends; whoever calls this holds the output's lease,
        so what else lies in its folder is a dead driver's.
        """
        for name in store.sizes(FOLDER):
            store.delete(f"{FOLDER}/{name}")
        share = max(1, len(self) // (4 * tasks))
        most = np.where(self._are_neighbours & (max_rows >= MAX_ROWS), min(share, _PAGE), min(share, max_rows))
        source = Source(store, f"{FOLDER}/{uuid.uuid4().hex}", Fernet.generate_key())
        try:
            with tempfile.NamedTemporaryFile() as file:
                places = [np.zeros((0, len(PLACE)), np.int64), *self._write(file, source, most)]
                file.flush()
                store.put_file(source.name, Path(file.name))
            blocks = Blocks(source, np.concatenate(places))
            yield blocks
        finally:
            with suppress(StoreError):  # the next pass will
                store.delete(source.name)

    def _write(self, file: Any, source: Source, most: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Write the items page by page; the places of each page's blocks. `most`: items of a block with that one."""
        start = 0
        for table, rows in self._in_order():
            for first in range(0, len(table), _PAGE):
                stop = start + file.write(source.pack(table.slice(first, _PAGE)))
                of_page = rows[first : first + _PAGE]
                bounds = [0, *_cuts(self._length_s[of_page], most[of_page]), len(of_page)]
                yield np.array([(start, stop, *pair) for pair in pairwise(bounds)], np.int64)
                start = stop

    def _in_order(self) -> Iterator[tuple[pa.Table, NDArray[np.intp]]]:
        """The items sorted, with their numbers in the order given, some ten thousand at a time: each goes to the file
        of its part of the whole first, by its rank."""
        order = np.argsort(-self._length_s, kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        parts = [_Spool() for _ in range(0, len(order), _MANY)]
        at = 0
        for table in self._spool.tables():
            part_of = rank[at : at + len(table)] // _MANY
            at += len(table)
            for part in np.unique(part_of).tolist():
                parts[part].append(table.filter(pa.array(part_of == part)))
        for number, part in enumerate(parts):
            sorted_rows = order[number * _MANY : (number + 1) * _MANY]
            table = pa.concat_tables(part.tables()).combine_chunks()
            # The part holds its rows as they were listed; their places in it are the ranks of their numbers.
            yield table.take(pa.array(np.argsort(np.argsort(sorted_rows)))), sorted_rows


def missing(listed: Listing, ledger: Ledger | None) -> Todo:
    """Of `listed`, those that are neither done nor failed; the Units that a killed run left of them stay.

    Without a ledger nothing is done yet.
    """
    if ledger is None:
        return Todo(listed.tables(), len(listed))
    known = ledger.recordings()
    begun = _units_done(ledger, _of_status(known, "partial"))

    def left() -> Iterator[pa.Table]:
        for table in listed.tables():
            was = known.take(pc.index_in(table["id"], known["recording_id"]))
            is_open = pc.fill_null(pc.equal(was["status"], "partial"), True)
            yield _with_done(table.filter(is_open), begun)

    return Todo(left(), len(listed))


def failed(listed: Listing | None, ledger: Ledger) -> Todo:
    """The failed ones among `listed`, or (None) all that the ledger knows, with the Units of each that are well."""
    ids = _of_status(ledger.recordings(), "failed")
    well = _units_done(ledger, ids, ledger.next_round())
    if listed is None:
        committed = map(_table, _few(Item(recording) for recording in _committed(ledger, ids)))
        return Todo(_with_done(table, well) for table in committed)
    tables = (table.filter(pc.is_in(table["id"], ids)) for table in listed.tables())
    return Todo((_with_done(table, well) for table in tables), len(listed))


def again(of: Listing | Todo, ledger: Ledger, round: int) -> Todo:
    """What is left to do of these recordings in the run, or the retry, that has begun with them in `round`."""
    return Todo(_open(table, ledger, round) for table in of.tables())


def _open(table: pa.Table, ledger: Ledger, round: int) -> pa.Table:
    done = _units_done(ledger, table["id"], round)
    whole = done.filter(done["is_whole"])["id"]
    return _with_done(table.filter(pc.invert(pc.is_in(table["id"], whole))), done)


def _of_status(recordings: pa.Table, status: str) -> pa.ChunkedArray:
    return recordings.filter(pc.equal(recordings["status"], status))["recording_id"]


def _units_done(ledger: Ledger, ids: pa.ChunkedArray, round: int = 0) -> pa.Table:
    """`id`, `done`, `gap_start` and whether it `is_whole`, of each of these recordings of which any Unit is done.

    All that count are done for a run; for a retry (a later `round` than the ledger's) those that are well or were
    committed in it.
    """
    units, is_retry = ledger.winners, round > ledger.round
    is_done = pc.or_(units["ok"], pc.greater_equal(units["round"], round if is_retry else 0))
    units = units.filter(pc.and_(is_done, pc.is_in(units["recording_id"], ids))).combine_chunks()
    starts = np.flatnonzero(begins(units, "recording_id"))
    sizes = np.diff(starts, append=len(units))
    index, n_samples, is_last = (units[name].to_numpy() for name in ("index", "n_samples", "is_last"))
    # Indices are distinct and sorted: before the first gap, and only there, each is its own rank.
    has_all_before = index == np.arange(len(units)) - np.repeat(starts, sizes)
    in_front = _per_group(np.where(has_all_before, n_samples, 0), starts)
    columns = {
        "id": units["recording_id"].take(pa.array(starts)),
        "done": pa.ListArray.from_arrays(pa.array([*starts, len(units)], pa.int32()), pa.array(index, pa.int32())),
        "gap_start": pa.nulls(len(starts), pa.int64()) if is_retry else pa.array(in_front),
        "is_whole": pa.array(_per_group((is_last & has_all_before).astype(np.int64), starts) > 0),
    }
    return pa.table(columns)


def _per_group(rows: NDArray[np.int64], starts: NDArray[np.intp]) -> NDArray[np.int64]:
    return np.add.reduceat(rows, starts) if len(starts) else np.zeros(0, np.int64)


def _with_done(table: pa.Table, done: pa.Table) -> pa.Table:
    """`table` with what `_units_done` says of its rows; null where it says nothing."""
    found = done.take(pc.index_in(table["id"], done["id"]))
    for name in ("done", "gap_start"):
        table = table.set_column(ITEM.get_field_index(name), ITEM.field(name), found[name])
    return table


def _committed(ledger: Ledger, ids: pa.ChunkedArray) -> Iterator[Recording]:
    """The recordings as they were committed: with all of their manifest line, the address without its secrets."""
    mine = pc.and_(pc.is_in(ledger.winners["recording_id"], ids), pc.equal(ledger.winners["index"], 0))
    for portion in portions(ledger.winners.filter(mine)):
        for row in read_rows(ledger.store, portion)["recording"].to_pylist():
            yield Recording(**row)


# ---- lengths


def _lengths(table: pa.Table) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Seconds of each row as its manifest says, and these or a guess from the size; null where nothing is known."""
    length = pc.divide(pc.cast(table["length"], pa.float64()), float(SAMPLE_RATE))
    hint = pc.coalesce(length, table["duration_s"])
    per_s = pa.scalar(float(_OTHER_BYTES_PER_S))
    for endings, rate in _BYTES_PER_S.items():
        is_one = pc.match_substring_regex(table["uri"], rf"(?i)^[^?]*\.({endings})(\?|::|$)")
        per_s = pc.if_else(is_one, float(rate), per_s)
    return hint, pc.coalesce(hint, pc.divide(pc.cast(table["size"], pa.float64()), per_s))


def _cuts(length_s: NDArray[np.float64], most: NDArray[np.int64]) -> Iterator[int]:
    """Where the blocks of items of these lengths end, but for the last one."""
    start, total_s = 0, 0.0
    for at, (its_s, its_most) in enumerate(zip(length_s.tolist(), most.tolist(), strict=True)):
        if at > start and (at - start >= its_most or total_s + its_s > MAX_S):
            yield at
            start, total_s = at, 0.0
        total_s += its_s


# ---- handing it out


@dataclass(frozen=True, slots=True)
class Source:
    """Where the blocks of a pass lie; small, and sent to workers.

    They are encrypted with a key of this pass alone: addresses may be signed, and an output holds no secret.
    """

    store: Store
    name: str
    key: bytes = dataclasses.field(repr=False)

    def pack(self, page: pa.Table) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, ITEM) as writer:
            writer.write_table(page)
        return Fernet(self.key).encrypt(zlib.compress(sink.getvalue(), 1))

    def read(self, start: int, stop: int, first: int, last: int) -> list[Item]:
        """The items of a block: rows [first, last) of the page in the bytes [start, stop).

        Raises `StoreError` where the object cannot be had.
        """
        packed = self.store.get_range(self.name, start, stop)
        if packed is None:
            raise StoreError(f"{self.store}/{self.name} is gone: did another driver take over?")
        page = pa.ipc.open_stream(zlib.decompress(Fernet(self.key).decrypt(packed))).read_all()
        return list(_items(page.slice(first, last - first)))


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a pass, the longest recordings first."""

    source: Source
    places: NDArray[np.int64]  # [n, 4], what `Source.read` takes

    def __len__(self) -> int:
        return len(self.places)

    def tables(self) -> list[pa.Table]:
        """What each decode task is given: rows of what `Source.read` takes, one but in very large passes.

        There every task gets its share of the longest ones, and begins with them.
        """
        shares = (self.places[first::MAX_TASKS] for first in range(min(MAX_TASKS, len(self))))
        return [pa.table(list(share.T), PLACE) for share in shares]


# ---- recordings as Arrow data


def _few(items: Iterable[Any]) -> Iterator[list[Any]]:
    """`items` in lists of _FEW."""
    some: list[Any] = []
    for item in items:
        some.append(item)
        if len(some) == _FEW:
            yield some
            some = []
    if some:
        yield some


_fields_of = attrgetter(*_FIELDS)


def _table(items: Sequence[Item]) -> pa.Table:
    columns = dict(zip(_FIELDS, zip(*(_fields_of(item.recording) for item in items), strict=True), strict=True))
    columns["done"] = tuple(sorted(item.done) for item in items)
    columns["gap_start"] = tuple(item.gap_start for item in items)
    return pa.table([pa.array(columns[field.name], field.type) for field in ITEM], schema=ITEM)


def _items(table: pa.Table) -> Iterator[Item]:
    for row in (row for batch in table.to_batches(_FEW) for row in batch.to_pylist()):
        done, gap_start = row.pop("done"), row.pop("gap_start")
        yield Item(Recording(**row), frozenset(done or ()), gap_start)


class _Spool:
    """Tables of `ITEM` in a temporary file: first all written, then read as often as wanted, some at a time."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the spool
        weakref.finalize(self, self._file.close)
        self._writer = pa.ipc.new_stream(self._file, ITEM, options=pa.ipc.IpcWriteOptions(compression="lz4"))
        self.n_rows = 0

    def append(self, table: pa.Table) -> None:
        self._writer.write_table(table, max_chunksize=_MANY)
        self.n_rows += len(table)

    def tables(self) -> Iterator[pa.Table]:
        """Everything in tables of up to _MANY rows; one of no rows where there is nothing."""
        self._writer.close()
        self._file.seek(0)
        batches: list[pa.RecordBatch] = []
        n_rows = 0
        with pa.ipc.open_stream(self._file) as reader:
            for batch in reader:
                if n_rows + len(batch) > _MANY:
                    yield pa.Table.from_batches(batches, ITEM)
                    batches, n_rows = [], 0
                batches.append(batch)
                n_rows += len(batch)
        yield pa.Table.from_batches(batches, ITEM)
