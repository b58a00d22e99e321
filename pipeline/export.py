"""`murmur export`: the tables as one file per recording (txt, srt, vtt, tsv, json), or as one NeMo manifest.

    DIR/NAME.srt            a recording; of `channels: split` a channel, DIR/NAME~0.srt and so on
    DIR/calls/talk.srt      with `root`: a recording whose audio lies at ROOT/calls/talk.mp3
    DIR/index-srt.jsonl     recording_id → file, what was exported in the order of the tables
    DIR/manifest.jsonl      format nemo: a line a segment

Files are written whole or not at all, under names that the same command gives again, so that it brings them up to date.
What an earlier one left under other names stays.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from pipeline import formats, names, subtitles
from pipeline.entries import to_numpy
from pipeline.errors import OutputError, StoreError, UsageError, redact
from pipeline.manifest import filesystem
from pipeline.output import Output
from pipeline.selection import Rows, Selection
from pipeline.store import Store
from pipeline.subtitles import Rules
from pipeline.tables import Tables, open_tables
from pipeline.types import Recording, Segment, Transcript, seconds

MANIFEST = "manifest.jsonl"
SUBTITLES: dict[str, Callable[..., str]] = {"srt": formats.srt, "vtt": formats.vtt}
PER_CHANNEL = ("txt", "srt", "vtt", "tsv")  # formats that have no place to say which channel
_LINE_ENDS = re.compile("[\x85\u2028\u2029]")  # JSON leaves them as they are; to many readers they end a line
WITH_WORDS = (*SUBTITLES, "json")  # formats that words are read for, where there are any
FORMATS = (*formats.FORMATS, "nemo")


@dataclass(slots=True)
class Exported:
    """What an export came to."""

    format: str
    to: str
    partial: bool  # the output has more to do
    recordings: int = 0  # exported
    files: int = 0
    segments: int = 0
    failed: int = 0  # recordings left out because they failed
    empty: int = 0  # recordings left out because no segment was selected
    left_out: Counter[str] = field(default_factory=Counter)  # segments, by the criterion that they failed first
    cues: int = 0
    fast_cues: int = 0  # faster than `max_chars_per_s`, however long they could be held
    short_cues: int = 0  # shorter than `min_cue_s`

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"left_out": dict(self.left_out)}

    def lines(self) -> Iterator[str]:
        """What a person is told."""
        unfinished = " of an unfinished run" if self.partial else ""
        yield f"{_number(self.recordings, 'recording')}{unfinished}, {_number(self.segments, 'segment')}"
        if self.failed:
            yield f"{_number(self.failed, 'failed recording')} left out"
        if self.left_out.total():
            reasons = ", ".join(f"{count} by {_option(name)}" for name, count in self.left_out.most_common() if count)
            yield f"{_number(self.left_out.total(), 'segment')} left out: {reasons}"
        if self.empty:
            yield f"{_number(self.empty, 'recording')} left out with no segment selected"
        if self.cues:
            cues = _number(self.cues, "cue")
            yield f"{cues}, {self.fast_cues} too fast to read, {self.short_cues} shorter than wanted"
        if self.format == "nemo":
            yield f"{self.to}/{MANIFEST}"
        else:
            yield f"{_number(self.files, 'file')} in {self.to}, named in {self.to}/{index_name(self.format)}"


_OPTIONS = {
    "languages": "--language",
    "exclude_flags": "--exclude-flag",
    "exclude_recording_flags": "--exclude-recording-flag",
    "rows": "--where",
    "without_duration": "having no duration",
}


def _option(criterion: str) -> str:
    """A criterion as a person gave it."""
    return _OPTIONS.get(criterion) or f"--{criterion.replace('_', '-')}"


@dataclass(frozen=True, slots=True)
class _Chosen:
    """A recording and what was selected of it."""

    transcript: Transcript  # with the selected segments only
    segment_ids: tuple[int, ...]


def export(
    output: Output,
    format: str,
    to: str,
    selection: Selection | None = None,
    rules: Rules | None = None,
    *,
    partial: bool = False,
    include_failed: bool = False,
    root: str | None = None,
) -> Exported:
    """Write the selected segments of an output's recordings into the folder `to`, on any store.

    Files are named by the recordings' ids or, with `root`, as the audio lies in that folder.

    Recordings that failed are left out, or exported as far as they were decoded. Holds one recording at a time, a few
    files on their way, and eight bytes for every id. Raises `OutputError` where the output is not complete (see
    `open_tables`) or nothing can be written, `UsageError` where audio lies elsewhere than in `root`, `StoreError` where
    a store gives way.
    """
    tables = open_tables(output, partial=partial)
    store = _destination(to, output)
    if root is not None and _folder(root) == store.uri:
        raise UsageError(f"--to {to}: the folder of the audio itself, where files of yours could be replaced")
    naming = _ById(tables) if root is None else _ByPlace(tables, _folder(root))
    selection, rules = selection or Selection(), rules or Rules()
    done = Exported(format, str(store), partial=not tables.success.complete)
    everything = tables.transcripts(words=format in WITH_WORDS, tokens=format == "json")
    chosen = _chosen(everything, selection, include_failed, done)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".jsonl") as lines:
        if format == "nemo":
            _write_manifest(chosen, output, lines, done)
            store.put_whole(MANIFEST, Path(lines.name))
            done.files = 1
        else:
            done.files = store.put_all(_files(chosen, output, naming, format, rules, lines, done))
            lines.flush()
            store.put_whole(index_name(format), Path(lines.name))
    return done


def index_name(format: str) -> str:
    return f"index-{format}.jsonl"


def read_rows(uri: str) -> Rows:
    """The rows of a Parquet file that a query wrote: `recording_id`, and `segment_id` unless whole ones are meant.

    Raises `UsageError` where it is no such file.
    """
    try:
        fs, path = filesystem(uri)
        with fs.open(path, "rb") as file:
            parquet = pq.ParquetFile(file)
            wanted = [name for name in ("recording_id", "segment_id") if name in parquet.schema_arrow.names]
            table = parquet.read(columns=wanted)
        if "recording_id" not in wanted:
            raise ValueError("it has no column recording_id")
        table = table.cast(
            pa.schema([(name, pa.string() if name == "recording_id" else pa.int64()) for name in wanted])
        )
        if any(column.null_count for column in table.columns):
            raise ValueError("a row without a value")
    except (OSError, ValueError, ImportError) as error:  # pyarrow's are ValueErrors, too
        raise UsageError(f"{redact(uri)}: rows of recordings, as Parquet, were expected ({error})") from None
    if "segment_id" not in wanted:
        return dict.fromkeys(table["recording_id"].to_pylist())
    table = table.sort_by([("recording_id", "ascending"), ("segment_id", "ascending")])
    runs = pc.run_end_encode(table["recording_id"].combine_chunks())
    ends = to_numpy(runs.run_ends)
    return dict(zip(runs.values.to_pylist(), np.split(to_numpy(table["segment_id"]), ends[:-1]), strict=True))


def _destination(to: str, output: Output) -> Store:
    store = Store.at(to)
    ours = [output.store.uri, *(f"{output.store.uri}/{name}" for name in ("segments", "words", "recordings", "_run"))]
    if store.uri in ours:
        raise OutputError(f"--to {store}: this is the output's own folder; choose another")
    probe = f".{uuid.uuid4().hex}.part"
    try:
        store.put(probe, b"can this be written?\n")
        store.delete(probe)
    except StoreError as error:
        raise OutputError(f"--to {store}: {error}") from None
    return store


def _chosen(
    transcripts: Iterator[Transcript], selection: Selection, include_failed: bool, done: Exported
) -> Iterator[_Chosen]:
    for transcript in transcripts:
        if transcript.status != "ok" and not include_failed:
            done.failed += 1
            continue
        kept = selection.keep(transcript, done.left_out)
        if not kept and not selection.is_all:  # silence is exported as silence, but what is not wanted is not
            done.empty += 1
            continue
        done.recordings += 1
        done.segments += len(kept)
        yield _Chosen(replace(transcript, segments=tuple(transcript.segments[number] for number in kept)), kept)


# ---- one file a recording


def _files(
    chosen: Iterator[_Chosen],
    output: Output,
    naming: _ById | _ByPlace,
    format: str,
    rules: Rules,
    index: IO[str],
    done: Exported,
) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each file; a line of the index for each."""
    split = _is_split(output)
    task = output.run.settings.get("task", "transcribe")
    for one in chosen:
        recording_id = one.transcript.recording.id
        for channel, transcript in _by_channel(one.transcript, split and format in PER_CHANNEL):
            ending = f".{format}" if channel is None else f"~{channel}.{format}"
            name = naming.name(one.transcript.recording, ending)
            about = {"recording_id": recording_id, "file": name, **({} if channel is None else {"channel": channel})}
            _put_line(index, {**about, "segments": len(transcript.segments), "language": transcript.language})
            if format in SUBTITLES:
                text = SUBTITLES[format](_cues(transcript, rules, done))
            elif format == "json":
                text = _json(replace(one, transcript=transcript), task, split)
            else:
                text = formats.FORMATS[format](transcript)
            yield name, text.encode()


