"""OpenAI's routes with OpenAI's own client, synchronous, asynchronous and streaming; subtitles read by a parser."""

from __future__ import annotations

import asyncio
import io
import json
import math
import threading
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
import srt
from application import MODEL, Serve, clip, demo_config, fake_engine, wait_until
from audio_files import write_audio
from openai import AsyncOpenAI, OpenAI
from openai.types.audio import Transcription, TranscriptionVerbose, TranslationVerbose
from speech import talk

from pipeline.config import load_config
from pipeline.scoring import normalise
from serve_app.openai import Joined
from serve_app.serving import LocalModel

EN_FIVE = clip("en-five.mp3")


@pytest.fixture
def url(serve: Serve) -> str:
    return serve().url


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def native_text(url: str, file: Path = EN_FIVE) -> str:
    response = requests.post(f"{url}/v1/inference/{MODEL}", files={"audio": file.read_bytes()}, timeout=60)
    return str(response.json()["text"])


def test_json_under_both_prefixes(url: str) -> None:
    """C66, C79: and the native route's text."""
    texts = set()
    for prefix in ("v1", "v1/openai"):
        with OpenAI(base_url=f"{url}/{prefix}", api_key="none", max_retries=0) as client:
            for model in (MODEL, "whisper-1"):
                got = client.audio.transcriptions.create(model=model, file=EN_FIVE)
                assert isinstance(got, Transcription)
                texts.add(got.text)
    assert texts == {native_text(url)}


def test_text(client: OpenAI, url: str) -> None:
    """C80."""
    got = client.audio.transcriptions.create(model=MODEL, file=EN_FIVE, response_format="text")
    assert isinstance(got, str)
    assert got == native_text(url) + "\n"
    raw = client.audio.transcriptions.with_raw_response.create(model=MODEL, file=EN_FIVE, response_format="text")
    assert raw.headers["content-type"] == "text/plain; charset=utf-8"


def test_subtitles(client: OpenAI) -> None:
    """C81: as an outside parser reads them; a cue for each segment."""
    verbose = client.audio.transcriptions.create(model=MODEL, file=EN_FIVE, response_format="verbose_json")
    assert verbose.segments
    cues = list(srt.parse(client.audio.transcriptions.create(model=MODEL, file=EN_FIVE, response_format="srt")))
    assert [cue.index for cue in cues] == list(range(1, len(verbose.segments) + 1))
    for cue, segment in zip(cues, verbose.segments, strict=True):
        assert cue.content == segment.text.strip()
        assert cue.start.total_seconds() == pytest.approx(segment.start, abs=0.001)
    raw = client.audio.transcriptions.with_raw_response.create(model=MODEL, file=EN_FIVE, response_format="vtt")
    assert raw.headers["content-type"].startswith("text/vtt")
    lines = raw.text.splitlines()
    assert lines[0] == "WEBVTT"
    assert sum(" --> " in line for line in lines) == len(cues)


def test_verbose(client: OpenAI) -> None:
    """C85, C88."""
    got = client.audio.transcriptions.create(
        model=MODEL, file=EN_FIVE, response_format="verbose_json", timestamp_granularities=["word", "segment"]
    )
    assert isinstance(got, TranscriptionVerbose)
    raw = got.to_dict()
    assert (raw["task"], raw["language"]) == ("transcribe", "english")
    assert isinstance(raw["duration"], float)
    assert raw["usage"] == {"type": "duration", "seconds": math.ceil(raw["duration"])}
    segments: Any = raw["segments"]
    assert all(
        set(segment) == {"id", "seek", "start", "end", "text", "tokens", "temperature", "avg_logprob",
                         "compression_ratio", "no_speech_prob"}
        for segment in segments
    )  # fmt: skip
    words: Any = raw["words"]
    assert [set(word) for word in words] == [{"word", "start", "end"}] * len(words) != []
    assert normalise(" ".join(word["word"] for word in words)) == normalise(str(raw["text"]))
    only_words = client.audio.transcriptions.create(
        model=MODEL, file=EN_FIVE, response_format="verbose_json", timestamp_granularities=["word"]
    )
    assert only_words.segments is None
    assert only_words.words


