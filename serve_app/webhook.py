"""Answers that are sent later: a request is kept on disk, answered, and its answer posted until it is taken.

    accept → spool → answer (a few at a time, in order) → POST, with growing gaps → gone, or a note for the operator

Delivered at least once, with the same `webhook-id` every time: a receiver that answers as the process dies is told
twice. Signed as Standard Webhooks says, where there is a secret. An engine that is down, a receiver that is down, a
kill at any moment: the job goes on where it was. Knows asyncio and aiohttp; not what a transcript or a route is.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import os
import random
import ssl
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from weakref import WeakValueDictionary

import aiohttp

from pipeline.errors import ConfigError
from serve_app.addresses import CheckedResolver, Dns, Resolve, Rules, WebhookRefusedError
from serve_app.spool import MOST_DEAD, Job, Spool, SpoolFullError, SpoolHeldError

__all__ = ["Answer", "SpoolFullError", "SpoolHeldError", "WebhookRefusedError", "WebhookSettings", "Webhooks"]

log = logging.getLogger(__name__)
_P = ParamSpec("_P")
_T = TypeVar("_T")

# (request id, order as given, audio file) → JSON body to deliver. A recording that fails is a body too; what it raises
# (an engine that is down) is tried again. It has deadlines of its own: nothing here cuts it short.
Answer = Callable[[str, dict[str, Any], Path], Awaitable[dict[str, Any]]]
Failed = Callable[[str, str], dict[str, Any]]  # (request id, why) → the body, when `answer` kept raising

ANSWERS = 2  # made at once: the next is uploaded and decoded while the engine has the last
DELIVERIES, DELIVERIES_A_HOST = 32, 4  # at once; a host that never answers holds 4 places for 30 s each
CONNECT_S, TOTAL_S = 10.0, 30.0  # of one attempt; connecting includes the name and TLS
CHECK_DNS_S = 2.0  # a caller waits for its name; a slower one is accepted, and resolved at delivery
# The n-th failure is followed by the n-th gap, the last of them from then on, and up to a quarter more: what failed
# together does not come back together.
GAPS_S = (5.0, 30.0, 120.0, 600.0, 1800.0, 7200.0)
TRY_GAPS_S = (5.0, 30.0, 120.0, 600.0)
JITTER = 0.25
MOST_TRIES = 16  # for an answer: some two hours of an engine that is down
MOST_RETRY_AFTER_S = 3600.0
_AGAIN_S = 60.0  # after the disk refused


def default_spool() -> Path:
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "murmuration" / "webhooks"


@dataclass(frozen=True, slots=True)
class WebhookSettings:
    """What an operator sets."""

    # Who may be called besides public hosts over https: a host name, a network ("10.0.0.0/8"), or an origin
    # ("http://127.0.0.1:9000": that scheme, host and port, so also plain http).
    allow: tuple[str, ...] = ()
    spool: Path = field(default_factory=default_spool)  # made 0700, files 0600; one process owns it
    spool_mb: int = 2048  # of everything in it
    # "whsec_" + base64, as Standard Webhooks writes a key, or a text whose UTF-8 bytes are the key.
    secret: str | None = field(default=None, repr=False)
    max_attempts: int = 8  # to deliver one answer, spread over some five hours
    max_jobs: int = 10_000  # in the spool


class Webhooks:
    """All of it: `start`, then `check` and `accept` what callers ask for, then `close`."""

    def __init__(
        self,
        settings: WebhookSettings,
        answer: Answer,
        failed: Failed,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
        resolve: Resolve | None = None,
    ) -> None:
        """Raises `ConfigError` for settings that do not hold."""
        self._settings, self._answer_to, self._failed = settings, answer, failed
        self._clock, self._sleep = clock, sleep
        self._rules = Rules.parse(settings.allow)
        self._key = signing_key(settings.secret)
        self._tls = ssl.create_default_context()
        self._dns = Dns()
        self._resolve: Resolve = resolve or self._dns
        self._spool = Spool(settings.spool, settings.spool_mb << 20)
        # Not the loop's own threads: those may all wait for something slower, and `close` must see these end.
        self._disk_threads = ThreadPoolExecutor(4, thread_name_prefix="spool")
        self._jobs: dict[str, Job] = {}
        self._seq = 0
        self._tasks: set[asyncio.Task[None]] = set()  # one a job, and one for each that is being accepted
        self._accepting: set[asyncio.Task[None]] = set()
        self._at_work: set[asyncio.Task[Any]] = set()  # those of `_tasks` that are in the middle of something
        self._answering = asyncio.Semaphore(ANSWERS)
        self._delivering = asyncio.Semaphore(DELIVERIES)
        self._hosts: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._letters: deque[dict[str, Any]] = deque()
        self._seen: Counter[str] = Counter()
        self._open = False

    async def start(self) -> None:
        """Go on with what an earlier process left. Raises `SpoolHeldError` where a live one has the spool."""
        jobs, letters = await self._disk(self._spool.open)
        await self._keep(letters)
        self._open = True
        self._seq = max((job.seq for job in jobs), default=0)
        for job in jobs:
            self._begin(job)
        if jobs:
            log.info("%d webhooks of an earlier process go on", len(jobs))

    async def check(self, url: str) -> None:
        """Raise `WebhookRefusedError` where `url` may not be called. A name that has no address now may get one."""
        target = self._rules.target(url)
        if target.address is not None or self._rules.trusts(target):
            return
        try:
            addresses = await asyncio.wait_for(self._resolve(target.host), CHECK_DNS_S)
        except (OSError, TimeoutError):
            return
        self._rules.check(target, addresses)

    async def accept(self, request_id: str, url: str, order: Mapping[str, Any], audio: Path) -> None:
        """Promise an answer to `url`: when this returns, request and audio (which is moved) survive anything.

        Raises `SpoolFullError`, and `WebhookRefusedError` for a URL that `check` would refuse by its form. A caller
        that is cancelled meanwhile leaves a job that is whole, or none.
        """
        host = self._rules.target(url).host
        if not self._open:
            raise SpoolFullError("webhooks are stopped")
        if len(self._jobs) + len(self._accepting) >= self._settings.max_jobs:
            raise SpoolFullError("too many webhooks are waiting")
        self._seq += 1
        job = Job(request_id, self._seq, url, host)
        task = asyncio.create_task(self._accept(job, order, audio))
        self._accepting.add(task)
        task.add_done_callback(self._accepted)
        await asyncio.shield(task)

    async def close(self, within_s: float) -> None:
        """Stop: what is in the middle of an answer or a delivery has `within_s` to end; the rest stays in the spool."""
        self._open = False
        if self._accepting:
            await asyncio.wait(self._accepting)
        for task in self._tasks - self._at_work:
            task.cancel()
        if busy := self._tasks & self._at_work:
            await asyncio.wait(busy, timeout=within_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._dns.close()
        await asyncio.to_thread(self._disk_threads.shutdown)
        self._spool.close()

    def counts(self) -> dict[str, int]:
        """`pending` (no answer yet) and `undelivered` (answered) as they are now; the others since this began."""
        undelivered = sum(job.answered for job in self._jobs.values())
        counts = {"pending": len(self._jobs) - undelivered, "undelivered": undelivered}
        return counts | {name: self._seen[name] for name in ("delivered", "dead", "attempts")}

    def dead_letters(self) -> list[dict[str, Any]]:
        """What was given up, oldest first: request_id, host, reason, attempts, when (seconds since 1970)."""
        return [dict(letter) for letter in self._letters]

    async def _accept(self, job: Job, order: Mapping[str, Any], audio: Path) -> None:
        await self._disk(self._spool.accept, job, order, audio)
        if self._open:
            self._begin(job)

    def _accepted(self, task: asyncio.Task[None]) -> None:
        self._accepting.discard(task)
        if not task.cancelled():
            task.exception()  # its caller, if it is still there, has it

    def _begin(self, job: Job) -> None:
        self._jobs[job.id] = job
        task = asyncio.create_task(self._live(job), name=f"webhook {job.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _live(self, job: Job) -> None:
        """A job, from wherever it is to its end."""
        while self._open and job.id in self._jobs:
            try:
                await self._until(job.due)
                await (self._deliver(job) if job.answered else self._answer(job))
            except FileNotFoundError:
                log.error("webhook %s: given up: its files are gone from the spool", job.id)
                await self._disk(self._spool.remove, job.id)
                self._seen["dead"] += 1
                del self._jobs[job.id]
            except Exception as error:  # of the disk, most likely: nothing is given up for that
                log.error("webhook %s: goes on in a minute", job.id, exc_info=error)
                job.due = self._clock() + _AGAIN_S

    async def _until(self, due: float) -> None:
        """Sleep. A clock that was set back meanwhile costs no more than the longest gap."""
        wait = min(due - self._clock(), max(MOST_RETRY_AFTER_S, GAPS_S[-1] * (1 + JITTER)))
        if wait > 0:
            await self._sleep(wait)

    async def _answer(self, job: Job) -> None:
        """One try at an answer."""
        async with self._answering:
            with self._working():
                if job.tries >= MOST_TRIES:
                    why = f"given up after {job.tries} tries: {job.reason or 'interrupted'}"
                    body = encode(self._failed(job.id, why))
                else:
                    job.tries += 1  # noted before: what takes this process down must not do so for ever
                    await self._disk(self._spool.note, job)
                    try:
                        body = encode(await self._ask(job))
                    except asyncio.CancelledError:
                        job.tries -= 1  # stopped in good order
                        await self._disk(self._spool.note, job)
                        raise
                    except Exception as error:
                        log.warning("webhook %s: no answer at try %d: %s", job.id, job.tries, type(error).__name__)
                        job.reason, job.due = type(error).__name__, self._clock() + gap_s(TRY_GAPS_S, job.tries)
                        await self._disk(self._spool.note, job)
                        return
                await self._disk(self._spool.answer, job, body)
                job.answered, job.due, job.reason = True, 0.0, ""

    async def _ask(self, job: Job) -> dict[str, Any]:
        """The answer, from a task of its own: a call that an engine cancels as it goes down must not look like us."""
        order, audio = await self._disk(self._spool.order, job)
        asked = asyncio.ensure_future(self._answer_to(job.id, order, audio))
        try:
            await asyncio.wait({asked})
        finally:
            if not asked.done():
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)
        if asked.cancelled():
            raise RuntimeError("the call was cancelled")
        return asked.result()

    async def _deliver(self, job: Job) -> None:
        """One attempt to deliver the answer."""
        async with self._place(job.host), self._delivering:
            with self._working():
                if job.attempts >= self._settings.max_attempts:  # killed as the last one was made
                    await self._bury(job, job.reason or "interrupted")
                    return
                body = await self._disk(self._spool.body, job)
                job.attempts += 1
                self._seen["attempts"] += 1
                await self._disk(self._spool.note, job)
                outcome = await self._post(job, body)
                if outcome.delivered:
                    await self._disk(self._spool.remove, job.id)
                    self._seen["delivered"] += 1
                    del self._jobs[job.id]
                elif outcome.final or job.attempts >= self._settings.max_attempts:
                    await self._bury(job, outcome.reason)
                else:
                    log.info("webhook %s to %s, attempt %d: %s", job.id, job.host, job.attempts, outcome.reason)
                    wait = max(gap_s(GAPS_S, job.attempts), outcome.retry_after_s)
                    job.reason, job.due = outcome.reason, self._clock() + wait
                    await self._disk(self._spool.note, job)

    async def _post(self, job: Job, body: bytes) -> Outcome:
        """Post it, to a checked address and nowhere else: no redirect, no proxy, no cookie."""
        try:
            target = self._rules.target(job.url)
            connector = aiohttp.TCPConnector(
                resolver=CheckedResolver(self._rules, target, self._resolve),
                ssl=self._tls,
                use_dns_cache=False,
                force_close=True,
            )
            async with (
                aiohttp.ClientSession(
                    connector=connector,
                    timeout=aiohttp.ClientTimeout(total=TOTAL_S, connect=CONNECT_S),
                    cookie_jar=aiohttp.DummyCookieJar(),
                    skip_auto_headers=["Accept-Encoding"],
                    trust_env=False,
                ) as session,
                session.post(
                    target.url, data=body, headers=self._headers(job.id, body), allow_redirects=False
                ) as response,
            ):
                return outcome_of(response.status, response.headers.get("Retry-After"), self._clock())  # body unread
        except (aiohttp.ClientError, WebhookRefusedError, OSError) as error:
            return Outcome(reason=reason_of(error))

    def _headers(self, request_id: str, body: bytes) -> dict[str, str]:
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "Murmuration",
            "webhook-id": request_id,
            "webhook-timestamp": str(int(self._clock())),
        }
        if self._key:
            headers["webhook-signature"] = signature(self._key, request_id, headers["webhook-timestamp"], body)
        return headers

    async def _bury(self, job: Job, reason: str) -> None:
        letter = {"request_id": job.id, "host": job.host, "reason": reason, "attempts": job.attempts}
        letter["when"] = self._clock()
        await self._disk(self._spool.bury, letter)
        log.warning("webhook %s to %s given up after %d attempts: %s", job.id, job.host, job.attempts, reason)
        await self._keep([letter])
        self._seen["dead"] += 1
        del self._jobs[job.id]

    async def _keep(self, letters: list[dict[str, Any]]) -> None:
        self._letters.extend(letters)
        while len(self._letters) > MOST_DEAD:
            await self._disk(self._spool.forget, self._letters.popleft()["request_id"])

    def _place(self, host: str) -> asyncio.Semaphore:
        """What the deliveries to one host share; gone when none holds it. Waited for before a place among all."""
        place = self._hosts.get(host)
        if place is None:
            self._hosts[host] = place = asyncio.Semaphore(DELIVERIES_A_HOST)
        return place

    @contextmanager
    def _working(self) -> Iterator[None]:
        """In the body the task is in the middle of something, and `close` lets it end."""
        task = asyncio.current_task()
        assert task is not None
        self._at_work.add(task)
        try:
            yield
        finally:
            self._at_work.discard(task)

    async def _disk(self, do: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._disk_threads, lambda: do(*args, **kwargs))


def encode(body: dict[str, Any]) -> bytes:
    return json.dumps(body, allow_nan=False).encode()


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one attempt."""

    delivered: bool = False
    final: bool = False  # the receiver wants no other
    reason: str = ""
    retry_after_s: float = 0.0


