"""The server among clients that mean harm: every answer proper, nothing read or dialled for them, nothing left behind.

    python -m tests.benchmarks.http_hostile [--requests 1500] [--leaves 300] [--seconds 45] [--out FILE]

`murmur serve` with the fake engine, on this machine. Request number n is the same in every run.

    requests   forms, JSON, data URLs, sound files and HTTP itself, made wrong in every way there is
               (`hostile_requests.py`), eight at once; files, playlists and URLs name a file and a port of this script
    sweep      what schemathesis makes of the description, allowed and forbidden
    leaves     clients that go away at any moment of a request, with and without a word
    endless    50 clients whose bodies do not end, half of them forms, half JSON: memory of each process (USS)
    slow       100 bodies of a byte a second, 1,000 connections without a word, 200 with half a head

After each part: every gauge at zero, as many processes, descriptors and files as before, ready, and a plain request
answered as before. Prints one JSON object on the last line; ends with 1 where something did not hold.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import random
import re
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import requests
from schemathesis import GenerationMode

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from openapi_sweep import sweep  # noqa: E402
from serving import Served, serving  # noqa: E402

from pipeline.demo import clips_path  # noqa: E402
from pipeline.machine import usable_cores  # noqa: E402
from serve_app.connection import HEAD_S  # noqa: E402
from serve_app.limits import READ_S  # noqa: E402
from tests.benchmarks.hostile_requests import KINDS, NATIVE, OPENAI, Bait, Request, Sounds, part  # noqa: E402
from tests.benchmarks.hostile_requests import http as whole  # noqa: E402
from tests.benchmarks.machine import machine  # noqa: E402

FAKE = ("--set", "engine=fake", "--set", "fake.faults=[{kind: hang, text: '0.05'}]")
SHARES = {"multipart": 6, "field": 3, "json": 5, "data_url": 2, "bare": 6, "path": 4, "sound": 7, "lure": 4}
MAX_GROWTH_MB = 200
ANSWER_S = 120.0  # in which everything is answered, or ended
KEPT_S = 3.0  # a connection that is kept after its answer is not waited for
SECRET = "canary-7f3a91"  # in the file that is named to the server
TELLING = re.compile(  # of this machine or of this code
    rb"Traceback|File \"|site-packages|\.py\b|/tmp/|/usr/|/home/|/root/|/proc/|[A-Za-z]+Error\b|0x[0-9a-f]{8,}|"
    + SECRET.encode()
)
BAIT_ROOT = "/dev/shm" if Path("/dev/shm").is_dir() else None  # apart from /tmp: what a request names may be named back


@contextmanager
def private_temp() -> Iterator[None]:
    """What the server leaves in the folder for temporary files is its own, whatever else runs on the machine."""
    before = os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(prefix="hostile-", ignore_cleanup_errors=True) as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = None
            os.environ.pop("TMPDIR")
            if before is not None:
                os.environ["TMPDIR"] = before


class Target:
    """A running server, seen from outside."""

    def __init__(self, served: Served) -> None:
        self.served, self.url = served, served.url
        parts = urlsplit(served.url)
        self.address = parts.hostname or "", parts.port or 0
        self.front = served.processes()["front"][0]
        self.clip = (clips_path() / "en-one.wav").read_bytes()
        self.plain()
        self.known = self.plain()
        self.before = self.state()

    def connect(self, timeout: float = ANSWER_S) -> socket.socket:
        return socket.create_connection(self.address, timeout=timeout)

    def plain(self) -> tuple[int, str]:
        response = requests.post(f"{self.url}{NATIVE}", files={"audio": self.clip}, timeout=ANSWER_S)
        return response.status_code, response.json().get("text", "")

    def gauges(self) -> dict[str, float]:
        page = requests.get(f"{self.url}/metrics", timeout=ANSWER_S).text
        found = re.findall(r"^(murmur_http_(?:windows|in_flight|webhooks)\S*) (\S+)$", page, re.MULTILINE)
        gauges = {name: float(value) for name, value in found}
        gauges["murmur_http_in_flight"] -= 1  # the one that asks
        return gauges

    def state(self) -> dict[str, int]:
        kinds = self.served.processes()
        return {
            "processes": sum(len(found) for kind, found in kinds.items() if kind not in ("decoder", "ended")),
            "decoders": len(kinds.get("decoder", [])),
            "threads": self.front.num_threads(),
            "descriptors": self.front.num_fds(),
            "files": sum(len(list(folder.iterdir())) for folder in self.uploads()),
        }

    @staticmethod
    def uploads() -> list[Path]:
        return list(Path(tempfile.gettempdir()).glob("murmur-uploads-*"))

    def problems(self) -> list[str]:
        """What is not as it was before, when a while has passed."""
        assert self.uploads()
        found: list[str] = []
        for _ in range(60):
            found = [f"{name} is {value:g}" for name, value in self.gauges().items() if value]
            now, before = self.state(), self.before
            for name, more in (
                ("processes", 0),
                ("files", 0),
                ("descriptors", 4 * usable_cores() + 8),
                ("threads", 40),
            ):
                if now[name] > before[name] + more:
                    found.append(f"{now[name]} {name}, before {before[name]}")
            if now["decoders"] > max(before["decoders"], usable_cores()):
                found.append(f"{now['decoders']} decoders")
            if not found:
                break
            time.sleep(1)
        if (ready := requests.get(f"{self.url}/readyz", timeout=ANSWER_S)).status_code != 200:
            found.append(f"not ready: {ready.text}")
        if (now_said := self.plain()) != self.known:
            found.append(f"a plain request: {now_said}")
        return found


# ---- one request after the other


def exchange(target: Target, data: bytes, is_kept: bool = False) -> bytes:
    """All that is answered to these bytes; `is_kept`: or as much as comes before it goes quiet."""
    parts: list[bytes] = []
    with target.connect() as connection:
        with suppress(OSError):  # refused before all of it was sent
            connection.sendall(data)
            if b"\r\n\r\n" not in data:
                connection.shutdown(socket.SHUT_WR)  # or the server waits for the rest, as it must
        try:
            while block := connection.recv(1 << 16):
                parts.append(block)
                if is_kept:
                    connection.settimeout(KEPT_S)
        except ConnectionError:
            pass
        except TimeoutError:
            if not parts:
                raise
    return b"".join(parts)


class _Said:
    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def makefile(self, *_: Any) -> io.BytesIO:
        return self._file


def judge(request: Request, said: bytes) -> tuple[str, str]:
    """(status, what is wrong with the answer, or nothing)."""
    if found := TELLING.search(said):
        return "?", f"tells {said[max(0, found.start() - 60) : found.end() + 60]!r}"
    if not said:
        return "closed", "no answer" if request.is_http else ""
    response = http.client.HTTPResponse(_Said(said), method="POST" if request.has_body else "HEAD")  # type: ignore[arg-type]
    try:
        response.begin()
        body = response.read()
    except http.client.HTTPException as error:
        return "?", f"no HTTP: {error!r} {said[:200]!r}"
    status, kind = response.status, response.headers.get("Content-Type", "")
    if status >= 500 and status != 503:
        return str(status), f"{said[:300]!r}"
    if status == 503 and not response.headers.get("Retry-After"):
        return str(status), "no Retry-After"
    if status == 200 and not request.speaks:
        return str(status), f"a transcript of what is named: {said[-300:]!r}"
    if status >= 400 and request.has_body:
        if not kind.startswith("application/json"):
            return str(status), f"an error in {kind!r}"
        try:
            json.loads(body)
        except ValueError:
            return str(status), f"no JSON: {body[:200]!r}"
    return str(status), ""


@contextmanager
def bait(folder: Path) -> Iterator[tuple[Bait, list[str]]]:
    """A file and a port that nobody is to touch, and who did."""
    file, dialled = folder / "canary.txt", list[str]()
    file.write_text(f"{SECRET}\n" * 50)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def listen() -> None:
            with suppress(OSError):
                while True:
                    connection, address = listening.accept()
                    dialled.append(str(address))
                    connection.close()

        threading.Thread(target=listen, daemon=True).start()
        yield Bait(file, listening.getsockname()[1]), dialled
        listening.shutdown(socket.SHUT_RDWR)


def requests_part(target: Target, n_requests: int) -> dict[str, Any]:
    wanted = [kind for kind, share in SHARES.items() for _ in range(share)]
    with tempfile.TemporaryDirectory(dir=BAIT_ROOT) as name, bait(Path(name)) as (canary, dialled):
        sounds = Sounds(Path(name))
        small = sounds.originals["mp3"]

        def make(number: int) -> Request:
            draw = np.random.default_rng([7, number])
            kind = wanted[number % len(wanted)]
            if kind == "sound":
                return sounds.mutated(number, draw)
            return sounds.luring(draw, canary) if kind == "lure" else KINDS[kind](draw, small, canary)

        def ask(number: int) -> tuple[str, str, str, float]:
            request, began = make(number), time.monotonic()
            try:
                status, wrong = judge(request, exchange(target, request.data, not request.is_http))
            except TimeoutError:
                status, wrong = "?", "neither an answer nor an end"
            where = f"{request.kind} {request.number}, request {number}: {wrong}" if wrong else ""
            return request.kind, status, where, time.monotonic() - began

        with ThreadPoolExecutor(8) as pool:
            asked = list(pool.map(ask, range(n_requests)))
    wrong = [where for _, _, where, _ in asked if where]
    return {
        "sent": len(asked),
        "answers": {
            kind: dict(Counter(status for one, status, _, _ in asked if one == kind).most_common())
            for kind in sorted({one for one, *_ in asked})
        },
        "slowest_s": round(max(took for *_, took in asked), 1),
        "dialled": dialled,
        "wrong": wrong[:50] + ([f"it was dialled {len(dialled)} times"] if dialled else []) + target.problems(),
    }


def sweep_part(target: Target, n_examples: int) -> dict[str, Any]:
    wrong: list[str] = []
    n_operations = 0
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        try:
            n_operations = sweep(target.url, mode, n_examples)
        except (Exception, BaseExceptionGroup) as error:
            wrong += [f"{mode.value}: {one}"[:1500] for one in getattr(error, "exceptions", [error])]
    return {"operations": n_operations, "examples_each": 2 * n_examples, "wrong": wrong + target.problems()}


def leaves_part(target: Target, n_leaves: int) -> dict[str, Any]:
    """Requests of all kinds, of which any first part is sent, and at any moment nobody is there any more."""
    audio = target.clip
    form = part(b"audio", audio, b'; filename="a"') + b"--b--\r\n"
    stream = part(b"file", audio, b'; filename="a"') + part(b"stream", b"true") + b"--b--\r\n"
    js = json.dumps({"audio": "data:;base64," + "A" * 400_000}).encode()
    kinds = [
        whole(NATIVE, form, "multipart/form-data; boundary=b"),
        whole(OPENAI, stream, "multipart/form-data; boundary=b"),
        whole(NATIVE, js, "application/json"),
        whole(NATIVE, form, "multipart/form-data; boundary=b").replace(b"Connection: close\r\n", b"") * 2,
    ]

    def leave(number: int) -> None:
        draw = random.Random(number)
        data = draw.choice(kinds)
        cut = draw.choice([len(data), len(data), draw.randrange(len(data))])
        with suppress(OSError), target.connect() as connection:
            connection.sendall(data[:cut])
            time.sleep(draw.choice([0, 0.01, 0.05, 0.1, 0.2]) * draw.random())
            if draw.random() < 0.5:  # a reset instead of an end
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(leave, range(n_leaves)))
    return {"left": n_leaves, "wrong": target.problems()}


# ---- many at once


def uss_mb(target: Target) -> dict[str, float]:
    found: dict[str, float] = {}
    for kind, processes in target.served.processes().items():
        for process in processes:
            with suppress(psutil.Error):
                found[f"{kind} {process.pid}"] = process.memory_full_info().uss / (1 << 20)
    return found


class Growth:
    """How much each process has grown at most since this was made; one that is new has grown from nothing."""

    def __init__(self, target: Target) -> None:
        self._target, self._before = target, uss_mb(target)
        self.by_kind: dict[str, float] = {}

    def look(self) -> None:
        for name, mb in uss_mb(self._target).items():
            kind = name.split()[0]
            if kind != "decoder" and name in self._before:
                self.by_kind[kind] = max(self.by_kind.get(kind, 0.0), mb - self._before[name])


def endless_part(target: Target, seconds_: float) -> dict[str, Any]:
    forms = [
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="audio"; filename="a"\r\n\r\n',
        ),
        ("application/json", b'{"audio": "data:;base64,'),
    ]
    growth, end = Growth(target), time.monotonic() + seconds_
    sent, answers = [0] * 50, Counter[str]()

    def client(number: int) -> None:
        kind, begin = forms[number % 2]
        block = b"10000\r\n" + b"A" * 0x10000 + b"\r\n"
        while time.monotonic() < end:
            head = f"POST {NATIVE} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n"
            with target.connect() as connection:
                with suppress(ConnectionError):
                    connection.sendall(head.encode() + b"%x\r\n%s\r\n" % (len(begin), begin))
                    while time.monotonic() < end:
                        connection.sendall(block)
                        sent[number] += len(block)
                with suppress(ConnectionError):
                    said = connection.recv(12) if time.monotonic() < end else b""
                    answers[said[9:12].decode() or "closed"] += 1

    latency: list[float] = []
    with ThreadPoolExecutor(50) as pool:
        clients = [pool.submit(client, number) for number in range(50)]
        while time.monotonic() < end:
            began = time.monotonic()
            assert requests.get(f"{target.url}/healthz", timeout=ANSWER_S).status_code == 200
            latency.append(time.monotonic() - began)
            growth.look()
            time.sleep(0.3)
        for one in clients:
            one.result()
    wrong = [f"{kind} grew by {mb:.0f} MB" for kind, mb in growth.by_kind.items() if mb >= MAX_GROWTH_MB]
    return {
        "clients": 50,
        "seconds": seconds_,
        "sent_mb": sum(sent) >> 20,
        "answers": dict(answers),
        "growth_mb": {kind: round(mb, 1) for kind, mb in sorted(growth.by_kind.items())},
        "healthz_s": {"median": round(float(np.median(latency)), 3), "longest": round(max(latency), 2)},
        "wrong": wrong + target.problems(),
    }


def slow_part(target: Target) -> dict[str, Any]:
    """Who says little, half or nothing: each is ended, the slow by an answer; the others are served meanwhile."""
    head = f"POST {NATIVE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n{{"
    growth, began = Growth(target), time.monotonic()
    slow = [_begun(target, head.encode()) for _ in range(100)]
    halves = [_begun(target, b"GET /healthz HTTP/1.1\r\nX: ") for _ in range(200)]
    idle = [_begun(target, b"") for _ in range(1000)]
    ends: dict[str, list[float]] = {"slow": [], "halves": [], "idle": []}
    statuses = Counter[str]()
    latency, wrong = list[float](), list[str]()
    left = {"slow": slow, "halves": halves, "idle": idle}
    last_plain = 0.0
    while any(left.values()) and time.monotonic() - began < max(HEAD_S, READ_S) + 60:
        for name in ("slow", "halves"):
            for one in left[name]:
                with suppress(OSError):
                    one.send(b" ")
        for name, sockets in left.items():
            for one in list(sockets):
                ended, status = _ended(one)
                if ended:
                    sockets.remove(one)
                    one.close()
                    ends[name].append(time.monotonic() - began)
                    statuses[f"{name} {status}"] += 1
        asked = time.monotonic()
        if requests.get(f"{target.url}/healthz", timeout=ANSWER_S).status_code != 200:
            wrong.append("health does not answer 200")
        latency.append(time.monotonic() - asked)
        if asked - last_plain > 5:
            last_plain = asked
            if target.plain() != target.known:
                wrong.append("a plain request is not answered as before")
            growth.look()
        time.sleep(max(0.0, 1 - (time.monotonic() - asked)))
    wrong += [f"{len(sockets)} {name} connections do not end" for name, sockets in left.items() if sockets]
    wrong += [f"{kind} grew by {mb:.0f} MB" for kind, mb in growth.by_kind.items() if mb >= MAX_GROWTH_MB]
    return {
        "ended_after_s": {name: [round(min(at), 1), round(max(at), 1)] for name, at in ends.items() if at},
        "how": dict(statuses),
        "growth_mb": {kind: round(mb, 1) for kind, mb in sorted(growth.by_kind.items())},
        "healthz_s": {"median": round(float(np.median(latency)), 3), "longest": round(max(latency), 2)},
        "wrong": wrong + target.problems(),
    }


def _begun(target: Target, data: bytes) -> socket.socket:
    connection = target.connect()
    connection.sendall(data)
    connection.setblocking(False)
    return connection


def _ended(connection: socket.socket) -> tuple[bool, str]:
    try:
        said = connection.recv(65536)
    except BlockingIOError:
        return False, ""
    except OSError:
        return True, "closed"
    return True, said[9:12].decode() or "closed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--examples", type=int, default=40)
    parser.add_argument("--leaves", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=45.0)
    parser.add_argument("--parts", default="requests,sweep,leaves,endless,slow")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    parts: dict[str, Callable[[Target], dict[str, Any]]] = {
        "requests": lambda target: requests_part(target, arguments.requests),
        "sweep": lambda target: sweep_part(target, arguments.examples),
        "leaves": lambda target: leaves_part(target, arguments.leaves),
        "endless": lambda target: endless_part(target, arguments.seconds),
        "slow": slow_part,
    }
    result: dict[str, Any] = {"benchmark": "http_hostile"}
    with private_temp(), serving(*FAKE) as served:
        target = Target(served)
        for name in arguments.parts.split(","):
            began = time.monotonic()
            result[name] = parts[name](target)
            result[name]["wall_s"] = round(time.monotonic() - began, 1)
            print(name, json.dumps(result[name]), file=sys.stderr)
        said = [line for line in served.lines if "Traceback" in line or "ERROR" in line]
        result["complaints_in_the_log"] = said[:20]
    result["within"] = not any(result[name]["wrong"] for name in arguments.parts.split(",")) and not said
    result["machine"] = machine()
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0 if result["within"] else 1


if __name__ == "__main__":
    sys.exit(main())
