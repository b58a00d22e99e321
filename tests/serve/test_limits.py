"""What callers may not do to the server: bodies without an end, slow ones, too many, callers that leave, bad HTTP."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import psutil
import pytest
import requests
from application import (
    EN_FIVE,
    MODEL,
    ROUTE,
    Serve,
    answer,
    clip,
    demo_config,
    fake_engine,
    is_quiet,
    post,
    raw,
    wait_until,
)
from prometheus_client.parser import text_string_to_metric_families

from pipeline.config import LimitsConfig
from serve_app import bodies, door, limits
from serve_app.limits import BusyError, Gate
from serve_app.serving import LocalModel


def send_without_end(connection: socket.socket, block: bytes) -> None:
    for _ in range(4000):
        connection.sendall(block)


# ---- bodies


def test_a_body_without_an_end(serve: Serve) -> None:
    """413 as soon as the cap is passed, whatever was promised; nothing stays on disk."""
    server = serve(limits={"body_mb": 1})
    head = ("POST " + ROUTE + " HTTP/1.1", "Host: x", "Content-Type: multipart/form-data; boundary=b",
            "Transfer-Encoding: chunked")  # fmt: skip
    part = b'--b\r\nContent-Disposition: form-data; name="audio"; filename="a"\r\n\r\n'
    with raw(server, *head, body=b"%x\r\n%s\r\n" % (len(part), part)) as connection:
        chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            send_without_end(connection, chunk)
    with raw(server, *head, body=b"%x\r\n%s\r\n" % (len(part), part) + 17 * chunk) as connection:
        assert answer(connection).startswith(b"HTTP/1.1 413 ")
    wait_until(lambda: is_quiet(server))


def test_many_bodies_without_an_end_take_no_memory(serve: Serve) -> None:
    """50 at once, 8 MB each so far and going on, in a form and in JSON: they lie on disk, not here."""
    server = serve(limits={"body_mb": 100})
    process = psutil.Process()
    form = b'--b\r\nContent-Disposition: form-data; name="audio"; filename="a"\r\n\r\n'
    kinds = [("multipart/form-data; boundary=b", form), ("application/json", b'{"audio": "data:;base64,')]
    before = process.memory_info().rss
    sockets = []
    try:
        for i in range(50):
            kind, begin = kinds[i % 2]
            connection = socket.create_connection((server.host, server.port), timeout=30)
            sockets.append(connection)
            lines = [
                f"POST {ROUTE} HTTP/1.1",
                "Host: x",
                f"Content-Type: {kind}",
                f"Content-Length: {90 << 20}",
                "",
                "",
            ]
            connection.sendall("\r\n".join(lines).encode() + begin)
        block = b"A" * (1 << 20)
        for _ in range(8):
            for connection in sockets:
                connection.sendall(block)
        assert requests.get(f"{server.url}/healthz", timeout=10).status_code == 200
        assert post(server).status_code == 200
        assert process.memory_info().rss - before < 200 << 20
    finally:
        for connection in sockets:
            connection.close()
    wait_until(lambda: is_quiet(server))


def test_a_slow_body_is_given_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """F52: 100 clients that hardly send anything; the others are served meanwhile."""
    monkeypatch.setattr(bodies, "READ_S", 1.0)
    server = serve()
    head = ("POST " + ROUTE + " HTTP/1.1", "Host: x", "Content-Type: application/json", "Content-Length: 1000")
    sockets = [socket.create_connection((server.host, server.port), timeout=30) for _ in range(100)]
    for connection in sockets:
        connection.sendall("\r\n".join([*head, "", "{"]).encode())
    assert post(server).status_code == 200
    for connection in sockets:
        with connection:
            assert answer(connection).startswith(b"HTTP/1.1 408 ")
    wait_until(lambda: is_quiet(server))


def test_an_upload_that_breaks_off_leaves_nothing(serve: Serve) -> None:
    server = serve()
    head = ("POST " + ROUTE + " HTTP/1.1", "Host: x", "Content-Type: multipart/form-data; boundary=b",
            "Content-Length: 5000000")  # fmt: skip
    part = b'--b\r\nContent-Disposition: form-data; name="audio"; filename="a"\r\n\r\n' + bytes(2 << 20)
    with raw(server, *head, body=part):
        wait_until(lambda: server.app.meters.in_flight._value.get() == 1)
    wait_until(lambda: is_quiet(server))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EMFILE])
def test_a_full_disk(serve: Serve, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """F59: 503 with a Retry-After, and nothing left over; the same where no file can be opened any more."""
    server = serve()

    def full(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(bodies, "copyfileobj", full)
    response = post(server)
    assert (response.status_code, bool(response.headers["Retry-After"])) == (503, True)
    monkeypatch.undo()
    assert post(server).status_code == 200
    wait_until(lambda: is_quiet(server))


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "zstd", "br"])
def test_encoded_bodies(serve: Serve, encoding: str) -> None:
    """F66."""
    assert post(serve(), headers={"Content-Encoding": encoding}).status_code == 415


@pytest.mark.parametrize(
    "lengths",
    [["Content-Length: -1"], ["Content-Length: 3", "Content-Length: 4"], ["Content-Length: abc"],
     ["Content-Length: 5", "Transfer-Encoding: chunked"], ["Transfer-Encoding: nonsense"]],
)  # fmt: skip
def test_lengths_that_contradict(serve: Serve, lengths: list[str]) -> None:
    """F64: 400 (501 where the encoding is none), and the connection is closed."""
    server = serve()
    lines = ("POST " + ROUTE + " HTTP/1.1", "Host: x", "Content-Type: application/json", *lengths)
    with raw(server, *lines, body=b"0\r\n\r\n") as connection:
        assert answer(connection)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 501")
    assert post(server).status_code == 200


def test_ways_to_send_the_same(serve: Serve) -> None:
    """C41: chunked, with Expect, and HTTP/1.0."""
    server = serve()
    body = b'--b\r\nContent-Disposition: form-data; name="audio"; filename="a"\r\n\r\n' + EN_FIVE + b"\r\n--b--\r\n"
    kind = "Content-Type: multipart/form-data; boundary=b"
    length = f"Content-Length: {len(body)}"
    texts = {post(server).json()["text"]}
    chunks = requests.post(
        f"{server.url}{ROUTE}", data=iter([body[:1000], body[1000:]]),
        headers={"Content-Type": "multipart/form-data; boundary=b"}, timeout=30,
    )  # fmt: skip
    texts.add(chunks.json()["text"])
    with raw(server, f"POST {ROUTE} HTTP/1.0", kind, length, body=body) as connection:
        texts.add(json.loads(answer(connection).partition(b"\r\n\r\n")[2])["text"])
    with raw(
        server, f"POST {ROUTE} HTTP/1.1", "Host: x", "Connection: close", "Expect: 100-continue", kind, length
    ) as c:
        assert c.recv(100).startswith(b"HTTP/1.1 100 ")
        c.sendall(body)
        texts.add(json.loads(answer(c).partition(b"\r\n\r\n")[2])["text"])
    assert len(texts) == 1


def test_a_thousand_idle_connections(serve: Serve) -> None:
    """F60."""
    server = serve()
    sockets = [socket.create_connection((server.host, server.port), timeout=30) for _ in range(1000)]
    try:
        assert requests.get(f"{server.url}/healthz", timeout=10).status_code == 200
        assert post(server).status_code == 200
    finally:
        for connection in sockets:
            connection.close()


def test_an_answer_that_nobody_reads(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """F53: the connection is cut, and what was held for it is given back."""
    from serve_app import server as serving

    monkeypatch.setattr(serving, "UNREAD_MS", 1500)
    text = "word " * 2_000_000
    server = serve(faults=({"kind": "text", "text": text},))
    body = b'--b\r\nContent-Disposition: form-data; name="audio"; filename="a"\r\n\r\n' + EN_FIVE + b"\r\n--b--\r\n"
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((server.host, server.port))
    with connection:
        head = [f"POST {ROUTE} HTTP/1.1", "Host: x", "Content-Type: multipart/form-data; boundary=b"]
        connection.sendall("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
        ours = psutil.Process()

        def theirs() -> list[Any]:
            return [
                one for one in ours.net_connections("tcp") if one.raddr and one.raddr[1] == connection.getsockname()[1]
            ]

        wait_until(theirs)
        wait_until(lambda: not theirs(), 60)
    wait_until(lambda: is_quiet(server))


# ---- too many, too long


def test_more_than_there_is_room_for(serve: Serve) -> None:
    """Served and refused make all that was sent; the refused are told when to come again; then it is ready."""
    engine = fake_engine({"kind": "hang", "text": "0.3"})
    server = serve(LocalModel(MODEL, demo_config(engine="fake"), engine),
                   limits={"in_flight_windows": 4, "queued_windows": 4})  # fmt: skip
    wait_until(lambda: server.app.why_not_ready() is None)
    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(lambda _: post(server), range(60)))
    served = [one for one in answers if one.status_code == 200]
    refused = [one for one in answers if one.status_code == 503]
    assert len(served) + len(refused) == 60
    assert served
    assert refused
    assert all(1 <= int(one.headers["Retry-After"]) <= 60 and "busy" in one.json()["detail"] for one in refused)
    wait_until(lambda: is_quiet(server))
    assert requests.get(f"{server.url}/readyz", timeout=10).status_code == 200
    assert post(server).status_code == 200


def test_refused_before_the_body_is_read(serve: Serve) -> None:
    """Who would be refused anyway need not send 50 MB first; 429 where that is set."""
    engine = fake_engine({"kind": "hang", "text": "3600"})
    server = serve(LocalModel(MODEL, demo_config(engine="fake"), engine),
                   limits={"in_flight_windows": 1, "queued_windows": 0, "busy_status": 429})  # fmt: skip
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, server)
        wait_until(lambda: engine.n_windows)
        head = (f"POST {ROUTE} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {50 << 20}")
        with raw(server, *head, body=b"{") as connection:
            said = connection.recv(65536)
        assert said.startswith(b"HTTP/1.1 429 ")
        assert b"retry-after:" in said.lower()
        server.drain()
        assert (first.result().status_code, first.result().headers["Retry-After"]) == (503, "5")


def test_the_deadline(serve: Serve) -> None:
    """Given up with its lanes, and said so; the audio's own length is on top."""
    engine = fake_engine({"kind": "hang", "text": "3600"})
    short = demo_config(engine="fake")
    server = serve(LocalModel(MODEL, short, engine), limits={"deadline_s": 0.2})
    response = requests.post(f"{server.url}{ROUTE}", files={"audio": clip("silence.wav").read_bytes()}, timeout=60)
    assert response.status_code in (200, 503)
    response = requests.post(f"{server.url}{ROUTE}", files={"audio": clip("en-one.wav").read_bytes()}, timeout=60)
    assert response.status_code == 503
    assert "limits.deadline_s" in response.json()["detail"]
    assert response.headers["Retry-After"]
    wait_until(lambda: not engine.n_windows and is_quiet(server))