class _ById:
    """Flat names, that only the ids decide."""

    def __init__(self, tables: Tables) -> None:
        self._alike = _repeated(map(names.folded, tables.column("recording_id")))

    def name(self, recording: Recording, ending: str) -> str:
        told_apart = _hash(names.folded(recording.id)) in self._alike
        return names.file_name(recording.id, ending, told_apart=told_apart)


class _ByPlace:
    """Names as the audio lies in the folder `root`; raises `UsageError` for what does not."""

    def __init__(self, tables: Tables, root: str) -> None:
        self._root = root
        ways = (set(map(names.folded_path, names.beside(self._path(uri)))) for uri in tables.column("uri"))
        self._alike = _repeated(way for some in ways for way in some)

    def name(self, recording: Recording, ending: str) -> str:
        ways = names.beside(self._path(recording.uri))
        alone = [way for way in ways if _hash(names.folded_path(way)) not in self._alike]
        return names.path_name((alone or ways[-1:])[0], recording.id, ending, told_apart=not alone)

    def _path(self, uri: str) -> str:
        path = uri.removeprefix(f"{self._root}/")
        if path == uri or {"", ".", ".."} & set(path.split("/")):
            raise UsageError(f"--root {self._root}: {redact(uri)} does not lie in it; without --root files go by ids")
        return path


