"""What tests of the application share: engines, clips, the type of the fixture that starts one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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
