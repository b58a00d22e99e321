"""Does the engine grow? Thousands of windows of all kinds through one engine, its memory noted on the way.

    python -m tests.benchmarks.soak [--windows 5000] [--model demo] [--out FILE]

Speech, noise and silence of 0.1 to 30 s, with words, prompts, beams, candidates, language detection and fallback
mixed, some requests cancelled half way. What may grow is the engine's own books, not the network, so a small one of
random weights does: a window costs a hundredth of whisper-base's. "Flat": the resident memory's median over the last
quarter is within 2 % of that over the second quarter.
Prints one JSON object on the last line; ends with 1 if it is not flat.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import numpy as np

from pipeline.demo.train.heldout import make_clip
from pipeline.engine import Engine, EngineConfig, load_engine
from pipeline.engine.random_checkpoint import Shape, write_random_checkpoint
from pipeline.machine import machine
from pipeline.types import SAMPLE_RATE, DecodeOptions, Pcm, Recording, Unit

IN_FLIGHT = 24  # requests at a time
SMALL = Shape(width=64, heads=1, encoder_layers=1, decoder_layers=2)
MOST_TOKENS = 12
PLAIN = DecodeOptions(chunk_length_s=10, temperature_fallback=False, max_tokens=MOST_TOKENS)
OPTIONS = (
    PLAIN,
    replace(PLAIN, word_timestamps=True),
    replace(PLAIN, beam_size=3, initial_prompt="Anna buys three red apples"),
    replace(PLAIN, temperature=0.4, best_of=2, language="de"),
    replace(PLAIN, language="window"),
    DecodeOptions(algorithm="sequential", max_tokens=MOST_TOKENS, logprob_threshold=-0.05),  # nearly all falls back
    DecodeOptions(algorithm="sequential", max_tokens=MOST_TOKENS, no_speech_threshold=None, word_timestamps=True),
)


def audio(random: Random, speech: list[Pcm]) -> Pcm:
    kind = random.random()
    n = random.randint(SAMPLE_RATE // 10, 30 * SAMPLE_RATE)
    if kind < 0.8:
        return np.resize(random.choice(speech), min(n, 12 * SAMPLE_RATE))
    if kind < 0.9:
        return np.zeros(n, np.int16)
    return np.random.default_rng(random.getrandbits(32)).integers(-200, 200, n, dtype=np.int16)


async def soak(engine: Engine, n_windows: int) -> list[tuple[int, float]]:
    """(windows so far, resident MB) after every fiftieth of the run."""
    random = Random(5)
    speech = [make_clip(("en", "de", "es")[i % 3], 2, seed=4000 + i).pcm for i in range(12)]
    seen: list[tuple[int, float]] = []
    done = 0

    async def request(i: int) -> int:
        unit = Unit(Recording(str(i), str(i)), 0, 0, audio(random, speech), is_last=True)
        work = asyncio.ensure_future(engine.submit(unit, random.choice(OPTIONS)))
        if random.random() < 0.05:
            await asyncio.sleep(random.random() / 5)
            work.cancel()
        (result,) = await asyncio.gather(work, return_exceptions=True)
        if isinstance(result, asyncio.CancelledError):
            return 0
        if isinstance(result, BaseException):
            raise result
        return result.n_windows

    numbers: Iterator[int] = iter(range(sys.maxsize))
    pending = {asyncio.ensure_future(request(next(numbers))) for _ in range(IN_FLIGHT)}
    while done < n_windows:
        finished, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        done += sum(task.result() for task in finished)
        pending |= {asyncio.ensure_future(request(next(numbers))) for _ in finished}
        if done >= (len(seen) + 1) * n_windows / 50:
            seen.append((done, resident_mb()))
            print(f"{done} windows, {seen[-1][1]:.0f} MB", file=sys.stderr)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    return seen


def resident_mb() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=5000)
    parser.add_argument("--model", help="instead of a small one of random weights")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or str(write_random_checkpoint(Path(folder), SMALL, mean_tokens=MOST_TOKENS // 2))
        with load_engine(EngineConfig(model=model, lanes=12)) as engine:
            seen = asyncio.run(soak(engine, arguments.windows))
            info = engine.info
    quarter = len(seen) // 4
    early, late = (median(mb for _, mb in part) for part in (seen[quarter : 2 * quarter], seen[3 * quarter :]))
    report: dict[str, Any] = {
        "benchmark": "soak",
        "model": arguments.model or "random weights, 64 wide, 1 + 2 layers",
        "windows": seen[-1][0],
        "dtype": info.dtype,
        "lanes": info.lanes,
        "resident_mb_second_quarter": round(early),
        "resident_mb_last_quarter": round(late),
        "growth": round(late / early - 1, 4),
        "flat": late <= 1.02 * early,
        "resident_mb": [(n, round(mb)) for n, mb in seen],
        "machine": machine(),
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return 0 if report["flat"] else 1


if __name__ == "__main__":
    sys.exit(main())
