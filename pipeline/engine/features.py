"""int16 PCM → the encoder's log-mel input, on the engine's device (openai/whisper `audio.py`).

A span is treated as the reference treats a file: 30 s of zeros follow it, the ends are reflected, frames are 10 ms.
Frames are computed where they are needed, so a two-hour span never has its whole mel in memory. It knows nothing of
models beyond the number of mel bands.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.types import SAMPLE_RATE, Pcm

N_FFT = 400
HOP = 160  # samples: 10 ms a frame
N_SAMPLES = 30 * SAMPLE_RATE  # one encoder input
N_FRAMES = N_SAMPLES // HOP  # 3000
FRAMES_PER_SECOND = SAMPLE_RATE // HOP
_RANGE = 8.0  # decades kept below the maximum


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

    def maximum_of(self, pcm: Pcm) -> float:
        """The log-mel maximum of the whole padded span, a window at a time."""
        content = len(pcm) // HOP + 3
        parts = ((start, min(N_FRAMES, content - start)) for start in range(0, content, N_FRAMES))
        return max(float(self._log10(pcm, *part).max()) for part in parts)

    def _log10(self, pcm: Pcm, start: int, n_frames: int) -> Tensor:
        """log10 of the mel power of frames [start, start + n_frames), [n_mels, n_frames], not below -10."""
        samples = torch.from_numpy(_cut(pcm, start * HOP - N_FFT // 2, (start + n_frames - 1) * HOP + N_FFT // 2))
        wave = samples.to(self.device).float() / 32768.0
        spectrum = torch.stft(wave, N_FFT, HOP, window=self._hann, center=False, return_complex=True)
        power = spectrum.abs() ** 2
        return torch.clamp(self._filters @ power, min=1e-10).log10()


def _cut(pcm: Pcm, start: int, stop: int) -> Pcm:
    """Samples [start, stop) of a span that is mirrored before its first sample and followed by zeros."""
    out = np.zeros(stop - start, np.int16)
    first, last = max(start, 0), min(stop, len(pcm))
    if last > first:
        out[first - start : last - start] = pcm[first:last]
    if start < 0:
        mirrored = np.zeros(-start, np.int16)
        mirror = pcm[1 : 1 - start]
        mirrored[: len(mirror)] = mirror
        out[:-start] = mirrored[::-1]
    return out


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
