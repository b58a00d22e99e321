"""Audio inside Parquet as input: planned without being read, and read back row by row as it was put in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from audio_files import noise, tone, write_wav

from pipeline import cells, source
from pipeline.decoder import open_audio
from pipeline.errors import DamagedAudioError, ManifestError, NotFoundError
from pipeline.manifest import file_of, identity, read_inputs
from pipeline.types import Pcm, Recording

AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def read(*inputs: Path | str) -> list[Recording]:
    return list(read_inputs([str(text) for text in inputs]))


def sound(recording: Recording) -> Pcm:
    with open_audio(recording, channels="mix", max_audio_s=100) as stream:
        return np.concatenate(list(stream))


@pytest.fixture
def wav(tmp_path: Path) -> Callable[[Pcm], bytes]:
    return lambda pcm: write_wav(tmp_path / "one.wav", pcm).read_bytes()


def write(path: Path, rows: list[dict[str, Any]], audio: pa.DataType = AUDIO, rows_per_group: int = 3) -> Path:
    guessed = pa.Table.from_pylist(rows).schema
    schema = pa.schema([pa.field("audio", audio) if field.name == "audio" else field for field in guessed])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=rows_per_group)
    return path


CLIPS = [tone(200 + 40 * i, 0.2 + i / 20) for i in range(8)]


def test_what_is_read_is_what_was_put_in(tmp_path: Path, wav: Callable[[Pcm], bytes]) -> None:
    rows = [
        {"audio": {"bytes": wav(clip), "path": f"{i}.wav"}, "text": f"clip {i}", "speaker": i, "path": "elsewhere.wav"}
        for i, clip in enumerate(CLIPS)
    ]
    path = write(tmp_path / "x.parquet", rows)
    found = read(path)
    assert found[4] == Recording(
        id="4.wav",
        uri=f"parquet://5/audio::{path}",
        source=f"{path}:5",
        etag=identity(str(path))[1],  # of the file: other bytes in it are found out by that
        reference="clip 4",
        metadata='{"path": "elsewhere.wav", "speaker": 4}',
    )
    for i in (0, 1, 5, 7, 2, 2, 3, 6, 4):  # forward, over a row group, and back
        assert np.array_equal(sound(found[i]), CLIPS[i])


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.binary())])])
def test_other_columns_of_bytes(kind: pa.DataType, tmp_path: Path, wav: Callable[[Pcm], bytes]) -> None:
    values = [wav(clip) for clip in CLIPS[:2]]
    rows = [
        {"audio": {"bytes": value} if pa.types.is_struct(kind) else value, "id": i} for i, value in enumerate(values)
    ]
    path = write(tmp_path / "x.parquet", rows, kind)
    assert [(r.id, r.uri) for r in read(path)] == [(str(i), f"parquet://{i + 1}/audio::{path}") for i in range(2)]
    assert all(np.array_equal(sound(r), clip) for r, clip in zip(read(path), CLIPS, strict=False))
    write(path, [{key: row[key] for key in row if key != "id"} for row in rows], kind)
    assert [r.id for r in read(path)] == [f"{path}#1", f"{path}#2"]


def test_a_struct_of_any_name_and_a_slice(tmp_path: Path, wav: Callable[[Pcm], bytes]) -> None:
    table = pa.table(
        {
            "speech": pa.array([{"bytes": wav(CLIPS[7]), "path": "a.wav"}] * 2, AUDIO),
            "id": ["all", "part"],
            "offset": [None, 0.1],
            "duration": [0.5, 0.2],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    whole, part = read(tmp_path / "x.parquet")
    assert (whole.duration_s, whole.offset, part.offset, part.length) == (0.5, None, 1600, 3200)
    assert np.array_equal(sound(part), CLIPS[7][1600:4800])


def test_no_bytes_means_the_file_that_the_path_names(tmp_path: Path, wav: Callable[[Pcm], bytes]) -> None:
    for i in range(6):
        write_wav(tmp_path / "audio" / f"{i}.wav", CLIPS[i])
    rows: list[dict[str, Any]] = [{"audio": {"bytes": None, "path": f"audio/{i}.wav"}, "path": "x"} for i in range(6)]
    rows[4]["audio"] = {"bytes": wav(CLIPS[4]), "path": None}
    path = write(tmp_path / "x.parquet", rows)
    found = read(path)
    assert [r.uri for r in found[:3]] == [f"{tmp_path}/audio/{i}.wav" for i in range(3)]  # none in that row group
    assert [r.id for r in found] == [*(r.uri for r in found[:3]), "audio/3.wav", f"{path}#5", "audio/5.wav"]
    for recording, clip in zip(found, CLIPS, strict=False):
        assert np.array_equal(sound(recording), clip)


def test_neither_bytes_nor_a_path(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", [{"audio": {"bytes": None, "path": None}}] * 2)
    with pytest.raises(ManifestError, match=r"x\.parquet:1: no audio"):
        read(path)
    write(path, [{"audio": {"bytes": b"x", "path": "a"}}, {"audio": {"bytes": None, "path": None}}])
    for recording, error in zip(read(path), (DamagedAudioError, NotFoundError), strict=True):
        with pytest.raises(error):
            sound(recording)


def test_the_same_path_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", [{"audio": {"bytes": b"x", "path": "a.wav"}}] * 2)
    with pytest.raises(ManifestError, match=rf"'a.wav' is given twice: {path}:1 and {path}:2"):
        read(path)
    pq.write_table(pa.table({"a": pa.array([], AUDIO), "b": pa.array([], AUDIO)}), path)
    with pytest.raises(ManifestError, match="audio in several columns: a, b"):
        read(path)


def test_it_is_planned_without_reading_the_audio(tmp_path: Path) -> None:
    """Overwritten on the disk, the audio is not missed until it is decoded; then it costs what it hits."""
    rows = [{"audio": {"bytes": noise(0.5, seed=i).tobytes(), "path": f"{i}.wav"}, "text": str(i)} for i in range(9)]
    path = write(tmp_path / "x.parquet", rows)
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    assert chunk.path_in_schema == "audio.bytes"
    raw = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    raw[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(raw)
    found = read(path)
    assert [r.reference for r in found] == [str(i) for i in range(9)]
    for i, recording in enumerate(found):
        with pytest.raises(DamagedAudioError) as caught:
            sound(recording)
        assert (f"row {i + 1} cannot be read" in str(caught.value)) == (i in (3, 4, 5))


def test_rows_that_are_not_there(tmp_path: Path, wav: Callable[[Pcm], bytes]) -> None:
    path = write(tmp_path / "x.parquet", [{"audio": {"bytes": wav(CLIPS[0]), "path": "a.wav"}}])
    lines = tmp_path / "m.jsonl"
    uris = [f"parquet://{row}/{column}::{path}" for row, column in ((1, "audio"), (2, "audio"), (1, "sound"))]
    lines.write_text("".join(json.dumps({"uri": uri, "offset": 0.1, "duration": 0.05}) + "\n" for uri in uris))
    there, *lost = read(lines)
    assert np.array_equal(sound(there), CLIPS[0][1600:2400])
    for recording in [*lost, Recording(id="x", uri="parquet://1/audio::/no/such.parquet")]:
        with pytest.raises(NotFoundError):
            sound(recording)


def test_the_file_that_a_store_is_asked_for() -> None:
    assert file_of("parquet://5/audio::s3://b/x.parquet") == "s3://b/x.parquet"
    assert file_of("tar://512+9/a.wav::/data/x.tar") == file_of("tar://a.wav::/data/x.tar") == "/data/x.tar"
    assert file_of("zip://a.wav::/data/x.zip") == "zip://a.wav::/data/x.zip"


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path, wav: Callable[[Pcm], bytes]) -> None:
    for clip in CLIPS[:3]:
        path = write(tmp_path / "x.parquet", [{"audio": {"bytes": wav(clip), "path": "a.wav"}}])
        assert np.array_equal(sound(read(path)[0]), clip)


def test_rows_in_order_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"audio": {"bytes": noise(4.0, seed=i).tobytes(), "path": f"{i}.wav"}} for i in range(40)]  # 5 MB
    path = write(tmp_path / "x.parquet", rows, rows_per_group=20)
    n_read = 0

    class Counting:
        def __init__(self, file: Any) -> None:
            self._file = file

        def read(self, size: int = -1) -> bytes:
            nonlocal n_read
            data: bytes = self._file.read(size)
            n_read += len(data)
            return data

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    with open(path, "rb") as file:
        column = cells.Cells(Counting(file), "audio")
        for row in range(1, 41):
            assert column.read(row) == (rows[row - 1]["audio"]["bytes"], f"{row - 1}.wav")
    assert n_read < 1.2 * path.stat().st_size


def test_on_s3(s3: str, tmp_path: Path, wav: Callable[[Pcm], bytes]) -> None:
    import fsspec

    fs = fsspec.filesystem("s3")
    write_wav(tmp_path / "far.wav", CLIPS[3])
    fs.put_file(str(tmp_path / "far.wav"), f"{s3}/data/far.wav")
    rows: list[dict[str, Any]] = [{"audio": {"bytes": wav(clip), "path": f"{i}"}} for i, clip in enumerate(CLIPS[:3])]
    rows.append({"audio": {"bytes": None, "path": "far.wav"}})
    fs.put_file(str(write(tmp_path / "x.parquet", rows, rows_per_group=4)), f"{s3}/data/x.parquet")
    found = read(f"{s3}/data/x.parquet")
    assert found[0].uri == f"parquet://1/audio::{s3}/data/x.parquet"
    for recording, clip in zip(found, CLIPS, strict=False):
        assert np.array_equal(sound(recording), clip)
    source._cells.cache_clear()
