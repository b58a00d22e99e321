"""How far a transcript is from its reference: Whisper's own normalisation, then jiwer's alignment.

Counts add up, so a corpus figure is total errors over total reference words, never the mean of rates. English text is
normalised with an empty spelling map (the map travels with some checkpoints, not with the library): `colour` and
`color` differ. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, cast


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


@dataclass(frozen=True, slots=True)
class Edit:
    """One stretch of an alignment: words of the reference and the words that stand for them in the text."""

    kind: Literal["equal", "substitute", "insert", "delete"]
    reference: tuple[str, ...]
    text: tuple[str, ...]


def word_score(reference: str, hypothesis: str, language: str | None = None) -> Score:
    """Word errors after normalisation for `language` (None: no language's own rules)."""
    return words_apart(normalise(reference, language), normalise(hypothesis, language))[0]


def char_score(reference: str, hypothesis: str, language: str | None = None) -> Score:
    """Character errors after normalisation, spaces counted."""
    return chars_apart(normalise(reference, language), normalise(hypothesis, language))


def words_apart(reference: str, text: str) -> tuple[Score, list[Edit]]:
    """Word errors and the alignment they come from, of two texts that are normalised already."""
    import jiwer

    said, heard = tuple(reference.split()), tuple(text.split())
    if said == heard:  # most are, and need no alignment
        return Score(len(said)), [Edit("equal", said, heard)] if said else []
    if not (said and heard):  # jiwer's alignment wants words on both sides
        return _one_sided(len(said), len(heard)), [Edit("delete" if said else "insert", said, heard)]
    found = jiwer.process_words(reference, text)
    edits = [
        Edit(
            cast(Literal["equal", "substitute", "insert", "delete"], chunk.type),
            said[chunk.ref_start_idx : chunk.ref_end_idx],
            heard[chunk.hyp_start_idx : chunk.hyp_end_idx],
        )
        for chunk in found.alignments[0]
    ]
    return Score(len(said), found.substitutions, found.insertions, found.deletions), edits


def chars_apart(reference: str, text: str) -> Score:
    """Character errors of two texts that are normalised already."""
    import jiwer

    if reference == text:
        return Score(len(reference))
    if not (reference and text):
        return _one_sided(len(reference), len(text))
    found = jiwer.process_characters(reference, text)
    return Score(len(reference), found.substitutions, found.insertions, found.deletions)


def pairs_in_order(reference: Sequence[str], text: Sequence[str]) -> list[tuple[int, int]]:
    """Which word of `reference` is which of `text`: indices of those that are the same but for case and marks, in
    order. Each item is one word, whatever it holds."""
    said = [(i, word) for i, word in enumerate(map(_bare, reference)) if word]
    heard = [(i, word) for i, word in enumerate(map(_bare, text)) if word]
    edits = words_apart(" ".join(word for _, word in said), " ".join(word for _, word in heard))[1]
    pairs, at, to = [], 0, 0
    for edit in edits:
        if edit.kind == "equal":
            pairs += [(said[at + k][0], heard[to + k][0]) for k in range(len(edit.reference))]
        at, to = at + len(edit.reference), to + len(edit.text)
    return pairs


def normalise(text: str, language: str | None = None) -> str:
    """`text` in lower case without punctuation; in English also with numbers and contractions in one form."""
    return " ".join(_normaliser(language == "en")(text).split())


def _bare(word: str) -> str:
    return normalise(word).replace(" ", "")


def _one_sided(n_reference: int, n_hypothesis: int) -> Score:
    return Score(n_reference, insertions=n_hypothesis, deletions=n_reference)


@lru_cache(maxsize=2)
def _normaliser(english: bool) -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    normaliser: Callable[[str], str] = EnglishTextNormalizer({}) if english else BasicTextNormalizer()
    return normaliser
