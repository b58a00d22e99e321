"""The job's speed beside its engine's own: how much of the engine is lost to decoding, Ray, and committing.

    python -m tests.benchmarks.job_speed [--hours 4] [--size base] [--tokens 100] [--out FILE]

Random weights of the named size, `dtype: auto`, fallback off and a fixed number of tokens, so that all windows cost
alike; demo speech in FLAC files of 20 s to 20 minutes; measured as `murmur bench job` does (`pipeline/bench/job.py`).
Prints one JSON object on the last line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import av

from pipeline.bench.job import Plan, bench_job
from pipeline.config import load_config
from pipeline.demo.train.heldout import make_clip
from pipeline.demo.train.lexicon import LANGUAGES
from pipeline.types import SAMPLE_RATE, Pcm
from tests.benchmarks.long_talk import talk


def settings(model: Path, tokens: int) -> dict[str, Any]:
    return {"model": str(model), "device": "cpu", "max_tokens": tokens, "temperature_fallback": False, "language": "en"}


def make_corpus(folder: Path, hours: float, random: Random) -> float:
    """FLAC files of speech, some long and many short; returns their seconds."""
    folder.mkdir()
    clips = [make_clip(LANGUAGES[i % 3], 3, seed=9000 + i).pcm for i in range(24)]
    total = number = 0
    while total < hours * 3600 * SAMPLE_RATE:
        wanted = random.uniform(300, 1200) if number % 6 == 0 else random.uniform(20, 180)
        pcm = talk(clips, wanted, random, pause_s=(0.2, 0.8))
        write_flac(folder / f"{number:05}.flac", pcm)
        total += len(pcm)
        number += 1
    return total / SAMPLE_RATE


def write_flac(path: Path, pcm: Pcm) -> None:
    with av.open(str(path), "w", format="flac") as container:
        stream = container.add_stream("flac", rate=SAMPLE_RATE, layout="mono")
        for at in range(0, len(pcm), SAMPLE_RATE):
            frame = av.AudioFrame.from_ndarray(pcm[None, at : at + SAMPLE_RATE], format="s16", layout="mono")
            frame.sample_rate = SAMPLE_RATE
            frame.pts = at
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=4.0)
    parser.add_argument("--size", default="base")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    from pipeline.engine.random_checkpoint import write_random_checkpoint

    with tempfile.TemporaryDirectory() as temporary:
        folder, model = Path(temporary, "in"), Path(temporary, "model")
        write_random_checkpoint(model, arguments.size, mean_tokens=None)
        audio_s = make_corpus(folder, arguments.hours, Random(1))
        print(f"{audio_s / 3600:.2f} h of audio", file=sys.stderr)
        given = settings(model, arguments.tokens)
        options = tuple(f"--set={key}={json.dumps(value)}" for key, value in given.items())
        plan = Plan((str(folder),), load_config(overrides=given, env={}), options)
        found = bench_job(plan, say=lambda line: print(line, file=sys.stderr))
    result = {"size": arguments.size, "tokens": arguments.tokens, "audio_s": round(audio_s), **found}
    result["benchmark"] = "job_speed"
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
