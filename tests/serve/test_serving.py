"""A request's way to its Transcript: the same as without HTTP, whoever else is in the engine."""

from __future__ import annotations

import json
import wave
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from application import Serve, clip, demo_config
from audio_files import write_audio

from pipeline.formats import verbose
from pipeline.transcribe import transcribe
from pipeline.types import Recording, Segment, UnitResult
from serve_app.serving import InOrder, LocalModel

CLIPS = ("en-one.wav", "de-four.webm", "es-five.ogg", "en-long.opus", "de-phone.wav", "es-two.m4a")


def ask(url: str, name: str) -> dict[str, Any]:
    data = {"response_format": "verbose_json", "timestamp_granularities[]": ["segment", "word"]}
    response = requests.post(url, files={"file": clip(name).read_bytes()}, data=data, timeout=120)
    assert response.status_code == 200, response.text
    said: dict[str, Any] = response.json()
    return said


def test_http_answers_what_the_pipeline_answers(serve: Serve, demo: LocalModel) -> None:
    """Text, tokens, times and figures to the last bit (float32); each clip alone, and then all of them at once."""
    url = f"{serve(demo).url}/v1/audio/transcriptions"
    config = demo_config(chunk_level="word")
    alone = {name: ask(url, name) for name in CLIPS}
    for name, said in alone.items():
        known = verbose(transcribe(clip(name), demo._engine, config.decode_options(), config))
        assert said["segments"] == known["segments"], name
        assert (said["text"], said["duration"]) == (known["text"], known["duration"])
        assert said["words"] == [{key: word[key] for key in ("word", "start", "end")} for word in known["words"]]
    with ThreadPoolExecutor(12) as pool:
        names = [name for name in CLIPS if name != "en-long.opus"] * 2
        together = list(pool.map(lambda name: ask(url, name), names))
    for name, said in zip(names, together, strict=True):
        assert texts_of(said) == texts_of(alone[name]), name


def test_channels_apart(serve: Serve, demo: LocalModel, tmp_path: Path) -> None:
    """`channels: split`: what the pipeline answers, streamed too, though segments wait for the other channel."""
    config = demo_config(channels="split", chunk_level="word")
    left, right = (np.frombuffer(clip_samples(name), np.int16) for name in ("en-one.wav", "es-three.wav"))
    n = min(len(left), len(right))
    file = write_audio(tmp_path / "two.flac", np.stack([left[:n], right[:n]]))
    url = f"{serve(LocalModel('demo', config, demo._engine)).url}/v1/audio/transcriptions"
    known = verbose(transcribe(file, demo._engine, config.decode_options(), config))
    data = {"response_format": "verbose_json", "timestamp_granularities[]": ["segment", "word"]}
    said = requests.post(url, files={"file": file.read_bytes()}, data=data, timeout=120).json()
    assert said["segments"] == known["segments"]
    streamed = requests.post(url, files={"file": file.read_bytes()}, data={**data, "stream": "true"}, timeout=120)
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: ")]
    assert [one["text"] for one in events if one["type"] == "transcript.text.segment"] == [
        one["text"].strip() for one in known["segments"]
    ]


def clip_samples(name: str) -> bytes:
    with wave.open(str(clip(name))) as file:
        return file.readframes(file.getnframes())


def texts_of(said: dict[str, Any]) -> Any:
    """Without figures: their last bits depend on what else was in the batch."""
    segments = [(one["start"], one["end"], one["text"], one["tokens"]) for one in said["segments"]]
    return said["text"], said["language"], said["duration"], segments, said["words"]


def test_in_order() -> None:
    """Segments of two Units at once, told in the order of the recording, each once."""
    said: list[str] = []
    in_order = InOrder(lambda segments: said.extend(segment.text for segment in segments))
    first, second = in_order.of(0), in_order.of(1)
    second([segment("c")])
    assert said == []
    first([segment("a")])
    assert said == ["a"]
    in_order.ended(result(1, "c", "d"))
    assert said == ["a"]
    in_order.ended(result(0, "a", "b"))
    assert said == ["a", "b", "c", "d"]
    in_order.ended(result(2, "e"))  # an engine that told nothing before its result
    assert said == ["a", "b", "c", "d", "e"]


def segment(text: str) -> Segment:
    return Segment(0.0, 1.0, text, (), -0.1, 1.0, 0.0, 0.0)


def result(index: int, *texts: str) -> UnitResult:
    whole = UnitResult(Recording("r", "r.wav"), index, is_last=False, start=0, n_samples=1)
    return replace(whole, segments=tuple(map(segment, texts)))


@pytest.mark.parametrize("words", [False, True])
def test_an_engine_tells_what_it_answers(demo: LocalModel, words: bool) -> None:
    """Whatever window ends first, and with word times, which come later than the text."""
    import asyncio

    from pipeline.types import Unit
    from pipeline.units import read_units

    config = demo_config(chunk_level="word" if words else "segment")
    recording = Recording("r", str(clip("en-long.opus")))
    units = [unit for unit in read_units(recording, config) if isinstance(unit, Unit)]
    told: list[list[Segment]] = []

    async def run() -> list[UnitResult]:
        return [await demo._engine.submit(unit, config.decode_options(), heard) for unit in units]

    def heard(segments: Sequence[Segment]) -> None:
        told.append(list(segments))

    results = asyncio.run(run())
    assert [one for some in told for one in some] == [one for unit in results for one in unit.segments]
    assert len(told) > 3
