"""How far a transcript is from its reference: Whisper's own normalisation, then jiwer's alignment.

Counts add up, so a corpus figure is total errors over total reference words, never the mean of rates. English text is
normalised with an empty spelling map (the map travels with some checkpoints, not with the library): `colour` and
`color` differ. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class Score:
    """Errors of one or many transcripts, in words or in characters."""

    n_reference: int = 0
    substitutions: int = 0
    insertions: int = 0
    deletions: int = 0

    @property
    def errors(self) -> int:
        return self.substitutions + self.insertions + self.deletions

    @property
    def rate(self) -> float:
        """WER or CER; may exceed 1. Words where the reference has none count as if it had one."""
        return self.errors / max(1, self.n_reference)

    def __add__(self, other: Score) -> Score:
        return Score(
            self.n_reference + other.n_reference,
            self.substitutions + other.substitutions,
            self.insertions + other.insertions,
            self.deletions + other.deletions,
        )


def word_score(reference: str, hypothesis: str, language: str | None = None) -> Score:
    """Word errors after normalisation for `language` (None: no language's own rules)."""
    import jiwer

    sides = normalise(reference, language), normalise(hypothesis, language)
    if not all(sides):  # jiwer's alignment wants words on both sides
        return _one_sided(*(len(side.split()) for side in sides))
    found = jiwer.process_words(*sides)
    return Score(len(sides[0].split()), found.substitutions, found.insertions, found.deletions)


def char_score(reference: str, hypothesis: str, language: str | None = None) -> Score:
    """Character errors after normalisation, spaces counted."""
    import jiwer

    sides = normalise(reference, language), normalise(hypothesis, language)
    if not all(sides):
        return _one_sided(*(len(side) for side in sides))
    found = jiwer.process_characters(*sides)
    return Score(len(sides[0]), found.substitutions, found.insertions, found.deletions)


def normalise(text: str, language: str | None = None) -> str:
    """`text` in lower case without punctuation; in English also with numbers and contractions in one form."""
    return " ".join(_normaliser(language == "en")(text).split())


def _one_sided(n_reference: int, n_hypothesis: int) -> Score:
    return Score(n_reference, insertions=n_hypothesis, deletions=n_reference)


@lru_cache(maxsize=2)
def _normaliser(english: bool) -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    normaliser: Callable[[str], str] = EnglishTextNormalizer({}) if english else BasicTextNormalizer()
    return normaliser
