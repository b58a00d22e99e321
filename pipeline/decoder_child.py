"""The process in which files are decoded: `main`, started by `decoder.py` with MEMORY_MB PARENT WINDOW.

Whatever a file makes of a codec stays in here. The process has one socket to its parent, from which all it reads comes,
and has given up the rest before the first file: it can open no file and no socket, write no file, leave no core, and
have no more memory than it was granted. It dies with its parent. It is started afresh, not forked, and imports numpy,
av and little of ours: 0.3 s and 45 MB.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from pipeline.audio import AudioStream, load_all
from pipeline.decoder_wire import WINDOW, Tag, Wire
from pipeline.errors import AudioError, DamagedAudioError, DecodeMemoryError, EmptyAudioError
from pipeline.types import Pcm

_BLOCKS = 4  # of a second, in a frame
_PR_SET_PDEATHSIG = 1
_BOMB = 50 << 30  # bytes that the fault `oom` asks for
_FOREVER_S = 3600.0  # a hang, unless the fault's text gives other seconds


def main() -> None:
    memory_mb, parent, window = (int(argument) for argument in sys.argv[1:])
    wire = Wire(socket.socket(fileno=0), mmap.mmap(window, WINDOW))
    os.close(window)
    load_all()
    confine(memory_mb, parent)
    wire.send(Tag.READY)
    while True:
        try:
            order = wire.receive().json
        except EOFError:
            return
        serve(order, wire)


def confine(memory_mb: int, parent: int) -> None:
    """Give up what decoding does not need. `memory_mb` comes on top of what the idle process has."""
    os.set_blocking(2, False)  # a parent reads our last words only when we are dead
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before that
            os._exit(0)
        with open("/proc/self/statm") as file:
            idle = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (idle + (memory_mb << 20),) * 2)
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):
        resource.setrlimit(limit, (0, 0))


def serve(order: dict[str, Any], wire: Wire) -> None:
    """Decode one file, as `order` says, block by block; END or ERROR is the last of it."""
    flags: set[str] = set()
    try:
        suffer(order["fault"])
        file = _File(wire, order["size"])
        with AudioStream(file, **order["stream"]) as audio:
            wire.send(Tag.OPENED)
            flags = audio.flags
            for blocks in _gathered(audio):
                _tell(flags, wire)
                wire.send_block(np.concatenate(blocks, axis=-1))
        _tell(flags, wire)
        wire.send(Tag.END)
    except AudioError as error:
        _tell(flags, wire)
        wire.send_json(Tag.ERROR, {"kind": error.kind, "message": str(error)})
    except MemoryError:
        wire.send_json(Tag.ERROR, {"kind": DecodeMemoryError.kind, "message": ""})
    except Exception as error:
        wire.send_json(Tag.ERROR, {"kind": "internal", "message": f"{type(error).__name__}: {error}"})


def suffer(fault: dict[str, str] | None) -> None:
    """Do what an injected fault of stage `decode` says (`fake.faults`)."""
    if fault is None:
        return
    kind, text = fault["kind"], fault["text"]
    if kind == "exit":
        os._exit(1)
    if kind == "oom":
        bytearray(_BOMB)
    if kind == "hang":
        time.sleep(float(text or _FOREVER_S))
    if kind in ("raise", "empty"):
        raise (DamagedAudioError if kind == "raise" else EmptyAudioError)(text or f"injected {kind}")


def _gathered(audio: Iterable[Pcm]) -> Iterator[list[Pcm]]:
    """Blocks of one shape, some seconds at a time, since each frame costs both processes a turn; also before an error.

    An error is raised when what came before it has been taken.
    """
    blocks: list[Pcm] = []
    stopped: AudioError | MemoryError | None = None
    try:
        for block in audio:
            if blocks and (block.shape[:-1] != blocks[0].shape[:-1] or len(blocks) == _BLOCKS):
                yield blocks
                blocks = []
            blocks.append(block)
    except (AudioError, MemoryError) as error:
        stopped = error
    if blocks:
        yield blocks
    if stopped is not None:
        raise stopped


def _tell(flags: set[str], wire: Wire) -> None:
    for flag in sorted(flags):
        wire.send(Tag.FLAG, flag.encode())


class _File:
    """The file as its parent has it: seekable, a quarter of a megabyte of it kept."""

    def __init__(self, wire: Wire, size: int) -> None:
        self._wire, self._size = wire, size
        self._at = 0
        self._chunk, self._start = memoryview(b""), 0  # what was read last, and where it lies

    def read(self, size: int = -1, /) -> bytes:
        left = max(self._size - self._at, 0)
        size = left if size < 0 else min(size, left)
        found = self._kept(size) if size else memoryview(b"")
        self._at += len(found)
        return bytes(found)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        at = offset + (0, self._at, self._size)[whence]
        if at < 0:  # a damaged file may point anywhere; libav understands -1
            return -1
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def _kept(self, size: int) -> memoryview:
        """Up to `size` bytes from here; the parent is asked where none of them is kept."""
        if not self._start <= self._at < self._start + len(self._chunk):
            try:
                self._chunk = self._wire.ask(self._at, self._size - self._at)
            except EOFError:
                os._exit(0)  # the parent is gone; libav would take an exception for the end of the file
            self._start = self._at
        return self._chunk[self._at - self._start :][:size]