def test_granularities_without_brackets(url: str) -> None:
    data = {"model": MODEL, "response_format": "verbose_json", "timestamp_granularities": ["segment", "word"]}
    response = requests.post(
        f"{url}/v1/audio/transcriptions", files={"file": EN_FIVE.read_bytes()}, data=data, timeout=60
    )
    assert {"segments", "words"} <= set(response.json())


def test_seconds_are_rounded_up(client: OpenAI) -> None:
    """C88: 8.47 s are 9."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 16_000, 0, "NONE", ""))
        out.writeframes(bytes(2 * round(8.47 * 16_000)))
    got = client.audio.transcriptions.create(model=MODEL, file=("a.wav", file.getvalue()))
    assert got.usage is not None
    assert got.usage.to_dict() == {"type": "duration", "seconds": 9}


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # the client says so of its overload
def test_translations(serve: Serve, demo: LocalModel) -> None:
    """C93."""
    with OpenAI(base_url=f"{serve(demo).url}/v1", api_key="none", max_retries=0) as client:
        got = client.audio.translations.create(model="demo", file=clip("de-two.flac"), response_format="verbose_json")
        assert isinstance(got, TranslationVerbose)
        assert got.to_dict()["task"] == "translate"
        heard = client.audio.transcriptions.create(model="demo", file=clip("de-two.flac"), language="de")
    assert got.text != heard.text


def test_models(client: OpenAI, url: str) -> None:
    """C94."""
    assert [model.id for model in client.models.list()] == [MODEL]
    for path in ("v1/models", "v1/openai/models", "models/list"):
        said = requests.get(f"{url}/{path}", timeout=30).json()
        assert (said["object"], [model["languages"] for model in said["data"]]) == ("list", [["en", "de", "es"]])


def test_asynchronous(url: str) -> None:
    async def both() -> list[str]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            ask = client.audio.transcriptions.create
            got = await asyncio.gather(*(ask(model=MODEL, file=EN_FIVE) for _ in range(4)))
        return [one.text for one in got]

    assert asyncio.run(both()) == [native_text(url)] * 4


def test_errors_as_the_client_knows_them(serve: Serve) -> None:
    from serve_app.auth import Tokens

    with OpenAI(base_url=f"{serve(tokens=Tokens(('t',))).url}/v1", api_key="t", max_retries=0) as client:
        ask = client.audio.transcriptions.create
        with pytest.raises(openai.NotFoundError) as missing:
            ask(model="gpt-4o", file=EN_FIVE)
        assert (missing.value.code, missing.value.type) == ("model_not_found", "not_found_error")
        for fields in (
            {"language": "xx"}, {"temperature": 2.0}, {"response_format": "docx"}, {"include": ["logprobs"]},
            {"response_format": "json", "timestamp_granularities": ["word"]}, {"chunking_strategy": {"type": "x"}},
            {"response_format": "srt", "stream": True},
        ):  # fmt: skip
            with pytest.raises(openai.BadRequestError) as wrong:
                ask(model=MODEL, file=EN_FIVE, **fields)  # type: ignore[call-overload]
            assert wrong.value.param in (*fields, "timestamp_granularities[]")
            assert wrong.value.type == "invalid_request_error"
        with pytest.raises(openai.BadRequestError, match="audio: "):
            ask(model=MODEL, file=("a.mp3", b"no audio" * 100))
        with (
            OpenAI(base_url=client.base_url, api_key="wrong", max_retries=0) as other,
            pytest.raises(openai.AuthenticationError),
        ):
            other.models.list()


# ---- streaming


def test_stream(client: OpenAI, url: str) -> None:
    """Deltas are the text, and so is the end."""
    events = list(client.audio.transcriptions.create(model=MODEL, file=clip("en-long.opus"), stream=True))
    deltas = "".join(event.delta for event in events if event.type == "transcript.text.delta")
    done = events[-1]
    assert done.type == "transcript.text.done"
    assert deltas == done.text == native_text(url, clip("en-long.opus"))
    assert len(events) > 5


def test_a_real_engine_streams_what_it_answers(serve: Serve, demo: LocalModel) -> None:
    """Segments are the answer's, one by one, though windows end in any order."""
    url = f"{serve(demo).url}/v1/audio/transcriptions"
    ask = {"response_format": "verbose_json", "stream": "true"}
    with requests.post(
        url, files={"file": clip("en-long.opus").read_bytes()}, data=ask, stream=True, timeout=120
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith(b"data: ")]
    segments = [event for event in events if event["type"] == "transcript.text.segment"]
    done = events[-1]
    assert [(one["start"], one["end"], one["text"]) for one in segments] == [
        (one["start"], one["end"], one["text"].strip()) for one in done["segments"]
    ]
    del ask["stream"]
    plain = requests.post(url, files={"file": clip("en-long.opus").read_bytes()}, data=ask, timeout=120).json()
    assert {key: value for key, value in done.items() if key != "type"} == plain


