"""Random weights of every kind of Whisper: `sequential` in float32 against openai-whisper's `transcribe()`.

Nothing is likely under them, so every rule and every figure decides something. Temperature 0, thresholds off.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.demo.train.convert import to_openai
from pipeline.engine import Engine, EngineConfig, load_engine
from pipeline.engine.random_checkpoint import CANTONESE, ENGLISH, Shape, write_random_checkpoint
from pipeline.types import DecodeOptions
from tests.engine import hard_audio
from tests.engine.parity import assert_equal, side_by_side

# What is written, and how. The files' form must not matter to either.
CHECKPOINTS: dict[str, tuple[Shape, dict[str, Any]]] = {
    "80-mels": (Shape(64, 1, 2, 2), {}),
    "turbo-of-large-v3": (Shape(128, 2, 3, 1, 128, CANTONESE), {"dtype": "float16", "shards": 2}),
    "english-only": (Shape(64, 1, 2, 2, n_vocab=ENGLISH), {"alignment_heads": ()}),
}

UNCHECKED = DecodeOptions(
    algorithm="sequential",
    temperature_fallback=False,
    compression_ratio_threshold=None,
    logprob_threshold=None,
    no_speech_threshold=None,
    max_tokens=100,
)


@pytest.fixture(scope="module", params=CHECKPOINTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Any]]:
    """An engine and the reference's model on one checkpoint."""
    shape, files = CHECKPOINTS[request.param]
    folder = write_random_checkpoint(tmp_path_factory.mktemp("random"), shape, seed=3, mean_tokens=80, **files)
    with load_engine(EngineConfig(str(folder), device="cpu", dtype="float32", lanes=8)) as engine:
        yield engine, to_openai(folder)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"word_timestamps": True, "initial_prompt": "One more time"},
        {"suppress_tokens": (), "max_tokens": 30},  # the reference then bans not even its own control tokens
        {"beam_size": 5, "max_tokens": 25},
    ],
    ids=lambda more: next(iter(more), "plain"),
)
def test_random_weights(pair: tuple[Engine, Any], more: dict[str, Any]) -> None:
    engine, model = pair
    pcms = [hard_audio.make("clean", "en", 32), hard_audio.make("paused", "es", 34)]
    pairs = side_by_side(engine, model, pcms, replace(UNCHECKED, **more))
    assert_equal(pairs)
    assert sum(len(attempt.chosen.tokens) for _, its in pairs for attempt in its.attempts) > 15  # not just an end


def test_the_text_context_is_filled_to_its_end(tmp_path: Path) -> None:
    """224 tokens a window, but behind the longest prompt the context ends two tokens before."""
    folder = write_random_checkpoint(tmp_path, Shape(64, 1, 1, 1), mean_tokens=None)
    options = replace(UNCHECKED, max_tokens=None, language="en", initial_prompt=" ".join(["a"] * 223))
    with load_engine(EngineConfig(str(folder), device="cpu", dtype="float32", lanes=2)) as engine:
        pairs = side_by_side(engine, to_openai(folder), [hard_audio.make("longish", "en", 1)], options)
    assert_equal(pairs)
    first = pairs[0][1].attempts[0]
    assert (len(first.prompt), len(first.chosen.tokens)) == (1 + 223 + 3, 448 + 1 - 227)
