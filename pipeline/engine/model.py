"""Whisper's network over lane caches: safetensors → encoder, prefill, one-token step, alignment (openai `model.py`).

The running batch is a fixed set of lanes. A lane's keys and values stay where they are while its window is decoded;
`step` reads the first n lanes as slices, so its tensors have static shapes and it never asks the host anything. This
page knows tensors only: no tokens' meaning, no audio, no requests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from pipeline.engine.checkpoint import read_json, weight_files
from pipeline.errors import ModelError


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
            return cls(
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


@dataclass(frozen=True, slots=True)
class Linear:
    weight: Tensor  # [out, in]
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Norm:
    weight: Tensor  # float32: the reference normalises in float32 whatever the activations are
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Block:
    """One transformer layer; queries, keys and values of self-attention in one matrix."""

    attn_norm: Norm
    qkv: Linear  # [3 d, d]
    attn_out: Linear
    mlp_norm: Norm
    up: Linear
    down: Linear
    cross_norm: Norm | None = None  # decoder only, these four
    cross_q: Linear | None = None
    cross_kv: Linear | None = None  # [2 d, d]
    cross_out: Linear | None = None

    def mlp(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


@dataclass(slots=True)
class Lanes:
    """Keys and values of every lane, allocated once. Head size is 64 in every Whisper."""

    self_k: Tensor  # [layers, lanes, heads, n_text_ctx, head]
    self_v: Tensor
    cross_k: Tensor  # [layers, lanes, heads, head, n_audio_ctx]: transposed, so that a query multiplies it as it lies
    cross_v: Tensor  # [layers, lanes, heads, n_audio_ctx, head]

    @property
    def count(self) -> int:
        return self.self_k.shape[1]

    def move(self, source: int, target: int) -> None:
        """Copies a lane's state over another's, to keep the live ones in front."""
        for cache in (self.self_k, self.self_v, self.cross_k, self.cross_v):
            cache[:, target] = cache[:, source]


class WhisperModel:
    """Weights on one device, and the five things the engine does with them."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        config = read_json(folder, "config.json")
        self.dims = Dims.of(config)
        self.device = device
        self.dtype = dtype
        weights = _Weights(folder, device, dtype)
        self._load(weights)
        self.alignment_heads = _alignment_heads(read_json(folder, "generation_config.json"), self.dims)

    def _load(self, weights: _Weights) -> None:
        d, dims = self.dims.n_state, self.dims
        self._conv1 = weights.linear("encoder.conv1", (d, dims.n_mels, 3))
        self._conv2 = weights.linear("encoder.conv2", (d, d, 3))
        self._audio_positions = weights.get("encoder.embed_positions.weight", (dims.n_audio_ctx, d))
        self._encoder = [
            weights.block(f"encoder.layers.{i}", d, dims.n_audio_mlp, cross=False) for i in range(dims.n_audio_layer)
        ]
        self._encoder_norm = weights.norm("encoder.layer_norm", d)
        self._embedding = weights.get("decoder.embed_tokens.weight", (dims.n_vocab, d))
        self._text_positions = weights.get("decoder.embed_positions.weight", (dims.n_text_ctx, d))
        self._decoder = [
            weights.block(f"decoder.layers.{i}", d, dims.n_text_mlp, cross=True) for i in range(dims.n_text_layer)
        ]
        self._decoder_norm = weights.norm("decoder.layer_norm", d)

    # -- encoder ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode(self, mel: Tensor) -> Tensor:
        """Log-mel [b, n_mels, 3000] → hidden states [b, n_audio_ctx, d]."""
        x = F.gelu(F.conv1d(mel.to(self.dtype), self._conv1.weight, self._conv1.bias, padding=1))
        x = F.gelu(F.conv1d(x, self._conv2.weight, self._conv2.bias, stride=2, padding=1))
        x = x.transpose(1, 2) + self._audio_positions
        for block in self._encoder:
            q, k, v = self._split_heads(block.qkv(block.attn_norm(x)), 3, self.dims.n_audio_head)
            y = F.scaled_dot_product_attention(q, k, v)
            x = block.mlp(x + block.attn_out(_merge_heads(y)))
        return self._encoder_norm(x)

    def cross_kv(self, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Hidden states [b, t, d] → each decoder layer's (keys [b, heads, head, t], values [b, heads, t, head])."""
        pairs = []
        for block in self._decoder:
            assert block.cross_kv is not None
            k, v = self._split_heads(block.cross_kv(hidden), 2, self.dims.n_text_head)
            pairs.append((k.transpose(2, 3), v))
        return pairs

    # -- decoder ---------------------------------------------------------------------------------------------

    def allocate(self, lanes: int) -> Lanes:
        dims, heads, head = self.dims, self.dims.n_text_head, self.dims.n_state // self.dims.n_text_head

        def empty(*shape: int) -> Tensor:
            return torch.zeros(dims.n_text_layer, lanes, heads, *shape, device=self.device, dtype=self.dtype)

        return Lanes(
            self_k=empty(dims.n_text_ctx, head),
            self_v=empty(dims.n_text_ctx, head),
            cross_k=empty(head, dims.n_audio_ctx),
            cross_v=empty(dims.n_audio_ctx, head),
        )

    def lane_bytes(self) -> int:
        """Memory of one lane's caches."""
        per_position = self.dims.n_text_layer * self.dims.n_state * 2 * self.dtype.itemsize
        return per_position * (self.dims.n_text_ctx + self.dims.n_audio_ctx)

    @torch.inference_mode()
    def prefill(self, lanes: Lanes, rows: Tensor, hidden: Tensor, tokens: Tensor, wanted: Tensor) -> Tensor:
        """Fills lanes `rows` [b] with their windows' `hidden` [b, t, d] and prompts `tokens` [b, p], padded right.

        Returns float32 logits [b, w, vocab] at the prompt positions `wanted` [b, w]. What the padding leaves in the
        caches lies after the prompt and is overwritten before it is ever read.
        """
        p = tokens.shape[1]
        x = F.embedding(tokens, self._embedding) + self._text_positions[:p]
        for i, (block, (cross_k, cross_v)) in enumerate(zip(self._decoder, self.cross_kv(hidden), strict=True)):
            lanes.cross_k[i, rows] = cross_k
            lanes.cross_v[i, rows] = cross_v
            q, k, v = self._split_heads(block.qkv(block.attn_norm(x)), 3, self.dims.n_text_head)
            lanes.self_k[i, rows, :, :p] = k
            lanes.self_v[i, rows, :, :p] = v
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block.attn_out(_merge_heads(y))
            x = block.mlp(x + self._cross_attend(block, x, cross_k, cross_v)[0])
        x = x.gather(1, wanted[:, :, None].expand(-1, -1, x.shape[2]))
        return self._logits(x)

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
            q, k, v = self._split_heads(block.qkv(block.attn_norm(x)), 3, self.dims.n_text_head)
            lanes.self_k[i][at, :, positions] = k[:, :, 0]
            lanes.self_v[i][at, :, positions] = v[:, :, 0]
            keys, values = lanes.self_k[i, :n, :, :length], lanes.self_v[i, :n, :, :length]
            scores = (q * self._scale) @ keys.transpose(2, 3) + mask
            x = x + block.attn_out(_merge_heads(scores.float().softmax(-1).to(v.dtype) @ values))
            x = block.mlp(x + self._cross_attend(block, x, lanes.cross_k[i, :n], lanes.cross_v[i, :n])[0])
        return self._logits(x)[:, 0]

    @torch.inference_mode()
    def forward(self, hidden: Tensor, tokens: Tensor, with_alignment: bool = False) -> tuple[Tensor, Tensor | None]:
        """A teacher-forced pass without lanes: `tokens` [b, p] on `hidden` [b, t, d].

        Returns float32 logits [b, p, vocab] and, if asked, the alignment heads' raw attention scores
        [b, heads, p, t] before the softmax.
        """
        x = F.embedding(tokens, self._embedding) + self._text_positions[: tokens.shape[1]]
        scores: dict[tuple[int, int], Tensor] = {}
        for i, (block, (cross_k, cross_v)) in enumerate(zip(self._decoder, self.cross_kv(hidden), strict=True)):
            q, k, v = self._split_heads(block.qkv(block.attn_norm(x)), 3, self.dims.n_text_head)
            x = x + block.attn_out(_merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True)))
            y, qk = self._cross_attend(block, x, cross_k, cross_v)
            x = block.mlp(x + y)
            if with_alignment:
                scores |= {(i, h): qk[:, h].float() for layer, h in self.alignment_heads if layer == i}
        alignment = torch.stack([scores[key] for key in self.alignment_heads], dim=1) if with_alignment else None
        return self._logits(x), alignment

    @property
    def _scale(self) -> float:
        """The reference scales queries and keys by head^-1/4 each; for a head of 64 one product by 1/8 is exact."""
        return math.sqrt(self.dims.n_text_head / self.dims.n_state)

    def _cross_attend(self, block: Block, x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Two batched matrix products: with one query row torch's SDPA was measured 3-4 times slower on CPUs."""
        assert block.cross_norm is not None
        assert block.cross_q is not None
        assert block.cross_out is not None
        (q,) = self._split_heads(block.cross_q(block.cross_norm(x)), 1, self.dims.n_text_head)
        qk = (q * self._scale) @ k  # [b, heads, p, t]
        y = qk.float().softmax(-1).to(v.dtype) @ v
        return block.cross_out(_merge_heads(y)), qk

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(self._decoder_norm(x), self._embedding).float()

    def _split_heads(self, x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
        """[b, p, parts · d] → `parts` tensors [b, heads, p, head]."""
        b, p, width = x.shape
        return x.view(b, p, parts, heads, width // parts // heads).permute(2, 0, 3, 1, 4).unbind(0)


def _merge_heads(x: Tensor) -> Tensor:
    """[b, heads, p, head] → [b, p, d]"""
    return x.transpose(1, 2).flatten(2)


def _alignment_heads(generation: dict[str, Any], dims: Dims) -> tuple[tuple[int, int], ...]:
    """The cross-attention heads that follow the audio, (layer, head); by default all of the last half of layers."""
    listed = generation.get("alignment_heads")
    if listed:
        return tuple(sorted((int(layer), int(head)) for layer, head in listed))
    first = dims.n_text_layer // 2
    return tuple((layer, head) for layer in range(first, dims.n_text_layer) for head in range(dims.n_text_head))


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

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        full = self._prefix + name
        if full not in self._files:
            raise ModelError(f"weights: tensor {full} is missing")
        tensor: Tensor = self._files[full].get_tensor(full)
        if tuple(tensor.shape) != shape:
            raise ModelError(f"weights: tensor {full} has shape {tuple(tensor.shape)}, the config needs {shape}")
        return tensor.to(device=self._device, dtype=dtype or self._dtype)

    def norm(self, name: str, d: int) -> Norm:
        return Norm(self.get(f"{name}.weight", (d,), torch.float32), self.get(f"{name}.bias", (d,), torch.float32))

    def linear(self, name: str, shape: tuple[int, ...], bias: bool = True) -> Linear:
        return Linear(self.get(f"{name}.weight", shape), self.get(f"{name}.bias", shape[:1]) if bias else None)

    def fused(self, prefix: str, names: tuple[str, ...], d: int) -> Linear:
        """Several projections of one input as one matrix; Whisper's keys have no bias, so theirs is zero."""
        parts = [self.linear(f"{prefix}.{name}", (d, d), bias=name != "k_proj") for name in names]
        biases = [p.bias if p.bias is not None else torch.zeros_like(p.weight[:, 0]) for p in parts]
        return Linear(torch.cat([p.weight for p in parts]), torch.cat(biases))

    def block(self, name: str, d: int, mlp: int, *, cross: bool) -> Block:
        return Block(
            attn_norm=self.norm(f"{name}.self_attn_layer_norm", d),
            qkv=self.fused(f"{name}.self_attn", ("q_proj", "k_proj", "v_proj"), d),
            attn_out=self.linear(f"{name}.self_attn.out_proj", (d, d)),
            mlp_norm=self.norm(f"{name}.final_layer_norm", d),
            up=self.linear(f"{name}.fc1", (mlp, d)),
            down=self.linear(f"{name}.fc2", (d, mlp)),
            cross_norm=self.norm(f"{name}.encoder_attn_layer_norm", d) if cross else None,
            cross_q=self.linear(f"{name}.encoder_attn.q_proj", (d, d)) if cross else None,
            cross_kv=self.fused(f"{name}.encoder_attn", ("k_proj", "v_proj"), d) if cross else None,
            cross_out=self.linear(f"{name}.encoder_attn.out_proj", (d, d)) if cross else None,
        )
