"""What half precision costs in accuracy: the same hour of held-out speech in float32 and in another dtype.

    python -m tests.benchmarks.half_precision [--dtype bfloat16] [--device auto] [--minutes 60] [--out FILE]

All clips at once, in `windows` and in `sequential`, or in the one that `--algorithm` names. Progress goes to stderr,
one JSON object to the last line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from pipeline.config import Config
from pipeline.demo.train.heldout import Clip, make_clip
from pipeline.demo.train.lexicon import LANGUAGES
from pipeline.engine import EngineConfig, load_engine
from pipeline.machine import machine
from pipeline.scoring import Score, word_score
from pipeline.stitch import stitch
from pipeline.types import Recording, Transcript, Unit, UnitResult, seconds
from pipeline.units import cut_units
from pipeline.vad import SileroVad
from tests.benchmarks.heldout_accuracy import demo_config

ALGORITHMS = ("windows", "sequential")


def speech(minutes: float, seed: int) -> dict[str, Clip]:
    """Clips of 1 to 5 sentences, the languages in turn, `minutes` in all."""
    sizes, clips, total = Random(f"half/{seed}"), dict[str, Clip](), 0.0
    for index in count():
        if total >= minutes * 60:
            return clips
        language = LANGUAGES[index % len(LANGUAGES)]
        clip = make_clip(language, sizes.randint(1, 5), seed * 100_000 + index)
        clips[f"{language}-{index:04d}"] = clip
        total += seconds(len(clip.pcm))
    raise AssertionError


def transcribe(clips: dict[str, Clip], config: Config, device: str, dtype: str) -> dict[str, Transcript]:
    """All clips at once, as the bulk job has them: batched over recordings."""
    results: dict[str, list[UnitResult]] = defaultdict(list)
    with load_engine(EngineConfig(model="demo", device=device, dtype=dtype)) as engine:
        for result in engine.run(_units(clips, config), config.decode_options()):
            results[result.recording.id].append(result)
    return {name: stitch(results[name]) for name in clips}


def _units(clips: dict[str, Clip], config: Config) -> Iterator[Unit]:
    for name, clip in clips.items():
        yield from cut_units(
            Recording(id=name, uri=name),
            [clip.pcm],
            vad=SileroVad(),
            unit_length_s=config.unit_length_s,
            algorithm=config.algorithm,
            sequential_max_s=config.sequential_max_s,
        )


def compare(
    clips: dict[str, Clip], exact: dict[str, Transcript], half: dict[str, Transcript], config: Config
) -> dict[str, Any]:
    """WER of both against what was said, and how many texts are the same to the letter."""
    wers = {}
    for name, found in (("float32", exact), ("half", half)):
        scores = [word_score(clip.text, found[key].text, clip.language) for key, clip in clips.items()]
        wers[name] = sum(scores, Score()).rate
    return {
        "algorithm": config.algorithm,
        "recordings": len(clips),
        "audio_s": round(sum(seconds(len(clip.pcm)) for clip in clips.values())),
        "wer_float32": round(wers["float32"], 5),
        "wer_half": round(wers["half"], 5),
        "wer_difference_points": round(100 * (wers["half"] - wers["float32"]), 3),
        "equal_texts": round(sum(exact[key].text == half[key].text for key in clips) / len(clips), 4),
        "n_fallbacks": {"float32": _fallbacks(exact), "half": _fallbacks(half)},
    }


def _fallbacks(transcripts: dict[str, Transcript]) -> int:
    return sum(transcript.n_fallbacks for transcript in transcripts.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--algorithm", choices=ALGORITHMS, action="append", help="both, if not given")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    clips = speech(arguments.minutes, arguments.seed)
    parts = []
    for algorithm in arguments.algorithm or ALGORITHMS:
        config = demo_config(algorithm=algorithm)
        exact = transcribe(clips, config, "cpu", "float32")
        half = transcribe(clips, config, arguments.device, arguments.dtype)
        parts.append(compare(clips, exact, half, config))
        print(json.dumps(parts[-1]), file=sys.stderr)
    report = {"benchmark": "half_precision", "dtype": arguments.dtype, "parts": parts, "machine": machine()}
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
