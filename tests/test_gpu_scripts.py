"""What runs on a machine with a GPU, as far as it goes without one: the benchmark's script, the tests' skip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks import cuda

ROOT = Path(__file__).resolve().parent.parent

# On the GPU's machine there is torch, transformers and numpy, with what they bring along; none of these.
ABSENT = (
    "ray pydantic pyarrow av librosa onnxruntime silero_vad jiwer pytest fastapi starlette prometheus_client".split()
)


def test_the_script_imports_what_a_bare_machine_has() -> None:
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({ABSENT}));"
        "sys.path.insert(0, '.'); runpy.run_path('tests/benchmarks/cuda.py', run_name='imported')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=200)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of every group, in small, in this process."""
    folder, threads = tmp_path_factory.mktemp("cuda"), torch.get_num_threads()
    args = cuda.Args("cpu", "float32", ("tiny",), 5, 6, True, None, str(folder), None)
    found: dict[str, Any] = {}
    for name in cuda.groups(args)[:-1]:
        part = folder / f"part-{name}"
        part.touch()
        cuda.group(args, name, cuda.Part(part, 1e6))
        for key, value in cuda.read_part(part):
            cuda.put(found, key, value)
    found["processes"] = {"tiny": cuda.together(args, "tiny", 1, 2, 200)}
    torch.set_num_threads(threads)
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def test_no_group_fails(figures: dict[str, Any]) -> None:
    text = json.dumps(figures["parity"]) + json.dumps(figures["theirs"]) + json.dumps(figures["ours"]["tiny"]["steady"])
    assert "error" not in text
    assert "skipped" not in text


def test_the_steps_on_buffers_are_at_par(figures: dict[str, Any]) -> None:
    """In float32 on one machine: with transformers, with the plain scheduler, with openai-whisper."""
    parity = figures["parity"]
    ours = "float32 on cpu"
    assert parity["transformers"][ours]["logits_most"] < 1e-3
    assert parity["transformers"][ours]["generate"]["equal_rows"] == 1.0
    assert parity["random_weights"][ours] == {"equal_rows": 1.0, "equal_until": 1.0}
    assert parity["random_weights"]["tokens"] > 20
    for demo in parity["demo"].values():
        assert demo[ours]["equal_rows"] == 1.0
    assert parity["openai_whisper"][ours]["equal_rows"] == 1.0


def test_the_figures_are_whole(figures: dict[str, Any]) -> None:
    ours = figures["ours"]["tiny"]
    assert ours["steady"]["tokens_per_window"] == [6]
    assert ours["steady"]["device"]["shapes"]
    stages = ours["floors"]["measured_peak"]["stages"]
    assert set(stages) == {"mel", "encoder", "prefill", "step"}
    assert all(stage["measured_s"] > 0 and stage["floor_s"] > 0 for stage in stages.values())
    assert figures["theirs"]["tiny"]["transformers"]["best"]["tokens"] == [6]
    assert figures["processes"]["tiny"]["windows_per_s"] > 0
    assert cuda.ratios(figures)["tiny"]["times_theirs"] > 0


def test_scores_come_later(figures: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "cuda.json"
    path.write_text(json.dumps({"parity": {"demo": figures["parity"]["demo"]}}))
    cuda.score(path)
    for demo in json.loads(path.read_text())["parity"]["demo"].values():
        assert demo["wer_difference_points"] == {"float32 on cpu": 0.0}
        assert "to_score" not in demo


def test_what_was_measured_before_the_end_stays(tmp_path: Path) -> None:
    path = tmp_path / "part"
    part = cuda.Part(path, 0.0)
    part.take("a.b", 0.0 - 1e9, lambda: 1)
    part.take("a.c", 1.0, lambda: 2)
    part.take("a.d", -1e9, lambda: [][0])
    with path.open("a") as file:
        file.write('["a.e", 1')  # killed here
    found: dict[str, Any] = {}
    for key, value in cuda.read_part(path):
        cuda.put(found, key, value)
    assert found["a"]["b"] == 1
    assert "left" in found["a"]["c"]["skipped"]
    assert found["a"]["d"]["error"].startswith("IndexError")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would begin")
def test_without_a_gpu_the_script_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cuda.main([])
    assert ended.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="here they run")
@pytest.mark.parametrize(("forbidden", "outcome"), [("0", "skipped"), ("1", "failed")])
def test_gpu_tests_skip_unless_that_is_forbidden(forbidden: str, outcome: str) -> None:
    test = "tests/gpu/test_cuda_engine.py::test_a_report_is_of_the_moment_it_was_asked_for"
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "gpu", "-p", "no:cacheprovider", test]
    environment = {**os.environ, "MURMUR_FAIL_WITHOUT_GPU": forbidden}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert f"1 {outcome}" in run.stdout.replace("error", "failed"), run.stdout
