"""The small form of `tests/benchmarks/heldout_accuracy.py`: unheard speech, nothing lost, nothing doubled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeline.demo.train.heldout import make_long, make_set
from pipeline.demo.train.lexicon import Language
from pipeline.engine import Engine
from tests.benchmarks.heldout_accuracy import coverage, demo_config, demo_engine, measure_clips, transcribe_pcm


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = demo_engine()
    yield engine
    engine.close()


def test_text_language_and_times(engine: Engine) -> None:
    figures = measure_clips(make_set(12, seed=3), engine, demo_config())
    assert figures["wer"]["en"] <= 0.04  # the bundled model's own figures here: 2.3, 0.0 and 6.0 %
    assert figures["wer"]["de"] <= 0.02
    assert figures["wer"]["es"] <= 0.08
    assert figures["language_right"] == 1.0
    assert figures["boundary_error_median_s"] <= 0.02  # 0.007
    assert figures["word_start_error_median_s"] <= 0.1  # 0.065
    assert figures["text_same_with_words"]


@pytest.mark.parametrize(
    ("language", "seed", "minutes", "chunk_length_s", "pause_s"),
    [
        ("en", 4, 2.0, 10, None),
        ("en", 4, 0.7, 1, None),
        ("en", 4, 1.0, 10, (0.05, 0.09)),
        ("es", 20, 2.0, 10, (0.05, 0.09)),  # the model ends its text 16 s before its window does
    ],
    ids=["long", "windows-of-1-s", "no-pause-to-cut-in", "a-text-that-ends-early"],
)
def test_nothing_is_lost_or_doubled(
    engine: Engine,
    language: Language,
    seed: int,
    minutes: float,
    chunk_length_s: int,
    pause_s: tuple[float, float] | None,
) -> None:
    clip = make_long(language, seed, minutes=minutes, pause_s=pause_s)
    transcript = transcribe_pcm(clip.pcm, "x", engine, demo_config(chunk_length_s=chunk_length_s))
    assert coverage(clip, transcript).whole, coverage(clip, transcript)
    assert transcript.duration == len(clip.pcm)
