"""What a webhook's promise is worth: processes that are really killed, disks that are full, two owners."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from webhooks import (
    AUDIO,
    ORDER,
    Bench,
    Clock,
    Receiver,
    always,
    ended,
    failed,
    forever,
    in_loop,
    names,
    one,
    transcribed,
    until,
)

from pipeline.errors import ConfigError
from serve_app import webhook
from serve_app.spool import Job, Spool
from serve_app.webhook import SpoolFullError, SpoolHeldError, Webhooks, WebhookSettings

# Arguments: the spool, who may be called, the URL, and how far it comes before it says so and waits to be killed.
DRIVER = """
import asyncio, pathlib, sys
from serve_app.webhook import Webhooks, WebhookSettings
spool, allow, url, stage = sys.argv[1:]

async def stop():
    print(stage, flush=True)
    await asyncio.Event().wait()

async def answer(request_id, order, audio):
    if stage == "answering":
        await stop()
    return {"request_id": request_id, "order": order, "bytes": len(audio.read_bytes())}

async def resolve(host):
    if stage == "answered":
        await stop()
    return ["127.0.0.1"]

async def main():
    hooks = Webhooks(WebhookSettings(allow=(allow,), spool=pathlib.Path(spool)), answer, None, resolve=resolve)
    await hooks.start()
    if stage == "holding":
        await stop()
    audio = pathlib.Path(spool).parent / "upload"
    audio.write_bytes(b"RIFF....the audio of a caller")
    await hooks.accept("request-1", url, {"language": "de"}, audio)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@asynccontextmanager
async def driver(bench: Bench, origin: str, stage: str) -> AsyncIterator[subprocess.Popen[str]]:
    """The process, as far as `stage`; killed in the end."""
    command = [sys.executable, "-c", DRIVER, str(bench.spool), origin, f"{origin}/hook", stage]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        if stage != "posting":  # then the receiver tells
            assert await asyncio.to_thread(process.stdout.readline) == f"{stage}\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


async def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    await asyncio.to_thread(process.wait)


@in_loop
async def test_killed_before_the_answer_it_is_answered_and_delivered_once(bench: Bench) -> None:
    async with Receiver() as there:
        origin = f"http://receiver.example:{there.port}"
        async with driver(bench, origin, "answering") as process:
            await kill(process)
        assert bench.left() == [f"jobs/request-1{part}" for part in ("", "/audio", "/request.json", "/state.json")]
        async with bench.running(bench.settings(origin), resolve=names(receiver="127.0.0.1")) as hooks:
            await until(ended(hooks))
    (post,) = there.posts
    assert (post.id, post.path) == ("request-1", "/hook")
    assert json.loads(post.body) == {"request_id": "request-1", "order": {"language": "de"}, "bytes": len(AUDIO)}
    assert bench.left() == []


@in_loop
async def test_killed_between_answer_and_delivery_it_is_not_answered_again(bench: Bench) -> None:
    async def unexpected(*_: object) -> dict[str, Any]:
        return {"answered": "twice"}

    async with Receiver() as there:
        origin = f"http://receiver.example:{there.port}"
        async with driver(bench, origin, "answered") as process:
            await kill(process)
        assert there.posts == []
        kept = (bench.spool / "jobs" / "request-1" / "answer.json").read_bytes()
        assert not (bench.spool / "jobs" / "request-1" / "audio").exists()
        async with bench.running(bench.settings(origin), unexpected, resolve=names(receiver="127.0.0.1")) as hooks:
            await until(ended(hooks))
    (post,) = there.posts
    assert (post.id, post.body) == ("request-1", kept)
    assert bench.left() == []


