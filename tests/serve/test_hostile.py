"""What would cost the server more than it costs who sends it: values, names, fields; audio that is read for ever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from application import EN_FIVE, MODEL, ROUTE, Serve, demo_config, fake_engine, is_quiet, post, raw, wait_until
from starlette.requests import Request
from starlette.types import Message

from pipeline.config import Config
from pipeline.engine import Heard
from pipeline.types import DecodeOptions, Recording, Segment, Unit, UnitResult
from pipeline.units import read_units
from serve_app import serving
from serve_app.bodies import Bodies
from serve_app.serving import LocalModel


@pytest.mark.parametrize("name", [" x", "x ", "", "x" * 59 + " y", "\t", "\r\nSet-Cookie: a=b"])
def test_names_that_no_header_can_hold(serve: Serve, name: str) -> None:
    """P20: the header that names what was ignored can always be sent."""
    url = f"{serve().url}{ROUTE}"
    response = requests.post(url, files={"audio": EN_FIVE}, params={"a": "1", name: "1"}, timeout=30)
    assert response.status_code == 200
    assert response.headers["Murmur-Ignored"].startswith("a, ")
    assert "Set-Cookie" not in response.headers


def test_all_fields_together_are_bounded(serve: Serve) -> None:
    """They lie in memory: 64 of 1 MB each, from 50 clients, would be 3 GB."""
    server = serve()
    fields = {f"field{number}": "x" * 300_000 for number in range(4)}
    assert post(server, data=fields).status_code == 413
    assert post(server, data=dict(list(fields.items())[:3])).status_code == 200
    wait_until(lambda: is_quiet(server))


@pytest.mark.parametrize("value", ["{},", "[],", "1.5,", '"a":[{},'])
def test_json_of_very_many_values(serve: Serve, value: str) -> None:
    """Refused before it becomes objects, and before all of it has come."""
    server = serve()
    head = (f"POST {ROUTE} HTTP/1.1", "Host: x", "Content-Type: application/json", "Content-Length: 50000000")
    with raw(server, *head, body=b'{"x": [' + value.encode() * 120_000) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    prompt = {"audio": "data:;base64,AAAA", "initial_prompt": "a," * 9_000}
    assert requests.post(f"{server.url}{ROUTE}", json=prompt, timeout=30).status_code == 400  # no audio, but read
    wait_until(lambda: is_quiet(server))


def test_files_that_are_read_for_ever_hold_one_thread_each(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their requests are given up; the other thread reads on for the others."""
    go_on = threading.Event()
    stuck: list[str] = []

    def slow(recording: Recording, config: Config) -> Iterator[Unit | UnitResult]:
        if not stuck:
            stuck.append(recording.id)
            go_on.wait(60)
        yield from read_units(recording, config)

    monkeypatch.setattr(serving, "read_units", slow)
    server = serve(limits={"deadline_s": 1.0}, reader_threads=2)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, server)
        wait_until(lambda: stuck)
        threading.Event().wait(1.5)  # it has been given up by now, and wants its file closed
        try:
            assert [post(server).status_code for _ in range(3)] == [200] * 3
            assert not first.done()
        finally:
            go_on.set()
        assert first.result().status_code == 503
    wait_until(lambda: is_quiet(server))


def test_who_is_given_up_as_it_ends_leaves_no_file(tmp_path: Path) -> None:
    """Its files are removed in a thread, and it is cancelled while all threads are busy."""

    async def story() -> None:
        loop, go_on, inside = asyncio.get_running_loop(), threading.Event(), asyncio.Event()
        loop.set_default_executor(ThreadPoolExecutor(1))

        async def receive() -> Message:
            return {"type": "http.request", "body": b'{"audio": "data:;base64,AAAA"}', "more_body": False}

        async def use() -> None:
            headers = [(b"content-type", b"application/json")]
            async with Bodies(tmp_path, 1 << 20).read(Request({"type": "http", "headers": headers}, receive)):
                loop.run_in_executor(None, go_on.wait)
                inside.set()

        task = asyncio.create_task(use())
        await inside.wait()
        assert len(list(tmp_path.iterdir())) == 1
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        go_on.set()
        await asyncio.wait_for(asyncio.to_thread(wait_until, lambda: not list(tmp_path.iterdir())), 30)

    asyncio.run(story())


class Talker(LocalModel):
    """Says much at once, and is then done."""

    async def submit(
        self, unit: Unit, options: DecodeOptions, heard: Heard | None = None, brief: bool = False
    ) -> UnitResult:
        assert heard is not None
        for _ in range(200):
            heard([Segment(0.0, 1.0, " word" * 20_000, (), -0.1, 1.0, 0.0, 0.0)])
            await asyncio.sleep(0)
        return await super().submit(unit, options, None, brief)


def test_who_reads_slowly_holds_no_place(serve: Serve) -> None:
    """A stream that is decided, and not read: its windows and its file are given back before it is."""
    server = serve(Talker(MODEL, demo_config(engine="fake"), fake_engine()))
    with requests.post(
        f"{server.url}/v1/audio/transcriptions",
        files={"file": EN_FIVE},
        data={"stream": "true"},
        stream=True,
        timeout=60,
    ) as response:
        wait_until(lambda: any(one.flow.write_paused for one in connections(server)))
        wait_until(lambda: not server.app.gate.outstanding and not list(server.app.bodies._folder.iterdir()))
        assert server.app.meters.in_flight._value.get() == 1
        assert response.content.endswith(b"}\n\n")
    wait_until(lambda: is_quiet(server))


def connections(server: Any) -> list[Any]:
    return list(server._uvicorn.server_state.connections)


def test_a_long_method_makes_no_long_line(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="serve_app"):
        response = requests.request("X" * 9000, f"{serve().url}{ROUTE}", timeout=30)
        wait_until(lambda: [one for one in caplog.records if one.name == "serve_app.door"])
    assert response.status_code == 405
    assert max(len(record.getMessage()) for record in caplog.records) < 500
