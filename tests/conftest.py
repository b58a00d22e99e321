"""What tests share: clips made on the spot, the packaged fake, one local Ray cluster for the session."""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from audio_files import tone, write_wav

from pipeline.config import Config, load_config

ROOT = Path(__file__).resolve().parent.parent

# Set before anything imports ray, and inherited by every process that a test starts. A token file in the home folder
# is not for tests to leave; 4 logical CPUs, since 2 leave no room between an engine and a decode task.
RAY_ENV = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DEDUP_LOGS": "0",
    "RAY_metrics_report_interval_ms": "1000",
    "HF_HUB_OFFLINE": "1",
}
os.environ.update(RAY_ENV)
# Workers import `pipeline` also where it is not installed, and functions that a test module hands them.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])

OBJECT_STORE = 200 << 20

# The same examples every time, no clock, nothing left on the disk.
hypothesis.settings.register_profile("tests", derandomize=True, deadline=None, database=None, max_examples=60)
hypothesis.settings.load_profile("tests")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start Ray share one process, where its cluster is started once, and come first: they take longest and
    wait for processes most of the time. All others stay with their file, whose fixtures they share."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    for item in items:
        name = "ray" if item.get_closest_marker("ray") else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(name))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local cluster of 4 logical CPUs that every `ray` test of the session shares."""
    import ray
    from ray.data import DataContext

    ray.init(
        address="local",  # never one that somebody else runs on this machine
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    with warnings.catch_warnings():
        # Ray 2.60 warns of its own default when the first context is made (`use_push_based_shuffle`).
        warnings.simplefilter("ignore", DeprecationWarning)
        DataContext.get_current()
    yield
    ray.shutdown()


@pytest.fixture
def fake_config() -> Callable[..., Config]:
    """Settings of a run with the fake engine; keywords are settings, dots written as `__`."""

    def make(**settings: object) -> Config:
        keys = {name.replace("__", "."): value for name, value in settings.items()}
        return load_config(overrides={"engine": "fake", "model": "demo", **keys}, env={})

    return make


@pytest.fixture
def corpus(tmp_path: Path) -> Callable[[int], Path]:
    """A folder of n short tones, each of another pitch and length."""

    def make(n: int) -> Path:
        folder = tmp_path / "corpus"
        for i in range(n):
            write_wav(folder / f"clip-{i:03}.wav", tone(150 + 10 * i, 1.0 + 0.1 * (i % 7)))
        return folder

    return make


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server in this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket on it, `s3://...`, which this process and those it starts reach without more being said."""
    import boto3
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}"
