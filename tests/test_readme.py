"""The README's promises: its Python runs, its commands exist, CI runs its test command, no address of a registry."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from pipeline import cli
from tests.benchmarks import tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    (example,) = blocks("python")
    exec(example, {})
    assert capsys.readouterr().out.startswith("en The exam is on Thursday")


def test_commands_exist() -> None:
    named = set(re.findall(r"murmur (\w+) ", "\n".join(blocks("sh")))) | set(re.findall(r"`murmur (\w+)\s", README))
    there = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert {"transcribe", "retry", "report"} <= named
    assert all(re.search(rf"^\s+{name}\s", there, re.MULTILINE) for name in named)


def test_ci_runs_the_test_command() -> None:
    (command,) = re.findall(r"<!-- tests -->\n```sh\n(.*)\n```", README)
    extracted = subprocess.run(
        ["sed", "-n", r"/^<!-- tests -->$/,/^```$/{/^[^<`]/p}", "README.md"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    ).stdout  # fmt: skip
    assert extracted.strip() == command
    assert command.endswith("pytest")


def test_tree_names_every_module() -> None:
    tree = README.partition("## What is where")[2].partition("## Limits")[0]
    modules = {
        path.stem if path.stem != "__init__" else path.parent.name
        for path in [*(ROOT / "pipeline").glob("*.py"), *(ROOT / "pipeline" / "engine").glob("*.py")]
    }
    assert not {name for name in modules if not re.search(rf"\b{name}\b", tree)}


def test_pins_hold_no_address() -> None:
    for path in (ROOT / "configs" / "constraints.txt", ROOT / "pyproject.toml"):
        assert "://" not in path.read_text(encoding="utf-8").replace("https://www.ray.io", "")


def test_submitted_commands_are_commands() -> None:
    lines = re.findall(r"^murmur (submit .*?)(?:\s+#.*)?$", "\n".join(blocks("sh")), re.MULTILINE)
    assert len(lines) >= 2
    for line in lines:
        name, *arguments = shlex.split(line.replace("run.yaml", str(ROOT / "configs" / "cluster.yaml")))
        given = typer.main.get_command(cli.app).commands[name].make_context(name, arguments).params
        assert given["address"]
        assert given["attach"] or cli._parsed(given["command"]).output


def test_sizing_is_worked_out_from_the_results() -> None:
    engine, vad = tables.result("engine_cpu_base.json"), tables.result("vad_cost.json")
    assert engine is not None
    assert vad is not None
    assert tables.sizing(engine, vad, tables.result("decode_speed.json")) in README
    assert tables.hours_per_core_hour(audio_s=30, core_s=0.5) == 60
    with_decoding = tables.sizing(engine, vad, {"core_s_per_audio_hour": {"mp3": 36.0}})
    assert with_decoding.endswith("| reading and decoding, mp3 | 100 | 1,000 |")


def test_top_level_is_the_design_s() -> None:
    allowed = {"pyproject.toml", "README.md", "pipeline", "serve_app", "configs", "tests", "notebooks"}
    allowed |= {"LICENSE", ".gitignore", ".ci"}
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False).stdout
    found = {line.split("/", 1)[0] for line in listed.splitlines()}
    assert found <= allowed


@pytest.mark.parametrize(
    ("table", "file"),
    [
        (tables.accuracy, "heldout_accuracy.json"),
        (tables.languages, "languages.json"),
        (tables.two_algorithms, "two_algorithms.json"),
        (tables.adversarial, "adversarial.json"),
        (tables.speed, "engine_cpu_base.json"),
    ],
)
def test_figures_are_those_of_the_results(table: Callable[[dict[str, Any]], str], file: str) -> None:
    assert table(json.loads((tables.RESULTS / file).read_text(encoding="utf-8"))) in README
