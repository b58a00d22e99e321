"""The application on a real socket, with the fake engine or the demo model in this process; Ray has its own tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from application import MODEL, Serve, demo_config, fake_engine
from webhooks import Bench

from pipeline.config import LimitsConfig, load_config
from pipeline.engine import EngineConfig, load_engine
from serve_app.app import create_app
from serve_app.auth import Tokens
from serve_app.server import HttpServer
from serve_app.serving import LocalModel
from serve_app.webhook import WebhookSettings


@pytest.fixture(scope="session")
def demo() -> Iterator[LocalModel]:
    """The demo model in float32: an engine that really decodes."""
    with load_engine(EngineConfig(model="demo", device="cpu", dtype="float32")) as engine:
        yield LocalModel("demo", demo_config(), engine)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start an application on a free port: of the models given, or with a fake engine. Stopped when the test ends."""
    with ExitStack() as stack:

        def start(
            *models: LocalModel,
            faults: tuple[dict[str, Any], ...] = (),
            tokens: Tokens | None = None,
            allow: tuple[str, ...] | None = None,
            limits: dict[str, Any] | None = None,
            drain_s: float = 5.0,
            **more: Any,
        ) -> HttpServer:
            if not models:
                config = load_config(overrides={"engine": "fake", "model": MODEL}, env={})
                models = (LocalModel(MODEL, config, fake_engine(*faults)),)
            webhooks = None if allow is None else WebhookSettings(allow, tmp_path / "spool", 64)
            app = create_app(models, LimitsConfig(**(limits or {})), tokens=tokens, webhooks=webhooks, **more)
            server = HttpServer(app, "127.0.0.1", 0, drain_s)
            server.start()
            stack.callback(server.drain)
            return server

        yield start