@pytest.mark.parametrize(("max_attempts", "posts"), [(8, 2), (1, 1)])
@in_loop
async def test_killed_in_the_middle_of_a_delivery(bench: Bench, max_attempts: int, posts: int) -> None:
    """Nobody knows whether it arrived: it comes again, as the same. The attempt was counted, also against the cap."""
    arrived, killed = asyncio.Event(), asyncio.Event()

    async def answer(request: web.Request, before: int) -> web.Response:
        if before == 0:
            arrived.set()
            await killed.wait()
        return web.Response(status=204)

    async with Receiver(answer) as there:
        origin = f"http://receiver.example:{there.port}"
        async with driver(bench, origin, "posting") as process:
            await arrived.wait()
            await kill(process)
            killed.set()
        settings = bench.settings(origin, max_attempts=max_attempts)
        async with bench.running(settings, resolve=names(receiver="127.0.0.1")) as hooks:
            await until(ended(hooks))
            assert [letter["reason"] for letter in hooks.dead_letters()] == ["interrupted"] * (2 - posts)
    assert len(there.posts) == posts
    assert len({(post.id, post.body) for post in there.posts}) == 1
    assert not list((bench.spool / "jobs").iterdir())


# Dies at the n-th call of those that change the disk. Says so when it was not killed before `accept` returned.
DIES = """
import os, pathlib, sys
from serve_app import spool
left = int(sys.argv[2])

def dying(do):
    def call(*arguments):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return do(*arguments)
    return call

folder = pathlib.Path(sys.argv[1])
one = spool.Spool(folder, 1 << 30)
one.open()
audio = folder.parent / "upload"
audio.write_bytes(b"audio")
for name in ("mkdir", "rename", "replace", "fsync"):
    setattr(os, name, dying(getattr(os, name)))
one.accept(spool.Job("request-1", 1, "https://h/", "h"), {"a": 1}, audio)
print("accepted", flush=True)
"""


