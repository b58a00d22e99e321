"""`murmur bench http URL`: a running server under load, as its clients see it.

So many clients, each with one request after the other, for so many seconds: `POST /v1/audio/transcriptions` with files
chosen at random (the demo's clips, or yours). Counted: answers by status, seconds of audio transcribed a second, how
long an answer took, and a refusal. Who is refused waits as `Retry-After` says, as a well-behaved client does. The
clients run here: on the server's own machine they take processor time from it, which is told too. Knows HTTP, and
nothing of the server's inside.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from pipeline.bench.rounds import Figures
from pipeline.errors import UsageError
from pipeline.machine import machine

ROUTE = "/v1/audio/transcriptions"
REFUSED = (429, 503)
_MOST_WAIT_S = 5.0  # of a Retry-After, or a short measurement would be spent waiting
_REQUEST_S = 3600.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of whom. Raises `UsageError` for what cannot be."""

    url: str
    files: tuple[str, ...]
    model: str | None = None  # None: the first that the server lists
    clients: int = 8
    seconds: float = 60.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UsageError(f"URL {self.url!r}: http:// or https:// was expected, as `murmur serve` prints it")
        if self.clients < 1 or self.seconds <= 0:
            raise UsageError("--clients begins at 1, --seconds above 0")
        missing = next((name for name in self.files if not Path(name).is_file()), None)
        if missing is not None:
            raise UsageError(f"{missing}: there is no such file")
        if not self.files:
            raise UsageError("no audio to send")


@dataclass(slots=True)
class _Seen:
    """What the clients have seen, all together."""

    answers: Counter[str] = field(default_factory=Counter)  # by status; lost: no answer at all
    took_s: list[float] = field(default_factory=list)  # of those that were served
    refused_s: list[float] = field(default_factory=list)
    audio_s: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)  # what others said


async def bench_http(plan: Plan, say: Callable[[str], None] = lambda line: None) -> Figures:
    """As plain JSON. Tokens: the first of MURMUR_API_TOKENS. Raises `UsageError` where nobody answers, or not to us."""
    bodies = [Path(name).read_bytes() for name in plan.files]
    token = os.environ.get("MURMUR_API_TOKENS", "").split(",")[0].strip()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=_REQUEST_S)
    async with aiohttp.ClientSession(plan.url, connector=connector, timeout=timeout, headers=headers) as session:
        model = plan.model or await _first_model(session, plan.url)
        say(f"{plan.clients} clients for {plan.seconds:g} s at {plan.url}, model {model}")
        seen, began, cpu = _Seen(), time.monotonic(), time.process_time()
        end = began + plan.seconds
        await asyncio.gather(*(_client(session, model, bodies, seen, seed, end) for seed in range(plan.clients)))
        wall_s, cpu_s = time.monotonic() - began, time.process_time() - cpu
    return {
        "benchmark": "http",
        "plan": asdict(plan) | {"model": model, "files": len(plan.files)},
        "wall_s": round(wall_s, 2),
        "answers": dict(seen.answers),
        "errors": dict(seen.errors.most_common(5)),
        "rtfx": round(seen.audio_s / wall_s, 2),
        "answers_per_s": round(len(seen.took_s) / wall_s, 2),
        "answer_s": _spread(seen.took_s),
        "refusal_s": _spread(seen.refused_s),
        "cores_of_the_clients": round(cpu_s / wall_s, 2),
        "machine": machine(),
    }


async def _first_model(session: aiohttp.ClientSession, url: str) -> str:
    try:
        async with session.get("/v1/models") as response:
            if response.status != 200:
                raise UsageError(f"{url}/v1/models: {response.status} {(await response.text())[:200]}")
            found: str = (await response.json())["data"][0]["id"]
            return found
    except (aiohttp.ClientError, TimeoutError) as error:
        raise UsageError(f"{url}: no server answers there ({error})") from None
    except (KeyError, IndexError, ValueError):
        raise UsageError(f"{url}/v1/models lists no model: is it a server of ours, or OpenAI's?") from None


async def _client(
    session: aiohttp.ClientSession, model: str, bodies: Sequence[bytes], seen: _Seen, seed: int, end: float
) -> None:
    choice = random.Random(seed)
    while time.monotonic() < end:
        form = aiohttp.FormData({"model": model, "response_format": "verbose_json"})
        form.add_field("file", choice.choice(bodies), filename="audio")
        began = time.monotonic()
        try:
            async with session.post(ROUTE, data=form) as response:
                answer = await response.json(content_type=None)
                took_s, status = time.monotonic() - began, response.status
                wait = response.headers.get("Retry-After", "1")
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            seen.answers["lost"] += 1
            seen.errors[f"{type(error).__name__}: {error}"[:200]] += 1
            await asyncio.sleep(1.0)  # a server that is gone is not to be hammered
            continue
        seen.answers[str(status)] += 1
        if status == 200:
            seen.took_s.append(took_s)
            seen.audio_s += float(answer["duration"])
        elif status in REFUSED:
            seen.refused_s.append(took_s)
            wait_s = float(wait) if wait.isdigit() else 1.0
            await asyncio.sleep(max(0.0, min(wait_s, _MOST_WAIT_S, end - time.monotonic())))
        else:
            seen.errors[_said(answer)[:200]] += 1
            await asyncio.sleep(0.1)


def _said(answer: Any) -> str:
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    median, p95 = np.percentile(values, [50, 95])
    return {"median": round(float(median), 3), "p95": round(float(p95), 3), "longest": round(max(values), 3)}
