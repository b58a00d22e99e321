"""The ledger made into tables that anyone can read: `segments/`, `words/`, `recordings/`, and `_SUCCESS`.

    merge small data objects → pin a snapshot → `_SUCCESS` says what is being replaced → one file a table and shard
    → `_SUCCESS` says what is there

A shard holds the recordings whose id hashes to it, so a file's name never changes and only shards in which something
was committed are written again. May be run at any time, also while a run goes on, and killed at any time: the next
one starts from the same snapshot or a newer one. Only whole recordings are published. The law is checked at the end
on what the tables hold: inputs = ok + failed + skipped (+ missing), no id twice.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import math
import pickle
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import pieces, schema
from pipeline.entries import begins, published, to_numpy
from pipeline.errors import MurmurError, OutputHeldError, StoreError, failure_of
from pipeline.lease import FINALIZE_LEASE, Lease, holds
from pipeline.ledger import Ledger, read_snapshot
from pipeline.machine import give_memory_back
from pipeline.output import SUCCESS, Output, newest_inputs, read_input_ids
from pipeline.stitch import stitch
from pipeline.store import THREADS, Store
from pipeline.types import Skip, Transcript, UnitResult

log = logging.getLogger(__name__)
_T = TypeVar("_T")
_R = TypeVar("_R")

SCHEMAS = {"segments": schema.SEGMENTS, "words": schema.WORDS, "recordings": schema.RECORDINGS}
FORMAT = 2  # of the tables: a change here makes every shard be written again
MERGE_AT = 256  # data objects
_STATUSES = pa.schema([("recording_id", pa.string()), ("status", pa.string()), ("duration_s", pa.float64())])
_ROWS_PER_GROUP = 20_000

Files = dict[str, dict[str, Any]]  # path → rows, bytes, sha256


@dataclass(frozen=True, slots=True)
class Success:
    """`_SUCCESS`: what lies in the tables."""

    complete: bool  # every input of the newest run is in them
    rewriting: list[int]  # shards whose files are being replaced, by now or when the last writer was killed
    counts: dict[str, int]  # inputs, ok, failed, skipped, missing: of the newest run; unlisted: in no list any more
    audio_s: float  # of all recordings in the tables
    model: str
    model_revision: str | None
    options_fingerprint: str
    snapshot: int
    n_shards: int
    winners: dict[str, str]  # shard → hash of the names of the objects that its files were made of
    files: Files
    format: int = FORMAT

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False).encode()


@dataclass(frozen=True, slots=True)
class Build:
    """What every shard is built from; small, and sent to the workers."""

    output: Output
    snapshot: int
    leases: tuple[tuple[str, str], ...]  # name and token of those that must still be held before each put

    @property
    def store(self) -> Store:
        return self.output.store

    @property
    def n_shards(self) -> int:
        return self.output.run.n_shards

    def paths(self, shard: int) -> dict[str, str]:
        return table_paths(self.output, shard)


def table_paths(output: Output, shard: int) -> dict[str, str]:
    """Table → the file of this shard. Without word times there is one file of words, empty and typed."""
    tables = SCHEMAS if shard == 0 or output.has_words else ("segments", "recordings")
    return {table: f"{table}/part-{shard:05d}-of-{output.run.n_shards:05d}.parquet" for table in tables}


def finalize(
    output: Output,
    *,
    use_ray: bool = True,
    lease: Lease | None = None,
    wait_s: float = 600,
    rewrite: Collection[int] = (),
) -> Success:
    """Bring the tables up to what is committed, and return what `_SUCCESS` says then.

    `lease`: the run's, if this is its own driver; another finalize of the same output is waited for. `use_ray`
    builds the shards on the cluster that this process is connected to, else they are built here, one after another.
    `rewrite`: shards whose files are to be made again even if nothing says so.
    Raises `OutputHeldError` where a lease is lost, `StoreError` where the store refuses or a data object is damaged.
    """
    give_memory_back()  # what the run before has let go would be on top of what is needed here
    with Lease.acquire(output.store, FINALIZE_LEASE, wait_s=wait_s) as ours:
        ledger = Ledger.read(output.store, output.run.n_shards)
        _merge(ledger, use_ray)
        held = [ours, lease] if lease else [ours]
        build = Build(output, ledger.pin(), tuple((one.name, one.token) for one in held))
        units = published(ledger.winners).select(["shard", "recording_id", "index", "object"])
        del ledger  # all of a large one would be held while the shards are built
        return _bring_up(build, units, use_ray, rewrite)


def _merge(ledger: Ledger, use_ray: bool) -> None:
    """Data objects are read once here, and not once for every shard that has a Unit in them, now and ever after."""
    if pieces.n_loose(ledger.winners) < MERGE_AT:
        return
    groups = map(_pack, pieces.groups(ledger.winners))
    task = partial(_merge_group, ledger.store)
    merged = _on_ray(task, groups) if use_ray else map(task, groups)
    rest = ledger.winners.filter(pc.not_equal(ledger.winners["data"], ledger.winners["object"]))
    ledger.move(pa.concat_tables([rest, *map(_unpack, merged)]))


def _merge_group(store: Store, packed: bytes) -> bytes:
    return _pack(pieces.merge(store, _unpack(packed)))


def _pack(table: pa.Table) -> bytes:
    """Only the rows of a slice: pickled, it would bring along all that it was cut from."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _unpack(packed: bytes) -> pa.Table:
    with pa.ipc.open_stream(packed) as reader:
        return reader.read_all()


