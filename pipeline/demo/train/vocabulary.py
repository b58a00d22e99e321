"""Token ids, and the reduced vocabulary that training uses in place of Whisper's 51,865 rows.

A row is kept for every token that the demo sentences or Whisper's protocol need; one dummy row, the last, stands for
all others. `export` spreads it over the full table again. Knows nothing about audio or tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.demo.train.lexicon import Language
from pipeline.demo.train.sentences import draw

if TYPE_CHECKING:
    from tiktoken import Encoding

N_VOCAB = 51_865
END, START = 50_257, 50_258
TRANSLATE, TRANSCRIBE = 50_358, 50_359
PREVIOUS, NO_SPEECH, NO_TIMESTAMPS = 50_361, 50_362, 50_363
FIRST_TIMESTAMP = 50_364
LANGUAGE_TOKENS: dict[Language, int] = {"en": 50_259, "de": 50_261, "es": 50_262}

_DRAWS = 40_000  # enough that no new token turns up in twice as many


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The kept token ids in rising order, and the row of every token id; the dummy row for those not kept."""

    ids: NDArray[np.int64]
    row_of: NDArray[np.int64]

    @property
    def n_rows(self) -> int:
        return len(self.ids) + 1

    @property
    def dummy_row(self) -> int:
        return len(self.ids)

    @property
    def n_unused(self) -> int:
        return N_VOCAB - len(self.ids)

    @property
    def text_ids(self) -> list[int]:
        return [int(token) for token in self.ids if token < END]


def make_vocabulary(text_ids: Iterable[int]) -> Vocabulary:
    """The vocabulary of these text tokens and of all the protocol's that the demo languages use."""
    protocol = [END, START, *LANGUAGE_TOKENS.values(), TRANSLATE, TRANSCRIBE, PREVIOUS, NO_SPEECH, NO_TIMESTAMPS]
    kept = {*text_ids, *protocol, *range(FIRST_TIMESTAMP, N_VOCAB)}
    ids = np.array(sorted(kept), np.int64)
    row_of = np.full(N_VOCAB, len(ids), np.int64)
    row_of[ids] = np.arange(len(ids))
    return Vocabulary(ids, row_of)


@cache
def demo_vocabulary() -> Vocabulary:
    """The vocabulary of the demo sentences."""
    random = Random(1)
    words = {word for _ in range(_DRAWS) for text in draw(random) for word in text.split()}
    return make_vocabulary(token for word in words for token in encode_word(word))


@cache
def encode_word(word: str) -> tuple[int, ...]:
    """The tokens of a word within a sentence, its leading space included."""
    return tuple(_encoding().encode(" " + word))


@cache
def token_bytes(token: int) -> int:
    """The length of a text token in bytes."""
    return len(_encoding().decode_single_token_bytes(token))


def whisper_tokenizer() -> Any:
    """openai-whisper's multilingual tokenizer, with its 99 languages."""
    from whisper.tokenizer import get_tokenizer

    return get_tokenizer(multilingual=True, num_languages=99, language="en", task="transcribe")


@cache
def _encoding() -> Encoding:
    encoding: Encoding = whisper_tokenizer().encoding
    return encoding
