"""Does the engine grow? Thousands of windows of all kinds through one engine, its memory noted on the way.

    python -m tests.benchmarks.soak [--windows 5000] [--out FILE]

Demo speech, noise and silence of 0.1 to 30 s, with words, prompts, beams and fallback mixed, some requests cancelled
half way. "Flat": the resident memory's median over the last quarter is within 2 % of that over the second quarter.
Prints one JSON object on the last line; ends with 1 if it is not flat.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import numpy as np

from pipeline.demo.train.heldout import make_clip
from pipeline.engine import Engine, EngineConfig, load_engine
from pipeline.machine import machine
from pipeline.types import SAMPLE_RATE, DecodeOptions, Pcm, Recording, Unit

IN_FLIGHT = 24  # requests at a time
OPTIONS = (
    DecodeOptions(chunk_length_s=10),
    DecodeOptions(chunk_length_s=10, word_timestamps=True),
    DecodeOptions(chunk_length_s=10, beam_size=3, initial_prompt="Anna buys three red apples"),
    DecodeOptions(chunk_length_s=10, temperature=0.4, best_of=2, language="de"),
    DecodeOptions(algorithm="sequential", logprob_threshold=-0.05),  # nearly everything falls back
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
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with load_engine(EngineConfig(model="demo", lanes=12)) as engine:
        seen = asyncio.run(soak(engine, arguments.windows))
        info = engine.info
    quarter = len(seen) // 4
    early, late = (median(mb for _, mb in part) for part in (seen[quarter : 2 * quarter], seen[3 * quarter :]))
    report: dict[str, Any] = {
        "benchmark": "soak",
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
