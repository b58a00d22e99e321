"""Thousands of damaged, forged and disguised files through the decoder: every one a row, nothing opened, no hang.

    python -m tests.benchmarks.mutated_audio [--files 2000] [--strace] [--out FILE]

File number n is the same in every run. Each goes the way of the job (`read_units`), with the default limits but 10
minutes of sound. With `--strace` the run is traced: what a decoder's process opens or connects to, or tries to, after
it has given up its rights is in the result, and is nothing. Prints a table and one JSON object on the last line.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import Config
from pipeline.decoder import Decoder, close_idle
from pipeline.types import Recording, UnitResult
from pipeline.units import TRUNCATED, read_units
from tests.audio_files import KINDS, PLAYLISTS, noise, tone, write_audio, write_film, write_tracks
from tests.benchmarks.machine import machine

CONFIG = Config(vad="none", max_audio_s=600)
EXTREMES = (0, 1, 0x7F, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7FFF0000)
TRACED = "openat,open,socket,connect,execve,prlimit64"

Draw = np.random.Generator
Mutation = Callable[[bytes, Draw, Path], bytes]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a file."""

    kind: str  # of the mutation
    form: str  # of the file it was made from
    result: str  # "ok", "truncated" or the kind of the failure
    took_s: float


def originals(folder: Path) -> dict[str, bytes]:
    """A sound file of each format, 2 s of tone and noise; a film, and a file with two tracks."""
    sound = np.concatenate([tone(440, 1.0, 48_000), noise(1.0, 48_000)])
    found = {kind: write_audio(folder / f"a.{kind}", sound, 48_000, kind).read_bytes() for kind in sorted(KINDS)}
    found["mono16k"] = write_audio(folder / "b.wav", noise(2.0), kind="wav").read_bytes()
    found["stereo"] = write_audio(folder / "c.mp3", np.stack([sound, sound[::-1]]), 48_000).read_bytes()
    found["film"] = write_film(folder / "a.mp4", sound).read_bytes()
    found["tracks"] = write_tracks(folder / "a.mkv", [sound, sound[::-1]]).read_bytes()
    return found


# ---- mutations


def flip_anywhere(data: bytes, draw: Draw, folder: Path) -> bytes:
    return _flip(data, draw, len(data))


def flip_in_the_header(data: bytes, draw: Draw, folder: Path) -> bytes:
    return _flip(data, draw, 300)


def _flip(data: bytes, draw: Draw, until: int) -> bytes:
    bad = np.frombuffer(data, np.uint8).copy()
    where = draw.integers(0, min(until, len(bad)), size=int(draw.integers(1, 20)))
    bad[where] ^= (1 << draw.integers(0, 8, size=len(where))).astype(np.uint8)
    return bad.tobytes()


def truncate(data: bytes, draw: Draw, folder: Path) -> bytes:
    return data[: int(draw.integers(0, len(data)))]


def cut_out(data: bytes, draw: Draw, folder: Path) -> bytes:
    start, stop = sorted(draw.integers(0, len(data), 2).tolist())
    return data[:start] + data[stop:]


def forge(data: bytes, draw: Draw, folder: Path) -> bytes:
    """Numbers of the header become extreme ones: rates, channels, sizes, counts."""
    bad = bytearray(data)
    for _ in range(int(draw.integers(1, 4))):
        width = int(draw.choice([1, 2, 4]))
        value = int(draw.choice(EXTREMES)) & (1 << 8 * width) - 1
        at = int(draw.integers(4, min(400, len(bad) - width)))
        bad[at : at + width] = value.to_bytes(width, "little" if draw.integers(2) else "big")
    return bytes(bad)


def overwrite(data: bytes, draw: Draw, folder: Path) -> bytes:
    bad = bytearray(data)
    at, n_bytes = int(draw.integers(0, len(bad))), int(draw.integers(1, 4000))
    bad[at : at + n_bytes] = draw.bytes(min(n_bytes, len(bad) - at))
    return bytes(bad)


def repeat(data: bytes, draw: Draw, folder: Path) -> bytes:
    """A part of it again, or all of it: two files in one."""
    start = int(draw.integers(0, len(data))) * int(draw.integers(2))
    return data + data[start:]


def rename(data: bytes, draw: Draw, folder: Path) -> bytes:
    """Nothing: only its name is another format's."""
    return data


def archive(data: bytes, draw: Draw, folder: Path) -> bytes:
    out = io.BytesIO()
    which = int(draw.integers(3))
    if which == 0:
        with zipfile.ZipFile(out, "w") as file:
            file.writestr("a.wav", data)
    elif which == 1:
        with tarfile.open(fileobj=out, mode="w") as tar:
            info = tarfile.TarInfo("a.wav")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return gzip.compress(data, mtime=0) if which == 2 else out.getvalue()


