"""The sound of a recording, decoded in a process of its own: what may kill a decoder costs one file, and no worker.

`open_audio` is what everybody calls, from any thread. It opens the source here, where the credentials are, lends a
decoder's process to the stream and serves that process's reads; the process (`decoder_child.py`) can reach nothing
else. A process serves file after file; it is replaced after a crash, a limit, a file left half-way, or `MAX_FILES`.

- Time: a decoder may take `timeout_s` for a file; without it, a minute and a tenth of the audio decoded so far. Only
  the time counts in which it is waited for: neither the source's nor the reader's.
- Memory: `memory_mb` on top of what an idle process has.
- A crash or a want of memory is believed the second time: what an earlier file left behind may be to blame, or somebody
  else who killed the process. So such a file is decoded once more, in a fresh one; no sample is given twice.

A file that is 16 kHz mono PCM in WAV is read as it is: there is nothing to decode. No codec is loaded here.
"""

from __future__ import annotations

import atexit
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import IO, Any, Protocol, Self

import numpy as np

from pipeline.config import Fault
from pipeline.decoder_wire import WINDOW, Frame, Tag, Wire
from pipeline.errors import (
    AudioError,
    DamagedAudioError,
    DecodeMemoryError,
    DecoderCrashError,
    DecodeTimeoutError,
    EmptyAudioError,
    NoAudioStreamError,
    TooLongError,
    TooManyChannelsError,
)
from pipeline.machine import usable_cores
from pipeline.manifest import public_uri
from pipeline.sliced import SlicedStream
from pipeline.source import Source
from pipeline.types import SAMPLE_RATE, Pcm, Recording, seconds
from pipeline.wav import PlainWav, plain_wav

MAX_FILES = 1000  # that a process serves, whatever a codec has leaked by then
GRACE_S = 60.0  # seconds that any file may take, and
SLOWEST = 10.0  # times real time: a decoder slower than that is stuck
_TRIES = 2  # of a file that ends the process it is decoded in
# It gives way to who has started it: a server, beside which six that start take 2 s of processor time. From its first
# moment on, but not before: until it has begun, its starter waits with Python's lock in its hands.
_CHILD = "from pipeline.machine import give_way; give_way(5); from pipeline.decoder_child import main; main()"
_START_S = 60.0  # seconds for a process to start, on a machine that is very busy
_HEAD = 4096  # bytes in which a plain WAV's header ends
_INHERITED = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "LANG", "LC_ALL")  # environment variables

Strike = Callable[[], Fault | None]

_RAISED = {
    error.kind: error
    for error in (
        EmptyAudioError,
        NoAudioStreamError,
        DamagedAudioError,
        TooLongError,
        TooManyChannelsError,
        DecodeMemoryError,
    )
}


class Audio(Protocol):
    """Blocks of a recording's samples, to be iterated once: int16 [n], or [c, n], at 16 kHz, of a few seconds.

    An `AudioError` may come after any block. `flags` is complete when the blocks are.
    """

    flags: set[str]

    @property
    def attempts(self) -> int:
        """How often what had to be tried most often was tried: a range of the source, or the decoding."""

    def __iter__(self) -> Iterator[Pcm]: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_audio(
    recording: Recording,
    *,
    channels: str,
    max_audio_s: int,
    memory_mb: int = 1500,
    timeout_s: float | None = None,
    strike: Strike | None = None,
) -> Audio:
    """The sound of a recording. Raises an `AudioError` where it cannot be had.

    `strike` is asked at each try for the fault of stage `decode` that the decoder's process is to suffer.
    """
    source = Source(recording.uri)
    try:
        fault = strike() if strike else None
        plain = plain_wav(source.read_at(0, _HEAD), source.size)
        if plain is not None and fault is None:
            return PlainAudio(recording, source, plain, max_audio_s)
        stream = {"channels": channels, "max_audio_s": max_audio_s}
        return DecodedAudio(recording, source, stream, memory_mb, timeout_s, fault, strike)
    except AudioError as error:
        error.attempts = max(error.attempts, source.attempts)
        source.close()
        raise
    except BaseException:
        source.close()
        raise


