"""int16 PCM → the encoder's log-mel input, on the engine's device (openai/whisper `audio.py`).

A span is treated as the reference treats a file: 30 s of zeros follow it, the ends are reflected, frames are 10 ms.
Frames are computed where they are needed, so a two-hour span never has its whole mel in memory. It knows nothing of
models beyond the number of mel bands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.device import Device
from pipeline.types import SAMPLE_RATE, Pcm

N_FFT = 400
HOP = 160  # samples: 10 ms a frame
N_SAMPLES = 30 * SAMPLE_RATE  # one encoder input
N_FRAMES = N_SAMPLES // HOP  # 3000
FRAMES_PER_SECOND = SAMPLE_RATE // HOP
_RANGE = 8.0  # decades kept below the maximum
_REACH = N_FRAMES + 3  # frames that a window's maximum is taken over, at most


@dataclass(frozen=True, slots=True)
class Cut:
    """A window of a span: frames [start, start + n_frames) of `pcm`; `maximum` as in `LogMel.window`."""

    pcm: Pcm
    start: int
    n_frames: int
    maximum: float | None = None


class LogMel:
    """The mel filters and the STFT's window on one device; float32 whatever the model computes in."""

    def __init__(self, n_mels: int, device: torch.device) -> None:
        self.n_mels = n_mels
        self.device = device
        self._hann = torch.hann_window(N_FFT, device=device)
        self._filters = torch.from_numpy(_mel_filters(n_mels)).to(device)  # [n_mels, 201]

    def window(self, pcm: Pcm, start: int, n_frames: int, maximum: float | None = None) -> Tensor:
        """Frames [start, start + n_frames) of the span `pcm` as an encoder input, [n_mels, 3000].

        `maximum` is the log-mel maximum that the 8-decade clamp starts from: the span's (`maximum_of`), or None
        for the window's own. Frames past the window are literal zeros, as in the reference.
        """
        if n_frames > N_FRAMES:
            raise ValueError(f"{n_frames} frames in a window of {N_FRAMES}")
        content = len(pcm) // HOP
        reach = n_frames + 3 if start + n_frames >= content else n_frames  # the last samples lie in the next frames
        frames = self._log10(pcm, start, reach)
        top = frames.max() if maximum is None else torch.tensor(maximum, device=self.device)
        mel = (torch.maximum(frames[:, :n_frames], top - _RANGE) + 4.0) / 4.0
        return torch.nn.functional.pad(mel, (0, N_FRAMES - n_frames))

    def windows(self, cuts: Sequence[Cut], device: Device) -> Tensor:
        """As `window`, for many at once and without waiting for the device: [b, n_mels, 3000].

        Every row is cut as long as the longest could be and what lies past its window is masked, so that shapes, and
        with them kernels, are always the same.
        """
        too_long = next((cut.n_frames for cut in cuts if cut.n_frames > N_FRAMES), None)
        if too_long is not None:
            raise ValueError(f"{too_long} frames in a window of {N_FRAMES}")
        staged = device.staging((len(cuts), (_REACH - 1) * HOP + N_FFT), torch.int16)
        limits = device.staging((len(cuts), 3), torch.float32)  # frames to look at, frames kept, the given maximum
        for row, limit, cut in zip(staged.numpy(), limits, cuts, strict=True):
            _cut_into(row, cut.pcm, cut.start * HOP - N_FFT // 2)
            beyond = 3 if cut.start + cut.n_frames >= len(cut.pcm) // HOP else 0
            maximum = float("nan") if cut.maximum is None else cut.maximum
            limit.copy_(torch.tensor([cut.n_frames + beyond, cut.n_frames, maximum]))
        reach, kept, given = device.upload(limits)[:, :, None, None].unbind(1)  # [b, 1, 1] each
        frames = self._log10_of(device.upload(staged))
        places = torch.arange(_REACH, device=self.device)
        own = frames.masked_fill(places >= reach, float("-inf")).amax((1, 2), keepdim=True)
        top = torch.where(given.isnan(), own, given)
        mel = (torch.maximum(frames[:, :, :N_FRAMES], top - _RANGE) + 4.0) / 4.0
        return mel.masked_fill_(places[:N_FRAMES] >= kept, 0.0)

    def maximum_of(self, pcm: Pcm) -> float:
        """The log-mel maximum of the whole padded span, a window at a time."""
        content = len(pcm) // HOP + 3
        parts = ((start, min(N_FRAMES, content - start)) for start in range(0, content, N_FRAMES))
        return float(torch.stack([self._log10(pcm, *part).max() for part in parts]).max())  # the host is asked once

    def _log10(self, pcm: Pcm, start: int, n_frames: int) -> Tensor:
        """log10 of the mel power of frames [start, start + n_frames), [n_mels, n_frames], not below -10."""
        samples = np.empty((n_frames - 1) * HOP + N_FFT, np.int16)
        _cut_into(samples, pcm, start * HOP - N_FFT // 2)
        return self._log10_of(torch.from_numpy(samples).to(self.device))

    def _log10_of(self, samples: Tensor) -> Tensor:
        """The same of the frames that lie in int16 `samples` [..., t], [..., n_mels, n_frames]."""
        wave = samples.float() / 32768.0
        spectrum = torch.stft(wave, N_FFT, HOP, window=self._hann, center=False, return_complex=True)
        power = spectrum.abs() ** 2
        return torch.clamp(self._filters @ power, min=1e-10).log10()


def _cut_into(out: Pcm, pcm: Pcm, start: int) -> None:
    """Samples from `start` on, as many as `out` takes, of a span that is mirrored before its first sample and followed
    by zeros."""
    first = max(start, 0)
    last = max(first, min(start + len(out), len(pcm)))
    out[first - start : last - start] = pcm[first:last]
    out[last - start :] = 0
    if start < 0:
        mirrored = np.zeros(-start, np.int16)
        mirror = pcm[1 : 1 - start]
        mirrored[: len(mirror)] = mirror
        out[:-start] = mirrored[::-1]


def _mel_filters(n_mels: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Slaney's triangular filters from 0 to 8 kHz, area-normalised, [n_mels, 201]."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(
        num_frequency_bins=1 + N_FFT // 2,
        num_mel_filters=n_mels,
        min_frequency=0.0,
        max_frequency=SAMPLE_RATE / 2,
        sampling_rate=SAMPLE_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return np.ascontiguousarray(filters.T, dtype=np.float32)
