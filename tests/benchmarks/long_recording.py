"""One recording of ten hours beside one of ten minutes: memory and time of the whole job.

    python -m tests.benchmarks.long_recording [--hours 10] [--out FILE]

Ogg Opus at 12 kbit/s, made here of demo speech; the fake engine, `vad: silero`. Memory is what each process has for
itself (USS: the object store's pages are shared, and counted once, by the store), looked at twice a second, its peak
by kind of process. Time is from the first task to the last commit. Prints one JSON object on the last line; ends with 1
where a process has over 300 MB more, or the long one takes over 1.3 times its share by length.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from processes import KINDS, start

from pipeline.demo.train.heldout import make_clip
from pipeline.demo.train.lexicon import LANGUAGES
from pipeline.types import SAMPLE_RATE
from tests.benchmarks.machine import machine

SHORT_S = 600
MORE_MB, SHARE = 300, 1.3


def write_opus(path: Path, seconds: float) -> None:
    """Speech and pauses, the same half minute again and again."""
    clips = [make_clip(LANGUAGES[i % 3], 3, seed=5000 + i).pcm for i in range(3)]
    pause = np.zeros(SAMPLE_RATE, np.int16)
    piece = np.concatenate([part for clip in clips for part in (clip, pause)])
    with av.open(str(path), "w", format="ogg") as container:
        stream = container.add_stream("libopus", rate=48_000, layout="mono")
        stream.bit_rate = 12_000
        resampler = av.AudioResampler(format="s16", layout="mono", rate=48_000)
        for at in range(0, int(seconds * SAMPLE_RATE), len(piece)):
            pcm = piece[: int(seconds * SAMPLE_RATE) - at]
            frame = av.AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
            frame.sample_rate = SAMPLE_RATE
            frame.pts = None
            for ready in resampler.resample(frame):
                container.mux(stream.encode(ready))
        container.mux(stream.encode(None))


def kind_of(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    return next((kind for kind, is_it in KINDS.items() if is_it(line)), process.name())


def run(path: Path, output: Path) -> dict[str, Any]:
    """The job over one file, watched."""
    peaks: defaultdict[str, float] = defaultdict(float)
    sets = ("--model", "demo", "--set", "engine=fake", "--set", "ray.object_store_mb=400")
    with start("transcribe", path, "--output", output, "--json", *sets, stderr=subprocess.DEVNULL) as process:
        driver = psutil.Process(process.pid)
        while process.poll() is None:
            for one in [driver, *driver.children(recursive=True)]:
                try:
                    kind = "driver" if one.pid == driver.pid else kind_of(one)
                    peaks[kind] = max(peaks[kind], one.memory_full_info().uss / 1e6)
                except psutil.Error:  # it has just ended
                    continue
            time.sleep(0.5)
        assert process.stdout is not None
        said = json.loads(process.stdout.read().splitlines()[-1])
    assert said["ok"] == 1, said
    return {
        "audio_s": said["audio_s"],
        "wall_s": round(said["this_run"]["wall_s"], 1),
        "peak_mb": {kind: round(mb) for kind, mb in sorted(peaks.items())},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=10.0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    runs = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, seconds in (("short", SHORT_S), ("long", arguments.hours * 3600)):
            path = Path(temporary, f"{name}.ogg")
            write_opus(path, seconds)
            runs[name] = run(path, Path(temporary, f"out-{name}"))
            print(name, runs[name], file=sys.stderr)
    short, long = runs["short"], runs["long"]
    more = {kind: mb - short["peak_mb"].get(kind, 0) for kind, mb in long["peak_mb"].items()}
    share = (long["wall_s"] / short["wall_s"]) / (long["audio_s"] / short["audio_s"])
    result = {
        "benchmark": "long_recording",
        **runs,
        "more_mb": more,
        "time_over_share_by_length": round(share, 3),
        "within": max(more.values()) <= MORE_MB and share <= SHARE,
        "machine": machine(),
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0 if result["within"] else 1


if __name__ == "__main__":
    sys.exit(main())
