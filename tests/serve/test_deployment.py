"""`murmur serve` as a user starts it: real Ray, real Serve, real processes that are killed."""

from __future__ import annotations

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from application import clip
from serving import Served, serving

from pipeline import cli

EN_FIVE = clip("en-five.mp3").read_bytes()
FAKE = ("--set", "engine=fake", "--set", "log_format=json", "--set", "ray.object_store_mb=200")


def post(served: Served, **data: str) -> requests.Response:
    return requests.post(f"{served.url}/v1/inference/demo", files={"audio": EN_FIVE}, data=data, timeout=120)


@pytest.mark.ray
def test_killed_replica_and_drained_server() -> None:
    """F56: the request goes to the next replica within its deadline. SIGTERM: what runs is finished, then 143."""
    hang = "fake.faults=[{kind: hang, text: '3'}]"
    with serving(*FAKE, "--set", hang) as served, ThreadPoolExecutor(2) as pool:
        before = post(served).json()
        running = pool.submit(post, served)
        time.sleep(1.0)
        (replica,) = served.processes()["engine"]
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
