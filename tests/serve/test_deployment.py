"""`murmur serve` as a user starts it: real Ray, real Serve, real processes that are killed."""

from __future__ import annotations

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import requests
from application import EN_FIVE
from serving import Served, serving

from pipeline import cli
from pipeline.config import load_config
from pipeline.errors import ConfigError
from serve_app.deployment import AppArgs, ModelArgs, _engines, args_for, replicas_for_windows

LOOPBACK = {"127.0.0.1", "::ffff:127.0.0.1"}
FAKE = ("--set", "engine=fake", "--set", "log_format=json", "--set", "ray.object_store_mb=200")


def post(served: Served, **data: str) -> requests.Response:
    return requests.post(f"{served.url}/v1/inference/demo", files={"audio": EN_FIVE}, data=data, timeout=120)


@pytest.mark.ray
def test_killed_replica_and_drained_server() -> None:
    """F56: the request goes to the next replica within its deadline. SIGTERM: what runs is finished, then 143."""
    hang = "fake.faults=[{kind: hang, text: '3'}]"
    with serving(*FAKE, "--set", hang) as served, ThreadPoolExecutor(2) as pool:
        before = post(served).json()
        assert heard_at(served, "command", "ray") <= LOOPBACK
        assert heard_at(served, "front", "engine") <= LOOPBACK | {"::"}  # Serve's own port: "[::]:0", whatever is set
        running = pool.submit(post, served)
        time.sleep(1.0)
        (replica,), (front,) = (served.processes()[kind] for kind in ("engine", "front"))
        assert niceness(replica) > niceness(front) == 0  # who computes gives way to who answers
        replica.kill()
        answer = running.result()
        assert answer.status_code == 200, answer.text
        assert answer.json()["text"] == before["text"]

        streaming = pool.submit(_streamed, served.url)
        last = pool.submit(post, served)
        time.sleep(1.0)
        served.process.send_signal(signal.SIGTERM)
        assert last.result().status_code == 200
        assert streaming.result()[-1]["type"] == "transcript.text.done"
        assert served.process.wait(60) == 143
    assert "failed to shut down" not in "".join(served.lines)  # Serve waited for nothing of ours that never ends
    said = [json.loads(line) for line in served.lines if line.startswith("{")]
    requests_said = [one for one in said if one.get("route") == "/v1/inference/{model}"]
    assert [one["status"] for one in requests_said] == ["200"] * 3
    assert before["request_id"] in {one["request"] for one in requests_said}
    assert before["text"].split()[0] not in "".join(served.lines)


def heard_at(served: Served, *kinds: str) -> set[str]:
    """The addresses at which its processes of these kinds listen."""
    found, processes = set(), served.processes()
    for process in (one for kind in kinds for one in processes[kind]):
        with suppress(psutil.NoSuchProcess):
            found |= {one.laddr.ip for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN}
    assert found
    return found


def niceness(process: psutil.Process) -> int:
    """Of the thread that gives way most: on Linux each has its own."""
    stats = [path.read_text().rpartition(")")[2].split() for path in Path(f"/proc/{process.pid}/task").glob("*/stat")]
    return max(int(fields[16]) for fields in stats)


