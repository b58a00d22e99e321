"""The least time that Whisper's arithmetic and its memory traffic can take on a device, stage by stage.

Operations over the rate of the matrix units, bytes over the memory's bandwidth; the larger of the two is a stage's
floor, and a stage's floor over its measured time is the share of it that was reached. A multiply and an add are two
operations. Bytes are those that cannot be avoided: weights once for a batch, what comes in, what goes out, and the
caches that a token reads; what a kernel writes and reads again in between is its own affair.

Plain arithmetic, no tensors: it knows a model's shape and a device's two rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.engine.model import Dims

WINDOW_S = 30
_SAMPLE_BYTES = 2 * 16_000 * WINDOW_S  # one window's int16
_FRAMES = 3000
_LOGIT_BYTES = 4  # the token rules work in float32


@dataclass(frozen=True, slots=True)
class Peak:
    """What a device can do at most."""

    flop_per_s: float  # dense, in the half precision that the engine computes in
    bytes_per_s: float  # of its memory, read or written

    def seconds(self, cost: Cost) -> float:
        """The floor of what costs that much."""
        return max(cost.flop / self.flop_per_s, cost.bytes / self.bytes_per_s)

    def limit(self, cost: Cost) -> str:
        return "operations" if cost.flop / self.flop_per_s >= cost.bytes / self.bytes_per_s else "bytes"


# Makers' figures for dense float16 and the memory, as a first guess where nothing has been measured. Part of the
# device's name → peak; the more special name first.
DATASHEET: Mapping[str, Peak] = {
    "H200": Peak(989e12, 4.8e12),
    "H100 PCIe": Peak(756e12, 2.0e12),
    "H100": Peak(989e12, 3.35e12),
    "A100-SXM4-80GB": Peak(312e12, 2.04e12),
    "A100": Peak(312e12, 1.55e12),
    "L40S": Peak(362e12, 0.864e12),
    "L4": Peak(121e12, 0.3e12),
}


def datasheet_peak(device_name: str) -> Peak | None:
    """The maker's figures for a device by its name (`torch.cuda.get_device_name()`); None: not in the table."""
    return next((peak for name, peak in DATASHEET.items() if name in device_name), None)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a stage must do at least."""

    flop: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flop + other.flop, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flop * times, self.bytes * times)


def encoder_flop(dims: Dims) -> int:
    """Of one window."""
    t, d = dims.n_audio_ctx, dims.n_state
    convolutions = 3 * d * dims.n_mels * 2 * t + 3 * d * d * t
    layer = t * (4 * d * d + 2 * d * dims.n_audio_mlp) + 2 * t * t * d
    return 2 * (convolutions + dims.n_audio_layer * layer)


def mel(dims: Dims, windows: int) -> Cost:
    """PCM in, float32 log-mel out: an FFT of 400 real samples a frame and the filters."""
    flop = _FRAMES * (2.5 * 400 * math.log2(400) + 2 * 201 * dims.n_mels)
    return Cost(windows * flop, windows * (_SAMPLE_BYTES + 4 * _FRAMES * dims.n_mels))


def encoder(dims: Dims, windows: int, itemsize: int) -> Cost:
    """A batch of windows, from log-mel to hidden states."""
    d = dims.n_state
    weights = 3 * d * (dims.n_mels + d) + dims.n_audio_layer * (4 * d * d + 2 * d * dims.n_audio_mlp)
    moved = windows * (4 * _FRAMES * dims.n_mels + itemsize * dims.n_audio_ctx * d)
    return Cost(windows * encoder_flop(dims), itemsize * weights + moved)


def cross_keys_and_values(dims: Dims, windows: int, itemsize: int) -> Cost:
    """Hidden states into the lanes' caches, for every decoder layer."""
    t, d, layers = dims.n_audio_ctx, dims.n_state, dims.n_text_layer
    weights, hidden, written = 2 * layers * d * d, windows * t * d, 2 * layers * windows * t * d
    return Cost(2 * 2 * layers * windows * t * d * d, itemsize * (weights + hidden + written))


def step(dims: Dims, lanes: int, length: float, itemsize: int) -> Cost:
    """One token in each of the lanes, of which `length` are there already; without the vocabulary."""
    d, t, layers = dims.n_state, dims.n_audio_ctx, dims.n_text_layer
    weights = layers * (4 * d * d + 2 * d * d + 2 * d * dims.n_text_mlp)  # self-attention, query and output, mlp
    attention = layers * 2 * (length + t) * d  # scores and sums over keys and values
    cached = layers * 2 * (length + t) * d
    return Cost(2 * lanes * (weights + attention), itemsize * (weights + lanes * cached))


def vocabulary(dims: Dims, lanes: int, itemsize: int) -> Cost:
    """The logits of a step, written once in float32, and read once by the rules."""
    weights = dims.n_state * dims.n_vocab
    return Cost(2 * lanes * weights, itemsize * weights + 2 * _LOGIT_BYTES * lanes * dims.n_vocab)


def per_window(dims: Dims, lanes: int, tokens: int, batch: int, itemsize: int, prompt: int = 3) -> dict[str, Cost]:
    """What one window costs in each stage, with so many lanes full, windows encoded so many together, and `tokens`
    sampled behind `prompt`: its share of every batch it is in."""
    mean_length = prompt + tokens / 2
    return {
        "mel": mel(dims, 1),
        "encoder": encoder(dims, batch, itemsize) * (1 / batch),
        "cross": cross_keys_and_values(dims, batch, itemsize) * (1 / batch),
        "step": step(dims, lanes, mean_length, itemsize) * (tokens / lanes),
        "vocabulary": vocabulary(dims, lanes, itemsize) * (tokens / lanes),
    }


def floor_s(costs: Mapping[str, Cost], peak: Peak) -> float:
    """Seconds a window of all stages one after the other, each at its floor."""
    return sum(peak.seconds(cost) for cost in costs.values())


def ceiling_rtfx(costs: Mapping[str, Cost], peak: Peak) -> float:
    """How many times faster than real time that is."""
    return WINDOW_S / floor_s(costs, peak)


def shares(costs: Mapping[str, Cost], peak: Peak, measured_s: Mapping[str, float]) -> dict[str, dict[str, object]]:
    """Per stage that was measured (seconds a window): its floor, what limits it there, and the share reached."""
    return {
        name: {
            "floor_s": peak.seconds(costs[name]),
            "limit": peak.limit(costs[name]),
            "measured_s": measured_s[name],
            "share_of_floor": peak.seconds(costs[name]) / measured_s[name] if measured_s[name] else None,
        }
        for name in costs
        if name in measured_s
    }
