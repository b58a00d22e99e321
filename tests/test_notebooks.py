"""The notebooks run from their first cell to their last, and define nothing that belongs into the package."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def code_cells(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for cell in code_cells(path):
        tree = ast.parse(cell)
        assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.walk(tree))
        exec(compile(tree, str(path), "exec"), names)
    assert "Laura counts sixteen blue boats in Madrid." in capsys.readouterr().out


def test_there_is_one() -> None:
    assert NOTEBOOKS
