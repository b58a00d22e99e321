"""What of a stream of samples is wanted, and whether all of it was there: the same for decoded sound and plain WAV.

Knows neither files nor codecs.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.errors import DamagedAudioError, TooLongError
from pipeline.types import SAMPLE_RATE, Pcm, seconds

_SHORT = 0.1  # seconds that may be missing at the end: encoders round


class SlicedStream:
    """Blocks of samples from `offset` on, `length` of them, at most `max_audio_s`; to be iterated once.

    A subclass tells what there is (`_blocks`, `_seek`) and what its header promises. `flags` is complete when the
    blocks are; `slice_beyond_end` is among them where the slice reaches further than the sound.
    """

    def __init__(self, name: str, max_audio_s: int, offset: int | None, length: int | None) -> None:
        self.flags: set[str] = set()
        self._name = name  # what messages call the file
        self._max_s = max_audio_s
        self._offset, self._length = offset, length
        self._promised_s: float | None = None  # the length that a header states, where it states it exactly

    def __iter__(self) -> Iterator[Pcm]:
        offset = self._offset or 0
        stop = None if self._length is None else offset + self._length
        position = self._seek(offset)
        done = 0
        for block in self._blocks():
            part = block[..., max(offset - position, 0) : None if stop is None else max(stop - position, 0)]
            position += block.shape[-1]
            done += part.shape[-1]
            if done > self._max_s * SAMPLE_RATE:
                raise self._too_long()
            if part.shape[-1]:
                yield part
            if stop is not None and position >= stop:
                return
        self._check_end(position)
        wanted = offset + 1 if stop is None else stop - _SHORT * SAMPLE_RATE
        if self._offset is not None and position < wanted:
            self.flags.add("slice_beyond_end")

    def _blocks(self) -> Iterator[Pcm]:
        """The samples from where `_seek` went: [n] or [c, n] each."""
        raise NotImplementedError

    def _seek(self, offset: int) -> int:
        """Skip what lies before sample `offset`, or a part of it; return the sample at which the blocks begin."""
        return 0

    def _check_promise(self) -> None:
        """Raise where the header tells of more than `max_audio_s`; a slice may be short enough."""
        if self._offset is None and self._promised_s is not None and self._promised_s > self._max_s:
            raise self._too_long()

    def _check_end(self, position: int) -> None:
        """Raise where the sound ended too early: it has `position` samples."""
        promised = self._promised_s
        if promised is not None and seconds(position) < promised - _SHORT:
            raise DamagedAudioError(
                f"{self._name}: ends after {seconds(position):.1f} s of the {promised:.1f} s that its header promises"
            )

    def _too_long(self) -> TooLongError:
        return TooLongError(f"{self._name}: longer than max_audio_s ({self._max_s} s)")
