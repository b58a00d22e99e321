"""DeepInfra's route on a real socket: fields, answers and refusals, case by case of the contract (C and F numbers)."""

from __future__ import annotations

import base64
import json
import time
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
import requests
from application import MODEL, Serve, clip
from audio_files import Samples, tone, write_audio, write_film, write_wav

from pipeline.scoring import normalise
from serve_app.auth import Tokens
from serve_app.schemas import LANGUAGES
from serve_app.serving import LocalModel

EN_FIVE = clip("en-five.mp3")
Post = Callable[..., requests.Response]


@pytest.fixture
def url(serve: Serve) -> str:
    return f"{serve().url}/v1/inference/{MODEL}"


def post(url: str, audio: Path | bytes = EN_FIVE, name: str = "voice.mp3", **fields: Any) -> requests.Response:
    data = audio if isinstance(audio, bytes) else audio.read_bytes()
    return requests.post(url, files={"audio": (name, data)}, data=fields, timeout=60)


def spoken(name: str) -> Samples:
    """The samples of a WAV clip."""
    with wave.open(str(clip(name))) as file:
        return np.frombuffer(file.readframes(file.getnframes()), np.int16)


def without_request(answer: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for equal requests."""
    status = {key: value for key, value in answer["inference_status"].items() if key != "runtime_ms"}
    return {**answer, "request_id": "", "inference_status": status}


def refused(response: requests.Response, field: str) -> None:
    assert response.status_code == 422, response.text
    assert response.json()["detail"][0]["loc"][-1] == field
    assert response.json()["detail"][0]["msg"]


# ---- success


def test_shape(url: str) -> None:
    """C11, C16, C22."""
    began = time.monotonic()
    response = post(url)
    took_ms = 1000 * (time.monotonic() - began)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    answer = response.json()
    assert set(answer) == {
        "text", "segments", "language", "input_length_ms", "words", "duration", "request_id", "inference_status",
    }  # fmt: skip
    status = answer["inference_status"]
    assert status["status"] == "succeeded"
    assert (status["cost"], type(status["tokens_generated"]), type(status["tokens_input"])) == (0.0, int, int)
    assert status["tokens_generated"] > 0
    assert 0 < status["runtime_ms"] <= took_ms
    assert answer["input_length_ms"] == pytest.approx(14_146, abs=110)
    assert answer["duration"] == pytest.approx(answer["input_length_ms"] / 1000, abs=0.001)
    assert answer["text"] == answer["text"].strip() != ""
    assert answer["words"] == []
    assert [segment["id"] for segment in answer["segments"]] == list(range(len(answer["segments"])))
    assert all(set(segment) == {"id", "start", "end", "text"} for segment in answer["segments"])
    assert " ".join(segment["text"] for segment in answer["segments"]) == answer["text"]
    assert len(answer["request_id"]) == 24
    assert response.headers["x-request-id"] == answer["request_id"]
    assert post(url).json()["request_id"] != answer["request_id"]


def test_real_speech(serve: Serve, demo: LocalModel) -> None:
    """C11 and C13 with a model that hears: text, language and word times of a clip with known ones."""
    url = f"{serve(demo, price_per_minute=0.06).url}/v1/inference/demo"
    known = json.loads((EN_FIVE.parent / "references.json").read_text())["en-five"]
    sentences = known["sentences"]
    answer = post(url, chunk_level="word").json()
    assert answer["language"] == "en"
    assert jiwer.wer(normalise(" ".join(one["text"] for one in sentences)), normalise(answer["text"])) < 0.1
    assert answer["inference_status"]["cost"] == pytest.approx(0.001 * answer["duration"], abs=1e-9)
    words = answer["words"]
    assert all(set(word) == {"text", "start", "end"} for word in words)
    assert normalise(" ".join(word["text"] for word in words)) == normalise(answer["text"])
    starts = [word["start"] for word in words]
    assert starts == sorted(starts)
    assert all(0 <= word["start"] <= word["end"] <= answer["duration"] + 0.01 for word in words)
    spoken = sentences[0]["words"][0]
    assert words[0]["start"] == pytest.approx(spoken["start"], abs=0.3)


def test_translate(serve: Serve, demo: LocalModel) -> None:
    """C42: English words of a German clip, whose language is told."""
    url = f"{serve(demo).url}/v1/inference/demo"
    answer = post(url, clip("de-two.flac"), task="translate").json()
    heard = post(url, clip("de-two.flac")).json()
    assert (answer["language"], heard["language"]) == ("de", "de")
    assert answer["text"] != heard["text"]
    known = json.loads((EN_FIVE.parent / "references.json").read_text())["de-two"]["sentences"]
    english = {word for one in known for word in normalise(one["english"]).split()}
    assert len(english & set(normalise(answer["text"]).split())) >= 3


def test_equal_for_equal_requests(url: str) -> None:
    """C14, C18, C28, C57, C77: what is left out is the default; a file's name is nothing."""
    plain = without_request(post(url).json())
    for fields in (
        {"chunk_level": "segment"}, {"temperature": "0"}, {"temperature": "0.0"}, {"task": "transcribe"},
        {"initial_prompt": ""}, {"language": ""}, {"webhook": ""}, {"chunk_length_s": "30"},
        {"task": '"transcribe"', "chunk_level": '"segment"'},
    ):  # fmt: skip
        assert without_request(post(url, **fields).json()) == plain, fields
    for name in ("Ünï-語.mp3", "", "x" * 250 + ".mp3", 'a"b;c.mp3', "../../etc/passwd"):
        assert without_request(post(url, name=name).json()) == plain, name


def test_without_a_file_name(url: str) -> None:
    """DeepInfra's SDK for Node: the part is not marked as a file."""
    data = EN_FIVE.read_bytes()
    body = b'--b\r\nContent-Disposition: form-data; name="audio"\r\n\r\n' + data + b"\r\n--b--\r\n"
    response = requests.post(url, data=body, headers={"Content-Type": "multipart/form-data; boundary=b"}, timeout=60)
    assert without_request(response.json()) == without_request(post(url).json())


def test_json_with_a_data_url(url: str) -> None:
    """C34, and the same file in a form, as the documentation recommends."""
    data_url = "data:audio/mpeg;base64," + base64.b64encode(EN_FIVE.read_bytes()).decode()
    plain = without_request(post(url, chunk_length_s=10).json())
    for value in (10, "10"):
        response = requests.post(url, json={"audio": data_url, "chunk_length_s": value, "language": None}, timeout=60)
        assert without_request(response.json()) == plain
    assert without_request(post(url, data_url.encode(), chunk_length_s=10).json()) == plain


@pytest.mark.parametrize(
    "audio",
    ["data:audio/wav;base64", "data:audio/wav,abc", "data:;base64,###", "data:;base64,abc", "data:;base64,",
     "https://example.org/a.mp3", "", 7, ["x"]],
)  # fmt: skip
def test_data_urls_that_are_none(url: str, audio: Any) -> None:
    """C32."""
    refused(requests.post(url, json={"audio": audio}, timeout=30), "audio")


def test_every_kind_of_audio(serve: Serve, tmp_path: Path) -> None:
    """C24, C25: the same speech in containers and codecs, with its text and its length."""
    url = f"{serve().url}/v1/inference/{MODEL}"
    pcm = spoken("en-one.wav")
    kinds = ("wav", "wav24", "wavf32", "wavu8", "alaw", "aiff", "flac", "mp3", "m4a", "opus", "webm", "mka")
    files = [write_audio(tmp_path / f"a.{kind}", pcm, 16_000, kind) for kind in kinds]
    files += [write_film(tmp_path / "a.mp4", pcm, 16_000)]
    for file in files:
        answer = post(url, file, name="no-name").json()
        assert answer["text"], file
        assert answer["duration"] == pytest.approx(len(pcm) / 16_000, abs=0.1), file


def test_nothing_to_hear(url: str, tmp_path: Path) -> None:
    """C38, P3: no bytes are no audio; no samples, or silence, are an answer."""
    assert post(url, b"").status_code == 400
    silent = write_wav(tmp_path / "silent.wav", np.zeros(16_000 * 3, np.int16))
    header = tmp_path / "none.wav"
    with wave.open(str(header), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
    assert header.stat().st_size == 44
    for audio, ms in ((silent, 3000), (header, 0)):
        answer = post(url, audio).json()
        assert (answer["text"], answer["segments"], answer["words"]) == ("", [], []), audio
        assert answer["input_length_ms"] == ms


@pytest.mark.parametrize("data", [b"PK\x03\x04" + b"x" * 500, b"\xff\xd8\xff\xe0JFIF" * 90, b"%PDF-1.7 " * 90,
                                  b"MZ" + bytes(500), b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
                                  b"ffconcat version 1.0\nfile /etc/passwd\n", b"OggS" + bytes(40)])  # fmt: skip
def test_what_is_not_audio(url: str, data: bytes) -> None:
    """F93, and playlists that would have other files read: 400, and not a word of where the file lay."""
    response = post(url, data)
    assert response.status_code == 400
    assert "/tmp" not in response.text
    assert response.json()["detail"].startswith("audio: ")


# ---- fields


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("task", ["Transcribe2", "", "TRANSLATE "]),
        ("language", ["xx", "hh", "english", "en-US", "e", "zz", "fr"]),  # the last: this model does not have it
        ("chunk_length_s", ["0", "31", "-1", "1.5", "abc", "1e1"]),
        ("temperature", ["-0.1", "1.1", "nan", "inf", "abc"]),
        ("chunk_level", ["words", "SEGMENT"]),
        ("webhook", []),
    ],
)
def test_values_out_of_range(url: str, field: str, values: list[str]) -> None:
    """C44, C50, C53, C56."""
    for value in values:
        refused(post(url, **{field: value}), field)


