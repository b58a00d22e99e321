"""The path without Ray: one file in, its Transcript out, whatever the file is like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from audio_files import tone, write_wav

from pipeline.config import Config
from pipeline.engine import Engine, EngineConfig, engine_config, load_engine
from pipeline.transcribe import transcribe
from pipeline.types import DecodeOptions, Recording

OPTIONS = DecodeOptions()


@pytest.fixture
def engine() -> Engine:
    return load_engine(EngineConfig("any", fake_faults=()))


def test_a_file_becomes_a_transcript(engine: Engine, tmp_path: Path, fake_config: Callable[..., Config]) -> None:
    path = write_wav(tmp_path / "a.wav", tone(300, 100.0))
    config = fake_config(vad="none", unit_length_s=30)
    transcript = transcribe(path, engine, OPTIONS, config)
    assert (transcript.status, transcript.duration, transcript.n_skipped) == ("ok", 1_600_000, 0)
    assert transcript.recording.id == str(path)
    starts = [segment.start for segment in transcript.segments]
    assert len(starts) > 3
    assert starts == sorted(starts)
    assert transcript == transcribe(str(path), engine, OPTIONS, config)


def test_the_options_decide_how_it_is_cut(engine: Engine, tmp_path: Path, fake_config: Callable[..., Config]) -> None:
    path = write_wav(tmp_path / "a.wav", tone(300, 100.0))
    config = fake_config(vad="none", unit_length_s=30)  # which says algorithm: windows
    transcript = transcribe(path, engine, DecodeOptions(algorithm="sequential"), config)
    assert len(transcript.segments) == 1  # one Unit, one span


def test_a_slice_and_a_line_of_a_manifest(engine: Engine, tmp_path: Path, fake_config: Callable[..., Config]) -> None:
    path = write_wav(tmp_path / "a.wav", tone(300, 10.0))
    recording = Recording(id="x", uri=str(path), offset=16_000, length=48_000, language="es", reference="r")
    transcript = transcribe(recording, engine, OPTIONS, fake_config(vad="none"))
    assert (transcript.recording, transcript.duration, transcript.language) == (recording, 48_000, "es")


@pytest.mark.parametrize(
    ("content", "kind"),
    [(None, "not_found"), (b"", "empty_audio"), (b"\x00\x01 no audio" * 500, "damaged_audio")],
    ids=["missing", "empty", "junk"],
)
def test_what_cannot_be_read_is_a_failed_transcript(
    engine: Engine, tmp_path: Path, content: bytes | None, kind: str
) -> None:
    path = tmp_path / "a.wav"
    if content is not None:
        path.write_bytes(content)
    transcript = transcribe(path, engine, OPTIONS)
    assert (transcript.status, transcript.segments, transcript.duration) == ("failed", (), 0)
    assert transcript.failure is not None
    assert (transcript.failure.kind, transcript.failure.stage) == (kind, "decode")


def test_a_unit_that_fails_leaves_the_others(tmp_path: Path, fake_config: Callable[..., Config]) -> None:
    config = fake_config(vad="none", unit_length_s=30, fake__faults=[{"kind": "nan", "times": 1}])
    path = write_wav(tmp_path / "a.wav", tone(300, 70.0))
    transcript = transcribe(path, load_engine(engine_config(config)), OPTIONS, config)
    assert transcript.status == "failed"
    assert transcript.failure is not None
    assert transcript.failure.kind == "non_finite"
    (skip,) = transcript.skipped
    assert (skip.start, skip.reason) == (0, "non_finite")
    assert transcript.segments[0].start >= skip.stop / 16_000
