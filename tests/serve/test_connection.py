"""What a connection may cost that asks for nothing, or for nothing that is HTTP, or takes its answer by drops."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import requests
from application import EN_FIVE, ROUTE, Serve, answer, is_quiet, post, raw, wait_until

from serve_app import connection as connection_module
from serve_app.auth import Tokens
from serve_app.connection import Connection
from serve_app.server import HttpServer


def all_of(server: HttpServer) -> list[Connection]:
    return [one for one in server._uvicorn.server_state.connections if isinstance(one, Connection)]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "HEAD_S", 0.5)


def until_cut(step: Callable[[], object]) -> None:
    """Again and again, until the other side has ended the connection."""
    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        repeat(step)


def repeat(step: Callable[[], object]) -> None:
    for _ in range(2000):
        step()
        time.sleep(0.01)


def bare(server: HttpServer, *parts: bytes) -> socket.socket:
    with ExitStack() as stack:
        connection = stack.enter_context(socket.create_connection((server.host, server.port), timeout=20))
        for part in parts:
            connection.sendall(part)
        stack.pop_all()
    return connection


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("begun", [b"", b"GET /healthz HTTP/1.1\r\nHo", b"G"])
def test_a_head_that_does_not_come(serve: Serve, begun: bytes) -> None:
    """Half a head, or nothing: the connection ends, and a byte now and then does not keep it."""
    server = serve()
    with bare(server, begun) as connection:
        said = answer(connection)
    assert not said or (said.startswith(b"HTTP/1.1 408 ") and json.loads(said.partition(b"\r\n\r\n")[2])["detail"])
    assert bool(said) == bool(begun.strip())
    with bare(server, b"GET /healthz HTTP/1.1\r\nX: ") as connection:
        until_cut(lambda: connection.sendall(b"a"))
    wait_until(lambda: not all_of(server))


@pytest.mark.usefixtures("quick")
def test_a_second_head_that_does_not_come(serve: Serve) -> None:
    server = serve()
    with bare(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n") as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /hea")
        assert answer(connection).startswith(b"HTTP/1.1 408 ")
    with requests.Session() as session:  # what is complete is not hurried
        for _ in range(3):
            assert session.get(f"{server.url}/healthz", timeout=20).status_code == 200
            time.sleep(0.4)
        assert post(server).status_code == 200


def test_as_many_as_can_be_borne(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was idle longest makes room; who is being answered does not."""
    monkeypatch.setattr(connection_module, "MOST", 5)
    server = serve()
    head = (f"POST {ROUTE} HTTP/1.1", "Host: x", "Content-Type: application/json", "Content-Length: 1000")
    with raw(server, *head, body=b"{") as busy:
        wait_until(lambda: server.app.meters.in_flight._value.get())
        idle = [bare(server) for _ in range(12)]
        try:
            assert requests.get(f"{server.url}/healthz", timeout=20).status_code == 200
            assert len(all_of(server)) <= 5
            assert not idle[0].recv(1)
        finally:
            for one in idle:
                one.close()
        busy.sendall(b'"audio": 1}' + b" " * 988)
        assert busy.recv(65536).startswith(b"HTTP/1.1 422 ")


def test_all_of_them_busy(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "MOST", 1)
    server = serve()
    head = (f"POST {ROUTE} HTTP/1.1", "Host: x", "Content-Type: application/json", "Content-Length: 1000")
    with raw(server, *head, body=b"{"):
        wait_until(lambda: server.app.meters.in_flight._value.get())
        refused = requests.get(f"{server.url}/healthz", timeout=20)
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
    assert "connections" in refused.json()["detail"]
    wait_until(lambda: is_quiet(server))


