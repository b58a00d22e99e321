"""`murmur serve` as a process: started, watched, asked what it has said, stopped by a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
from processes import start


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

    def processes(self) -> dict[str, list[psutil.Process]]:
        """Its processes by what they do: engine, front, decoder, the rest of Ray, and the command itself."""
        found: dict[str, list[psutil.Process]] = {"command": [psutil.Process(self.process.pid)]}
        for process in found["command"][0].children(recursive=True):
            found.setdefault(_kind(process), []).append(process)
        return found

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)


def _kind(process: psutil.Process) -> str:
    try:
        line = " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return "ended"
    if "ServeReplica" in line:
        return "front" if ":front" in line else "engine"
    return "decoder" if "pipeline.decod" in line else "ray"


@contextmanager
def serving(*arguments: str) -> Iterator[Served]:
    """`murmur serve` with the demo model on a free port; drained when the body of the statement ends."""
    with tempfile.TemporaryDirectory() as spool:
        yield from _serving(("--set", f"webhook.spool={spool}", *arguments))


def _serving(arguments: tuple[str, ...]) -> Iterator[Served]:
    process = start("serve", "--model", "demo", "--port", "0", *arguments)
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
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
