"""WAV files by their header: the length it states, and the plain ones whose samples need no decoder.

Knows the container's chunks and nothing of codecs or stores.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.types import SAMPLE_RATE

_UNSTATED = 0x7FFF0000  # a length from here up was written before the length was known
_PLAIN = struct.pack("<HHIIHH", 1, 1, SAMPLE_RATE, SAMPLE_RATE * 2, 2, 16)  # PCM, mono, 16 kHz, 16 bits


@dataclass(frozen=True, slots=True)
class PlainWav:
    """A file that is what we decode to already: 16 kHz, mono, int16, from byte `start` to its end."""

    start: int
    n_bytes: int  # as the header states; a file that was cut has fewer


def plain_wav(head: bytes, size: int) -> PlainWav | None:
    """How to read a file of `size` bytes that begins with `head`, if it is plain; None where a decoder must look.

    Plain is only what can be read in one way: a length is stated, there are samples, and nothing follows them.
    """
    plain = False
    for name, at, n_bytes in _chunks(head):
        if name == b"fmt ":
            plain = head[at : at + 16] == _PLAIN and n_bytes in (16, 18)
        if name == b"data":
            to_the_end = 0 < n_bytes < _UNSTATED and at + 2 <= size <= at + n_bytes + n_bytes % 2
            return PlainWav(at, n_bytes) if plain and to_the_end else None
    return None


def wav_seconds(head: bytes) -> float | None:
    """The length that a WAV header states; None where it states none (written to a pipe) or is not simple."""
    byte_rate = 0
    for name, at, n_bytes in _chunks(head):
        if name == b"fmt " and at + 12 <= len(head):
            (byte_rate,) = struct.unpack_from("<I", head, at + 8)
        if name == b"data":
            return n_bytes / byte_rate if byte_rate and 0 < n_bytes < _UNSTATED else None
    return None


def _chunks(head: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, where its content begins, how long it says that is) of each chunk whose header lies in `head`."""
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return
    at = 12
    while at + 8 <= len(head):
        name, n_bytes = struct.unpack_from("<4sI", head, at)
        yield name, at + 8, n_bytes
        at += 8 + n_bytes + n_bytes % 2
