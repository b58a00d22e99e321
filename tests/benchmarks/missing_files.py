"""A hundred thousand recordings that are not there: the whole job, all of them accounted for, in flat memory.

    python -m tests.benchmarks.missing_files [--rows 1000 100000] [--out FILE]

`murmur transcribe` with the fake engine over a manifest whose files do not exist, on a cluster of its own. The
driver's peak of resident memory (VmHWM) is compared with that of the first, small run: what differs is what grows with
the manifest. Prints one JSON object on the last line; ends with 1 if a recording is not accounted for, the command
does not end with 3, or the driver grew by 300 MB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import EXIT_FAILED
from pipeline.machine import machine

MAX_GROWTH_MB = 300
PAUSE_S = 0.2  # between two looks at the driver


def measure(rows: int, folder: Path) -> dict[str, Any]:
    manifest, output = folder / f"{rows}.parquet", folder / f"out-{rows}"
    pq.write_table(
        pa.table({"audio_filepath": [f"{folder}/gone/{i:07}.wav" for i in range(rows)], "duration": [1.0] * rows}),
        manifest,
    )
    settings = ["--set", "engine=fake", "--set", "model=demo", "--set", "ray.object_store_mb=300"]
    command = [sys.executable, "-m", "pipeline.cli", "transcribe", str(manifest), "--output", str(output)]
    began, peak_mb = time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complaints:
        with subprocess.Popen([*command, *settings, "--json"], stdout=said, stderr=complaints, text=True) as driver:
            while driver.poll() is None:
                peak_mb = max(peak_mb, peak_of(driver.pid))
                time.sleep(PAUSE_S)
        said.seek(0)
        last = said.read().splitlines()[-1:]
        complaints.seek(0)
        if not last:
            raise SystemExit(complaints.read()[-2000:])
    result = json.loads(last[0])
    counts = {key: result[key] for key in ("inputs", "ok", "failed", "skipped", "missing")}
    return {
        **counts,
        "exit_code": result["exit_code"],
        "wall_s": round(time.monotonic() - began, 1),
        "run_wall_s": round(result["this_run"]["wall_s"], 1),
        "driver_peak_mb": peak_mb,
    }


def peak_of(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM")), 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 100_000])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [measure(rows, Path(folder)) for rows in arguments.rows]
    growth = found[-1]["driver_peak_mb"] - found[0]["driver_peak_mb"]
    accounted = all(one["failed"] == one["inputs"] and one["exit_code"] == EXIT_FAILED for one in found)
    report = {
        "benchmark": "missing_files",
        "runs": found,
        "driver_growth_mb": growth,
        "within": accounted and growth < MAX_GROWTH_MB,
        "machine": machine(),
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return 0 if report["within"] else 1


if __name__ == "__main__":
    sys.exit(main())
