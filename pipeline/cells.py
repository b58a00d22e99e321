"""Audio inside Parquet: which column it is in, and the bytes of one row at a time.

    parquet://ROW/COLUMN::FILE    rows count from 1; a column of bytes, or of `struct<bytes, path>` as `datasets` has it

A manifest is read without that column; a row's bytes are read by who decodes it, on from the row that was read last:
a row group may be larger than memory. Knows files that are open, and no store.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_ADDRESS = re.compile(r"parquet://([1-9]\d*)/(.+?)::(.+)", re.DOTALL)
_ROWS = 4  # that are held at a time, each with all of its audio
_BUFFER = 1 << 20  # bytes read at a time


class DamagedCellsError(ValueError):
    """A row that cannot be read; the text says why."""


@dataclass(frozen=True, slots=True)
class Address:
    """A cell of a Parquet file."""

    file: str
    column: str
    row: int

    def __str__(self) -> str:
        return f"parquet://{self.row}/{self.column}::{self.file}"


def parse(uri: str) -> Address | None:
    """The parts of a cell's address; None for any other."""
    found = _ADDRESS.fullmatch(uri)
    return Address(found[3], found[2], int(found[1])) if found else None


def audio_column(schema: pa.Schema, names: Collection[str]) -> pa.Field | None:
    """The column that holds audio itself: one of bytes under one of `names`, or the only one of `struct<bytes, ...>`.

    None where audio is only named. Raises `ValueError` where there are several.
    """
    structs = [column for column in schema if _is_struct_of_bytes(column.type)]
    found = structs or [column for column in schema if column.name in names and _is_bytes(column.type)]
    if len(found) > 1:
        raise ValueError(f"audio in several columns: {', '.join(column.name for column in found)}")
    return found[0] if found else None


def without_bytes(schema: pa.Schema, audio: pa.Field) -> list[str]:
    """The columns of a manifest with audio in it, but for that: what Parquet readers take as `columns`."""
    children = (
        [f"{audio.name}.{child.name}" for child in audio.type if child.name != "bytes"] if _has_path(audio) else []
    )
    return [column.name for column in schema if column.name != audio.name] + children


def has_bytes(file: pq.ParquetFile, group: int, audio: pa.Field) -> bool:
    """Whether any row of this row group may have audio in it; without statistics, all may."""
    rows = file.metadata.row_group(group)
    leaf = f"{audio.name}.bytes" if pa.types.is_struct(audio.type) else audio.name
    chunk = next(rows.column(i) for i in range(rows.num_columns) if rows.column(i).path_in_schema == leaf)
    known = chunk.is_stats_set and chunk.statistics.has_null_count
    return not (known and chunk.statistics.null_count == rows.num_rows)


class Cells:
    """One column of an open file; for any thread."""

    def __init__(self, file: Any, column: str) -> None:
        weakref.finalize(self, file.close)
        self._file = pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER)
        self._column = column
        if column not in self._file.schema_arrow.names:
            raise LookupError(f"no column {column!r}")
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])
        self._lock = threading.Lock()
        self._rows: Iterator[Any] = iter(())
        self._group, self._next = -1, 0  # the row group that `_rows` goes on in, and the row (from 0) it gives next

    def read(self, row: int) -> tuple[bytes | None, str | None]:
        """The audio of a row (from 1), and the path beside it. Raises `LookupError` or `DamagedCellsError`."""
        at = row - 1
        if not 0 <= at < self._starts[-1]:
            raise LookupError(f"no row {row}: there are {self._starts[-1]}")
        with self._lock:
            group = int(np.searchsorted(self._starts, at, side="right")) - 1
            if group != self._group or at < self._next:
                self._begin(group)
            try:
                while self._next <= at:
                    cell = next(self._rows)
                    self._next += 1
            except BaseException as error:
                self._group = -1  # half read: begun anew the next time
                is_arrows = isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)
                if not is_arrows:
                    raise
                raise DamagedCellsError(f"row {row} cannot be read ({str(error).splitlines()[0]})") from None
        value = cell.as_py()
        return (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)

    def _begin(self, group: int) -> None:
        batches = self._file.iter_batches(_ROWS, row_groups=[group], columns=[self._column])
        self._rows = (cell for batch in batches for cell in batch.column(0))
        self._group, self._next = group, int(self._starts[group])


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_struct_of_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and any(child.name == "bytes" and _is_bytes(child.type) for child in kind)


def _has_path(audio: pa.Field) -> bool:
    return pa.types.is_struct(audio.type) and any(child.name == "path" for child in audio.type)
