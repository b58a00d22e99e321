"""`engine: serve`: the job on a running application gives a local run's tables; what it is not there for, it says."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from audio_files import tone, write_wav
from commands import tables
from rich.console import Console

from pipeline import job, report, served
from pipeline.config import Config, Fault, load_config
from pipeline.demo import clips_path
from pipeline.engine import EngineConfig, engine_config
from pipeline.errors import ApplicationError, ConfigError, EngineError, OutputMismatchError
from pipeline.pools import served_pools
from pipeline.served import deployment_name
from pipeline.types import DecodeOptions, Recording, Unit
from serve_app.deployment import AppArgs, EngineReplica, build_app

DEMO = clips_path().parent / "model"
SCORES = {"language_probability", "avg_logprob", "no_speech_prob", "probability"}


@pytest.fixture(scope="module")
def deploy(ray_cluster: None) -> Iterator[Callable[..., str]]:
    """Runs an application with one model, with these settings, and returns its name."""
    from ray import serve

    def run(name: str, **model: Any) -> str:
        app = build_app(AppArgs.model_validate({"models": [{"num_cpus": 0.5, **model}], "http": False}))
        serve.run(app, name=name, route_prefix=None)
        return name

    serve.start(proxy_location="Disabled")
    yield run
    serve.shutdown()


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., report.Summary]:
    def start(folder: Path, output: str, config: Config) -> report.Summary:
        with open(tmp_path / "said.txt", "a") as said:
            return job.run([str(folder)], str(tmp_path / output), config, console=Console(file=said))

    return start


def settings(**more: Any) -> Config:
    keys = {name.replace("__", "."): value for name, value in more.items()}
    return load_config(overrides={"model": "demo", "vad": "none", "chunk_level": "word", **keys}, env={})


def with_scores_of(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """`expected` with the scores of `found` where they agree to 1e-5: the batches were others."""
    return expected | {
        k: found[k] for k in SCORES & expected.keys() if expected[k] == pytest.approx(found[k], abs=1e-5)
    }


def test_names_of_deployments_are_names_of_files() -> None:
    assert deployment_name("openai/whisper-base") == "engine-openai--whisper-base"
    assert deployment_name("/models/my whisper") == "engine-models--my--whisper"
    with pytest.raises(ValueError, match="two have one id"):
        AppArgs.model_validate({"models": [{"model": "a/b"}, {"model": "a//b"}]})
    with pytest.raises(ValueError, match="Extra inputs"):
        AppArgs.model_validate({"models": [{"modell": "demo"}]})


def test_ray_says_of_a_dead_actor_that_its_node_died() -> None:
    """In words only, and in its binary: a Ray that words it otherwise would make engines' deaths of lost nodes."""
    import ray

    server = Path(ray.__file__).parent / "core" / "src" / "ray" / "gcs" / "gcs_server"
    assert served._NODE_DEATH.encode() in server.read_bytes()


def test_the_job_reserves_no_engine_beside_an_application() -> None:
    on_gpus = served_pools(12, replicas=3, on_gpu=True, config=settings(engine="serve"))
    assert (on_gpus.engines, on_gpus.engine_cpus, on_gpus.engine_gpus, on_gpus.decode_tasks) == (3, 0, 0, 12)
    assert on_gpus.units_per_call == 8
    assert on_gpus.describe().startswith("the application's 3 replicas (")
    with pytest.raises(ConfigError, match="no CPU of the cluster is free"):
        served_pools(0.5, replicas=1, on_gpu=False, config=settings(engine="serve"))


def test_what_needs_an_application_is_refused_without_a_cluster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = settings(engine="serve")
    with pytest.raises(ConfigError, match="needs --output"):
        engine_config(config)
    if not ray.is_initialized():
        with pytest.raises(ConfigError, match=r"set ray\.address"):
            job.run([str(write_wav(tmp_path / "a.wav", tone(220, 1.0)))], str(tmp_path / "out"), config)


