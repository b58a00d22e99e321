"""The description: valid by an outside validator, true by what a generator of requests makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import requests
import schemathesis
from application import EN_FIVE, MODEL, Serve
from openapi_spec_validator import OpenAPIV31SpecValidator
from openapi_sweep import sweep
from schemathesis import GenerationMode

from serve_app.auth import Tokens


def description(url: str) -> dict[str, Any]:
    said: dict[str, Any] = requests.get(f"{url}/openapi.json", timeout=30).json()
    return said


def test_it_is_valid(serve: Serve) -> None:
    said = description(serve(tokens=Tokens(("t",))).url)
    OpenAPIV31SpecValidator(said).validate()
    assert {path for path in said["paths"] if "inference" in path or "audio" in path} == {
        "/v1/inference/{model}", "/v1/audio/transcriptions", "/v1/audio/translations",
        "/v1/openai/audio/transcriptions", "/v1/openai/audio/translations",
    }  # fmt: skip
    assert said["security"] == [{"token": []}]
    form = said["paths"]["/v1/inference/{model}"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert set(form["properties"]) == {
        "audio", "task", "initial_prompt", "temperature", "language", "chunk_level", "chunk_length_s", "webhook",
    }  # fmt: skip
    assert form["required"] == ["audio"]
    length = form["properties"]["chunk_length_s"]
    assert [(one["minimum"], one["maximum"]) for one in length["anyOf"] if one["type"] == "integer"] == [(1, 30)]


def test_the_page_of_it(serve: Serve) -> None:
    url = serve().url
    page = requests.get(f"{url}/docs", timeout=30)
    assert page.headers["content-type"].startswith("text/html")
    for word in ("/v1/inference/{model}", "chunk_length_s", "integer 1 … 30", "NativeAnswer", "tokens_generated"):
        assert word in page.text, word
    assert "<script" not in page.text
    assert "http" not in page.text.replace("http://", "").replace("https://", "")[:400]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # schemathesis's own, of what it imports
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_nothing_that_it_allows_or_forbids_breaks_the_server(serve: Serve, mode: GenerationMode) -> None:
    """schemathesis in its small form; the long one is `tests/benchmarks/http_hostile.py`."""
    server = serve()
    assert sweep(server.url, mode, 12) >= 11
    assert not server.app.gate.requests


def test_models_in_the_path(serve: Serve) -> None:
    assert requests.post(f"{serve().url}/v1/inference/{MODEL}", timeout=30).status_code == 415


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("audio", [EN_FIVE, b"no audio"])
def test_a_stream_is_as_described(serve: Serve, audio: bytes) -> None:
    url, path = serve().url, "/v1/audio/transcriptions"
    response = requests.post(f"{url}{path}", files={"file": audio}, data={"stream": "true"}, timeout=60)
    assert response.headers["content-type"].startswith("text/event-stream")
    schemathesis.openapi.from_url(f"{url}/openapi.json")[path]["POST"].validate_response(response)
