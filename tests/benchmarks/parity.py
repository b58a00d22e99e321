"""Is `sequential` in float32 openai-whisper's `transcribe()`? Hundreds of recordings, every option, decode by decode.

    python -m tests.benchmarks.parity [--quick] [--out FILE]

Held-out speech, clean and spoilt in a dozen ways, in three languages, on the demo model under each profile of
`tests/engine/parity.py`; then random weights of several shapes, where nothing is likely and every figure counts.
A recording is *equal* if all its decodes, segments, scores and words are; *near-tie* if the first other token is where
the reference's own best two were closer than 1e-3; *standstill* if all is equal until the reference begins to decode a
window again, which under random weights may be for ever; else *different*, and the script fails. Its small form runs
in the suite (`tests/engine/test_parity.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.demo import model_path
from pipeline.demo.train.convert import to_openai
from pipeline.demo.train.lexicon import LANGUAGES, Language
from pipeline.engine import Engine, EngineConfig, load_engine
from pipeline.engine.random_checkpoint import CANTONESE, ENGLISH, SIZES, Shape, write_random_checkpoint
from pipeline.types import SAMPLE_RATE, DecodeOptions
from tests.engine import hard_audio
from tests.engine.parity import (
    NEAR_TIE,
    PROFILES,
    SCORE,
    WORD_S,
    compare,
    events,
    profile,
    side_by_side,
)

Figures = dict[str, Any]
Recording = tuple[str, Language, int]  # kind, language, seed

LANES = 8  # fewer than recordings in flight, so that lanes are refilled
PER_PROFILE = 7
PER_SHAPE = 4

SHAPES: dict[str, Shape] = {
    "80 mels": Shape(64, 1, 2, 2),
    "128 mels, 100 languages, one decoder layer": Shape(128, 2, 4, 1, 128, CANTONESE),
    "English only": Shape(128, 2, 2, 3, n_vocab=ENGLISH),
    "whisper-tiny": SIZES["tiny"],
}

# Nothing is likely under random weights: no check would ever pass. A limit keeps the texts short.
UNCHECKED = DecodeOptions(
    algorithm="sequential",
    temperature_fallback=False,
    compression_ratio_threshold=None,
    logprob_threshold=None,
    no_speech_threshold=None,
    max_tokens=120,
)
RANDOM_PROFILES: dict[str, DecodeOptions] = {
    "plain": UNCHECKED,
    "words, prompt": replace(UNCHECKED, word_timestamps=True, initial_prompt="One, two."),
    "no history, none suppressed": replace(UNCHECKED, condition_on_previous_text=False, suppress_tokens=()),
    "temperature 0.7, best of 2": replace(UNCHECKED, temperature=0.7, best_of=2, max_tokens=40),
    "beam 5": replace(UNCHECKED, beam_size=5, max_tokens=40),
}


@dataclass(slots=True)
class Group:
    """Recordings that one engine decodes under the same options, and what came of them."""

    name: str
    options: DecodeOptions
    recordings: list[Recording]
    kinds: Counter[str] = field(default_factory=Counter)  # of verdict
    seen: Counter[str] = field(default_factory=Counter)
    audio_s: float = 0.0
    notes: list[Figures] = field(default_factory=list)  # of what was not equal

    def figures(self) -> Figures:
        return {
            "recordings": len(self.recordings),
            "equal": self.kinds["equal"],
            "near_ties": self.kinds["near-tie"],
            "standstills": self.kinds["standstill"],
            "different": self.kinds["different"],
            "audio_s": round(self.audio_s, 1),
            **dict(sorted(self.seen.items())),
        }


def demo_groups(per_profile: int) -> list[Group]:
    """Every profile gets other recordings; kinds and languages come round in turn."""
    groups = []
    number = 0
    for name in PROFILES:
        # The reference goes round for ever where a clip ends behind the audio.
        kinds = ["long", "longish"] if name == "clips" else list(hard_audio.KINDS)
        recordings: list[Recording] = []
        for _ in range(per_profile):
            recordings.append((kinds[number % len(kinds)], LANGUAGES[number % len(LANGUAGES)], 1000 + number))
            number += 1
        groups.append(Group(name, profile(name), recordings))
    return groups


def random_groups(shape: str, per_profile: int) -> list[Group]:
    kinds = ["clean", "paused", "musical", "longish"]
    first = 5000 + 100 * list(SHAPES).index(shape)
    return [
        Group(
            f"random weights, {shape}: {name}",
            options,
            [(kinds[i % len(kinds)], LANGUAGES[i % 3], first + 10 * j + i) for i in range(per_profile)],
        )
        for j, (name, options) in enumerate(RANDOM_PROFILES.items())
    ]


def measure(group: Group, engine: Engine, model: Any) -> None:
    pcms = [hard_audio.make(*recording) for recording in group.recordings]
    pairs = side_by_side(engine, model, pcms, group.options)
    for recording, pcm, (mine, its) in zip(group.recordings, pcms, pairs, strict=True):
        verdict = compare(mine, its)
        group.kinds[verdict.kind] += 1
        group.seen += events(its)
        group.audio_s += len(pcm) / SAMPLE_RATE
        if verdict.kind != "equal":
            group.notes.append(
                {"group": group.name, "recording": recording, "verdict": verdict.kind, "detail": verdict.detail}
            )


@contextmanager
def both(folder: Path) -> Iterator[tuple[Engine, Any]]:
    """Both engines on one checkpoint."""
    with load_engine(EngineConfig(str(folder), device="cpu", dtype="float32", lanes=LANES)) as engine:
        yield engine, to_openai(folder)


def measure_all(groups: list[Group], engine: Engine, model: Any) -> list[Group]:
    for group in groups:
        start = time.monotonic()
        measure(group, engine, model)
        print(f"{group.name}: {dict(group.kinds)}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        for note in group.notes:
            print(f"  {note['recording']} {note['verdict']}: {note['detail'][:1000]}", file=sys.stderr, flush=True)
    return groups


def summary(groups: list[Group]) -> Figures:
    kinds = sum((group.kinds for group in groups), Counter[str]())
    audio = Counter(kind for group in groups for kind, _, _ in group.recordings)
    return {
        "tolerances": {"near_tie_logits": NEAR_TIE, "scores": SCORE, "words_s": WORD_S},
        "recordings": sum(len(group.recordings) for group in groups),
        "equal": kinds["equal"],
        "near_ties": kinds["near-tie"],
        "standstills": kinds["standstill"],
        "different": kinds["different"],
        "audio_s": round(sum(group.audio_s for group in groups), 1),
        "decodes": sum(group.seen["decodes"] for group in groups),
        "kinds_of_audio": dict(audio),
        "groups": {group.name: group.figures() for group in groups},
        "not_equal": [note for group in groups for note in group.notes],
    }


def run(quick: bool) -> list[Group]:
    """Quick: two recordings a profile, the small shapes only."""
    with both(model_path()) as (engine, model):
        groups = measure_all(demo_groups(2 if quick else PER_PROFILE), engine, model)
    for name, shape in SHAPES.items():
        if quick and shape.width > 128:
            continue
        with tempfile.TemporaryDirectory() as folder:
            write_random_checkpoint(Path(folder), shape, seed=1, mean_tokens=80)
            with both(Path(folder)) as (engine, model):
                groups += measure_all(random_groups(name, 1 if quick else PER_SHAPE), engine, model)
    return groups


def main(arguments: Iterable[str] | None = None) -> int:
    from tests.benchmarks.machine import machine

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="two recordings a profile instead of seven")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(None if arguments is None else list(arguments))
    figures = summary(run(args.quick)) | {"machine": machine()}
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(figures, ensure_ascii=False))
    return 1 if figures["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
