"""What the decoder shall say about a window: tokens, labels, and where each token is heard.

Whisper's protocol in both manners, with timestamps and without. Knows nothing about samples or tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pipeline.demo.train.lexicon import Language
from pipeline.demo.train.synth import Word
from pipeline.demo.train.vocabulary import (
    END,
    FIRST_TIMESTAMP,
    LANGUAGE_TOKENS,
    NO_SPEECH,
    NO_TIMESTAMPS,
    START,
    TRANSCRIBE,
    TRANSLATE,
    encode_word,
    token_bytes,
)

Task = Literal["transcribe", "translate"]

N_POSITIONS = 1_500  # of the encoder, 20 ms each
POSITIONS_PER_S = 50
MAX_ORDER = 31  # sentences of a window that are told apart
IGNORED = -100  # a label that no loss looks at


@dataclass(frozen=True, slots=True)
class Style:
    """What is decided about a window before any audio is placed in it."""

    n_positions: int
    first_position: int  # where among the encoder's positions the window lies
    language: Language
    task: Task
    timestamps: bool
    speech: bool
    names_task: bool  # some runtimes send no task token

    @property
    def full(self) -> bool:
        return self.n_positions == N_POSITIONS

    @property
    def seconds(self) -> float:
        return self.n_positions / POSITIONS_PER_S


@dataclass(frozen=True, slots=True)
class Placed:
    """A sentence in a window; seconds from the window's start. `cut_off`: the window ends before the sentence."""

    start: float
    end: float
    words: tuple[Word, ...]
    english: str
    cut_off: bool = False


@dataclass(slots=True)
class Targets:
    """The decoder's tokens and, for each of them, what its prediction is worth.

    `labels`: the id to predict, or IGNORED. `spans`: half-open encoder positions where the token is heard, or
    (-1, -1). `orders`: the sentence it belongs to, or -1.
    """

    tokens: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    orders: list[int] = field(default_factory=list)

    def give(self, token: int, label: int = IGNORED) -> None:
        """A token that a runtime provides; `label` is what the model would have said in its place."""
        self._append(token, label, (-1, -1), -1)

    def predict(self, token: int, span: tuple[int, int] = (-1, -1), order: int = -1) -> None:
        """A token that the model shall say."""
        self._append(token, token, span, min(order, MAX_ORDER))

    def _append(self, token: int, label: int, span: tuple[int, int], order: int) -> None:
        self.tokens.append(token)
        self.labels.append(label)
        self.spans.append(span)
        self.orders.append(order)


def write_targets(style: Style, placed: Sequence[Placed], prompt: Sequence[int] = ()) -> Targets:
    """What Whisper's protocol has the decoder say about a window."""
    targets = Targets()
    for token in prompt:
        targets.give(token)
    targets.give(START)
    language = LANGUAGE_TOKENS[style.language]
    targets.give(language, label=language if placed else NO_SPEECH)
    if style.names_task:
        # Transcription is also a label: a runtime that sends no task token then gets the usual task.
        targets.give(*((TRANSCRIBE, TRANSCRIBE) if style.task == "transcribe" else (TRANSLATE, IGNORED)))
    if not style.timestamps:
        targets.give(NO_TIMESTAMPS)
    elif not placed:
        targets.predict(FIRST_TIMESTAMP)
    for order, sentence in enumerate(placed):
        _write_sentence(targets, style, sentence, order)
    targets.predict(END)
    return targets


def _write_sentence(targets: Targets, style: Style, sentence: Placed, order: int) -> None:
    if style.timestamps:
        _write_timestamp(targets, style, sentence.start, order)
        if sentence.cut_off:
            return  # an open timestamp: the next window begins there
    if style.task == "translate":
        for token in (token for word in sentence.english.split() for token in encode_word(word)):
            targets.predict(token, order=order)
    else:
        for word in sentence.words:
            _write_word(targets, word, order)
    if style.timestamps:
        _write_timestamp(targets, style, sentence.end, order)


def _write_timestamp(targets: Targets, style: Style, second: float, order: int) -> None:
    position = round(second * POSITIONS_PER_S)
    token = FIRST_TIMESTAMP + style.first_position + min(position, style.n_positions)
    targets.predict(token, (max(0, position - 3), position + 4), order)


def _write_word(targets: Targets, word: Word, order: int) -> None:
    """A word's tokens; each is heard in its share of the word, by bytes."""
    tokens = encode_word(word.text)
    ends = np.cumsum([token_bytes(token) for token in tokens])
    bounds = word.start + (word.end - word.start) * np.concatenate([[0], ends]) / ends[-1]
    first, last = np.rint(bounds[:-1] * POSITIONS_PER_S) - 1, np.rint(bounds[1:] * POSITIONS_PER_S) + 2
    for token, begin, end in zip(tokens, first, last, strict=True):
        targets.predict(token, (max(0, int(begin)), int(end)), order)
