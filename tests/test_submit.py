"""`murmur submit`: what is refused before anything is sent, and jobs of a real cluster from their id to their end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from audio_files import tone, write_wav
from commands import FAKE, command, last_json, murmur

from pipeline import cli, submit
from pipeline.errors import UsageError
from pipeline.submit import Command, Options, exit_code, invisible, read_runtime_env, refuse_secrets

# ---- without a cluster


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["submit"], "needs a command to run"),
        (["submit", "--attach", "x", "retry", "s3://b/out"], "needs a command to run, or --attach"),
        (["submit", "serve"], "what runs on a cluster is transcribe, retry"),
        (["submit", "transcribe", "s3://b/in"], "needs --output"),
        (["submit", "transcribe", "s3://b/in", "--output", "s3://b/out", "--set", "chunk_lenght_s=5"], "did you mean"),
        (["submit", "transcribe", "s3://b/in", "--output", "s3://b/out", "--config", "no.yaml"], "no.yaml"),
        (["submit", "transcribe", "--bogus"], "No such option"),
        (["submit", "--env", "x", "retry", "s3://b/out"], "expected KEY=VALUE"),
        (["submit", "--address", "http://127.0.0.1:9", "retry", "s3://b/out"], "Failed to connect to Ray"),
        (["submit", "retry", "https://b.org/out?X-Amz-Signature=abc"], "holds a secret"),
    ],
)
def test_what_cannot_run_is_refused_here(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_secrets_are_refused_wherever_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_secrets(Command(("retry", "s3://bucket/out"), output="s3://bucket/out"))
    config = tmp_path / "run.yaml"
    config.write_text("model: s3://user:password@host/whisper\n")
    with pytest.raises(UsageError, match="holds a secret"):
        refuse_secrets(Command(("retry", "s3://bucket/out"), config_file=config))
    for variable in ("AWS_SECRET_ACCESS_KEY=x", "HF_TOKEN=x", "DB_PASSWORD=x", "PROXY=http://me:word@proxy"):
        with pytest.raises(UsageError, match=variable.partition("=")[0]) as refused:
            read_runtime_env(Options(env=(variable,)))
        assert "word@" not in str(refused.value)
    for variable in ("AWS_DEFAULT_REGION=x", "AWS_WEB_IDENTITY_TOKEN_FILE=/x", "GOOGLE_APPLICATION_CREDENTIALS=/x"):
        read_runtime_env(Options(env=(variable,)))
    monkeypatch.setenv("MURMUR_API_TOKENS", "for the endpoint")
    assert "for the endpoint" not in str(read_runtime_env(Options()))


def test_settings_of_this_environment_travel_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "runtime_env.yaml"
    file.write_text("pip: [s3fs]\nenv_vars: {A: file, B: file}\nworking_dir: there\n")
    monkeypatch.setenv("MURMUR_CHUNK_LENGTH_S", "20")
    found = read_runtime_env(Options(runtime_env=file, env=("A=line",), working_dir="here"))
    assert found["env_vars"] == {
        "A": "line",
        "B": "file",
        "MURMUR_CHUNK_LENGTH_S": "20",
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
    }
    assert (found["pip"], found["working_dir"]) == (["s3fs"], "here")
    file.write_text("- pip")
    with pytest.raises(UsageError, match="expected keys and values"):
        read_runtime_env(Options(runtime_env=file))


def test_paths_that_no_cluster_sees_are_refused(tmp_path: Path) -> None:
    on_stores = Command((), inputs=("s3://b/in.jsonl", "file:///mnt/share/in"), output="gs://b/out")
    assert list(invisible(on_stores, is_here=False, working_dir=None)) == []
    here = Command((), inputs=(str(tmp_path),), output="s3://b/out")
    with pytest.raises(UsageError, match="a path on this machine"):
        list(invisible(here, is_here=False, working_dir=None))
    (warning,) = invisible(here, is_here=True, working_dir=None)
    assert "taken to be the cluster's own" in warning
    relative = Command((), inputs=("calls.jsonl",), output="s3://b/out")
    with pytest.raises(UsageError, match="--working-dir"):  # nobody's path but of this command's current folder
        list(invisible(relative, is_here=True, working_dir=None))
    (tmp_path / "calls.jsonl").touch()
    assert list(invisible(relative, is_here=False, working_dir=str(tmp_path))) == []
    with pytest.raises(UsageError, match="output out"):
        list(invisible(Command((), output="out"), is_here=True, working_dir=str(tmp_path)))


def test_the_settings_file_has_to_be_where_the_job_starts(tmp_path: Path) -> None:
    config = tmp_path / "a folder" / "run.yaml"
    config.parent.mkdir()
    config.write_text("vad: none\n")
    for given in (["--config", str(config)], [f"--config={config}"]):
        told = Command(("transcribe", "s3://b/in", *given), config_file=config)
        with submit._shipped(told, {}) as (entry_point, env):
            assert entry_point.endswith("run.yaml")
            assert str(tmp_path) not in entry_point
            assert [path.name for path in Path(env["working_dir"]).iterdir()] == ["run.yaml"]
        assert not Path(env["working_dir"]).exists()
        with submit._shipped(told, {"working_dir": str(tmp_path)}) as (entry_point, env):
            assert "'a folder/run.yaml'" in entry_point or "'--config=a folder/run.yaml'" in entry_point
        with (
            pytest.raises(UsageError, match="has to lie in"),
            submit._shipped(told, {"working_dir": str(tmp_path / "b")}),
        ):
            pass


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [
        ("SUCCEEDED", 0, 0), ("SUCCEEDED", None, 0), ("FAILED", 3, 3), ("FAILED", 4, 4), ("FAILED", -9, 137),
        ("FAILED", None, 1), ("STOPPED", None, 143), ("STOPPED", -15, 143),
    ],
)  # fmt: skip
def test_the_exit_code_is_the_commands(status: str, driver: int | None, code: int) -> None:
    assert exit_code(SimpleNamespace(status=status, driver_exit_code=driver)) == code


def test_every_command_that_may_be_submitted_has_an_output() -> None:
    for name in cli.SUBMITTED:
        arguments = [name, "s3://b/in", *(["--output", "s3://b/out"] if name == "transcribe" else [])]
        assert cli._parsed(arguments).output in ("s3://b/out", "s3://b/in")
    evaluate = cli._parsed(["evaluate", "s3://b/out", "--reference", "r.jsonl", "--against", "other"])
    assert evaluate.inputs == ("r.jsonl", "other")  # a path that only this machine has is refused like an input


# ---- with one


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """The dashboard's address of a cluster on this machine, as `ray start --head` makes one."""
    folder = tempfile.mkdtemp(prefix="mr")  # pytest's own folders are too long for a socket's path
    gcs, port, agent, client = free_ports(4)
    arguments = {
        "port": gcs, "dashboard-port": port, "dashboard-agent-listen-port": agent, "ray-client-server-port": client,
        "node-ip-address": "127.0.0.1", "dashboard-host": "127.0.0.1", "num-cpus": 4, "temp-dir": folder,
        "object-store-memory": 200 << 20,
    }  # fmt: skip
    with open(f"{folder}/said.txt", "w") as said:
        cluster = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
             *(f"--{name}={value}" for name, value in arguments.items())],
            # `murmur` is looked for where this Python is.
            env={**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])},
            stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, cluster, Path(folder) / "said.txt")
        yield address
    finally:
        # Asked to end, `ray start` waits half a minute for its own processes; when they are gone, it goes.
        for process in psutil.Process(cluster.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        cluster.wait(90)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(address: str, cluster: subprocess.Popen[bytes], said: Path) -> None:
    deadline = time.monotonic() + 200
    while cluster.poll() is None and time.monotonic() < deadline:
        with suppress(OSError):
            urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
            return
        time.sleep(0.3)
    raise AssertionError(said.read_text())


def interrupted(job: list[str], ledger: Path) -> str:
    """What `murmur submit` had said when it was interrupted, as soon as something was committed."""
    deadline = time.monotonic() + 300
    with subprocess.Popen(command(*job), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as follower:
        while follower.poll() is None and time.monotonic() < deadline and not list(ledger.glob("*.json")):
            time.sleep(0.1)
        time.sleep(1.0)  # a log is read once a second
        follower.send_signal(signal.SIGINT)
        said, _ = follower.communicate(timeout=60)
    assert follower.returncode == 130, said
    return said


@pytest.mark.ray
@pytest.mark.timeout(900)  # half a minute on an idle machine; a cluster and three drivers start
def test_a_job_is_followed_stopped_and_goes_on(dashboard: str, tmp_path: Path) -> None:
    """Ctrl-C leaves the job running; `ray job stop` ends it resumable; the same again ends with the job's own code."""
    folder, output = tmp_path / "in", tmp_path / "out"
    for i in range(8):
        write_wav(folder / f"clip-{i}.wav", tone(200 + 30 * i, 1.0))
    (folder / "damaged.wav").write_bytes(b"no audio" * 200)
    config = tmp_path / "run.yaml"
    config.write_text("fake:\n  faults: [{kind: hang, text: '2'}]\npool: {calls_per_engine: 1}\n")
    job = ["transcribe", str(folder), "--output", str(output), *FAKE, "--config", str(config)]
    to = ["submit", "--address", dashboard]
    ledger = output / "_run" / "ledger"

    said = interrupted([*to, "--submission-id", "first", *job], ledger)
    assert "job first on http" in said
    assert "Running entrypoint for job first: exec murmur transcribe" in said
    assert str(config) not in said  # it was sent along, and is named as it is there
    assert "the job goes on" in said

    assert submit.attach("first", dashboard).status() == "RUNNING"
    submit._client(dashboard).stop_job("first")
    stopped = murmur(*to, "--attach", "first")
    assert stopped.returncode == 143, stopped.stderr
    assert "stopped by SIGTERM; what is committed stays" in stopped.stdout  # so it was not killed
    committed = len(list(ledger.glob("*.json")))
    assert 1 <= committed < 9
    assert not (output / "_SUCCESS").exists()

    again = murmur(*to, "--json", *job, "--json")
    assert again.returncode == 3, again.stderr  # the damaged one
    assert {**last_json(again), "job": ""} == {"job": "", "status": "FAILED", "exit_code": 3}
    (told,) = (json.loads(line) for line in again.stderr.splitlines() if line.startswith('{"inputs"'))
    assert (told["ok"], told["failed"], told["missing"]) == (8, 1, 0)
    assert told["this_run"]["recordings"] == 9 - committed
