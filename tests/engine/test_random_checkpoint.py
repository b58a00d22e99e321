"""Random checkpoints have the published models' tensors and vocabularies, load everywhere, and decode like speech."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from whisper.tokenizer import get_tokenizer

from pipeline.demo.train.convert import to_ctranslate2
from pipeline.demo.train.heldout import make_clip
from pipeline.engine import EngineConfig, load_engine
from pipeline.engine.checkpoint import model_fingerprint
from pipeline.engine.random_checkpoint import CANTONESE, ENGLISH, SIZES, Shape, tensor_shapes, write_random_checkpoint
from pipeline.engine.tokens import Tokenizer
from pipeline.errors import ModelError
from pipeline.types import DecodeOptions

SMALL = Shape(64, 1, 2, 2)
LARGE_V3_LIKE = Shape(64, 1, 2, 1, 128, CANTONESE)
ENGLISH_ONLY = Shape(64, 1, 2, 2, n_vocab=ENGLISH)

# Millions of parameters as the model cards of openai and distil-whisper give them.
PUBLISHED = {
    "tiny": 39, "base": 74, "small": 244, "medium": 769, "large-v2": 1550, "large-v3": 1550, "large-v3-turbo": 809,
    "distil-large-v2": 756, "distil-large-v3": 756, "distil-small.en": 166, "distil-medium.en": 394,
    "tiny.en": 39, "base.en": 74, "small.en": 244, "medium.en": 769,
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("small"), SMALL)


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("size", SIZES)
def test_named_sizes_have_the_published_number_of_parameters(size: str) -> None:
    count = sum(int(np.prod(shape)) for _, shape in tensor_shapes(SIZES[size]))
    assert count / 1e6 == pytest.approx(PUBLISHED[size], rel=0.05)  # the cards round, and some count tied weights
    assert SIZES[size].width == 64 * SIZES[size].heads
    assert (SIZES[size].n_vocab == ENGLISH) == size.endswith(".en")


@pytest.mark.parametrize("shape", [SMALL, LARGE_V3_LIKE, SIZES["distil-small.en"]], ids=["small", "v3", "distil"])
def test_tensors_are_those_of_hugging_face_s_model(shape: Shape) -> None:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=shape.width, vocab_size=shape.n_vocab, num_mel_bins=shape.n_mels,
        encoder_layers=shape.encoder_layers, decoder_layers=shape.decoder_layers,
        encoder_attention_heads=shape.heads, decoder_attention_heads=shape.heads,
        encoder_ffn_dim=4 * shape.width, decoder_ffn_dim=4 * shape.width,
    )  # fmt: skip
    with torch.device("meta"):
        state = WhisperForConditionalGeneration(config).state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in state.items() if name != "proj_out.weight"}
    assert {f"model.{name}": tensor_shape for name, tensor_shape in tensor_shapes(shape)} == expected


def test_the_same_arguments_give_the_same_bytes(small: Path, tmp_path: Path) -> None:
    assert digest(write_random_checkpoint(tmp_path / "again", SMALL)) == digest(small)
    other = write_random_checkpoint(tmp_path / "other", SMALL, seed=1)
    assert model_fingerprint(other) != model_fingerprint(small)


def test_shards_and_half_precision_hold_the_same_numbers(small: Path, tmp_path: Path) -> None:
    whole = load_file(small / "model.safetensors")
    folder = write_random_checkpoint(tmp_path, SMALL, dtype="float16", shards=3)
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    parts = {name: load_file(folder / name) for name in sorted(set(where.values()))}
    assert len(parts) == 3
    assert where.keys() == whole.keys()
    for name, tensor in whole.items():
        assert np.array_equal(parts[where[name]][name], tensor.astype(np.float16))


@pytest.mark.parametrize("n_languages", [99, 100])
def test_multilingual_vocabularies_are_the_reference_s(tmp_path: Path, n_languages: int) -> None:
    shape = Shape(64, 1, 1, 1, n_vocab=51_766 + n_languages)
    folder = write_random_checkpoint(tmp_path, shape)
    whisper = get_tokenizer(True, num_languages=n_languages, language="en", task="translate")
    assert_same_vocabulary(Tokenizer.load(folder, shape.n_vocab), whisper)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["lang_to_id"]["<|su|>"] == whisper.to_language_token("su")
    assert ("<|yue|>" in generation["lang_to_id"]) == (n_languages == 100)


def test_the_english_only_vocabulary_is_the_reference_s(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path, ENGLISH_ONLY)
    whisper = get_tokenizer(False)
    tokenizer = Tokenizer.load(folder, ENGLISH)
    assert_same_vocabulary(tokenizer, whisper)
    assert tokenizer.languages == {}
    assert tokenizer.sot_sequence("en", "transcribe") == list(whisper.sot_sequence)


def assert_same_vocabulary(tokenizer: Tokenizer, whisper: Any) -> None:
    ours = {name: tokenizer._bpe.token_to_id(name) for name in whisper.special_tokens}
    assert ours == whisper.special_tokens
    assert tokenizer.timestamp_begin == whisper.timestamp_begin
    assert tokenizer.timestamp_begin + 1501 == tokenizer.n_vocab
    assert tokenizer.non_speech_tokens == whisper.non_speech_tokens
    for text in ("Hello world, don't", " Grüße aus München! ¿Qué?", "日本語のテスト", "  x  😀 1234567"):
        assert tokenizer.encode(text) == whisper.encode(text)
        assert tokenizer.decode(whisper.encode(text)) == text


def test_transformers_and_ctranslate2_load_it(tmp_path: Path) -> None:
    import ctranslate2
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    folder = write_random_checkpoint(tmp_path / "model", LARGE_V3_LIKE)
    model, information = WhisperForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not information["missing_keys"] | information["unexpected_keys"] - {"proj_out.weight"}
    assert model.generation_config.alignment_heads
    processor = WhisperProcessor.from_pretrained(folder)
    assert processor.tokenizer.convert_tokens_to_ids("<|yue|>") == 50_358
    converted = to_ctranslate2(folder, tmp_path / "converted")
    assert ctranslate2.models.Whisper(str(converted)).n_mels == 128


def test_alignment_heads_are_listed_as_asked(tmp_path: Path) -> None:
    def listed(**options: Any) -> Any:
        folder = write_random_checkpoint(tmp_path, Shape(128, 2, 1, 4), **options)
        return json.loads((folder / "generation_config.json").read_text()).get("alignment_heads")

    assert listed() == [[2, 0], [2, 1], [3, 0], [3, 1]]  # all of the last half, being less than eight
    assert listed(alignment_heads=[(1, 1)]) == [[1, 1]]
    assert listed(alignment_heads=()) is None


OPEN = DecodeOptions(
    algorithm="sequential",
    language="en",
    temperature_fallback=False,
    compression_ratio_threshold=None,
    logprob_threshold=None,
    no_speech_threshold=None,
)


def test_the_text_is_varied_has_times_and_ends(small: Path) -> None:
    """What parity tests and benchmarks rely on."""
    with load_engine(EngineConfig(str(small), dtype="float32", lanes=6)) as engine:
        answers = engine.decode([make_clip("en", 3, seed).pcm for seed in range(6)], OPEN)
    tokens = [[token for segment in answer.segments for token in segment.tokens] for answer in answers]
    assert len({tuple(row) for row in tokens}) == 6  # the audio matters
    assert min(len(set(row)) / len(row) for row in tokens) > 0.3
    assert sum(token >= 50_364 for row in tokens for token in row) > 4 * 6
    assert 10 < sum(answer.tokens_generated / answer.n_windows for answer in answers) / 6 < 150


def test_without_a_mean_only_the_limit_ends_a_window(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path, SMALL, mean_tokens=None)
    with load_engine(EngineConfig(str(folder), dtype="float32", lanes=2)) as engine:
        for answer in engine.decode([make_clip("en", 2, seed).pcm for seed in range(2)], replace(OPEN, max_tokens=60)):
            assert answer.tokens_generated >= 60 * answer.n_windows


def test_an_unknown_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'huge' is none of tiny, base"):
        write_random_checkpoint(tmp_path, "huge")


def test_an_english_vocabulary_without_the_reference_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.engine.random_checkpoint.files", lambda package: tmp_path / package)
    with pytest.raises(ModelError, match="needs the openai-whisper package"):
        write_random_checkpoint(tmp_path / "model", ENGLISH_ONLY)
