"""The README's examples of the HTTP endpoint, run as they stand against a server."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from application import Serve, demo_config, fake_engine

from serve_app.serving import LocalModel

ROOT = Path(__file__).parent.parent.parent
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Over HTTP")[2].partition("\n## ")[0]


@pytest.fixture
def url(serve: Serve) -> str:
    return serve(LocalModel("demo", demo_config(engine="fake"), fake_engine())).url


def block(language: str, url: str) -> str:
    (text,) = re.findall(rf"```{language}\n(.*?)```", SECTION, re.DOTALL)
    return str(text).replace("http://127.0.0.1:8000", url)


def run(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout


def test_curl(url: str) -> None:
    native, srt = (line for line in block("sh", url).splitlines() if line.startswith("curl"))
    assert "inlet lotus" in run("sh", "-c", f"{native} -sS")
    assert run("sh", "-c", f"{srt} -sS").startswith("1\n00:00:00,")


def test_python(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    said = io.StringIO()
    with redirect_stdout(said):
        exec(block("py", url), {})
    assert "inlet lotus" in said.getvalue()


def test_javascript(url: str, tmp_path: Path) -> None:
    node = shutil.which("node")
    assert node, "the README's JavaScript needs node: apt-get install nodejs"
    script = tmp_path / "example.mjs"
    script.write_text(block("js", url))
    assert "inlet lotus" in run(node, str(script))
