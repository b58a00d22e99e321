"""Every kind of input to Recordings; whatever is wrong with a line is said with its number, before anything runs."""

from __future__ import annotations

import datetime
import functools
import json
import logging
import os
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from decimal import Decimal
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from audio_files import noise, write_wav

from pipeline import manifest
from pipeline.decoder import open_audio
from pipeline.errors import ManifestError
from pipeline.manifest import AUDIO_EXTENSIONS, default_id, name_of, public_uri, read_inputs
from pipeline.types import Recording


def read(*inputs: Path | str) -> list[Recording]:
    return list(read_inputs([str(text) for text in inputs]))


def refusal(*inputs: Path | str) -> str:
    with pytest.raises(ManifestError) as caught:
        read(*inputs)
    text = str(caught.value)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


def lines(path: Path, *rows: dict[str, Any] | str | bytes, end: bytes = b"\n") -> Path:
    coded = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"".join(row + end for row in coded))
    return path


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    return lambda *rows, **options: lines(tmp_path / "a.jsonl", *rows, **options)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder is an empty one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- addresses


@pytest.mark.parametrize(
    ("uri", "public"),
    [
        ("/data/a b/x.wav", "/data/a b/x.wav"),
        ("/data/user:pw@h/x.wav?sig=1", "/data/user:pw@h/x.wav?sig=1"),  # names of a local disk
        ("s3://bucket/a@b.wav", "s3://bucket/a@b.wav"),
        ("s3://bucket/what?token=no.wav", "s3://bucket/what?token=no.wav"),  # a key
        ("https://h/x.wav", "https://h/x.wav"),
        ("https://user:pw@h:8000/x.wav", "https://h:8000/x.wav"),
        ("https://user:p@w@h/x@y.wav", "https://h/x@y.wav"),
        ("sftp://me@h/x.wav", "sftp://h/x.wav"),
        ("https://h/x.wav?id=5&lang=de", "https://h/x.wav?id=5&lang=de"),
        ("https://h/x.wav?token=s&id=5&id=5", "https://h/x.wav?id=5&id=5"),
        ("https://h/x.wav?id=5&access_token=s", "https://h/x.wav?id=5"),
        ("https://h/x?X-Amz-Algorithm=A&X-Amz-Signature=s&x-amz-security-token=t", "https://h/x"),
        ("https://h/x?AWSAccessKeyId=A&Signature=s&Expires=1&v=2", "https://h/x?v=2"),
        ("https://h/x?X-Goog-Signature=s&X-Goog-Date=1&GoogleAccessId=g", "https://h/x"),
        ("https://a.blob.core.windows.net/c/x?sv=1&st=1&se=2&sr=b&sp=r&spr=https&sig=s%3D", None),
        ("https://h/x?se=seven&sp=9", "https://h/x?se=seven&sp=9"),  # Azure's names without its signature
        ("https://h/x?Policy=p&Key-Pair-Id=k&Signature=s", "https://h/x"),
        ("HTTPS://u@h/x?SIG=1", "HTTPS://h/x"),
        (
            "abfss://container@account.dfs.core.windows.net/x.wav",
            "abfss://container@account.dfs.core.windows.net/x.wav",
        ),
        ("zip://a.wav::https://u:p@h/x.zip?sig=1", "zip://a.wav::https://h/x.zip"),
        ("tar://512+9/b@c/a.wav::https://u:p@h/x.tar?sig=1", "tar://512+9/b@c/a.wav::https://h/x.tar"),
        ("tar://b@c.wav::s3://b/x.tar.gz", "tar://b@c.wav::s3://b/x.tar.gz"),
        ("parquet://7/audio::https://u:p@h/x.parquet?sig=1", "parquet://7/audio::https://h/x.parquet"),
    ],
)
def test_public_uri(uri: str, public: str | None) -> None:
    assert public_uri(uri) == (uri.partition("?")[0] if public is None else public)
    assert default_id(uri) == public_uri(uri)
    assert public_uri(public_uri(uri)) == public_uri(uri)


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("/data/a::b?/x.tar", "/data/a::b?/x.tar"),
        ("s3://b/x.tar?", "s3://b/x.tar?"),
        ("https://h/x.tar.gz?sig=1.wav", "https://h/x.tar.gz"),
        ("simplecache::https://h/x.tar?s", "https://h/x.tar"),
        ("zip://x.tar::https://h/x.zip?s", "zip://x.tar"),
    ],
)
def test_what_tells_what_a_file_is(uri: str, name: str) -> None:
    assert name_of(uri) == name


