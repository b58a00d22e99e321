"""An output folder: whose run it is, and what it was asked for.

    _run/config.json         the first run's settings, their fingerprint, the number of shards: never changed
    _run/inputs/N.parquet    what run N was asked for

What was done is the ledger's (`pipeline.ledger`), who may do it the lease's (`pipeline.lease`).
"""

from __future__ import annotations

import json
import posixpath
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import fingerprint
from pipeline.errors import OutputError, OutputMismatchError, StoreError
from pipeline.manifest import public_uri
from pipeline.store import Store
from pipeline.types import Recording

CONFIG = "_run/config.json"
INPUTS = "_run/inputs"
LEDGER = "_run/ledger"
PROBE = "probe-"  # names of objects that were only put to see whether that can be done
TABLES = ("segments", "words", "recordings")
SUCCESS = "_SUCCESS"

INPUT_ROWS = pa.schema(
    [
        pa.field("recording_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("size", pa.int64()),
        pa.field("etag", pa.string()),
        pa.field("duration_s", pa.float64()),
    ]
)
_INPUTS_PER_WRITE = 10_000


@dataclass(frozen=True, slots=True)
class Run:
    """`_run/config.json`: what every run into this output has in common."""

    model: str
    model_revision: str | None
    fingerprint: str  # of `keys`
    keys: dict[str, Any]  # what a result depends on, as resolved: also the dtype and the weights' fingerprint
    settings: dict[str, Any]  # the first run's, all of them
    n_shards: int  # files per table
    format: int = 1


@dataclass(frozen=True, slots=True)
class Output:
    """An output folder and the run that it belongs to; small, and sent to workers."""

    store: Store
    run: Run

    @property
    def has_words(self) -> bool:
        """Whether the run asked for word times."""
        return self.run.settings.get("chunk_level") == "word"


def open_output(
    uri: str,
    *,
    settings: Mapping[str, Any],
    keys: Mapping[str, Any],
    model: str,
    model_revision: str | None,
    n_shards: int,
) -> Output:
    """The output folder for a run with these settings, begun where it is new.

    `keys` are the settings that a result depends on, as resolved (`config.fingerprint_keys`, the dtype and the
    weights' fingerprint among them). In a folder that was begun before, `settings` and `n_shards` stay as they were.
    Raises `OutputError` where nothing can be written or tables of unknown origin lie there, `OutputMismatchError`
    where it was begun with other `keys`.
    """
    store = Store.at(uri)
    try:
        _probe(store)
        run = _read_run(store)
        if run is None:
            _refuse_foreign(store)
            run = _begin(store, Run(model, model_revision, fingerprint(keys), dict(keys), dict(settings), n_shards))
    except StoreError as error:
        raise OutputError(f"output {store}: {error}") from None
    refuse_mismatch(store, run, keys)
    return Output(store, run)


def read_output(uri: str) -> Output:
    """An output folder that was begun before, for reading; raises `OutputError` where there is none."""
    store = Store.at(uri)
    try:
        run = _read_run(store)
    except StoreError as error:
        raise OutputError(f"output {store}: {error}") from None
    if run is None:
        raise OutputError(f"output {store}: no run was begun here ({CONFIG} is missing)")
    return Output(store, run)


def _probe(store: Store) -> None:
    name = f"_run/{PROBE}{uuid.uuid4().hex}"
    try:
        store.put(name, b"can this be written?\n")
        store.delete(name)
    except StoreError as error:  # without the probe's name, which means nothing to anybody
        reason = str(error).removeprefix(f"cannot write {store}/{name}: ")
        raise OutputError(f"output {store}: cannot write there: {reason}") from None


def _read_run(store: Store) -> Run | None:
    raw = store.get(CONFIG)
    try:
        return None if raw is None else Run(**json.loads(raw))
    except (ValueError, TypeError):
        return None  # half written when its first run was killed: nothing was done yet, or `_refuse_foreign` sees it


def _begin(store: Store, run: Run) -> Run:
    """Write the configuration unless another driver just has: then its is the one."""
    raw = json.dumps(asdict(run), indent=2, ensure_ascii=False).encode()
    if not store.create(CONFIG, raw) and _read_run(store) is None:
        store.put(CONFIG, raw)
    begun = _read_run(store)
    if begun is None:
        raise OutputError(f"output {store}: {CONFIG} was written and cannot be read")
    return begun


def _refuse_foreign(store: Store) -> None:
    """Tables or a ledger without the configuration they were made with: not ours, or damaged."""
    there = [folder for folder in (*TABLES, LEDGER) if store.sizes(folder)]
    if there:
        raise OutputError(f"output {store} holds {', '.join(there)} but no readable {CONFIG}: choose another folder")


def refuse_mismatch(store: Store, run: Run, keys: Mapping[str, Any]) -> None:
    """Raises `OutputMismatchError` that names the keys in which `keys` differ from those the output was begun with."""
    keys, unset = _plain(keys), "(not set)"
    differing = [
        f"{key}: {run.keys.get(key, unset)!r} there, {keys.get(key, unset)!r} here"
        for key in sorted(run.keys.keys() | keys.keys())
        if run.keys.get(key, unset) != keys.get(key, unset)
    ]
    if differing:
        raise OutputMismatchError(
            f"output {store} was begun with other settings: {'; '.join(differing)}; go on with those, or give another"
            " --output"
        )


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` as it comes back from JSON: lists for tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(value))
    return plain


# ---- the inputs of a run


def write_inputs(store: Store, recordings: Iterable[Recording]) -> int:
    """Record what this run is asked for and return how many; streams, so that a manifest of any length fits.

    Whatever `recordings` raises passes through, and the list before this one stays the newest.
    """
    following = max(map(number, store.sizes(INPUTS)), default=0) + 1
    count = 0
    with tempfile.NamedTemporaryFile(suffix=".parquet") as whole:  # one that breaks off must not become the newest
        with pq.ParquetWriter(whole.name, INPUT_ROWS, compression="zstd") as writer:
            for rows in _batches(map(_input_row, recordings), _INPUTS_PER_WRITE):
                writer.write_table(pa.Table.from_pylist(rows, schema=INPUT_ROWS))
                count += len(rows)
        store.put_file(f"{INPUTS}/{following:06d}.parquet", Path(whole.name))
    return count


def read_input_ids(store: Store) -> Iterator[list[str]]:
    """The ids of the newest list of inputs, some thousands at a time; nothing where no run wrote one."""
    name = newest_inputs(store)
    if name is None:
        return
    with store.open(name) as file:
        for batch in pq.ParquetFile(file).iter_batches(_INPUTS_PER_WRITE, columns=["recording_id"]):
            yield batch.column(0).to_pylist()


def newest_inputs(store: Store) -> str | None:
    """The newest list of inputs that was written to its end."""
    for name in sorted(store.sizes(INPUTS), key=number, reverse=True):
        with store.open(f"{INPUTS}/{name}") as file:
            try:
                pq.ParquetFile(file)
            except pa.ArrowInvalid:
                continue
        return f"{INPUTS}/{name}"
    return None


def _input_row(recording: Recording) -> dict[str, Any]:
    return {
        "recording_id": recording.id,
        "source": recording.source,
        "uri": public_uri(recording.uri),
        "size": recording.size,
        "etag": recording.etag,
        "duration_s": recording.duration_s,
    }


def _batches(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def number(name: str) -> int:
    """The number in the name of an input list or a snapshot; -1 for a file that is neither."""
    stem = posixpath.splitext(name)[0]
    return int(stem) if stem.isdecimal() else -1
