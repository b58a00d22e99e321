"""Whisper's network over lane caches: safetensors → encoder, prefill, one-token step, alignment (openai `model.py`).

The running batch is a fixed set of lanes. A lane's keys and values stay where they are while its window is decoded;
`step` reads the first n lanes as slices, so its tensors have static shapes and it never asks the host anything. This
page knows tensors only: no tokens' meaning, no audio, no requests.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from pipeline.engine.checkpoint import read_json, weight_files
from pipeline.engine.layers import (
    Block,
    Convolution,
    Cross,
    Linear,
    Norm,
    cross_attention_is_fused,
    merge_heads,
    split_heads,
)
from pipeline.errors import ModelError

log = logging.getLogger(__name__)

N_AUDIO_CTX, N_TEXT_CTX = 1500, 448  # positions of every Whisper's encoder and decoder
CACHED_ROWS = 8  # of logits, whose softmax stays in a CPU's cache: 100 at once took twice as long


@dataclass(frozen=True, slots=True)
class Dims:
    """The shape of a Whisper model."""

    n_mels: int
    n_audio_ctx: int  # encoder positions of one window, 1500
    n_audio_layer: int
    n_text_ctx: int  # decoder positions, 448
    n_text_layer: int
    n_state: int
    n_audio_head: int
    n_text_head: int
    n_vocab: int
    n_audio_mlp: int
    n_text_mlp: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Dims:
        try:
            dims = cls(
                n_mels=config["num_mel_bins"],
                n_audio_ctx=config["max_source_positions"],
                n_audio_layer=config["encoder_layers"],
                n_text_ctx=config["max_target_positions"],
                n_text_layer=config["decoder_layers"],
                n_state=config["d_model"],
                n_audio_head=config["encoder_attention_heads"],
                n_text_head=config["decoder_attention_heads"],
                n_vocab=config["vocab_size"],
                n_audio_mlp=config["encoder_ffn_dim"],
                n_text_mlp=config["decoder_ffn_dim"],
            )
        except KeyError as error:
            raise ModelError(f"model config.json lacks {error}") from None
        dims._check()
        return dims

    def _check(self) -> None:
        """What the rest of the engine takes for granted."""
        wrong = next((f.name for f in fields(self) if type(v := getattr(self, f.name)) is not int or v < 1), None)
        if wrong is not None:
            raise ModelError(f"model config.json: {wrong} is {getattr(self, wrong)!r}, no size")
        if self.n_audio_ctx != N_AUDIO_CTX or self.n_text_ctx < N_TEXT_CTX:
            raise ModelError(
                f"model config.json: {self.n_audio_ctx} audio and {self.n_text_ctx} text positions; "
                f"Whisper has {N_AUDIO_CTX} and {N_TEXT_CTX}"
            )
        if self.n_state % self.n_audio_head or self.n_state % self.n_text_head:
            raise ModelError(f"model config.json: d_model {self.n_state} is no multiple of its attention heads")


@dataclass(slots=True)
class Lanes:
    """Keys and values of every lane, allocated once. Head size is 64 in every Whisper."""

    self_k: Tensor  # [layers, lanes, heads, n_text_ctx, head]
    self_v: Tensor
    cross_k: Tensor  # [layers, lanes, heads, n_audio_ctx, head]; in memory as `layers.Cross` likes it
    cross_v: Tensor

    @property
    def count(self) -> int:
        return self.self_k.shape[1]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies a lane's state, `length` tokens so far, over another's."""
        for cache in (self.cross_k, self.cross_v):
            cache[:, target] = cache[:, source]
        for cache in (self.self_k, self.self_v):
            cache[:, target, :, :length] = cache[:, source, :, :length]

    def reorder(self, targets: Tensor, sources: Tensor, length: int) -> None:
        """The text so far, `length` tokens, of lanes `targets` becomes that of `sources`; the audio stays."""
        for cache in (self.self_k, self.self_v):
            cache[:, targets, :, :length] = cache[:, sources, :, :length]