# ---- lines of a manifest


def test_a_line_with_everything(jsonl: Callable[..., Path], tmp_path: Path) -> None:
    row = {
        "audio_filepath": "b/x.wav",
        "id": "x",
        "duration": 2.5,
        "offset": 1.00003,
        "text": "Grüße",
        "language": " DE",
        "task": "translate",
        "initial_prompt": "Hallo",
        "z": None,
        "speaker": {"name": "Ü", "age": 3},
    }
    path = jsonl(row)
    assert read(path) == [
        Recording(
            id="x",
            uri=f"{tmp_path}/b/x.wav",
            source=f"{path}:1",
            duration_s=2.5,
            offset=16_000,
            length=40_000,
            reference="Grüße",
            language="de",
            task="translate",
            initial_prompt="Hallo",
            metadata='{"speaker": {"age": 3, "name": "Ü"}, "z": null}',
        )
    ]


@pytest.mark.parametrize("key", ["audio_filepath", "uri", "path", "audio"])
def test_every_spelling_of_the_audio(key: str, jsonl: Callable[..., Path], tmp_path: Path) -> None:
    (recording,) = read(jsonl({key: "x.wav"}))
    assert recording == Recording(id=f"{tmp_path}/x.wav", uri=f"{tmp_path}/x.wav", source=f"{tmp_path}/a.jsonl:1")


@pytest.mark.parametrize(
    ("row", "duration_s", "offset", "length"),
    [
        ({"duration": 3}, 3.0, None, None),  # a hint
        ({"duration": "3.5"}, 3.5, None, None),
        ({"duration": None, "offset": None}, None, None, None),
        ({"offset": 0}, None, 0, None),
        ({"offset": 0, "duration": 2}, 2.0, 0, 32_000),
        ({"offset": 1e-5, "duration": 0}, 0.0, 0, 0),
    ],
)
def test_duration_is_a_hint_and_with_offset_a_slice(
    row: dict[str, Any], duration_s: float | None, offset: int | None, length: int | None, jsonl: Callable[..., Path]
) -> None:
    (recording,) = read(jsonl({"uri": "x.wav", **row}))
    assert (recording.duration_s, recording.offset, recording.length) == (duration_s, offset, length)


@pytest.mark.parametrize(
    ("value", "uri"),
    [
        ("x.wav", "{tmp}/x.wav"),
        ("./b//../x.wav", "{tmp}/x.wav"),
        ("../x.wav", "{up}/x.wav"),
        ("/data/../x.wav", "/x.wav"),
        ("file:///data/x.wav", "/data/x.wav"),
        ("~/a b#?.wav", "{tmp}/~/a b#?.wav"),
        ("s3://b/k//x.wav", "s3://b/k//x.wav"),
        ("https://h/x.wav?sig=1", "https://h/x.wav?sig=1"),
        ("zip://x.wav::s3://b/x.zip", "zip://x.wav::s3://b/x.zip"),
    ],
)
def test_where_a_line_points(value: str, uri: str, jsonl: Callable[..., Path], tmp_path: Path) -> None:
    (recording,) = read(jsonl({"uri": value}))
    assert recording.uri == uri.format(tmp=tmp_path, up=tmp_path.parent)
    assert recording.id == public_uri(recording.uri)


