"""The Arrow schemas: what a Unit leaves behind when it is committed, and the three tables that a user reads.

    UNITS                            one row per `UnitResult`, everything in it; `unit_row` and `unit_from_row`
    RECORDINGS, SEGMENTS, WORDS      the public tables; `recording_row`, `segment_rows`, `word_rows`

Every table is built with one of these, never with types guessed from its rows: a column that happens to hold only
nulls or empty lists keeps its type, so any two files of a table can be read as one. `UNITS` counts samples and keeps
float64, so that it gives back the very same `UnitResult`; the public tables have seconds and stripped text. This
module knows neither a store nor Ray.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.manifest import public_uri
from pipeline.types import Failure, Recording, Segment, Skip, Spent, Transcript, UnitResult, Word, seconds

Row = dict[str, Any]


def _need(name: str, kind: pa.DataType) -> pa.Field:
    """A column without nulls."""
    return pa.field(name, kind, nullable=False)


def _list(kind: pa.DataType) -> pa.DataType:
    """A list without null items; `element` is what Parquet readers call an item."""
    return pa.list_(_need("element", kind))


_TEXTS = _list(pa.string())

RECORDING = pa.struct(
    [
        _need("id", pa.string()),
        _need("uri", pa.string()),  # public: no signature, no user info
        _need("source", pa.string()),
        pa.field("size", pa.int64()),
        pa.field("etag", pa.string()),
        pa.field("duration_s", pa.float64()),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("reference", pa.string()),
        pa.field("language", pa.string()),
        pa.field("task", pa.string()),
        pa.field("initial_prompt", pa.string()),
        pa.field("metadata", pa.string()),
    ]
)
_WORD = pa.struct(
    [
        _need("word", pa.string()),
        _need("start", pa.float64()),
        _need("end", pa.float64()),
        _need("probability", pa.float64()),
    ]
)
_SEGMENT = pa.struct(
    [
        _need("start", pa.float64()),
        _need("end", pa.float64()),
        _need("text", pa.string()),  # raw
        _need("tokens", _list(pa.int32())),
        _need("avg_logprob", pa.float64()),
        _need("compression_ratio", pa.float64()),
        _need("no_speech_prob", pa.float64()),
        _need("temperature", pa.float64()),
        pa.field("language", pa.string()),
        pa.field("language_probability", pa.float64()),
        _need("words", _list(_WORD)),
        _need("flags", _TEXTS),
        _need("channel", pa.int8()),
    ]
)
_SKIP = pa.struct([_need("start", pa.int64()), _need("stop", pa.int64()), _need("reason", pa.string())])
_FAILURE = pa.struct(
    [
        _need("kind", pa.string()),
        _need("message", pa.string()),
        _need("stage", pa.string()),
        _need("attempts", pa.int32()),
    ]
)
_SPENT = pa.struct([pa.field(name, pa.float64()) for name in ("source_s", "decode_s", "vad_s", "engine_s")])

UNITS = pa.schema(
    [
        _need("recording_id", pa.string()),
        _need("index", pa.int32()),
        _need("is_last", pa.bool_()),
        _need("start", pa.int64()),  # samples
        _need("n_samples", pa.int64()),
        _need("recording", RECORDING),
        _need("segments", _list(_SEGMENT)),
        _need("skipped", _list(_SKIP)),
        pa.field("speech", pa.int64()),
        pa.field("uncovered_speech", pa.int64()),
        pa.field("language", pa.string()),
        pa.field("language_probability", pa.float64()),
        _need("n_windows", pa.int32()),
        _need("n_fallbacks", pa.int32()),
        _need("tokens_generated", pa.int64()),
        _need("tokens_input", pa.int64()),
        _need("flags", _TEXTS),
        pa.field("failure", _FAILURE),
        _need("attempts", pa.int32()),
        pa.field("spent", _SPENT),  # differs from run to run: in no public table
    ]
)
# A committed data object: which file of the public tables a row will end in is known when it is written.
DATA = UNITS.append(_need("shard", pa.int32()))

SEGMENTS = pa.schema(
    [
        _need("recording_id", pa.string()),
        _need("segment_id", pa.int32()),
        _need("channel", pa.int8()),
        _need("start", pa.float64()),  # seconds, as is `end`
        _need("end", pa.float64()),
        _need("text", pa.string()),
        pa.field("language", pa.string()),
        pa.field("language_probability", pa.float32()),
        _need("avg_logprob", pa.float32()),
        _need("compression_ratio", pa.float32()),
        _need("no_speech_prob", pa.float32()),
        _need("temperature", pa.float32()),
        _need("tokens", _list(pa.int32())),
        _need("flags", _TEXTS),
    ]
)
WORDS = pa.schema(
    [
        _need("recording_id", pa.string()),
        _need("segment_id", pa.int32()),
        _need("word_id", pa.int32()),  # 0 ... within the recording
        _need("channel", pa.int8()),
        _need("start", pa.float64()),
        _need("end", pa.float64()),
        _need("word", pa.string()),
        _need("probability", pa.float32()),
    ]
)
_SKIPPED = pa.struct([_need("start", pa.float64()), _need("end", pa.float64()), _need("reason", pa.string())])
RECORDINGS = pa.schema(
    [
        _need("recording_id", pa.string()),
        _need("uri", pa.string()),
        _need("status", pa.string()),  # ok, failed or skipped
        pa.field("language", pa.string()),
        pa.field("language_probability", pa.float32()),
        _need("duration_s", pa.float64()),
        _need("decoded_s", pa.float64()),
        _need("skipped_s", pa.float64()),
        pa.field("speech_s", pa.float64()),  # null: no VAD was run
        pa.field("uncovered_speech_s", pa.float64()),
        _need("skipped", _list(_SKIPPED)),
        _need("text", pa.string()),
        _need("n_segments", pa.int32()),
        _need("n_words", pa.int32()),
        _need("n_windows", pa.int32()),
        _need("n_fallbacks", pa.int32()),
        _need("flags", _TEXTS),
        pa.field("error_kind", pa.string()),
        pa.field("error_message", pa.string()),
        pa.field("error_stage", pa.string()),
        _need("attempts", pa.int32()),
        pa.field("reference", pa.string()),
        _need("model", pa.string()),
        pa.field("model_revision", pa.string()),
        _need("options_fingerprint", pa.string()),
        pa.field("metadata", pa.string()),  # a JSON object
        _need("offset_s", pa.float64()),  # where in the file at `uri` it begins: not 0 for a manifest's slice
    ]
)


def shard_of(recording_id: str, n_shards: int) -> int:
    """The file of each table that holds this recording, 0 ... n_shards - 1: a hash of the id's UTF-8 bytes."""
    digest = hashlib.blake2b(recording_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % n_shards


def unit_row(result: UnitResult) -> Row:
    """`result` as a row of `UNITS`. All of it is kept, but the uri loses its secrets."""
    row = dataclasses.asdict(_public(result))
    return {"recording_id": result.recording.id, **row}


def unit_from_row(row: Mapping[str, Any]) -> UnitResult:
    """The `UnitResult` that `unit_row` made `row` of (columns that it did not make are ignored)."""
    failure, spent = row["failure"], row.get("spent")
    return UnitResult(
        recording=Recording(**row["recording"]),
        segments=tuple(_segment(segment) for segment in row["segments"]),
        skipped=tuple(Skip(**skip) for skip in row["skipped"]),
        flags=tuple(row["flags"]),
        failure=None if failure is None else Failure(**failure),
        spent=None if spent is None else Spent(**spent),
        **{name: row[name] for name in _PLAIN},
    )


_NESTED = {"recording", "segments", "skipped", "flags", "failure", "spent"}
_PLAIN = [field.name for field in dataclasses.fields(UnitResult) if field.name not in _NESTED]


def _segment(row: Mapping[str, Any]) -> Segment:
    words = tuple(Word(**word) for word in row["words"])
    return Segment(**{**row, "tokens": tuple(row["tokens"]), "words": words, "flags": tuple(row["flags"])})


def _public(result: UnitResult) -> UnitResult:
    recording = dataclasses.replace(result.recording, uri=public_uri(result.recording.uri))
    return dataclasses.replace(result, recording=recording)


def recording_row(transcript: Transcript, *, model: str, model_revision: str | None, options_fingerprint: str) -> Row:
    """The row of `RECORDINGS` for `transcript`."""
    recording, failure = transcript.recording, transcript.failure
    return {
        "recording_id": recording.id,
        "uri": public_uri(recording.uri),
        "status": transcript.status,
        "language": transcript.language,
        "language_probability": transcript.language_probability,
        "duration_s": seconds(transcript.duration),
        "decoded_s": seconds(transcript.duration - transcript.n_skipped),
        "skipped_s": seconds(transcript.n_skipped),
        "speech_s": _seconds(transcript.speech),
        "uncovered_speech_s": _seconds(transcript.uncovered_speech),
        "skipped": [
            {"start": seconds(skip.start), "end": seconds(skip.stop), "reason": skip.reason}
            for skip in transcript.skipped
        ],
        "text": transcript.text,
        "n_segments": len(transcript.segments),
        "n_words": transcript.n_words,
        "n_windows": transcript.n_windows,
        "n_fallbacks": transcript.n_fallbacks,
        "flags": list(transcript.flags),
        "error_kind": failure.kind if failure else None,
        "error_message": failure.message if failure else None,
        "error_stage": failure.stage if failure else None,
        "attempts": failure.attempts if failure else transcript.attempts,
        "reference": recording.reference,
        "model": model,
        "model_revision": model_revision,
        "options_fingerprint": options_fingerprint,
        "metadata": recording.metadata,
        "offset_s": seconds(recording.offset or 0),
    }


def segment_rows(transcript: Transcript) -> Iterator[Row]:
    """The rows of `SEGMENTS` for `transcript`, in its order; `segment_id` counts from 0."""
    for number, segment in enumerate(transcript.segments):
        yield {
            "recording_id": transcript.recording.id,
            "segment_id": number,
            "channel": segment.channel,
            "start": segment.start,
            "end": segment.end,
            "text": segment.text.strip(),
            "language": segment.language,
            "language_probability": segment.language_probability,
            "avg_logprob": segment.avg_logprob,
            "compression_ratio": segment.compression_ratio,
            "no_speech_prob": segment.no_speech_prob,
            "temperature": segment.temperature,
            "tokens": list(segment.tokens),
            "flags": list(segment.flags),
        }


def word_rows(transcript: Transcript) -> Iterator[Row]:
    """The rows of `WORDS` for `transcript`, in its order; `word_id` counts from 0 through the whole recording."""
    words = ((n, segment.channel, word) for n, segment in enumerate(transcript.segments) for word in segment.words)
    for number, (segment_id, channel, word) in enumerate(words):
        yield {
            "recording_id": transcript.recording.id,
            "segment_id": segment_id,
            "word_id": number,
            "channel": channel,
            "start": word.start,
            "end": word.end,
            "word": word.word.strip(),
            "probability": word.probability,
        }


def to_table(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """A table of exactly `schema`. Raises `TypeError` with both schemas where `rows` have others.

    Text that is not Unicode (a file name in another encoding, say) is escaped: it may not cost its neighbours.
    """
    rows = list(rows)
    names = set(schema.names)
    if any(row.keys() != names for row in rows):
        raise _mismatch(schema, "columns " + ", ".join(sorted(set().union(*rows))))
    try:
        return _checked(_from_rows(rows, schema))
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError) as error:
        raise _mismatch(schema, f"rows that do not fit ({error})") from None


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`table` with exactly `schema`, also where its types were guessed; `TypeError` with both where it cannot be."""
    if table.schema.equals(schema):
        return _checked(table)
    if set(table.schema.names) != set(schema.names):
        raise _mismatch(schema, table.schema.to_string())
    try:
        return to_table(table.to_pylist(), schema)
    except TypeError:
        raise _mismatch(schema, table.schema.to_string()) from None


def _from_rows(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    try:
        return pa.Table.from_pylist(rows, schema=schema)
    except UnicodeEncodeError:
        return pa.Table.from_pylist([_unicode(row) for row in rows], schema=schema)


def _unicode(value: Any) -> Any:
    """`value` with `\\udcff` written out where text holds half of a surrogate pair."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {key: _unicode(item) for key, item in value.items()}
    return [_unicode(item) for item in value] if isinstance(value, list | tuple) else value


def _checked(table: pa.Table) -> pa.Table:
    empty = [field.name for field in table.schema if not field.nullable and table.column(field.name).null_count]
    if empty:
        raise _mismatch(table.schema, f"nulls in {', '.join(empty)}")
    return table


def _mismatch(expected: pa.Schema, found: str) -> TypeError:
    return TypeError(f"schema mismatch\nexpected:\n{expected.to_string()}\nfound:\n{found}")


def _seconds(samples: int | None) -> float | None:
    return None if samples is None else seconds(samples)