def test_first_text_long_before_the_end(serve: Serve, tmp_path: Path) -> None:
    """Of a recording of several Units the first one's text is there while the others are still in the engine."""
    config = load_config(overrides={"engine": "fake", "model": MODEL, "unit_length_s": 30}, env={})
    released = threading.Event()
    engine = fake_engine()
    submit = engine.submit

    async def held(unit: Any, options: Any, heard: Any = None, brief: bool = False) -> Any:
        if unit.index > 0:
            await asyncio.to_thread(released.wait, 60)
        return await submit(unit, options, heard, brief)

    engine.submit = held  # type: ignore[method-assign]
    server = serve(LocalModel(MODEL, config, engine))
    speech, _ = talk(30)
    file = write_audio(tmp_path / "talk.opus", (speech * 32767).astype("int16"), 16_000)
    with requests.post(
        f"{server.url}/v1/audio/transcriptions", files={"file": file.read_bytes()}, data={"stream": "true"},
        stream=True, timeout=60,
    ) as response:  # fmt: skip
        lines = response.iter_lines()
        first = next(line for line in lines if line.startswith(b"data: "))
        assert json.loads(first[6:])["type"] == "transcript.text.delta"
        assert not released.is_set()
        released.set()
        assert json.loads([line for line in lines if line][-1][6:])["type"] == "transcript.text.done"


def test_an_error_in_the_middle_is_an_event(serve: Serve) -> None:
    server = serve(faults=({"kind": "raise"},))
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.audio.transcriptions.create(model=MODEL, file=EN_FIVE, stream=True)
        with pytest.raises(openai.APIError):
            list(stream)
    wait_until(lambda: not server.app.gate.requests)


def test_who_leaves_a_stream_frees_the_engine(serve: Serve) -> None:
    config = demo_config(engine="fake")
    engine = fake_engine({"kind": "hang", "text": "3600"})
    server = serve(LocalModel(MODEL, config, engine))
    response = requests.post(
        f"{server.url}/v1/audio/transcriptions", files={"file": EN_FIVE.read_bytes()}, data={"stream": "true"},
        stream=True, timeout=60,
    )  # fmt: skip
    wait_until(lambda: engine.n_windows > 0)
    response.close()
    wait_until(lambda: engine.n_windows == 0 and not server.app.gate.requests and not server.app.gate.outstanding)


def test_joined() -> None:
    joined = Joined()
    pieces = [joined.add(text) for text in ("  ", " The plane ", " to", "", " Tokyo. \n", "  ")]
    assert pieces == ["", "The plane", "  to", "", " Tokyo.", ""]