@pytest.mark.ray
def test_tables_are_a_local_runs(
    deploy: Callable[..., str], run: Callable[..., report.Summary], tmp_path: Path
) -> None:
    """The demo model in float32: row for row, to the fingerprint, so that either goes on with the other's output."""
    clips = tmp_path / "clips"
    clips.mkdir()
    for name in ("en-three.flac", "de-two.flac", "es-two.m4a"):
        shutil.copy(clips_path() / name, clips)
    app = deploy("murmuration", model="demo", dtype="float32", lanes=4)
    on_application = settings(engine="serve")
    summary = run(clips, "served", on_application)
    assert summary.work is not None
    assert "the application's 1 replica" in summary.work.pools
    run(clips, "local", settings(dtype="float32", pool__engines=1, lanes=3))
    found, expected = tables(tmp_path / "served"), tables(tmp_path / "local")
    for name in expected:
        assert found[name]
        assert found[name] == [with_scores_of(*pair) for pair in zip(expected[name], found[name], strict=True)]

    assert run(clips, "local", on_application).work is None
    for wrong, said in (
        ({"serve__app": "other"}, f"'other': no such application on this cluster; there: {app}"),
        ({"model": str(DEMO)}, f"does not serve '{DEMO}'; its deployments: engine-demo, front"),
        ({"dtype": "bfloat16"}, "dtype: bfloat16, and the application 'murmuration' runs float32"),
        ({"language": "xx"}, "language 'xx' is not one of the model's"),
    ):
        with pytest.raises(ConfigError) as refused:
            run(clips, "refused", settings(**{"engine": "serve", **wrong}))
        assert said in str(refused.value)
    assert not (tmp_path / "refused").exists()

    from ray import serve

    serve.delete(app)
    deploy("murmuration", model="demo", engine="fake")
    with pytest.raises(OutputMismatchError, match="weights"):
        run(clips, "served", on_application)
    serve.delete("murmuration")


@pytest.mark.ray
def test_a_replica_that_dies_is_an_engine_that_dies(
    deploy: Callable[..., str], run: Callable[..., report.Summary], corpus: Callable[[int], Path], tmp_path: Path
) -> None:
    """The killer is found alone and fails; whoever was with it in the replica is none the worse."""
    from ray import serve

    faults = [{"match": "*clip-002*", "kind": "exit"}, {"match": "*clip-004*", "kind": "nan"}]
    app = deploy("deadly", model="demo", engine="fake", fake={"faults": faults})
    summary = run(corpus(6), "out", settings(engine="serve", serve__app=app))
    serve.delete(app)
    assert (summary.counts["ok"], summary.counts["failed"], summary.counts["missing"]) == (4, 2, 0)
    kinds = {Path(row["recording_id"]).stem: row["error_kind"] for row in tables(tmp_path / "out")["recordings"]}
    assert {name: kind for name, kind in kinds.items() if kind} == {
        "clip-002": "worker_crash",
        "clip-004": "non_finite",
    }


@pytest.mark.ray
def test_an_application_that_goes_ends_the_run_resumable(
    deploy: Callable[..., str], run: Callable[..., report.Summary], corpus: Callable[[int], Path], tmp_path: Path
) -> None:
    from ray import serve

    app = deploy("brief", model="demo", engine="fake", fake={"faults": [{"match": "*clip-001*", "kind": "hang"}]})
    ledger = tmp_path / "out" / "_run" / "ledger"

    def delete() -> None:
        deadline = time.monotonic() + 120
        while not list(ledger.glob("*.json")) and time.monotonic() < deadline:
            time.sleep(0.2)
        serve.delete(app, _blocking=False)

    config = settings(engine="serve", serve__app=app, max_failed_fraction=0.5)
    deleting = threading.Thread(target=delete)
    deleting.start()
    with pytest.raises(ApplicationError, match=r"serve\.app 'brief'"):
        run(corpus(3), "out", config)
    deleting.join()
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def unit(recording_id: str) -> Unit:
    return Unit(Recording(recording_id, "a.wav"), 0, 0, tone(220, 1.0), is_last=True)


def test_a_replica_that_stands_still_is_not_healthy() -> None:
    faults = (Fault(match="stuck", kind="hang", text="5"),)
    replica = EngineReplica(EngineConfig("demo", fake_faults=faults), canary_s=60, engine_timeout_s=0.2)

    async def hang() -> None:
        await replica.check_health()
        stuck = asyncio.ensure_future(replica.submit(unit("stuck"), DecodeOptions()))
        await asyncio.sleep(0.1)
        await replica.check_health()
        await asyncio.sleep(0.3)
        with pytest.raises(EngineError, match="has stood still"):
            await replica.check_health()
        stuck.cancel()

    asyncio.run(hang())


def test_an_idle_replica_proves_that_it_can_decode() -> None:
    replica = EngineReplica(EngineConfig("demo", device="cpu", dtype="float32", lanes=2), 0.0, 60)
    asyncio.run(replica.check_health())
    assert asyncio.run(replica.submit(unit("fine"), DecodeOptions(chunk_length_s=10))).failure is None
    replica._engine.close()  # as if its dispatcher had ended
    with pytest.raises(EngineError):
        asyncio.run(replica.check_health())
