"""The detector: the same numbers however audio arrives, Silero's own where the level is normal, and no speech lost."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from speech import loud_frames, pcm_at, talk

from pipeline import vad
from pipeline.types import SAMPLE_RATE, VAD_FRAME, Pcm
from pipeline.vad import BLOCK_FRAMES, MAYBE_SPEECH, ROW_FRAMES, SURE_SPEECH, Frames, SileroVad, detect

BLOCK = BLOCK_FRAMES * VAD_FRAME


def frame_loop(pcm: Pcm) -> Frames:
    """The plain streaming run of Silero's other packaged network: one frame a call, nothing before it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    network = onnxruntime.InferenceSession(str(vad._model_path().with_name("silero_vad.onnx")), options)
    audio = np.pad(pcm, (64, -len(pcm) % VAD_FRAME)).astype(np.float32) / 32768
    state, found = np.zeros((2, 1, 128), np.float32), []
    for at in range(0, len(audio) - 64, VAD_FRAME):
        chunk = audio[None, at : at + 64 + VAD_FRAME]
        probability, state = network.run(None, {"input": chunk, "state": state, "sr": np.array(SAMPLE_RATE)})
        found.append(probability.item())
    return np.asarray(np.rint(np.array(found) * 255), np.uint8)


def in_pieces(pcm: Pcm, sizes: list[int]) -> Frames:
    detector, at = SileroVad(), 0
    found: list[Frames] = []
    while at < len(pcm):
        size = sizes[len(found) % len(sizes)]
        found.append(detector.push(pcm[at : at + size]))
        at += size
    return np.concatenate([*found, detector.finish()])


@pytest.mark.parametrize(
    ("n_samples", "n_frames"),
    [
        (0, 0),
        (1, 1),
        (VAD_FRAME - 1, 1),
        (VAD_FRAME, 1),
        (VAD_FRAME + 1, 2),
        (ROW_FRAMES * VAD_FRAME, ROW_FRAMES),
        (BLOCK, BLOCK_FRAMES),
        (BLOCK + 1, BLOCK_FRAMES + 1),
    ],
)
@pytest.mark.parametrize("level", [0, 8000])
def test_one_number_a_frame(n_samples: int, n_frames: int, level: int) -> None:
    pcm = (np.random.default_rng(0).standard_normal(n_samples) * level).astype(np.int16)
    found = detect(pcm)
    assert found.shape == (n_frames,)
    assert found.dtype == np.uint8


@pytest.mark.parametrize(
    "sizes",
    [[9_997], [16_000], [BLOCK], [BLOCK - 1, 1], [1, VAD_FRAME, 50_000, 0, 333_333], [10_000_000]],
    ids=str,
)
@pytest.mark.parametrize("peak_dbfs", [-6, -60])
def test_the_same_samples_give_the_same_numbers_in_any_pieces(sizes: list[int], peak_dbfs: float) -> None:
    audio, _ = talk(20)
    pcm = pcm_at(audio, peak_dbfs)
    assert len(pcm) > BLOCK
    np.testing.assert_array_equal(in_pieces(pcm, sizes), detect(pcm))


def test_speech_at_a_normal_level_gets_what_silero_gives_frame_by_frame() -> None:
    pcm = pcm_at(talk(10, longest_pause_s=0.9)[0], -6)
    np.testing.assert_array_equal(detect(pcm), frame_loop(pcm))


def test_leaving_silence_out_hardly_changes_a_decision() -> None:
    pcm = pcm_at(talk(20)[0], -6)
    ours, theirs = detect(pcm), frame_loop(pcm)
    assert (ours != theirs).any()
    for bar in (MAYBE_SPEECH, SURE_SPEECH):
        assert ((ours >= bar) == (theirs >= bar)).mean() > 0.995


