"""The server under load: every answer right, how much of the engine's speed is left, and what those too many see.

    python -m tests.benchmarks.http_load [--minutes 5] [--clients 32] [--engines 2,1] [--long-hours 3.9] [--out FILE]

`murmur serve` with the demo model in float32, on this machine, with its clients beside it.

    engine     the clips' Units through the engine alone, read beforehand: audio seconds a second
    load       so many clients, each with one clip after the other, at random: text, words' times and tokens of every
               answer are compared with those of the clip asked for alone; with one engine, and with one a core
    too many   200 clients at once against room for 8 windows: served and refused, and how long a refusal takes; for
               200 threads of Python, and for one process of curl's
    fair       a clip of ten seconds while a request of `--long-hours` is in the engine, beside the same clip alone

Prints one JSON object on the last line; ends with 1 where an answer was wrong or failed, the load was carried at less
than 0.7 of the engine's speed, refusals took over 100 ms at the median, or the clip took longer than twice its time
alone and one window.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import wave
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import requests

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from audio_files import write_audio  # noqa: E402
from serving import Served, serving  # noqa: E402

from pipeline.config import load_config  # noqa: E402
from pipeline.demo import clips_path  # noqa: E402
from pipeline.engine import EngineConfig, load_engine  # noqa: E402
from pipeline.types import SAMPLE_RATE, Pcm, Recording, Unit, seconds  # noqa: E402
from pipeline.units import read_units  # noqa: E402
from tests.benchmarks.long_talk import talk  # noqa: E402
from tests.benchmarks.machine import machine  # noqa: E402

CLIPS = ("en-one.wav", "en-three.flac", "en-five.mp3", "de-two.flac", "de-four.webm", "de-phone.wav", "es-two.m4a",
         "es-three.wav", "es-five.ogg")  # fmt: skip
CROWDED = clips_path() / CLIPS[0]  # what a crowd asks for
FLOAT32 = ("--set", "dtype=float32")
SHARE, REFUSAL_MS = 0.7, 100.0


def engine_alone(rounds: int) -> float:
    """Audio seconds a second of the clips' Units, `rounds` times each."""
    config = load_config(overrides={"model": "demo"}, env={})
    units = [
        unit
        for name in CLIPS
        for unit in read_units(Recording(name, str(clips_path() / name)), config)
        if isinstance(unit, Unit)
    ]
    with load_engine(EngineConfig(model="demo", device="cpu", dtype="float32", threads=2)) as engine:
        list(engine.run(units, config.decode_options()))
        began = time.monotonic()
        list(engine.run(units * rounds, config.decode_options()))
        took_s = time.monotonic() - began
    return rounds * sum(seconds(unit.n_samples) for unit in units) / took_s


def ask(url: str, audio: bytes, session: requests.Session | None = None) -> requests.Response:
    data = {"response_format": "verbose_json"}
    return (session or requests).post(
        f"{url}/v1/audio/transcriptions", files={"file": ("a", audio)}, data=data, timeout=1200
    )


def said(answer: dict[str, Any]) -> Any:
    """What an answer must be equal in: figures' last bits depend on what else was in the batch."""
    segments = [(one["start"], one["end"], one["text"], one["tokens"]) for one in answer["segments"]]
    return answer["text"], answer["language"], answer["duration"], segments


def cpu_s(served: Served) -> dict[str, float]:
    """Processor seconds so far, by kind of process; `clients` is this one."""
    kinds = served.processes() | {"clients": [psutil.Process()]}
    return {kind: sum(sum(one.cpu_times()[:2]) for one in found) for kind, found in kinds.items() if kind != "ended"}


