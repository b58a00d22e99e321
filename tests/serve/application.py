"""What tests of the application share: engines, clips, the type of the fixture that starts one, bare connections."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import requests

from pipeline.config import Config, Fault, load_config
from pipeline.demo import clips_path
from pipeline.engine import Engine, EngineConfig, load_engine
from serve_app.server import HttpServer

MODEL = "openai/whisper-base"
Serve = Callable[..., HttpServer]


def fake_engine(*faults: dict[str, Any], lanes: int = 8) -> Engine:
    return load_engine(
        EngineConfig(model=MODEL, lanes=lanes, fake_faults=tuple(Fault.model_validate(fault) for fault in faults))
    )


def demo_config(**settings: Any) -> Config:
    return load_config(overrides={"model": "demo", **settings}, env={})


def clip(name: str) -> Path:
    return clips_path() / name


EN_FIVE = clip("en-five.mp3").read_bytes()
ROUTE = f"/v1/inference/{MODEL}"


def post(server: HttpServer, **how: Any) -> requests.Response:
    return requests.post(f"{server.url}{ROUTE}", files={"audio": EN_FIVE}, timeout=60, **how)


def wait_until(holds: Callable[[], Any], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def raw(server: HttpServer, *lines: str, body: bytes = b"") -> Iterator[socket.socket]:
    """A connection on which these lines of a request, and this much of its body, were sent."""
    with closing(socket.create_connection((server.host, server.port), timeout=30)) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        yield connection


def answer(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def is_quiet(server: HttpServer) -> bool:
    """Every gauge back to zero, and no upload left."""
    app = server.app
    gate, folder = app.gate, app.bodies._folder
    values = (gate.requests, gate.outstanding, gate.running, gate.waiting, app.meters.in_flight._value.get())
    return not any(values) and not list(folder.iterdir())
