"""Who may import whom, read from the syntax trees: imports go one way, and heavy libraries have their places."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Bottom to top. A module may import from its own layer and from those above it in this list.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("pipeline.types", "pipeline.errors", "pipeline.config", "pipeline.signals", "pipeline.machine",
     "pipeline.stopwatch", "pipeline.logs", "pipeline.metrics"),
    ("pipeline.demo",),
    (
        "pipeline.manifest", "pipeline.tars", "pipeline.cells", "pipeline.channels",
        "pipeline.audio", "pipeline.decoder",
        "pipeline.decoder_child", "pipeline.decoder_wire", "pipeline.source", "pipeline.sliced", "pipeline.wav",
        "pipeline.vad", "pipeline.units", "pipeline.windows",
        "pipeline.flags", "pipeline.stitch", "pipeline.formats", "pipeline.scoring", "pipeline.references",
        "pipeline.schema", "pipeline.store",
        "pipeline.pools", "pipeline.census", "pipeline.todo", "pipeline.output",
        "pipeline.ledger", "pipeline.lease", "pipeline.silero", "pipeline.entries", "pipeline.pieces", "pipeline.void",
        "pipeline.changes",
        "pipeline.journal", "pipeline.names", "pipeline.selection", "pipeline.subtitles",
    ),
    ("pipeline.engine",),
    ("pipeline.transcribe", "pipeline.sink", "pipeline.finalize", "pipeline.figures", "pipeline.charts",
     "pipeline.report_page", "pipeline.report", "pipeline.evaluation", "pipeline.evaluation_report",
     "pipeline.progress", "pipeline.verify", "pipeline.clean", "pipeline.served", "pipeline.tables",
     "pipeline.export"),
    ("pipeline.stages",),
    ("pipeline.cluster",),
    ("pipeline.job", "pipeline.submit", "pipeline.bench"),
    ("pipeline.cli",),
)  # fmt: skip

# A library → the modules (and packages) that may import it.
PLACES: dict[str, tuple[str, ...]] = {
    "ray": (
        "pipeline.stages", "pipeline.cluster", "pipeline.job", "pipeline.sink", "pipeline.finalize", "pipeline.submit",
        "pipeline.served",  # the handle to a running application: below the stage, and `serve_app` names it too
        "serve_app.deployment",
    ),
    "fastapi": ("serve_app",),
    "starlette": ("serve_app",),
    "torch": ("pipeline.engine", "pipeline.demo.train"),
    "av": ("pipeline.audio", "pipeline.demo.train"),
    "librosa": ("pipeline.audio", "pipeline.demo.train"),
}  # fmt: skip
NOT_IN_THE_ENGINE = ("ray", "av", "librosa")
SERVE_APP_MAY_NOT = ("pipeline.job", "pipeline.stages", "pipeline.cli", "pipeline.submit")
SCRIPTS = ("pipeline.demo.train",)  # they use the library from outside, like a notebook


def within(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(place + ".") for place in places)


def layer_of(module: str) -> int | None:
    for number, members in enumerate(LAYERS):
        if within(module, members):
            return number
    return None


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, bool]]:
    """(imported module, at module level) for every import statement, also those inside functions."""
    top = {id(node) for node in ast.walk(tree) if isinstance(node, ast.stmt)} - {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    parent = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = parent.split(".")[: len(parent.split(".")) - node.level + 1]
                base = ".".join([*up, *([node.module] if node.module else [])])
            yield base, id(node) in top
            for alias in node.names:  # `from pipeline import job` imports pipeline.job
                yield f"{base}.{alias.name}", id(node) in top


def breaches(root: Path) -> list[str]:
    """One line for every import under `root` that the rules forbid."""
    found = []
    for path in sorted([*root.glob("pipeline/**/*.py"), *root.glob("serve_app/**/*.py")]):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        for target, at_top in imports(ast.parse(path.read_text()), module, is_package):
            reason = breach(module, target, at_top)
            if reason:
                found.append(f"{module} imports {target}: {reason}")
    return sorted(set(found))


def breach(module: str, target: str, at_top: bool) -> str | None:
    library = target.partition(".")[0]
    if library in PLACES and not within(module, PLACES[library]):
        return f"{library} only in {', '.join(PLACES[library])}"
    if library in NOT_IN_THE_ENGINE and within(module, ("pipeline.engine",)):
        return "the engine knows neither Ray nor a codec"
    if library == "serve_app" and within(module, ("pipeline",)):
        lazy_cli = module == "pipeline.cli" and within(target, ("serve_app.deployment",)) and not at_top
        return None if lazy_cli else "only the command line, and only when asked to serve"
    if within(module, ("serve_app",)) and within(target, SERVE_APP_MAY_NOT):
        return "the HTTP face stands beside the job, not on it"
    if within(module, SCRIPTS):
        return None
    if library == "pipeline" and within(module, ("pipeline",)):
        return direction(module, target)
    return None


def direction(module: str, target: str) -> str | None:
    mine, its = layer_of(module), layer_of(target)
    if mine is None:
        return None if module == "pipeline" else "this module has no layer yet: give it one in the test"
    if its is not None and its > mine:
        return "a lower layer may not import an upper one"
    return None


def test_the_code_keeps_its_layers() -> None:
    assert breaches(ROOT) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("pipeline/vad.py", "import torch\n"),  # the VAD runs in onnxruntime
        ("pipeline/manifest.py", "def f():\n    from ray import data\n"),  # a lazy import is an import
        ("pipeline/units.py", "import av.container\n"),
        ("pipeline/engine/model.py", "from ray import serve\n"),
        ("pipeline/engine/features.py", "import librosa\n"),
        ("pipeline/types.py", "from pipeline.stitch import stitch\n"),  # upwards
        ("pipeline/types.py", "from pipeline import job\n"),
        ("pipeline/types.py", "from .job import run\n"),
        ("pipeline/engine/fake.py", "from ..transcribe import transcribe\n"),
        ("pipeline/stages.py", "from pipeline.job import run\n"),
        ("pipeline/job.py", "import pipeline.cli\n"),
        ("pipeline/job.py", "from serve_app.deployment import deploy\n"),
        ("pipeline/cli.py", "from serve_app.deployment import deploy\n"),  # not lazy
        ("pipeline/cli.py", "def serve():\n    from serve_app.native import routes\n"),  # not the deployment
        ("pipeline/report.py", "import fastapi\n"),
        ("pipeline/newcomer.py", "from pipeline.types import Unit\n"),  # a module without a layer
        ("serve_app/native.py", "from pipeline.job import run\n"),
        ("serve_app/app.py", "import ray\n"),
    ],
)
def test_a_breach_is_found(tmp_path: Path, path: str, text: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert breaches(tmp_path) != []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("pipeline/job.py", "import ray\nfrom pipeline.stages import decode\n"),
        ("pipeline/cli.py", "def serve():\n    from serve_app.deployment import deploy\n"),
        ("pipeline/engine/model.py", "import torch\nfrom pipeline.types import Unit\nfrom . import features\n"),
        ("pipeline/demo/train/train.py", "import torch\nfrom pipeline.engine import load_engine\n"),
        ("serve_app/deployment.py", "from ray import serve\nfrom pipeline.engine import load_engine\n"),
    ],
)
def test_what_is_allowed_is_not_a_breach(tmp_path: Path, path: str, text: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert breaches(tmp_path) == []
