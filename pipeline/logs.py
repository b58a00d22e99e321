"""How a log line looks, in the driver and in Ray's workers: one line each, no secrets, the recording it speaks of.

Text for a person, or JSON lines (`log_format: json`) for a program. What a message holds is not trusted: it may quote
a file's name or a server's answer, so line breaks and control characters are written out and signed addresses lose
their signatures. Transcripts are never logged. Knows nothing of what is run.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Literal, TextIO

from pipeline.errors import redact

LogFormat = Literal["text", "json"]

# What a line may say beside its message: `extra=` of the call; from `request` on those of one over HTTP.
FIELDS = tuple("recording kind stage attempts request route status body_bytes audio_s runtime_ms".split())
_LONGEST = 4000  # characters of a message; what is longer is some library's dump
_recording: ContextVar[str | None] = ContextVar("recording", default=None)


@contextmanager
def about(recording_id: str) -> Iterator[None]:
    """Lines logged in the body, also by what it awaits, carry this recording's id."""
    before = _recording.get()
    _recording.set(recording_id)
    try:
        yield
    finally:
        _recording.set(before)  # not `reset`: a generator may be closed in another context than it ran in


def set_up(log_format: LogFormat = "text", *, verbose: bool = False) -> None:
    """Lines of this process go to stderr: our own from INFO (`verbose`: DEBUG), others' warnings.

    Called again it replaces what it set up before.
    """
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, Stderr)]:
        root.removeHandler(handler)
    handler = Stderr()
    handler.setFormatter(JsonLines() if log_format == "json" else Lines())
    root.addHandler(handler)
    for ours in ("pipeline", "serve_app"):
        logging.getLogger(ours).setLevel(logging.DEBUG if verbose else logging.INFO)


@contextmanager
def also(tell: Callable[[str], None]) -> Iterator[None]:
    """In the body each line is told to somebody else too, formatted as on stderr."""
    root = logging.getLogger()
    handler = _Told(tell)
    handler.setFormatter(next((each.formatter for each in root.handlers if isinstance(each, Stderr)), Lines()))
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


class _Told(logging.Handler):
    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(RuntimeError):  # a loop that has ended meanwhile
            self._tell(self.format(record))


class Stderr(logging.StreamHandler[TextIO]):
    """Whatever stderr is at that moment: a progress bar puts lines above itself by taking its place."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class Lines(logging.Formatter):
    """`2026-11-26 11:12:13 WARNING [recording-7] message`, always one line."""

    def format(self, record: logging.LogRecord) -> str:
        said = fields_of(record)
        recording = f"[{one_line(said['recording'])}] " if "recording" in said else ""
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        return f"{at} {record.levelname} {recording}{said['message']}"


class JsonLines(logging.Formatter):
    """One JSON object a line, in ASCII: time (seconds since 1970), level, message, those of `FIELDS` that are known."""

    def format(self, record: logging.LogRecord) -> str:
        head = {"time": round(record.created, 3), "level": record.levelname, "logger": record.name}
        return json.dumps(head | fields_of(record))


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """The message and the fields of a record, without secrets and line breaks."""
    said: dict[str, Any] = {"message": one_line(record.getMessage())}
    if record.exc_info:
        said["message"] += ": " + one_line("".join(traceback.format_exception(*record.exc_info)))
    known = {name: getattr(record, name, None) for name in FIELDS}
    known["recording"] = known["recording"] or _recording.get()
    return said | {name: value for name, value in known.items() if value is not None}


def one_line(text: str) -> str:
    """`text` without signatures, and with everything that is not printable written out: it cannot begin a line, move
    a terminal's cursor or hide what stands beside it."""
    text = redact(text)[:_LONGEST]
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
