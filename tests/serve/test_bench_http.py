"""`murmur bench http` against a server: what it counts is what was answered."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from application import MODEL, Serve, clip, demo_config, fake_engine

from pipeline import cli
from pipeline.bench.http import Plan, bench_http
from pipeline.demo import sound_clips
from pipeline.errors import UsageError
from serve_app.auth import Tokens
from serve_app.serving import LocalModel

CLIP = str(clip("en-five.mp3"))


def measure(url: str, **how: Any) -> dict[str, Any]:
    return asyncio.run(bench_http(Plan(url, (CLIP,), **{"clients": 3, "seconds": 0.8, **how})))


def test_answers(serve: Serve) -> None:
    found = measure(serve().url)
    n = found["answers"].pop("200")
    assert n >= 3
    assert not found["answers"]
    assert found["plan"]["model"] == MODEL
    assert found["rtfx"] * found["wall_s"] == pytest.approx(n * sound_clips()[Path(CLIP)], rel=0.02)
    assert 0 < found["answer_s"]["median"] <= found["answer_s"]["longest"]
    assert found["refusal_s"] is None


def test_refusals_and_errors(serve: Serve) -> None:
    engine = fake_engine({"kind": "hang", "text": "0.5"})
    model = LocalModel(MODEL, demo_config(engine="fake"), engine)
    server = serve(model, limits={"in_flight_windows": 2, "queued_windows": 0})
    found = measure(server.url, clients=6)
    assert found["answers"]["200"] > 0
    assert found["answers"]["503"] > 0
    assert found["refusal_s"]["median"] < found["answer_s"]["median"]
    wrong = measure(server.url, model="nobody", seconds=0.2)
    assert set(wrong["answers"]) == {"404"}
    assert "nobody" in next(iter(wrong["errors"]))


def test_tokens(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(tokens=Tokens(["secret"]))
    with pytest.raises(UsageError, match="401"):
        measure(server.url)
    monkeypatch.setenv("MURMUR_API_TOKENS", "secret,other")
    assert set(measure(server.url)["answers"]) == {"200"}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"url": "127.0.0.1:8000"}, "http:// or https://"),
        ({"url": "http://127.0.0.1:1"}, "no server answers there"),
        ({"files": ("nowhere.wav",)}, "nowhere.wav: there is no such file"),
        ({"clients": 0}, "--clients begins at 1"),
    ],
)
def test_what_cannot_be_measured(how: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        asyncio.run(bench_http(Plan(**{"url": "http://127.0.0.1:1", "files": (CLIP,), **how})))


def test_the_command(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "http.json"
    with pytest.raises(SystemExit, match="0"):
        cli.main(
            ["bench", "http", serve().url, CLIP, "--seconds", "0.5", "--clients", "2", "--out", str(out), "--json"]
        )
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["answers"] == json.loads(out.read_text())["answers"]
    assert "2 clients for 0.5 s" in said.err