@pytest.mark.parametrize(
    ("folder", "value", "uri"),
    [
        ("m/n", "x.wav", "m/n/x.wav"),
        ("m/n", "./x/../y.wav", "m/n/y.wav"),
        ("m/n", "../x.wav", "m/x.wav"),
        ("m//n", "a//x.wav", "m//n/a//x.wav"),  # an object store takes names as they are
        ("", "x.wav", "x.wav"),
    ],
)
def test_lines_of_a_manifest_elsewhere(folder: str, value: str, uri: str) -> None:
    address = f"memory://bucket/{folder}/a.jsonl" if folder else "memory://bucket/a.jsonl"
    with fsspec.open(address, "wb") as file:
        file.write(json.dumps({"uri": value}).encode())
    assert [recording.uri for recording in read(address)] == [f"memory://bucket/{uri}"]


@pytest.mark.parametrize("offered", ["id", "default"])
def test_a_relative_and_an_absolute_name_are_one_file(offered: str, here: Path) -> None:
    write_wav(here / "x.wav", noise(0.1))
    lines(here / "a.jsonl", {"uri": "x.wav"})
    for other in ("x.wav", f"{here}/x.wav", f"file://{here}/x.wav", "./x.wav", "*.wav", ".", str(here)):
        assert read(other)[0].id == f"{here}/x.wav"
        assert refusal("a.jsonl", other).startswith(f"the id '{here}/x.wav' is given twice: a.jsonl:1 and {other}")


