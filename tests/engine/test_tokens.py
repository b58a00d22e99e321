"""The vocabulary against the reference's tokenizer."""

from __future__ import annotations

import random

import pytest
from whisper.tokenizer import get_tokenizer

from pipeline.demo import model_path
from pipeline.engine.tokens import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(model_path(), 51865)


@pytest.fixture(scope="module")
def whisper():  # type: ignore[no-untyped-def]
    return get_tokenizer(True, num_languages=99, language="en", task="transcribe")


def test_special_ids(tokenizer: Tokenizer, whisper) -> None:  # type: ignore[no-untyped-def]
    assert tokenizer.eot == whisper.eot
    assert tokenizer.timestamp_begin == whisper.timestamp_begin
    assert tokenizer.no_speech == whisper.no_speech
    assert tokenizer.languages == {code: whisper.to_language_token(code) for code in whisper.all_language_codes}
    assert tokenizer.sot_sequence("en", "transcribe") == list(whisper.sot_sequence)
    assert tokenizer.non_speech_tokens == whisper.non_speech_tokens


@pytest.mark.parametrize(
    "text", ["Hello world, don't", "Grüße aus München! ¿Qué?", "日本語のテスト", "emoji 😀 x", " a  b"]
)
def test_text_round_trip(tokenizer: Tokenizer, whisper, text: str) -> None:  # type: ignore[no-untyped-def]
    assert tokenizer.encode(text) == whisper.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_in_a_prompt_are_plain_text(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("<|endoftext|><|0.00|> hi")
    assert max(tokens) < tokenizer.eot


@pytest.mark.parametrize("language", ["en", "ja"])
def test_words_of_random_tokens(tokenizer: Tokenizer, whisper, language: str) -> None:  # type: ignore[no-untyped-def]
    """Random tokens break UTF-8 everywhere; the split must break where the reference's does."""
    draw = random.Random(1)
    for _ in range(200):
        tokens = [draw.randrange(50257) for _ in range(20)] + [tokenizer.eot]
        assert tokenizer.decode(tokens[:-1]) == whisper.decode(tokens[:-1])
        split = whisper.split_tokens_on_unicode if language == "ja" else whisper.split_tokens_on_spaces
        assert tokenizer.split_words(tokens, language) == tuple(split(tokens))