@pytest.mark.parametrize("peak_dbfs", [0, -20, -40, -60])
def test_speech_is_found_at_any_level(peak_dbfs: float) -> None:
    audio, _ = talk(20)
    found, voiced = detect(pcm_at(audio, peak_dbfs)), loud_frames(audio)
    assert (found[: len(voiced)][voiced] >= MAYBE_SPEECH).mean() > 0.995
    assert (found[: len(voiced)][voiced] >= SURE_SPEECH).mean() > 0.98


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(
            lambda x: x + np.random.default_rng(0).standard_normal(len(x)).astype(np.float32) / 30,
            id="white noise, 10 dB",
        ),
        pytest.param(lambda x: x * 0.5 + 0.5, id="constant offset"),
        pytest.param(lambda x: np.clip(x * 20, -1, 1), id="clipped 20 times over"),
        pytest.param(lambda x: -x, id="polarity"),
        pytest.param(lambda x: np.concatenate([[1.0], x[1:] / 100]).astype(np.float32), id="40 dB below a click"),
    ],
)
def test_speech_is_found_in_bad_audio(spoil: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> None:
    audio, _ = talk(20)
    found, voiced = detect(pcm_at(spoil(audio), 0)), loud_frames(audio)
    assert (found[: len(voiced)][voiced] >= MAYBE_SPEECH).mean() > 0.985


@pytest.mark.parametrize("peak_dbfs", [-6, -40, -66])
@pytest.mark.parametrize("colour", ["white", "pink", "brown"])
def test_noise_is_not_speech(colour: str, peak_dbfs: float) -> None:
    spectrum = np.fft.rfft(np.random.default_rng(1).standard_normal(20 * SAMPLE_RATE))
    slope = {"white": 0.0, "pink": 0.5, "brown": 1.0}[colour]
    noise = np.fft.irfft(spectrum / np.maximum(np.arange(len(spectrum)), 1) ** slope)
    found = detect(pcm_at((noise / np.abs(noise).max()).astype(np.float32), peak_dbfs))
    assert found.max() < MAYBE_SPEECH


@pytest.mark.parametrize("peak_dbfs", [-6, -66])
def test_hum_is_hardly_ever_doubtful_and_never_speech(peak_dbfs: float) -> None:
    t = np.arange(20 * SAMPLE_RATE) / SAMPLE_RATE
    hum = sum(np.sin(2 * np.pi * 50 * k * t) / k for k in range(1, 12))
    found = detect(pcm_at((hum / np.abs(hum).max()).astype(np.float32), peak_dbfs))
    assert (found >= MAYBE_SPEECH).mean() < 0.01
    assert found.max() < SURE_SPEECH


@pytest.mark.parametrize(
    "pcm",
    [
        np.zeros(40 * SAMPLE_RATE, np.int16),
        np.full(40 * SAMPLE_RATE, 16_384, np.int16),  # a constant offset is silence too
        np.random.default_rng(0).integers(-3, 4, 40 * SAMPLE_RATE).astype(np.int16),  # dither
    ],
    ids=["zeros", "offset", "dither"],
)
def test_near_silence_never_reaches_the_network(pcm: Pcm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vad, "_session", lambda: pytest.fail("the network was asked"))
    assert not detect(pcm).any()


def test_only_loud_rows_reach_the_network_and_their_neighbours() -> None:
    row = ROW_FRAMES * VAD_FRAME
    block = np.zeros(10 * row, np.int16)
    block[5 * row + 7] = 10_000
    shown, live = vad.prepare(block, np.zeros(64, np.int16))
    assert np.flatnonzero(live).tolist() == list(range(4 * ROW_FRAMES, 7 * ROW_FRAMES))
    assert shown.shape == (3 * ROW_FRAMES, 64 + VAD_FRAME)


@pytest.mark.parametrize(
    ("peak", "gain"),
    [
        (32_767, 0.1),  # clipped
        (20_000, 1.0),  # loud: as it is
        (3_277, 1.0),  # at the bar
        (328, 10.0),  # brought to the bar
        (33, 99.3),  # -60 dBFS
        (8, 100.0),  # bounded
    ],
)
def test_rows_are_levelled(peak: int, gain: float) -> None:
    block = np.zeros(ROW_FRAMES * VAD_FRAME, np.int16)
    block[::2], block[1::2] = peak, -peak
    shown, _ = vad.prepare(block, np.zeros(64, np.int16))
    assert np.abs(shown).max() == pytest.approx(peak / 32768 * gain, rel=0.01)


def test_torch_stays_out() -> None:
    """Loading the network through the package would import torch: seconds and 500 MB in every decode process."""
    code = (
        "import sys, numpy as np; from pipeline.vad import detect; "
        "detect(np.arange(16000, dtype=np.int16)); assert not {'torch', 'silero_vad'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