def _bring_up(build: Build, units: pa.Table, use_ray: bool, rewrite: Collection[int]) -> Success:
    before = read_success(build.store)
    winners = _winner_hashes(units, build.n_shards)
    touched = sorted({*_touched(build, before, winners), *rewrite})
    kept = {path for shard in set(range(build.n_shards)) - set(touched) for path in build.paths(shard).values()}
    files = {path: about for path, about in (before.files if before else {}).items() if path in kept}
    if touched:
        untouched = {shard: value for shard, value in winners.items() if int(shard) not in touched}
        counts, audio_s = (before.counts, before.audio_s) if before else ({}, 0.0)
        _put(build, _success(build, False, touched, counts, audio_s, untouched, files))
        files |= _build_on_ray(build, touched) if use_ray else _build_here(build, touched)
    counts, audio_s = _count(build, units)
    complete = counts["missing"] == 0 and newest_inputs(build.store) is not None
    success = _success(build, complete, [], counts, audio_s, winners, files)
    if touched or success != before:
        _put(build, success)
    return success


def read_success(store: Store) -> Success | None:
    """What `_SUCCESS` says; None where there is none, or half of one."""
    try:
        return Success(**json.loads(store.get(SUCCESS) or b""))
    except (ValueError, TypeError):
        return None


