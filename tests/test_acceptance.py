"""The acceptance run's logic, on sets made of the demo clips: what passes, what is a regression, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.demo import clips_path
from tests.benchmarks import acceptance
from tests.benchmarks.acceptance import Corpus, Published, Result, complaints, fetch, main, measure

TEXTS = {
    "de-two.flac": "de",
    "de-four.webm": "de",
}


@pytest.fixture
def demo_set(tmp_path: Path) -> Corpus:
    """As a hub has them: two files, other columns beside those that are wanted."""
    known = {}
    for line in (clips_path() / "manifest.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        known[row["audio_filepath"]] = row.get("text")
    for i, name in enumerate(TEXTS):
        row = {
            "id": 7,  # the same for two speakers of one sentence
            "audio": {"bytes": (clips_path() / name).read_bytes(), "path": name},
            "raw_transcription": known[name],
            "num_samples": 1,
        }
        (tmp_path / "hub").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "hub" / f"{i:04}.parquet")
    return Corpus("demo-de", f"file://{tmp_path}/hub/*.parquet", "raw_transcription", "de", {"demo": Published(0.0)})


def test_a_set_is_fetched_once_and_whole(demo_set: Corpus, tmp_path: Path) -> None:
    file = fetch(demo_set, tmp_path / "sets")
    rows = pq.read_table(file).to_pylist()
    assert [(row["id"], row["audio"]["path"], row["language"]) for row in rows] == [
        ("demo-de-000000", "de-two.flac", "de"), ("demo-de-000001", "de-four.webm", "de"),
    ]  # fmt: skip
    assert fetch(replace(demo_set, files="file:///nowhere/*.parquet"), tmp_path / "sets") == file
    with pytest.raises(FileNotFoundError, match="nothing at"):
        fetch(replace(demo_set, files="file:///nowhere/*.parquet"), tmp_path / "others")
    with pytest.raises(KeyError, match="no column transcription"):
        fetch(replace(demo_set, text="transcription"), tmp_path / "others")
    assert not list((tmp_path / "others").glob("*.parquet"))


@pytest.mark.slow  # a Ray of its own
@pytest.mark.ray
def test_the_run(demo_set: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    arguments = ["--work", str(tmp_path / "work"), "--models", "demo", "--out", str(out)]
    options = ["--set", "ray.object_store_mb=200", "--set", "dtype=float32"]
    assert main([*arguments, *options], [demo_set]) == 0
    (found,) = json.loads(out.read_text())["results"]
    assert (found["recordings"], found["failed"], found["missing"], found["wer"]) == (2, 0, 0, 0.0)
    assert found["rtfx"] > 0
    assert "| demo | demo-de | 0.0" in capsys.readouterr().err

    strict = replace(demo_set, published={"demo": Published(-1.0)})  # nobody is that good
    assert main([*arguments, *options], [strict]) == 1
    assert "WER 0.00 %, published -1.00 %" in capsys.readouterr().err
    again = measure("demo", demo_set, tmp_path / "work", ["--set=ray.object_store_mb=200", "--set=dtype=float32"])
    assert (again.wer, again.rtfx) == (0.0, None)  # nothing was left to do


def test_what_is_a_regression() -> None:
    good = Result("m", "s", 10, 0, 0, 100.0, 5.4, (5.0, 5.8), 40.0, Published(5.0))
    assert not complaints([good])
    assert not complaints([good], [replace(good, wer=5.3, rtfx=44.0)], same_machine=True)
    assert len(complaints([replace(good, wer=5.6)])) == 1
    assert len(complaints([replace(good, failed=1)])) == 1
    assert len(complaints([replace(good, missing=2)])) == 1
    assert len(complaints([good], [replace(good, wer=5.1)])) == 1
    assert len(complaints([good], [replace(good, rtfx=50.0)], same_machine=True)) == 1
    assert not complaints([good], [replace(good, rtfx=50.0)], same_machine=False)
    assert not complaints([replace(good, published=Published(), wer=50.0)])  # nothing to hold it against
    assert Result.from_json(json.loads(json.dumps(good.to_json()))) == good


def test_sets_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--work", "w", "--sets", "librispeech"])
    assert "there are librispeech-test-clean" in capsys.readouterr().err
    assert {one.language for one in acceptance.SETS} == {"en", "de", "es", "fr"}
