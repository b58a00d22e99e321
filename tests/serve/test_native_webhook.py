"""Webhooks through DeepInfra's route: queued at once, the same answer later, once, whatever is killed in between."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import requests
from application import EN_FIVE, MODEL, Serve
from serving import serving
from webhooks import Receiver, always, until


def post(url: str, webhook: str, model: str = MODEL, audio: bytes = EN_FIVE, **data: str) -> requests.Response:
    fields = {"webhook": webhook, **data}
    return requests.post(f"{url}/v1/inference/{model}", files={"audio": audio}, data=fields, timeout=60)


def test_queued_and_delivered(serve: Serve, tmp_path: Path) -> None:
    """C71, C77, F84: the answer of the route itself, to whom it was promised, without token or audio."""

    async def story() -> None:
        async with Receiver() as receiver:
            server = serve(allow=(receiver.origin,))
            plain = requests.post(f"{server.url}/v1/inference/{MODEL}", files={"audio": EN_FIVE}, timeout=60).json()
            for webhook in (f"{receiver.origin}/done", f'"{receiver.origin}/done"'):
                queued = await asyncio.to_thread(post, server.url, webhook)
                assert queued.status_code == 200
                said = queued.json()
                assert set(said) == {"request_id", "inference_status"}
                assert said["inference_status"]["status"] == "queued"
                await until(lambda: receiver.posts)
                (sent,) = receiver.posts
                receiver.posts.clear()
                assert (sent.path, sent.headers["content-type"]) == ("/done", "application/json")
                body = json.loads(sent.body)
                assert body["request_id"] == said["request_id"] == sent.id
                assert body["inference_status"]["status"] == "succeeded"
                ours = ("request_id", "inference_status")
                assert {k: v for k, v in body.items() if k not in ours} == {
                    k: v for k, v in plain.items() if k not in ours
                }
                assert "authorization" not in sent.headers
            await until(lambda: server.app.webhooks.counts()["delivered"] == 2)  # type: ignore[union-attr]
            assert not list((tmp_path / "spool" / "jobs").iterdir())

    asyncio.run(story())


def test_what_cannot_be_read_is_delivered_as_failed(serve: Serve) -> None:
    async def story() -> None:
        async with Receiver() as receiver:
            server = serve(allow=(receiver.origin,))
            assert (
                await asyncio.to_thread(post, server.url, receiver.origin, audio=b"no audio" * 99)
            ).status_code == 200
            await until(lambda: receiver.posts)
            body = json.loads(receiver.posts[0].body)
            assert set(body) == {"request_id", "inference_status"}
            assert body["inference_status"] == {
                "status": "failed", "runtime_ms": 0, "cost": 0.0, "tokens_generated": 0, "tokens_input": 0,
            }  # fmt: skip

    asyncio.run(story())


@pytest.mark.parametrize(
    "webhook",
    ["x", "ftp://h/", "http://", "https://" + "a" * 5000, "https://a/\r\nX: y", "javascript:alert(1)",
     "http://example.org/", "https://127.0.0.1/", "https://169.254.169.254/latest", "https://[::1]/", "https://0x7f.1/",
     "https://2130706433/", "https://localhost/", "https://user@example.org/"],
)  # fmt: skip
def test_addresses_that_are_refused(serve: Serve, webhook: str) -> None:
    """C76, P12: at once, and nothing is queued."""
    server = serve(allow=())
    response = post(server.url, webhook)
    assert response.status_code == 422, response.text
    assert response.json()["detail"][0]["loc"][-1] == "webhook"
    assert server.app.webhooks is not None
    assert server.app.webhooks.counts()["pending"] == 0


def test_refused_fields_are_refused_before_anything_is_queued(serve: Serve) -> None:
    server = serve(allow=("http://127.0.0.1:9",))
    assert post(server.url, "http://127.0.0.1:9/", task="sing").status_code == 422
    assert server.app.webhooks is not None
    assert server.app.webhooks.counts()["pending"] == 0


def test_no_room_in_the_spool(serve: Serve, tmp_path: Path) -> None:
    server = serve(allow=("http://127.0.0.1:9",), limits={"body_mb": 100})
    response = post(server.url, "http://127.0.0.1:9/", audio=bytes(70 << 20))  # the tests' spool has 64 MB
    assert (response.status_code, bool(response.headers["Retry-After"])) == (503, True)
    assert not list((tmp_path / "spool" / "jobs").iterdir())


def test_dead_letters_are_visible(serve: Serve) -> None:
    """C74: 410 is the end of it; the operator sees why, and not the address's path."""

    async def story() -> None:
        async with Receiver(always(410)) as receiver:
            server = serve(allow=(receiver.origin,))
            queued = await asyncio.to_thread(post, server.url, f"{receiver.origin}/secret-path")
            await until(lambda: server.app.webhooks.counts()["dead"] == 1)  # type: ignore[union-attr]
            assert len(receiver.posts) == 1
            said = await asyncio.to_thread(requests.get, f"{server.url}/v1/webhooks", timeout=30)
            (letter,) = said.json()["dead_letters"]
            assert (letter["request_id"], letter["reason"]) == (queued.json()["request_id"], "gone")
            assert "secret-path" not in said.text

    asyncio.run(story())


def test_our_own_route_as_the_webhook(serve: Serve) -> None:
    """F82: it refuses the answer like any other body, so nothing goes round."""

    async def story() -> None:
        server = serve(allow=("http://127.0.0.1:1",))
        url = f"{server.url}/v1/inference/{MODEL}"
        webhooks = server.app.webhooks
        assert webhooks is not None
        webhooks._rules = webhooks._rules.parse((server.url,))
        assert (await asyncio.to_thread(post, server.url, url)).status_code == 200
        await until(lambda: webhooks.counts()["attempts"] >= 1)
        counts = webhooks.counts()
        assert (counts["delivered"], counts["pending"]) == (0, 0)

    asyncio.run(story())


@pytest.mark.ray
def test_kill_9_of_everything_between_queued_and_delivered(tmp_path: Path) -> None:
    """P21: the server, its Ray and its engines are killed; started again, it delivers once, under the same id."""
    spool = ("--set", f"webhook.spool={tmp_path / 'spool'}")
    fake = ("--set", "engine=fake", "--set", "ray.object_store_mb=200")

    async def story() -> None:
        async with Receiver() as receiver:
            allow = ("--set", f"webhook.allow=['{receiver.origin}']")
            hang = ("--set", "fake.faults=[{kind: hang, text: '3600'}]")
            loop = asyncio.get_running_loop()

            def first() -> str:
                with serving(*fake, *spool, *allow, *hang) as served:
                    queued = post(served.url, receiver.origin, model="demo").json()
                    everything = [one for found in served.processes().values() for one in found]
                    for process in everything:
                        process.kill()
                    psutil.wait_procs(everything, timeout=30)
                return str(queued["request_id"])

            id_ = await loop.run_in_executor(None, first)
            assert receiver.posts == []

            def second() -> None:
                with serving(*fake, *spool, *allow) as served:
                    deadline = time.monotonic() + 60
                    while not receiver.posts:
                        assert time.monotonic() < deadline
                        time.sleep(0.05)
                    served.process.send_signal(signal.SIGTERM)
                    served.process.wait(60)

            await loop.run_in_executor(None, second)
            (sent,) = receiver.posts
            assert sent.id == id_
            assert json.loads(sent.body)["inference_status"]["status"] == "succeeded"
            assert not os.listdir(tmp_path / "spool" / "jobs")

    asyncio.run(story())
