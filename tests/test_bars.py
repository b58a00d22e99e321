"""The small forms of `tests/benchmarks/two_algorithms.py` and `tests/benchmarks/adversarial.py`, and their counting."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from commits import segment

from pipeline.demo.train.heldout import Clip, Sentence
from pipeline.types import Recording, Transcript
from tests.benchmarks import two_algorithms
from tests.benchmarks.adversarial import CASES, EDGE_S, count, flagged
from tests.benchmarks.half_precision import transcribe
from tests.benchmarks.heldout_accuracy import demo_config

SAID = ("the cat sees the dog", "it is cold in the garden today", "anna reads a book at home")


def clip(*ends: float) -> Clip:
    """Sentences of 2 s, the first three of SAID, that end there; 60 s."""
    sentences = tuple(Sentence(text, text, end - 2, end, (), "m5") for text, end in zip(SAID, ends, strict=False))
    return Clip("en", np.zeros(60 * 16_000, np.int16), sentences)


@pytest.mark.parametrize(
    ("texts", "times", "lost", "invented"),
    [
        (SAID, [(8, 10), (38, 40), (48, 50)], 0, 0),
        ((SAID[0], "it is gold in the harden to pay", SAID[2]), [(8, 10), (38, 40), (48, 50)], 0, 0),  # misheard
        (SAID[::2], [(8, 10), (48, 50)], 1, 0),
        ((), [], 3, 0),
        ((SAID[0], *SAID), [(8, 10), (20, 22), (38, 40), (48, 50)], 0, 1),  # twice, the second time in a silence
        ((SAID[0], *SAID), [(8, 9), (9, 10), (38, 40), (48, 50)], 0, 1),  # twice in its own time
        ((SAID[0], "yes", *SAID[1:]), [(8, 10), (20, 21), (38, 40), (48, 50)], 0, 1),  # a word where nobody speaks
        ((SAID[0], SAID[1], SAID[2]), [(8, 10), (20, 22), (48, 50)], 1, 1),  # where nobody said it
    ],
)
def test_what_counts_as_lost_and_as_invented(
    texts: tuple[str, ...], times: list[tuple[float, float]], lost: int, invented: int
) -> None:
    found = count(clip(10, 40, 50), (" ".join(texts), times))
    assert found == {"sentences": 3, "lost": lost, "invented": invented}


def test_where_nobody_speaks_every_segment_is_invented() -> None:
    assert count(clip(), ("thank you", [(3, 4)])) == {"sentences": 0, "lost": 0, "invented": 1}


def test_a_sentence_that_the_file_cuts_off_does_not_count() -> None:
    assert count(clip(10, 61), (SAID[0], [(8, 10)])) == {"sentences": 1, "lost": 0, "invented": 0}
    assert count(clip(10, 61), (f"{SAID[0]} {SAID[1]}", [(8, 10), (59, 60)]))["invented"] == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_sentence_is_being_said_at_the_edge(seed: int) -> None:
    for case in ("silence, then a sentence cut at 29.9 s", "the file ends at 29.9 s in a sentence"):
        made = CASES[case]("de", seed)
        assert any(one.start < EDGE_S < one.end for one in made.sentences)
        assert all(a.end <= b.start for a, b in pairwise(made.sentences))
    packed = CASES["sentences throughout, two cut at 29.9 s"]("es", seed)
    for edge in (EDGE_S, 2 * EDGE_S):
        assert any(one.start < edge < one.end for one in packed.sentences)


def test_no_window_holds_more_than_three_sentences() -> None:
    made = two_algorithms.corpus(1.5, seed=5)
    assert {one.language for name, one in made.items() if name.endswith("long")} == {"en", "de", "es"}
    for one in made.values():
        apart = [b.end - a.start for a, b in zip(one.sentences, one.sentences[two_algorithms.MOST :], strict=False)]
        assert min(apart, default=math.inf) >= two_algorithms.WINDOW_S - 1e-3


def test_both_algorithms_say_the_same_of_short_recordings() -> None:
    made = {name: one for name, one in two_algorithms.corpus(2.4, seed=7).items() if not name.endswith("long")}
    found = two_algorithms.compare(made, two_algorithms.WINDOW_S)
    assert len(made) == 11  # with seed 6 one of 13 is taken for another language: 99.7 % are right of an hour
    assert abs(found["sequential_minus_windows"]["points"]) <= 2
    low, high = found["windows"]["interval"]
    assert low <= found["windows"]["wer_percent"] <= min(high, 10)
    assert found["windows"]["language_right"] == found["sequential"]["language_right"] == 1


# What each of them showed: recordings as they are; the first beat of music, and noise that breaks off, at the end of a
# span, where the demo model says a sentence; silent windows of 10 s that grew, and went with the sentence behind them.
HARD = {
    "windows": (
        ("digital silence of 5 to 60 s", "en"),
        ("white noise of 4 to 20 s", "en"),
        ("music of 4 to 20 s, chords", "de"),
        ("music of 4 to 20 s, band", "es"),
        ("silence, then a sentence cut at 29.9 s", "de"),
        ("nobody, music", "en"),
    ),
    "sequential": (
        ("digital silence of 5 to 60 s", "de"),
        ("the file ends at 29.9 s in a sentence", "es"),
        ("nobody, white noise", "en"),
    ),
}


@pytest.mark.parametrize("algorithm", HARD)
def test_nothing_is_lost_or_invented(algorithm: str) -> None:
    """In windows of 10 s. Not here: what the demo model itself hears, see `results/adversarial.json`."""
    made = {case: CASES[case](language, 1) for case, language in HARD[algorithm]}
    found = transcribe(made, demo_config(algorithm=algorithm), "cpu", "float32")
    for case, one in found.items():
        counted = count(made[case], (one.text, [(s.start, s.end) for s in one.segments if s.text]))
        assert (counted["lost"], counted["invented"]) == (0, 0), (case, one.text)


def test_a_segment_in_nobody_s_time_counts_as_flagged_where_it_is() -> None:
    said = [segment(" the cat", 8.0), segment(" thank you", 20.0, flags=("invented_on_silence",)), segment(" so", 25.0)]
    assert flagged(clip(10), Transcript(Recording("a", "a"), "ok", tuple(said))) == 1
