"""How often speech without text is seen, and how often it is said of a good transcript: the flag `uncovered_speech`.

    python -m tests.benchmarks.coverage [--clips 90] [--minutes 8] [--out FILE]

Held-out speech by the demo model in float32, with segments and with words, in windows and sequentially. First as it
is: flagged recordings, and those of them with a WER below 5 %. Then a tenth of the spans (`sequential`: of the 30 s
windows) loses its text, ten times: affected recordings, and how many of them are flagged. Prints a table and one JSON
object on the last line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from pipeline.demo.train.heldout import Clip, make_long, make_set
from pipeline.demo.train.lexicon import LANGUAGES
from pipeline.engine import Engine
from pipeline.engine.features import N_SAMPLES
from pipeline.scoring import word_score
from pipeline.stitch import UNCOVERED, stitch, stitch_unit
from pipeline.types import SAMPLE_RATE, Hypothesis, Plan, Range, Segment, Transcript, Unit, UnitResult
from tests.benchmarks.heldout_accuracy import demo_config, demo_engine, report, transcribe_pcm
from tests.benchmarks.machine import machine

Figures = dict[str, Any]
DRAWS = 10  # times that every recording loses other windows
MODES: dict[str, dict[str, Any]] = {
    "windows": {},
    "windows, words": {"chunk_level": "word"},
    "windows of 30 s, words": {"chunk_level": "word", "chunk_length_s": 30},
    "sequential": {"algorithm": "sequential"},
    "sequential, words": {"algorithm": "sequential", "chunk_level": "word"},
}


@dataclass(frozen=True, slots=True)
class Heard:
    """What the engine answered for one unit, before it was put together."""

    unit: Unit
    plan: Plan
    hypotheses: Sequence[Hypothesis]


def listen(clip: Clip, name: str, engine: Engine, mode: str) -> tuple[Transcript, list[Heard]]:
    heard: list[Heard] = []

    def keep(unit: Unit, plan: Plan, hypotheses: Sequence[Hypothesis]) -> UnitResult:
        heard.append(Heard(unit, plan, hypotheses))
        return stitch_unit(unit, plan, hypotheses)

    with patch("pipeline.engine.local.stitch_unit", keep):
        return transcribe_pcm(clip.pcm, name, engine, demo_config(**MODES[mode])), heard


def emptied(one: Heard, draw: np.random.Generator) -> tuple[UnitResult, bool]:
    """The unit's result with the text of a tenth of the windows taken away, and whether there was any."""
    hypotheses, affected = [], False
    for span, hypothesis in zip(one.plan.spans, one.hypotheses, strict=True):
        lost = [r for r in _windows(one, span) if draw.random() < 0.1]
        kept = tuple(s for s in hypothesis.segments if not any(_begins_in(s, span, r) for r in lost))
        affected |= any(segment.text.strip() for segment in hypothesis.segments if segment not in kept)
        hypotheses.append(replace(hypothesis, segments=kept))
    return stitch_unit(one.unit, one.plan, hypotheses), affected


def _windows(one: Heard, span: Range) -> list[Range]:
    """A span, or if it is all of the unit what the reference takes for windows."""
    if span.n_samples <= N_SAMPLES or len(one.plan.spans) > 1:
        return [span]
    return [Range(at, min(at + N_SAMPLES, span.stop)) for at in range(span.start, span.stop, N_SAMPLES)]


def _begins_in(segment: Segment, span: Range, lost: Range) -> bool:
    return lost.start <= span.start + segment.start * SAMPLE_RATE < lost.stop


def measure(clips: dict[str, Clip], engine: Engine, mode: str) -> Figures:
    draw = np.random.default_rng(0)
    flagged: list[str] = []
    good: list[str] = []
    affected = seen = 0
    uncovered = speech = 0
    for name, clip in clips.items():
        transcript, heard = listen(clip, name, engine, mode)
        uncovered, speech = uncovered + (transcript.uncovered_speech or 0), speech + (transcript.speech or 0)
        if UNCOVERED in transcript.flags:
            flagged.append(name)
            if word_score(clip.text, transcript.text, clip.language).rate < 0.05:
                good.append(name)
        for _ in range(DRAWS):
            results, hits = zip(*(emptied(one, draw) for one in heard), strict=True)
            affected += any(hits)
            seen += any(hits) and UNCOVERED in stitch(results).flags
    return {
        "recordings": len(clips),
        "speech_s": speech // SAMPLE_RATE,
        "uncovered_speech_s": round(uncovered / SAMPLE_RATE, 1),
        "flagged": flagged,  # rightly, where the model left a sentence out
        "flagged_with_wer_below_5_percent": good,
        "emptied": {"affected": affected, "flagged": seen},
    }


def recordings(n_clips: int, minutes: float, seed: int) -> Iterator[tuple[str, Clip]]:
    yield from make_set(n_clips, seed).items()
    for language in LANGUAGES:
        yield f"long-{language}", make_long(language, seed, minutes=minutes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clips", type=int, default=90)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    clips = dict(recordings(args.clips, args.minutes, args.seed))
    engine = demo_engine()
    figures: Figures = {mode: measure(clips, engine, mode) for mode in MODES} | {"machine": machine()}
    engine.close()
    print("\n".join(report(figures)), file=sys.stderr)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(figures, ensure_ascii=False))


if __name__ == "__main__":
    main()
