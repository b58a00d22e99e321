"""Sounds that are no speech, and speech that is hard to hear, from a file to its transcript on the demo model.

No text where nobody speaks, no crash, finite numbers; quiet speech is not cut away. Two limits are those of the demo
model, not of the engine. Hum, music and clicks are no speech to the detector, so by default they give no text; without
a detector the model makes sentences of them, as the reference does with the same weights: it was trained on speech,
noise and silence. And it mishears what peaks below -45 dBFS, sooner still in the reference's windows.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pytest
from numpy.typing import NDArray
from sounds import MUSIC, hum, noise
from speech import pcm_at

from pipeline.config import Config, load_config
from pipeline.demo.train.heldout import Clip, make_clip, make_long
from pipeline.engine.local import LocalEngine
from pipeline.scoring import word_score
from pipeline.stitch import UNCOVERED, stitch
from pipeline.transcribe import transcribe
from pipeline.types import SAMPLE_RATE, DecodeOptions, Pcm, Recording, Transcript, Unit
from pipeline.units import cut_units
from pipeline.vad import SileroVad

CONFIGS: dict[str, Config] = {
    name: load_config(overrides={"model": "demo"} | more, env={})
    for name, more in {
        "default": {},
        "no vad": {"vad": "none"},
        "sequential": {"algorithm": "sequential"},
    }.items()
}


def hear(path: Path, engine: LocalEngine, config: str = "default") -> Transcript:
    return transcribe(path, engine, CONFIGS[config].decode_options(), CONFIGS[config])


def hear_pcm(pcm: Pcm, engine: LocalEngine, config: str = "default", **options: Any) -> Transcript:
    settings = CONFIGS[config]
    units = cut_units(
        Recording("x", "x"),
        [pcm],
        vad=SileroVad() if settings.vad == "silero" else None,
        unit_length_s=settings.unit_length_s,
        algorithm=settings.algorithm,
        sequential_max_s=settings.sequential_max_s,
    )
    return stitch(list(engine.run(units, replace(settings.decode_options(), **options))))


def write_float_wav(path: Path, samples: NDArray[np.float32], rate: int) -> Path:
    """[n] or [n, channels] as 32-bit floats, which may be no numbers."""
    channels = samples.shape[1] if samples.ndim == 2 else 1
    data = samples.astype("<f4").tobytes()
    form = struct.pack("<IHHIIHH", 16, 3, channels, rate, rate * 4 * channels, 4 * channels, 32)
    path.write_bytes(b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + form)
    with path.open("ab") as file:
        file.write(b"data" + struct.pack("<I", len(data)) + data)
    return path


def numbers(transcript: Transcript) -> Iterator[float]:
    for segment in transcript.segments:
        yield from (segment.start, segment.end, segment.avg_logprob, segment.no_speech_prob)
        yield from (segment.compression_ratio, segment.temperature)
        yield from (x for word in segment.words for x in (word.start, word.end, word.probability))
    yield transcript.language_probability or 0.0


def assert_sound(transcript: Transcript) -> None:
    """It ended well, and all numbers are numbers, inside the recording."""
    assert (transcript.status, transcript.failure) == ("ok", None)
    assert all(math.isfinite(x) for x in numbers(transcript))
    assert all(0 <= s.start <= s.end <= transcript.duration / SAMPLE_RATE for s in transcript.segments)


# -- nobody speaks -------------------------------------------------------------------------------------------


def spoilt(duration_s: float, rate: int) -> NDArray[np.float32]:
    """White noise with values that are no numbers, infinite or far beyond full scale, alone and in runs."""
    sound = noise("white", duration_s, rate) * np.float32(0.1)
    for i, value in enumerate((np.nan, np.inf, -np.inf, 1e30, -7.0)):
        sound[i * 97 :: 4001] = value
        sound[(i + 1) * len(sound) // 7 :][: rate // 50] = value
    return sound


def full_scale(sound: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(sound < 0, np.float32(-1), np.float32(1))


SILENT: dict[str, Callable[[float, int], NDArray[np.float32]]] = {
    "digital silence": lambda s, rate: np.zeros(round(s * rate), np.float32),
    "dither": lambda s, rate: noise("white", s, rate) * np.float32(2 / 32768),
    "DC": lambda s, rate: np.full(round(s * rate), 0.5, np.float32),
    "DC at full scale": lambda s, rate: np.full(round(s * rate), -1.0, np.float32),
    "white": lambda s, rate: noise("white", s, rate) * np.float32(0.5),
    "pink": lambda s, rate: noise("pink", s, rate) * np.float32(0.5),
    "brown": lambda s, rate: noise("brown", s, rate) * np.float32(0.5),
    "clipped noise": lambda s, rate: full_scale(noise("white", s, rate)),
}
SOUNDING: dict[str, Callable[[float, int], NDArray[np.float32]]] = {
    "hum 50": lambda s, rate: hum(50, s, rate) * np.float32(0.5),
    "hum 60, quiet": lambda s, rate: hum(60, s, rate) * np.float32(0.01),
    "hum 60, clipped": lambda s, rate: full_scale(hum(60, s, rate)),
    "clicks that are no numbers": spoilt,
    **{name: lambda s, rate, play=play: play(s, rate) * np.float32(0.5) for name, play in MUSIC.items()},  # type: ignore[misc]
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", SILENT)
def test_silence_and_noise_give_no_text(kind: str, config: str, engine: LocalEngine, tmp_path: Path) -> None:
    transcript = hear(write_float_wav(tmp_path / "a.wav", SILENT[kind](6.0, 16_000), 16_000), engine, config)
    assert_sound(transcript)
    assert transcript.duration == 6 * SAMPLE_RATE
    assert (transcript.text, transcript.segments) == ("", ())
    assert transcript.speech == (None if config == "no vad" else 0)


@pytest.mark.parametrize("kind", SOUNDING)
def test_hum_music_and_clicks_give_no_text(kind: str, engine: LocalEngine, tmp_path: Path) -> None:
    transcript = hear(write_float_wav(tmp_path / "a.wav", SOUNDING[kind](20.0, 16_000), 16_000), engine)
    assert_sound(transcript)
    assert (transcript.text, transcript.speech, transcript.n_windows) == ("", 0, 0), "nothing is decoded at all"


@pytest.mark.parametrize("kind", SOUNDING)
def test_without_a_detector_what_the_model_makes_of_them_is_what_the_reference_has(
    kind: str, engine: LocalEngine, reference: Any
) -> None:
    """No rule of the reference stops it: the demo model is sure of what it says (avg_logprob about -0.8, no_speech
    0.00), as sure as of words it mishears. What counts here is that nothing of it is ours."""
    import whisper

    pcm = pcm_at(np.clip(np.nan_to_num(SOUNDING[kind](8.0, 16_000), nan=-1.0), -1, 1), 0)
    ours = hear_pcm(pcm, engine, "sequential", language="en", temperature_fallback=False, chunk_length_s=30)
    samples = pcm.astype(np.float32) / 32768
    theirs = whisper.transcribe(reference, samples, language="en", temperature=0.0, fp16=False, verbose=None)
    assert_sound(ours)
    assert ours.text == theirs["text"].strip()


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000, 192_000])
def test_no_rate_and_no_channel_makes_noise_speech(
    rate: int, channels: int, engine: LocalEngine, tmp_path: Path
) -> None:
    sound = np.stack([spoilt(2.0, rate) * np.float32(1 - i / 8) for i in range(channels)], axis=1)
    transcript = hear(write_float_wav(tmp_path / "a.wav", sound, rate), engine)
    assert_sound(transcript)
    assert abs(transcript.duration - 2 * SAMPLE_RATE) <= 16
    assert transcript.segments == ()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("n_samples", [1, 160, 6_400])
@pytest.mark.parametrize("kind", ["digital silence", "clipped noise", "DC at full scale"])
def test_the_shortest_recordings(kind: str, n_samples: int, config: str, engine: LocalEngine, tmp_path: Path) -> None:
    """One sample to 400 ms."""
    sound = SILENT[kind](n_samples / SAMPLE_RATE, SAMPLE_RATE)
    transcript = hear(write_float_wav(tmp_path / "a.wav", sound, SAMPLE_RATE), engine, config)
    assert_sound(transcript)
    assert transcript.duration == n_samples
    assert transcript.text == ""


@pytest.mark.parametrize("n_samples", [0, 1, 159, 161, 6_400])
@pytest.mark.parametrize("value", [0, -32768])
def test_the_shortest_windows_by_the_engine_s_own_faces(n_samples: int, value: int, engine: LocalEngine) -> None:
    pcm = np.full(n_samples, value, np.int16)
    options = DecodeOptions(word_timestamps=True)
    for algorithm in ("windows", "sequential"):
        chosen = replace(options, algorithm=algorithm)
        (heard,) = engine.decode([pcm], chosen)
        assert "".join(segment.text for segment in heard.segments).strip() == ""
        unit = Unit(Recording("x", "x"), 0, 0, pcm, is_last=True)
        (result,) = engine.run([unit], chosen)
        assert result.failure is None
        assert_sound(stitch([result]))


# -- somebody does -------------------------------------------------------------------------------------------


@cache
def clip() -> Clip:
    """Three sentences that the demo model hears without a fault, no noise under them."""
    return make_clip("en", 3, seed=11, noise=0.0)


def wer(transcript: Transcript, said: Clip) -> float:
    return word_score(said.text, transcript.text, said.language).rate


@pytest.mark.parametrize("peak_dbfs", [0, -20, -40, -50, -60])
def test_quiet_speech_is_heard(peak_dbfs: float, engine: LocalEngine) -> None:
    """At -60 dBFS sixteen bits leave it six; every word reaches the model, which understands it down to -40."""
    samples = clip().samples / np.abs(clip().samples).max()
    transcript = hear_pcm(pcm_at(samples, peak_dbfs), engine)
    assert_sound(transcript)
    assert len(transcript.segments) >= 2
    assert transcript.text
    for word in clip().words:
        assert not any(
            s.start < word.end * SAMPLE_RATE and word.start * SAMPLE_RATE < s.stop for s in transcript.skipped
        )
    if peak_dbfs >= -40:
        assert wer(transcript, clip()) <= 0.1
        assert UNCOVERED not in transcript.flags


@pytest.mark.parametrize("peak_dbfs", [-6, -40])
@pytest.mark.parametrize("before", ["digital silence", "dither", "DC", "chords", "hum 50"])
def test_speech_after_ten_minutes_of_something_else(before: str, peak_dbfs: float, engine: LocalEngine) -> None:
    """Hum and music stop ten seconds before; everything is skipped but what is said, whose times are true."""
    samples = clip().samples / np.abs(clip().samples).max()
    lead = np.tile(pcm_at((SILENT | SOUNDING)[before](8.0, 16_000), peak_dbfs - 20), 75)
    offset = lead[0] if before == "DC" else np.int16(0)
    lead[-10 * SAMPLE_RATE :] = offset
    transcript = hear_pcm(np.concatenate([lead, pcm_at(samples, peak_dbfs) + offset]), engine)
    assert_sound(transcript)
    assert wer(transcript, clip()) <= 0.1
    for segment, sentence in zip(transcript.segments, clip().sentences, strict=True):
        assert abs(segment.start - 600 - sentence.start) < 0.3
    assert transcript.duration - transcript.n_skipped < 20 * SAMPLE_RATE


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000, 192_000])
def test_speech_is_heard_at_any_rate(rate: int, engine: LocalEngine, tmp_path: Path) -> None:
    """From 8 kHz, where half of its bandwidth is gone, to 192 kHz; a value that is no number is a click."""
    sound: NDArray[np.float32] = librosa.resample(clip().samples, orig_sr=SAMPLE_RATE, target_sr=rate)
    sound[rate // 20] = np.nan
    transcript = hear(write_float_wav(tmp_path / "a.wav", sound, rate), engine)
    assert_sound(transcript)
    assert wer(transcript, clip()) <= (0.3 if rate < SAMPLE_RATE else 0.1)


@pytest.mark.parametrize("words", [False, True])
def test_speech_that_has_text_is_not_flagged(words: bool, engine: LocalEngine) -> None:
    """Words pull their segments' times, and here and there the alignment gives the last of them no time at all."""
    said = make_long("de", 77, n_sentences=16)
    transcript = hear_pcm(said.pcm, engine, word_timestamps=words)
    assert wer(transcript, said) < 0.1
    assert UNCOVERED not in transcript.flags
    assert transcript.speech is not None
    assert transcript.uncovered_speech is not None
    assert transcript.uncovered_speech < 0.02 * transcript.speech
    lengths = [word.end - word.start for segment in transcript.segments for word in segment.words]
    assert (sum(length < 0.05 for length in lengths) >= 3) == words, "without such words this test shows nothing"