def build_shard(build: Build, shard: int) -> Files:
    """Write the files of one shard and return what `_SUCCESS` says of them.

    Holds a portion of the shard's committed rows, one recording as objects, and the finished files. Raises
    `StoreError` where a data object is gone or damaged, `OutputHeldError` before a put where a lease was lost.
    """
    units = read_snapshot(build.store, build.snapshot, shard)
    paths = build.paths(shard)
    parts = {table: _Part(SCHEMAS[table]) for table in paths}
    for transcript in transcripts(build.store, units):
        for table, part in parts.items():
            part.add(_rows(table, transcript, build))
    files = {}
    for table, path in paths.items():
        raw = parts[table].close()
        _check_leases(build)
        build.store.put(path, raw)
        files[path] = {"rows": parts[table].n_rows, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    return files


class _Part:
    """One file of a table, in the making."""

    def __init__(self, of: pa.Schema) -> None:
        self._schema, self._file = of, io.BytesIO()
        self._writer = pq.ParquetWriter(self._file, of, compression="zstd")
        self._rows: list[schema.Row] = []
        self.n_rows = 0

    def add(self, rows: Iterable[schema.Row]) -> None:
        self._rows.extend(rows)
        if len(self._rows) >= _ROWS_PER_GROUP:
            self._flush()

    def close(self) -> bytes:
        self._flush()
        self._writer.close()
        return self._file.getvalue()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(schema.to_table(self._rows, self._schema))
        self.n_rows += len(self._rows)
        self._rows = []


def _rows(table: str, transcript: Transcript, build: Build) -> Iterable[schema.Row]:
    run = build.output.run
    if table == "segments":
        return schema.segment_rows(transcript)
    if table == "words":
        return schema.word_rows(transcript) if build.output.has_words else ()
    row = schema.recording_row(
        transcript, model=run.model, model_revision=run.model_revision, options_fingerprint=run.fingerprint
    )
    return [row]


def transcripts(store: Store, units: pa.Table) -> Iterator[Transcript]:
    """The recordings that these entries of published Units are, in their order; a portion's rows are held at once."""
    for portion in pieces.portions(units):
        yield from _transcripts(pieces.read_rows(store, portion))


def _transcripts(rows: pa.Table) -> Iterator[Transcript]:
    starts = np.flatnonzero(begins(rows, "recording_id")).tolist()
    for start, stop in itertools.pairwise([*starts, len(rows)]):
        yield _stitched([schema.unit_from_row(row) for row in rows.slice(start, stop - start).to_pylist()])


def _stitched(results: Sequence[UnitResult]) -> Transcript:
    """The recording's Transcript. Units that do not belong together (its bytes were replaced half way, say) make a
    failed one: they may not cost the other recordings their tables."""
    try:
        return stitch(results)
    except ValueError as error:
        failure = failure_of(error, "sink")
        duration = max(result.start + result.n_samples for result in results)
        skipped = (Skip(0, duration, failure.kind),) if duration else ()
        return Transcript(results[0].recording, "failed", duration=duration, skipped=skipped, failure=failure)


def _build_here(build: Build, shards: Sequence[int]) -> Files:
    return {path: about for shard in shards for path, about in build_shard(build, shard).items()}


def _build_on_ray(build: Build, shards: Sequence[int]) -> Files:
    """As `_build_here`, one task a shard."""
    files: Files = {}
    for some in _on_ray(partial(build_shard, build), shards):
        files |= some
    return files


def _on_ray(task: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
    """`task` of each of `items`, as Ray Data runs them, in any order."""
    import ray.data

    rows = [{"item": pickle.dumps(item)} for item in items]
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _run_task, batch_size=1, fn_kwargs={"task": task}
    )
    del rows  # they lie in the object store now
    for row in done.iter_rows():
        result = pickle.loads(row["result"])
        if isinstance(result, MurmurError):
            raise result
        yield result


def _run_task(batch: dict[str, Any], task: Callable[[_T], _R]) -> dict[str, list[bytes]]:
    """Our own errors are results: as exceptions Ray would wrap them."""
    result: _R | MurmurError
    try:
        result = task(pickle.loads(batch["item"][0]))
    except (StoreError, OutputHeldError) as refusal:
        result = type(refusal)(str(refusal))
    return {"result": [pickle.dumps(result)]}


def _winner_hashes(units: pa.Table, n_shards: int) -> dict[str, str]:
    """For each shard a hash of which Units it publishes, and from which objects."""
    units = units.take(pc.sort_indices(units, [(name, "ascending") for name in ("shard", "recording_id", "index")]))
    length = pc.binary_length(units["recording_id"]).cast(pa.string())  # an id may hold whatever separates
    texts = [length, units["recording_id"], units["index"].cast(pa.string()), units["object"]]
    lines = pc.binary_join_element_wise(*texts, " ").combine_chunks()
    ends = np.searchsorted(to_numpy(units["shard"]), np.arange(n_shards), side="right").tolist()
    hashes = {}
    for shard, (begin, end) in enumerate(itertools.pairwise([0, *ends])):
        digest = hashlib.sha256(f"{FORMAT}".encode())
        for line in lines.slice(begin, end - begin).to_pylist():
            digest.update(f"{line}\n".encode())
        hashes[str(shard)] = digest.hexdigest()
    return hashes


def _touched(build: Build, before: Success | None, winners: dict[str, str]) -> list[int]:
    """The shards whose files are not, or not surely, what the winners give."""
    if before is None or before.format != FORMAT or before.n_shards != build.n_shards:
        return list(range(build.n_shards))
    there = {f"{table}/{name}": size for table in SCHEMAS for name, size in build.store.sizes(table).items()}
    return [
        shard
        for shard in range(build.n_shards)
        if shard in before.rewriting
        or before.winners.get(str(shard)) != winners[str(shard)]
        or any(before.files.get(path, {}).get("bytes", -1) != there.get(path) for path in build.paths(shard).values())
    ]


def _count(build: Build, units: pa.Table) -> tuple[dict[str, int], float]:
    """Count the recordings in the tables as they lie there now, against the newest list of inputs."""
    with ThreadPoolExecutor(THREADS) as pool:
        tables = pool.map(lambda shard: _read_statuses(build, shard), range(build.n_shards))
        rows = pa.concat_tables([_STATUSES.empty_table(), *tables])
    ids = rows["recording_id"]
    if pc.count_distinct(ids).as_py() < len(rows):
        raise StoreError(f"{build.store}: a recording is in the tables twice; run finalize again")
    known = units["recording_id"].unique()
    if len(known) != len(rows) or not pc.all(pc.is_in(ids, known), min_count=0).as_py():
        raise StoreError(f"{build.store}: the tables and the ledger hold different recordings; run finalize again")
    inputs = pa.chunked_array([pa.array(some, pa.string()) for some in read_input_ids(build.store)], pa.string())
    found = pc.index_in(inputs, ids.combine_chunks())
    statuses = pc.fill_null(rows["status"].take(found), "missing").value_counts().to_pylist()
    counts = dict.fromkeys(("inputs", "ok", "failed", "skipped", "missing", "unlisted"), 0)
    counts |= {pair["values"]: pair["counts"] for pair in statuses}
    counts["inputs"] = len(inputs)
    counts["unlisted"] = len(rows) - (len(inputs) - counts["missing"])
    return counts, round(math.fsum(rows["duration_s"].to_pylist()), 3)


def _read_statuses(build: Build, shard: int) -> pa.Table:
    path = build.paths(shard)["recordings"]
    try:
        with build.store.open(path) as file:
            return pq.ParquetFile(file).read(_STATUSES.names).cast(_STATUSES)
    except pa.ArrowInvalid as error:  # on a disk: one who wrongly believes to hold the lease puts it at this moment
        raise StoreError(f"{build.store}/{path} is half a file ({error}); run finalize again") from None


def _success(
    build: Build,
    complete: bool,
    rewriting: list[int],
    counts: dict[str, int],
    audio_s: float,
    winners: dict[str, str],
    files: Files,
) -> Success:
    run = build.output.run
    return Success(
        complete=complete,
        rewriting=rewriting,
        counts=counts,
        audio_s=audio_s,
        model=run.model,
        model_revision=run.model_revision,
        options_fingerprint=run.fingerprint,
        snapshot=build.snapshot,
        n_shards=build.n_shards,
        winners=winners,
        files=files,
    )


def _put(build: Build, success: Success) -> None:
    _check_leases(build)
    build.store.put(SUCCESS, success.to_bytes())


def _check_leases(build: Build) -> None:
    for name, token in build.leases:
        if not holds(build.store, name, token):
            raise OutputHeldError(f"output {build.store}: another driver took it over; its tables are left to that one")
