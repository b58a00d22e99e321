"""A report of a million recordings: how long it takes, and how little memory.

    python -m tests.benchmarks.report_scale [--recordings 100000 1000000] [--out FILE]

Tables and a snapshot of so many recordings are written, and `murmur report --html` is made of them, each in a process
of its own, whose peak of resident memory is compared with that of one recording's. Prints one JSON object on the last
line; ends with 1 if a page is larger than 1 MB.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from commits import begin, many

from pipeline.figures import figures
from pipeline.machine import machine
from pipeline.output import read_output
from pipeline.report_page import page
from pipeline.store import Store

MAX_PAGE_BYTES = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recordings", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = measured(report, str(many(begin(Store.at(f"{folder}/few"), n_shards=1), 4).store))
        found = []
        for n in arguments.recordings:
            write(f"{folder}/{n}", n)
            one = measured(report, f"{folder}/{n}")
            found.append({"recordings": n, **one, "more_mb": round(one["peak_mb"] - base["peak_mb"], 1)})
            print(found[-1], file=sys.stderr)
    result = {"benchmark": "report_scale", "machine": machine(), "few": base, "outputs": found}
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    sys.exit(any(one["page_bytes"] > MAX_PAGE_BYTES for one in found))


def write(uri: str, n: int) -> None:
    many(begin(Store.at(uri), n_shards=1), n)


def report(uri: str) -> dict[str, Any]:
    began = time.monotonic()
    text = page(figures(read_output(uri)))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": round(time.monotonic() - began, 2), "peak_mb": round(peak_mb, 1), "page_bytes": len(text)}


def measured(task: Any, *arguments: Any) -> dict[str, Any]:
    """`task(*arguments)` in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found: dict[str, Any] = pool.apply(task, arguments)
    return found


if __name__ == "__main__":
    main()
