"""What a caller is told: each error's status, and how it looks on DeepInfra's route and on OpenAI's.

A message names what is wrong and where, and nothing of this machine. Knows no routes and no engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from pipeline.errors import ApplicationError, AudioError, MurmurError, TooLongError, redact
from serve_app.limits import BusyError, DeadlineError, TooLargeError, TooSlowError


class RefusedError(MurmurError):
    """Refused with a status of its own."""

    kind = "refused"

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class FieldError(MurmurError):
    """A field is missing, repeated or out of its range."""

    kind = "field"

    def __init__(self, name: str, message: str, code: str = "invalid_value") -> None:
        super().__init__(f"{name}: {message}")
        self.name, self.message, self.code = name, message, code


class ModelNotFoundError(MurmurError):
    kind = "model_not_found"


class NotReadyError(MurmurError):
    """A model is being loaded, or its engine is being started again."""

    kind = "not_ready"


@dataclass(frozen=True, slots=True)
class Answer:
    """An error as it goes out."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)
    kind: str = "error"

    def to_bytes(self) -> bytes:
        return json.dumps(self.body, ensure_ascii=False).encode()

    def to_wire(self, headers: Mapping[str, str]) -> bytes:
        """All of it with these headers besides, for a connection that ends with it."""
        body = self.to_bytes()
        own = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
        lines = [f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in {**self.headers, **headers, **own}.items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def status_of(error: Exception) -> int:
    """The HTTP status of an error; 422 is `FieldError`'s, on OpenAI's routes 400."""
    if isinstance(error, RefusedError):
        return error.status
    for kind, status in _STATUS.items():
        if isinstance(error, kind):
            return status
    return 500


_STATUS: dict[type[Exception], int] = {
    FieldError: 422,
    ModelNotFoundError: 404,
    BusyError: 503,
    NotReadyError: 503,
    ApplicationError: 503,
    DeadlineError: 503,
    TooSlowError: 408,
    TooLargeError: 413,
    TooLongError: 413,
    AudioError: 400,
}


def answer(error: Exception, *, openai: bool, busy_status: int = 503) -> Answer:
    """`error` in the manner of the route that it happened on."""
    status = status_of(error)
    headers = {}
    kind = error.kind if isinstance(error, MurmurError) else "internal"
    if status == 503:
        headers["Retry-After"] = str(error.retry_after_s if isinstance(error, BusyError) else 5)
        status = busy_status if isinstance(error, BusyError) else 503
    if status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="murmuration"'
    if status in (408, 413, 415):
        headers["Connection"] = "close"  # what is left of the body is not waited for
    message = redact(str(error).partition("\n")[0]) if isinstance(error, MurmurError) else "internal error"
    if openai:
        return Answer(400 if status == 422 else status, {"error": _openai(error, status, message, kind)}, headers, kind)
    if isinstance(error, FieldError):
        detail: Any = [{"loc": ["body", error.name], "msg": error.message, "type": error.code}]
    else:
        detail = message
    return Answer(status, {"detail": detail}, headers, kind)


def _openai(error: Exception, status: int, message: str, kind: str) -> dict[str, Any]:
    code = error.code if isinstance(error, FieldError | RefusedError) else kind
    type_ = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(status)
    return {
        "message": message,
        "type": type_ or ("server_error" if status >= 500 else "invalid_request_error"),
        "param": error.name if isinstance(error, FieldError) else None,
        "code": code or kind,
    }
