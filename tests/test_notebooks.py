"""The notebooks run from their first cell to their last, draw, and define nothing that belongs into the package."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
NAMES = ("quickstart", "corpus", "endpoint", "cluster")
SAID = {  # what each has printed in the end, and how many pictures it has drawn
    "quickstart": ("en The exam is on Thursday, the twelfth of April. Laura counts sixteen blue boats in Madrid.", 2),
    "corpus": ("10 recordings, 64 segments\n1 failed recording left out\n", 2),
    "endpoint": ("Laura counts sixteen blue boats in Madrid.", 0),
    "cluster": ("unknown setting 'lane'; did you mean 'lanes'?", 1),
}


def read(name: str) -> list[dict[str, object]]:
    cells: list[dict[str, object]] = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return cells


def code_cells(name: str) -> list[str]:
    return ["".join(cell["source"]) for cell in read(name) if cell["cell_type"] == "code"]  # type: ignore[arg-type]


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Figures without a screen; `NOTEBOOK_PICTURES=FOLDER` keeps them to be looked at."""
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    yield
    plt.close("all")


def shell(line: str, names: dict[str, object]) -> None:
    """A line that begins with `!`, as IPython has it: variables in braces, the output on the page."""
    command = re.sub(r"\{(\w+)\}", lambda found: str(names[found[1]]), line.removeprefix("!"))
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=120)
    print(done.stdout + done.stderr)
    assert done.returncode == 0 or "|| true" in line, done.stderr


@pytest.mark.parametrize("name", ["cluster", *(pytest.param(name, marks=pytest.mark.ray) for name in NAMES[:3])])
def test_notebook(
    name: str,
    pictures: None,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import matplotlib.pyplot as plt

    if name in ("quickstart", "corpus"):
        request.getfixturevalue("ray_cluster")
    monkeypatch.chdir(NOTEBOOKS)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    said, n_pictures = SAID[name]
    names: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(name)):
        if cell.startswith("!"):
            for line in cell.replace("\\\n", " ").splitlines():
                shell(line, names)
            continue
        tree = ast.parse(cell)
        assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.walk(tree))
        exec(compile(tree, f"{name}, cell {number}", "exec"), names)
    figures = [plt.figure(number) for number in plt.get_fignums()]
    for number, figure in enumerate(figures):
        figure.canvas.draw()
        if folder := os.environ.get("NOTEBOOK_PICTURES"):
            figure.savefig(Path(folder) / f"{name}-{number}.png", dpi=80)
    assert len(figures) == n_pictures
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_committed_clean(path: Path) -> None:
    """Run by this file, without outputs, and each with prose."""
    assert path.stem in NAMES
    cells = read(path.stem)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    assert sum(cell["cell_type"] == "markdown" for cell in cells) >= 5
