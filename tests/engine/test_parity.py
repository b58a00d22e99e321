"""`sequential` in float32 against openai-whisper's own `transcribe()`: same weights, same samples.

The demo model under every option; `test_shapes.py` has random weights, `tests/benchmarks/parity.py` the long form.
Nothing here may be excused as a near-tie: what is excused there is counted, here none is needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipeline.demo.train.lexicon import Language
from pipeline.engine import Engine, EngineConfig, load_engine
from pipeline.types import DecodeOptions
from tests.engine import hard_audio, parity
from tests.engine.parity import (
    Attempt,
    Draw,
    Ours,
    Verdict,
    assert_equal,
    compare,
    compare_attempts,
    events,
    profile,
    side_by_side,
    transcribe_ours,
)

# Per profile: kind, language and seed of its recordings, and what the reference must have come across in them.
CASES: dict[str, tuple[list[tuple[str, Language, int]], set[str]]] = {
    "defaults": ([("longish", "es", 4)], {"windows"}),
    "words": ([("noisy", "de", 5), ("truncated", "es", 7)], {"words"}),
    "prompt": ([("longish", "en", 8)], {"windows"}),
    "carried prompt": ([("longish", "de", 9)], {"windows"}),
    # Its mean log-probability lies 3e-6 above the threshold, as the reference sums it in float32; 4e-6 below if not.
    "endless prompt, carried": ([("tonal", "es", 1032)], {"windows"}),
    "prompt of 223 tokens, carried": ([("longish", "en", 41)], {"windows"}),
    "no history": ([("longish", "es", 10)], {"windows", "words"}),
    "clips": ([("longish", "en", 11)], {"windows", "words"}),
    "no thresholds": ([("tonal", "en", 12)], set()),
    "ladder": ([("noisy", "en", 1)], {"fallbacks"}),
    "ladder, best of 3": ([("phone", "en", 1)], {"fallbacks"}),
    "ladder, silence": ([("silent", "en", 17), ("phone", "en", 1)], {"fallbacks", "skipped"}),
    "temperature 0.4": ([("truncated", "de", 15)], {"hot"}),
    "temperature 0.8, best of 4": ([("clean", "es", 16)], {"hot"}),
    "skipped silence": ([("silent", "en", 17)], {"skipped"}),
    "anomalies after 0.5 s": ([("babble", "en", 206)], {"words", "windows"}),
    "anomalies after 2 s": ([("paused", "en", 201)], {"words", "windows"}),
    "more suppressed": ([("phone", "de", 22)], set()),
    "listed suppressed": ([("noisy", "en", 23)], set()),
    "none suppressed": ([("clean", "es", 24)], set()),
    "translate": ([("mixed", "de", 25)], {"words"}),
    "short texts": ([("clean", "en", 26)], {"windows"}),
    "beam 5": ([("clean", "de", 27)], set()),
    "beam 5, words": ([("mixed", "es", 28)], {"words"}),
    "beam 5, patience 2": ([("noisy", "en", 29)], set()),
    "beam 3, ladder": ([("phone", "en", 1)], {"fallbacks"}),
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """The demo model in float32, with lanes for a beam of five beside others."""
    with load_engine(EngineConfig("demo", device="cpu", dtype="float32", lanes=8)) as engine:
        yield engine


# -- the demo model, every option --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_demo_model(engine: Engine, reference: Any, name: str) -> None:
    recordings, expected = CASES[name]
    pcms = [hard_audio.make(*recording) for recording in recordings]
    pairs = side_by_side(engine, reference, pcms, profile(name))
    assert_equal(pairs)
    seen = sum((events(its) for _, its in pairs), Counter[str]())
    assert expected <= seen.keys()


def test_every_profile_has_its_case() -> None:
    assert CASES.keys() == parity.PROFILES.keys()
    assert sum(len(recordings) for recordings, _ in CASES.values()) >= 20


@pytest.mark.parametrize("language", ["de", "zh"])
def test_a_language_that_is_not_spoken(engine: Engine, reference: Any, language: str) -> None:
    """Chinese words are split at code points."""
    options = DecodeOptions(algorithm="sequential", language=language, word_timestamps=True, max_tokens=40)
    assert_equal(side_by_side(engine, reference, [hard_audio.make("clean", "en", 31)], options))


@pytest.mark.parametrize("samples", [0, 1, 159, 160, 4000], ids=lambda n: f"{n}-samples")
def test_hardly_any_audio(engine: Engine, reference: Any, samples: int) -> None:
    pcm = np.random.default_rng(1).integers(-30, 30, samples, dtype=np.int16)
    options = DecodeOptions(algorithm="sequential", language="en", word_timestamps=True)
    if samples == 0:  # the reference cannot read nothing at all
        (mine,) = transcribe_ours(engine, [pcm], options)
        assert mine.result.segments == ()
    else:
        assert_equal(side_by_side(engine, reference, [pcm], options))


# -- what is excused ---------------------------------------------------------------------------------------------------


def attempt(*candidates: tuple[int, ...], gaps: tuple[float, ...] = (), **more: Any) -> Attempt:
    draws = tuple(Draw(tokens, gaps) for tokens in candidates)
    plain = {"seek": 0, "temperature": 0.0, "prompt": (1,), "avg_logprob": -0.5, "no_speech_prob": 0.1}
    return Attempt(**{"chosen": draws[0], "candidates": draws, **plain, **more})


GAPS = (2.0, 0.0004, 2.0, 0.5)


@pytest.mark.parametrize(
    ("mine", "its", "kind"),
    [
        (attempt((5, 6, 7)), attempt((5, 6, 7), gaps=GAPS), "equal"),
        (attempt((5, 9, 9)), attempt((5, 6, 7), gaps=GAPS), "near-tie"),
        (attempt((5,)), attempt((5, 6, 7), gaps=GAPS), "near-tie"),  # the end token against another
        (attempt((9, 6, 7)), attempt((5, 6, 7), gaps=GAPS), "different"),
        (attempt((5, 6, 8)), attempt((5, 6, 7), gaps=GAPS), "different"),  # what follows a near-tie is not one
        (attempt((5, 6, 7, 8)), attempt((5, 6, 7), gaps=GAPS), "different"),
        (attempt((5, 6), (5, 8)), attempt((5, 8), (5, 6), gaps=GAPS), "different"),  # the ranking differs
        (attempt((5, 9), (7, 8)), attempt((5, 6), (7, 8), gaps=GAPS), "near-tie"),
        (attempt((5, 9), (7, 9)), attempt((5, 6), (3, 8), gaps=GAPS), "different"),  # one of two for no reason
        (attempt((5, 6), seek=10), attempt((5, 6), gaps=GAPS), "different"),
        (attempt((5, 6), prompt=(2,)), attempt((5, 6), gaps=GAPS), "different"),
        (attempt((5, 6), avg_logprob=-0.5003), attempt((5, 6), gaps=GAPS), "different"),
        (attempt((5, 6), no_speech_prob=float("nan")), attempt((5, 6), gaps=GAPS), "different"),
        (None, attempt((5, 6), gaps=GAPS), "different"),
    ],
)
def test_only_a_near_tie_of_the_reference_excuses(mine: Attempt | None, its: Attempt | None, kind: str) -> None:
    assert compare_attempts(mine, its).kind == kind


def test_the_gap_is_measured_in_the_reference(engine: Engine, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token of ours replaced where the reference's decode of real speech was least sure."""
    options = DecodeOptions(algorithm="sequential", language="en", temperature_fallback=False)
    ((mine, its),) = side_by_side(engine, reference, [hard_audio.make("clean", "en", 35)], options)
    first = its.attempts[0].chosen
    assert len(first.gaps) == len(first.tokens) + 1  # the end token's too
    step = min(range(len(first.tokens)), key=lambda i: first.gaps[i])
    spoilt = Draw((*first.tokens[:step], 1000, *first.tokens[step + 1 :]))
    mine.attempts[0] = replace(mine.attempts[0], chosen=spoilt, candidates=(spoilt,))
    verdict = compare(mine, its)
    assert (verdict.kind, verdict.gap) == ("different", first.gaps[step])
    monkeypatch.setattr(parity, "NEAR_TIE", first.gaps[step] * 1.01)
    assert compare(mine, its).kind == "near-tie"


def test_other_figures_are_differences(engine: Engine, reference: Any) -> None:
    options = profile("words", temperature_fallback=False)
    ((mine, its),) = side_by_side(engine, reference, [hard_audio.make("clean", "en", 36)], options)
    segment = mine.result.segments[0]
    word = segment.words[1]
    spoilt = [
        replace(segment, compression_ratio=segment.compression_ratio + 0.001),
        replace(segment, end=segment.end + 0.03),
        replace(segment, words=(segment.words[0], replace(word, end=word.end + 0.03), *segment.words[2:])),
        replace(segment, words=segment.words[1:]),
    ]
    for wrong in spoilt:
        result = replace(mine.result, segments=(wrong, *mine.result.segments[1:]))
        assert compare(Ours(result, mine.attempts), its).kind == "different"
    other = replace(mine.result, language_probability=0.5)
    assert compare(Ours(other, mine.attempts), its) == Verdict("different", compare(Ours(other, []), its).detail)
