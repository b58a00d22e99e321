"""The real job with the real model on the bundled clips: what it publishes is true, and equals the path without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipeline import evaluation, job, report
from pipeline.config import Config, load_config
from pipeline.demo import clips_path
from pipeline.engine import engine_config, load_engine
from pipeline.manifest import read_inputs
from pipeline.output import read_output
from pipeline.schema import RECORDINGS, SEGMENTS, WORDS, recording_row, segment_rows, word_rows
from pipeline.scoring import word_score
from pipeline.transcribe import transcribe
from pipeline.types import Transcript
from tests.benchmarks.heldout_accuracy import in_both

pytestmark = pytest.mark.ray
MANIFEST = clips_path() / "manifest.jsonl"


@pytest.fixture(scope="module")
def config() -> Config:
    settings = {"model": "demo", "dtype": "float32", "chunk_level": "word", "max_failed_fraction": 0.1}
    return load_config(overrides=settings, env={})


@pytest.fixture(scope="module")
def output(ray_cluster: None, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "out"
    summary = job.run([str(MANIFEST)], str(folder), config, console=Console(quiet=True))
    assert summary.exit_code == 0
    return folder


def rows(output: Path, table: str) -> list[dict[str, Any]]:
    files = f"{output}/{table}/*.parquet"
    return duckdb.sql(f"SELECT * FROM '{files}'").to_arrow_table().to_pylist()


def test_schemas_are_the_design_s(output: Path) -> None:
    for table, schema in (("segments", SEGMENTS), ("words", WORDS), ("recordings", RECORDINGS)):
        for file in (output / table).iterdir():
            assert pq.read_schema(file).remove_metadata().equals(schema.remove_metadata())


def test_clean_clips_are_understood_and_the_damaged_one_has_a_reason(output: Path) -> None:
    expected = {line["id"]: line for line in map(json.loads, MANIFEST.read_text().splitlines())}
    found = {row["recording_id"]: row for row in rows(output, "recordings")}
    assert found.keys() == expected.keys()
    for name, row in found.items():
        if expected[name].get("expected") == "failed":
            assert (row["status"], row["error_kind"], row["error_stage"]) == ("failed", "damaged_audio", "decode")
            assert row["error_message"]
            continue
        assert row["status"] == "ok"
        assert abs(row["decoded_s"] + row["skipped_s"] - row["duration_s"]) < 1 / 16000
        assert word_score(expected[name]["text"], row["text"], row["language"]).rate <= 0.1
        if not expected[name]["text"]:
            assert row["text"] == ""
        else:
            assert row["language"] == expected[name]["spoken_language"]
    success = json.loads((output / "_SUCCESS").read_text())
    assert success["complete"] is True


def test_words_lie_where_they_were_spoken(output: Path) -> None:
    """Median distance of word starts from the synthesiser's, over words that both texts have in order."""
    spoken = json.loads((clips_path() / "references.json").read_text())
    errors: list[float] = []
    by_recording: dict[str, list[dict[str, Any]]] = {}
    for word in sorted(rows(output, "words"), key=lambda w: (w["recording_id"], w["segment_id"], w["word_id"])):
        by_recording.setdefault(word["recording_id"], []).append(word)
    for name, words in by_recording.items():
        reference = [word for sentence in spoken[name]["sentences"] for word in sentence["words"]]
        pairs = in_both([word["word"] for word in words], [word["word"] for word in reference])
        errors += [abs(words[i]["start"] - reference[j]["start"]) for i, j in pairs]
    assert len(errors) > 400
    assert sorted(errors)[len(errors) // 2] <= 0.15


def test_job_and_transcribe_give_equal_transcripts(output: Path, config: Config) -> None:
    """Every row of the three tables, made again without Ray: the same in every column that is not of the run."""
    tables = {name: rows(output, name) for name in ("recordings", "segments", "words")}
    engine = load_engine(engine_config(config))
    run = read_output(str(output)).run
    try:
        recordings = list(read_inputs([str(MANIFEST)]))
        transcripts = [transcribe(one, engine, config.decode_options(), config) for one in recordings]
    finally:
        engine.close()
    for transcript in transcripts:
        expected = recording_row(
            transcript, model=run.model, model_revision=run.model_revision, options_fingerprint=run.fingerprint
        )
        mine = {name: of(found, transcript) for name, found in tables.items()}
        assert mine["recordings"] == [expected]
        assert mine["segments"] == exact(segment_rows(transcript), mine["segments"])
        assert mine["words"] == exact(word_rows(transcript), mine["words"])


def of(found: list[dict[str, Any]], transcript: Transcript) -> list[dict[str, Any]]:
    keys = ("segment_id", "word_id")
    mine = [row for row in found if row["recording_id"] == transcript.recording.id]
    return sorted(mine, key=lambda row: [row[key] for key in keys if key in row])


def exact(expected: Any, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`expected` with the probabilities of `found` where they agree to 1e-5: the batches were others."""
    rounded = []
    for row, other in zip(list(expected), found, strict=True):
        close = {k: other[k] for k, v in row.items() if isinstance(v, float) and v == pytest.approx(other[k], abs=1e-5)}
        rounded.append(row | close)
    return rounded


def test_summary_counts(output: Path) -> None:
    out = read_output(str(output))
    assert report.failed_ids(out) == {"damaged"}
    found = evaluation.evaluate(out)
    *shorter, long = found.lengths
    assert [one.words.rate <= 0.02 for one in shorter] == [True, True]
    assert long.recordings == 1
    assert found.total.words.rate <= 0.03  # 12 of the model's 13 errors are in the long one