def load(minutes: float, clients: int, engines: int, alone_rtfx: float) -> dict[str, Any]:
    with serving(*FLOAT32, "--set", f"pool.engines={engines}") as served:
        audio = {name: (clips_path() / name).read_bytes() for name in CLIPS}
        known = {name: said(ask(served.url, data).json()) for name, data in audio.items()}
        counts: Counter[str] = Counter()
        took_s: list[float] = []
        end = time.monotonic() + 60 * minutes

        def client(seed: int) -> float:
            chosen, audio_s = random.Random(seed), 0.0
            with requests.Session() as session:
                while time.monotonic() < end:
                    name, began = chosen.choice(CLIPS), time.monotonic()
                    response = ask(served.url, audio[name], session)
                    took_s.append(time.monotonic() - began)
                    ok = response.status_code == 200
                    counts["wrong" if ok and said(response.json()) != known[name] else str(response.status_code)] += 1
                    audio_s += known[name][2] if ok else 0.0
            return audio_s

        before, began = cpu_s(served), time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            audio_s = sum(pool.map(client, range(clients)))
        wall_s, after = time.monotonic() - began, cpu_s(served)
    spent = {kind: after[kind] - before.get(kind, 0.0) for kind in after}
    return {
        "clients": clients,
        "engines": engines,
        "wall_s": round(wall_s, 1),
        "answers": dict(counts),
        "seconds_of_an_answer": {"median": round(statistics.median(took_s), 2), "longest": round(max(took_s), 2)},
        "rtfx": round(audio_s / wall_s, 2),
        "engine_alone_rtfx": round(alone_rtfx, 2),
        "share_of_the_engine": round(audio_s / wall_s / alone_rtfx, 3),
        "cores_in_use": round(sum(spent.values()) / wall_s, 2),
        "cpu_shares": {kind: round(value / sum(spent.values()), 3) for kind, value in sorted(spent.items())},
    }


def too_many(clients: int) -> dict[str, Any]:
    """The clients as threads of this process, and then as one of curl's: what Python's threads do for a request they
    do one after the other, on the cores that the server needs, and so it is in what they measure."""
    limits = ("--set", "limits.in_flight_windows=4", "--set", "limits.queued_windows=4")
    with serving(*FLOAT32, *limits) as served:
        ask(served.url, CROWDED.read_bytes())
        return {"sent": clients, **{one.__name__: crowd(served.url, one, clients) for one in (threads, curl)}}


def crowd(url: str, clients: Callable[[str, int], list[tuple[int, float]]], count: int) -> dict[str, Any]:
    """What so many see at once, five times over, and how the server is after each. `medians` are each time's own; the
    first crowd finds a server that has hardly been asked anything yet."""
    rounds: list[list[tuple[int, float]]] = []
    after: Counter[str] = Counter()
    for _ in range(5):
        time.sleep(1)
        rounds.append(clients(f"{url}/v1/audio/transcriptions", count))
        ready = requests.get(f"{url}/readyz", timeout=60).status_code
        after[f"{ready}, {ask(url, CROWDED.read_bytes()).status_code}"] += 1
    refused = [[1000 * took_s for status, took_s in answers if status == 503] for answers in rounds]
    every = [took_ms for one in refused for took_ms in one]
    return {
        "answers": dict(Counter(str(status) for answers in rounds for status, _ in answers)),
        "refusal_ms": {
            "median": round(statistics.median(every), 1),
            "longest": round(max(every), 1),
            "medians": [round(statistics.median(one), 1) for one in refused],
        },
        "ready_and_next_request": dict(after),
    }


def threads(url: str, count: int) -> list[tuple[int, float]]:
    """Status and seconds of each. Connected, and its body made, beforehand."""
    start = threading.Barrier(count)
    asked = requests.Request("POST", url, files={"file": ("a", CROWDED.read_bytes())}).prepare()

    def client(_: int) -> tuple[int, float]:
        with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)) as connection:
            connection.request("GET", "/healthz")
            connection.getresponse().read()
            start.wait()
            began = time.monotonic()
            connection.request("POST", asked.path_url, asked.body, dict(asked.headers))
            response = connection.getresponse()
            response.read()
            return response.status, time.monotonic() - began

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(client, range(count)))


def curl(url: str, count: int) -> list[tuple[int, float]]:
    """Status and seconds of each, from its own connection on until all of its answer is there."""
    one = f"""
url = "{url}"
form = "file=@{CROWDED}"
header = "Expect:"
output = "/dev/null"
write-out = "%{{http_code}} %{{time_pretransfer}} %{{time_total}}\\n"
"""
    command = ["curl", "--no-progress-meter", "--parallel", "--parallel-immediate", "--parallel-max", str(count),
               "--config", "-"]  # fmt: skip
    said = subprocess.run(command, input="next\n".join([one] * count), capture_output=True, text=True, check=True)
    answers = [line.split() for line in said.stdout.splitlines()]
    assert len(answers) == count, said.stderr
    return [(int(status), float(ended_s) - float(began_s)) for status, began_s, ended_s in answers]


