"""`murmur export`: what third-party parsers read back is what the tables hold, under names that every id survives."""

from __future__ import annotations

import csv
import html
import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import srt
import webvtt
from commits import begin, failed, many, ok, put, segment, unreadable
from openai.types.audio import TranscriptionVerbose
from test_names import AWKWARD

from pipeline import cli
from pipeline.errors import OutputError, UsageError
from pipeline.export import FORMATS, export, read_rows
from pipeline.finalize import Files, finalize, read_success, table_paths
from pipeline.manifest import read_inputs
from pipeline.names import recording_id
from pipeline.output import SUCCESS, Output, write_inputs
from pipeline.selection import Selection
from pipeline.store import Store
from pipeline.types import SAMPLE_RATE, Recording, UnitResult

TALK = ok(
    "talk 1",
    recording=Recording("talk 1", "/data/talk 1.wav", offset=SAMPLE_RATE // 2),
    segments=(
        segment(" Hello <b>you</b> & me --> them.", 0.5, words=True),
        segment(" ¿Qué?\tzwei\nlines", 3.0, words=True, language="es"),
        segment(" again again", 6.0, words=True, flags=("repetition",), compression_ratio=3.0),
    ),
)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Output]:
    def make(*results: UnitResult, **settings: object) -> Output:
        output = begin(Store.at(str(tmp_path / "out")), settings={"chunk_level": "word", **settings})
        put(output.store, *results)
        write_inputs(output.store, [result.recording for result in results])
        finalize(output, use_ray=False)
        return output

    return make


