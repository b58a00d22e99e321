"""How well the demo configuration transcribes speech it never heard: text, language, times, nothing lost or doubled.

    python -m tests.benchmarks.heldout_accuracy [--clips 120] [--minutes 30] [--out FILE]

Held-out sentences by held-out voices from `pipeline.demo.train.heldout`, decoded by the real engine in float32, and
the same audio by openai-whisper on the same weights where a comparison says which of the two is the limit. Prints a
table and one JSON object on the last line. Its small form runs in the suite (`tests/test_accuracy.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import jiwer

from pipeline.config import Config, load_config
from pipeline.demo import model_path
from pipeline.demo.train.convert import to_openai
from pipeline.demo.train.evaluate import transcribe as transcribe_openai
from pipeline.demo.train.heldout import Clip, Sentence, make_long, make_set
from pipeline.demo.train.lexicon import LANGUAGES, Language
from pipeline.engine import Engine, EngineConfig, load_engine
from pipeline.scoring import Score, normalise, word_score
from pipeline.stitch import stitch
from pipeline.types import DecodeOptions, Recording, Transcript, seconds
from pipeline.units import cut_units
from pipeline.vad import SileroVad

Figures = dict[str, Any]


def demo_engine() -> Engine:
    return load_engine(EngineConfig(model="demo", dtype="float32", lanes=16))


def demo_config(**overrides: Any) -> Config:
    """What a user gets with `--model demo`, in float32."""
    return load_config(overrides={"model": "demo", "dtype": "float32"} | overrides, env={})


def transcribe_pcm(
    pcm: Any, name: str, engine: Engine, config: Config, options: DecodeOptions | None = None
) -> Transcript:
    """The path of `pipeline.transcribe` for samples in memory."""
    options = options or config.decode_options()
    units = cut_units(
        Recording(id=name, uri=name),
        [pcm],
        vad=SileroVad() if config.vad == "silero" else None,
        unit_length_s=config.unit_length_s,
        algorithm=options.algorithm,
        sequential_max_s=config.sequential_max_s,
    )
    return stitch(list(engine.run(units, options)))


# -- short clips -------------------------------------------------------------------------------------------------------


def measure_clips(clips: dict[str, Clip], engine: Engine, config: Config) -> Figures:
    """WER, language, sentence boundaries; then words' starts from a second run, whose text must be the same."""
    with_words = config.model_copy(update={"chunk_level": "word"})
    scores: dict[str, Score] = {}
    right = same_text = 0
    bounds: list[float] = []
    starts: list[float] = []
    for name, clip in clips.items():
        plain = transcribe_pcm(clip.pcm, name, engine, config)
        worded = transcribe_pcm(clip.pcm, name, engine, with_words)
        scores[clip.language] = scores.get(clip.language, Score()) + word_score(clip.text, plain.text, clip.language)
        right += plain.language == clip.language
        same_text += plain.text == worded.text
        bounds += boundary_errors(clip, plain)
        starts += word_start_errors(clip, worded)
    return {
        "clips": len(clips),
        "wer": {language: round(score.rate, 4) for language, score in sorted(scores.items())},
        "language_right": round(right / len(clips), 4),
        "boundary_error_median_s": round(median(bounds), 3),
        "word_start_error_median_s": round(median(starts), 3),
        "words_matched": len(starts),
        "words_spoken": sum(len(clip.words) for clip in clips.values()),
        "text_same_with_words": same_text == len(clips),
    }


def boundary_errors(clip: Clip, transcript: Transcript) -> Iterator[float]:
    """Each sentence's start and end against the nearest segment start and end."""
    for sentence in clip.sentences if transcript.segments else ():
        yield from _bounds_of(sentence, transcript)


def word_start_errors(clip: Clip, transcript: Transcript) -> list[float]:
    """Of the words that both texts share, in order."""
    heard = [word for segment in transcript.segments for word in segment.words]
    return [abs(heard[j].start - clip.words[i].start) for i, j in shared_words(clip, [w.word for w in heard])]


