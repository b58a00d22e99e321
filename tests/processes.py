"""The processes of a job that runs as a command: its own, its cluster's, and which of them is what."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
from commands import command

KINDS: dict[str, Callable[[str], bool]] = {
    "engine": lambda line: line.startswith("ray::") and "EngineStage" in line,
    "decode worker": lambda line: line.startswith("ray::") and "(decode)" in line,
    "decoder": lambda line: "pipeline.decod" in line,
    "raylet": lambda line: Path(line.split(" ", 1)[0]).name == "raylet",
}


def start(*arguments: str | Path, stderr: int | None = subprocess.PIPE) -> subprocess.Popen[str]:
    """`murmur` as a process that a test can kill."""
    return subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True
    )


def find(driver: int, kind: str) -> list[psutil.Process]:
    """The processes of this kind that the driver, or the cluster that it started, has now."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:  # it has just ended
            continue
        if KINDS[kind](line):
            found.append(process)
    return found


def kill(process: psutil.Process) -> None:
    process.send_signal(signal.SIGKILL)
