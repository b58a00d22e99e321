"""Tar shards as input: what is found in one, where, and that what is read there is what was put in."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import logging
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from audio_files import noise, tone, write_wav

from pipeline import source, tars
from pipeline.decoder import open_audio
from pipeline.errors import AudioError, DamagedAudioError, ManifestError, NotFoundError
from pipeline.manifest import read_inputs
from pipeline.types import Pcm, Recording

FORMS: dict[str, Callable[[bytes], bytes]] = {
    ".tar": bytes,
    ".tar.gz": gzip.compress,
    ".tgz": gzip.compress,
    ".tar.bz2": bz2.compress,
    ".tar.xz": lzma.compress,
    ".tar.zst": lambda raw: pa.compress(raw, "zstd", asbytes=True),
}


def read(*inputs: Path | str) -> list[Recording]:
    return list(read_inputs([str(text) for text in inputs]))


def refusal(*inputs: Path | str) -> str:
    with pytest.raises(ManifestError) as caught:
        read(*inputs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def sound(recording: Recording) -> Pcm:
    with open_audio(recording, channels="mix", max_audio_s=100) as stream:
        return np.concatenate(list(stream))


@pytest.fixture
def wav(tmp_path: Path) -> Callable[[Pcm], bytes]:
    return lambda pcm: write_wav(tmp_path / "one.wav", pcm).read_bytes()


def shard(path: Path, members: dict[str, bytes | tarfile.TarInfo], form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar with these files (or whatever else a TarInfo says) in it, packed as its name tells."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=form) as tar:
        for name, data in members.items():
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.name = name
            info.size = len(data) if isinstance(data, bytes) else info.size
            tar.addfile(info, io.BytesIO(data) if isinstance(data, bytes) else None)
    pack = next(FORMS[ending] for ending in sorted(FORMS, key=len, reverse=True) if path.name.endswith(ending))
    path.write_bytes(pack(raw.getvalue()))
    return path


@pytest.mark.parametrize("ending", FORMS)
def test_what_is_read_is_what_was_put_in(ending: str, tmp_path: Path, wav: Callable[[Pcm], bytes]) -> None:
    clips = [tone(200 + 50 * i, 0.3 + i / 10) for i in range(4)]
    names = ["a/0.wav", "a/1.wav", f"a/{'long' * 40}.wav", "ä@1/3.wav"]  # one longer than the header holds
    path = shard(tmp_path / f"x{ending}", {name: wav(clip) for name, clip in zip(names, clips, strict=True)})
    found = read(path)
    assert [recording.id for recording in found] == [f"{path}/{name}" for name in names]
    assert [recording.size for recording in found] == [len(wav(clip)) for clip in clips]
    for recording, name, clip in zip(found, names, clips, strict=True):
        assert np.array_equal(sound(recording), clip)
        assert np.array_equal(sound(Recording(id="x", uri=f"tar://{name}::{path}")), clip)  # as a manifest has it
    half = Recording(id="x", uri=found[3].uri, offset=1600, length=3200)
    assert np.array_equal(sound(half), clips[3][1600:4800])


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_what_lies_beside_a_file_speaks_of_it(
    form: int, tmp_path: Path, wav: Callable[[Pcm], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    said = {"text": "hello", "language": "EN", "speaker": 7, "duration": 0.2, "offset": 5, "path": "old.wav"}
    clip = wav(tone(300, 0.2))
    path = shard(
        tmp_path / "x.tar",
        {
            "0.wav": clip, "0.json": json.dumps(said).encode(), "0.txt": b"not this\n",
            "1.cls": b"3\n", "1.txt": " grüß dich\n".encode(), "1.wav": clip,
            "2.wav": clip,
            "3.json": b"{}", "readme": b"x",
            "4.wav": clip, "4.json": b'{"id": "four"}',
        },
        form,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        zero, one, two, four = read(path)
    assert (zero.reference, zero.language, zero.duration_s, zero.offset) == ("hello", "en", 0.2, None)
    assert json.loads(zero.metadata or "") == {"offset": 5, "path": "old.wav", "speaker": 7}  # not ours to follow
    assert (one.reference, one.metadata) == ("grüß dich", '{"cls": "3"}')
    assert (two.reference, two.metadata, four.id) == (None, None, "four")
    assert [r.source for r in (zero, one)] == [f"{path}:1 ('0.wav')", f"{path}:6 ('1.wav')"]
    assert caplog.messages == [f"{path}: 4 files taken, 2 others left out (1 .json, 1 without extension)"]


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        ({"0.json": b"[1]"}, "x.tar/0.json: a JSON object was expected, not [1]"),
        ({"0.json": b'{"text": '}, "x.tar/0.json: not JSON"),
        ({"0.json": b'{"text": 5}'}, "x.tar:1 ('0.wav'): text: a text was expected, not 5"),
        ({"0.txt": b"\xff"}, "x.tar/0.txt: not UTF-8"),
        ({"1.wav": b"", "2.wav": b"", "1.json": b'{"id": "a"}', "2.json": b'{"id": "a"}'}, "no"),
    ],
)
def test_what_it_says_wrongly_is_refused(beside: dict[str, bytes], words: str, tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", {"0.wav": b"RIFF", **beside})
    if words != "no":
        assert refusal(path).startswith(f"{tmp_path}/{words}")


def test_hostile_members_are_named_and_never_opened(
    tmp_path: Path, wav: Callable[[Pcm], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    def special(kind: bytes, target: str = "") -> tarfile.TarInfo:
        info = tarfile.TarInfo()
        info.type, info.linkname = kind, target
        return info

    clip = wav(tone(300, 0.2))
    path = shard(
        tmp_path / "x.tar",
        {
            "link.wav": special(tarfile.SYMTYPE, "/etc/passwd"),
            "hard.wav": special(tarfile.LNKTYPE, "good.wav"),
            "zero.wav": special(tarfile.CHRTYPE),
            "pipe.wav": special(tarfile.FIFOTYPE),
            "folder.wav": special(tarfile.DIRTYPE),
            "/etc/shadow.wav": clip,
            "../../up.wav": clip,
            "a::b.wav": clip,
            "._good.wav": clip,
            "good.wav": clip,
        },
    )
    with caplog.at_level(logging.WARNING):
        (good,) = read(path)
    assert good.id == f"{path}/good.wav"
    assert caplog.messages == [
        f"{path}: 1 files taken, 9 others left out"
        " (2 device, 1 folder, 1 hidden, 2 link, 1 with :: in its name, 2 with a path that leads out)"
    ]
    with pytest.raises(NotFoundError):
        sound(Recording(id="x", uri=f"tar://link.wav::{path}"))


def test_a_sparse_file_is_left_out(tmp_path: Path) -> None:
    info = tarfile.TarInfo("holes.wav")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "99999999"}
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        info.size = 512
        tar.addfile(info, io.BytesIO(b"0\n".ljust(512, b"\0")))
    (tmp_path / "x.tar").write_bytes(raw.getvalue())
    assert refusal(tmp_path / "x.tar") == f"{tmp_path}/x.tar: no audio files, only others (1 sparse file)"


def test_one_name_twice_is_refused(tmp_path: Path) -> None:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("a.wav"))
    path = tmp_path / "x.tar"
    path.write_bytes(raw.getvalue())
    assert refusal(path).startswith(f"the id '{path}/a.wav' is given twice: {path}:1 ('a.wav') and {path}:2 ('a.wav')")


@pytest.mark.parametrize("ending", FORMS)
def test_a_damaged_shard_is_refused_by_name(ending: str, tmp_path: Path, wav: Callable[[Pcm], bytes]) -> None:
    members = {f"{i}.wav": wav(noise(0.5, seed=i)) for i in range(20)}
    path = shard(tmp_path / f"x{ending}", members)
    whole = path.read_bytes()
    for cut in (whole[: len(whole) * 2 // 3], whole[:100], b""):
        path.write_bytes(cut)
        assert refusal(path).startswith(f"{path}: damaged "), len(cut)
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 20_000] = bytes(range(250)) * 80  # over a header, or in the packing
    path.write_bytes(damaged)
    assert refusal(path).startswith(f"{path}: damaged {'after 1' if ending == '.tar' else ''}")
    if ending != ".tar":
        with pytest.raises(AudioError):
            sound(Recording(id="x", uri=f"tar://19.wav::{path}"))


def test_a_shard_that_was_replaced_is_not_misread(tmp_path: Path, wav: Callable[[Pcm], bytes]) -> None:
    path = shard(tmp_path / "x.tar", {"a.wav": wav(tone(300, 0.2)), "b.wav": wav(tone(400, 0.3))})
    first, second = read(path)
    shard(path, {"0.wav": wav(tone(500, 0.2)), "b.wav": wav(tone(400, 0.3))})
    with pytest.raises(NotFoundError, match=r"a\.wav::.*: not found"):
        sound(first)
    assert np.array_equal(sound(second), tone(400, 0.3))
    path.write_bytes(path.read_bytes()[:2000])
    for lost in (second, Recording(id="x", uri=f"tar://c.wav::{tmp_path}/y.tar")):
        with pytest.raises(NotFoundError):
            sound(lost)


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_what_was_found_in_a_shard_is_forgotten_with_it(
    ending: str, tmp_path: Path, wav: Callable[[Pcm], bytes]
) -> None:
    for i in range(3):
        path = shard(
            tmp_path / f"x{ending}", {f"{'b' * i}.wav": b"" for i in range(i)} | {"a.wav": wav(tone(300, i + 1))}
        )
        assert len(sound(Recording(id="x", uri=f"tar://a.wav::{path}"))) == 16_000 * (i + 1)


def test_what_is_no_audio_in_a_shard_costs_itself_only(tmp_path: Path, wav: Callable[[Pcm], bytes]) -> None:
    path = shard(tmp_path / "x.tar", {"a.wav": b"no audio at all" * 99, "b.wav": wav(tone(400, 0.3))})
    first, second = read(path)
    with pytest.raises(DamagedAudioError, match=r"a\.wav"):
        sound(first)
    assert np.array_equal(sound(second), tone(400, 0.3))


def test_folders_and_globs_of_shards(tmp_path: Path, wav: Callable[[Pcm], bytes]) -> None:
    clip = wav(tone(400, 0.3))
    for name in ("1.tar", "2.tar.gz"):
        shard(tmp_path / name, {"a.wav": clip, "b.wav": clip})
    (tmp_path / "one.wav").rename(tmp_path / "3.wav")
    names = [f"{tmp_path}/{name}" for name in ("1.tar/a.wav", "1.tar/b.wav", "2.tar.gz/a.wav", "2.tar.gz/b.wav")]
    assert [r.id for r in read(tmp_path)] == [*names, f"{tmp_path}/3.wav"]
    assert [r.id for r in read(f"{tmp_path}/*.tar")] == names[:2]


def test_a_packed_shard_is_unpacked_once_for_its_members(
    tmp_path: Path, wav: Callable[[Pcm], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shard(tmp_path / "x.tar.gz", {f"{i}.wav": wav(tone(200 + i, 0.1)) for i in range(5)})
    unpacked: list[Any] = []
    spooled = source._spooled
    monkeypatch.setattr(source, "_spooled", lambda file: unpacked.append(file) or spooled(file))
    for i, recording in enumerate(read(path)):
        assert np.array_equal(sound(recording), tone(200 + i, 0.1))
    assert len(unpacked) == 1


def test_on_s3_a_member_is_read_by_its_range(s3: str, tmp_path: Path, wav: Callable[[Pcm], bytes]) -> None:
    import boto3
    import fsspec

    clips = {f"{i}.wav": tone(200 + 20 * i, 40.0) for i in range(3)}  # 1.3 MB each, more than one range
    path = shard(tmp_path / "x.tar", {name: wav(clip) for name, clip in clips.items()})
    fsspec.filesystem("s3").put_file(str(path), f"{s3}/x.tar")
    found = read(f"{s3}/x.tar")
    assert [r.id for r in found] == [f"{s3}/x.tar/{name}" for name in clips]
    for recording, clip in zip(found, clips.values(), strict=True):
        assert recording.uri.endswith(f"::{s3}/x.tar")
        assert np.array_equal(sound(recording), clip)
    link = boto3.client("s3").generate_presigned_url("get_object", {"Bucket": s3.removeprefix("s3://"), "Key": "x.tar"})
    signed = read(link)  # a name with a query, over HTTP
    assert [r.id for r in signed] == [f"{link.partition('?')[0]}/{name}" for name in clips]
    assert np.array_equal(sound(signed[2]), clips["2.wav"])
    opened = source.Source(found[1].uri)
    assert opened.size == found[1].size
    assert opened.read_at(opened.size - 10, 100) == wav(clips["1.wav"])[-10:]
    opened.close()
    lines = tmp_path / "m.jsonl"
    lines.write_text(json.dumps({"uri": f"tar://2.wav::{s3}/x.tar", "offset": 1.0, "duration": 0.5}))
    assert np.array_equal(sound(read(lines)[0]), clips["2.wav"][16_000:24_000])


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("tar://512+99/a/b.wav::s3://b/x.tar", tars.Address("s3://b/x.tar", "a/b.wav", (512, 99))),
        ("tar://a/b.wav::/data/x.tar.gz", tars.Address("/data/x.tar.gz", "a/b.wav")),
        ("tar://a.wav::simplecache::https://h/x.tar?s", tars.Address("simplecache::https://h/x.tar?s", "a.wav")),
        ("tar://a.wav", None),
        ("s3://b/a.wav", None),
        ("/data/x.tar", None),
    ],
)
def test_addresses(uri: str, address: tars.Address | None) -> None:
    assert tars.parse(uri) == address
    if address is not None:
        assert str(address) == uri