class WhisperModel:
    """Weights on one device, and what the engine does with them."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        config = read_json(folder, "config.json")
        self.dims = Dims.of(config)
        self.device = device
        self.dtype = dtype
        self._load(_Weights(folder, device, dtype))
        self.alignment_heads = _alignment_heads(read_json(folder, "generation_config.json"), self.dims)

    def _load(self, weights: _Weights) -> None:
        d, dims = self.dims.n_state, self.dims
        self._conv1 = weights.convolution("encoder.conv1", (d, dims.n_mels, 3), stride=1)
        self._conv2 = weights.convolution("encoder.conv2", (d, d, 3), stride=2)
        self._audio_positions = weights.get("encoder.embed_positions.weight", (dims.n_audio_ctx, d))
        self._encoder = [weights.block(f"encoder.layers.{i}", d, dims.n_audio_mlp) for i in range(dims.n_audio_layer)]
        self._encoder_norm = weights.norm("encoder.layer_norm", d)
        self._embedding = weights.get("decoder.embed_tokens.weight", (dims.n_vocab, d))
        self._vocabulary = Linear(weights.output(self._embedding), None)
        self._text_positions = weights.get("decoder.embed_positions.weight", (dims.n_text_ctx, d))
        self._decoder = [
            weights.block(f"decoder.layers.{i}", d, dims.n_text_mlp, cross_heads=dims.n_text_head)
            for i in range(dims.n_text_layer)
        ]
        self._decoder_norm = weights.norm("decoder.layer_norm", d)
        weights.check_all_used()

    # -- encoder ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode(self, mel: Tensor) -> Tensor:
        """Log-mel [b, n_mels, 3000] → hidden states [b, n_audio_ctx, d]."""
        x = self._conv2(self._conv1(mel.to(self.dtype).transpose(1, 2))) + self._audio_positions
        for block in self._encoder:
            q, k, v = split_heads(block.qkv(block.attn_norm(x)), 3, self.dims.n_audio_head)
            x = block.attn_out.added_to(x, merge_heads(F.scaled_dot_product_attention(q, k, v)))
            x = block.mlp(x)
        return self._encoder_norm(x)

    # -- decoder ---------------------------------------------------------------------------------------------

    def allocate(self, lanes: int) -> Lanes:
        dims, heads, head = self.dims, self.dims.n_text_head, self.dims.n_state // self.dims.n_text_head

        def empty(*shape: int) -> Tensor:
            return torch.zeros(dims.n_text_layer, lanes, heads, *shape, device=self.device, dtype=self.dtype)

        def heard() -> Tensor:
            fused = cross_attention_is_fused(self.dtype, self.device)
            return empty(dims.n_audio_ctx, head) if fused else empty(head, dims.n_audio_ctx).mT

        text = dims.n_text_ctx, head
        return Lanes(self_k=empty(*text), self_v=empty(*text), cross_k=heard(), cross_v=heard())

    def lane_bytes(self) -> int:
        """Memory of one lane's caches."""
        per_position = self.dims.n_text_layer * self.dims.n_state * 2 * self.dtype.itemsize
        return per_position * (self.dims.n_text_ctx + self.dims.n_audio_ctx)

    @torch.inference_mode()
    def prefill(
        self, lanes: Lanes, rows: Sequence[int] | Tensor, hidden: Tensor, tokens: Tensor, wanted: Tensor
    ) -> Tensor:
        """Fills lanes `rows` with b windows' `hidden` [b, t, d] and prompts `tokens` [b, p], padded right.

        `rows` as a tensor on the device: then nothing waits for the host. Returns float32 logits [b, w, vocab] at the
        prompt positions `wanted` [b, w]. What the padding leaves in the
        caches lies after the prompt and is overwritten before it is ever read.
        """
        p = tokens.shape[1]
        x = F.embedding(tokens, self._embedding) + self._text_positions[:p]
        for i, block in enumerate(self._decoder):
            x, (k, v) = self._self_attend(block, x)
            x, (cross_k, cross_v) = self._hear(block, x, hidden)
            _write(rows, lanes.self_k[i, :, :, :p], k)
            _write(rows, lanes.self_v[i, :, :, :p], v)
            _write(rows, lanes.cross_k[i], cross_k)
            _write(rows, lanes.cross_v[i], cross_v)
            x = block.mlp(x)
        return self._logits(x.gather(1, wanted[:, :, None].expand(-1, -1, x.shape[2])))

    @torch.inference_mode()
    def step(self, lanes: Lanes, tokens: Tensor, positions: Tensor, length: int) -> Tensor:
        """One token further in lanes [0, n): `tokens` [n] stand at `positions` [n] → float32 logits [n, vocab].

        `length` bounds the self-attention: a multiple that is above every live row's position.
        """
        n = tokens.shape[0]
        at = torch.arange(n, device=tokens.device)
        hidden_from = torch.arange(length, device=tokens.device)[None, :] > positions[:, None]  # [n, length]
        mask = torch.zeros(n, 1, 1, length, device=tokens.device, dtype=self.dtype)
        mask.masked_fill_(hidden_from[:, None, None, :], float("-inf"))
        x = (F.embedding(tokens, self._embedding) + self._text_positions[positions])[:, None]
        for i, block in enumerate(self._decoder):
            q, k, v = split_heads(block.qkv(block.attn_norm(x)), 3, self.dims.n_text_head)
            lanes.self_k[i][at, :, positions] = k[:, :, 0]
            lanes.self_v[i][at, :, positions] = v[:, :, 0]
            keys, values = lanes.self_k[i, :n, :, :length], lanes.self_v[i, :n, :, :length]
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            x = block.attn_out.added_to(x, merge_heads(y))
            assert block.cross is not None
            x = block.cross.attend(x, lanes.cross_k[i, :n], lanes.cross_v[i, :n])
            x = block.mlp(x)
        return self._logits(x)[:, 0]

    @torch.inference_mode()
    def align(self, lanes: Lanes, rows: Sequence[int], tokens: Tensor) -> tuple[Tensor, Tensor]:
        """A teacher-forced pass: texts `tokens` [b, p] on the audio that lanes `rows` hold; their own text stays.

        Returns the last hidden states [b, p, d], which `likelihood` reads, and the alignment heads' attention scores
        [b, heads, p, n_audio_ctx] before the softmax.
        """
        x = F.embedding(tokens, self._embedding) + self._text_positions[: tokens.shape[1]]
        scores = []
        for i, block in enumerate(self._decoder):
            x, _ = self._self_attend(block, x)
            assert block.cross is not None
            heads = [head for layer, head in self.alignment_heads if layer == i]
            x, found = block.cross.attend_in_lanes(x, lanes.cross_k[i], lanes.cross_v[i], rows, heads)
            scores.append(found)
            x = block.mlp(x)
        return self._decoder_norm(x), torch.cat(scores, dim=1)

    @torch.inference_mode()
    def likelihood(self, x: Tensor, tokens: Tensor, n: int) -> Tensor:
        """How likely each of `tokens` [r] is among the vocabulary's first n after the last hidden state `x` [r, d]."""
        likely = []
        parts = torch.split(self._vocabulary(x), CACHED_ROWS), torch.split(tokens, CACHED_ROWS)
        for logits, asked in zip(*parts, strict=True):
            likely.append(logits[:, :n].softmax(-1, dtype=torch.float32).gather(1, asked[:, None])[:, 0])
        return torch.cat(likely)

    @torch.inference_mode()
    def listen(self, lanes: Lanes, lane: int, hidden: Tensor) -> None:
        """Puts a window's `hidden` [t, d] into a lane that has no text yet."""
        for i, block in enumerate(self._decoder):
            assert block.cross is not None
            (keys,), (values,) = block.cross.keys_and_values(hidden[None])
            lanes.cross_k[i, lane], lanes.cross_v[i, lane] = keys, values

    @torch.inference_mode()
    def first_logits(self, hidden: Tensor, token: int) -> Tensor:
        """Float32 logits [b, vocab] after the single `token`, on `hidden` [b, t, d], without lanes."""
        x = self._embedding[token].expand(hidden.shape[0], 1, -1) + self._text_positions[:1]
        for block in self._decoder:
            x, _ = self._self_attend(block, x)
            x, _ = self._hear(block, x, hidden)
            x = block.mlp(x)
        return self._logits(x)[:, 0]

    def _self_attend(self, block: Block, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [b, p, d] with what earlier positions say added, and the keys and values of all."""
        q, k, v = split_heads(block.qkv(block.attn_norm(x)), 3, self.dims.n_text_head)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return block.attn_out.added_to(x, merge_heads(y)), (k, v)

    def _hear(self, block: Block, x: Tensor, hidden: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [b, p, d] with what the audio says added, and the audio's keys and values."""
        assert block.cross is not None
        keys_and_values = block.cross.keys_and_values(hidden)
        return block.cross.attend(x, *keys_and_values), keys_and_values

    def _logits(self, x: Tensor) -> Tensor:
        return self._vocabulary(self._decoder_norm(x)).float()


def _write(rows: Sequence[int] | Tensor, cache: Tensor, values: Tensor) -> None:
    """values [b, ...] into the lanes `rows` of a layer's cache [lanes, ...]: one kernel on a device that is given the
    rows there; one copy each on a CPU, where writing all by an index took 20 times as long."""
    if isinstance(rows, Tensor):
        cache.index_copy_(0, rows, values)
        return
    for lane, value in zip(rows, values, strict=True):
        cache[lane] = value


def _alignment_heads(generation: dict[str, Any], dims: Dims) -> tuple[tuple[int, int], ...]:
    """The cross-attention heads that follow the audio, (layer, head); by default all of the last half of layers.

    A list that names a head which this model has not is its teacher's: distilled checkpoints were published so.
    """
    listed = generation.get("alignment_heads")
    try:
        heads = {(int(layer), int(head)) for layer, head in listed or ()}
    except (TypeError, ValueError):
        raise ModelError("model generation_config.json: alignment_heads is no list of [layer, head]") from None
    strangers = [(i, h) for i, h in heads if not (0 <= i < dims.n_text_layer and 0 <= h < dims.n_text_head)]
    if heads and not strangers:
        return tuple(sorted(heads))
    if strangers:
        log.warning("model: alignment head %s of its generation config is not in it; the default is used", strangers[0])
    first = dims.n_text_layer // 2
    return tuple((layer, head) for layer in range(first, dims.n_text_layer) for head in range(dims.n_text_head))


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_network(name: str) -> bool:
    return name.removeprefix("model.").startswith(("encoder.", "decoder."))


class _Weights:
    """The checkpoint's tensors by name; each is checked for its shape and read once."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._files: dict[str, Any] = {}
        try:
            for path in weight_files(folder):
                file = safe_open(path, framework="pt", device="cpu")
                self._files |= dict.fromkeys(file.keys(), file)  # type: ignore[no-untyped-call]
        except Exception as error:  # safetensors raises bare Exception on a damaged file
            raise ModelError(f"weights in {folder}: damaged ({error})") from None
        self._prefix = "model." if any(name.startswith("model.") for name in self._files) else ""
        self._used: set[str] = set()

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        return self._read(self._prefix + name, shape, dtype or self._dtype)

    def output(self, embedding: Tensor) -> Tensor:
        """The matrix that gives the logits: the token embedding, unless the checkpoint has one that differs.

        As transformers does: `tie_word_embeddings` is true in nearly every config, also beside untied weights.
        """
        if "proj_out.weight" not in self._files:
            return embedding
        tensor = self._read("proj_out.weight", tuple(embedding.shape), self._dtype)
        return embedding if torch.equal(tensor, embedding) else tensor

    def check_all_used(self) -> None:
        """Tensors that the config has no place for mean that it belongs to another model."""
        left = next((name for name in sorted(self._files.keys() - self._used) if _is_network(name)), None)
        if left is not None:
            raise ModelError(f"weights: tensor {left} has no place in the model that config.json describes")

    def _read(self, full: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if full not in self._files:
            raise ModelError(f"weights: tensor {full} is missing")
        self._used.add(full)
        stored: Tensor = self._files[full].get_tensor(full)
        if tuple(stored.shape) != shape:
            raise ModelError(f"weights: tensor {full} has shape {tuple(stored.shape)}, the config needs {shape}")
        if stored.dtype not in _FLOATS:
            raise ModelError(f"weights: tensor {full} is {_name(stored.dtype)}: quantised, not supported")
        tensor = stored.to(device=self._device, dtype=dtype)
        if not bool(tensor.sum(dtype=torch.float32).isfinite()):  # one number that is none makes the sum none
            raise ModelError(f"weights: tensor {full} has values that are no numbers in {_name(dtype)}")
        return tensor

    def norm(self, name: str, d: int) -> Norm:
        """Float32 beside whatever the activations are; on a GPU their dtype, as its one kernel for both wants it."""
        dtype = torch.float32 if self._device.type == "cpu" else self._dtype
        return Norm(self.get(f"{name}.weight", (d,), dtype), self.get(f"{name}.bias", (d,), dtype))

    def linear(self, name: str, shape: tuple[int, int]) -> Linear:
        return Linear(self.get(f"{name}.weight", shape), self.get(f"{name}.bias", shape[:1]))

    def qkv(self, prefix: str, d: int) -> Linear:
        """Three projections of one input as one matrix; Whisper's keys have no bias, so theirs is zero."""
        weights = [self.get(f"{prefix}.{name}_proj.weight", (d, d)) for name in "qkv"]
        q, v = (self.get(f"{prefix}.{name}_proj.bias", (d,)) for name in "qv")
        return Linear(torch.cat(weights), torch.cat([q, torch.zeros_like(q), v]))

    def convolution(self, name: str, shape: tuple[int, int, int], stride: int) -> Convolution:
        return Convolution(self.get(f"{name}.weight", shape), self.get(f"{name}.bias", shape[:1]), stride)

    def cross(self, prefix: str, norm: str, d: int, heads: int) -> Cross:
        return Cross(
            norm=self.norm(norm, d),
            query=self.linear(f"{prefix}.q_proj", (d, d)),
            key=self.get(f"{prefix}.k_proj.weight", (d, d)),
            value=self.get(f"{prefix}.v_proj.weight", (d, d)),
            value_bias=self.get(f"{prefix}.v_proj.bias", (d,)),
            out=self.linear(f"{prefix}.out_proj", (d, d)),
            heads=heads,
        )

    def block(self, name: str, d: int, mlp: int, cross_heads: int = 0) -> Block:
        cross = f"{name}.encoder_attn"
        return Block(
            attn_norm=self.norm(f"{name}.self_attn_layer_norm", d),
            qkv=self.qkv(f"{name}.self_attn", d),
            attn_out=self.linear(f"{name}.self_attn.out_proj", (d, d)),
            mlp_norm=self.norm(f"{name}.final_layer_norm", d),
            up=self.linear(f"{name}.fc1", (mlp, d)),
            down=self.linear(f"{name}.fc2", (d, mlp)),
            cross=self.cross(cross, f"{cross}_layer_norm", d, cross_heads) if cross_heads else None,
        )
