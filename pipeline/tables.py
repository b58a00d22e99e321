"""The public tables read back: the Transcripts that they were made of, recording by recording.

Files are read as streams, shard by shard, in the order that finalize wrote; one recording is held, and the pages of a
file that it lies in. Float32 columns come back in their shortest digits (`selection.single`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import OutputError, StoreError
from pipeline.finalize import FORMAT, Success, read_success, table_paths
from pipeline.output import Output
from pipeline.types import Failure, Recording, Segment, Status, Transcript, Word, samples

_BATCH = 1000  # rows
_BUFFER = 1 << 20  # bytes of each column that is read

_RECORDINGS = [
    "recording_id", "uri", "status", "language", "language_probability", "duration_s", "speech_s",
    "uncovered_speech_s", "text", "n_segments", "flags", "error_kind", "error_message", "error_stage", "attempts",
    "reference", "metadata", "offset_s",
]  # fmt: skip
_SEGMENTS = [
    "recording_id", "channel", "start", "end", "text", "language", "language_probability", "avg_logprob",
    "compression_ratio", "no_speech_prob", "temperature", "flags",
]  # fmt: skip
_WORDS = ["recording_id", "segment_id", "start", "end", "word", "probability"]


@dataclass(frozen=True, slots=True)
class Tables:
    """The tables of an output as `_SUCCESS` speaks of them."""

    output: Output
    success: Success

    def column(self, name: str) -> Iterator[str]:
        """Every recording's `recording_id` or `uri`, of whatever status."""
        for shard in range(self.success.n_shards):
            with ExitStack() as stack:
                for row in self._rows("recordings", shard, [name], stack):
                    yield row[name]

    def transcripts(self, *, words: bool, tokens: bool) -> Iterator[Transcript]:
        """Every recording, with words and tokens only if asked for.

        Raises `StoreError` where the tables do not fit together or are replaced meanwhile.
        """
        for shard in range(self.success.n_shards):
            with ExitStack() as stack:
                segments = self._rows("segments", shard, [*_SEGMENTS, *(["tokens"] if tokens else [])], stack)
                spoken = self._rows("words", shard, _WORDS, stack) if words and self.output.has_words else iter(())
                recordings = self._rows("recordings", shard, _RECORDINGS, stack)
                yield from _joined(recordings, segments, spoken, f"{self.output.store} (shard {shard})")
        if read_success(self.output.store) != self.success:
            raise StoreError(f"output {self.output.store}: its tables were replaced while they were read; once more")

    def _rows(self, table: str, shard: int, columns: Sequence[str], stack: ExitStack) -> Iterator[dict[str, Any]]:
        path = table_paths(self.output, shard)[table]
        if path not in self.success.files:
            return
        try:
            source = stack.enter_context(self.output.store.open(path))
            file = pq.ParquetFile(source, pre_buffer=False, buffer_size=_BUFFER)
            for batch in file.iter_batches(_BATCH, columns=list(columns)):
                yield from _shortest(batch).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            reason = str(error).splitlines()[0]
            raise StoreError(f"{self.output.store}/{path} is damaged ({reason}): see `murmur verify`") from None


def open_tables(output: Output, *, partial: bool = False) -> Tables:
    """The finished tables of an output; with `partial` also of one that has more to do.

    Raises `OutputError` that says what is missing where there are none.
    """
    success = read_success(output.store)
    if success is None:
        raise OutputError(f"output {output.store} has no tables yet: run `murmur finalize {output.store}`")
    if success.rewriting or success.format != FORMAT:
        why = "are being rewritten" if success.rewriting else "are of another version"
        raise OutputError(f"output {output.store}: its tables {why}; run `murmur finalize {output.store}`")
    if not success.complete and not partial:
        raise OutputError(
            f"output {output.store} is not complete, {success.counts.get('missing', 0)} recordings are missing: the"
            " same `murmur transcribe` does them, --partial takes what is there"
        )
    return Tables(output, success)