def test_values_in_range(url: str) -> None:
    """C19, C46, C52, C56."""
    for fields in ({"temperature": "1"}, {"language": "DE"}, {"chunk_length_s": "1"}, {"chunk_length_s": 30}):
        answer = post(url, **fields).json()
        assert answer["text"]
        assert answer["segments"][-1]["end"] > 9
    assert post(url, language="DE").json()["language"] == "de"


def test_every_language_of_the_documentation(serve: Serve, demo: LocalModel, tmp_path: Path) -> None:
    """C48: the codes that the checkpoint has; `yue` only large-v3 knows."""
    url = f"{serve(demo).url}/v1/inference/demo"
    silent = write_wav(tmp_path / "silent.wav", np.zeros(1600, np.int16))
    known = {code for code in LANGUAGES if post(url, silent, language=code).status_code == 200}
    assert known == set(LANGUAGES) - {"yue"}
    assert post(url, silent, language="jw").json()["language"] == "jw"
    message = post(url, silent, language="yue").json()["detail"][0]["msg"]
    assert "'yue'" in message
    assert "en" in message


@pytest.mark.parametrize("value", [True, 1.5, "1e1", [10], {"a": 1}])
def test_json_values_of_the_wrong_type(url: str, value: Any) -> None:
    audio = "data:;base64," + base64.b64encode(EN_FIVE.read_bytes()).decode()
    refused(requests.post(url, json={"audio": audio, "chunk_length_s": value}, timeout=30), "chunk_length_s")


