"""`murmur bench job`: the job and its engine, measured beside each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import FAKE, last_json, murmur

from pipeline.bench.job import Plan
from pipeline.config import load_config
from pipeline.errors import UsageError


@pytest.mark.slow  # two engines and a Ray of its own
@pytest.mark.ray
def test_the_command(tmp_path: Path) -> None:
    done = murmur("bench", "job", "--hours", "0.02", *FAKE, "--out", tmp_path / "job.json", "--json")
    assert done.returncode == 0, done.stderr
    found = last_json(done)
    assert found["job"]["audio_s"] == pytest.approx(found["engine_alone"][0]["audio_s"], abs=0.01)
    assert found["job"]["audio_s"] >= 72
    assert found["share_of_engine"] > 0
    assert found["job"]["rtfx"] > 0
    assert json.loads((tmp_path / "job.json").read_text())["share_of_engine"] == found["share_of_engine"]


def test_what_cannot_be_measured() -> None:
    with pytest.raises(UsageError, match="--hours"):
        Plan((), load_config(overrides={"model": "demo"}, env={}), hours=0)
    with pytest.raises(UsageError, match="engine: serve"):
        Plan((), load_config(overrides={"model": "demo", "engine": "serve"}, env={}))
