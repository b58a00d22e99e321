"""Is everything there, and is it what was written? The tables against `_SUCCESS`, the data objects against the ledger.

`check` only reads, and may be run at any time: what changes while it looks is looked at again. `repair` holds the
output as a driver does. It writes damaged tables again; a damaged data object it voids, so that the Units in it are not
done any more and the same `murmur transcribe` does them, and only them, again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.entries import begins, to_numpy
from pipeline.errors import EXIT_FAILED, EXIT_OK
from pipeline.finalize import SCHEMAS, Success, finalize, read_success, table_paths
from pipeline.lease import Lease
from pipeline.ledger import SNAPSHOTS, Ledger, read_whole_snapshot
from pipeline.output import LEDGER, SUCCESS, Output, number
from pipeline.pieces import DATA, data_path, pieces_of, read_pieces
from pipeline.types import SAMPLE_RATE
from pipeline.void import void

_SHARDS_AT_ONCE = 2  # a file of each is held in memory
_ROWS_AT_ONCE = 100_000


@dataclass(frozen=True, slots=True)
class Damage:
    """One file or object that is not what it should be."""

    path: str
    what: str  # is wrong with it
    shard: int | None = None  # of the tables


@dataclass(frozen=True, slots=True)
class Findings:
    """What `check` saw, and what `repair` did about it."""

    tables: tuple[Damage, ...]
    data: tuple[Damage, ...]  # objects that a Unit of the tables lies in
    strays: tuple[str, ...]  # files among the tables that are not ours: readers take them for tables
    n_files: int  # of tables, checked
    n_pieces: int  # of data objects, checked
    orphans: int  # data objects that no ledger object names: of writers that were killed, or that write now
    half_written: int  # ledger objects and snapshots that do not parse: as above
    to_redo: int = 0  # Units that repair took for not done
    repaired: bool = False

    @property
    def is_well(self) -> bool:
        return not (self.tables or self.data or self.strays)

    @property
    def exit_code(self) -> int:
        mended = self.repaired and not self.strays and not self.to_redo
        return EXIT_OK if self.is_well or mended else EXIT_FAILED

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"well": self.is_well}

    def lines(self, uri: str) -> Iterator[str]:
        """What a person is told of the output at `uri`."""
        for one in (*self.tables, *self.data):
            yield f"damaged: {one.path} {one.what}" + ("" if one.shard is None else f" (shard {one.shard})")
        for path in self.strays:
            yield f"not ours: {path}; readers take it for a part of the table, move it elsewhere"
        well = ": all is as it was written" if self.is_well else ""
        yield f"{self.n_files} files of tables and {self.n_pieces} pieces of committed data were checked{well}"
        if stale := self.orphans + self.half_written:
            objects = "1 object that nobody needs" if stale == 1 else f"{stale} objects that nobody needs"
            yield f"{objects}: murmur clean {uri}"
        if self.to_redo:
            yield f"{self.to_redo} Units are not done any more: the same `murmur transcribe` does them again"
        if self.repaired:
            yield "the tables hold all that is committed"
        elif not self.is_well:
            yield f"put it right with: murmur verify {uri} --repair"


def check(output: Output) -> Findings:
    """Read all that is there. Raises `StoreError` where the store refuses."""
    names = set(output.store.sizes(DATA))  # before the ledger: what is committed meanwhile is no orphan
    ledger = Ledger.read(output.store, output.run.n_shards)
    data, n_pieces = _check_data(output, ledger)
    tables, n_files = _check_tables(output)
    return Findings(
        tables=tuple(tables),
        data=tuple(data),
        strays=tuple(_strays(output)),
        n_files=n_files,
        n_pieces=n_pieces,
        orphans=len(names - _named(ledger)),
        half_written=len(ledger.half) + sum(1 for _ in _half_snapshots(output)),
    )


def repair(output: Output, *, use_ray: bool = False) -> Findings:
    """`check`, and put right what can be. Raises `OutputHeldError` where a live driver holds the output."""
    with Lease.acquire(output.store) as lease:
        found = check(output)
        ledger = Ledger.read(output.store, output.run.n_shards)
        n_units, damaged = len(ledger.winners), list(found.data)
        while damaged:  # another attempt at a Unit may come up in its place, and be damaged too
            lease.check()
            void(output.store, "damaged", data={_name(one.path) for one in damaged})
            ledger.refresh()
            damaged, _ = _check_data(output, ledger)
        shards = {one.shard for one in found.tables if one.shard is not None}
        finalize(output, use_ray=use_ray, lease=lease, rewrite=shards)
        left = check(output)
    return Findings(
        tables=found.tables,
        data=found.data,
        strays=left.strays,
        n_files=left.n_files,
        n_pieces=left.n_pieces,
        orphans=left.orphans,
        half_written=left.half_written,
        to_redo=n_units - len(ledger.winners),
        repaired=not (left.tables or left.data),
    )


# ---- the data objects


def _check_data(output: Output, ledger: Ledger) -> tuple[list[Damage], int]:
    """What is wrong with the objects that winners lie in, and how many pieces of them were looked at."""
    seen, n_pieces = _damaged_pieces(output, ledger.winners)
    if seen:  # unless they were merged and removed since the ledger was read
        ledger.refresh()
        still = ledger.winners.filter(pc.is_in(ledger.winners["data"], pa.array(list(seen), pa.string())))
        seen, _ = _damaged_pieces(output, still)
    return [Damage(data_path(name), what) for name, what in sorted(seen.items())], n_pieces


def _damaged_pieces(output: Output, entries: pa.Table) -> tuple[dict[str, str], int]:
    """By name of their object, the first thing wrong with each; and how many pieces there are."""
    entries = entries.select(["data", "start", "stop", "sha256"])
    entries = entries.sort_by([("data", "ascending"), ("start", "ascending")])
    entries = entries.filter(pa.array(begins(entries, "data", "start")))
    found: dict[str, str] = {}
    for at in range(0, len(entries), _ROWS_AT_ONCE):
        for piece, raw in read_pieces(output.store, pieces_of(entries.slice(at, _ROWS_AT_ONCE))):
            damage = piece.damage(raw)
            if damage is not None:
                found.setdefault(piece.data, damage)
    return found, len(entries)


def _named(ledger: Ledger) -> set[str]:
    """The file names of all data objects that the ledger knows."""
    names = {name.removesuffix(".json") for name in ledger.store.sizes(LEDGER)}
    return {f"{name}.arrow" for name in names.union(ledger.winners["data"].unique().to_pylist())}


def _half_snapshots(output: Output) -> Iterator[str]:
    for name in output.store.sizes(SNAPSHOTS):
        if read_whole_snapshot(output.store, number(name)) is None:
            yield name


def _name(path: str) -> str:
    return path.rsplit("/", 1)[1].removesuffix(".arrow")


# ---- the tables


def _check_tables(output: Output) -> tuple[list[Damage], int]:
    """What is wrong with the files that `_SUCCESS` vouches for. Where it has changed since, finalize was at work."""
    while True:
        success = read_success(output.store)
        if success is None:
            return list(_without_success(output)), 0
        shards = [shard for shard in range(success.n_shards) if shard not in success.rewriting]
        with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
            found = list(chain.from_iterable(pool.map(partial(_check_shard, output, success), shards)))
        if not found or read_success(output.store) == success:
            return found, len(success.files)


def _without_success(output: Output) -> Iterator[Damage]:
    if output.store.get(SUCCESS) is not None:
        yield Damage(SUCCESS, "does not parse")
    elif any(output.store.sizes(table) for table in SCHEMAS):
        yield Damage(SUCCESS, "is gone, and there are tables")


def _check_shard(output: Output, success: Success, shard: int) -> list[Damage]:
    tables: dict[str, pa.Table] = {}
    damages = []
    for table, path in table_paths(output, shard).items():
        said = success.files.get(path)
        found = _checked_file(output, table, path, said) if said else f"{SUCCESS} does not name it"
        if isinstance(found, str):
            damages.append(Damage(path, found, shard))
        else:
            tables[table] = found
    if "recordings" in tables:
        broken = _broken_laws(tables, shard, output)
        damages += [Damage(table_paths(output, shard)[table], what, shard) for table, what in broken]
    return damages


def _checked_file(output: Output, table: str, path: str, said: dict[str, Any]) -> pa.Table | str:
    """The columns that laws speak of, or what is wrong with the file."""
    raw = output.store.get(path)
    if raw is None:
        return "is gone"
    if len(raw) != said["bytes"]:
        return f"has {len(raw)} bytes, not {said['bytes']}"
    if hashlib.sha256(raw).hexdigest() != said["sha256"]:
        return "has other bytes than were written (SHA-256)"
    try:
        file = pq.ParquetFile(pa.BufferReader(raw))
        if not file.schema_arrow.equals(SCHEMAS[table]):
            return "has another schema"
        if file.metadata.num_rows != said["rows"]:
            return f"has {file.metadata.num_rows} rows, not {said['rows']}"
        return file.read(_COLUMNS[table])
    except (pa.ArrowInvalid, OSError) as error:
        return f"cannot be read ({error})"


_COLUMNS = {
    "recordings": ["recording_id", "duration_s", "decoded_s", "skipped_s", "n_segments", "n_words"],
    "segments": ["recording_id", "segment_id"],
    "words": ["recording_id", "segment_id", "word_id"],
}


def _broken_laws(tables: dict[str, pa.Table], shard: int, output: Output) -> Iterator[tuple[str, str]]:
    """(table, what does not hold) for whole files of one shard."""
    recordings = tables["recordings"]
    ids = recordings["recording_id"]
    if not _ascend(ids):
        yield "recordings", "is not sorted by recording_id, or has one twice"
    if any(schema.shard_of(name, output.run.n_shards) != shard for name in ids.to_pylist()):
        yield "recordings", "has recordings of another shard"
    sums = to_numpy(pc.add(recordings["decoded_s"], recordings["skipped_s"])) - to_numpy(recordings["duration_s"])
    if np.any(np.abs(sums) > 0.5 / SAMPLE_RATE):
        yield "recordings", "has rows in which decoded_s + skipped_s is not duration_s"
    counted: tuple[tuple[str, str, str], ...] = (("segments", "segment_id", "n_segments"),)
    if output.has_words:
        counted += (("words", "word_id", "n_words"),)
    for table, key, count in counted:
        if table in tables and not _joins(recordings, tables[table], key, count):
            yield table, f"does not join recordings: its rows are not those that {count} counts, in order"


def _ascend(ids: pa.ChunkedArray) -> bool:
    """Whether each is greater than the one before it."""
    values = ids.combine_chunks()
    return bool(pc.all(pc.less(values.slice(0, max(0, len(values) - 1)), values.slice(1)), min_count=0).as_py())


def _joins(recordings: pa.Table, rows: pa.Table, key: str, count: str) -> bool:
    """Whether `rows` are, for each recording in turn, 0 ... n - 1 in the column `key`."""
    counts = to_numpy(recordings[count])
    ids = recordings["recording_id"].take(pa.array(np.repeat(np.arange(len(recordings)), counts)))
    first = np.cumsum(counts) - counts
    numbers = np.arange(len(ids)) - np.repeat(first, counts)
    return bool(
        len(rows) == len(ids)
        and pc.all(pc.equal(rows["recording_id"], ids), min_count=0).as_py()
        and np.array_equal(to_numpy(rows[key]), numbers)
    )


def _strays(output: Output) -> Iterator[str]:
    ours = {path for shard in range(output.run.n_shards) for path in table_paths(output, shard).values()}
    for table in SCHEMAS:
        for name in sorted(output.store.sizes(table)):
            if f"{table}/{name}" not in ours:
                yield f"{table}/{name}"
