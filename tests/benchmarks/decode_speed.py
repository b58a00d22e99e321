"""What decoding costs: hours of audio a core-hour, beside decoding in this process, and from a store 50 ms away.

    python -m tests.benchmarks.decode_speed [--minutes 10] [--rounds 5] [--out FILE]

Core-seconds are the CPU time of this process and of the decoder's together, read from the kernel, so that a busy
machine disturbs them little; the two ways take turns. `with_vad` is the whole of a decode slot's work (`read_units`),
which is what sizes a decode pool. Prints a table and one JSON object on the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from pipeline import source
from pipeline.audio import AudioStream
from pipeline.config import Config
from pipeline.decoder import _pool, close_idle, open_audio
from pipeline.types import SAMPLE_RATE, Pcm, Recording
from pipeline.units import read_units
from tests.audio_files import Samples, write_audio
from tests.benchmarks.machine import machine
from tests.speech import pcm_at, talk

Figures = dict[str, Any]
LATENCY_S = 0.05
TICKS = os.sysconf("SC_CLK_TCK")

# name → (kind for `write_audio`, rate, channels)
FORMS = {
    "wav 16 kHz mono": ("wav", 16_000, 1),
    "wav 44.1 kHz stereo": ("wav", 44_100, 2),
    "flac 16 kHz mono": ("flac", 16_000, 1),
    "flac 44.1 kHz stereo": ("flac", 44_100, 2),
    "mp3 44.1 kHz stereo": ("mp3", 44_100, 2),
    "m4a 44.1 kHz stereo": ("m4a", 44_100, 2),
    "opus 48 kHz mono": ("opus", 48_000, 1),
}


def speech(minutes: int) -> Pcm:
    """Synthetic sentences, a minute of them again and again."""
    minute = np.resize(pcm_at(talk(24)[0], -6), 60 * SAMPLE_RATE)
    return np.tile(minute, minutes)


def at_rate(pcm: Pcm, rate: int, channels: int) -> Samples:
    """The same sound with more samples, on each channel a little louder than on the one before."""
    times = np.arange(len(pcm) * rate // SAMPLE_RATE) * (SAMPLE_RATE / rate)
    one = np.interp(times, np.arange(len(pcm)), pcm)
    return np.stack([one * (0.8 + 0.2 * channel) for channel in range(channels)]).astype(np.int16)


# ---- core-seconds


def in_this_process(path: Path) -> int:
    with path.open("rb") as file, AudioStream(file, "a", max_audio_s=10**6) as stream:
        return sum(len(block) for block in stream)


def as_the_job_does(path: Path) -> int:
    with open_audio(Recording("id", str(path)), channels="mix", max_audio_s=10**6) as stream:
        return sum(len(block) for block in stream)


def with_the_vad(path: Path) -> int:
    return sum(item.n_samples for item in read_units(Recording("id", str(path)), Config()))


def cost(work: Callable[[Path], int], path: Path) -> tuple[float, float]:
    """(core-seconds, wall seconds) for the whole file, with a decoder that runs already."""
    began, wall = _cores(), time.perf_counter()
    work(path)
    return _cores() - began, time.perf_counter() - wall


def _cores() -> float:
    return time.process_time() + sum(_cores_of(decoder.pid) for decoder in _pool._idle)


def _cores_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def measure(path: Path, duration_s: float, rounds: int) -> Figures:
    ways = {"here": in_this_process, "job": as_the_job_does, "with_vad": with_the_vad}
    for work in ways.values():
        work(path)
    taken = [{name: cost(work, path) for name, work in ways.items()} for _ in range(rounds)]
    cores = {name: median(one[name][0] for one in taken) for name in ways}
    walls = {name: median(one[name][1] for one in taken) for name in ways}
    return {
        "core_s_per_audio_hour": round(cores["job"] / duration_s * 3600, 3),
        "hours_per_core_hour": round(duration_s / cores["job"]),
        "hours_per_core_hour_in_process": round(duration_s / cores["here"]),
        "hours_per_core_hour_with_vad": round(duration_s / cores["with_vad"]),
        "core_seconds_over_in_process": round(cores["job"] / cores["here"], 3),
        "wall_over_in_process": round(walls["job"] / walls["here"], 3),
    }


def measure_small(path: Path, n_files: int) -> Figures:
    """Files of a second, one after the other: what each costs besides its sound."""
    as_the_job_does(path)
    cores, wall = _cores(), time.perf_counter()
    for _ in range(n_files):
        as_the_job_does(path)
    return {
        "core_ms_each": round((_cores() - cores) / n_files * 1000, 2),
        "a_second": round(n_files / (time.perf_counter() - wall)),
    }


def measure_start(path: Path) -> Figures:
    close_idle()
    began = time.perf_counter()
    as_the_job_does(path)
    took_s = time.perf_counter() - began
    (decoder,) = _pool._idle
    status = Path(f"/proc/{decoder.pid}/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return {
        "first_file_s": round(took_s, 2),
        "core_s": round(_cores_of(decoder.pid), 2),
        "peak_resident_mb": round(int(resident.split()[1]) / 1024),
    }


# ---- a store far away


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    data = b""

    def do_GET(self) -> None:
        time.sleep(LATENCY_S)
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        part = self.data[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(self.data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def far_away(data: bytes) -> Iterator[str]:
    """The address of a server that takes 50 ms for each answer."""
    handler = type("Handler", (_Handler,), {"data": data})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/a"
        server.shutdown()


def measure_far(path: Path, rounds: int) -> Figures:
    """Wall seconds with ranges fetched ahead, without, and from the disk: the same decoder, the same file."""
    with far_away(path.read_bytes()) as address:

        def there() -> float:
            began = time.perf_counter()
            with open_audio(Recording("id", address), channels="mix", max_audio_s=10**6) as stream:
                for _ in stream:
                    pass
            return time.perf_counter() - began

        def when_asked() -> float:
            original = source._Ranges.read_at
            source._Ranges.read_at = _without_looking_ahead  # type: ignore[method-assign]
            try:
                return there()
            finally:
                source._Ranges.read_at = original  # type: ignore[method-assign]

        there()
        taken = [(there(), when_asked(), cost(as_the_job_does, path)[1]) for _ in range(rounds)]
    ahead, asked, disk = (median(column) for column in zip(*taken, strict=True))
    return {
        "latency_ms": LATENCY_S * 1000,
        "bytes": path.stat().st_size,
        "wall_s_read_ahead": round(ahead, 3),
        "wall_s_when_asked": round(asked, 3),
        "wall_s_from_disk": round(disk, 3),
    }


def _without_looking_ahead(self: source._Ranges, offset: int, size: int) -> bytes:
    start, stop = offset, min(offset + size, self.size)
    parts = []
    while start < stop:
        number = source._number(start)
        first, _ = source._span(number)
        parts.append(self._range(number)[start - first : stop - first])
        start += len(parts[-1])
    return b"".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    pcm = speech(options.minutes)
    result: Figures = {"minutes": options.minutes, "rounds": options.rounds, "formats": {}}
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for name, (kind, rate, channels) in FORMS.items():
            paths[name] = write_audio(Path(folder) / f"{name}.{kind}", at_rate(pcm, rate, channels), rate, kind)
            result["formats"][name] = measure(paths[name], len(pcm) / SAMPLE_RATE, options.rounds)
        second = {kind: write_audio(Path(folder) / f"second.{kind}", pcm[:SAMPLE_RATE]) for kind in ("wav", "flac")}
        result["files_of_a_second"] = {kind: measure_small(path, 300) for kind, path in second.items()}
        result["start"] = measure_start(second["flac"])
        result["far_away"] = measure_far(paths["flac 44.1 kHz stereo"], options.rounds)
    # What the README's table of sizes is made of.
    result["core_s_per_audio_hour"] = {
        name: found["core_s_per_audio_hour"] for name, found in result["formats"].items()
    }
    result["machine"] = machine()
    print(f"{'':22} {'h / core-h':>10} {'in process':>10} {'with VAD':>10} {'cores':>7} {'wall':>7}")
    for name, found in result["formats"].items():
        _, h, here, vad, cores, wall = found.values()
        print(f"{name:22} {h:10} {here:10} {vad:10} {cores:7.2f} {wall:7.2f}")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
