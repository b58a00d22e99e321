"""What Whisper's network is made of, in the form that is fastest on the device it stands on.

On x86 processors weights are laid out once for oneDNN's kernels, and a layer's activation or residual sum is done
while its product is still in the cache. Measured on one core of a Xeon with AMX in bfloat16 against
`torch.nn.functional`: a projection of 16 rows 1.7-2.0 times faster, Whisper's vocabulary 1.8 times, the feed-forward
layer of 6,000 rows with its GELU 1.2 times, in float32 1.3 times for 16 rows and the same for 6,000. In float32 a
row's product also does not depend on how many rows there are, to the last bit, which it does in MKL's.

Not in int8: on two cores of that Xeon oneDNN's product of 6,000 rows takes half to two thirds of bfloat16's time, but
to quantise its rows with torch's operations takes the rest (512 to 2,048: 12.2 ms, 7.9 and with quantising 11.9; 2,048
to 512: 7.4, 3.6 and 61), with one scale for all of them known beforehand, at that. The vocabulary gains 0.5 ms of a
step's 32.

This page knows matrices; what they mean is `model.py`'s.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.machine import has_amx, has_bfloat16


class Linear:
    """x W^T + b with `weight` [out, in]; its methods are what follows such a product in a transformer."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.bias = bias
        self._packed = _is_packable(weight)
        # 16 rows are a decoder's step; the layout that suits it was as fast as any for 6,000.
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 16) if self._packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        if not self._packed:
            return F.linear(x, self._weight, self.bias)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
        return result

    def gelu(self, x: Tensor) -> Tensor:
        """GELU (by the error function) of the product."""
        if not self._packed:
            return F.gelu(F.linear(x, self._weight, self.bias))
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "gelu", [], "none")
        return result

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """`residual` plus the product."""
        if not self._packed:
            return residual + F.linear(x, self._weight, self.bias)
        result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self.bias, "add")
        return result


def _is_packable(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and has_bfloat16())


@dataclass(frozen=True, slots=True)
class Norm:
    """Layer normalisation, computed in float32 whatever the activations are, as in the reference: torch's kernels
    convert on the way, which on a CPU in bfloat16 was 8 times faster than to convert before and after."""

    weight: Tensor  # float32 on a CPU; on a GPU of the activations' dtype, the only one that its kernel takes
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias)


class Convolution:
    """A 1-d convolution of width 3 with padding 1, then GELU, as one product over overlapping rows.

    Channels last: [b, t, in] → [b, t / stride, out]. In bfloat16 on a CPU 5 times faster than `conv1d`.
    """

    def __init__(self, weight: Tensor, bias: Tensor, stride: int) -> None:
        self._linear = Linear(weight.transpose(1, 2).flatten(1).contiguous(), bias)  # [out, 3 · in]
        self._stride = stride

    def __call__(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        padded = F.pad(x, (0, 0, 1, 1))
        rows = padded.as_strided((b, t // self._stride, 3 * width), ((t + 2) * width, self._stride * width, 1))
        return self._linear.gelu(rows.contiguous())


class Transposed:
    """(x W^T + b)^T: [b, t, in] → [b, out, t], written as it is going to be read."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        weight = self._weight.expand(x.shape[0], -1, -1)
        if self._bias is None:
            return torch.bmm(weight, x.transpose(1, 2))
        return torch.baddbmm(self._bias[:, None], weight, x.transpose(1, 2))


class Cross:
    """A decoder layer's attention to the audio: cached keys and values are read once for every token.

    With one query row a lane, memory is the limit, and what comes near it differs. Measured with 16 lanes of 8 heads
    on one core of a Xeon with AMX: in bfloat16 torch's fused attention takes 5.3 ms, two batched products 6.6; in
    float32 11.0 and 6.9, there with keys and values that lie transposed. On processors without AMX the fused one was
    3-4 times slower in bfloat16.
    """

    def __init__(
        self, norm: Norm, query: Linear, key: Tensor, value: Tensor, value_bias: Tensor, out: Linear, heads: int
    ) -> None:
        self.norm, self.query, self.out, self._heads = norm, query, out, heads
        self._is_fused = cross_attention_is_fused(key.dtype, key.device)
        form = Linear if self._is_fused else Transposed
        self._key: Linear | Transposed = form(key, None)  # keys have no bias in Whisper
        self._value: Linear | Transposed = form(value, value_bias)

    def keys_and_values(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder states [b, t, d] → keys and values [b, heads, t, head]."""
        k, v = self._key(hidden), self._value(hidden)
        b, t = hidden.shape[:2]
        if self._is_fused:
            by_heads = b, t, self._heads, -1
            return k.view(by_heads).transpose(1, 2), v.view(by_heads).transpose(1, 2)
        return k.view(b, self._heads, -1, t).mT, v.view(b, self._heads, -1, t).mT

    def attend(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """x [b, p, d] → x with what it found in the audio added."""
        return self.out.added_to(x, merge_heads(self._find(self._queries(x), keys, values)))

    def attend_in_lanes(
        self, x: Tensor, keys: Tensor, values: Tensor, lanes: Sequence[int], heads: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """The same for x whose audio lies in `lanes` of a cache, which are not copied; and the scores of `heads`
        before the softmax, [b, heads, p, t]."""
        found, scores = [], []
        for q, lane in zip(torch.split(self._queries(x), 1), lanes, strict=True):
            k, v = keys[lane : lane + 1], values[lane : lane + 1]
            found.append(self._find(q, k, v))
            scores.append(_scores(q[:, heads], k[:, heads]))
        return self.out.added_to(x, merge_heads(torch.cat(found))), torch.cat(scores)

    def _find(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if self._is_fused:
            return F.scaled_dot_product_attention(q, keys, values)
        return _scores(q, keys).softmax(-1) @ values

    def _queries(self, x: Tensor) -> Tensor:
        return split_heads(self.query(self.norm(x)), 1, self._heads)[0]


def _scores(q: Tensor, keys: Tensor) -> Tensor:
    scores: Tensor = (q * q.shape[-1] ** -0.5) @ keys.mT
    return scores


def cross_attention_is_fused(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether cached keys and values lie [t, head], for torch's fused attention, or transposed, for two products."""
    if device.type == "cuda":  # not measured yet: `tests/benchmarks/cuda.py` times both
        return True
    return dtype == torch.bfloat16 and device.type == "cpu" and has_amx()


@dataclass(frozen=True, slots=True)
class Block:
    """One transformer layer; queries, keys and values of self-attention in one matrix."""

    attn_norm: Norm
    qkv: Linear  # [3 d, d]
    attn_out: Linear
    mlp_norm: Norm
    up: Linear
    down: Linear
    cross: Cross | None = None  # in the decoder

    def mlp(self, x: Tensor) -> Tensor:
        return self.down.added_to(x, self.up.gelu(self.mlp_norm(x)))


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """[b, p, parts · d] → `parts` tensors [b, heads, p, head]."""
    b, p, width = x.shape
    return x.view(b, p, parts, heads, width // parts // heads).permute(2, 0, 3, 1, 4).unbind(0)


def merge_heads(x: Tensor) -> Tensor:
    """[b, heads, p, head] → [b, p, d]"""
    return x.transpose(1, 2).flatten(2)