def _joined(
    recordings: Iterable[Mapping[str, Any]],
    segments: Iterable[Mapping[str, Any]],
    words: Iterable[Mapping[str, Any]],
    where: str,
) -> Iterator[Transcript]:
    """All three are in the same order of recordings; not every recording has segments, or words."""
    of_segments, of_words = _Groups(segments), _Groups(words)
    for row in recordings:
        mine = of_segments.take(row["recording_id"])
        if len(mine) != row["n_segments"]:
            raise StoreError(f"{where}: {row['recording_id']!r} has {len(mine)} segments of {row['n_segments']}")
        yield _transcript(row, mine, of_words.take(row["recording_id"]))
    if of_segments.has_more or of_words.has_more:
        raise StoreError(f"{where}: rows of no recording; see `murmur verify`")


class _Groups:
    """Rows by recording, as far as they were asked for."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._groups = groupby(rows, itemgetter("recording_id"))
        self._next = next(self._groups, None)

    def take(self, recording_id: str) -> list[Mapping[str, Any]]:
        """The rows of the next recording, if it is this one."""
        if self._next is None or self._next[0] != recording_id:
            return []
        rows = list(self._next[1])
        self._next = next(self._groups, None)
        return rows

    @property
    def has_more(self) -> bool:
        return self._next is not None


def _transcript(
    row: Mapping[str, Any], segments: Sequence[Mapping[str, Any]], words: Sequence[Mapping[str, Any]]
) -> Transcript:
    spoken = {number: tuple(map(_word, rows)) for number, rows in groupby(words, itemgetter("segment_id"))}
    raw = _raw_texts(row["text"], [segment["text"] for segment in segments])
    status: Status = row["status"]
    return Transcript(
        recording=Recording(
            id=row["recording_id"],
            uri=row["uri"],
            offset=samples(row["offset_s"]),
            reference=row["reference"],
            metadata=row["metadata"],
        ),
        status=status,
        segments=tuple(
            _segment(segment, text, spoken.get(number, ()))
            for number, (segment, text) in enumerate(zip(segments, raw, strict=True))
        ),
        language=row["language"],
        language_probability=row["language_probability"],
        duration=samples(row["duration_s"]),
        speech=_samples(row["speech_s"]),
        uncovered_speech=_samples(row["uncovered_speech_s"]),
        flags=tuple(row["flags"]),
        failure=Failure(row["error_kind"], row["error_message"], row["error_stage"], row["attempts"])
        if row["error_kind"]
        else None,
        attempts=row["attempts"],
    )


def _segment(row: Mapping[str, Any], text: str, words: tuple[Word, ...]) -> Segment:
    plain = {name: row[name] for name in _SEGMENTS if name not in ("recording_id", "text", "flags")}
    return Segment(text=text, tokens=tuple(row.get("tokens", ())), words=words, flags=tuple(row["flags"]), **plain)


def _word(row: Mapping[str, Any]) -> Word:
    return Word(row["word"], row["start"], row["end"], row["probability"])


def _raw_texts(whole: str, stripped: Sequence[str]) -> Iterator[str]:
    """Each segment's text with the blanks that `recordings.text` has before it: not every language has any."""
    at = 0
    for text in stripped:
        begin = whole.find(text, at)
        if begin < 0 or whole[at:begin].strip():  # of no output of ours
            yield f" {text}"
            continue
        yield whole[at : begin + len(text)]
        at = begin + len(text)


def _samples(seconds: float | None) -> int | None:
    return None if seconds is None else samples(seconds)


def _shortest(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Float32 columns as float64 of the same digits."""
    for number, field in enumerate(batch.schema):
        if pa.types.is_float32(field.type):
            digits = batch.column(number).cast(pa.string()).cast(pa.float64())
            batch = batch.set_column(number, field.name, digits)
    return batch
