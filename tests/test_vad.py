"""The detector: the same numbers however audio arrives, Silero's own where the level is normal, and no speech lost."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray
from sounds import MUSIC, hum, noise
from speech import frame_loop, frames, loud_frames, pcm_at, talk

from pipeline import silero, vad
from pipeline.demo.train.synth import Voice, speak
from pipeline.errors import ConfigError
from pipeline.types import SAMPLE_RATE, VAD_FRAME, Pcm
from pipeline.vad import (
    BLOCK_FRAMES,
    MAYBE_SPEECH,
    ROW_FRAMES,
    SURE_SPEECH,
    Frames,
    SileroVad,
    believed,
    detect,
    voice_s,
)

BLOCK = BLOCK_FRAMES * VAD_FRAME


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
    """Probabilities agree to 1e-6, so that here and there one is rounded the other way."""
    pcm = pcm_at(talk(10, longest_pause_s=0.9)[0], -6)
    ours, theirs = detect(pcm).astype(int), frame_loop(pcm).astype(int)
    assert np.abs(ours - theirs).max() <= 1
    assert (ours == theirs).mean() > 0.995


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
    found = detect(pcm_at(noise(colour, 20.0), peak_dbfs))
    assert found.max() < MAYBE_SPEECH


@pytest.mark.parametrize("peak_dbfs", [-6, -66])
def test_hum_is_hardly_ever_doubtful_and_never_speech(peak_dbfs: float) -> None:
    found = detect(pcm_at(hum(50.0, 20.0), peak_dbfs))
    assert (found >= MAYBE_SPEECH).mean() < 0.01
    assert found.max() < SURE_SPEECH


@pytest.mark.parametrize(
    ("drawing", "kept"),
    [
        ("", ""),
        ("50.", "50."),
        ("50. 3# 50.", "50. 3# 50."),  # the least that is believed: 0.1 s of sure speech
        ("50. 2# 50.", "52. 50."),
        ("2#", "2."),  # at the edges too
        ("50. 2# 20? 50.", "50. 2# 20? 50."),  # it lasts
        ("50. 16? 50.", "50. 16? 50."),  # so does this
        ("50. 15? 50.", "115."),
        ("8? 5. 8? 50.", "8? 5. 8? 50."),  # 16 frames of 21
        ("8? 12. 8? 50.", "78."),  # of 28: too far apart
        ("1# 30. 2? 30. 2#", "1# 30. 2? 30. 2#"),  # what lies within a second belongs together
        ("1# 31. 2? 30. 2#", "66."),
        ("2# 40. 200# 40. 2#", "42. 200# 42."),  # speech does not make its neighbours speech
    ],
)
def test_what_sounds_like_speech_for_a_moment_is_not_believed(drawing: str, kept: str) -> None:
    speech = frames(drawing)
    found = believed(speech)
    np.testing.assert_array_equal(found >= MAYBE_SPEECH, frames(kept) >= MAYBE_SPEECH)
    heard = found >= MAYBE_SPEECH
    np.testing.assert_array_equal(found[heard], speech[heard])
    np.testing.assert_array_equal(speech, frames(drawing), "the argument is not changed")


@pytest.mark.parametrize(
    ("drawing", "voice"),
    [
        ("", 0),
        ("50.", 0),
        ("2# 50.", 0),
        ("5. 3# 50.", math.inf),
        ("5. 1# 20. 1# 20. 1#", math.inf),
        ("5. 1# 40. 1# 40. 1#", 0),  # too far apart
        ("5. 6? 1. 6? 50.", 0),
        ("5. 7? 50.", 7 * 0.032),  # the least that is a word in a row: 0.22 s
        ("7?", 7 * 0.032),
        ("9? 5. 7? 40. 8?", 16 * 0.032),  # it lasts: all that is believed
        ("9? 20. 7?", 9 * 0.032),  # the longest run
    ],
)
def test_how_long_there_is_a_voice_by_itself(drawing: str, voice: float) -> None:
    assert voice_s(frames(drawing)) == pytest.approx(voice)


@pytest.mark.parametrize("gap_s", [0.1, 0.5])
@pytest.mark.parametrize("peak_db", [0, -20])
def test_a_word_after_a_sentence_is_a_voice_by_itself(gap_s: float, peak_db: int) -> None:
    """A tenth of a second left out, as where a walk asks; below the sentence by `peak_db`."""
    for accent, text in (("en-us", "yes"), ("de", "ja"), ("es", "sí"), ("en-us", "ten"), ("de", "acht")):
        voice = Voice(accent, "m5", 172)
        before, word = (speak(one, voice).samples for one in ("Felix is here.", text))
        gap = np.zeros(round(gap_s * SAMPLE_RATE), np.float32)
        word = word * np.float32(10 ** (peak_db / 20) * np.abs(before).max() / np.abs(word).max())
        heard = detect(pcm_at(np.concatenate([before, gap, word, gap]), -6))
        assert voice_s(heard[-(-(len(before) + SAMPLE_RATE // 10) // VAD_FRAME) :]), text


@pytest.mark.parametrize("peak_dbfs", [-6, -40, -60])
@pytest.mark.parametrize("kind", ["chords", "arpeggio", "band", "hum 50", "hum 60"])
def test_nothing_in_music_and_hum_is_believed(kind: str, peak_dbfs: float) -> None:
    sound = hum(float(kind[4:]), 16.0) if kind.startswith("hum") else MUSIC[kind](16.0)
    assert (believed(detect(pcm_at(sound, peak_dbfs))) < MAYBE_SPEECH).all()


@pytest.mark.parametrize("peak_dbfs", [-6, -50, -60])
def test_all_of_speech_is_believed(peak_dbfs: float) -> None:
    found = detect(pcm_at(talk(20)[0], peak_dbfs))
    lost = (found >= MAYBE_SPEECH) & (believed(found) < MAYBE_SPEECH)
    assert lost.sum() <= 4, "a breath at most"


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
    monkeypatch.setattr(vad, "probabilities", lambda *_: pytest.fail("the network was asked"))
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "needs the package silero-vad"),
        (b"", "another network"),
        (b"\x80\x02}q\x00." * 99, "another network"),
        ("silero_vad_16k_op15.onnx", "another network"),
    ],
    ids=["missing", "empty", "no ONNX", "another"],
)
def test_another_network_is_refused_not_misread(
    content: bytes | str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "silero_vad"
    (package / "data").mkdir(parents=True)
    if content is not None:
        data = silero.model_path().with_name(content).read_bytes() if isinstance(content, str) else content
        (package / "data" / silero.MODEL).write_bytes(data)
    spec = SimpleNamespace(origin=str(package / "__init__.py"))
    monkeypatch.setattr(silero, "find_spec", lambda _: spec)
    with pytest.raises(ConfigError, match=message):
        silero._session.__wrapped__()


def test_torch_stays_out() -> None:
    """Loading the network through the package would import torch: seconds and 500 MB in every decode process."""
    code = (
        "import sys, numpy as np; from pipeline.vad import detect; "
        "detect(np.arange(16000, dtype=np.int16)); assert not {'torch', 'silero_vad'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
