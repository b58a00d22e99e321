"""Whisper checkpoints of any shape with random weights, in Hugging Face layout: for tests and benchmarks.

The text they give is noise, but the decoding is of the usual kind: varied tokens, timestamps that come and go, an end
after some 40 tokens, attention that looks at places. The same arguments give the same bytes. No torch.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from pipeline.engine.tokens import Tokenizer
from pipeline.errors import ModelError

N_AUDIO_CTX, N_TEXT_CTX = 1500, 448
ENGLISH, MULTILINGUAL, CANTONESE = 51_864, 51_865, 51_866  # vocabularies; the last adds <|yue|> (large-v3)
_CANTONESE_ID = 50_358  # its place among the languages: all later ids move up by one

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Shape:
    """What tells one Whisper from another. Real ones have 64 numbers a head."""

    width: int
    heads: int
    encoder_layers: int
    decoder_layers: int
    n_mels: int = 80
    n_vocab: int = MULTILINGUAL


SIZES: dict[str, Shape] = {
    "tiny": Shape(384, 6, 4, 4),
    "base": Shape(512, 8, 6, 6),
    "small": Shape(768, 12, 12, 12),
    "medium": Shape(1024, 16, 24, 24),
    "large-v2": Shape(1280, 20, 32, 32),
    "large-v3": Shape(1280, 20, 32, 32, 128, CANTONESE),
    "large-v3-turbo": Shape(1280, 20, 32, 4, 128, CANTONESE),
    "distil-large-v2": Shape(1280, 20, 32, 2),
    "distil-large-v3": Shape(1280, 20, 32, 2, 128, CANTONESE),
    "tiny.en": Shape(384, 6, 4, 4, n_vocab=ENGLISH),
    "base.en": Shape(512, 8, 6, 6, n_vocab=ENGLISH),
    "small.en": Shape(768, 12, 12, 12, n_vocab=ENGLISH),
    "medium.en": Shape(1024, 16, 24, 24, n_vocab=ENGLISH),
    "distil-small.en": Shape(768, 12, 12, 4, n_vocab=ENGLISH),
    "distil-medium.en": Shape(1024, 16, 24, 2, n_vocab=ENGLISH),
}


def write_random_checkpoint(
    folder: Path,
    size: str | Shape,
    *,
    seed: int = 0,
    dtype: Literal["float32", "float16"] = "float32",
    shards: int = 1,
    tokenizer: Path | None = None,
    alignment_heads: Iterable[tuple[int, int]] | None = None,
    mean_tokens: int | None = 40,
) -> Path:
    """Writes a checkpoint of a published `size` (a name of `SIZES`) or of a `Shape` of one's own; returns `folder`.

    `shards` above 1 also bounds the memory: one is held at a time. `tokenizer` is a `tokenizer.json` to take instead
    of the one that belongs to the vocabulary; English-only vocabularies come from the openai-whisper package.
    `alignment_heads` are (layer, head); by default eight of the last half of the layers, () lists none.
    A window ends after about `mean_tokens` text tokens; None: hardly ever, so that only a limit ends it.
    """
    shape = _shape(size)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "tokenizer.json", _tokenizer(shape.n_vocab, tokenizer))
    vocabulary = Tokenizer.load(folder, shape.n_vocab)
    heads = _default_heads(shape) if alignment_heads is None else tuple(alignment_heads)
    _write_json(folder / "config.json", _config(shape, vocabulary, dtype))
    _write_json(folder / "generation_config.json", _generation_config(vocabulary, heads))
    _write_json(folder / "preprocessor_config.json", _preprocessor_config(shape))
    _write_json(folder / "tokenizer_config.json", _TOKENIZER_CONFIG)
    _write_weights(folder, _Weights(shape, vocabulary, seed, mean_tokens), np.dtype(dtype), shards)
    return folder


def _shape(size: str | Shape) -> Shape:
    if isinstance(size, Shape):
        return size
    if size not in SIZES:
        raise ModelError(f"size {size!r} is none of {', '.join(SIZES)}")
    return SIZES[size]


def _default_heads(shape: Shape) -> tuple[tuple[int, int], ...]:
    """Eight heads spread over the last half of the layers: as many as the published models list, or all there are."""
    first = shape.decoder_layers // 2
    candidates = [(layer, head) for layer in range(first, shape.decoder_layers) for head in range(shape.heads)]
    return tuple(candidates[:: max(1, len(candidates) // 8)][:8])


# -- weights -----------------------------------------------------------------------------------------------


def tensor_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a checkpoint, without the `model.` that all names begin with, and its shape."""
    d = shape.width
    yield "encoder.conv1.weight", (d, shape.n_mels, 3)
    yield "encoder.conv1.bias", (d,)
    yield "encoder.conv2.weight", (d, d, 3)
    yield "encoder.conv2.bias", (d,)
    yield "encoder.embed_positions.weight", (N_AUDIO_CTX, d)
    yield "decoder.embed_tokens.weight", (shape.n_vocab, d)
    yield "decoder.embed_positions.weight", (N_TEXT_CTX, d)
    for i in range(shape.encoder_layers):
        yield from _layer(f"encoder.layers.{i}", d, ("self_attn",))
    yield from _norm("encoder.layer_norm", d)
    for i in range(shape.decoder_layers):
        yield from _layer(f"decoder.layers.{i}", d, ("self_attn", "encoder_attn"))
    yield from _norm("decoder.layer_norm", d)


