"""References: what a file of them may hold, what it may not, and what a manifest's other keys say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ManifestError
from pipeline.references import Reference, SpokenWord, from_file, from_row

WORDS = [{"word": " Guten", "start": 0, "end": 0.5}, {"word": "Tag", "start": 0.5, "end": 1.0}]
SPOKEN = (SpokenWord("Guten", 0.0, 0.5), SpokenWord("Tag", 0.5, 1.0))


def jsonl(folder: Path, *rows: dict[str, Any]) -> str:
    file = folder / "references.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def test_a_file_of_each_kind_says_the_same(tmp_path: Path) -> None:
    rows = [{"id": "a", "text": "Guten Tag", "language": "DE ", "words": WORDS}, {"id": "b", "text": "so, it is"}]
    (tmp_path / "r.csv").write_text(
        f"id,text,language,words\na,Guten Tag,de,{_cell(json.dumps(WORDS))}\nb,{_cell('so, it is')},,\n"
    )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    expected = {"a": Reference("Guten Tag", "de", SPOKEN), "b": Reference("so, it is")}
    for file in (jsonl(tmp_path, *rows), str(tmp_path / "r.csv"), str(tmp_path / "r.parquet")):
        assert from_file(file) == expected


def _cell(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def test_a_manifest_is_one_too(tmp_path: Path) -> None:
    file = jsonl(
        tmp_path,
        {"audio_filepath": "a.wav", "text": "one", "spoken_language": "es"},
        {"audio_filepath": "b.wav"},  # a line without a text is a recording without a reference
        {"id": 7, "audio": "c.wav", "text": ""},  # nobody speaks
    )
    assert from_file(file) == {str(tmp_path / "a.wav"): Reference("one", "es"), "7": Reference("")}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"id": "a", "text": "x"}, {"id": "b", "text": "y"}, {"id": "a", "text": "z"}], "given twice: .*:1 and .*:3"),
        ([{"text": "x"}], ":1: no id"),
        ([{"id": "a"}], "no line has a text"),
        ([{"id": "a", "text": 3}], ":1: text: a text was expected"),
        ([{"id": "a", "text": "x", "words": "x"}], ":1: words: JSON"),
        ([{"id": "a", "text": "x", "words": [{"word": "x", "start": 0}]}], r":1: words\[0\]: start and end"),
        ([{"id": "a", "text": "x", "words": [{"start": 0, "end": 1}]}], r":1: words\[0\].word"),
        ([{"id": "a", "text": "x", "words": {"x": 1}}], ":1: words: a list"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, rows: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ManifestError, match=said):
        from_file(jsonl(tmp_path, *rows))


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("name,text\na,b\n")
    (tmp_path / "r.txt").write_text("a b\n")
    (tmp_path / "r.parquet").write_bytes(b"no")
    for name, said in (
        ("r.csv", "no column id or"),
        ("r.txt", "no file of"),
        ("r.parquet", "Parquet"),
        ("x.csv", "not"),
    ):
        with pytest.raises(ManifestError, match=said):
            from_file(str(tmp_path / name))


def test_a_row_of_the_tables() -> None:
    about = json.dumps({"spoken_language": "de", "words": WORDS, "desk": 7})
    assert from_row({"reference": "Guten Tag", "metadata": about}) == Reference("Guten Tag", "de", SPOKEN)
    assert from_row({"reference": "x", "metadata": '{"words": 12, "spoken_language": 3}'}) == Reference("x")
    assert from_row({"reference": "x", "metadata": None}) == Reference("x")
    assert from_row({"reference": None, "metadata": about}) is None