def _folder(uri: str) -> str:
    """A folder as the tables write what lies in it."""
    fs, path = filesystem(uri)
    return (path if isinstance(fs, LocalFileSystem) else uri).rstrip("/")


def _repeated(texts: Iterable[str]) -> set[int]:
    """The hashes of those that come more than once."""
    hashes, counts = np.unique(np.fromiter(map(_hash, texts), np.int64), return_counts=True)
    return set(hashes[counts > 1].tolist())


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _is_split(output: Output) -> bool:
    return bool(output.run.settings.get("channels") == "split")


def _by_channel(transcript: Transcript, apart: bool) -> Iterator[tuple[int | None, Transcript]]:
    """The transcript of each channel that has text, the first one's always; or, not `apart`, of all of them."""
    if not apart:
        yield None, transcript
        return
    for channel in sorted({0, *(segment.channel for segment in transcript.segments)}):
        segments = tuple(segment for segment in transcript.segments if segment.channel == channel)
        yield channel, replace(transcript, segments=segments)


def _cues(transcript: Transcript, rules: Rules, done: Exported) -> list[formats.Cue]:
    cues = subtitles.cues(transcript.segments, rules, seconds(transcript.duration))
    done.cues += len(cues)
    done.fast_cues += sum(map(rules.is_fast, cues))
    done.short_cues += sum(map(rules.is_short, cues))
    return cues


def _json(one: _Chosen, task: str, split: bool) -> str:
    """`formats.verbose` with the tables' own segment ids, and the channel where there are several."""
    value = formats.verbose(one.transcript, task)
    for number, segment, said in zip(one.segment_ids, one.transcript.segments, value["segments"], strict=True):
        said |= {"id": number, **({"channel": segment.channel} if split else {})}
    if split:
        spoken = [segment.channel for segment in one.transcript.segments for _ in segment.words]
        for channel, word in zip(spoken, value["words"], strict=True):
            word["channel"] = channel
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


# ---- a NeMo manifest


def _write_manifest(chosen: Iterator[_Chosen], output: Output, lines: IO[str], done: Exported) -> None:
    split = _is_split(output)
    for one in chosen:
        for number, segment in zip(one.segment_ids, one.transcript.segments, strict=True):
            if segment.end > segment.start:
                _put_line(lines, _manifest_line(one.transcript, number, segment, split))
            else:
                done.segments -= 1
                done.left_out["without_duration"] += 1
    lines.flush()


def _manifest_line(transcript: Transcript, number: int, segment: Segment, split: bool) -> dict[str, Any]:
    """What NeMo reads, with an `id` for our own manifests; seconds are those of the file at `audio_filepath`."""
    recording = transcript.recording
    return {
        "id": f"{recording.id}#{number}",
        "audio_filepath": recording.uri,
        "offset": round(seconds(recording.offset or 0) + segment.start, 7),  # a sample is 0.0000625 s
        "duration": round(segment.end - segment.start, 7),
        "text": formats.one_line(segment.text),
        "lang": segment.language,
        "recording_id": recording.id,
        "segment_id": number,
        **({"channel": segment.channel} if split else {}),
    }


def _put_line(file: IO[str], value: dict[str, Any]) -> None:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    file.write(_LINE_ENDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