def fair(hours: float, folder: Path) -> dict[str, Any]:
    """The clip alone, one window alone, and the clip beside the long one."""
    clips = [pcm_of(name) for name in ("en-one.wav", "de-phone.wav", "es-three.wav")]
    random_ = random.Random(1)
    hours_of_talk = talk(clips, 3600 * hours, random_, pause_s=(0.2, 0.6))
    long = write_audio(folder / "long.opus", hours_of_talk, SAMPLE_RATE, bit_rate=24_000)  # four hours in 100 MB
    ten = write_audio(
        folder / "ten.flac", talk(clips, 10, random_, pause_s=(0.2, 0.3))[: 10 * SAMPLE_RATE], SAMPLE_RATE
    )
    window = write_audio(folder / "window.flac", talk(clips, 30, random_, pause_s=(0.2, 0.3))[: 30 * SAMPLE_RATE],
                         SAMPLE_RATE)  # fmt: skip
    with serving(*FLOAT32) as served:

        def took_s(file: Path) -> float:
            began = time.monotonic()
            assert ask(served.url, file.read_bytes()).status_code == 200
            return time.monotonic() - began

        alone, window_s = [took_s(ten) for _ in range(8)], [took_s(window) for _ in range(3)]
        with requests.post(
            f"{served.url}/v1/audio/transcriptions", files={"file": long.read_bytes()}, data={"stream": "true"},
            stream=True, timeout=1200,
        ) as response:  # fmt: skip
            lines = response.iter_lines()
            next(line for line in lines if line.startswith(b"data: "))
            beside = [took_s(ten) for _ in range(12)]
    allowed = 2 * statistics.median(alone) + statistics.median(window_s)
    return {
        "hours_of_the_long_one": hours,
        "alone_s": summary(alone),
        "window_s": summary(window_s),
        "beside_s": summary(beside),
        "allowed_s": round(allowed, 2),
        "within": statistics.median(beside) <= allowed,
    }


def summary(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 2), "longest": round(max(values), 2)}


def pcm_of(name: str) -> Pcm:
    with wave.open(str(clips_path() / name)) as file:
        pcm = np.frombuffer(file.readframes(file.getnframes()), np.int16)
        return pcm if file.getframerate() == SAMPLE_RATE else np.repeat(pcm, SAMPLE_RATE // file.getframerate())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--engines", default="2,1")
    parser.add_argument("--long-hours", type=float, default=3.9)  # the server takes four
    parser.add_argument("--parts", default="load,too_many,fair")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    result: dict[str, Any] = {"benchmark": "http_load"}
    if "load" in parts:
        before = engine_alone(4)
        for engines in map(int, arguments.engines.split(",")):
            found = load(arguments.minutes, arguments.clients, engines, before)
            result.setdefault("load", []).append(found)
            print("load", found, file=sys.stderr)
    if "too_many" in parts:
        result["too_many"] = too_many(200)
        print("too many", result["too_many"], file=sys.stderr)
    if "fair" in parts:
        with tempfile.TemporaryDirectory() as folder:
            result["fair"] = fair(arguments.long_hours, Path(folder))
    result["within"] = is_within(result)
    result["machine"] = machine()
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0 if result["within"] else 1


def is_within(result: dict[str, Any]) -> bool:
    load, many, fair = result.get("load"), result.get("too_many"), result.get("fair")
    return all((
        load is None or (
            all(set(one["answers"]) == {"200"} for one in load)
            and max(one["share_of_the_engine"] for one in load) >= SHARE
        ),
        many is None or all(
            set(one["answers"]) == {"200", "503"} and one["refusal_ms"]["median"] <= REFUSAL_MS
            and set(one["ready_and_next_request"]) == {"200, 200"}
            for one in (many["threads"], many["curl"])
        ),
        fair is None or fair["within"],
    ))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