def _streamed(url: str) -> list[dict[str, Any]]:
    with requests.post(
        f"{url}/v1/audio/transcriptions", files={"file": EN_FIVE}, data={"stream": "true"}, stream=True, timeout=120
    ) as response:
        return [json.loads(line[6:]) for line in response.iter_lines() if line.startswith(b"data: ")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--host", "0.0.0.0"), "without tokens only 127.0.0.1 is served"),
        (("--set", "tokens_file=/nowhere/tokens"), "tokens_file /nowhere/tokens"),
        (("--set", "limits.body_mb=0"), "limits.body_mb"),
        (("--set", "engine=serve"), "engine: serve is a job's"),
        (("--model", "no/such-model"), "no/such-model"),
        (("--set", "task=sing"), "task"),
    ],
)
def test_refused_before_anything_is_started(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """F58: one line that says what to do, and exit code 2."""
    with pytest.raises(SystemExit, match="2"):
        cli.main(["serve", *arguments])
    stderr = capsys.readouterr().err
    assert said in stderr
    assert len(stderr.strip().splitlines()) == 1


# ---- what is made of settings


def test_the_applications_arguments_of_a_machine() -> None:
    """Several models share the CPUs but for the server's, or have a GPU each; what a user sets reaches the model."""
    first = load_config(overrides={"model": "demo", "port": 9000, "limits.body_mb": 7, "beam_size": 2}, env={})
    second = load_config(overrides={"model": "a/b"}, env={})
    args = args_for([first, second], cpus=9, gpus=0)
    assert [(model.model, model.num_cpus, model.num_gpus) for model in args.models] == [("demo", 4, 0), ("a/b", 4, 0)]
    assert (args.port, args.limits.body_mb) == (9000, 7)
    config = args.models[0].config()
    assert (config.beam_size, config.chunk_length_s, config.port) == (2, 10, 8000)  # the demo's own windows
    on_gpus = args_for([first, second], cpus=9, gpus=2)
    assert [(model.num_cpus, model.num_gpus) for model in on_gpus.models] == [(1, 1), (1, 1)]
    on_cpus = load_config(overrides={"model": "demo", "device": "cpu"}, env={})
    assert args_for([on_cpus], cpus=1, gpus=8).models[0].num_gpus == 0
    assert AppArgs.model_validate(args.model_dump(mode="json")) == args  # as a file would have it


@pytest.mark.parametrize(
    ("pool", "cpus", "gpus", "wanted"),
    [
        ({"engines": 2}, 4, 0, (2, 1, 0)),
        ({"engines": 3, "engine_cpus": 4}, 4, 0, (3, 4, 0)),
        ({"engines": 2}, 9, 1, (2, 4, 0)),  # one GPU is none for two
        ({"engines": 2, "engine_gpus": 0.5}, 9, 1, (2, 1, 0.5)),
        ({}, 2, 0, (1, 1, 0)),
    ],
)
def test_engines_of_a_model(pool: dict[str, float], cpus: float, gpus: float, wanted: tuple[int, float, float]) -> None:
    """`pool.engines` are replicas, of as many CPUs and GPUs as is said or as there are."""
    (model,) = args_for([load_config(overrides={"model": "demo", "pool": pool}, env={})], cpus, gpus).models
    assert (model.replicas, model.num_cpus, model.num_gpus) == wanted


@pytest.mark.parametrize("key", ["port", "limits.body_mb", "lanes", "ray.address", "max_failed_fraction"])
def test_a_models_settings_are_a_models(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is not a model's"):
        ModelArgs(model="demo", settings={key: 1}).config()
    with pytest.raises(ConfigError, match="unknown setting 'bem_size'"):
        ModelArgs(model="demo", settings={"bem_size": 1}).config()


@pytest.mark.parametrize(
    ("windows", "wanted"), [([], 1), ([0, 0], 1), ([20], 1), ([21], 2), ([32, 32], 4), ([4000], 5)]
)
def test_replicas_follow_the_windows(windows: list[int], wanted: int) -> None:
    """Of 16 lanes each: a replica for twenty windows, within the bounds."""
    metrics = {"windows": dict(enumerate(windows)), "lanes": dict.fromkeys(range(len(windows)), 16)}
    context = SimpleNamespace(
        aggregated_metrics=metrics, capacity_adjusted_min_replicas=1, capacity_adjusted_max_replicas=5
    )
    assert replicas_for_windows(context) == (wanted, {})  # type: ignore[arg-type]


def test_autoscaling_is_serves_own() -> None:
    """Serve takes the policy by its name, and finds it."""
    deployment = _engines(ModelArgs(model="demo", engine="fake", max_replicas=3), AppArgs())._bound_deployment
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 3)
    assert scaling.policy.get_policy().__qualname__ == replicas_for_windows.__qualname__  # a copy of it
