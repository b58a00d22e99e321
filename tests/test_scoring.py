"""Word and character errors: what is normalised away, what counts, and that counts add up."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipeline.scoring import Score, char_score, normalise, word_score


@pytest.mark.parametrize(
    ("reference", "hypothesis", "language", "errors", "words"),
    [
        ("The cat sat.", "the cat sat", "en", 0, 3),
        ("It's twenty-one cats", "it is 21 cats", "en", 0, 4),
        ("Über die Straße!", "über die straße", "de", 0, 3),
        ("uno dos tres", "uno tres", "es", 1, 3),
        ("a b c", "a x c d", None, 2, 3),
        ("", "", "en", 0, 0),
        ("", "hello there", "en", 2, 0),
        ("hello there", "", "en", 2, 2),
        ("...", "hello", "de", 1, 0),  # nothing left of the reference
    ],
)
def test_word_errors(reference: str, hypothesis: str, language: str | None, errors: int, words: int) -> None:
    score = word_score(reference, hypothesis, language)
    assert (score.errors, score.n_reference) == (errors, words)


def test_character_errors() -> None:
    assert char_score("abc def", "abd def", "de") == Score(7, substitutions=1)
    assert char_score("", "ab", "de") == Score(0, insertions=2)


def test_a_corpus_is_not_the_mean_of_its_recordings() -> None:
    total = word_score("a", "x") + word_score("a b c d e f g h i", "a b c d e f g h i")
    assert total.rate == 0.1
    assert Score().rate == 0.0
    assert word_score("", "two words").rate == 2.0  # not infinite, and not zero


def test_punctuation_and_case_go() -> None:
    assert normalise("Hello,   World!", "de") == "hello world"


def test_it_needs_no_torch() -> None:
    script = (
        "import sys; from pipeline.scoring import word_score; word_score('a', 'b', 'en'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