def shared_words(clip: Clip, heard: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs (index of a spoken word, index in `heard`), in order."""
    return in_both([normalise(word.text) for word in clip.words], [normalise(word) for word in heard])


def in_both(said: Sequence[str], heard: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of indices of the words that both have, in order."""
    matcher = SequenceMatcher(None, said, heard, autojunk=False)
    return [(block.a + k, block.b + k) for block in matcher.get_matching_blocks() for k in range(block.size)]


# -- long recordings ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Coverage:
    """What became of the sentences of one recording."""

    missing: int  # sentences that nothing was written for; a wrong word is no loss
    doubled: int  # runs of four or more words that nobody said there
    end_error_s: float  # the worst boundary of the last ten sentences
    exact: bool  # decoded + skipped is the duration to the sample

    @property
    def whole(self) -> bool:
        return not self.missing and not self.doubled and self.exact and self.end_error_s <= 0.5


def coverage(clip: Clip, transcript: Transcript) -> Coverage:
    """Every sentence met once and in order, times true to the end."""
    segments = [(s.start, s.end) for s in transcript.segments]
    missing, doubled = lost_and_doubled(clip, transcript.text, segments)
    worst = max((e for sentence in clip.sentences[-10:] for e in _bounds_of(sentence, transcript)), default=0.0)
    return Coverage(missing, doubled, worst, transcript.duration == len(clip.pcm))


def lost_and_doubled(clip: Clip, text: str, segments: Sequence[tuple[float, float]]) -> tuple[int, int]:
    """(sentences that are missing, runs of four or more words that nobody said).

    Missing: half of its words or more have nothing in their place, and no segment is its own. One that was misheard
    has a segment of its own, three fifths of which they share; an overlong one that swallowed a neighbour has not.
    """
    sentence_of = [i for i, s in enumerate(clip.sentences) for _ in normalise(s.text).split()]
    found = jiwer.process_words(normalise(clip.text), normalise(text) or "-").alignments[0]
    deleted = Counter(
        sentence_of[i] for c in found if c.type == "delete" for i in range(c.ref_start_idx, c.ref_end_idx)
    )
    lost = [i for i, n in Counter(sentence_of).items() if deleted[i] >= n / 2]
    missing = sum(max((_shared(clip.sentences[i], s) for s in segments), default=0.0) < 0.6 for i in lost)
    inserted = [c.hyp_end_idx - c.hyp_start_idx for c in found if c.type == "insert"]
    return missing, sum(n >= 4 for n in inserted)


def _shared(sentence: Sentence, segment: tuple[float, float]) -> float:
    """The time that both have over the time that either has."""
    start, end = segment
    both = min(sentence.end, end) - max(sentence.start, start)
    return max(0.0, both) / (max(sentence.end, end) - min(sentence.start, start))


def _bounds_of(sentence: Sentence, transcript: Transcript) -> tuple[float, float]:
    return (
        min(abs(s.start - sentence.start) for s in transcript.segments),
        min(abs(s.end - sentence.end) for s in transcript.segments),
    )


def measure_long(clip: Clip, name: str, engine: Engine, config: Config) -> Figures:
    began = time.monotonic()
    transcript = transcribe_pcm(clip.pcm, name, engine, config)
    found = coverage(clip, transcript)
    return {
        "minutes": round(clip.duration_s / 60, 2),
        "sentences": len(clip.sentences),
        "missing": found.missing,
        "doubled": found.doubled,
        "end_error_s": round(found.end_error_s, 3),
        "decoded_plus_skipped_is_duration": found.exact,
        "decoded_s": round(seconds(transcript.duration - transcript.n_skipped), 3),
        "skipped_s": round(seconds(transcript.n_skipped), 3),
        "uncovered_speech_s": round(seconds(transcript.uncovered_speech or 0), 2),
        "windows": transcript.n_windows,
        "fallbacks": transcript.n_fallbacks,
        "flags": list(transcript.flags),
        "wer": round(word_score(clip.text, transcript.text, clip.language).rate, 4),
        "wall_s": round(time.monotonic() - began, 1),
    }


def measure_dense(language: Language, seed: int, engine: Engine, config: Config, minutes: float) -> Figures:
    """Sentences without a pause that could be cut in, at two distances; beside ours what openai-whisper makes of the
    same samples and weights, in windows of 30 s without history."""
    figures: Figures = {}
    for gap_s in ((0.05, 0.09), (0.0, 0.05)):
        clip = make_long(language, seed, minutes=minutes, pause_s=gap_s)
        ours = measure_long(clip, "dense", engine, config)
        theirs = transcribe_openai(reference_model(), clip.pcm)
        lost, doubled = lost_and_doubled(clip, theirs.text, theirs.segments)
        figures[f"gaps {gap_s[0]:.2f} to {gap_s[1]:.2f} s"] = ours | {
            "reference_missing": lost,
            "reference_doubled": doubled,
            "reference_wer": round(word_score(clip.text, theirs.text, language).rate, 4),
        }
    return figures


# -- beside the reference ----------------------------------------------------------------------------------------------


@cache
def reference_model() -> Any:
    """openai-whisper's model with the demo's weights."""
    return to_openai(model_path())


def measure_reference(clips: dict[str, Clip], engine: Engine, config: Config) -> Figures:
    """`sequential` against openai-whisper's `transcribe()` on the same weights and samples, full fallback at T = 0."""
    model = reference_model()
    options = config.model_copy(update={"algorithm": "sequential", "chunk_length_s": 30}).decode_options()
    equal = fallbacks = 0
    scores: dict[str, Score] = {}
    different = []
    for name, clip in clips.items():
        ours = transcribe_pcm(clip.pcm, name, engine, config, options)
        theirs = transcribe_openai(model, clip.pcm)
        scores[clip.language] = scores.get(clip.language, Score()) + word_score(clip.text, theirs.text, clip.language)
        fallbacks += ours.n_fallbacks > 0
        if ours.text == theirs.text:
            equal += 1
        else:
            different.append({"clip": name, "ours": ours.text, "reference": theirs.text, "fallbacks": ours.n_fallbacks})
    return {
        "clips": len(clips),
        "text_equal": equal,
        "clips_with_fallback": fallbacks,
        "different": different,
        "reference_wer": {language: round(score.rate, 4) for language, score in sorted(scores.items())},
    }


def report(figures: Figures, indent: str = "") -> Iterator[str]:
    for key, value in figures.items():
        if isinstance(value, dict):
            yield f"{indent}{key}"
            yield from report(value, indent + "  ")
        else:
            yield f"{indent}{key:34} {value}"


def main(arguments: Iterable[str] | None = None) -> None:
    from tests.benchmarks.machine import machine

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clips", type=int, default=120)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(None if arguments is None else list(arguments))

    engine, config = demo_engine(), demo_config()
    clips = make_set(args.clips, args.seed)
    long = make_long("en", args.seed, minutes=args.minutes)
    short = make_long("en", args.seed, minutes=5.0)
    figures = {
        "configuration": {"chunk_length_s": config.chunk_length_s, "dtype": "float32", "algorithm": config.algorithm},
        "short": measure_clips(clips, engine, config),
        "reference": measure_reference(clips, engine, config),
        "long": measure_long(long, "long", engine, config),
        "no_pause": {language: measure_dense(language, args.seed, engine, config, 5.0) for language in LANGUAGES},
        "chunk_1s": measure_long(short, "chunk-1", engine, demo_config(chunk_length_s=1)),
        "chunk_30s": measure_long(long, "long-30", engine, demo_config(chunk_length_s=30)),
        "machine": machine(),
    }
    engine.close()
    print("\n".join(report(figures)), file=sys.stderr)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(figures, ensure_ascii=False))


if __name__ == "__main__":
    main()