def test_what_is_no_http(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """Told so in JSON; where an answer has begun, the connection ends, and nothing else."""
    server = serve()
    tls, old, folded = b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET /healthz\r\n\r\n", b"GET / HTTP/1.1\r\n a\x00\r\n\r\n"
    for nonsense in (tls, old, folded):
        with bare(server, nonsense) as connection:
            said, _, body = answer(connection).partition(b"\r\n\r\n")
        assert said.startswith(b"HTTP/1.1 400 Bad Request")
        assert b"content-type: application/json" in said.lower()
        assert json.loads(body) == {"detail": "not a valid HTTP request"}
    head = (f"POST {ROUTE} HTTP/1.1", "Host: x", "Content-Type: text/plain", "Transfer-Encoding: chunked")
    with raw(server, *head, body=b"5\r\nabcde\r\n") as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 415 ")
        connection.sendall(b"nonsense\r\n")
        assert b"HTTP/1.1" not in answer(connection)
    wait_until(lambda: is_quiet(server))
    assert not [one for one in caplog.records if one.levelname in ("ERROR", "CRITICAL")]


def test_chunks_of_one_byte(serve: Serve) -> None:
    """A megabyte of them costs seconds; they are taken a little at once, with turns for others in between."""
    server = serve()
    head = (f"POST {ROUTE} HTTP/1.1", "Host: x", "Content-Type: application/json", "Transfer-Encoding: chunked")
    most, original = 0, Connection._take

    def take(self: Connection, data: bytes) -> None:
        nonlocal most
        most = max(most, data.count(b"\r\n"))
        original(self, data)

    Connection._take = take  # type: ignore[method-assign]
    try:
        body = b"".join(b"1\r\n%c\r\n" % byte for byte in b'{"audio": "data:;base64,' + b"A" * 40_000)
        with raw(server, *head) as connection:
            sending = threading.Thread(target=connection.sendall, args=(body,))
            sending.start()
            assert requests.get(f"{server.url}/healthz", timeout=20).status_code == 200
            sending.join()
            connection.sendall(b'2\r\n"}\r\n0\r\n\r\n')
            assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")  # all of it came: it is no audio
    finally:
        Connection._take = original  # type: ignore[method-assign]
    assert 0 < most <= 2 * connection_module.MANY_LINES + connection_module.SLICE // 3


def test_an_answer_that_is_read_by_drops(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel sees a client that lives; its connection, and what is kept for it, end all the same."""
    monkeypatch.setattr(connection_module, "UNREAD_S", 0.5)
    server = serve(faults=({"kind": "text", "text": "word " * 1_000_000},))
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)  # five million bytes are an answer's on a busy machine
        connection.connect((server.host, server.port))
        body = b'--b\r\nContent-Disposition: form-data; name="audio"; filename="a"\r\n\r\n' + EN_FIVE + b"\r\n--b--\r\n"
        lines = [f"POST {ROUTE} HTTP/1.1", "Host: x", "Content-Type: multipart/form-data; boundary=b"]
        connection.sendall("\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body)
        wait_until(lambda: all_of(server))
        wait_until(lambda: connection.recv(1) and not all_of(server), within_s=60)
    wait_until(lambda: is_quiet(server))


# ---- turned away for the head alone


POST_HEAD = (f"POST {ROUTE} HTTP/1.1", "Host: x", "Content-Type: application/json")


def parted(said: bytes) -> tuple[str, dict[str, str], bytes]:
    """The first line, the headers but for those that differ from answer to answer, the body."""
    head, _, body = said.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    named = dict(line.lower().split(": ", 1) for line in lines)
    return first, {name: value for name, value in named.items() if name not in ("date", "x-request-id")}, body


def test_turned_away(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """The answer comes before the body, which may still come; its bytes, the refusal and its time are counted once."""
    server = serve(tokens=Tokens(("secret",)))
    with caplog.at_level("INFO"), raw(server, *POST_HEAD, "Content-Length: 300000", body=b"{" * 1000) as connection:
        said = connection.recv(65536)
        connection.sendall(b" " * 298_000)
        wait_until(lambda: all_of(server)[0]._away._n_read == 299_000)
        assert not [one for one in caplog.records if "body_bytes" in one.message]  # it is not over
        connection.sendall(b" " * 1000)
        assert not answer(connection)
        wait_until(lambda: not all_of(server))
    assert said.startswith(b"HTTP/1.1 401 Unauthorized\r\n")
    assert json.loads(parted(said)[2]) == {"detail": "a token is needed: Authorization: Bearer TOKEN"}
    (line,) = [one.message for one in caplog.records if "body_bytes" in one.message]
    assert "401" in line
    assert "body_bytes 300000," in line
    assert 'murmur_http_requests_total{route="/v1/inference/{model}",status="401"} 1.0' in page_of(server)
    assert "murmur_http_body_bytes_total 300000.0" in page_of(server)
    assert is_quiet(server)


def page_of(server: HttpServer) -> str:
    return server.app.meters.page().decode()


def test_turned_away_is_said_as_in_any_other_way(serve: Serve) -> None:
    """A body in chunks, whose length nobody knows, goes the long way: the same answer but for the spelling of names."""
    server = serve(tokens=Tokens(("secret",)))
    with raw(server, *POST_HEAD, "Content-Length: 2", body=b"{}") as connection:
        short = answer(connection)
    with raw(server, *POST_HEAD, "Transfer-Encoding: chunked", body=b"2\r\n{") as connection:
        long = connection.recv(65536)
    assert parted(short) == parted(long)
    assert parted(short)[1]["connection"] == "close"


@pytest.mark.parametrize("sent", [b"", b"{" * 10])
def test_turned_away_and_silent(serve: Serve, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    """A body that does not come is waited for a moment; one that does not end is not taken for ever."""
    monkeypatch.setattr(connection_module, "LINGER_S", 0.5)
    server = serve(tokens=Tokens(("secret",)))
    with raw(server, *POST_HEAD, "Content-Length: 300000", body=sent) as connection:
        assert answer(connection).startswith(b"HTTP/1.1 401 ")
    monkeypatch.setattr(connection_module, "LINGER_S", 60)
    monkeypatch.setattr(connection_module, "LINGER_BYTES", 1 << 20)
    with raw(server, *POST_HEAD, f"Content-Length: {1 << 40}") as connection:
        until_cut(lambda: connection.sendall(b" " * 100_000))
    wait_until(lambda: not all_of(server))


def test_turned_away_on_a_connection_that_was_used(serve: Serve) -> None:
    """What was asked before is answered; what is sent after it, with the body or behind it, is not."""
    server = serve(tokens=Tokens(("secret",)))
    second = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    with raw(server, "GET /healthz HTTP/1.1", "Host: x") as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        connection.sendall("\r\n".join([*POST_HEAD, "Content-Length: 2", "", ""]).encode() + b"{}" + second)
        said = answer(connection)
    assert (said.count(b"HTTP/1.1"), said[:12]) == (1, b"HTTP/1.1 401")
    assert is_quiet(server)


def test_the_server_ends_while_one_is_turned_away(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "LINGER_S", 60)
    server = serve(tokens=Tokens(("secret",)))
    with raw(server, *POST_HEAD, "Content-Length: 300000") as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")
        server.drain()
        assert not answer(connection)
    assert not server.is_alive
    assert 'status="401"} 1.0' in page_of(server)
