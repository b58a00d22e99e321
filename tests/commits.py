"""Unit results to commit, and an output to commit them to; no engine and no audio."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.finalize import Success
from pipeline.ledger import SNAPSHOTS, Committed, Ledger, commit
from pipeline.output import SUCCESS, Output, open_output
from pipeline.schema import UNITS, to_table, unit_row
from pipeline.stitch import stitch
from pipeline.store import Store
from pipeline.types import SAMPLE_RATE, Failure, Recording, Segment, Skip, UnitResult, Word

UNIT = 10 * SAMPLE_RATE  # every Unit of these tests is 10 s long

OPEN = {
    "settings": {"model": "demo", "chunk_level": "segment"},
    "keys": {"model": "demo", "chunk_length_s": 10, "suppress_tokens": (-1,)},
    "model": "demo",
    "model_revision": None,
    "n_shards": 3,
}


def begin(store: Store, **changes: Any) -> Output:
    return open_output(store.uri, **{**OPEN, **changes})


def segment(text: str, start: float = 0.0, words: bool = False, **fields: Any) -> Segment:
    spoken = [Word(f" {word}", start + i * 0.5, start + i * 0.5 + 0.4, 0.9) for i, word in enumerate(text.split())]
    plain: dict[str, Any] = {
        "end": start + 2.0,
        "tokens": (1, 2, 50364),
        "avg_logprob": -0.25,
        "compression_ratio": 1.5,
        "no_speech_prob": 0.125,
        "temperature": 0.0,
        "language": "en",
        "language_probability": 0.75,
        "words": tuple(spoken) if words else (),
    }
    return Segment(start=start, text=text, **{**plain, **fields})


def ok(name: str, index: int = 0, last: bool = True, text: str | None = None, **fields: Any) -> UnitResult:
    """Unit `index` of the recording `name`, with one segment."""
    said = f" {name} unit {index}." if text is None else text
    plain: dict[str, Any] = {
        "recording": Recording(id=name, uri=f"s3://bucket/{name}.wav", source=f"list.jsonl:{len(name)}"),
        "segments": (segment(said, start=index * 10.0),),
        "skipped": (Skip(index * UNIT + 8 * SAMPLE_RATE, (index + 1) * UNIT, "silence"),),
        "speech": 5 * SAMPLE_RATE,
        "uncovered_speech": 0,
        "language": "en",
        "language_probability": 0.75,
        "n_windows": 1,
        "start": index * UNIT,
        "n_samples": UNIT,
    }
    return UnitResult(index=index, is_last=last, **{**plain, **fields})


def failed(name: str, index: int = 0, last: bool = True, kind: str = "engine", **fields: Any) -> UnitResult:
    """Unit `index` of the recording `name`, which was decoded and not transcribed."""
    failure = Failure(kind=kind, message=f"{kind} said no", stage="engine")
    return ok(name, index, last, **{"segments": (), "skipped": (), "failure": failure, **fields})


def unreadable(name: str, message: str = "no frames", kind: str = "damaged_audio") -> UnitResult:
    """What a file that no decoder can read gives."""
    failure = Failure(kind=kind, message=message, stage="decode", attempts=2)
    return UnitResult(Recording(id=name, uri=name), index=0, is_last=True, start=0, n_samples=0, failure=failure)


def table(results: Iterable[UnitResult]) -> pa.Table:
    return to_table([unit_row(result) for result in results], UNITS)


def put(store: Store, *results: UnitResult, name: str | None = None, round: int = 0) -> Committed:
    return commit(store, table(results), OPEN["n_shards"], name=name, round=round)


def read_ledger(store: Store) -> Ledger:
    return Ledger.read(store, OPEN["n_shards"])


def winner(ledger: Ledger, name: str, index: int = 0) -> str:
    """The name of the object that this Unit is taken from."""
    rows = [r for r in ledger.winners.to_pylist() if (r["recording_id"], r["index"]) == (name, index)]
    assert len(rows) == 1
    return str(rows[0]["object"])


def read_table(store: Store, name: str) -> list[dict[str, Any]]:
    """All rows of a public table, file by file in the order of their names."""
    rows: list[dict[str, Any]] = []
    for file in sorted(store.sizes(name)):
        rows += pq.read_table(pa.BufferReader(store.get(f"{name}/{file}"))).to_pylist()
    return rows


def texts(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    return {row["recording_id"]: row["text"] for row in rows}


# ---- very many recordings

KINDS = [ok("a", flags=("f",)), ok("b", language="de"), unreadable("c"), ok("d", uncovered_speech=SAMPLE_RATE)]


def many(output: Output, n: int) -> Output:
    """`output` (of one shard) with the tables of `n` recordings of `KINDS`, in turn, and the snapshot that they are of;
    written straight away, since committing and stitching so many takes minutes."""
    turn = pa.array(np.arange(n) % len(KINDS))
    ids = pa.array([f"recording-{i:06d}" for i in range(n)])
    whole = [stitch([result]) for result in KINDS]
    about = {"model": "demo", "model_revision": None, "options_fingerprint": output.run.fingerprint}
    put(output.store, *KINDS)
    tables = {
        "recordings": schema.to_table([schema.recording_row(one, **about) for one in whole], schema.RECORDINGS),
        "segments": schema.to_table([row for one in whole for row in schema.segment_rows(one)], schema.SEGMENTS),
        SNAPSHOTS: read_ledger(output.store).winners,
    }
    for name, few in tables.items():
        rows = few.take(pc.min_element_wise(turn, len(few) - 1)).set_column(*_column(few, "recording_id", ids))
        if name == SNAPSHOTS:
            rows = rows.set_column(*_column(rows, "pinned", pa.array([True] * n)))
        file = "000001.parquet" if name == SNAPSHOTS else "part-00000-of-00001.parquet"
        Path(output.store.uri, name).mkdir(exist_ok=True)
        pq.write_table(rows, Path(output.store.uri, name, file))
    counts = {"inputs": 0, "ok": 0, "failed": 0, "skipped": 0, "missing": 0, "unlisted": n}
    output.store.put(SUCCESS, Success(True, [], counts, 0.0, "demo", None, "", 1, 1, {}, {}).to_bytes())
    return output


def _column(table: pa.Table, name: str, values: pa.Array) -> tuple[int, pa.Field, pa.Array]:
    return table.schema.get_field_index(name), table.schema.field(name), values
