"""What a driver leaves of itself in the output: how its run went, and its log.

    _run/runs/RUN.json           when it began, was last seen and ended, what it had to do, how that came out
    _run/logs/RUN-NNNNNN.jsonl   its log lines, an object a minute and one at the end

Written every minute, so that what is lost to a kill is the last minute of it. For people only: no run reads it, and a
store that refuses it does not end a run.
"""

from __future__ import annotations

import json
import logging
import platform
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from types import TracebackType
from typing import Any

from pipeline.errors import MurmurError, StoreError
from pipeline.logs import JsonLines
from pipeline.store import Store

log = logging.getLogger(__name__)

RUNS = "_run/runs"
LOGS = "_run/logs"
EVERY_S = 60.0
MOST_LINES = 100_000  # waiting to be put, if the store does not answer


@dataclass(frozen=True, slots=True)
class Driver:
    """`_run/runs/RUN.json`. Times are seconds since 1970 by that driver's clock."""

    run: str  # sorts by time
    host: str
    started: float
    seen: float  # when this was written last
    ended: float | None = None  # None: it runs, or was killed
    outcome: str | None = None  # "done", else the kind of the error that ended it
    said: dict[str, Any] = field(default_factory=dict)  # command, to_do, pools, recordings, audio_s, ...: see job


class Journal:
    """A driver's record and log while it runs; a context manager."""

    def __init__(self, store: Store, **said: Any) -> None:
        now = time.time()
        run = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now)) + "-" + secrets.token_hex(3)
        self._store = store
        self._driver = Driver(run, socket.gethostname(), now, now, said={**versions(), **said})
        self._lines = _Collected()
        self._n_objects = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="journal", daemon=True)

    def note(self, **said: Any) -> None:
        """Adds to what the record says."""
        with self._lock:
            self._driver.said.update(said)

    def __enter__(self) -> Journal:
        logging.getLogger("pipeline").addHandler(self._lines)
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, MurmurError):
            log.error("the run ended: %s", error)
        self._stop.set()
        self._thread.join()
        logging.getLogger("pipeline").removeHandler(self._lines)
        self._write(ended=time.time(), outcome=_outcome(error))

    def _keep(self) -> None:
        while not self._stop.wait(EVERY_S):
            self._write()

    def _write(self, ended: float | None = None, outcome: str | None = None) -> None:
        try:
            with self._lock:
                about = asdict(self._driver) | {"seen": time.time(), "ended": ended, "outcome": outcome}
            self._store.put(f"{RUNS}/{self._driver.run}.json", json.dumps(about, indent=1, ensure_ascii=False).encode())
            self._put_lines()
        except StoreError as error:
            log.warning("the run's own log cannot be written: %s", error)

    def _put_lines(self) -> None:
        lines = self._lines.taken()
        if not lines:
            return
        try:
            self._store.put(f"{LOGS}/{self._driver.run}-{self._n_objects:06d}.jsonl", "".join(lines).encode())
        except StoreError:
            self._lines.give_back(lines)
            raise
        self._n_objects += 1


class _Collected(logging.Handler):
    """Lines that are in no object yet."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonLines())
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if len(self._lines) < MOST_LINES:
            self._lines.append(self.format(record) + "\n")

    def taken(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines

    def give_back(self, lines: list[str]) -> None:
        self._lines[:0] = lines


def read_drivers(store: Store) -> list[Driver]:
    """The drivers that an output has seen, the first one first; a record that does not parse is left out."""
    return list(_parsed(store))


def _parsed(store: Store) -> Iterator[Driver]:
    names = sorted(name for name in store.sizes(RUNS) if name.endswith(".json"))
    for _, raw in store.get_all(f"{RUNS}/{name}" for name in names):
        try:
            yield Driver(**json.loads(raw or b""))
        except (ValueError, TypeError):
            continue


def versions() -> dict[str, Any]:
    """What the driver runs on."""
    names = ("murmuration", "ray", "torch", "transformers", "pyarrow")
    found = {name: _version(name) for name in names}
    return {"python": platform.python_version(), "versions": {name: v for name, v in found.items() if v}}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _outcome(error: BaseException | None) -> str:
    if error is None:
        return "done"
    return error.kind if isinstance(error, MurmurError) else type(error).__name__
