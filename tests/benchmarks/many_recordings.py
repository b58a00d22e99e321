"""Twenty thousand recordings of a second: what a recording costs that is next to no work.

    python -m tests.benchmarks.many_recordings [--recordings 20000] [--out FILE]

WAV files, the fake engine, `vad: silero`; the whole command, from the shell to its exit. Where the time goes, by the
command's own account: starting (listing, planning, Ray), the dataflow, the tables; and of the dataflow, by stage, the
seconds that the ledger notes. Prints one JSON object on the last line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from audio_files import tone, write_wav

from tests.benchmarks.machine import machine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=int, default=20_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, output = Path(temporary, "in"), Path(temporary, "out")
        for i in range(arguments.recordings):
            write_wav(folder / f"{i // 1000:03}" / f"{i:06}.wav", tone(150 + i % 400, 1.0))
        command = [sys.executable, "-m", "pipeline.cli", "transcribe", str(folder), "--output", str(output), "--json"]
        began = time.monotonic()
        done = subprocess.run(
            [*command, "--model", "demo", "--set", "engine=fake"], stdout=subprocess.PIPE, text=True, check=True
        )
        whole_s = time.monotonic() - began
        said = json.loads(done.stdout.splitlines()[-1])
        entries = [json.loads(path.read_text()) for path in (output / "_run" / "ledger").glob("*.json")]
    stages: Counter[str] = Counter()
    for entry in entries:
        stages["commit_s"] += entry["commit_s"] * len(entry["units"])
        for unit in entry["units"]:
            stages.update({key: unit[key] for key in ("source_s", "decode_s", "vad_s", "engine_s") if key in unit})
    result = {
        "benchmark": "many_recordings",
        "recordings": arguments.recordings,
        "per_s": round(arguments.recordings / whole_s, 1),
        "whole_command_s": round(whole_s, 1),
        "start_s": said.get("start_s"),
        "dataflow_s": said["this_run"]["wall_s"],
        "finalize_s": said.get("finalize_s"),
        "stage_s": {key: round(value, 2) for key, value in stages.items()},
        "commits": len(entries),
        "counts": {key: said[key] for key in ("inputs", "ok", "failed", "missing")},
        "machine": machine(),
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0 if said["ok"] == arguments.recordings else 1


if __name__ == "__main__":
    sys.exit(main())
