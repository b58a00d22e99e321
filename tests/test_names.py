"""Names of files: every id gives one that every file system takes, and is found again from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.names import MAX_BYTES, beside, file_name, folded, path_name, recording_id

AWKWARD = [
    "plain-name_1.wav",
    "s3://bucket/a folder/Größe.flac",
    "/absolute/path.wav",
    "../../etc/passwd",
    "..",
    ".",
    ".hidden",
    "-rf",
    "~",
    "~x~u~0.srt",
    "100%",
    "%2F",
    "a%2Fb",
    "con",
    "NUL.wav",
    "com1",
    "COM¹.mp3",
    "lpt9.tar.gz",
    "console",  # no device
    "trailing dot.",
    "trailing blank ",
    "new\nline\r\n\ttab",
    "\x00\x01\x7f\x85\u2028",
    'a*b?c"d<e>f|g:h\\i',
    "$(touch x) `y` 'z'; &",
    "日本語　会議.wav",
    "🎧 👩‍👩‍👧 interview",
    "e\u0301 and é",  # composed and not
    "\u202eright to left",
    "#17?x=y&z",
    "한국어",
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def is_safe(name: str) -> None:
    assert len(name.encode()) <= MAX_BYTES
    assert not set(name) & set('/\\:*?"<>|\x00 \n\r\t')
    assert name.isprintable()
    assert name[0] not in ".-"
    assert name[-1] not in ". "


@pytest.mark.parametrize("text", AWKWARD)
@pytest.mark.parametrize("ending", [".srt", "~1.srt"])
def test_an_awkward_id_survives(text: str, ending: str) -> None:
    for told_apart in (False, True):
        name = file_name(text, ending, told_apart=told_apart)
        is_safe(name)
        assert recording_id(name) == text


@given(TEXT)
def test_any_id_survives(text: str) -> None:
    name = file_name(text, ".json")
    is_safe(name)
    assert recording_id(name) in ({text, None} if "~x" in name else {text})


@given(st.text(min_size=MAX_BYTES))
def test_a_long_one_is_cut_where_it_may_be(text: str) -> None:
    name = file_name(text, ".json")
    is_safe(name)
    assert recording_id(name) is None
    assert file_name(text + "x", ".json") != name


@given(TEXT, TEXT)
def test_two_ids_have_two_names(one: str, other: str) -> None:
    """Also where neither case nor composition counts: what `folded` says is alike is told apart."""
    if one == other:
        return
    alike = folded(one) == folded(other)
    names = [file_name(text, ".srt", told_apart=alike) for text in (one, other)]
    assert names[0].casefold() != names[1].casefold()


def test_what_is_alike() -> None:
    assert folded("Call.WAV") == folded("call.wav")
    assert folded("STRASSE") == folded("straße")
    assert folded("é") != folded("e\u0301")  # the second is not written plainly
    assert folded("a/b") != folded("a%2Fb")
    assert file_name("call", ".srt", told_apart=True) != file_name("Call", ".srt", told_apart=True)


def test_names_can_be_read() -> None:
    assert file_name("talk-1.mp3", ".srt") == "talk-1.mp3.srt"
    assert file_name("Größe/日本語.wav", ".vtt") == "Größe%2F日本語.wav.vtt"
    assert file_name("nul", ".txt") == "%6Eul.txt"


def test_a_disk_takes_them_all(tmp_path: Path) -> None:
    for text in [*AWKWARD, "ü" * 200, "漢" * 200]:
        (tmp_path / file_name(text, ".txt")).write_bytes(text.encode())
    found = {path.read_bytes().decode(): recording_id(path.name) for path in tmp_path.iterdir()}
    assert len(found) == len(AWKWARD) + 2
    assert all(back in (text, None) for text, back in found.items())


@pytest.mark.parametrize(
    ("audio", "name"),
    [
        ("calls/a talk.mp3", "calls/a talk.srt"),
        ('he said "hi" 100% #3?.wav', 'he said "hi" 100% #3?.srt'),
        ("two\nlines.wav", "two\nlines.srt"),
        ("a.b/no extension", "a.b/no extension.srt"),
        (".hidden", ".hidden.srt"),
        ("trailing..wav", "trailing..srt"),
    ],
)
def test_a_file_beside_the_audio(audio: str, name: str) -> None:
    assert path_name(beside(audio)[0], "any id", ".srt") == name
    assert path_name(beside(audio)[1], "any id", ".srt") == f"{audio}.srt"


def test_a_name_beside_that_is_too_long_is_cut() -> None:
    name = path_name("calls/" + "ä" * 127, "any id", ".json").removeprefix("calls/")
    assert len(name.encode()) <= MAX_BYTES
    assert name.startswith("ää")
    assert "~x" in name
    assert name != path_name("calls/" + "ä" * 127, "another", ".json").removeprefix("calls/")