def outcome_of(status: int, retry_after: str | None, now: float) -> Outcome:
    if 200 <= status < 300:
        return Outcome(delivered=True)
    if status == 410:
        return Outcome(final=True, reason="gone")
    return Outcome(reason=f"status {status}", retry_after_s=seconds_of(retry_after, now))


def seconds_of(retry_after: str | None, now: float) -> float:
    """What a `Retry-After` asks for, in seconds or as a date, up to the cap; 0 for nonsense."""
    text = (retry_after or "").strip()
    try:
        if text.isascii() and text.isdigit():
            asked = float(text)
        else:
            at = parsedate_to_datetime(text)
            asked = at.replace(tzinfo=at.tzinfo or UTC).timestamp() - now
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(asked, 0.0), MOST_RETRY_AFTER_S)


def reason_of(error: BaseException) -> str:
    """Why an attempt failed, for the operator: never a path, a query or an address."""
    if isinstance(error, WebhookRefusedError):
        return f"address not allowed: {error}"
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, aiohttp.ClientSSLError):
        return "TLS failed: " + type(error).__name__
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "its name has no address"
    if isinstance(error, aiohttp.ClientConnectorError):
        code = error.os_error.errno  # its own text names the address
        return f"cannot connect: {os.strerror(code) if code else type(error.os_error).__name__}"
    return "connection broken: " + type(error).__name__


def gap_s(gaps: tuple[float, ...], failures: int) -> float:
    return gaps[min(failures, len(gaps)) - 1] * (1 + JITTER * random.random())


def signing_key(secret: str | None) -> bytes | None:
    """The bytes that sign. Raises `ConfigError` for a secret that holds none."""
    if secret is None:
        return None
    encoded = secret.removeprefix("whsec_")
    try:
        padded = encoded + "=" * (-len(encoded) % 4)  # some write it without
        key = secret.encode() if encoded == secret else base64.b64decode(padded, validate=True)
    except ValueError:
        raise ConfigError("the webhook secret begins with whsec_, and what follows is not base64") from None
    if not key:
        raise ConfigError("the webhook secret is empty")
    return key


def signature(key: bytes, request_id: str, timestamp: str, body: bytes) -> str:
    """Standard Webhooks, version 1: over the id, the second and the very bytes that are sent."""
    signed = f"{request_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
