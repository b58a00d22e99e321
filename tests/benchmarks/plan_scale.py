"""Planning a million recordings: how long it takes, and how little of the driver's memory.

    python -m tests.benchmarks.plan_scale [--rows 100000 1000000] [--out FILE]

A Parquet manifest of so many rows is taken through all that a run does before its first decode: read and refused,
the list of inputs written, what is committed subtracted, what is left ordered and put in blocks. Once into a new
output, once where half is committed already (the ledger is held in memory, so that one grows with it); then
`murmur transcribe --dry-run`. Each in a process of its own, whose peak of resident memory is compared with what it
held once everything was imported. Prints one JSON object on the last line; ends with 1 if a plan into a new output
took 60 s or 300 MB. One process plans: where others keep the machine busy, `cpu_s` is the time it takes alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import todo
from pipeline.ledger import Ledger, commit
from pipeline.machine import machine
from pipeline.manifest import read_inputs
from pipeline.output import write_inputs
from pipeline.schema import UNITS, to_table, unit_row
from pipeline.store import Store
from pipeline.types import UnitResult

MAX_S, MAX_MB = 60.0, 300.0
DECODE_TASKS = 16
PER_COMMIT = 20_000


def write_manifest(path: Path, rows: int) -> None:
    """Ids and addresses of the usual length, lengths of seconds to a quarter of an hour, one key of the user's own."""
    random = np.random.default_rng(rows)
    columns = {
        "audio_filepath": [f"s3://bucket-of-calls/2024/{i % 365:03}/call-{i:08}.flac" for i in range(rows)],
        "id": [f"call-{i:08}" for i in range(rows)],
        "duration": random.uniform(1, 900, rows).round(2),
        "text": [f"what was said in call {i}" for i in range(rows)],
        "language": random.choice(["en", "de"], rows),
        "speaker": random.integers(0, 9999, rows),
    }
    pq.write_table(pa.table(columns), path)


def commit_half(store: Store, manifest: Path, rows: int) -> None:
    recordings = islice(read_inputs([str(manifest)]), 0, None, 2)
    while results := [
        UnitResult(recording, 0, is_last=True, start=0, n_samples=16_000)
        for recording in islice(recordings, PER_COMMIT)
    ]:
        commit(store, to_table(map(unit_row, results), UNITS), 1)


def plan(manifest: Path, output: Path) -> dict[str, Any]:
    """What a driver does before the first decode, step by step."""
    store = Store.at(str(output))
    before_mb, before_s = resident_mb(), time.process_time()
    steps: dict[str, float] = {}

    @contextmanager
    def step(name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        steps[name] = round(time.monotonic() - began, 2)

    with step("read"):
        listed = todo.Listing(read_inputs([str(manifest)]))
    with step("list of inputs"):
        write_inputs(store, listed.recordings())
    with step("ledger"):
        ledger = Ledger.read(store, 1)
    with step("subtract"):
        left = todo.missing(listed, ledger)
    began = time.monotonic()
    with left.put(store, DECODE_TASKS) as blocks:
        steps["order and put"] = round(time.monotonic() - began, 2)
        longest, shortest = (blocks.source.read(*blocks.places[at].tolist())[0].recording for at in (0, -1))
        n_tasks, object_mb = len(blocks.tables()), blocks.places[-1][1] / 1e6
    assert (longest.duration_s or 0) > 890 > 10 > (shortest.duration_s or 0)
    return {
        "recordings": len(listed),
        "left": len(left),
        "blocks": len(blocks),
        "tasks": n_tasks,
        "object_mb": round(object_mb, 1),
        "steps_s": steps,
        "wall_s": round(sum(steps.values()), 2),
        "cpu_s": round(time.process_time() - before_s, 2),
        "growth_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before_mb),
    }


def dry_run(manifest: Path, output: Path) -> dict[str, Any]:
    """The command, from its start to its end."""
    arguments = ["transcribe", str(manifest), "--output", str(output), "--set", "engine=fake", "--dry-run", "--json"]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments], capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout.splitlines()[-1])
    return {"wall_s": round(time.monotonic() - began, 2), **{key: said[key] for key in ("inputs", "missing")}}


def resident_mb() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def in_a_process(function: Any, *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def measure(rows: int, folder: Path) -> dict[str, Any]:
    manifest, begun = folder / f"{rows}.parquet", folder / f"begun-{rows}"
    in_a_process(write_manifest, manifest, rows)
    in_a_process(commit_half, Store.at(str(begun)), manifest, rows)
    return {
        "new": in_a_process(plan, manifest, folder / f"new-{rows}"),
        "half_done": in_a_process(plan, manifest, begun),
        "dry_run": in_a_process(dry_run, manifest, folder / "nothing"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {str(rows): measure(rows, Path(folder)) for rows in arguments.rows}
    plans = [of_rows["new"] for of_rows in found.values()]
    report = {
        "benchmark": "plan_scale",
        "rows": found,
        "within": all(one["wall_s"] < MAX_S and one["growth_mb"] < MAX_MB for one in plans),
        "load_average_at_end": [round(value, 1) for value in os.getloadavg()],
        "machine": machine(),
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return 0 if report["within"] else 1


if __name__ == "__main__":
    sys.exit(main())