def test_who_leaves_frees_the_engine(serve: Serve) -> None:
    engine = fake_engine({"kind": "hang", "text": "3600"})
    server = serve(LocalModel(MODEL, demo_config(engine="fake"), engine))
    body = b'--b\r\nContent-Disposition: form-data; name="audio"; filename="a"\r\n\r\n' + EN_FIVE + b"\r\n--b--\r\n"
    head = (f"POST {ROUTE} HTTP/1.1", "Host: x", "Content-Type: multipart/form-data; boundary=b",
            f"Content-Length: {len(body)}")  # fmt: skip
    with raw(server, *head, body=body):
        wait_until(lambda: engine.n_windows)
    wait_until(lambda: not engine.n_windows and is_quiet(server))


def test_draining(serve: Serve) -> None:
    """What runs is finished, nothing new is taken, and it says that it is not ready."""
    engine = fake_engine({"kind": "hang", "text": "1.0"})
    server = serve(LocalModel(MODEL, demo_config(engine="fake"), engine), drain_s=20.0)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(post, server)
        wait_until(lambda: engine.n_windows)
        server.drain()
        assert running.result().status_code == 200
    with pytest.raises(requests.ConnectionError):
        post(server)
    assert server.app.why_not_ready() == "shutting down"


def test_an_engine_that_stands_still_is_not_ready(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    from serve_app import app

    monkeypatch.setattr(app, "LOOK_EVERY_S", 0.05)
    engine = fake_engine({"kind": "hang", "text": "3600"})
    server = serve(LocalModel(MODEL, demo_config(engine="fake"), engine), engine_timeout_s=0.3)
    wait_until(lambda: requests.get(f"{server.url}/readyz", timeout=10).status_code == 200)
    threading.Thread(target=post, args=(server,), daemon=True).start()
    wait_until(lambda: requests.get(f"{server.url}/readyz", timeout=10).status_code == 503)
    said = requests.get(f"{server.url}/readyz", timeout=10)
    assert "stood still" in said.json()["reason"]
    assert requests.get(f"{server.url}/healthz", timeout=10).status_code == 200


# ---- what is told


def test_metrics(serve: Serve) -> None:
    """C97, F62: they parse, count what was done, and have no label that a caller can make up."""
    server = serve()

    def values() -> dict[str, float]:
        text = requests.get(f"{server.url}/metrics", timeout=10).text
        return {
            sample.name + json.dumps(sample.labels, sort_keys=True): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    post(server)
    ok = 'murmur_http_requests_total{"route": "/v1/inference/{model}", "status": "200"}'
    first = values()
    post(server)
    second = values()
    assert second[ok] - first[ok] == 1
    assert second["murmur_http_audio_seconds_total{}"] - first["murmur_http_audio_seconds_total{}"] == pytest.approx(
        14.146, abs=0.2
    )
    assert second["murmur_http_in_flight{}"] == 1  # the one that asks
    names = len(values())
    with requests.Session() as session:
        for i in range(100):
            session.post(f"{server.url}/v1/inference/{i}/{os.urandom(8).hex()}", timeout=10)
            session.get(f"{server.url}/{os.urandom(8).hex()}", timeout=10)
    assert len(values()) - names < 40


def test_hostile_text(serve: Serve) -> None:
    """F70: a transcript is never a page."""
    server = serve(faults=({"kind": "text", "text": "<script>alert(1)</script> -->"},))
    for format in ("json", "text", "srt", "vtt", "verbose_json"):
        said = requests.post(
            f"{server.url}/v1/audio/transcriptions",
            files={"file": EN_FIVE},
            data={"response_format": format},
            timeout=30,
        )
        assert not said.headers["content-type"].startswith("text/html")
        assert said.headers["X-Content-Type-Options"] == "nosniff"
        if format == "vtt":
            assert "&lt;script&gt;" in said.text
            assert "<script>" not in said.text


def test_logs_hold_neither_tokens_nor_texts(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    from serve_app.auth import Tokens

    server = serve(tokens=Tokens(("geheim",)), faults=({"kind": "text", "text": "spoken words"},))
    with caplog.at_level("INFO", logger="serve_app"):
        done = post(server, headers={"Authorization": "Bearer geheim"})
        post(server, headers={"Authorization": "Bearer falsch"})
        wait_until(lambda: len([one for one in caplog.records if one.name == "serve_app.door"]) >= 2)
    lines = "\n".join(record.getMessage() for record in caplog.records)
    assert done.json()["request_id"] in lines
    assert not [word for word in ("geheim", "falsch", "spoken") if word in lines]
    record = next(one for one in caplog.records if getattr(one, "request", "") == done.json()["request_id"])
    assert (record.status, record.route) == ("200", door.ROUTES[0])  # type: ignore[attr-defined]


# ---- the gate


def test_the_gate_counts_windows() -> None:
    async def story() -> None:
        gate = Gate(LimitsConfig(in_flight_windows=16, queued_windows=16), lanes=1)
        with gate.admitted() as long, gate.admitted() as short:
            assert gate.outstanding == 2
            async with long.inside(30):  # one request counts for an eighth of the room at most
                assert (gate.outstanding, gate.running) == (4 + 1, 30)
                async with short.inside(2):  # somebody's first Unit is not behind it
                    assert (gate.outstanding, gate.running) == (4 + 2, 32)
                waiting = asyncio.create_task(_hold(long, 30))  # its own next one waits until the windows are few
                await turns()
                assert (gate.waiting, gate.running, waiting.done()) == (30, 30, False)
            await waiting
            assert (gate.running, gate.waiting) == (0, 0)
            async with long.inside(30):
                given_up = asyncio.create_task(_hold(long, 30))
                await turns()
                given_up.cancel()
                await asyncio.gather(given_up, return_exceptions=True)
                assert (gate.running, gate.waiting, long.windows) == (30, 0, 30)
        assert (gate.outstanding, gate.requests, gate.running, gate._firsts) == (0, 0, 0, 0)

    async def _hold(ticket: limits.Ticket, windows: int) -> None:
        async with ticket.inside(windows):
            await asyncio.sleep(0)

    asyncio.run(story())


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_full_gate_refuses_but_never_what_nobody_waits_for() -> None:
    gate = Gate(LimitsConfig(in_flight_windows=1, queued_windows=1), lanes=1)
    with gate.admitted(), gate.admitted():
        with pytest.raises(BusyError) as full, gate.admitted():
            pass
        assert 1 <= full.value.retry_after_s <= limits.LONGEST_PAUSE_S
        with gate.admitted(waits=True):
            assert gate.outstanding == 3
    assert gate.outstanding == 0


def test_who_arrives_counts_for_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many at once are refused before their bodies are read; slow ones keep nobody out."""
    gate = Gate(LimitsConfig(in_flight_windows=1, queued_windows=1), lanes=1)
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(gate.arriving())
        with pytest.raises(BusyError), gate.arriving():
            pass
        monkeypatch.setattr(limits, "FRESH_S", -1.0)
        with gate.arriving():
            assert not gate.outstanding
    assert not gate._arrivals


def test_first_units_go_in_as_they_came() -> None:
    async def story() -> None:
        gate = Gate(LimitsConfig(in_flight_windows=8, queued_windows=1000), lanes=1)
        order: list[int] = []

        async def request(number: int) -> None:
            with gate.admitted() as ticket:
                async with ticket.inside(10):
                    order.append(number)
                    await turns()

        await asyncio.gather(*(request(number) for number in range(30)))
        assert order == list(range(30))

    asyncio.run(story())


def test_derived_from_lanes() -> None:
    gate = Gate(LimitsConfig(), lanes=8)
    assert (gate.in_flight, gate.queued) == (16, 64)
    gate.size(16)
    assert (gate.in_flight, gate.queued) == (32, 128)