BAD = {  # a line → words of the refusal, which begins with the line's number
    "cut": ('{"uri": "x.wa', "not JSON"),
    "array": ('["x.wav"]', "a JSON object was expected, not ['x.wav']"),
    "number": ("3", "a JSON object was expected, not 3"),
    "empty": ("{}", "no audio: none of audio_filepath, uri, path, audio"),
    "null audio": ('{"uri": null, "id": "a"}', "no audio"),
    "both": ('{"uri": "x", "audio_filepath": "x"}', "both audio_filepath and uri"),
    "blank audio": ('{"uri": " "}', "uri: a path or an address was expected"),
    "audio object": ('{"audio": {"path": "x"}}', "audio: a path or an address was expected"),
    "store": ('{"uri": "foo://b/x"}', "nothing is known that opens foo://"),
    "id list": ('{"uri": "x", "id": [1]}', "id: a text was expected, not [1]"),
    "id true": ('{"uri": "x", "id": true}', "id: a text was expected, not True"),
    "id blank": ('{"uri": "x", "id": ""}', "id: a text was expected, not ''"),
    "duration word": ('{"uri": "x", "duration": "long"}', "duration: seconds from 0 up were expected, not 'long'"),
    "duration true": ('{"uri": "x", "duration": true}', "duration: seconds from 0 up"),
    "duration negative": ('{"uri": "x", "duration": -0.1}', "duration: seconds from 0 up were expected, not -0.1"),
    "duration huge": ('{"uri": "x", "duration": 1e300}', "duration: seconds"),
    "duration digits": ('{"uri": "x", "duration": ' + "9" * 400 + "}", "duration: seconds"),
    "duration more digits": ('{"uri": "x", "duration": ' + "9" * 5000 + "}", "not JSON"),
    "duration list": ('{"uri": "x", "duration": [1]}', "duration: seconds"),
    "offset negative": ('{"uri": "x", "offset": -1}', "offset: seconds from 0 up were expected, not -1"),
    "nan": ('{"uri": "x", "offset": NaN}', "NaN is no JSON number"),
    "infinity": ('{"uri": "x", "note": -Infinity}', "-Infinity is no JSON number"),
    "nan text": ('{"uri": "x", "offset": "nan"}', "offset: seconds"),
    "task": ('{"uri": "x", "task": "translation"}', "task: transcribe or translate was expected, not 'translation'"),
    "task list": ('{"uri": "x", "task": ["translate"]}', "task: transcribe or translate"),
    "text": ('{"uri": "x", "text": 5}', "text: a text was expected, not 5"),
    "prompt": ('{"uri": "x", "initial_prompt": ["a"]}', "initial_prompt: a text was expected"),
    "language": ('{"uri": "x", "language": 1}', "language: a text was expected"),
    "language blank": ('{"uri": "x", "language": " "}', "language: a code"),
    "key twice": ('{"uri": "x", "uri": "y"}', "key 'uri' twice"),
    "surrogate": ('{"uri": "x", "text": "\\ud800"}', "not JSON"),
    "deep": ('{"uri": "x", "a": ' + "[" * 100_000 + "]" * 100_000 + "}", "not JSON"),
    "two on a line": ('{"uri": "x"} {"uri": "y"}', "not JSON (Extra data"),
    "latin-1": (b'{"uri": "\xe9.wav"}', "not UTF-8 (byte 10 of the line)"),
    "utf-16": ('{"uri": "x"}'.encode("utf-16"), "not UTF-8 (byte 1 of the line)"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_refused_by_its_number(case: str, jsonl: Callable[..., Path]) -> None:
    line, words = BAD[case]
    path = jsonl(*({"uri": f"{i}.wav"} for i in range(499)), line, *({"uri": f"{i}.wav"} for i in range(500, 600)))
    text = refusal(path)
    assert text.startswith(f"{path}:500: ")
    assert words in text
    assert len(text) < 500


def test_rows_before_a_bad_line_come_first(jsonl: Callable[..., Path]) -> None:
    rows = read_inputs([str(jsonl({"uri": "x.wav"}, "no"))])
    assert next(rows).id.endswith("/x.wav")
    with pytest.raises(ManifestError, match=":2: not JSON"):
        next(rows)


def test_bom_crlf_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"uri": "x.wav"}\r\n\r\n  \t\r\n{"uri": "\xc3\xa9.wav"}')
    assert [(Path(r.uri).name, r.source) for r in read(path)] == [("x.wav", f"{path}:1"), ("é.wav", f"{path}:4")]


def test_a_cut_last_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"uri": "x.wav"}\n{"uri": "y.w')
    assert refusal(path).startswith(f"{path}:2: not JSON")
    assert "cut off?" in refusal(path)


def test_a_line_of_10_mb(jsonl: Callable[..., Path]) -> None:
    long = "x" * 10_000_000
    recordings = read(jsonl({"uri": "x.wav"}, {"uri": "y.wav", "text": long}, {"uri": "z.wav"}))
    assert [recording.reference for recording in recordings] == [None, long, None]


def test_a_line_without_end_is_refused(jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_MAX_LINE", 1 << 20)
    path = jsonl({"uri": "x.wav"}, "x" * (1 << 21))
    assert refusal(path) == f"{path}:2: longer than 1 MiB"


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_an_empty_manifest_has_no_recordings(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == []


def test_ids(jsonl: Callable[..., Path]) -> None:
    path = jsonl(
        {"uri": "x.wav", "id": 7}, {"uri": "https://u:p@h/x.wav?v=1&X-Amz-Signature=s"}, {"uri": "y", "id": " é"}
    )
    assert [recording.id for recording in read(path)] == ["7", "https://h/x.wav?v=1", " é"]
    assert read(path)[1].uri == "https://u:p@h/x.wav?v=1&X-Amz-Signature=s"


@pytest.mark.parametrize("second", [{"uri": "x.wav"}, {"uri": "y.wav", "id": "{tmp}/x.wav"}, {"uri": "./b/../x.wav"}])
def test_an_id_given_twice(second: dict[str, str], here: Path) -> None:
    rows = [{"uri": f"{i}.wav"} for i in range(20)]
    rows[2], rows[8] = {"uri": "x.wav"}, {key: value.format(tmp=here) for key, value in second.items()}
    lines(here / "a.jsonl", *rows)
    assert refusal("a.jsonl").startswith(f"the id '{here}/x.wav' is given twice: a.jsonl:3 and a.jsonl:9 ")


def test_an_id_given_by_two_manifests_without_their_secrets(here: Path) -> None:
    uri = "https://u:p@h/x.wav?sig={}"
    lines(here / "a.jsonl", {"uri": uri.format(1)})
    lines(here / "b.jsonl", {"uri": "y.wav"}, {"uri": uri.format(2)})
    text = refusal("a.jsonl", "b.jsonl")
    assert text.startswith("the id 'https://h/x.wav' is given twice: a.jsonl:1 and b.jsonl:2 ")


def test_slices_of_one_file_need_ids(jsonl: Callable[..., Path]) -> None:
    slices = [{"uri": "x.wav", "offset": i, "duration": 1} for i in range(2)]
    assert "slices of one file need ids of their own" in refusal(jsonl(*slices))
    assert len(read(jsonl(*({**row, "id": f"s{row['offset']}"} for row in slices)))) == 2


def test_rows_are_streamed_in_little_memory(jsonl: Callable[..., Path]) -> None:
    n = 10_000
    path = jsonl(*(json.dumps({"uri": f"https://h/{i}.wav", "text": "x" * 400}) for i in range(n)))
    tracemalloc.start()
    rows = read_inputs([str(path)])
    next(rows)
    assert tracemalloc.get_traced_memory()[1] < 3 << 20  # of a file of 4.4 MB
    assert sum(1 for _ in rows) == n - 1
    assert tracemalloc.get_traced_memory()[1] < n * 200 + (3 << 20)
    tracemalloc.stop()


# ---- CSV and Parquet


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        b"\xef\xbb\xbfid, audio_filepath ,duration,offset,text,language,speaker\r\n"
        b'007,x.wav,2.5,,"He said ""no"",\r\nthen left",EN,\r\n'
        b"\r\n"
        b",y.wav,1,0.5,,,Zo\xc3\xab\r\n"
    )
    first, second = read(path)
    assert first == Recording(
        id="007",
        uri=f"{tmp_path}/x.wav",
        source=f"{path}:2",
        duration_s=2.5,
        reference='He said "no",\r\nthen left',
        language="en",
        metadata='{"speaker": ""}',
    )
    assert second == Recording(
        id=f"{tmp_path}/y.wav",
        uri=f"{tmp_path}/y.wav",
        source=f"{path}:5",
        duration_s=1.0,
        offset=8_000,
        length=16_000,
        metadata='{"speaker": "Zoë"}',
    )


@pytest.mark.parametrize(
    ("content", "where", "words"),
    [
        (b"uri,id\nx.wav,1\ny.wav", ":3", "1 cells where the header has 2"),
        (b"uri,id\nx.wav,1\ny.wav,2,3\n", ":3", "3 cells where the header has 2"),
        (b'uri,text\n"a\nb",1\n"y.wav,2\n', ":4", "not CSV (unexpected end of data)"),
        (b'uri,text\nx.wav,"a"b\n', ":2", "not CSV"),
        (b"uri,id\nx.wav,1\n\xff.wav,2\n", ":3", "not UTF-8 (byte 1 of the line)"),
        (b"x.wav,1\ny.wav,2\n", ":1", "'x.wav, 1'; is the first line the header?"),
        (b"uri;text\nx.wav;1\n", ":1", "'uri;text'; is the first line the header, with commas between its columns?"),
        (b"uri\ttext\nx.wav\t1\n", ":1", "with commas between its columns?"),
        (b"uri,language\nx.wav,German\n", ":2", "language: a code such as 'en' was expected, not 'German'"),
        (b"uri,uri\nx.wav,1\n", ":1", "two of one name"),
        (b"uri,\nx.wav,1\n", ":1", "a column without a name"),
        (b"uri,duration\nx.wav,1\ny.wav,ten\n", ":3", "duration: seconds from 0 up were expected, not 'ten'"),
        (b"uri,path\nx.wav,\n,y.wav\nx.wav,y.wav\n", ":4", "both uri and path"),
        (b"uri,id\n,1\n", ":2", "no audio"),
    ],
)
def test_bad_csv(content: bytes, where: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    text = refusal(path)
    assert text.startswith(f"{path}{where}: ")
    assert words in text


def test_a_column_in_capitals_is_metadata_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"uri,Text,LANGUAGE,Desk\nx.wav,hello,DE,7\n")
    (recording,) = read(path)
    assert (recording.reference, recording.language) == (None, None)
    assert caplog.messages == [f"{path}:1: Text, LANGUAGE: known columns are written in lower case; taken for metadata"]


def test_a_csv_cell_of_10_mb(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("uri,text\nx.wav," + "x" * 10_000_000 + "\n")
    assert len(read(path)[0].reference or "") == 10_000_000


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"path": f"{i}.wav", "id": i, "duration": 1.5, "offset": None} for i in range(3000)]
    rows[1] = {"path": "b/1.wav", "duration": float("nan"), "offset": 1.0, "text": "ü"}
    rows[2] |= {"when": datetime.datetime(2024, 5, 6, 7, 8), "cost": Decimal("1.20"), "tags": ["b", "a"]}
    schema = pa.Table.from_pylist([rows[1] | rows[2] | {"offset": 1.0}]).schema
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    recordings = read(path)
    assert len(recordings) == 3000
    assert recordings[0].id == "0"
    assert recordings[0].offset is None
    assert recordings[1] == Recording(
        id=f"{tmp_path}/b/1.wav",
        uri=f"{tmp_path}/b/1.wav",
        source=f"{path}:2",
        offset=16_000,
        reference="ü",
        metadata='{"cost": null, "tags": null, "when": null}',
    )
    assert json.loads(recordings[2].metadata or "") == {
        "when": "2024-05-06 07:08:00",
        "cost": "1.20",
        "tags": ["b", "a"],
    }
    assert recordings[2999].source == f"{path}:3000"


def test_bad_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"uri": ["x", "y"], "duration": [1.0, -1.0]}), path)
    assert refusal(path).startswith(f"{path}:2: duration: seconds")
    pq.write_table(pa.table({"uri": ["x"], "picture": [b"\xff"]}), path)
    assert refusal(path) == f"{path}:1: metadata: a column of bytes cannot travel as JSON"
    pq.write_table(pa.table({"uri": pa.array([], pa.string())}), path)
    assert read(path) == []
    for content in (b"", b"no parquet"):
        path.write_bytes(content)
        assert refusal(path).startswith(f"{path}: not Parquet (")
    path.write_bytes(b"PAR1" + bytes(50) + b"PAR1")
    assert refusal(path).startswith(f"{path}: cannot be read (")