def test_killed_at_any_step_of_acceptance_it_is_whole_or_nothing(tmp_path: Path) -> None:
    found, accepted = [], False
    while not accepted:
        folder = tmp_path / str(len(found)) / "spool"
        command = [sys.executable, "-c", DIES, str(folder), str(len(found))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        accepted = done.stdout == "accepted\n"
        assert accepted or done.returncode == 9, done.stderr
        spool = Spool(folder, 1 << 30)
        jobs, _ = spool.open()
        for job in jobs:
            order, audio = spool.order(job)
            assert (order, audio.read_bytes()) == ({"a": 1}, b"audio")
        assert len(list((folder / "jobs").iterdir())) == len(jobs)
        found.append(len(jobs))
        spool.close()
    assert found[-1] == 1
    assert found == sorted(found)  # nothing until some step, whole from there on
    assert found.count(0) >= 4


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@in_loop
async def test_a_full_disk_is_told_and_nothing_is_left(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Whichever step finds it full."""
    sync = os.fsync
    async with Receiver() as there, bench.running(bench.settings(there.origin)) as hooks:
        steps = 0
        while True:
            left = steps

            def full(fd: int) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    raise OSError(code, os.strerror(code))
                sync(fd)

            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", full)
                try:
                    await hooks.accept(f"request-{steps}", f"{there.origin}/", ORDER, bench.audio())
                except SpoolFullError:
                    steps += 1
                    assert bench.left() == []
                    assert (ended(hooks)(), hooks._spool._used) == (True, 0)
                    continue
            break
        await until(ended(hooks))
    assert steps == 4  # audio, request, the job's folder, the folder of jobs
    assert [post.id for post in there.posts] == ["request-4"]


@in_loop
async def test_another_fault_of_the_disk_leaves_nothing_either(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "broken")

    async with bench.running(bench.settings("http://h:1")) as hooks:
        monkeypatch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="broken"):
            await hooks.accept("request-1", "http://h:1/", ORDER, bench.audio())
        assert (bench.left(), ended(hooks)()) == ([], True)


@in_loop
async def test_a_disk_that_is_full_later_costs_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for the answer, nor for the state: it is made again when there is."""
    fail = 0
    put = webhook.Spool.answer

    def full(spool: Spool, job: Job, body: bytes) -> None:
        nonlocal fail
        fail += 1
        if fail < 3:
            raise OSError(errno.ENOSPC, "full")
        put(spool, job, body)

    monkeypatch.setattr(webhook.Spool, "answer", full)
    async with Receiver() as there, bench.running(bench.settings(there.origin)) as hooks:
        await one(bench, hooks, f"{there.origin}/")
    assert (fail, len(there.posts)) == (3, 1)


@in_loop
async def test_the_cap_on_bytes(bench: Bench) -> None:
    go = asyncio.Event()

    async def answer(request_id: str, order: dict[str, Any], audio: Path) -> dict[str, Any]:
        await go.wait()
        return {}

    settings = lambda origin: bench.settings(origin, spool_mb=1)  # noqa: E731
    big = b"x" * 600_000
    async with Receiver() as there:
        async with bench.running(settings(there.origin), answer) as hooks:
            await hooks.accept("request-1", f"{there.origin}/", ORDER, bench.audio(big))
            audio = bench.audio(big)
            with pytest.raises(SpoolFullError, match="too much"):
                await hooks.accept("request-2", f"{there.origin}/", ORDER, audio)
            assert audio.exists()  # not taken
        async with bench.running(settings(there.origin), answer) as hooks:  # and what was there before counts
            with pytest.raises(SpoolFullError):
                await hooks.accept("request-2", f"{there.origin}/", ORDER, audio)
            go.set()
            await until(ended(hooks))
            await hooks.accept("request-2", f"{there.origin}/", ORDER, audio)
            await until(ended(hooks))
    assert [post.id for post in there.posts] == ["request-1", "request-2"]


@in_loop
async def test_audio_comes_from_another_file_system(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(source: object, target: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "rename", other)
    async with Receiver() as there, bench.running(bench.settings(there.origin)) as hooks:
        audio = bench.audio()
        await hooks.accept("request-1", f"{there.origin}/", ORDER, audio)
        assert not audio.exists()
        await until(ended(hooks))
    assert json.loads(there.posts[0].body)["bytes"] == len(AUDIO)


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@in_loop
async def test_nobody_else_can_read_it(bench: Bench, open_umask: None) -> None:
    """Whatever the umask, and the modes of a folder that was there before."""

    def modes() -> set[tuple[bool, int]]:
        return {(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in (bench.spool, *bench.spool.rglob("*"))}

    bench.spool.mkdir(mode=0o755)
    async with Receiver(always(410)) as there:
        settings = bench.settings(there.origin)
        async with bench.running(settings, forever) as hooks:
            await hooks.accept("waits", f"{there.origin}/", ORDER, bench.audio())
            await until((bench.spool / "jobs/waits/state.json").exists)
            assert modes() == {(True, 0o700), (False, 0o600)}
        async with bench.running(settings) as hooks:
            await until(lambda: hooks.counts()["dead"])
            assert modes() == {(True, 0o700), (False, 0o600)}


@in_loop
async def test_the_loop_goes_on_while_the_disk_is_slow(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    sync = os.fsync

    def slow(fd: int) -> None:
        if not released.wait(30):
            raise RuntimeError("the loop stood still")
        sync(fd)

    monkeypatch.setattr(os, "fsync", slow)
    async with Receiver() as there, bench.running(bench.settings(there.origin)) as hooks:
        accepting = asyncio.create_task(hooks.accept("request-1", f"{there.origin}/", ORDER, bench.audio()))
        await asyncio.sleep(0.05)
        assert not accepting.done()
        released.set()
        await accepting
        await until(ended(hooks))


@in_loop
async def test_a_caller_that_leaves_during_acceptance(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job is whole, and is not forgotten until the next start."""
    released = threading.Event()
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (released.wait(30), sync(fd)))
    async with Receiver() as there, bench.running(bench.settings(there.origin)) as hooks:
        accepting = asyncio.create_task(hooks.accept("request-1", f"{there.origin}/", ORDER, bench.audio()))
        await asyncio.sleep(0.05)
        accepting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await accepting
        released.set()
        await until(lambda: hooks.counts()["delivered"] == 1)


@in_loop
async def test_one_process_owns_a_spool(bench: Bench) -> None:
    async with driver(bench, "http://receiver.example:9", "holding") as process:
        hooks = Webhooks(bench.settings(), transcribed, failed)
        with pytest.raises(SpoolHeldError, match=f"process {process.pid}") as caught:
            await hooks.start()
        assert caught.value.exit_code == 2
        await hooks.close(0)
        await kill(process)
        async with bench.running(bench.settings()):  # a dead one holds nothing
            with pytest.raises(SpoolHeldError):
                async with bench.running(bench.settings()):
                    pass
        async with bench.running(bench.settings()):
            pass


@in_loop
async def test_a_spool_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    hooks = Webhooks(WebhookSettings(spool=tmp_path / "file" / "spool"), transcribed, failed)
    with pytest.raises(ConfigError, match=r"webhook\.spool"):
        await hooks.start()
    await hooks.close(0)


@in_loop
async def test_attempts_and_the_next_time_survive_a_restart(bench: Bench) -> None:
    clock, later = Clock(), Clock()
    waits: list[float] = []

    async def wait(seconds: float) -> None:
        waits.append(seconds)
        await forever()

    async with Receiver(always(503)) as there:
        settings = bench.settings(there.origin, max_attempts=2)
        async with bench.running(settings, clock=clock, sleep=wait) as hooks:
            await hooks.accept("request-1", f"{there.origin}/", ORDER, bench.audio())
            await until(lambda: waits)
            assert hooks.counts()["undelivered"] == 1
        later.now = clock.now + 1
        async with bench.running(settings, clock=later) as hooks:
            assert hooks.counts()["undelivered"] == 1
            await until(ended(hooks))
            (letter,) = hooks.dead_letters()
    assert later.slept == [pytest.approx(waits[0] - 1)]
    assert (len(there.posts), letter["attempts"]) == (2, 2)


@in_loop
async def test_a_clock_that_was_set_back_costs_one_gap(bench: Bench) -> None:
    clock, back = Clock(), Clock()
    back.now -= 10 * 365 * 86400
    async with Receiver(always(503)) as there:
        settings = bench.settings(there.origin, max_attempts=2)
        async with bench.running(settings, clock=clock, sleep=forever) as hooks:
            await hooks.accept("request-1", f"{there.origin}/", ORDER, bench.audio())
            await until(lambda: there.posts and hooks.counts()["undelivered"])
            await until(lambda: not hooks._at_work)
        async with bench.running(settings, clock=back) as hooks:
            await until(ended(hooks))
    assert back.slept == [9000]


@in_loop
async def test_closing_lets_what_is_in_the_middle_end(bench: Bench) -> None:
    begun, go = asyncio.Event(), asyncio.Event()

    async def answer(request_id: str, order: dict[str, Any], audio: Path) -> dict[str, Any]:
        begun.set()
        await go.wait()
        return await transcribed(request_id, order, audio)

    async with Receiver() as there:
        settings = bench.settings(there.origin)
        async with bench.running(settings, answer) as hooks:
            await hooks.accept("request-1", f"{there.origin}/", ORDER, bench.audio())
            await begun.wait()
            closing = asyncio.create_task(hooks.close(60))
            await asyncio.sleep(0)
            with pytest.raises(SpoolFullError, match="stopped"):
                await hooks.accept("request-2", f"{there.origin}/", ORDER, bench.audio())
            go.set()
            await closing
        assert (bench.spool / "jobs/request-1/answer.json").exists()
        assert there.posts == []  # not begun any more
        async with bench.running(settings) as hooks:
            await until(ended(hooks))
    assert len(there.posts) == 1


@in_loop
async def test_closing_does_not_wait_longer_than_asked(bench: Bench) -> None:
    """The answer is interrupted, which is not counted as a try; the next process makes it."""
    begun = asyncio.Event()

    async def answer(*_: object) -> dict[str, Any]:
        begun.set()
        return await forever()  # type: ignore[no-any-return]

    async with Receiver() as there:
        settings = bench.settings(there.origin)
        for _ in range(webhook.MOST_TRIES + 1):
            begun.clear()
            async with bench.running(settings, answer) as hooks:
                if hooks.counts()["pending"] == 0:
                    await hooks.accept("request-1", f"{there.origin}/", ORDER, bench.audio())
                await begun.wait()
        async with bench.running(settings) as hooks:
            await until(ended(hooks))
    assert json.loads(there.posts[0].body)["bytes"] == len(AUDIO)


@in_loop
async def test_what_takes_the_process_down_again_and_again_is_not_tried_for_ever(bench: Bench) -> None:
    """A kill leaves its try counted, as the state on disk says."""
    async with Receiver() as there:
        settings = bench.settings(there.origin)
        async with bench.running(settings, forever) as hooks:
            await hooks.accept("request-1", f"{there.origin}/", ORDER, bench.audio())
        state = bench.spool / "jobs/request-1/state.json"
        state.write_text(json.dumps({"tries": webhook.MOST_TRIES, "attempts": 0, "due": 0.0, "reason": ""}))
        async with bench.running(settings) as hooks:
            await until(ended(hooks))
    assert "given up" in json.loads(there.posts[0].body)["failed"]


@in_loop
async def test_notes_of_the_dead_survive_and_are_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "MOST_DEAD", 3)
    clock = Clock()
    async with Receiver(always(410)) as there:
        settings = bench.settings(there.origin)
        async with bench.running(settings, clock=clock) as hooks:
            for n in range(5):
                clock.now += 1
                await one(bench, hooks, f"{there.origin}/", f"request-{n}")
            before = hooks.dead_letters()
        async with bench.running(settings) as hooks:
            assert hooks.dead_letters() == before
    assert [letter["request_id"] for letter in before] == ["request-2", "request-3", "request-4"]
    assert bench.left() == [f"dead/request-{n}.json" for n in (2, 3, 4)]


@in_loop
async def test_a_damaged_request_costs_itself_only(bench: Bench) -> None:
    async with Receiver() as there:
        settings = bench.settings(there.origin)
        async with bench.running(settings, forever) as hooks:
            for n in range(3):
                await hooks.accept(f"request-{n}", f"{there.origin}/", ORDER, bench.audio())
        (bench.spool / "jobs/request-1/request.json").write_text('{"id": "requ')
        (bench.spool / "jobs/request-2/state.json").write_text('{"tri')
        (bench.spool / "dead/half.json").write_text("")
        async with bench.running(settings) as hooks:
            await until(ended(hooks))
            (letter,) = hooks.dead_letters()
    assert (letter["request_id"], letter["reason"]) == ("request-1", "its request cannot be read")
    assert {post.id for post in there.posts} == {"request-0", "request-2"}  # in either order
    assert bench.left() == ["dead/request-1.json"]


@in_loop
async def test_an_id_is_a_file_name(bench: Bench) -> None:
    async with bench.running(bench.settings("http://h:1"), forever) as hooks:
        for request_id in ("", "..", "../x", "a/b", "a" * 65, "a\n"):
            with pytest.raises(ValueError, match="request id"):
                await hooks.accept(request_id, "http://h:1/", ORDER, bench.audio())
        await hooks.accept("request-1", "http://h:1/", ORDER, bench.audio())
        with pytest.raises(ValueError, match="already"):
            await hooks.accept("request-1", "http://h:1/", ORDER, bench.audio())
        assert hooks.counts()["pending"] == 1
