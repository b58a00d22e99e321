"""How a decoder's process and its parent speak: frames over one socket, and a window of memory that both see.

    parent → child   OPEN {what to decode}, BYTES (the answer to READ: so many are in the window)
    child → parent   READY, READ (offset, size), OPENED, FLAG, BLOCK (samples), END, ERROR {kind, message}

Nothing is pickled: what a child sends is data, whatever a file has made of the child; and the parent never reads from
the window, which is there because a file's bytes through a socket would cost a third more than decoding PCM does.
Knows no codec and no store.
"""

from __future__ import annotations

import json
import mmap
import socket
import struct
import time
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HEAD = struct.Struct("<BBI")  # tag, channels of a block (0: one, as [n]), bytes that follow
_RANGE = struct.Struct("<QI")  # offset, size
_COUNT = struct.Struct("<I")
WINDOW = 256 << 10  # bytes
_MOST = 64 << 20  # bytes of a frame; more is no frame of ours


class Tag(IntEnum):
    OPEN = 1
    BYTES = 2
    READY = 3
    READ = 4
    OPENED = 5
    FLAG = 6
    BLOCK = 7
    END = 8
    ERROR = 9


@dataclass(frozen=True, slots=True)
class Frame:
    tag: Tag
    channels: int
    body: bytearray

    @property
    def samples(self) -> NDArray[np.int16]:
        """A block's samples: [n], or [c, n]."""
        pcm = np.frombuffer(self.body, np.int16)
        return pcm.reshape(self.channels, -1) if self.channels else pcm

    @property
    def range(self) -> tuple[int, int]:
        """The offset and the size that are asked for."""
        offset, size = _RANGE.unpack(self.body)
        return offset, size

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


class Wire:
    """One end. `EOFError` means that the other one is gone, `ValueError` that it does not speak as it should."""

    def __init__(self, end: socket.socket, window: mmap.mmap) -> None:
        self._socket = end
        self._window = memoryview(window)

    def send(self, tag: Tag, body: bytes | memoryview = b"", channels: int = 0, within_s: float | None = None) -> None:
        """Raises `TimeoutError` after `within_s` seconds."""
        head = _HEAD.pack(tag, channels, len(body))
        try:
            self._socket.settimeout(within_s)
            if len(body) <= 4096:
                self._socket.sendall(head + body)
            else:
                self._socket.sendall(head)
                self._socket.sendall(body)
        except ConnectionError:
            raise EOFError from None

    def send_json(self, tag: Tag, value: dict[str, Any], within_s: float | None = None) -> None:
        self.send(tag, json.dumps(value).encode(), within_s=within_s)

    def send_block(self, pcm: NDArray[np.int16]) -> None:
        channels = pcm.shape[0] if pcm.ndim == 2 else 0
        self.send(Tag.BLOCK, np.ascontiguousarray(pcm).data.cast("B"), channels)

    def ask(self, offset: int, size: int) -> memoryview:
        """The bytes that the other end has there, up to `size` of them and `WINDOW`; good until the next are asked."""
        self.send(Tag.READ, _RANGE.pack(offset, min(size, WINDOW)))
        (count,) = _COUNT.unpack(self.receive().body)
        return self._window[:count]

    def answer(self, data: bytes, within_s: float | None = None) -> None:
        """The bytes that were asked for."""
        self._window[: len(data)] = data
        self.send(Tag.BYTES, _COUNT.pack(len(data)), within_s=within_s)

    def receive(self, within_s: float | None = None) -> Frame:
        """The next frame. Raises `TimeoutError` after `within_s` seconds."""
        until = None if within_s is None else time.monotonic() + within_s
        tag, channels, size = _HEAD.unpack(self._exactly(_HEAD.size, until))
        if size > _MOST:
            raise ValueError(f"a frame of {size} bytes")
        return Frame(Tag(tag), channels, self._exactly(size, until))

    def close(self) -> None:
        self._socket.close()
        self._window.release()

    def _exactly(self, size: int, until: float | None) -> bytearray:
        body = bytearray(size)
        view = memoryview(body)
        while view:
            self._socket.settimeout(None if until is None else max(until - time.monotonic(), 1e-3))
            try:
                n = self._socket.recv_into(view)
            except ConnectionError:
                n = 0
            if n == 0:
                raise EOFError
            view = view[n:]
        return body
