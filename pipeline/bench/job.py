"""`murmur bench job`: the job's speed beside its engine's own; what decoding, Ray and committing leave of it here.

The engine alone is handed Units of the same audio out of memory, before the job and after it, in a process of its own;
the job is `murmur transcribe`, from the first Unit handed to its engines until the last commit, as the ledger says.
Starting and finalising are told apart. With your audio or, without any, the demo's clips again and again. The engine
alone is one with all cores, so with several engines (`pool.engines`, a cluster) a share above 1 is possible.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

from pipeline.bench.rounds import Figures
from pipeline.config import Config
from pipeline.errors import MurmurError, UsageError
from pipeline.machine import machine, usable_cores
from pipeline.types import Unit, seconds

ALONE_S = 1800.0  # of audio, at most, for the engine by itself


@dataclass(frozen=True, slots=True)
class Plan:
    """`options`: what the command line said of the settings, which the job's command is told in the same words."""

    inputs: tuple[str, ...]  # empty: the demo's clips
    config: Config
    options: tuple[str, ...] = ()
    hours: float = 0.1  # of the demo's clips
    alone_s: float = ALONE_S

    def __post_init__(self) -> None:
        if self.hours <= 0:
            raise UsageError("--hours is above 0")
        if self.config.engine == "serve":
            raise UsageError("engine: serve has no engine of its own to be compared with: murmur bench http")


def bench_job(plan: Plan, say: Callable[[str], None] = lambda line: None) -> Figures:
    """As plain JSON. Raises what the job's command ended with as `MurmurError`."""
    with tempfile.TemporaryDirectory(prefix="murmur-bench-") as folder:
        inputs = list(plan.inputs) or [_demo_clips(Path(folder, "clips.jsonl"), plan.hours)]
        turns = []
        for turn in ("before", "after"):
            if turn == "after":
                job = _job(inputs, Path(folder, "out"), plan)
                say(f"the job: RTFx {job['rtfx']:.1f}")
            turns.append(_alone(inputs, plan))
            say(f"the engine alone, {turn} the job: RTFx {turns[-1]['rtfx']:.1f}")
    alone = len(turns) / sum(1 / turn["rtfx"] for turn in turns)
    return {
        "benchmark": "job",
        "engine_alone": turns,
        "job": job,
        "share_of_engine": round(job["rtfx"] / alone, 3),
        "machine": machine(),
    }


def _demo_clips(file: Path, hours: float) -> str:
    """A manifest of the demo's sound clips, one after the other until there is so much."""
    from pipeline.demo import sound_clips

    clips, total, number = sound_clips(), 0.0, 0
    with file.open("w", encoding="utf-8") as lines:
        while total < 3600 * hours:
            for path, duration_s in clips.items():
                lines.write(json.dumps({"audio_filepath": str(path), "id": f"{number:06}"}) + "\n")
                total, number = total + duration_s, number + 1
    return str(file)


def _alone(inputs: Sequence[str], plan: Plan) -> Figures:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(engine_alone, inputs, plan.config, plan.alone_s).result()


def engine_alone(inputs: Sequence[str], config: Config, most_s: float) -> Figures:
    """The engine over Units that lie in memory, all cores its own; for a process that is thrown away."""
    from pipeline.engine import engine_config, load_engine

    units = list(_units(inputs, config, most_s))
    if not units:
        raise UsageError(f"{', '.join(inputs)}: no audio could be decoded")
    audio_s = sum(seconds(unit.n_samples) for unit in units)
    with load_engine(engine_config(config, usable_cores())) as engine:
        list(engine.run(units[:1], config.decode_options()))  # whatever happens at the first time only
        began = time.monotonic()
        windows = sum(result.n_windows for result in engine.run(units, config.decode_options()))
        wall_s = time.monotonic() - began
        info = str(engine.info)
    return {"rtfx": audio_s / wall_s, "audio_s": audio_s, "wall_s": wall_s, "windows": windows, "engine": info}


def _units(inputs: Sequence[str], config: Config, most_s: float) -> Iterator[Unit]:
    from pipeline.manifest import read_inputs
    from pipeline.units import read_units

    total = 0.0
    for item in chain.from_iterable(read_units(one, config) for one in read_inputs(list(inputs))):
        if isinstance(item, Unit):
            total += seconds(item.n_samples)
            yield item
        if total >= most_s:
            return


def _job(inputs: Sequence[str], output: Path, plan: Plan) -> Figures:
    command = [sys.executable, "-m", "pipeline.cli", "transcribe", *inputs, "--output", str(output), *plan.options]
    began = time.monotonic()
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    whole_s = time.monotonic() - began
    if done.returncode != 0:
        raise MurmurError(f"murmur transcribe ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    said = json.loads(done.stdout.splitlines()[-1])
    first, last = _span(output)
    return {
        "rtfx": said["this_run"]["audio_s"] / (last - first),
        "audio_s": said["this_run"]["audio_s"],
        "first_unit_to_last_commit_s": round(last - first, 1),
        "whole_command_s": round(whole_s, 1),
        "start_s": said["start_s"],
        "finalize_s": said["finalize_s"],
        "pools": said["this_run"]["pools"],
    }


def _span(output: Path) -> tuple[float, float]:
    """When the first Unit was handed to an engine and when the last was committed, by the ledger's clock."""
    entries = [json.loads(path.read_text()) for path in (output / "_run" / "ledger").glob("*.json")]
    starts = [entry["at"] - unit["engine_s"] for entry in entries for unit in entry["units"]]
    return min(starts), max(entry["at"] for entry in entries)
