"""`murmur` as a user starts it, a process of its own, and the tables it leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

# What every run of a test has: an engine without weights, no VAD (which takes a tone for silence), a small Ray.
FAKE = ("--model", "demo", "--set", "engine=fake", "--set", "vad=none", "--set", "ray.object_store_mb=200")


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]


def murmur(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run it to its end, whatever its exit code."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False, timeout=240)


def last_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What `--json` promises: the last line on stdout is one JSON object."""
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def tables(output: Path) -> dict[str, list[dict[str, Any]]]:
    """Every row of every table, in its own order."""
    found = {}
    for name in ("recordings", "segments", "words"):
        table = pa.concat_tables(map(pq.read_table, sorted((output / name).glob("*.parquet"))))
        keys = [key for key in ("recording_id", "segment_id", "word_id") if key in table.column_names]
        found[name] = table.sort_by([(key, "ascending") for key in keys]).to_pylist()
    return found