def playlist(data: bytes, draw: Draw, folder: Path) -> bytes:
    """A text that names the untouched file, absolutely, or as a URL of one kind or another."""
    names = ["", "file:", "file://", "concat:", "subfile,,start,0,end,0,,:", "crypto:", "http://127.0.0.1:9", "data:x,"]
    path = f"{draw.choice(names)}{folder / 'a.wav'}"
    return PLAYLISTS[str(draw.choice(sorted(PLAYLISTS)))].format(path=path).encode()


MUTATIONS: tuple[Mutation, ...] = (
    flip_anywhere, flip_in_the_header, truncate, cut_out, forge, overwrite, repeat, rename, archive, playlist,
)  # fmt: skip


def mutant(number: int, files: dict[str, bytes], folder: Path) -> tuple[str, str, Path]:
    """(mutation, original, the path of file `number`, now written)."""
    draw = np.random.default_rng(number)
    mutation = MUTATIONS[number % len(MUTATIONS)]
    form = sorted(files)[number // len(MUTATIONS) % len(files)]
    extension = draw.choice(["wav", "mp3", "m3u8", "txt", "ffconcat", "sdp", "jpg", ""])
    path = folder / f"mutant-{number}.{extension}"
    path.write_bytes(mutation(files[form], draw, folder))
    return mutation.__name__, form, path


# ---- a run


def decode(path: Path) -> str:
    """`ok`, `truncated`, or the kind of the failure."""
    *_, last = read_units(Recording(path.name, str(path)), CONFIG)
    if isinstance(last, UnitResult):
        assert last.failure is not None
        return last.failure.kind
    return "truncated" if TRUNCATED in last.flags else "ok"


def run(n_files: int, folder: Path) -> list[Outcome]:
    files = originals(folder)
    outcomes = []
    for number in range(n_files):
        kind, form, path = mutant(number, files, folder)
        began = time.monotonic()
        outcomes.append(Outcome(kind, form, decode(path), round(time.monotonic() - began, 3)))
        path.unlink()
    close_idle()
    return outcomes


def tabulate(outcomes: list[Outcome], n_started: int) -> dict[str, Any]:
    results = Counter(outcome.result for outcome in outcomes)
    slowest = max(outcomes, key=lambda outcome: outcome.took_s)
    return {
        "files": len(outcomes),
        "results": dict(results.most_common()),
        "by_mutation": {
            mutation.__name__: dict(Counter(o.result for o in outcomes if o.kind == mutation.__name__).most_common())
            for mutation in MUTATIONS
        },
        "slowest": {"s": slowest.took_s, "mutation": slowest.kind, "of": slowest.form, "result": slowest.result},
        "processes_started": n_started,
    }


def count_starts() -> list[int]:
    """Counts the decoders' processes that are started from now on, in a list's only item."""
    count = [0]
    original = Decoder.__init__

    def counting(self: Decoder, *arguments: Any) -> None:
        count[0] += 1
        original(self, *arguments)

    Decoder.__init__ = counting  # type: ignore[method-assign]
    return count


# ---- what was opened


def traced(arguments: list[str]) -> dict[str, Any]:
    """This script again, under strace: its result, with what its decoders' processes tried to open."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace"
        command = [
            "strace", "-f", "--seccomp-bpf", "-e", f"trace={TRACED}", "-o", str(trace),
            sys.executable, "-m", "tests.benchmarks.mutated_audio", *arguments,
        ]  # fmt: skip
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        with trace.open(errors="replace") as lines:
            tried, n_confined = tried_when_confined(lines)
        return result | {"strace": {"processes_confined": n_confined, "opened_or_tried": tried}}


def tried_when_confined(lines: io.TextIOBase) -> tuple[list[str], int]:
    """The calls of processes that may open nothing any more, and how many such processes there were."""
    confined: set[str] = set()
    n_confined = 0
    tried = []
    for line in lines:
        pid, _, call = line.partition(" ")
        call = call.strip()
        if re.match(r"prlimit64\(0, RLIMIT_NOFILE, \{rlim_cur=0", call):
            confined.add(pid)
            n_confined += 1
        elif call.startswith("+++"):
            confined.discard(pid)  # a number may be given again
        elif pid in confined and not call.startswith(("prlimit64", "---", "<...")):
            tried.append(call)
    return sorted(set(tried)), n_confined


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--strace", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.strace:
        result = traced(["--files", str(options.files)])
    else:
        started = count_starts()
        with tempfile.TemporaryDirectory() as folder:
            outcomes = run(options.files, Path(folder))
        result = tabulate(outcomes, started[0]) | {"machine": machine()}
    print(f"{'mutation':20} results")
    for name, results in result["by_mutation"].items():
        print(f"{name:20} {', '.join(f'{kind} {n}' for kind, n in results.items())}")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + os.linesep)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