# ---- folders, globs, files


def tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"12345")
    return root


NAMES = ["b/2.MP3", "b/10.flac", "a.wav", "b/c/d.e.opus", "b.wav", "ä.webm", "notes.txt", "b/cover.jpg", "b/README"]


def test_a_folder(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree(here / "x", *NAMES, "b/._10.flac", ".cache/y.wav")
    (here / "x/link.wav").symlink_to(here / "x/a.wav")
    (here / "x/dead.wav").symlink_to(here / "x/gone.wav")
    (here / "x/b/loop").symlink_to(here / "x")
    with caplog.at_level(logging.WARNING):
        recordings = read("x/")
    names = ["a.wav", "b.wav", "b/10.flac", "b/2.MP3", "b/c/d.e.opus", "link.wav", "ä.webm"]
    assert [recording.uri for recording in recordings] == [f"{here}/x/{name}" for name in names]
    changed = f"{(here / 'x/a.wav').stat().st_mtime:.6f}"  # a disk has no etags
    assert recordings[0] == Recording(id=f"{here}/x/a.wav", uri=f"{here}/x/a.wav", source="x/", size=5, etag=changed)
    assert caplog.messages == [
        "x/: 7 files taken, 7 others left out"
        " (1 .jpg, 1 .txt, 1 broken link, 2 hidden, 1 link to a folder, 1 without extension)"
    ]


def test_a_glob(here: Path) -> None:
    tree(here, *NAMES)
    lines(here / "b" / "m.jsonl", {"uri": "far.wav"})
    assert [Path(r.uri).name for r in read("b/*.[fM]*")] == ["10.flac", "2.MP3"]
    names = ["a.wav", "b.wav", "b/2.MP3", "b/c/d.e.opus", "b/far.wav", "ä.webm"]
    assert [r.uri for r in read("**/?.*")] == [f"{here}/{name}" for name in names]
    assert [r.source for r in read(f"{here}/b/*.jsonl")] == [f"{here}/b/m.jsonl:1"]


def test_a_name_with_the_marks_of_a_glob(here: Path) -> None:
    tree(here, "a[1].wav", "a1.wav", "what?.wav")
    assert [r.uri for r in read("a[1].wav")] == [f"{here}/a[1].wav"]
    assert [r.uri for r in read("what?.wav")] == [f"{here}/what?.wav"]


def test_files_named_outright_may_have_any_name(here: Path) -> None:
    tree(here, "a.bin", "b", ".hidden.wav")
    assert [r.id for r in read("a.bin", "b", ".hidden.wav")] == [f"{here}/{n}" for n in ("a.bin", "b", ".hidden.wav")]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("missing.jsonl", "missing.jsonl: not found"),
        ("missing.wav", "missing.wav: not found"),
        ("missing/", "missing/: not found"),
        ("none/*.wav", "none/*.wav: nothing matches"),
        ("empty", "empty: no audio files"),
        ("only", "only: no audio files, only others (1 .jpg, 1 .txt)"),
        ("only/*", "only/*: no audio files, only others (1 .jpg, 1 .txt, 1 folder)"),
        ("a.tar", "a.tar: not found"),
        ("only/x.txt", "only/x.txt: neither a manifest (.jsonl, .csv, .parquet), a tar nor an audio file"),
        ("foo://x/a.wav", "foo://x/a.wav: cannot be read (ValueError: Protocol not known: foo)"),
        ("http://127.0.0.1:1/a.jsonl?sig=secret", "http://127.0.0.1:1/a.jsonl: cannot be read (ClientConnectorError"),
    ],
)
def test_inputs_that_are_not_there(given: str, words: str, here: Path) -> None:
    (here / "empty").mkdir()
    tree(here / "only", "x.txt", "y.jpg")
    (here / "only/sub").mkdir()
    assert refusal(given).startswith(words)


