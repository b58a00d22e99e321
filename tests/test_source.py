"""The bytes of a file on any store: in few requests, asked for again where that helps, given up where it does not."""

from __future__ import annotations

import io
import re
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import fsspec
import numpy as np
import pytest
from audio_files import noise, write_audio, write_wav

from pipeline import source
from pipeline.config import Config
from pipeline.errors import AudioError, ForbiddenError, NotFoundError, SourceError, SourceTimeoutError
from pipeline.source import Source
from pipeline.stitch import stitch
from pipeline.types import Recording, Unit, UnitResult
from pipeline.units import read_units


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`. The path's first part says how: as /ranges, or with all ranges ignored (/whole), or so
    and with no length stated (/endless). What the next GETs suffer is in `server.plan`: a status, `cut`, `reset`."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append((self.command, self.path, asked))
        how, _, name = self.path.partition("?")[0].strip("/").partition("/")
        fate = self.server.fate(self.command)
        if fate.isdecimal() or how.isdecimal():
            self._refuse(int(fate or how))
            return
        data = self.server.files[name]
        if asked and how == "ranges":
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1, len(data))
            if start >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self._end(b"")
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            data = data[start:stop]
        else:
            self.send_response(200)
        if how == "endless":
            self.close_connection = True
            self.end_headers()
            self._write(data if body else b"")
        else:
            self._end(data, fate if body else "head")

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        if self.server.retry_after is not None:
            self.send_header("Retry-After", self.server.retry_after)
        self._end(b"")

    def _end(self, data: bytes, fate: str = "") -> None:
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fate in ("cut", "reset"):
            data = data[: len(data) // 2]
            self.close_connection = True
        self._write(data if fate != "head" else b"")
        if fate == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.rfile, self.wfile = io.BytesIO(), io.BytesIO()

    def _write(self, data: bytes) -> None:
        with suppress(ConnectionError):  # the reader has what it needs
            for at in range(0, len(data), 1024):
                self.wfile.write(data[at : at + 1024])
                if self.server.bytes_per_s:
                    time.sleep(1024 / self.server.bytes_per_s)
            self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.plan: list[str] = []
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, range
        self.retry_after: str | None = None
        self.bytes_per_s = 0
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def fate(self, method: str) -> str:
        return self.plan.pop(0) if self.plan and method == "GET" else ""

    @property
    def gets(self) -> list[str | None]:
        """The ranges that were asked for, in order."""
        return [asked for method, _, asked in self.asked if method == "GET"]


@pytest.fixture
def http() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other at once."""
    monkeypatch.setattr(source, "FIRST_WAIT_S", 0.001)


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "FIRST", 16 << 10)
    monkeypatch.setattr(source, "RANGE", 64 << 10)


def content(n_bytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(n_bytes)


def read(uri: str, size: int = 10_000) -> tuple[bytes, int]:
    """All bytes, asked for `size` at a time, and the attempts."""
    opened = Source(uri)
    data = b"".join(opened.read_at(at, size) for at in range(0, max(opened.size, 1), size))
    assert len(data) == opened.size
    opened.close()
    return data, opened.attempts


def refused(uri: str) -> AudioError:
    with pytest.raises(AudioError) as caught:
        read(uri)
    return caught.value


def row(uri: str, **settings: object) -> UnitResult | Unit:
    """What becomes of a recording of one Unit."""
    (item,) = read_units(Recording("id", uri), Config.model_validate({"vad": "none", **settings}))
    return item


# ---- requests


@pytest.mark.parametrize("how", ["ranges", "whole", "endless"])
@pytest.mark.parametrize("n_bytes", [0, 1, 16 << 10, (16 << 10) + 1, 80 << 10, 300_000])
def test_over_http(how: str, n_bytes: int, http: Server, small_ranges: None) -> None:
    http.files["a"] = content(n_bytes)
    assert read(f"{http.address}/{how}/a?sig=s3cret") == (http.files["a"], 1)


def test_a_small_file_is_one_request(http: Server) -> None:
    http.files["a"] = content(source.FIRST)
    read(f"{http.address}/ranges/a")
    assert [method for method, _, _ in http.asked] == ["GET"]


def test_a_large_file_is_read_in_ranges_each_once(http: Server, small_ranges: None) -> None:
    http.files["a"] = content(16_384 + 3 * 65_536 + 5)
    read(f"{http.address}/ranges/a")
    bounds = [0, 16_384, 81_920, 147_456, 212_992, 212_997]
    assert http.gets == [f"bytes={a}-{b - 1}" for a, b in pairwise(bounds)]
    assert [method for method, _, _ in http.asked] == ["GET"] * 5


def test_the_next_range_comes_while_one_is_used(http: Server, small_ranges: None) -> None:
    http.files["a"] = content(300_000)
    opened = Source(f"{http.address}/ranges/a")
    opened.read_at(0, 8192)
    assert len(http.gets) == 1  # its index may be at its end: not yet
    opened.read_at(8192, 8192)
    deadline = time.monotonic() + 10
    while len(http.gets) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert http.gets[1] == "bytes=16384-81919"
    opened.close()


def test_a_file_may_be_read_in_any_order(http: Server, small_ranges: None) -> None:
    data = http.files["a"] = content(400_000)
    opened = Source(f"{http.address}/ranges/a")
    draw = np.random.default_rng(1)
    for at in draw.integers(0, len(data) + 10, 60).tolist():
        assert opened.read_at(at, 30_000) == data[at : at + 30_000]
    opened.close()


def test_what_is_held_does_not_grow_with_the_file(http: Server, small_ranges: None) -> None:
    http.files["a"] = content(2_000_000)
    opened = Source(f"{http.address}/ranges/a")
    for at in range(0, opened.size, 50_000):
        opened.read_at(at, 50_000)
        assert sum(map(len, opened._bytes._kept.values())) <= 2 * (64 << 10)  # type: ignore[union-attr]
    opened.close()


def test_an_encoded_address_is_asked_for_as_it_is(http: Server) -> None:
    http.files["a%2Fb%20c"] = content(100)
    read(f"{http.address}/ranges/a%2Fb%20c?sig=x%2By%2Fz%3D")
    assert {path for _, path, _ in http.asked} == {"/ranges/a%2Fb%20c?sig=x%2By%2Fz%3D"}


@pytest.mark.parametrize("how", ["ranges", "whole", "endless"])
@pytest.mark.parametrize("kind", ["wav", "m4a"])
def test_sound_over_http(how: str, kind: str, http: Server, tmp_path: Path, small_ranges: None) -> None:
    """m4a has its index at the end."""
    path = write_audio(tmp_path / f"a.{kind}", noise(4.0, 48_000), 48_000)
    http.files["a"] = path.read_bytes()
    here, there = row(str(path)), row(f"{http.address}/{how}/a")
    assert isinstance(here, Unit)
    assert isinstance(there, Unit)
    assert np.array_equal(here.pcm, there.pcm)


# ---- failures in passing


@pytest.mark.parametrize("trouble", ["503", "429", "500", "502", "cut", "reset"])
@pytest.mark.parametrize("at", [0, 2])
def test_what_passes_is_tried_again(trouble: str, at: int, http: Server, small_ranges: None) -> None:
    http.files["a"] = content(200_000)
    http.plan = [""] * at + [trouble, trouble]
    assert read(f"{http.address}/ranges/a") == (http.files["a"], 3)
    again = [asked for asked in http.gets if http.gets.count(asked) == 3]
    assert len(again) == 3
    assert len(set(again)) == 1  # the one range


def test_two_ranges_in_trouble_are_not_added_up(http: Server, small_ranges: None) -> None:
    http.files["a"] = content(200_000)
    http.plan = ["503", "", "503", "503", "", "503"]
    assert read(f"{http.address}/ranges/a") == (http.files["a"], 3)


def test_a_store_that_stays_down_is_asked_five_times(http: Server) -> None:
    error = refused(f"{http.address}/503/a")
    assert (type(error), error.attempts, len(http.gets)) == (SourceError, 5, 5)
    assert error.store_wide


@pytest.mark.parametrize("trouble", ["cut", "reset"])
def test_a_server_without_ranges_is_read_from_the_start_again(trouble: str, http: Server, small_ranges: None) -> None:
    http.files["a"] = content(200_000)
    http.plan = ["", trouble]  # the first GET finds out
    assert read(f"{http.address}/whole/a") == (http.files["a"], 2)


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [("0.4", 0.4, 5.0), ("garbage", 0.0, 0.3), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0, 0.3), ("1e9", 1.0, 5.0)],
)
def test_a_store_may_say_when_to_ask_again(
    asked: str, least: float, most: float, http: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "MOST_RETRY_AFTER_S", 1.0)
    http.files["a"] = content(10)
    http.plan, http.retry_after = ["503"], asked
    waits: list[float] = []
    original = source._pause_s
    monkeypatch.setattr(source, "_pause_s", lambda state: waits.append(original(state)) or waits[-1])
    assert read(f"{http.address}/ranges/a")[1] == 2
    assert least <= waits[0] <= most


@pytest.mark.parametrize(
    ("plan", "kind", "attempts"),
    [
        (["404"], "not_found", 1),
        (["403"], "forbidden", 1),
        (["503", "503"], None, 3),
        (["reset"], None, 2),
        (["503"] * 5, "source", 5),
        (["503", "404"], "not_found", 2),
    ],
)
def test_rows_of_a_source_in_trouble(
    plan: list[str], kind: str | None, attempts: int, http: Server, tmp_path: Path
) -> None:
    """F39."""
    http.files["a"] = write_wav(tmp_path / "a.wav", noise(1.0)).read_bytes()
    http.plan = plan
    item = row(f"{http.address}/ranges/a?token=s3cret")
    assert item.attempts == attempts
    if isinstance(item, Unit):
        assert kind is None
        assert item.n_samples == 16_000
    else:
        assert item.failure is not None
        assert (item.failure.kind, item.failure.stage, item.failure.attempts) == (kind, "decode", attempts)
        assert "s3cret" not in item.failure.message
        assert stitch([item]).attempts == attempts


def test_a_source_that_breaks_off_is_no_damage(http: Server, tmp_path: Path, small_ranges: None) -> None:
    http.files["a"] = write_audio(tmp_path / "a.flac", noise(60.0)).read_bytes()
    http.plan = [""] * 6 + ["503"] * 5
    unit, lost = read_units(Recording("id", f"{http.address}/ranges/a"), Config(vad="none"))
    assert isinstance(unit, Unit)
    assert isinstance(lost, UnitResult)
    assert 0 < unit.n_samples < 60 * 16_000
    assert lost.failure is not None
    assert (lost.failure.kind, lost.failure.attempts, lost.start) == ("source", 5, unit.n_samples)
    assert unit.flags == ()


# ---- slow sources


@pytest.mark.parametrize("how", ["ranges", "whole", "endless"])
def test_a_source_that_hardly_moves_is_given_up(how: str, http: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """F40: 10 kB a second."""
    monkeypatch.setattr(source, "PATIENCE_S", 0.3)
    monkeypatch.setattr(source, "SLOWEST", 256 << 10)
    monkeypatch.setattr(source, "FIRST", 64 << 10)
    http.files["a"], http.bytes_per_s = content(100_000), 10_000
    error = refused(f"{http.address}/{how}/a?sig=s3cret")
    assert (type(error), error.kind, error.attempts) == (SourceTimeoutError, "source_timeout", 1)
    assert re.search(r"/a: \d+ bytes (did not come|came) in \d+ s$", str(error))
    assert not error.store_wide


def test_a_server_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "PATIENCE_S", 0.2)
    monkeypatch.setattr(source, "SLOWEST", 1 << 30)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        error = refused(f"http://127.0.0.1:{silent.getsockname()[1]}/a")
    assert type(error) is SourceTimeoutError


def test_what_never_ends_is_given_up(http: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MOST_SPOOLED", 1 << 20)
    http.files["a"] = content(3 << 20)
    assert "goes on after" in str(refused(f"{http.address}/endless/a"))


# ---- refusals


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (404, NotFoundError),
        (410, NotFoundError),
        (401, ForbiddenError),
        (403, ForbiddenError),
        (400, SourceError),
        (503, SourceError),
    ],
)
def test_http_refusals(status: int, kind: type[AudioError], http: Server) -> None:
    error = refused(f"{http.address.replace('//', '//user:pass@')}/{status}/a.wav?X-Amz-Signature=s3cret&v=2")
    assert type(error) is kind
    assert str(error).startswith(f"{http.address}/{status}/a.wav?v=2: ")
    assert "s3cret" not in str(error)
    assert error.attempts == (5 if status == 503 else 1)
    if kind is SourceError:
        assert str(status) in str(error)


def test_an_http_server_that_is_not_there(http: Server) -> None:
    http.shutdown()
    http.server_close()
    error = refused(f"{http.address}/a.wav?token=s3cret")
    assert type(error) is SourceError
    assert re.search(r"a\.wav: cannot be read \(\w*Connect", str(error))
    assert error.attempts == 5


@pytest.mark.parametrize(
    ("uri", "kind", "words"),
    [
        ("{tmp}/missing.wav", NotFoundError, "missing.wav: not found"),
        ("{tmp}", SourceError, "directory"),
        ("foo://x/a.wav", SourceError, "foo"),
        ("{tmp}/a\0b.wav", SourceError, "null"),
        ("memory://nothing/a.wav", NotFoundError, "not found"),
    ],
)
def test_other_refusals(uri: str, kind: type[AudioError], words: str, tmp_path: Path) -> None:
    error = refused(uri.format(tmp=tmp_path))
    assert type(error) is kind
    assert words in str(error)
    assert error.attempts == 1


def test_other_stores(tmp_path: Path) -> None:
    data = content(100_000)
    (tmp_path / "a b#?.wav").write_bytes(data)
    assert read(f"file://{tmp_path}/a b#?.wav") == (data, 1)
    with fsspec.open("memory://source/a", "wb") as file:
        file.write(data)
    assert read("memory://source/a") == (data, 1)


# ---- S3


@pytest.fixture
def put(s3: str) -> Callable[[str, bytes], str]:
    def put(name: str, data: bytes) -> str:
        with fsspec.open(f"{s3}/{name}", "wb") as file:
            file.write(data)
        return f"{s3}/{name}"

    return put


@pytest.mark.parametrize("n_bytes", [0, 1, 16 << 10, (16 << 10) + 1, 300_000])
def test_on_s3(n_bytes: int, put: Callable[[str, bytes], str], small_ranges: None) -> None:
    data = content(n_bytes)
    assert read(put("x/a", data)) == (data, 1)


def test_s3_has_no_such_thing(s3: str) -> None:
    error = refused(f"{s3}/x/b.wav")
    assert (type(error), str(error)) == (NotFoundError, f"{s3}/x/b.wav: not found")
    assert isinstance(refused("s3://no-such-bucket-at-all/a"), NotFoundError)


class Gate(BaseHTTPRequestHandler):
    """In front of an S3 server: the requests of `server.plan` get its statuses, the others an answer from behind."""

    server: GateServer

    def do_GET(self) -> None:
        self.server.n_asked += 1
        if self.server.plan:
            status = self.server.plan.pop(0)
            code = {503: "SlowDown", 500: "InternalError", 400: "ExpiredToken", 403: "AccessDenied"}[status]
            body = f"<Error><Code>{code}</Code><Message>so it is</Message></Error>".encode()
            self.send_response(status)
        else:
            behind = urllib.request.Request(self.server.behind + self.path, headers=dict(self.headers))
            with urllib.request.urlopen(behind) as answer:
                body = answer.read()
                self.send_response(answer.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class GateServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, behind: str) -> None:
        super().__init__(("127.0.0.1", 0), Gate)
        self.behind = behind
        self.plan: list[int] = []
        self.n_asked = 0


@pytest.fixture
def gate(put: Callable[[str, bytes], str], s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[GateServer]:
    with GateServer(s3_server) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        yield server
        server.shutdown()


@pytest.mark.parametrize("status", [500, 503])
def test_tries_on_s3_are_ours_and_counted(
    status: int, gate: GateServer, put: Callable[[str, bytes], str], s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as direct:
        direct.setenv("AWS_ENDPOINT_URL", s3_server)
        uri = put("a", b"here")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    gate.plan = [status, status]
    assert read(uri) == (b"here", 3)
    assert gate.n_asked == 3
    gate.plan = [status] * 9
    error = refused(uri)
    assert (type(error), error.attempts, gate.n_asked) == (SourceError, 5, 8)


@pytest.mark.parametrize("status", [400, 403])
def test_expired_and_refused_credentials(status: int, gate: GateServer, s3: str) -> None:
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    gate.plan = [status]
    error = refused(f"{s3}/a")
    assert (type(error), error.attempts, error.store_wide) == (ForbiddenError, 1, True)


def test_no_credentials_at_all(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    error = refused(f"{s3}/a")
    assert type(error) is ForbiddenError
    assert "credentials" in str(error)