def index(folder: Path, format: str) -> dict[str, Path]:
    lines = map(json.loads, (folder / f"index-{format}.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["recording_id"]: folder / line["file"] for line in lines}


# ---- formats


def test_srt(make: Callable[..., Output], tmp_path: Path) -> None:
    export(make(TALK), "srt", str(tmp_path / "to"))
    found = list(srt.parse((tmp_path / "to" / "talk%201.srt").read_text(encoding="utf-8"), ignore_errors=False))
    assert [(cue.start.total_seconds(), cue.content) for cue in found] == [
        (0.5, "Hello <b>you</b> & me -> them."), (3.0, "¿Qué? zwei lines"), (6.0, "again again"),
    ]  # fmt: skip


def test_vtt(make: Callable[..., Output], tmp_path: Path) -> None:
    export(make(TALK), "vtt", str(tmp_path / "to"))
    found = webvtt.read(str(tmp_path / "to" / "talk%201.vtt"))
    assert [(cue.start, html.unescape(cue.text)) for cue in found] == [
        ("00:00:00.500", "Hello <b>you</b> & me --> them."),
        ("00:00:03.000", "¿Qué? zwei lines"),
        ("00:00:06.000", "again again"),
    ]


def test_tsv_and_txt(make: Callable[..., Output], tmp_path: Path) -> None:
    for format in ("tsv", "txt"):
        export(make(TALK), format, str(tmp_path / "to"))
    rows = list(csv.DictReader(io.StringIO((tmp_path / "to" / "talk%201.tsv").read_text()), dialect="excel-tab"))
    assert rows[1] == {"start": "3000", "end": "5000", "text": "¿Qué? zwei lines"}
    assert (tmp_path / "to" / "talk%201.txt").read_text().splitlines() == [row["text"] for row in rows]


def test_json(make: Callable[..., Output], tmp_path: Path) -> None:
    export(make(TALK), "json", str(tmp_path / "to"), Selection(exclude_flags=("repetition",), languages=("es",)))
    text = (tmp_path / "to" / "talk%201.json").read_text()
    found = TranscriptionVerbose.model_validate_json(text)
    assert found.segments is not None
    assert found.words is not None
    (only,) = found.segments
    assert (only.id, only.start, only.avg_logprob, only.tokens) == (1, 3.0, -0.25, [1, 2, 50364])
    assert (found.text, found.duration) == ("¿Qué?\tzwei\nlines", 10.0)
    assert [word.word for word in found.words] == ["¿Qué?", "zwei", "lines"]


def test_nemo_is_an_input_again(make: Callable[..., Output], tmp_path: Path) -> None:
    other = ok("other", segments=(segment(" x", 1.0), segment(" y", 2.0, end=2.0)))
    done = export(make(TALK, other), "nemo", str(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert next(line for line in lines if line["id"] == "talk 1#1") == {
        "id": "talk 1#1", "audio_filepath": "/data/talk 1.wav", "offset": 3.5, "duration": 2.0,
        "text": "¿Qué? zwei lines", "lang": "es", "recording_id": "talk 1", "segment_id": 1,
    }  # fmt: skip
    back = {one.id: one for one in read_inputs([str(tmp_path / "manifest.jsonl")])}
    assert back.keys() == {"talk 1#0", "talk 1#1", "talk 1#2", "other#0"}
    first = back["talk 1#0"]
    assert (first.uri, first.offset, first.length) == ("/data/talk 1.wav", SAMPLE_RATE, 2 * SAMPLE_RATE)
    assert first.reference == "Hello <b>you</b> & me --> them."
    assert json.loads(first.metadata or "")["lang"] == "en"
    assert (done.segments, done.left_out) == (4, {"without_duration": 1})


def test_channels_apart(make: Callable[..., Output], tmp_path: Path) -> None:
    both = (segment(" left", 0.0), segment(" right", 0.5, channel=1), segment(" left", 3.0, words=True))
    output = make(ok("call", segments=both), ok("mono"), channels="split")
    export(output, "vtt", str(tmp_path / "to"))
    assert sorted(path.name for path in (tmp_path / "to").glob("*.vtt")) == ["call~0.vtt", "call~1.vtt", "mono~0.vtt"]
    assert [cue.text for cue in webvtt.read(str(tmp_path / "to" / "call~1.vtt"))] == ["right"]
    export(output, "json", str(tmp_path / "to"))
    value = json.loads((tmp_path / "to" / "call.json").read_text())
    assert [one["channel"] for one in value["segments"]] == [0, 1, 0]
    assert [one["channel"] for one in value["words"]] == [0]
    export(output, "nemo", str(tmp_path / "to"))
    lines = map(json.loads, (tmp_path / "to" / "manifest.jsonl").read_text().splitlines())
    assert {(line["id"], line["channel"]) for line in lines} >= {("call#1", 1), ("call#2", 0)}


# ---- names


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "nemo"])
def test_awkward_names_survive(make: Callable[..., Output], tmp_path: Path, format: str) -> None:
    ids = [*AWKWARD, "Call", "call", "CALL", "straße", "STRASSE", "long" * 100, "long" * 100 + "x"]
    done = export(make(*(ok(name, text=f" said by {name}") for name in ids)), format, str(tmp_path / "to"))
    found = index(tmp_path / "to", format)
    assert found.keys() == set(ids)
    there = {path.name for path in (tmp_path / "to").iterdir()} - {f"index-{format}.jsonl"}
    assert there == {path.name for path in found.values()}
    assert len({name.casefold() for name in there}) == len(ids) == done.files
    assert all(recording_id(path.name) in (name, None) for name, path in found.items())
    assert {recording_id(path.name) for path in found.values()} == {*ids[:-2], None}


# ---- what is exported


def at(uri: str, id: str = "") -> UnitResult:
    return ok(id or uri, recording=Recording(id or uri, uri))


def test_names_as_the_audio_lies(make: Callable[..., Output], tmp_path: Path) -> None:
    """Where a player looks for them; the extension stays where two would be one, a hash tells slices apart."""
    calls = [f"calls/{name}" for name in ("x.wav", "x.mp3", "x.mp3.ogg", "Y.wav", "y.ogg")]
    audio = ['a "b" #1?.wav', "e\u0301.wav", *calls]
    results = [at(f"{tmp_path}/talks/{name}") for name in audio]
    slices = [at(f"{tmp_path}/talks/long.wav", id) for id in ("one", "two")]
    export(make(*results, *slices), "srt", str(tmp_path / "to"), root=f"{tmp_path}/talks/")
    found = {path.relative_to(tmp_path / "to").as_posix() for path in (tmp_path / "to").rglob("*.srt")}
    assert {name for name in found if "~" not in name} == {
        'a "b" #1?.srt', "calls/x.wav.srt", "calls/x.mp3.ogg.srt", "calls/Y.wav.srt", "calls/y.ogg.srt", "e\u0301.srt",
    }  # fmt: skip
    told_apart = sorted(name.partition("~u")[0] for name in found if "~" in name)
    assert told_apart == ["calls/x.mp3", "long.wav", "long.wav"]  # x.mp3 is what x.mp3.ogg might be, too
    files = index(tmp_path / "to", "srt")
    assert len(files) == len(found) == len(audio) + 2
    assert all(file.exists() for file in files.values())


def test_names_as_the_audio_lies_want_it_there(make: Callable[..., Output], tmp_path: Path) -> None:
    output = make(at(f"{tmp_path}/talks/a.wav"), at("/else/where.wav"))
    with pytest.raises(UsageError, match=r"/else/where.wav does not lie in it"):
        export(output, "srt", str(tmp_path / "to"), root=f"{tmp_path}/talks")
    with pytest.raises(UsageError, match="the folder of the audio itself"):
        export(output, "txt", f"{tmp_path}/talks/", root=f"{tmp_path}/talks")


def test_failed_recordings_are_counted(make: Callable[..., Output], tmp_path: Path) -> None:
    output = make(ok("a"), failed("b"), unreadable("c"), ok("silence", segments=()))
    done = export(output, "txt", str(tmp_path / "to"))
    assert (done.recordings, done.failed, done.files) == (2, 2, 2)
    assert index(tmp_path / "to", "txt").keys() == {"a", "silence"}
    assert (tmp_path / "to" / "silence.txt").read_bytes() == b""
    assert export(output, "txt", str(tmp_path / "to"), include_failed=True).recordings == 4


def test_a_recording_of_which_nothing_is_wanted_has_no_file(make: Callable[..., Output], tmp_path: Path) -> None:
    done = export(make(TALK, ok("a"), ok("silence", segments=())), "txt", str(tmp_path), Selection(languages=("es",)))
    assert index(tmp_path, "txt").keys() == {"talk 1"}
    assert (done.recordings, done.empty, done.left_out) == (1, 2, {"languages": 3})


def test_what_was_left_out_is_said_by_its_option(make: Callable[..., Output], tmp_path: Path) -> None:
    strict = Selection(exclude_flags=("repetition",), languages=("en",))
    said = list(export(make(TALK), "txt", str(tmp_path / "to"), strict).lines())
    assert "2 segments left out: 1 by --language, 1 by --exclude-flag" in said


def test_rows_of_a_query(make: Callable[..., Output], tmp_path: Path) -> None:
    output = make(TALK, ok("a"), ok("b"))
    select = "COPY (SELECT recording_id{} FROM '{}/segments/*.parquet' WHERE start = 3.0) TO '{}'"
    for columns, n in (("", 3), (", segment_id", 1)):
        file = str(tmp_path / "keep.parquet")
        duckdb.sql(select.format(columns, output.store.uri, file))
        assert export(output, "txt", str(tmp_path / "to"), Selection(rows=read_rows(file))).segments == n


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("SELECT 1 AS segment_id", "no column recording_id"),
        ("SELECT 'a' AS recording_id, 'x' AS segment_id", "expected"),
        ("SELECT NULL::VARCHAR AS recording_id", "without a value"),
    ],
)
def test_other_rows_are_refused(tmp_path: Path, query: str, said: str) -> None:
    duckdb.sql(f"COPY ({query}) TO '{tmp_path}/x.parquet'")
    with pytest.raises(UsageError, match=said):
        read_rows(f"{tmp_path}/x.parquet")
    (tmp_path / "x.csv").write_text("recording_id\na\n")
    for name in ("x.csv", "no-such.parquet"):
        with pytest.raises(UsageError, match=f"{name}: rows of recordings, as Parquet, were expected"):
            read_rows(f"{tmp_path}/{name}")


