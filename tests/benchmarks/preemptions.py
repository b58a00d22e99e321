"""Five times a node with an engine is lost without warning, and another comes: nothing is failed, and nobody accused.

    python -m tests.benchmarks.preemptions [--times 5] [--out FILE]

A cluster of processes on this machine: a head and one more node, each with room for an engine; the fake engine, every
Unit half a second, recordings of one to four Units. The tables are compared, row by row, with those of a run that
nothing disturbed. Prints one JSON object on the last line; ends with 1 where anything failed or differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}  # of the cluster that is started here
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from audio_files import tone, write_wav
from commands import FAKE, last_json, murmur, tables
from faults.test_nodes import NODE, head_and_second
from processes import start

from tests.benchmarks.machine import machine

N = 60
SLOW = "fake.faults=[{kind: hang, text: '0.5'}]"


def committed(output: Path) -> int:
    return len(list((output / "_run" / "ledger").glob("*.json")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cluster, second = head_and_second()
    lost = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder, output, calm = (Path(temporary, name) for name in ("in", "out", "calm"))
        for i in range(N):
            write_wav(folder / f"{i:02}.wav", tone(150 + 10 * i, 100.0 if i % 4 == 0 else 2.0 + 0.1 * (i % 7)))
        settings = [*FAKE, "--set", SLOW, "--set", "unit_length_s=30", "--set", f"ray.address={cluster.address}"]
        settings += ["--set", "pool.engines=2", "--set", "pool.engine_cpus=2", "--set", "pool.calls_per_engine=2"]
        with start("transcribe", folder, "--output", output, "--json", *settings) as driver:
            for _ in range(arguments.times):
                before = committed(output)
                while driver.poll() is None and committed(output) < before + 5:
                    time.sleep(0.1)
                if driver.poll() is not None:
                    break
                cluster.remove_node(second, allow_graceful=False)
                lost += 1
                print(f"lost {lost} at {committed(output)} commits", file=sys.stderr)
                second = cluster.add_node(**NODE)
            out, err = driver.communicate(timeout=600)
        if driver.returncode != 0:
            raise SystemExit(f"the job ended with {driver.returncode}:\n{err}")
        said = json.loads(out.splitlines()[-1])
        again = last_json(murmur("transcribe", folder, "--output", calm, "--json", *settings))
        equal = tables(output) == tables(calm)
    cluster.shutdown()
    result = {
        "benchmark": "preemptions",
        "nodes_lost": lost,
        "recordings": N,
        "counts": {key: said[key] for key in ("inputs", "ok", "failed", "missing")},
        "undisturbed": {key: again[key] for key in ("inputs", "ok", "failed", "missing")},
        "tables_equal": equal,
        "machine": machine(),
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0 if equal and said["ok"] == N and lost == arguments.times else 1


if __name__ == "__main__":
    sys.exit(main())
