"""Processes that die or stand still under the job, on a real Ray: each Unit is committed once, only a killer fails."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from audio_files import tone, write_wav
from rich.console import Console

from pipeline import job
from pipeline.config import Config
from pipeline.errors import EXIT_FAILED

N = 194  # and the six Units of a long one: two hundred


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """`N` short clips and one of six Units, in a manifest that gives them ids 000, 001 ... and `long`."""
    folder = tmp_path / "in"
    names = [f"{i:03}" for i in range(N)]
    for i, name in enumerate(names):
        write_wav(folder / f"{name}.wav", tone(150 + 10 * i, 1.0 + 0.1 * (i % 7)))
    write_wav(folder / "long.wav", tone(123, 170.0))
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps({"audio_filepath": f"{n}.wav", "id": n}) + "\n" for n in [*names, "long"]))
    return manifest


@pytest.fixture
def run(clips: Path, tmp_path: Path, fake_config: Callable[..., Config]) -> Callable[..., dict[str, dict[str, Any]]]:
    """Runs the job on them with these faults; the rows of `recordings`, by id."""
    outputs = (str(tmp_path / f"out-{i}") for i in itertools.count())

    def start(*faults: dict[str, Any], **settings: Any) -> dict[str, dict[str, Any]]:
        config = fake_config(vad="none", unit_length_s=30, fake__faults=list(faults), **settings)
        output = next(outputs)
        with open(tmp_path / "said.txt", "a") as said:
            summary = job.run([str(clips)], output, config, console=Console(file=said))
        assert summary.counts["missing"] == 0
        found = pa.concat_tables(map(pq.read_table, sorted(Path(output, "recordings").glob("*.parquet")))).to_pylist()
        rows = {row["recording_id"]: row for row in found}
        assert len(rows) == len(found) == N + 1
        assert summary.exit_code == (EXIT_FAILED if any(row["status"] == "failed" for row in found) else 0)
        return rows

    return start


def without(rows: dict[str, dict[str, Any]], *names: str) -> dict[str, dict[str, Any]]:
    """The rows but for these, and but for the fingerprint: the faults are in it."""
    plain = {name: {**row, "options_fingerprint": None} for name, row in rows.items()}
    return {name: row for name, row in plain.items() if name not in names}


@pytest.mark.ray
def test_one_killer_fails_alone(ray_cluster: None, run: Callable[..., dict[str, dict[str, Any]]]) -> None:
    """The engine dies each time it gets Unit 007, and once each over two others, which are not to blame (F34, F35)."""
    clean = run()
    faults = [
        {"match": "007", "stage": "engine", "kind": "exit"},
        {"match": "long", "stage": "engine", "kind": "exit", "times": 1},
        {"match": "020", "stage": "engine", "kind": "exit", "times": 1},
    ]
    rows = run(*faults)
    assert (rows["007"]["status"], rows["007"]["error_kind"], rows["007"]["error_stage"]) == (
        "failed",
        "worker_crash",
        "engine",
    )
    assert rows["007"]["attempts"] == 3
    assert without(rows, "007") == without(clean, "007")


@pytest.mark.ray
def test_an_engine_that_stands_still_is_started_again(
    ray_cluster: None, run: Callable[..., dict[str, dict[str, Any]]]
) -> None:
    rows = run(
        {"match": "003", "stage": "engine", "kind": "hang"},
        {"match": "005", "stage": "engine", "kind": "hang", "times": 1},
        engine_timeout_s=2,
    )
    assert {name: row["error_kind"] for name, row in rows.items() if row["status"] == "failed"} == {
        "003": "worker_crash"
    }
