"""The job's speed beside its engine's own: how much of the engine is lost to decoding, Ray, and committing.

    python -m tests.benchmarks.job_speed [--hours 4] [--size base] [--tokens 100] [--out FILE]

Random weights of the named size, `dtype: auto`, fallback off and a fixed number of tokens, so that all windows cost
alike; demo speech in FLAC files of 20 s to 20 minutes. The engine alone is handed the same Units out of memory, half an
hour of them before the job and the same after it, in a process of its own with the same number of threads; the job is
the command. Its RTFx is from the first Unit handed to the engine to the last commit, as the ledger says; starting and
finalising are told apart. Prints one JSON object on the last line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import av

from pipeline.config import Config, load_config
from pipeline.demo.train.heldout import make_clip
from pipeline.demo.train.lexicon import LANGUAGES
from pipeline.manifest import read_inputs
from pipeline.types import SAMPLE_RATE, Pcm, Unit
from tests.benchmarks.long_talk import talk
from tests.benchmarks.machine import machine

ALONE_S = 1800.0  # of audio, for the engine by itself


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


# ---- the engine alone


def engine_alone(folder: Path, config: Config, threads: int) -> dict[str, Any]:
    """RTFx of the engine over Units that lie in memory; called in a process of its own."""
    from pipeline.engine import engine_config, load_engine
    from pipeline.units import read_units

    units: list[Unit] = []
    for item in chain.from_iterable(read_units(recording, config) for recording in read_inputs([str(folder)])):
        assert isinstance(item, Unit)
        units.append(item)
        if sum(unit.n_samples for unit in units) >= ALONE_S * SAMPLE_RATE:
            break
    audio_s = sum(unit.n_samples for unit in units) / SAMPLE_RATE
    with load_engine(engine_config(config, threads)) as engine:
        list(engine.run(units[:1], config.decode_options()))  # whatever happens at the first time only
        began = time.monotonic()
        windows = sum(result.n_windows for result in engine.run(units, config.decode_options()))
        wall_s = time.monotonic() - began
        info = str(engine.info)
    return {"rtfx": audio_s / wall_s, "audio_s": audio_s, "wall_s": wall_s, "windows": windows, "engine": info}


def ask_alone(folder: Path, model: Path, tokens: int) -> dict[str, Any]:
    arguments = ["--alone", str(folder), "--model", str(model), "--tokens", str(tokens)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.job_speed", *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"engine alone: RTFx {found['rtfx']:.1f}", file=sys.stderr)
    return found


# ---- the job


def run_job(folder: Path, output: Path, model: Path, tokens: int) -> dict[str, Any]:
    sets = [part for key, value in settings(model, tokens).items() for part in ("--set", f"{key}={json.dumps(value)}")]
    began = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "pipeline.cli",
        "transcribe",
        str(folder),
        "--output",
        str(output),
        "--json",
        *sets,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    whole_s = time.monotonic() - began
    said = json.loads(done.stdout.splitlines()[-1])
    first, last, windows = spans(output)
    return {
        "rtfx": said["this_run"]["audio_s"] / (last - first),
        "audio_s": said["this_run"]["audio_s"],
        "first_window_to_last_result_s": round(last - first, 1),
        "whole_command_s": round(whole_s, 1),
        "start_s": said.get("start_s"),
        "finalize_s": said.get("finalize_s"),
        "pools": said["this_run"]["pools"],
        "commits": windows,
    }


def spans(output: Path) -> tuple[float, float, int]:
    """When the first Unit was handed to the engine and when the last was committed, by the ledger's clock."""
    entries = [json.loads(path.read_text()) for path in (output / "_run" / "ledger").glob("*.json")]
    starts = [entry["at"] - unit["engine_s"] for entry in entries for unit in entry["units"]]
    return min(starts), max(entry["at"] for entry in entries), len(entries)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=4.0)
    parser.add_argument("--size", default="base")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        config = load_config(overrides=settings(arguments.model, arguments.tokens), env={})
        print(json.dumps(engine_alone(arguments.alone, config, threads=2)))
        return 0
    from pipeline.engine.random_checkpoint import write_random_checkpoint

    with tempfile.TemporaryDirectory() as temporary:
        folder, output, model = (Path(temporary, name) for name in ("in", "out", "model"))
        write_random_checkpoint(model, arguments.size, mean_tokens=None)
        audio_s = make_corpus(folder, arguments.hours, Random(1))
        print(f"{audio_s / 3600:.2f} h of audio", file=sys.stderr)
        before = ask_alone(folder, model, arguments.tokens)
        job = run_job(folder, output, model, arguments.tokens)
        print(f"job: RTFx {job['rtfx']:.1f}", file=sys.stderr)
        after = ask_alone(folder, model, arguments.tokens)
    alone = 2 / (1 / before["rtfx"] + 1 / after["rtfx"])
    result = {
        "benchmark": "job_speed",
        "size": arguments.size,
        "tokens": arguments.tokens,
        "audio_s": round(audio_s),
        "engine_alone": [before, after],
        "job": job,
        "share_of_engine": round(job["rtfx"] / alone, 3),
        "machine": machine(),
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