def test_sent_twice(url: str) -> None:
    """C37, C61, P7; JSON's repeated keys too."""
    data = EN_FIVE.read_bytes()
    refused(requests.post(url, files=[("audio", data), ("audio", data)], timeout=30), "audio")
    refused(requests.post(url, files={"audio": data}, data={"task": ["transcribe", "translate"]}, timeout=30), "task")
    body = b'{"audio": "data:;base64,AAAA", "task": "translate", "task": "transcribe"}'
    refused(requests.post(url, data=body, headers={"Content-Type": "application/json"}, timeout=30), "task")


def test_missing_audio(url: str) -> None:
    """C35."""
    refused(requests.post(url, files={"task": (None, "translate")}, timeout=30), "audio")
    refused(requests.post(url, json={}, timeout=30), "audio")


def test_unknown_fields_are_named(url: str) -> None:
    """P6, P20: what older SDKs send breaks nothing, and is not passed over in silence."""
    response = post(url, patience="1", no_speech_threshold="0.6", **{"é\u2028,x": "1"})
    assert response.status_code == 200
    assert response.headers["Murmur-Ignored"] == r"patience, no_speech_threshold, \xe9\u2028%2Cx"
    assert "Murmur-Ignored" not in post(url).headers


@pytest.mark.parametrize(
    ("kind", "body"),
    [("text/plain", b"hello"), (None, b"hello"), ("multipart/form-data", b"--b--\r\n"), ("application/json", b"{"),
     ("application/json", b"[1]"), ("application/json", b"[" * 100_000), ("multipart/form-data; boundary=b", b"x" * 99),
     ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n'),
     ("application/x-www-form-urlencoded", b"audio=x")],
)  # fmt: skip
def test_bodies_that_are_none(url: str, kind: str | None, body: bytes) -> None:
    """C40."""
    response = requests.post(url, data=body, headers={"Content-Type": kind} if kind else {}, timeout=30)
    assert response.status_code in (400, 415), response.text
    assert response.json()["detail"]


