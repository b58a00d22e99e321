"""`windows` and `sequential` on the same hour of speech: word error rates with intervals, their difference, languages.

    python -m tests.benchmarks.two_algorithms [--minutes 60] [--out FILE]

Held-out synthetic speech in three languages, the demo model in float32, `sequential` without conditioning on earlier
text. No window holds more than three whole sentences:

- all of it in windows of 10 s, as the demo is configured: half is clips of one to three sentences, half recordings of
  up to five minutes in which no 10 s hold four;
- the clips alone in windows of 30 s, openai-whisper's own.

Pauses are at most 1.2 s, or as long as the fourth sentence takes to be beyond: what longer ones do is measured by
`tests/benchmarks/adversarial.py`.

Rates, normalisation and intervals are those of `murmur evaluate` (`pipeline.evaluation`): total errors over total
words, 95 % of 1,000 draws of recordings; for a difference both are drawn alike. `language_right` is the share of
recordings whose language, found by the model, is the one that is spoken.
Progress goes to stderr, one JSON object to the last line. Its small form runs in the suite (`tests/test_bars.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import count, cycle
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.demo.train.heldout import Clip, make_clip
from pipeline.demo.train.lexicon import LANGUAGES, Language
from pipeline.evaluation import RESAMPLES, interval, resampled
from pipeline.machine import machine
from pipeline.scoring import word_score
from pipeline.types import Transcript
from tests.benchmarks.half_precision import ALGORITHMS, transcribe
from tests.benchmarks.heldout_accuracy import demo_config
from tests.benchmarks.laid_out import lay_out, one_sentence
from tests.sounds import noise

Counts = NDArray[np.float64]

FLOOR = 0.002  # standard deviation of the noise under the long recordings, of full scale; as under the clips
WINDOW_S, MOST = 10, 3  # no window holds more sentences
PAUSE_S = (0.1, 1.2)  # or what it takes
LONG_MINUTES = 5.0


def corpus(minutes: float, seed: int) -> dict[str, Clip]:
    """So much speech: half in clips, half in long recordings; the languages in turn."""
    sizes, languages = Random(f"two/{seed}"), cycle(LANGUAGES)
    clips: dict[str, Clip] = {}
    for index in count():
        total = sum(clip.duration_s for clip in clips.values())
        if total >= minutes * 60:
            return clips
        language = next(languages)
        if total < minutes * 30:
            clips[f"{language}-{index:04d}"] = make_clip(language, sizes.randint(1, MOST), seed * 100_000 + index)
        else:
            length = min(LONG_MINUTES, minutes / 6)  # each language has one at least
            clips[f"{language}-{index:04d}-long"] = spaced(language, seed * 100_000 + index, length)
    raise AssertionError


def spaced(language: Language, seed: int, minutes: float) -> Clip:
    """A recording of which no WINDOW_S hold more than MOST whole sentences."""
    random, placed = Random(f"spaced/{language}/{seed}"), list[tuple[float, Clip]]()
    end = 0.2
    for index in count():
        start = end + (random.uniform(*PAUSE_S) if index else 0.0)
        if start > minutes * 60:
            break
        said = one_sentence(language, 1000 * seed + index)
        if index >= MOST:
            start = max(start, placed[-MOST][0] + WINDOW_S - said.duration_s)
        placed.append((start, said))
        end = start + said.duration_s
    floor = noise("white", end + 0.3, seed=seed)
    return lay_out(language, placed, end + 0.3, [(0.0, floor * np.float32(FLOOR / floor.std()))])


def compare(clips: dict[str, Clip], length_s: int) -> dict[str, Any]:
    """Each algorithm's rates in windows of `length_s`, overall and in groups, and how far `sequential` is."""
    counts: dict[str, Counts] = {}
    report: dict[str, Any] = {}
    for algorithm in ALGORITHMS:
        config = demo_config(algorithm=algorithm, chunk_length_s=length_s)
        assert not config.condition_on_previous_text
        found = transcribe(clips, config, "cpu", "float32")
        counts[algorithm] = _counts(clips, found)
        report[algorithm] = _figures(clips, found, counts[algorithm])
        print(algorithm, report[algorithm], file=sys.stderr, flush=True)
    both = np.hstack([counts[algorithm] for algorithm in ALGORITHMS])
    report["sequential_minus_windows"] = {
        "points": round(100 * float(_difference(both.sum(axis=0, keepdims=True))[0]), 3),
        "interval": _points(_difference(resampled(both, RESAMPLES))),
    }
    return report


def _short(clips: dict[str, Clip]) -> dict[str, Clip]:
    return {name: clip for name, clip in clips.items() if not name.endswith("long")}


def _figures(clips: dict[str, Clip], found: dict[str, Transcript], counts: Counts) -> dict[str, Any]:
    language = np.array([clip.language for clip in clips.values()])
    long = np.array([name.endswith("long") for name in clips])
    groups = {one: language == one for one in LANGUAGES} | {"clips": ~long, "long recordings": long}
    right = sum(found[name].language == clip.language for name, clip in clips.items())
    return {
        **_wer(counts),
        "groups": {name: _wer(counts[rows]) for name, rows in groups.items() if rows.any()},
        "language_right": round(right / len(clips), 4),
        "windows": sum(one.n_windows for one in found.values()),
        "fallbacks": sum(one.n_fallbacks for one in found.values()),
    }


def _wer(counts: Counts) -> dict[str, Any]:
    drawn = resampled(counts, RESAMPLES)
    errors, words = counts.sum(axis=0)
    return {"wer_percent": round(100 * float(errors / max(1, words)), 3), "interval": _points(_rate(drawn))}


def _counts(clips: dict[str, Clip], found: dict[str, Transcript]) -> Counts:
    """[recordings, 2]: errors and words that were said."""
    scores = [word_score(clip.text, found[name].text, clip.language) for name, clip in clips.items()]
    return np.array([(score.errors, score.n_reference) for score in scores], np.float64)


def _rate(sums: Counts) -> Counts:
    rates: Counts = sums[:, 0] / np.maximum(1, sums[:, 1])
    return rates


def _difference(sums: Counts) -> Counts:
    return _rate(sums[:, 2:]) - _rate(sums[:, :2])


def _points(values: Counts) -> list[float]:
    return [round(100 * bound, 3) for bound in interval(values)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=41)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    clips = corpus(arguments.minutes, arguments.seed)
    report: dict[str, Any] = {
        "benchmark": "two_algorithms",
        "corpus": {
            "minutes": round(sum(clip.duration_s for clip in clips.values()) / 60, 1),
            "clips": len(_short(clips)),
            "long_recordings": len(clips) - len(_short(clips)),
            "sentences": sum(len(clip.sentences) for clip in clips.values()),
        },
        "parts": {},
        "machine": machine(),
    }
    for name, part, length_s in (("all", clips, WINDOW_S), ("clips alone", _short(clips), 30)):
        report["parts"][f"{name}, windows of {length_s} s"] = compare(part, length_s)
        if arguments.out is not None:  # after each: a run that is stopped has measured something
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
