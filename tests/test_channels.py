"""Channels apart: cut together, transcribed each as if alone, one result, and every law holds to the sample."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from audio_files import noise, tone, write_audio, write_wav
from speech import frames, pcm_at, talk

from pipeline.audio import _Split
from pipeline.channels import first_speech, merge, merged, split, tagged
from pipeline.config import Config, load_config
from pipeline.decoder import open_audio
from pipeline.demo import clips_path
from pipeline.engine import Engine, engine_config, load_engine
from pipeline.errors import AudioError, DamagedAudioError, TooManyChannelsError
from pipeline.stitch import failed_unit, stitch, stitch_unit
from pipeline.transcribe import transcribe
from pipeline.types import (
    MAX_CHANNELS,
    SAMPLE_RATE,
    VAD_FRAME,
    DecodeOptions,
    Failure,
    Hypothesis,
    Pcm,
    Recording,
    Segment,
    Transcript,
    Unit,
    UnitResult,
)  # fmt: skip
from pipeline.units import cut_units, read_units
from pipeline.vad import SileroVad, detect
from pipeline.windows import plan

RECORDING = Recording("a", "a.wav")


def read(path: Path, **options: int) -> tuple[Pcm, set[str]]:
    with open_audio(Recording("a", str(path), **options), channels="split", max_audio_s=100) as audio:  # type: ignore[arg-type]
        return np.concatenate(list(audio), axis=-1), audio.flags


def cut(pcm: Pcm, vad: SileroVad | None, unit_length_s: int = 30) -> list[Unit]:
    blocks = (pcm[..., at : at + 7001] for at in range(0, pcm.shape[-1], 7001))
    options = {"unit_length_s": unit_length_s, "algorithm": "windows", "sequential_max_s": 60}
    return list(cut_units(RECORDING, blocks, vad=vad, **options))  # type: ignore[arg-type]


def stereo(*channels: Pcm) -> Pcm:
    longest = max(map(len, channels))
    return np.stack([np.pad(channel, (0, longest - len(channel))) for channel in channels])


# ---- reading


def test_every_channel_is_read_in_the_order_of_the_file(tmp_path: Path) -> None:
    channels = np.stack([tone(300, 2.5), noise(2.5)])
    pcm, flags = read(write_wav(tmp_path / "a.wav", channels))
    assert np.array_equal(pcm, channels)
    assert flags == set()
    pcm, _ = read(tmp_path / "a.wav", offset=20_000, length=8_000)
    assert np.array_equal(pcm, channels[:, 20_000:28_000])


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_one_channel_is_as_it_is_mixed(kind: str, tmp_path: Path) -> None:
    pcm, _ = read(write_audio(tmp_path / f"a.{kind}", tone(300, 1.2), kind=kind))
    assert np.array_equal(pcm, tone(300, 1.2))


def test_more_channels_than_there_may_be_are_refused_in_words(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "a.wav", np.zeros((16, 16_000), np.int16), kind="wav", layout="hexadecagonal")
    with pytest.raises(TooManyChannelsError, match=r"a\.wav: 16 channels; channels: split takes 8 \(mix takes any\)"):
        read(path)
    (failed,) = read_units(Recording("a", str(path)), load_config(overrides={"channels": "split"}, env={}))
    assert isinstance(failed, UnitResult)
    assert failed.failure is not None
    assert failed.failure.kind == "too_many_channels"


def test_channels_that_come_and_go() -> None:
    flags: set[str] = set()
    mixer = _Split(flags, "a")
    both = np.stack([tone(300, 0.1), tone(400, 0.1)])
    assert np.array_equal(mixer.mix(both), both)
    assert mixer.widen(np.zeros(5, np.int16)).shape == (2, 5)
    assert not flags
    assert np.array_equal(mixer.mix(both[:1]), np.stack([both[0], np.zeros_like(both[0])]))
    assert flags == {"channels_changed"}
    with pytest.raises(DamagedAudioError, match="2 channels become 3"):
        mixer.mix(np.zeros((3, 10), np.int16))


# ---- Units


def test_channels_are_cut_where_none_of_them_speaks() -> None:
    """Each speaks while the other is silent, but for two pauses of both."""
    left, right = frames("400# 450. 650# 100. 400#"), frames("300. 500# 800. 400#")
    pcm = np.stack([np.repeat(channel.astype(np.int16), VAD_FRAME) for channel in (left, right)])

    class Told(SileroVad):
        """Hears what the first sample of each frame says."""

        def push(self, pcm: Pcm) -> np.ndarray:  # type: ignore[type-arg]
            self._waiting.append(pcm)
            return np.zeros(0, np.uint8)

        def finish(self) -> np.ndarray:  # type: ignore[type-arg]
            return np.concatenate(self._waiting)[::VAD_FRAME].astype(np.uint8)

    units = cut(pcm, Told())
    assert [unit.index for unit in units] == list(range(len(units)))
    assert np.array_equal(np.concatenate([unit.pcm for unit in units], axis=1), pcm)
    assert [unit.start for unit in units] == np.cumsum([0, *(unit.n_samples for unit in units)])[:-1].tolist()
    for unit in units:
        assert unit.speech is not None
        assert unit.speech.shape == (2, -(-unit.n_samples // VAD_FRAME))
    assert len(units) == 3
    for unit in units[1:]:
        at = unit.start // VAD_FRAME
        assert not left[at - 1 : at + 1].any()
        assert not right[at - 1 : at + 1].any()


@pytest.mark.parametrize("vad", [True, False])
def test_equal_channels_are_cut_as_one(vad: bool) -> None:
    audio, _ = talk(12, seed=3)
    pcm = pcm_at(audio, -10)
    alone, both = cut(pcm, SileroVad() if vad else None), cut(np.stack([pcm, pcm]), SileroVad() if vad else None)
    assert len(alone) == len(both) > 1
    for one, two in zip(alone, both, strict=True):
        for channel in split(two):
            assert (channel.index, channel.start, channel.is_last) == (one.index, one.start, one.is_last)
            assert np.array_equal(channel.pcm, one.pcm)
            assert np.array_equal(channel.speech, one.speech) if vad else channel.speech is None
        assert np.array_equal(two.language_pcm, both[0].language_pcm)
        if one.index:
            assert np.array_equal(two.language_pcm, one.language_pcm)


def test_the_language_is_heard_where_somebody_speaks_first() -> None:
    audio, _ = talk(4, seed=5)
    pcm = pcm_at(audio, -10)
    late = np.concatenate([np.zeros(3 * SAMPLE_RATE, np.int16), tone(200, 1.0, level=0.01), pcm])
    (unit,) = cut(stereo(late, pcm), SileroVad(), unit_length_s=1800)
    assert unit.language_pcm is not None
    assert np.array_equal(unit.language_pcm, first_speech(unit))
    assert np.array_equal(unit.language_pcm, first_speech(split(unit)[1]))
    (silent,) = cut(np.zeros((2, 32_000), np.int16), SileroVad())
    assert silent.language_pcm is None
    (unheard,) = cut(stereo(np.zeros(16_000, np.int16), pcm[: 20 * SAMPLE_RATE]), None)
    assert np.array_equal(unheard.language_pcm, unheard.pcm[1])


# ---- results


def result_of(unit: Unit, text: str = " hello") -> UnitResult:
    the_plan = plan(unit, DecodeOptions())
    said = Segment(0.0, 1.0, text, (1,), -0.1, 1.0, 0.0, 0.0)
    return stitch_unit(unit, the_plan, [Hypothesis((said,), "en", 0.9) for _ in the_plan.spans])


@pytest.mark.parametrize("seed", range(8))
def test_decoded_and_skipped_make_the_duration_of_what_no_channel_looked_at(seed: int) -> None:
    random = np.random.default_rng(seed)
    n_frames, n_samples = 3000, 3000 * VAD_FRAME - int(random.integers(VAD_FRAME))
    speech = np.repeat(random.integers(0, 2, (3, n_frames // 100)) * 230, 100, axis=1).astype(np.uint8)
    unit = Unit(RECORDING, 0, 512, np.zeros((3, n_samples), np.int16), True, speech)
    results = [result_of(one) for one in split(unit)]
    found = merge(results)
    looked_at = np.zeros(n_samples, np.bool_)
    for one in split(unit):
        for span in plan(one, DecodeOptions()).spans:
            looked_at[span.start : span.stop] = True
    skipped = np.zeros(n_samples, np.bool_)
    for skip in found.skipped:
        assert not skipped[skip.start - 512 : skip.stop - 512].any()
        skipped[skip.start - 512 : skip.stop - 512] = True
    assert np.array_equal(skipped, ~looked_at)
    assert found.speech == sum(result.speech or 0 for result in results)
    assert [s.start for s in found.segments] == sorted(s.start for s in found.segments)
    assert len(found.segments) == sum(len(result.segments) for result in results)
    assert {s.channel for s in found.segments} == {i for i, result in enumerate(results) if result.segments}


def test_one_channel_that_fails_fails_the_unit() -> None:
    unit = Unit(RECORDING, 2, 512, np.zeros((2, 5120), np.int16), True, np.full((2, 10), 230, np.uint8))
    left, right = split(unit)
    failure = Failure("engine", "no", "engine")
    found = merge([result_of(left), failed_unit(right, failure)])
    assert (found.failure, found.segments, found.index, found.start) == (failure, (), 2, 512)
    assert [(skip.start, skip.stop, skip.reason) for skip in found.skipped] == [(512, 5632, "engine")]
    assert (found.speech, found.uncovered_speech) == (2 * 5120, 2 * 5120)


def test_results_in_any_order_find_their_units() -> None:
    units = [
        Unit(RECORDING, i, i * 5120, np.zeros((MAX_CHANNELS, 5120), np.int16), i == 1, flags=("a",)) for i in range(2)
    ]
    results = [result_of(one, f" {one.index}") for one in tagged(units)]
    found = merged(results[::-1])
    whole = stitch(found)
    assert whole.flags == ("a",)
    assert [segment.channel for segment in whole.segments] == [*range(MAX_CHANNELS), *range(MAX_CHANNELS)]
    assert whole.text == " ".join("0" * MAX_CHANNELS + "1" * MAX_CHANNELS)


# ---- with the demo model


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(overrides={"model": "demo", "channels": "split", "chunk_level": "word", "device": "cpu"}, env={})


@pytest.fixture(scope="module")
def engine(config: Config) -> Iterator[Engine]:
    with load_engine(engine_config(config)) as engine:
        yield engine


def clip(name: str) -> Pcm:
    with open_audio(Recording(name, str(clips_path() / name)), channels="mix", max_audio_s=100) as audio:
        return np.concatenate(list(audio))


def heard(path: Path, pcm: Pcm, engine: Engine, config: Config, **options: str) -> Transcript:
    recording = Recording("a", str(write_wav(path, pcm)))
    changed = config.model_copy(update=options)
    found = transcribe(recording, engine, changed.decode_options(), changed)
    assert found.status == "ok"
    assert found.duration == pcm.shape[-1]
    return found


def text(transcript: Transcript, channel: int) -> str:
    return "".join(segment.text for segment in transcript.segments if segment.channel == channel).strip()


def test_two_who_speak_are_both_understood(tmp_path: Path, engine: Engine, config: Config) -> None:
    one, two = clip("en-one.wav"), clip("en-three.flac")
    alone = [heard(tmp_path / "a.wav", pcm, engine, config) for pcm in (one, two)]
    both = heard(tmp_path / "a.wav", stereo(one, two), engine, config)
    assert all(transcript.text for transcript in alone)
    assert [text(both, 0), text(both, 1)] == [transcript.text for transcript in alone]
    assert {word.word for s in both.segments for word in s.words} == {
        word.word for transcript in alone for s in transcript.segments for word in s.words
    }
    assert [segment.start for segment in both.segments] == sorted(segment.start for segment in both.segments)


def test_equal_channels_say_the_same_and_a_silent_one_nothing(tmp_path: Path, engine: Engine, config: Config) -> None:
    one = clip("en-one.wav")
    twice = heard(tmp_path / "a.wav", stereo(one, one), engine, config)
    assert text(twice, 0) == text(twice, 1) == heard(tmp_path / "a.wav", one, engine, config).text
    half = heard(tmp_path / "a.wav", stereo(np.zeros_like(one), one), engine, config)
    assert (text(half, 0), text(half, 1)) == ("", text(twice, 0))
    assert twice.speech == 2 * (half.speech or 0)


def test_different_languages_are_told_apart_where_each_window_is_asked(
    tmp_path: Path, engine: Engine, config: Config
) -> None:
    english, german = clip("en-three.flac"), clip("de-four.webm")
    both = heard(tmp_path / "a.wav", stereo(english, german), engine, config, language="window")
    assert {segment.channel: segment.language for segment in both.segments} == {0: "en", 1: "de"}
    assert text(both, 1) == heard(tmp_path / "a.wav", german, engine, config, language="window").text
    one = heard(tmp_path / "a.wav", stereo(english, german), engine, config)
    assert len({segment.language for segment in one.segments}) == 1  # of who speaks first, in both


def test_a_recording_that_cannot_be_read_is_a_failed_transcript(engine: Engine, config: Config) -> None:
    found = transcribe("/no/such.wav", engine, config.decode_options(), config)
    assert found.failure is not None
    assert found.failure.kind == "not_found"
    with pytest.raises(AudioError):
        read(Path("/no/such.wav"))


def test_detection_of_a_channel_does_not_depend_on_the_other() -> None:
    audio, _ = talk(3, seed=7)
    pcm = pcm_at(audio, -10)
    (unit,) = cut(stereo(pcm, noise(len(pcm) / SAMPLE_RATE)[: len(pcm)]), SileroVad(), unit_length_s=1800)
    assert unit.speech is not None
    assert (unit.speech[0] >= 128).sum() == (detect(pcm) >= 128).sum()
