"""The guide's code runs as it stands, and does what it says."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from commits import begin, ok, put, segment

from pipeline import formats
from pipeline.finalize import finalize
from pipeline.output import write_inputs
from pipeline.store import Store

GUIDE = Path(__file__).parent.parent / "pipeline" / "extending.md"


def test_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(formats, "FORMATS", dict(formats.FORMATS))
    output = begin(Store.at("out"))
    results = [ok("talk", segments=(segment(" Hello\tthere", 0.5), segment(" <b>", 3.0))), ok("silence", segments=())]
    put(output.store, *results)
    write_inputs(output.store, [result.recording for result in results])
    finalize(output, use_ray=False)

    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, object] = {"__name__": "guide"}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)

    assert capsys.readouterr().out.splitlines() == [
        "2 recordings, 2 files",
        "['index-labels.jsonl', 'silence.labels', 'talk.labels']",
    ]
    labels = (tmp_path / "exported" / "talk.labels").read_text(encoding="utf-8")
    rows = list(csv.reader(labels.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    assert rows == [["0.500000", "2.500000", "Hello there"], ["3.000000", "5.000000", "<b>"]]
    assert (tmp_path / "exported" / "silence.labels").read_bytes() == b""


def test_what_the_guide_names_is_there() -> None:
    """Names in the text that a change of the code would make wrong."""
    root = GUIDE.parent
    for file, names in {
        "formats.py": ("FORMATS", "MEDIA_TYPES", "def one_line"),
        "cli.py": ("class Format(", "class ExportFormat("),
        "export.py": ("PER_CHANNEL", "WITH_WORDS"),
        "store.py": ("_PASSING_ERRORS", "def create", "invalidate_cache"),
    }.items():
        text = (root / file).read_text(encoding="utf-8")
        assert all(name in text for name in names)