class PlainAudio(SlicedStream):
    """A plain WAV's samples, as they are."""

    def __init__(self, recording: Recording, source: Source, wav: PlainWav, max_audio_s: int) -> None:
        super().__init__(public_uri(recording.uri), max_audio_s, recording.offset, recording.length)
        self._source, self._wav = source, wav
        self._promised_s = seconds(wav.n_bytes // 2)
        self._check_promise()

    @property
    def attempts(self) -> int:
        return self._source.attempts

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._source.close()

    def _seek(self, offset: int) -> int:
        self._at = min(offset, self._n_samples)
        return self._at

    def _blocks(self) -> Iterator[Pcm]:
        for at in range(self._at, self._n_samples, SAMPLE_RATE):
            size = 2 * min(SAMPLE_RATE, self._n_samples - at)
            yield np.frombuffer(self._source.read_at(self._wav.start + 2 * at, size), "<i2")

    @property
    def _n_samples(self) -> int:
        """Those that are there."""
        return min(self._wav.n_bytes, self._source.size - self._wav.start) // 2


class DecodedAudio:
    """What a decoder's process makes of a source."""

    def __init__(
        self,
        recording: Recording,
        source: Source,
        stream: dict[str, Any],
        memory_mb: int,
        timeout_s: float | None,
        fault: Fault | None,
        strike: Strike | None,
    ) -> None:
        self.flags: set[str] = set()
        self._name = public_uri(recording.uri)
        self._source = source
        self._offset = recording.offset or 0
        self._order = {
            "size": source.size,
            "stream": {"name": self._name, "offset": recording.offset, "length": recording.length, **stream},
        }
        self._fault, self._strike = fault, strike
        self._memory_mb, self._timeout_s = memory_mb, timeout_s
        self._n_tries = 0
        self._decoder: Decoder | None = None  # None: nothing more comes
        try:
            self._open()
        except BaseException as error:
            self._drop()
            if isinstance(error, AudioError):
                error.attempts = max(error.attempts, self._n_tries)
            raise

    @property
    def attempts(self) -> int:
        return max(self._n_tries, self._source.attempts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._drop()
        self._source.close()

    def __iter__(self) -> Iterator[Pcm]:
        n_given = 0
        while True:
            try:
                for block in self._blocks(skip=n_given):
                    n_given += block.shape[-1]
                    yield block
                return
            except (DecoderCrashError, DecodeMemoryError) as error:
                self._try_again(error)

    def _open(self) -> None:
        """Give the file to a process: a fresh one where another has failed."""
        self._n_tries += 1
        self._decoder = _pool.take(self._memory_mb, fresh=self._n_tries > 1)
        self._waited_s = 0.0
        self._n_decoded = self._offset
        fault = self._fault and {"kind": self._fault.kind, "text": self._fault.text}
        try:
            with self._waiting():
                self._decoder.wire.send_json(Tag.OPEN, self._order | {"fault": fault}, self._left_s())
            self._next(Tag.OPENED)
        except (DecoderCrashError, DecodeMemoryError) as error:
            self._try_again(error)

    def _try_again(self, error: AudioError) -> None:
        """Once; the second time `error` is raised."""
        self._drop()
        if self._n_tries == _TRIES:
            raise error
        self._fault = self._strike() if self._strike else None
        self._open()

    def _blocks(self, skip: int) -> Iterator[Pcm]:
        """What the process makes of the file, without the first `skip` samples."""
        while (frame := self._next(Tag.BLOCK, Tag.END)).tag is not Tag.END:
            pcm = frame.samples
            n_samples = pcm.shape[-1]
            self._n_decoded += n_samples
            if n_samples > skip:
                yield pcm[..., skip:]
            skip = max(skip - n_samples, 0)
        self._give_back()

    def _next(self, *wanted: Tag) -> Frame:
        """The next frame that is `wanted`; what comes before it is seen to."""
        assert self._decoder is not None
        while True:
            with self._waiting():
                frame = self._decoder.wire.receive(self._left_s())
                if frame.tag in wanted:
                    return frame
                if frame.tag is Tag.FLAG:
                    self.flags.add(frame.body.decode())
                    continue
                if frame.tag is Tag.ERROR:
                    raise self._told(**frame.json)
                offset, size = frame.range
            data = self._source.read_at(offset, size)
            with self._waiting():
                self._decoder.wire.answer(data, within_s=self._left_s())

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """While this process waits for the other one: that time counts, and the other one may die in it."""
        assert self._decoder is not None
        began = time.monotonic()
        try:
            yield
        except TimeoutError:
            limit = f"{self._limit_s():.0f} s (decode_timeout_s)"
            raise DecodeTimeoutError(f"{self._name}: decoding it takes longer than {limit}") from None
        except (EOFError, ValueError) as error:
            how = self._decoder.bury() if isinstance(error, EOFError) else str(error)
            raise DecoderCrashError(f"{self._name}: decoding it ends the decoder's process ({how})") from None
        finally:
            self._waited_s += time.monotonic() - began

    def _limit_s(self) -> float:
        return GRACE_S + seconds(self._n_decoded) / SLOWEST if self._timeout_s is None else self._timeout_s

    def _left_s(self) -> float:
        return max(self._limit_s() - self._waited_s, 1e-3)

    def _told(self, kind: str, message: str) -> AudioError:
        """What the process says that it failed at."""
        if kind == DecodeMemoryError.kind:
            limit = f"decode_memory_mb ({self._memory_mb} MB)"
            return DecodeMemoryError(f"{self._name}: decoding it needs more than {limit}")
        if kind in _RAISED:
            self._give_back()
            return _RAISED[kind](message)
        return DecoderCrashError(f"{self._name}: the decoder fails ({message})")

    def _give_back(self) -> None:
        if self._decoder is not None:
            _pool.give_back(self._decoder)
        self._decoder = None

    def _drop(self) -> None:
        if self._decoder is not None:
            self._decoder.kill()
        self._decoder = None


class Decoder:
    """A decoder's process, started."""

    def __init__(self, memory_mb: int, starter: ThreadPoolExecutor) -> None:
        self.memory_mb = memory_mb
        self.n_files = 0  # that it was given
        ours, theirs = socket.socketpair()
        with theirs, _shared_memory() as window:
            self._process = starter.submit(_start_process, memory_mb, theirs.fileno(), window.fileno()).result()
            self.wire = Wire(ours, mmap.mmap(window.fileno(), WINDOW))
        try:
            ready = self.wire.receive(_START_S).tag is Tag.READY
        except (EOFError, TimeoutError, ValueError):
            ready = False
        if not ready:
            raise RuntimeError(f"a decoder's process does not start ({self.bury()})")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def bury(self) -> str:
        """How it ended, of whom no more is heard."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        code = self._process.poll()
        last_words = self.kill().strip().splitlines()[-1:]
        how = "silence" if code is None else f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        return ": ".join([how, *last_words])

    def kill(self) -> str:
        """End it, if it has not ended; what it wrote to stderr, the first time that is asked."""
        self.wire.close()
        self._process.kill()
        self._process.wait()
        stderr = self._process.stderr
        if stderr is None or stderr.closed:
            return ""
        with stderr:
            return stderr.read().decode(errors="replace")


def _shared_memory() -> IO[bytes]:
    """A file that is nowhere, of `WINDOW` bytes."""
    file = open(os.memfd_create("decoder"), "r+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()  # noqa: SIM115
    file.truncate(WINDOW)
    return file


def _start_process(memory_mb: int, socket: int, window: int) -> subprocess.Popen[bytes]:
    """With nothing of ours but the way to our code: credentials, among others, are in the environment."""
    environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # a thread's stack counts as memory
    # glibc would map every buffer afresh and give it back: a fifth of the time for PCM.
    environment |= {"MALLOC_MMAP_THRESHOLD_": str(8 << 20), "MALLOC_TRIM_THRESHOLD_": str(32 << 20)}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _CHILD, str(memory_mb), str(os.getpid()), str(window)],
        pass_fds=[window],
        stdin=socket,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # Ctrl-C is for the parent to answer
    )


class _Pool:
    """The processes that wait for a file. For any thread; the last one used is the first one lent."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        """Begin anew, as a forked process must: what its parent has started is not its own."""
        self._lock = threading.Lock()
        self._idle: list[Decoder] = []
        # A child is told of the end of the thread that started it, so that must be one that lasts.
        self._starter = ThreadPoolExecutor(1, "decoder-starter")

    def take(self, memory_mb: int, fresh: bool) -> Decoder:
        """An idle process or a new one; `fresh`: a new one in any case."""
        decoder = None if fresh else self._find(memory_mb)
        decoder = decoder or Decoder(memory_mb, self._starter)
        decoder.n_files += 1
        return decoder

    def give_back(self, decoder: Decoder) -> None:
        with self._lock:
            is_wanted = decoder.n_files < MAX_FILES and len(self._idle) < usable_cores()
            if is_wanted:
                self._idle.append(decoder)
        if not is_wanted:
            decoder.kill()

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for decoder in idle:
            decoder.kill()

    def _find(self, memory_mb: int) -> Decoder | None:
        with self._lock:
            others = [decoder for decoder in self._idle if decoder.memory_mb != memory_mb]
            found = [decoder for decoder in self._idle if decoder.memory_mb == memory_mb]
            chosen = found.pop() if found else None
            self._idle = others + found
        if chosen is not None and not chosen.is_alive:
            chosen.kill()
            return self._find(memory_mb)
        return chosen


_pool = _Pool()
close_idle = _pool.close
atexit.register(close_idle)
os.register_at_fork(after_in_child=_pool._forget)