# ---- where to


def test_again_is_the_same_and_whole(make: Callable[..., Output], tmp_path: Path) -> None:
    output = make(TALK, ok("a"))
    for _ in range(2):
        export(output, "json", str(tmp_path / "to"))
        found = {path.name: path.read_bytes() for path in (tmp_path / "to").iterdir()}
        assert found.keys() == {"talk%201.json", "a.json", "index-json.jsonl"}  # and nothing that was in the making
        (tmp_path / "to" / "a.json").write_bytes(b"{")
    export(output, "json", str(tmp_path / "to"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "to").iterdir()} == found


def test_a_file_is_replaced_not_rewritten(make: Callable[..., Output], tmp_path: Path) -> None:
    """Who has the old one open reads it to its end."""
    output = make(ok("a"))
    export(output, "txt", str(tmp_path / "to"))
    with (tmp_path / "to" / "a.txt").open() as old:
        export(output, "txt", str(tmp_path / "to"), Selection(rows={"a": None}))
        assert old.read() == "a unit 0.\n"
        assert (tmp_path / "to" / "a.txt").stat().st_ino != Path(f"/proc/self/fd/{old.fileno()}").stat().st_ino


@pytest.mark.parametrize("format", FORMATS)
def test_on_an_object_store(make: Callable[..., Output], s3: str, format: str) -> None:
    done = export(make(TALK, ok("ü/x", text=" y")), format, f"{s3}/a folder/to")
    files = {path.rsplit("/", 1)[1] for path in fsspec.filesystem("s3").find(f"{s3}/a folder/to")}
    if format == "nemo":
        assert files == {"manifest.jsonl"}
    else:
        assert files == {f"talk%201.{format}", f"ü%2Fx.{format}", f"index-{format}.jsonl"}
    assert done.recordings == 2


