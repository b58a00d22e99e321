"""A process for each contestant, so that what one leaves running slows no other: thread pools, caches, memory.

A seat is asked one thing at a time and answers with plain data; the one that asks sees that only one of them works.
Whole batches of threads spin for a while after their work (a fifth of a second in CTranslate2's OpenMP), so a pause
belongs between two turns. Torch comes in the process, never here.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from pipeline.errors import EngineError, MurmurError
from pipeline.types import SAMPLE_RATE, Pcm

if TYPE_CHECKING:
    from pipeline.engine.contestants import Contestant, Setting, Spec
    from pipeline.engine.probe import Probe

PAUSE_S = 0.25
WINDOW_S = 30


class Seat:
    """A process of its own that holds one contestant, or none: `ask` runs a method of `Sitting` there."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Raises what the method raised there, in one line."""
        self.begin(method, *arguments)
        return self.answer()

    def begin(self, method: str, *arguments: Any) -> None:
        """Asks and does not wait, for what takes long and is not measured."""
        with suppress(OSError):  # a process that is gone has no answer either, and then it is said
            self._pipe.send((method, arguments))

    def answer(self) -> Any:
        try:
            value, error = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise EngineError(f"the process ended with {self._process.exitcode}: out of memory?") from None
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        self._pipe.close()  # it ends by itself when nobody can ask any more
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _serve(pipe: Connection, threads: int) -> None:
    """The process: answers until nobody asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent decides
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    sitting = Sitting()
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            break
        answer: tuple[Any, MurmurError | None]
        try:
            answer = (getattr(sitting, method)(*arguments), None)
        except MurmurError as error:
            answer = (None, error)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            answer = (None, EngineError(f"{type(error).__name__}: {lines[0]}"))
        try:
            pipe.send(answer)
        except BrokenPipeError:
            break
    sitting.close()


class Sitting:
    """What a seat can be asked; all of it runs in the process."""

    _contestant: Contestant | None = None

    def write_models(self, size: str, given: str | None, folder: str, convert: bool) -> tuple[str, str | None]:
        from pipeline.engine.contestants import write_models

        return write_models(size, given, folder, convert)

    def load(self, spec: Spec) -> str:
        """The contestant takes its seat; returns the type of number in which it really computes."""
        from pipeline.engine.contestants import CONTESTANTS

        self._contestant = CONTESTANTS[spec.library](spec)
        return self._contestant.dtype

    def settings(self, batches: Sequence[int], windows: int) -> list[Setting]:
        assert self._contestant is not None
        return self._contestant.settings(batches, windows)

    def run(self, windows: int, n_tokens: int, setting: Setting) -> dict[str, Any]:
        """Takes its turn: from int16 samples to tokens."""
        assert self._contestant is not None
        pcms = synthetic_windows(windows)
        cpu, start = time.process_time(), time.perf_counter()
        answer = self._contestant.run(pcms, n_tokens, setting)
        wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
        return {"wall_s": wall_s, "cpu_s": cpu_s, "stages": answer.stages, "tokens": answer.tokens}

    def probe(self, measurement: str, windows: int, *arguments: Any) -> Any:
        """One of `Probe`'s measurements of ours, on so many windows."""
        return getattr(self._probe(), measurement)(synthetic_windows(windows), *arguments)

    def facts(self) -> dict[str, int]:
        return self._probe().facts()

    def _probe(self) -> Probe:
        from pipeline.engine.contestants import Ours
        from pipeline.engine.probe import Probe

        assert isinstance(self._contestant, Ours)
        return Probe(self._contestant)

    def machine_peaks(self, device: str) -> dict[str, float]:
        from pipeline.engine.probe import machine_peaks

        return machine_peaks(device)

    def close(self) -> None:
        """For the end of a process too: an engine's thread is not left to the interpreter."""
        if self._contestant is not None:
            self._contestant.close()

    def peak_rss_mb(self) -> float:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def synthetic_windows(count: int) -> list[Pcm]:
    """So many different windows of 30 s: a voice-like buzz in syllables, and noise; the same ones in every process."""
    return [_window(i) for i in range(count)]


@cache
def _window(index: int) -> Pcm:
    random = np.random.default_rng(index)
    t = np.arange(WINDOW_S * SAMPLE_RATE, dtype=np.float32) / SAMPLE_RATE
    pitch = random.uniform(90, 220) * (1 + 0.1 * np.sin(2 * np.pi * random.uniform(0.1, 0.5) * t))
    phase = np.cumsum(2 * np.pi * pitch / SAMPLE_RATE)
    voice = sum(np.sin(k * phase) / k for k in range(1, 9))
    syllables = np.clip(np.sin(2 * np.pi * random.uniform(2, 5) * t), 0, 1)
    audio = 0.1 * voice * syllables + 0.01 * random.standard_normal(len(t))
    return (audio * 32767).astype(np.int16)
