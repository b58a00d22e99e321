"""The demo model, loaded once: ours, and the reference's on the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.engine import EngineConfig, load_engine

if TYPE_CHECKING:
    from pipeline.engine.local import LocalEngine


@pytest.fixture(scope="session")
def engine() -> Iterator[LocalEngine]:
    """The demo model in float32 with few lanes, so that they are refilled."""
    from pipeline.engine.local import LocalEngine

    engine = load_engine(EngineConfig(model="demo", device="cpu", dtype="float32", lanes=4))
    assert isinstance(engine, LocalEngine)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def reference() -> Any:
    """openai-whisper's model with the demo's weights."""
    from pipeline.demo import model_path
    from pipeline.demo.train.convert import to_openai

    return to_openai(model_path())
