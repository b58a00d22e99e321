"""Log-mel windows against the reference's whole-file spectrogram."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import whisper

from pipeline.engine.features import N_FRAMES, LogMel
from pipeline.types import Pcm


def noise(n: int) -> Pcm:
    ramp = np.linspace(0.0, 1.0, n)
    return (np.random.default_rng(n).standard_normal(n) * 3000 * ramp).clip(-32768, 32767).astype(np.int16)


def reference(pcm: Pcm, n_mels: int) -> torch.Tensor:
    return whisper.log_mel_spectrogram(pcm.astype(np.float32) / 32768, n_mels, padding=480_000)


# Shorter than a hop, around one, shorter than the STFT's reach, whole windows, several windows.
@pytest.mark.parametrize("n", [1, 159, 160, 399, 1000, 16_000, 480_000, 1_234_567])
@pytest.mark.parametrize("n_mels", [80, 128])
def test_windows_of_a_span_are_the_file_s(n: int, n_mels: int) -> None:
    pcm, mel = noise(n), LogMel(n_mels, torch.device("cpu"))
    expected, top = reference(pcm, n_mels), mel.maximum_of(pcm)
    content = expected.shape[-1] - N_FRAMES
    for start in range(0, content, N_FRAMES):
        size = min(N_FRAMES, content - start)
        window = whisper.pad_or_trim(expected[:, start : start + size], N_FRAMES)
        assert torch.allclose(mel.window(pcm, start, size, top), window, atol=1e-5)


def test_a_window_s_own_maximum_is_that_of_the_window_as_a_file() -> None:
    pcm, mel = noise(160_000), LogMel(80, torch.device("cpu"))
    expected = whisper.pad_or_trim(reference(pcm, 80)[:, :1000], N_FRAMES)
    assert torch.allclose(mel.window(pcm, 0, 1000), expected, atol=1e-5)
    # A loud end elsewhere in the span does not reach into the first second.
    quiet = mel.window(pcm, 0, 100)
    assert not torch.allclose(quiet, mel.window(pcm, 0, 100, mel.maximum_of(pcm)), atol=1e-3)


def test_read_only_samples() -> None:
    """What Ray hands over cannot be written to."""
    pcm = noise(16_000)
    pcm.setflags(write=False)
    assert torch.isfinite(LogMel(80, torch.device("cpu")).window(pcm, 0, 100)).all()