def test_where_nothing_may_be_written(make: Callable[..., Output], tmp_path: Path) -> None:
    output = make(TALK)
    (tmp_path / "file").touch()
    for to in (f"{tmp_path}/file", output.store.uri, f"{output.store.uri}/segments"):
        with pytest.raises(OutputError, match="--to"):
            export(output, "txt", to)


# ---- the command


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["export", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, out, err

    return run


def test_the_command(make: Callable[..., Output], tmp_path: Path, told: Callable[..., tuple[int, str, str]]) -> None:
    out = make(TALK, failed("b")).store.uri
    code, said, _ = told(out, "--format", "srt", "--to", tmp_path / "to")
    assert code == 0
    assert said.splitlines() == [
        "1 recording, 3 segments",
        "1 failed recording left out",
        "3 cues, 0 too fast to read, 0 shorter than wanted",
        f"1 file in {tmp_path}/to, named in {tmp_path}/to/index-srt.jsonl",
    ]
    code, said, _ = told(out, "--format", "nemo", "--to", tmp_path / "to", "--filter", "training", "--json")
    summary: dict[str, Any] = json.loads(said.splitlines()[-1])
    assert (code, summary["exit_code"], summary["segments"]) == (0, 0, 2)
    assert summary["left_out"] == {"max_compression_ratio": 1}
    again = ("--filter", "training", "--max-compression-ratio", "4", "--exclude-flag", "other", "--json")
    assert json.loads(told(out, "--format", "txt", "--to", tmp_path / "to", *again)[1])["segments"] == 3
    told(out, "--format", "srt", "--to", tmp_path / "to", "--max-line-length", "10", "--max-lines", "1")
    found = srt.parse((tmp_path / "to" / "talk%201.srt").read_text(encoding="utf-8"))
    assert max(len(cue.content) for cue in found) <= 10


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "pdf", "--to", "to"], "nemo"),
        (["--format", "srt"], "--to"),
        (["--format", "txt", "--to", "to", "--max-lines", "2"], "--max-lines is for srt and vtt, not for txt"),
        (["--format", "srt", "--to", "to", "--max-lines", "0"], "max_lines"),
        (["--format", "srt", "--to", "to", "--where", "no-such.parquet"], "no-such.parquet"),
        (["--format", "srt", "--to", "to", "--filter", "best"], "training"),
        (["--format", "nemo", "--to", "to", "--root", "talks"], "--root is for a file for each recording"),
        (["--format", "srt", "--to", "to"], "not complete, 1 recordings are missing"),
    ],
)
def test_misuse(
    make: Callable[..., Output], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    told: Callable[..., tuple[int, str, str]], arguments: list[str], said: str,
) -> None:  # fmt: skip
    output = make(ok("a"))
    write_inputs(output.store, [Recording("a", "a"), Recording("b", "b")])
    finalize(output, use_ray=False)
    monkeypatch.chdir(tmp_path)
    code, out, err = told("out", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert not (tmp_path / "to").exists()


def test_partial_says_so(
    make: Callable[..., Output], tmp_path: Path, told: Callable[..., tuple[int, str, str]]
) -> None:
    output = make(ok("a"))
    write_inputs(output.store, [Recording("a", "a"), Recording("b", "b")])
    finalize(output, use_ray=False)
    code, said, _ = told(output.store.uri, "--format", "txt", "--to", tmp_path / "to", "--partial")
    assert code == 0
    assert said.startswith("1 recording of an unfinished run, 1 segment\n")


def test_memory_is_flat(tmp_path: Path) -> None:
    """Ten times the recordings, and only what a manifest's line needs more."""
    script = (
        "import re, sys; from pipeline.export import export; from pipeline.output import read_output\n"
        "done = export(read_output(sys.argv[1]), 'nemo', sys.argv[2])\n"
        "print(done.recordings, *re.findall(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read()))"
    )
    peaks = []
    for n in (4_000, 40_000):
        output = many(begin(Store.at(str(tmp_path / str(n))), n_shards=1), n)
        segments = Path(output.store.uri, "segments", "part-00000-of-00001.parquet")
        pq.write_table(pq.read_table(segments).take(pa.array([i for i in range(n) if i % 4 != 2])), segments)
        success = read_success(output.store)
        assert success is not None
        files: Files = {path: {} for path in table_paths(output, 0).values() if not path.startswith("words")}
        output.store.put(SUCCESS, replace(success, files=files).to_bytes())
        arguments = [sys.executable, "-c", script, output.store.uri, str(tmp_path / f"to-{n}")]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True)
        recordings, kilobytes = map(int, done.stdout.split())
        assert recordings == n * 3 // 4
        peaks.append(kilobytes)
    assert peaks[1] - peaks[0] < 20_000
