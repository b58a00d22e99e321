"""One tree of errors. A class's `kind` is stable: it becomes `error_kind` in the tables and `exit_code` the command's.

    MurmurError
    ├── UsageError          exit 2: nothing has been started
    │   ├── ConfigError         an unknown key, a value out of range
    │   ├── ManifestError       an unreadable line, a doubled id, no such manifest
    │   ├── OutputError         the output cannot be written or read
    │   ├── OutputHeldError     another live driver holds it
    │   └── ModelError          no such model, damaged or partial weights
    ├── OutputMismatchError exit 4: the output was begun with other settings
    ├── StoreError          exit 3: the store refuses; resumable
    ├── CrashLoopError      exit 3: engines, or Ray itself, die whatever they are given; resumable
    ├── ApplicationError    exit 3: the running application that decodes is gone; resumable
    ├── AudioError          costs its recording only
    │   ├── NotFoundError, ForbiddenError, SourceError      the bytes cannot be had
    │   │   └── SourceTimeoutError                          they come too slowly
    │   ├── EmptyAudioError, NoAudioStreamError             there is no sound in them
    │   ├── DamagedAudioError                               there is, and no decoder can read it
    │   ├── DecoderCrashError                               they end the decoder's process
    │   └── TooLongError, TooManyChannelsError, DecodeTimeoutError, DecodeMemoryError     a limit was reached
    └── EngineError         costs its Unit only
        ├── EngineMemoryError, NonFiniteError
        └── WorkerCrashError    its process died with it alone, again and again

This module knows nothing but text.
"""

from __future__ import annotations

import re
from typing import ClassVar

from pipeline.types import Failure

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_FAILED = 3
EXIT_MISMATCH = 4


class MurmurError(Exception):
    """Anything Murmuration refuses or fails at. Its text is one line that a user can act on."""

    kind: ClassVar[str] = "error"
    exit_code: ClassVar[int] = EXIT_FAILED


class UsageError(MurmurError):
    kind = "usage"
    exit_code = EXIT_USAGE


class ConfigError(UsageError):
    kind = "config"


class ManifestError(UsageError):
    kind = "manifest"


class OutputError(UsageError):
    kind = "output"


class OutputHeldError(UsageError):
    kind = "output_held"


class ModelError(UsageError):
    kind = "model"


class OutputMismatchError(MurmurError):
    kind = "output_mismatch"
    exit_code = EXIT_MISMATCH


class StoreError(MurmurError):
    kind = "store"


class CrashLoopError(MurmurError):
    kind = "crash_loop"


class ApplicationError(MurmurError):
    kind = "application"


class AudioError(MurmurError):
    kind = "audio"
    store_wide: ClassVar[bool] = False  # whether it may be the store that refuses, and not this file
    attempts = 1  # how often the bytes were asked for, or the decoder was started, until it was raised


class NotFoundError(AudioError):
    kind = "not_found"


class ForbiddenError(AudioError):
    kind = "forbidden"
    store_wide = True


class SourceError(AudioError):
    kind = "source"
    store_wide = True


class SourceTimeoutError(SourceError):
    kind = "source_timeout"
    store_wide = False


class EmptyAudioError(AudioError):
    kind = "empty_audio"


class NoAudioStreamError(AudioError):
    kind = "no_audio_stream"


class TooManyChannelsError(AudioError):
    kind = "too_many_channels"


class DamagedAudioError(AudioError):
    kind = "damaged_audio"


class DecoderCrashError(AudioError):
    kind = "decoder_crash"


class TooLongError(AudioError):
    kind = "too_long"


class DecodeTimeoutError(AudioError):
    kind = "decode_timeout"


class DecodeMemoryError(AudioError):
    kind = "memory"


class EngineError(MurmurError):
    kind = "engine"


class EngineMemoryError(EngineError):
    kind = "engine_memory"


class NonFiniteError(EngineError):
    kind = "non_finite"


class WorkerCrashError(EngineError):
    kind = "worker_crash"


# User info, and the query of a URL: both may hold a secret.
_SECRETS = re.compile(
    r"(?<=://)[^/@\s]+@|\?[^\s'\"]*(?:sig|token|key|credential|secret|expires)[^\s'\"]*", re.IGNORECASE
)


def redact(text: str) -> str:
    """`text` with the user info and signed queries of any URL in it removed."""
    return _SECRETS.sub("", text)


def failure_of(error: BaseException, stage: str, attempts: int = 1) -> Failure:
    """The row that `error` becomes: its kind, its first line without secrets, and where it happened."""
    kind = error.kind if isinstance(error, MurmurError) else "internal"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    message = lines[0] if isinstance(error, MurmurError) else f"{type(error).__name__}: {lines[0]}"
    return Failure(kind=kind, message=redact(message)[:500], stage=stage, attempts=attempts)