def test_too_many_bytes_and_too_many_seconds(serve: Serve, tmp_path: Path) -> None:
    """P4: each names its limit."""
    url = f"{serve(limits={'body_mb': 1, 'audio_s': 5}).url}/v1/inference/{MODEL}"
    response = post(url, bytes(2 << 20))
    assert (response.status_code, "limits.body_mb" in response.text) == (413, True)
    audio = write_audio(tmp_path / "a.opus", tone(300, 9.0, 48_000), 48_000)
    response = post(url, audio)
    assert (response.status_code, "limits.audio_s" in response.text) == (413, True)


def test_a_failing_engine_is_a_500_that_says_nothing(serve: Serve) -> None:
    """An error of ours is no error of the caller's; the next request is served."""
    url = f"{serve(faults=({'kind': 'raise', 'times': 1},)).url}/v1/inference/{MODEL}"
    answers = [post(url) for _ in range(2)]
    assert sorted(answer.status_code for answer in answers) in ([200, 500], [500, 500])
    assert all(answer.headers["content-type"] == "application/json" for answer in answers)


# ---- routes


def test_routing(serve: Serve) -> None:
    """C95."""
    url = f"{serve().url}/v1/inference/{MODEL}"
    response = requests.get(url, timeout=30)
    assert (response.status_code, response.headers["Allow"]) == (405, "POST")
    assert post(url.replace("whisper-base", "whisper-huge")).status_code == 404
    assert post(f"{url}/").status_code == 404
    assert post(url, version="1").status_code == 200
    assert requests.get(f"{serve().url}/nothing", timeout=30).json() == {"detail": "Not Found"}


def test_tokens(serve: Serve, tmp_path: Path) -> None:
    """C1, C3, C6, C9: in the environment or a file, several, and read again when the file changes."""
    file = tmp_path / "tokens"
    file.write_text("# a remark\ntok-1\ntok-2\n")
    server = serve(tokens=Tokens(("tok-3",), file))
    url = f"{server.url}/v1/inference/{MODEL}"

    def status(**headers: str) -> int:
        files = {"audio": EN_FIVE.read_bytes()}
        return requests.post(url, files=files, headers=headers, timeout=30).status_code

    missing = requests.post(url, timeout=30)
    assert (missing.status_code, missing.headers["WWW-Authenticate"].split()[0]) == (401, "Bearer")
    assert "engine" not in server.app.meters.page().decode()
    assert [status(Authorization=f"{scheme} tok-1") for scheme in ("bearer", "Bearer", "BEARER")] == [200] * 3
    assert [status(Authorization=f"Bearer {token}") for token in ("tok-2", "tok-3")] == [200, 200]
    assert status(**{"xi-api-key": "tok-1"}) == 200
    assert [status(Authorization=value) for value in ("Basic dTpw", "tok-1", "Bearer ", "Bearer tok-", "Bearer é")] == [
        401
    ] * 5
    file.write_text("tok-2\n")
    assert [status(Authorization=f"Bearer {token}") for token in ("tok-1", "tok-2")] == [401, 200]
    file.write_text("grün-tok\n")
    assert status(Authorization="Bearer grün-tok".encode()) == 200  # type: ignore[arg-type]
    file.unlink()  # a secret that was lost opens nothing
    assert status(Authorization="Bearer tok-2") == 401
    file.write_text("tok-2\n")
    assert status(Authorization="Bearer tok-2") == 200
    file.write_text("")
    assert status(Authorization="Bearer tok-2") == 401
    for path in ("healthz", "readyz", "metrics", "docs", "openapi.json", ""):
        page = requests.get(f"{server.url}/{path}", timeout=30)
        assert page.status_code in (200, 503), path
        assert "tok-" not in page.text
    assert requests.get(f"{server.url}/v1/models", timeout=30).status_code == 401


def test_every_token_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """F72: none is passed over once one has matched."""
    import hmac

    compared: list[tuple[bytes, bytes]] = []

    def spy(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", spy)
    assert Tokens(("one", "two", "three")).knows(b"one")
    assert compared == [(b"one", b"one"), (b"one", b"two"), (b"one", b"three")]