def test_no_input_at_all() -> None:
    assert refusal() == "no input was given"
    assert refusal("a.wav", " ").startswith("an input is an empty text")


def test_a_file_name_that_is_not_utf_8(here: Path) -> None:
    (here / "x").mkdir()
    with open(os.fsencode(here) + b"/x/\xe9.wav", "wb"):
        pass
    assert refusal("x").startswith(f"x: the file name '{here}/x/\\udce9.wav' is not UTF-8")
    with open(os.fsencode(here) + b"/x/\xe8.wav", "wb"):
        pass
    assert refusal("x").startswith(f"x: 2 file names are not UTF-8, the first one '{here}/x/\\udce8.wav'")


def test_an_unreadable_manifest(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines(here / "a.jsonl", {"uri": "x.wav"})

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem._open", refuse)
    assert refusal("a.jsonl") == "a.jsonl: access refused"


def test_extensions_are_lower_case_with_a_dot() -> None:
    assert all(extension == extension.lower() and extension[0] == "." for extension in AUDIO_EXTENSIONS)
    assert not AUDIO_EXTENSIONS & {".jsonl", ".csv", ".parquet", ".tar", ".txt", ".m3u8"}


# ---- other stores


def test_on_s3(s3: str, tmp_path: Path) -> None:
    import boto3

    wav = write_wav(tmp_path / "x.wav", noise(0.5)).read_bytes()
    for name in ("m/b/2.wav", "m/b/1.wav", "m/3.wav", "m/notes.txt"):
        with fsspec.open(f"{s3}/{name}", "wb") as file:
            file.write(wav)
    with fsspec.open(f"{s3}/m/list.jsonl", "wb") as file:
        file.write(b'{"audio_filepath": "b/1.wav"}\n{"audio_filepath": "../n/4.wav", "id": "four"}\n')

    folder = read(f"{s3}/m")
    assert [r.uri for r in folder] == [f"{s3}/m/{name}" for name in ("3.wav", "b/1.wav", "b/2.wav")]
    assert {(r.size, len(r.etag or "")) for r in folder} == {(len(wav), 32)}
    assert [r.uri for r in read(f"{s3}/m/*/1.*")] == [f"{s3}/m/b/1.wav"]
    assert read(f"{s3}/m/*/1.*")[0].etag == folder[1].etag
    assert read(f"{s3}/m/b/1.wav")[0].size == len(wav)

    rows = read(f"{s3}/m/list.jsonl")
    assert [(r.id, r.uri) for r in rows] == [(f"{s3}/m/b/1.wav",) * 2, ("four", f"{s3}/n/4.wav")]
    assert [r.source for r in read(f"{s3}/*/list.jsonl")] == [f"{s3}/m/list.jsonl:{line}" for line in (1, 2)]
    with open_audio(rows[0], channels="mix", max_audio_s=10) as stream:
        assert np.array_equal(np.concatenate(list(stream)), noise(0.5))

    # Another process writes after a listing was read and remembered.
    fsspec.filesystem("s3").ls(f"{s3}/m")
    boto3.client("s3").put_object(Bucket=s3.removeprefix("s3://"), Key="m/new.wav", Body=wav)
    assert len(read(f"{s3}/m/new.wav")) == 1
    assert len(read(f"{s3}/m")) == 4
    for missing in ("gone.jsonl", "gone", "gone/*.wav"):
        assert refusal(f"{s3}/{missing}").startswith(f"{s3}/{missing}: ")


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The address of an HTTP server that serves `tmp_path` and lists its folders."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_over_http(web: str, tmp_path: Path) -> None:
    tree(tmp_path, "m/b/1.wav", "m/2.wav", "m/notes.txt")
    lines(tmp_path / "m/list.jsonl", {"uri": "b/1.wav"}, {"uri": "../n/4.wav"}, {"uri": "https://h/5.wav?token=s"})
    name = web.replace("//", "//user:pw@") + "/m/list.jsonl"
    rows = read(f"{name}?X-Amz-Signature=s&v=2")
    public = f"{web}/m/list.jsonl?v=2"
    assert [r.id for r in rows] == [f"{web}/m/b/1.wav", f"{web}/n/4.wav", "https://h/5.wav"]
    assert rows[0].uri == f"{web.replace('//', '//user:pw@')}/m/b/1.wav"
    assert [r.source for r in rows] == [f"{public}:{line}" for line in (1, 2, 3)]
    (one,) = read(f"{web}/m/2.wav?sig=s")
    assert one == Recording(id=f"{web}/m/2.wav", uri=f"{web}/m/2.wav?sig=s", source=f"{web}/m/2.wav", size=5)
    assert [r.uri for r in read(f"{web}/m/")] == [f"{web}/m/2.wav", f"{web}/m/b/1.wav"]
    assert [r.uri for r in read(f"{web}/m/*.wav")] == [f"{web}/m/2.wav"]
    assert refusal(f"{web}/gone.csv?sig=s") == f"{web}/gone.csv: not found"


def test_a_bucket_that_is_not_there(s3: str) -> None:
    assert refusal("s3://no-such-bucket-here/m").startswith("s3://no-such-bucket-here/m: ")
