"""`sequential` in float32 against openai-whisper's own `transcribe()`: same weights, same samples, greedy.

Temperature 0 only: at a higher one the two draw from different random streams. `tests/benchmarks` holds the long form.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.demo.train.heldout import Clip, make_clip, make_long
from pipeline.engine import Engine
from pipeline.types import SAMPLE_RATE, DecodeOptions, Recording, Segment, Unit, UnitResult

CLIPS = [("en", 2), ("de", 3), ("es", 4), ("en", 5), ("de", 1)]


def ours(engine: Engine, clip: Clip, **options: Any) -> UnitResult:
    unit = Unit(Recording("x", "x"), 0, 0, clip.pcm, is_last=True)
    settings = DecodeOptions(algorithm="sequential", temperature_fallback=False, **options)
    (result,) = engine.run([unit], settings)
    return result


def theirs(model: Any, clip: Clip, **options: Any) -> dict[str, Any]:
    with np.errstate(all="ignore"):
        result: dict[str, Any] = model.transcribe(clip.samples, fp16=False, temperature=0.0, **options)
    return result


def assert_same(result: UnitResult, expected: dict[str, Any]) -> None:
    """Tokens and scores of every segment that has text; the reference also keeps the cleared ones.

    Times beyond the end of the audio, which the reference leaves where a model made them up, are the end with us.
    """
    end_s = result.n_samples / SAMPLE_RATE
    assert result.language == expected["language"]
    segments = [s for s in result.segments if s.tokens]
    reference = [s for s in expected["segments"] if s["tokens"]]
    assert [list(s.tokens) for s in segments] == [s["tokens"] for s in reference]
    for segment, other in zip(segments, reference, strict=True):
        assert segment.text == other["text"]
        times = min(other["start"], end_s), min(other["end"], end_s)
        assert (segment.start, segment.end) == pytest.approx(times, abs=0.011)
        for name in ("avg_logprob", "no_speech_prob", "compression_ratio", "temperature"):
            assert getattr(segment, name) == pytest.approx(other[name], abs=1e-4), name
        assert_same_words(segment, other)


def assert_same_words(segment: Segment, other: dict[str, Any]) -> None:
    words = other.get("words", [])
    assert [w.word for w in segment.words] == [w["word"] for w in words]
    for word, expected in zip(segment.words, words, strict=True):
        assert (word.start, word.end) == pytest.approx((expected["start"], expected["end"]), abs=0.02)
        assert word.probability == pytest.approx(expected["probability"], abs=1e-4)


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return [make_clip(language, n, seed=500 + i) for i, (language, n) in enumerate(CLIPS)]


@pytest.fixture(scope="module")
def long_clip() -> Clip:
    """Two windows of speech and more, as seeks go."""
    return make_long("en", seed=7, minutes=0.9)


@pytest.mark.parametrize("i", range(len(CLIPS)))
@pytest.mark.parametrize("words", [False, True])
def test_short_recordings(engine: Engine, reference: Any, clips: list[Clip], i: int, words: bool) -> None:
    assert_same(ours(engine, clips[i], word_timestamps=words), theirs(reference, clips[i], word_timestamps=words))


@pytest.mark.filterwarnings("ignore:Word-level timestamps on translations")
@pytest.mark.parametrize(
    "options",
    [
        {"condition_on_previous_text": True},
        {"condition_on_previous_text": False, "word_timestamps": True},
        {"initial_prompt": "Anna buys three red apples in Berlin."},
        {"initial_prompt": "Anna buys three red apples in Berlin.", "carry_initial_prompt": True},
        {"clip_timestamps": (2.0, 9.5, 30.0)},
        {"language": "de", "no_speech_threshold": None},
        {"word_timestamps": True, "hallucination_silence_threshold": 0.5, "condition_on_previous_text": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_over_several_windows(engine: Engine, reference: Any, long_clip: Clip, options: dict[str, Any]) -> None:
    expected = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    assert_same(ours(engine, long_clip, **options), theirs(reference, long_clip, **expected))


def test_translate(engine: Engine, reference: Any, clips: list[Clip]) -> None:
    german = clips[1]
    options = {"task": "translate", "condition_on_previous_text": False}
    assert_same(ours(engine, german, **options), theirs(reference, german, **options))


@pytest.mark.parametrize("samples", [0, 1, 159, 160, 4000], ids=lambda n: f"{n}-samples")
def test_hardly_any_audio(engine: Engine, reference: Any, samples: int) -> None:
    noise = np.random.default_rng(1).integers(-30, 30, samples, dtype=np.int16)
    clip = Clip("en", noise, ())
    result = ours(engine, clip, language="en")
    if samples == 0:  # the reference cannot read nothing at all
        assert result.segments == ()
    else:
        assert_same(result, theirs(reference, clip, language="en"))
