"""`murmur serve` as a user starts it: real Ray, real Serve, real processes that are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
import requests
from application import clip
from commands import command

from pipeline import cli

EN_FIVE = clip("en-five.mp3").read_bytes()
FAKE = ("--set", "engine=fake", "--set", "log_format=json", "--set", "ray.object_store_mb=200")


class Served:
    """A running `murmur serve`, and what it has said so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()
        self.url = self.wait_for(lambda line: line.startswith("listening on ")).removeprefix("listening on ").strip()
        self.wait_for(lambda line: line.strip() == "ready")

    def wait_for(self, wanted: Callable[[str], bool], within_s: float = 120.0) -> str:
        deadline = time.monotonic() + within_s
        while True:
            found = next((line for line in list(self.lines) if wanted(line)), None)
            if found is not None:
                return found
            assert self.process.poll() is None, "".join(self.lines)
            assert time.monotonic() < deadline, "".join(self.lines)
            time.sleep(0.05)

    def post(self, **data: str) -> requests.Response:
        url = f"{self.url}/v1/inference/demo"
        return requests.post(url, files={"audio": EN_FIVE}, data=data, timeout=120)

    def replicas(self) -> list[psutil.Process]:
        """Of the engines, by what Serve calls them."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in children if "ServeReplica" in _name(one) and "engine-demo" in _name(one)]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextmanager
def serving(*arguments: str) -> Iterator[Served]:
    line = command("serve", "--model", "demo", "--port", "0", *arguments)
    process = subprocess.Popen(
        line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield Served(process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            if process.stderr is not None:
                process.stderr.close()


@pytest.mark.ray
def test_killed_replica_and_drained_server() -> None:
    """F56: the request goes to the next replica within its deadline. SIGTERM: what runs is finished, then 143."""
    hang = "fake.faults=[{kind: hang, text: '3'}]"
    with serving(*FAKE, "--set", hang) as served, ThreadPoolExecutor(2) as pool:
        before = served.post().json()
        running = pool.submit(served.post)
        time.sleep(1.0)
        (replica,) = served.replicas()
        replica.kill()
        answer = running.result()
        assert answer.status_code == 200, answer.text
        assert answer.json()["text"] == before["text"]

        streaming = pool.submit(_streamed, served.url)
        last = pool.submit(served.post)
        time.sleep(1.0)
        served.process.send_signal(signal.SIGTERM)
        assert last.result().status_code == 200
        assert streaming.result()[-1]["type"] == "transcript.text.done"
        assert served.process.wait(60) == 143
    said = [json.loads(line) for line in served.lines if line.startswith("{")]
    requests_said = [one for one in said if one.get("route") == "/v1/inference/{model}"]
    assert [one["status"] for one in requests_said] == ["200"] * 3
    assert before["request_id"] in {one["request"] for one in requests_said}
    assert before["text"].split()[0] not in "".join(served.lines)


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
