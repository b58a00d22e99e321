"""Which language: of recordings, of the windows of recordings in several, and whether the wrong one is seen.

    python -m tests.benchmarks.languages [--clips 60] [--mixed 12] [--out FILE]

Held-out synthetic speech, the demo configuration in float32.

- recordings: the language that is found on each clip.
- mixed: recordings whose speaker changes, and with him the language, after a pause; `language: window`. A segment is
  right where it has the language of the sentence in the middle of it.
- mismatch: the share flagged `language_mismatch` of clips told each wrong language, of clips translated, and of clips
  transcribed as they should be.

Prints one JSON object on the last line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, get_args

import numpy as np

from pipeline.demo.train.heldout import Clip, make_clip, make_set
from pipeline.demo.train.lexicon import Language
from pipeline.engine import Engine
from pipeline.flags import MISMATCH
from pipeline.scoring import Score, word_score
from pipeline.types import SAMPLE_RATE, Pcm, Transcript
from tests.benchmarks.heldout_accuracy import demo_config, demo_engine, transcribe_pcm
from tests.benchmarks.machine import machine

LANGUAGES: tuple[Language, ...] = get_args(Language)
MIXED = {  # sentences of a turn, seconds of pause behind it
    "turns of 2 to 4 sentences, pauses of 2.5 to 4 s": ((2, 4), (2.5, 4.0)),
    "turns of 2 to 4 sentences, pauses of 0.6 to 1.5 s": ((2, 4), (0.6, 1.5)),
    "turns of one sentence, pauses of 2.5 to 4 s": ((1, 1), (2.5, 4.0)),
}
Said = tuple[float, float, str, str]  # start, end, language, text


def mixed(
    seed: int, sentences: tuple[int, int], pause_s: tuple[float, float], turns: int = 6
) -> tuple[Pcm, list[Said]]:
    """One recording of `turns`, each in another language than the one before."""
    random = Random(f"mixed/{seed}")
    parts: list[Pcm] = []
    said: list[Said] = []
    language: Language | None = None
    for turn in range(turns):
        language = random.choice([one for one in LANGUAGES if one != language])
        at = sum(map(len, parts)) / SAMPLE_RATE
        clip = make_clip(language, random.randint(*sentences), seed=1000 * seed + turn)
        said += [(at + one.start, at + one.end, language, one.text) for one in clip.sentences]
        parts += [clip.pcm, np.zeros(round(random.uniform(*pause_s) * SAMPLE_RATE), np.int16)]
    return np.concatenate(parts), said


def right(transcript: Transcript, said: list[Said]) -> Iterator[bool]:
    """Whether each segment has the language of what was said in the middle of it."""
    for segment in transcript.segments:
        middle = (segment.start + segment.end) / 2
        nearest = min(said, key=lambda one: max(one[0] - middle, middle - one[1], 0.0))
        yield segment.language == nearest[2]


def measure_mixed(engine: Engine, recordings: int) -> dict[str, Any]:
    config, found = demo_config(language="window"), {}
    for name, (sentences, pause_s) in MIXED.items():
        score, hits, first = Score(), [], 0
        for seed in range(recordings):
            pcm, said = mixed(seed, sentences, pause_s)
            transcript = transcribe_pcm(pcm, f"mixed {seed}", engine, config)
            hits += right(transcript, said)
            first += transcript.language == said[0][2]
            score += word_score(" ".join(one[3] for one in said), transcript.text)
        found[name] = {
            "recordings": recordings,
            "segments": len(hits),
            "right": round(sum(hits) / len(hits), 4),
            "first_right": round(first / recordings, 4),
            "wer": round(score.rate, 4),
        }
        print(name, found[name], file=sys.stderr)
    return found


def measure_clips(engine: Engine, clips: dict[str, Clip]) -> dict[str, Any]:
    """The language of each clip, and how often told or asked wrongly is flagged."""

    def flagged(name: str, clip: Clip, **settings: Any) -> tuple[bool, str | None]:
        transcript = transcribe_pcm(clip.pcm, name, engine, demo_config(**settings))
        return MISMATCH in transcript.flags, transcript.language

    asked = {name: flagged(name, clip) for name, clip in clips.items()}
    found = [asked[name][1] == clip.language for name, clip in clips.items()]
    wrong = [
        flagged(name, clip, language=one)[0]
        for name, clip in clips.items()
        for one in LANGUAGES
        if one != clip.language
    ]
    translated = [flagged(name, clip, task="translate")[0] for name, clip in clips.items() if clip.language != "en"]
    return {
        "recordings": {"clips": len(found), "right": round(sum(found) / len(found), 4)},
        "mismatch": {
            "told the wrong language": [sum(wrong), len(wrong)],
            "translated": [sum(translated), len(translated)],
            "as it should be": [sum(one for one, _ in asked.values()), len(asked)],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--mixed", type=int, default=12)
    parser.add_argument("--seed", type=int, default=31)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    engine = demo_engine()
    report = {
        "benchmark": "languages",
        **measure_clips(engine, make_set(arguments.clips, seed=arguments.seed)),
        "mixed": measure_mixed(engine, arguments.mixed),
        "machine": machine(),
    }
    engine.close()
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
