"""Who may call: bearer tokens, from the environment or from a file that is read again when it changes.

Tokens are compared as bytes in constant time, each of them every time, and are never logged. Knows no routes.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import ConfigError

VARIABLE = "MURMUR_API_TOKENS"


class Tokens:
    """`is_open`: none are configured, and everybody may call (from this machine: `refuse_open`)."""

    def __init__(self, tokens: tuple[str, ...] = (), file: Path | None = None) -> None:
        self._given = tuple(token.encode() for token in tokens)
        self._file = file
        self._seen: tuple[int, int, int] | None = None  # when that file was changed last, its size, and which it is
        self._of_file: tuple[bytes, ...] = ()
        self._read_again()

    @classmethod
    def find(cls, file: str | None, env: Mapping[str, str] | None = None) -> Tokens:
        """Those of `MURMUR_API_TOKENS` (commas between them) and of `tokens_file` (one a line, `#` begins a remark).

        Raises `ConfigError` where the file cannot be read or holds none: a lost secret opens nothing.
        """
        text = (os.environ if env is None else env).get(VARIABLE, "")
        tokens = tuple(token.strip() for token in text.split(",") if token.strip())
        path = Path(file).expanduser() if file else None
        if path is not None and not _lines(path):
            raise ConfigError(f"tokens_file {path}: there is no token in it")
        return cls(tokens, path)

    @property
    def is_open(self) -> bool:
        return not self._given and self._file is None

    def knows(self, asked: bytes) -> bool:
        """Whether it is one of them; every one is compared, so that time tells nothing."""
        self._read_again()
        found = False
        for each in (*self._given, *self._of_file):
            found |= hmac.compare_digest(asked, each)
        return found

    def allows(self, headers: Mapping[str, str]) -> bool:
        """Whether a request with these headers may pass: `Authorization: Bearer T`, in any case, or `xi-api-key: T`."""
        if self.is_open:
            return True
        scheme, _, token = headers.get("authorization", "").strip().partition(" ")
        if scheme.lower() != "bearer":
            token = headers.get("xi-api-key", "")
        asked = token.strip().encode("latin-1", "replace")  # a header's text is its bytes, one by one
        return bool(asked) and self.knows(asked)

    def _read_again(self) -> None:
        if self._file is None:
            return
        try:
            stat = self._file.stat()
            seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if seen != self._seen:
                self._of_file, self._seen = tuple(line.encode() for line in _lines(self._file)), seen
        except (OSError, ConfigError):  # removed: a secret that is gone opens nothing
            self._of_file, self._seen = (), None


def refuse_open(tokens: Tokens, host: str) -> None:
    """Raises `ConfigError` where anybody on the network could call."""
    if tokens.is_open and host not in ("127.0.0.1", "::1", "localhost"):
        raise ConfigError(f"host {host}: without tokens only 127.0.0.1 is served; set {VARIABLE} or tokens_file")


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"tokens_file {file}: {getattr(error, 'strerror', None) or 'is not text'}") from None
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
