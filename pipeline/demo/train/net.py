"""The network: Whisper's architecture on the reduced vocabulary, with two more heads that only training uses.

Its modules bear Hugging Face's names, so exporting is little more than leaving those heads out.
Knows nothing about data, losses or files.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N_ORDERS = 32  # sentences of a window that the training heads tell apart


@dataclass(frozen=True, slots=True)
class NetConfig:
    """Sizes. `n_rows` counts the reduced vocabulary with its dummy row, which stands for `n_unused` tokens."""

    n_rows: int
    n_unused: int
    n_timestamps: int = 1_501
    d_model: int = 192
    heads: int = 3
    encoder_layers: int = 4
    decoder_layers: int = 4
    n_mels: int = 80
    n_positions: int = 1_500
    n_slots: int = 448
    n_character_classes: int = 39


@dataclass(frozen=True, slots=True)
class Decoded:
    """What the decoder gives for b sequences of l slots over t encoder positions."""

    logits: Tensor  # [b, l, rows]
    alignments: tuple[Tensor, ...]  # [b, l, t] log-probabilities, for each layer that was asked for
    orders: Tensor  # [b, l, N_ORDERS]


def sinusoids(length: int, width: int) -> Tensor:
    """[length, width]: sines in the first half, cosines in the second, wavelengths from 2 pi to 20,000 pi."""
    step = math.log(10_000) / (width // 2 - 1)
    angles = torch.arange(length)[:, None] * torch.exp(-step * torch.arange(width // 2))[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Attention(nn.Module):
    """Multi-head attention; keys have no bias."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, memory: Tensor | None = None, *, causal: bool = False) -> Tensor:
        source = x if memory is None else memory
        q, k, v = (self._split(y) for y in (self.q_proj(x), self.k_proj(source), self.v_proj(source)))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        projected: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return projected

    def alignment(self, x: Tensor, memory: Tensor) -> Tensor:
        """[b, l, t]: where head 0 looks, as log-probabilities."""
        q, k = self._split(self.q_proj(x))[:, 0], self._split(self.k_proj(memory))[:, 0]
        scores: Tensor = (q @ k.transpose(1, 2)).float() / math.sqrt(q.shape[-1])
        return scores.log_softmax(-1)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class Layer(nn.Module):
    """What both kinds of layer have: self-attention and a feed-forward part, each behind its norm."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(d_model)
        self.self_attn = Attention(d_model, heads)
        self.final_layer_norm = nn.LayerNorm(d_model)
        self.fc1 = nn.Linear(d_model, 4 * d_model)
        self.fc2 = nn.Linear(4 * d_model, d_model)

    def feed_forward(self, x: Tensor) -> Tensor:
        widened: Tensor = self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))
        return x + widened


class EncoderLayer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return self.feed_forward(x)


class DecoderLayer(Layer):
    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__(d_model, heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(d_model)
        self.encoder_attn = Attention(d_model, heads)

    def forward(self, x: Tensor, memory: Tensor, *, align: bool) -> tuple[Tensor, Tensor | None]:
        """The layer's output and, when asked for, where its cross-attention looks."""
        x = x + self.self_attn(self.self_attn_layer_norm(x), causal=True)
        query = self.encoder_attn_layer_norm(x)
        x = self.feed_forward(x + self.encoder_attn(query, memory))
        return x, self.encoder_attn.alignment(query, memory) if align else None


class Encoder(nn.Module):
    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        width = config.d_model
        self.conv1 = nn.Conv1d(config.n_mels, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.n_positions, width)
        self.embed_positions.weight.requires_grad_(False).copy_(sinusoids(config.n_positions, width))
        self.layers = nn.ModuleList(EncoderLayer(width, config.heads) for _ in range(config.encoder_layers))
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, mels: Tensor, first_positions: Tensor) -> Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(mels)))).transpose(1, 2)
        positions = first_positions[:, None] + torch.arange(x.shape[1], device=x.device)
        x = x + self.embed_positions(positions)
        for layer in self.layers:
            x = layer(x)
        normed: Tensor = self.layer_norm(x)
        return normed


class Decoder(nn.Module):
    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        width = config.d_model
        self.embed_tokens = nn.Embedding(config.n_rows, width)
        self.embed_positions = nn.Embedding(config.n_slots, width)
        self.layers = nn.ModuleList(DecoderLayer(width, config.heads) for _ in range(config.decoder_layers))
        self.layer_norm = nn.LayerNorm(width)


class Net(nn.Module):
    """Encoder, decoder and the heads of training: characters by CTC, and which sentence is heard or written."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.character_head = nn.Linear(config.d_model, config.n_character_classes)
        self.heard_order_head = nn.Linear(config.d_model, N_ORDERS)
        self.written_order_head = nn.Linear(config.d_model, N_ORDERS)
        _initialise(self)

    def encode(self, mels: Tensor, first_positions: Tensor) -> Tensor:
        """[b, mels, 2 t] -> [b, t, d]; a window may begin anywhere among the encoder's positions."""
        memory: Tensor = self.encoder(mels, first_positions)
        return memory

    def decode(self, tokens: Tensor, slots: Tensor, memory: Tensor, align_layers: Collection[int] = ()) -> Decoded:
        """[b, l] rows and their slots -> logits; the first layer also says which sentence it writes."""
        decoder = self.decoder
        x = decoder.embed_tokens(tokens) + decoder.embed_positions(slots)
        alignments: list[Tensor] = []
        orders = x
        for index, layer in enumerate(decoder.layers):
            x, alignment = layer(x, memory, align=index in align_layers)
            orders = self.written_order_head(x) if index == 0 else orders
            alignments += [] if alignment is None else [alignment]
        logits = (decoder.layer_norm(x) @ decoder.embed_tokens.weight.T).float()
        return Decoded(self._with_unused(logits), tuple(alignments), orders)

    def _with_unused(self, logits: Tensor) -> Tensor:
        """The dummy row counts for all unused tokens, so the softmax is that of the full table."""
        dummy = logits[..., -1:] + math.log(self.config.n_unused)
        return torch.cat([logits[..., :-1], dummy], dim=-1)


@torch.no_grad()
def _initialise(net: Net) -> None:
    """Small residual branches; positions and timestamps start as sinusoids, so that neighbours are alike."""
    width, config = net.config.d_model, net.config
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.7 * width**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in net.modules():
        if isinstance(module, Layer):
            nn.init.normal_(module.self_attn.out_proj.weight, 0, 0.4 * width**-0.5)
            nn.init.normal_(module.fc2.weight, 0, 0.4 * (4 * width) ** -0.5)
    tokens, slots = net.decoder.embed_tokens.weight, net.decoder.embed_positions.weight
    nn.init.normal_(tokens, 0, 0.04)
    nn.init.normal_(slots, 0, 0.01)
    slots += 0.05 * sinusoids(config.n_slots, width)
    timestamps = tokens[-1 - config.n_timestamps : -1]
    timestamps.copy_(0.05 * sinusoids(config.n_timestamps, width) + 0.005 * torch.randn_like(timestamps))


def silence_new_layers(net: Net, first_layer: int) -> None:
    """Decoder layers from `first_layer` on pass their input through unchanged, until they are trained."""
    for layer in net.decoder.layers[first_layer:]:
        assert isinstance(layer, DecoderLayer)
        for module in (layer.self_attn.out_proj, layer.encoder_attn.out_proj, layer.fc2):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
