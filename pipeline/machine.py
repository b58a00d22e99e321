"""What machine this is: processor, cores, what it is good at, versions and commit, as plain JSON where figures go; and
what it is given back.

Knows nothing of what is measured or run on it.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "transformers", "ray", "numpy", "av", "onnxruntime", "openai-whisper", "faster-whisper", "ctranslate2",
)  # fmt: skip
RAY_NICENESS = 15  # beyond it a busy machine leaves hardly anything: decoders would be taken for stuck ones
_ROOT = Path(__file__).resolve().parent.parent


def machine() -> dict[str, Any]:
    """What a result file must say of its origin."""
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        **_commit(),
    }


def usable_cores() -> int:
    """The processors this process may run on: in a container fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def give_way(by: int) -> None:
    """This thread, and the threads and processes that it starts, leave the processor to whoever else of us wants it:
    `by` is added to its niceness, up to what Ray gives its workers. Nothing is waited for where nobody wants it."""
    if hasattr(os, "nice"):
        os.nice(max(0, min(by, RAY_NICENESS - os.nice(0))))


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32: AMX or AVX512-BF16. Only Linux says."""
    return has_amx() or "avx512_bf16" in _cpuinfo("flags").split()


def has_amx() -> bool:
    return "amx_bf16" in _cpuinfo("flags").split()


def _processor() -> str:
    return _cpuinfo("model name") or platform.machine()


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    """The checkout's commit, and whether code that is in no commit was measured; nothing for an installed package."""
    if not (_ROOT / ".git").exists():  # a package inside somebody else's checkout has a parent's commit, not its own
        return {"commit": None}
    changed = _git("status", "--porcelain", "--", "pipeline", "serve_app")
    return {"commit": _git("rev-parse", "HEAD") or None, "uncommitted_changes": bool(changed)}


def _git(*arguments: str) -> str:
    try:
        # A look must not take the lock that somebody's commit needs.
        run = subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=_ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return run.stdout.strip()


def give_memory_back() -> None:
    """To the system, what was freed: Arrow's pool and the C library keep it for the next time."""
    import pyarrow as pa

    gc.collect()
    pa.default_memory_pool().release_unused()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)  # musl has none
