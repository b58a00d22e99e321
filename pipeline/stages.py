"""The callables that Ray Data runs in its workers: each a few lines over a pure function, and the row between them.

    decode: todo rows → rows of one Unit each      EngineStage: rows of Units → rows to commit

Every batch crosses as an Arrow table with a schema of ours, so that no column's type hangs on what happens to be in
a block: an all-null column is typed, a block of equal lengths is like any other. PCM is `binary` (the int16 samples'
own bytes, little-endian) and not Ray's tensor type, which differs between ragged and uniform blocks; read back with
`np.frombuffer` it is as zero-copy. A Unit of 7,200 s is 230 MB, far below binary's 2 GiB a block.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import Config
from pipeline.engine import Engine, EngineConfig, load_engine
from pipeline.engine.fake import Faults
from pipeline.errors import AudioError, ConfigError, EngineError, ModelError, failure_of
from pipeline.schema import UNITS, to_table, unit_row
from pipeline.stitch import failed_unit
from pipeline.todo import from_json, to_json
from pipeline.types import Failure, Recording, Unit, UnitResult
from pipeline.units import read_units

log = logging.getLogger(__name__)

UNIT_ROW = pa.schema(
    [
        ("recording", pa.string()),
        ("index", pa.int32()),
        ("start", pa.int64()),
        ("is_last", pa.bool_()),
        ("pcm", pa.binary()),  # null: decoding failed
        ("speech", pa.binary()),
        ("language_pcm", pa.binary()),
        ("flags", pa.list_(pa.string())),
        ("failure", pa.string()),  # JSON of every field of `Failure`
    ]
)


def decode(todo: pa.Table, config: Config, faults: Faults | None = None) -> Iterator[pa.Table]:
    """One row for each Unit still to be done of the recordings in `todo`; what cannot be read is a row too.

    Every recording is read from its start, also where some of its Units are done: only so are they cut the same way.
    """
    for row in todo.to_pylist():
        recording, done = from_json(row["recording"]), frozenset(row["done"])
        for item in _still_to_do(_read(recording, config, faults), done, row["gap_start"]):
            yield pa.Table.from_pylist([unit_to_row(item)], schema=UNIT_ROW)


def _still_to_do(
    items: Iterable[Unit | UnitResult], done: frozenset[int], gap_start: int | None
) -> Iterator[Unit | UnitResult]:
    """Those of `items` that are not `done`.

    Audio that can no longer be read ends the recording where the first Unit is missing, or it would stay unfinished.
    """
    for item in items:
        if item.index not in done:
            yield item
        elif isinstance(item, UnitResult) and gap_start is not None:
            gap = next(i for i in range(len(done) + 1) if i not in done)
            yield dataclasses.replace(item, index=gap, start=gap_start)


def _read(recording: Recording, config: Config, faults: Faults | None) -> Iterator[Unit | UnitResult]:
    try:
        if faults is not None:
            faults.inject(recording.id, "decode")
    except AudioError as error:
        yield UnitResult(recording, 0, is_last=True, start=0, n_samples=0, failure=failure_of(error, "decode"))
    else:
        yield from read_units(recording, config)


def fail_before_commit(units: pa.Table, faults: Faults) -> None:
    """Injects the faults of stage `sink`: called when the data object is put and the ledger object is not."""
    for recording_id in units["recording_id"].unique().to_pylist():
        faults.inject(recording_id, "sink")


class EngineStage:
    """One engine in a process of its own. Ray calls it with several batches at once; their Units share its lanes."""

    def __init__(self, config: Config, engine: EngineConfig) -> None:
        self._options = config.decode_options()
        self._engine: Engine | ModelError
        try:
            self._engine = load_engine(engine)
            log.info("engine: %s", self._engine.info)
        except ModelError as error:
            # Raised here it would reach the driver as text inside a dead actor's traceback; from a call it arrives.
            self._engine = error

    async def __call__(self, units: pa.Table) -> pa.Table:
        """One row of `schema.UNITS` for each row of `units`, in order."""
        if isinstance(self._engine, ModelError):
            raise self._engine
        results = await asyncio.gather(*(self._result(row, self._engine) for row in rows_of(units)))
        return to_table((unit_row(result) for result in results), UNITS)

    async def _result(self, row: Mapping[str, Any], engine: Engine) -> UnitResult:
        item = unit_from_row(row)
        if isinstance(item, UnitResult):
            return item
        try:
            return await engine.submit(item, self._options)
        except (EngineError, ConfigError) as error:  # the latter: what a manifest line asks of this model
            return failed_unit(item, failure_of(error, "engine"))


def unit_to_row(item: Unit | UnitResult) -> dict[str, Any]:
    """A row of `UNIT_ROW`; a `UnitResult` is a recording that could not be decoded."""
    row = {
        "recording": to_json(item.recording),
        "index": item.index,
        "start": item.start,
        "is_last": item.is_last,
        "flags": list(item.flags),
    }
    if isinstance(item, UnitResult):
        return row | {"failure": json.dumps(dataclasses.asdict(item.failure)) if item.failure else None}
    return row | {name: _bytes(getattr(item, name)) for name in ("pcm", "speech", "language_pcm")}


def unit_from_row(row: Mapping[str, Any]) -> Unit | UnitResult:
    """What `unit_to_row` made the row of; the arrays are read-only views of the row's buffers."""
    common = {
        "recording": from_json(row["recording"]),
        "index": row["index"],
        "start": row["start"],
        "is_last": row["is_last"],
        "flags": tuple(row["flags"]),
    }
    if row["pcm"] is None:
        # A failed recording's row has no samples, wherever in it decoding ended.
        return UnitResult(n_samples=0, failure=Failure(**json.loads(row["failure"])), **common)
    return Unit(
        pcm=np.frombuffer(row["pcm"], np.int16),
        speech=_array(row["speech"], np.uint8),
        language_pcm=_array(row["language_pcm"], np.int16),
        **common,
    )


def rows_of(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows of a table, with `binary` values as buffers instead of copies."""
    for i in range(table.num_rows):
        yield {name: _value(table.column(name)[i]) for name in table.column_names}


def _value(scalar: pa.Scalar) -> Any:
    return scalar.as_buffer() if pa.types.is_binary(scalar.type) and scalar.is_valid else scalar.as_py()


def _bytes(array: np.ndarray[Any, Any] | None) -> bytes | None:
    return None if array is None else np.ascontiguousarray(array).tobytes()


def _array(buffer: Any, dtype: type[np.generic]) -> Any:
    return None if buffer is None else np.frombuffer(buffer, dtype)