def _layer(prefix: str, d: int, attentions: tuple[str, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for attention in attentions:
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{prefix}.{attention}.{name}.weight", (d, d)
            if name != "k_proj":  # Whisper's keys have no bias
                yield f"{prefix}.{attention}.{name}.bias", (d,)
        yield from _norm(f"{prefix}.{attention}_layer_norm", d)
    for name, matrix in (("fc1", (4 * d, d)), ("fc2", (d, 4 * d))):
        yield f"{prefix}.{name}.weight", matrix
        yield f"{prefix}.{name}.bias", matrix[:1]
    yield from _norm(f"{prefix}.final_layer_norm", d)


def _norm(name: str, d: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (d,)
    yield f"{name}.bias", (d,)


@dataclass(frozen=True, slots=True)
class _Weights:
    """Every tensor by name, drawn when it is asked for, from a stream named by the seed and its own name.

    The scales are chosen so that the greedy text is varied. What the feed-forward layers add up to is twelve times
    the token's embedding, so that the next token does not just repeat it, and five times what attention adds, so that
    the next step is another one although the audio stays. Logits have a standard deviation of 4: the best of 50,000
    text tokens (4.2 deviations) is then about as likely as 1,501 timestamps together. Channel 0 of the output norm is
    the constant 1, so a token's number there is added to its logit at every step.
    """

    shape: Shape
    tokens: Tokenizer
    seed: int
    mean_tokens: int | None

    EMBEDDING = 0.05
    POSITION = 0.1
    ATTENDED, FED_FORWARD = 0.12, 0.6  # what all layers of a decoder add up to
    LOGIT = 4.0
    TIMES = 1.12  # makes timestamps a little likelier: one for every eight or so text tokens
    ATTENTION = 3.5  # deviation of the attention scores: a few of 1,500 places are looked at

    def draw(self, name: str, shape: tuple[int, ...]) -> Array:
        random = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        if name == "encoder.embed_positions.weight":
            return _sinusoids(*shape)
        if name.startswith("decoder.layer_norm."):
            return self._output_norm(shape, is_weight=name.endswith("weight"))
        numbers = random.standard_normal(shape, dtype=np.float32)
        if name == "decoder.embed_tokens.weight":
            return self._embeddings(numbers)
        if "layer_norm.weight" in name:
            return 1 + np.float32(0.1) * numbers
        if name.endswith("fc2.weight"):
            numbers -= numbers.mean(axis=1, keepdims=True)  # else GELU's mean makes one text of all audio
        return numbers * np.float32(self._scale(name, shape))

    def _scale(self, name: str, shape: tuple[int, ...]) -> float:
        """The deviation of a tensor's numbers: 1 / sqrt(inputs) where it should keep that of its input."""
        if name == "decoder.embed_positions.weight":
            return self.POSITION
        if name.endswith(".bias"):
            return 0.02
        return self._gain(name) / math.sqrt(math.prod(shape[1:]))

    def _gain(self, name: str) -> float:
        part, _, rest = name.partition(".layers.")
        layers = self.shape.encoder_layers if part == "encoder" else self.shape.decoder_layers
        if "q_proj" in rest or "k_proj" in rest:
            return math.sqrt(self.ATTENTION)
        if "out_proj" in rest:
            return self.ATTENDED / math.sqrt(layers) / 0.5  # the mean over a few places has half their deviation
        if "fc2" in rest:
            return self.FED_FORWARD / math.sqrt(layers) / 0.6  # so has what GELU lets through
        return 1.0

    def _output_norm(self, shape: tuple[int, ...], *, is_weight: bool) -> Array:
        values = np.zeros(shape, np.float32)
        if is_weight:
            values[1:] = self.LOGIT / (self.EMBEDDING * math.sqrt(self.shape.width))
        else:
            values[0] = 1
        return values

    def _embeddings(self, numbers: NDArray[np.float32]) -> Array:
        numbers *= np.float32(self.EMBEDDING)
        numbers[self.tokens.timestamp_begin :] *= np.float32(self.TIMES)
        numbers[:, 0] = 0
        for token, lift in self._lifts().items():
            numbers[token, 0] = lift
        return numbers

    def _lifts(self) -> dict[int, float]:
        """What is added to a token's logit at every step.

        The end token wins against the best text token (4.2 deviations) once in `mean_tokens` steps; no_speech is
        likely now and then, so that its probability is a number worth comparing.
        """
        end = -20.0 if self.mean_tokens is None else self.LOGIT * (4.2 + NormalDist().inv_cdf(1 / self.mean_tokens))
        return {self.tokens.eot: end, self.tokens.no_speech: 2.5 * self.LOGIT}


def _sinusoids(length: int, channels: int) -> Array:
    """The encoder's positions, as in the published models: wavelengths from 2 pi to 20,000 pi."""
    step = math.log(10_000) / (channels // 2 - 1)
    angles = np.arange(length)[:, None] * np.exp(-step * np.arange(channels // 2))[None, :]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def _write_weights(folder: Path, weights: _Weights, dtype: np.dtype[Any], shards: int) -> None:
    """One file, or shards of about equal size with their index."""
    names = list(tensor_shapes(weights.shape))
    if shards == 1:
        _save(folder / "model.safetensors", weights, names, dtype)
        return
    parts: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(shards)]
    filled = [0] * shards
    for name, shape in sorted(names, key=lambda tensor: -math.prod(tensor[1])):
        emptiest = filled.index(min(filled))
        parts[emptiest].append((name, shape))
        filled[emptiest] += math.prod(shape)
    files_of = {f"model-{i:05d}-of-{shards:05d}.safetensors": part for i, part in enumerate(parts, 1)}
    for file, part in files_of.items():
        _save(folder / file, weights, part, dtype)
    where = {f"model.{name}": file for file, part in files_of.items() for name, _ in part}
    index = {"metadata": {"total_size": sum(filled) * dtype.itemsize}, "weight_map": where}
    _write_json(folder / "model.safetensors.index.json", index)


def _save(path: Path, weights: _Weights, names: list[tuple[str, tuple[int, ...]]], dtype: np.dtype[Any]) -> None:
    tensors = {f"model.{name}": weights.draw(name, shape).astype(dtype, copy=False) for name, shape in names}
    save_file(tensors, path, metadata={"format": "pt"})


# -- the JSON files ----------------------------------------------------------------------------------------

_TOKENIZER_CONFIG = {
    "tokenizer_class": "WhisperTokenizer",
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "model_max_length": 1024,
    "clean_up_tokenization_spaces": False,
    "errors": "replace",
    "add_prefix_space": False,
    "add_bos_token": False,
}


def _config(shape: Shape, tokens: Tokenizer, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "activation_function": "gelu",
        "d_model": shape.width,
        "vocab_size": shape.n_vocab,
        "num_mel_bins": shape.n_mels,
        "encoder_layers": shape.encoder_layers,
        "decoder_layers": shape.decoder_layers,
        "num_hidden_layers": shape.encoder_layers,
        "encoder_attention_heads": shape.heads,
        "decoder_attention_heads": shape.heads,
        "encoder_ffn_dim": 4 * shape.width,
        "decoder_ffn_dim": 4 * shape.width,
        "max_source_positions": N_AUDIO_CTX,
        "max_target_positions": N_TEXT_CTX,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "scale_embedding": False,
        "median_filter_width": 7,
        "torch_dtype": dtype,
        **_token_roles(tokens),
    }


def _generation_config(tokens: Tokenizer, heads: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "is_multilingual": tokens.multilingual,
        "no_timestamps_token_id": tokens.no_timestamps,
        "prev_sot_token_id": tokens.sot_prev,
        "max_initial_timestamp_index": 50,
        "max_length": N_TEXT_CTX,
        "return_timestamps": False,
        "begin_suppress_tokens": [*tokens.encode(" "), tokens.eot],
        "suppress_tokens": tokens.suppressed((-1,)),
        **_token_roles(tokens),
    }
    if heads:
        config["alignment_heads"] = [list(head) for head in heads]
    if tokens.multilingual:
        config["lang_to_id"] = {f"<|{code}|>": token for code, token in tokens.languages.items()}
        config["task_to_id"] = {"transcribe": tokens.transcribe, "translate": tokens.translate}
    return config


def _token_roles(tokens: Tokenizer) -> dict[str, int]:
    end = tokens.eot
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": tokens.sot}


def _preprocessor_config(shape: Shape) -> dict[str, Any]:
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": shape.n_mels,
        "chunk_length": 30,
        "hop_length": 160,
        "n_fft": 400,
        "n_samples": 480_000,
        "nb_max_frames": 3000,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
        "sampling_rate": 16_000,
        "dither": 0.0,
    }


# -- vocabularies ------------------------------------------------------------------------------------------


def _tokenizer(n_vocab: int, path: Path | None) -> dict[str, Any]:
    """`tokenizer.json` for a vocabulary of this many rows."""
    from pipeline.demo import model_path

    if path is not None:
        return _read_json(path)
    multilingual = _read_json(model_path() / "tokenizer.json")
    if n_vocab == ENGLISH:
        return _english_tokenizer(multilingual)
    return _with_cantonese(multilingual) if n_vocab == CANTONESE else multilingual


def _with_cantonese(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """large-v3's vocabulary: one language more, every special token behind it one further."""
    added = tokenizer["added_tokens"]
    later = [{**token, "id": token["id"] + 1} for token in added if token["id"] >= _CANTONESE_ID]
    before = [token for token in added if token["id"] < _CANTONESE_ID]
    return {**tokenizer, "added_tokens": [*before, {**before[-1], "id": _CANTONESE_ID, "content": "<|yue|>"}, *later]}


def _english_tokenizer(multilingual: dict[str, Any]) -> dict[str, Any]:
    """GPT-2's vocabulary with the multilingual one's special tokens behind it."""
    from pipeline.demo.train.tokenizer import _as_characters, _merges

    try:
        lines = (files("whisper") / "assets" / "gpt2.tiktoken").read_text().splitlines()
    except (ModuleNotFoundError, OSError):
        raise ModelError("an English-only vocabulary needs the openai-whisper package, or a tokenizer.json") from None
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    shift = len(ranks) - multilingual["added_tokens"][0]["id"]
    return {
        **multilingual,
        "added_tokens": [{**token, "id": token["id"] + shift} for token in multilingual["added_tokens"]],
        "model": {
            **multilingual["model"],
            "vocab": {_as_characters(token): rank for token, rank in ranks.items()},
            "merges": [list(pair) for pair in _merges(ranks)],
        },
    }


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
