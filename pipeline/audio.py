"""Any container or codec → mono 16 kHz int16, streamed; the only file that knows a codec.

It runs in the decoder's process (`decoder_child.py`) and knows no store: it is given a file to read. The same bytes
give the same samples on every try: content alone decides what a file is, never its name, and one thread decodes. libav
reads from that file and can open nothing else, so a playlist reads nothing.

- Track: the audio stream libav calls best (`av_find_best_stream`), the same on every run.
- Channels (`mix`): their average, over blocks of one second. Where the channels cancel each other in a block, the
  louder channel is used and the stream flagged `channel_cancelled`.
- Channels (`split`): all of them, up to eight, in the order of the file's layout; one alone is as with `mix`. Where a
  file goes on with fewer, the others are silent (`channels_changed`); where it goes on with more, it is damaged.
- A packet that cannot be decoded is left out (`damaged_packets`); where the timestamps leap over 0.2 s to 60 s, lost
  or never recorded, silence stands for it (`gap_filled`), so that later times stay true.
- Where a header promises more than there is, or reading ends in an error, `DamagedAudioError` comes after the last
  sample. Ogg, ADTS, CAF, W64 and MP3 without a Xing header promise nothing: a cut there cannot be told from an end.
- A slice that reaches beyond the end is flagged `slice_beyond_end`.
"""

from __future__ import annotations

import errno
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Protocol

import av
import numpy as np
from av.stream import Discard
from numpy.typing import NDArray

from pipeline.errors import DamagedAudioError, EmptyAudioError, NoAudioStreamError, TooManyChannelsError
from pipeline.sliced import SlicedStream
from pipeline.types import MAX_CHANNELS, SAMPLE_RATE, Pcm, seconds
from pipeline.wav import wav_seconds

# Demuxers that may be used: files of sound or film that hold their own media. Playlists, network sessions, images,
# subtitles and devices are not among them.
FORMATS = (
    "aa,aac,ac3,aiff,amr,ape,asf,au,avi,caf,dsf,dss,dts,dtshd,dv,eac3,flac,flv,gsm,iff,ircam,loas,matroska,mov,mp3,mpc"
    ",mpc8,mpeg,mpegts,mxf,nistsphere,nut,ogg,oma,paf,pvf,qcp,rm,shn,sox,tak,truehd,tta,voc,vqf,w64,wav,webm,wtv,wv"
    ",xwma"
)
# Of these a header with no sound behind it is a whole recording of no length; of others it is a file cut short.
_HEADER_IS_ALL = {"aiff", "caf", "flac", "wav"}
_PROMISES = {"aiff", "au", "flac", "mov,mp4,m4a,3gp,3g2,mj2", "wv"}  # the exact length
_PCM_SEEKS = {"aiff", "au", "caf", "w64", "wav"}  # exact to the sample where the codec is PCM

_AV_BUFFER = 128 << 10  # bytes libav asks of us at a time
_HEAD = 64 << 10  # bytes looked at for what libav does not tell
_READ_ERRORS = 16  # in a row, until reading is given up
_SHORT = 0.1  # seconds; a film that begins later than that states more than it has of sound
_LEAST_GAP, _MOST_GAP = 0.2, 60.0  # seconds; less is jitter, more is a new start of the clock
_RATES = range(1_000, 3_000_001)  # Hz; others are damage, and cost memory to resample
_OURS = {("s16", "mono", SAMPLE_RATE), ("s16p", "mono", SAMPLE_RATE)}  # forms that need no resampling

Converter = Callable[[Any], Iterator[NDArray[np.int16]]]  # a frame, or None at the end → int16 [c, n] at 16 kHz


def load_all() -> None:
    """Import what av imports when it is first used: for a process that will be able to open no file any more."""
    for module in pkgutil.walk_packages(av.__path__, "av."):
        if module.name not in ("av.__main__", "av.datasets"):
            importlib.import_module(module.name)


class Bytes(Protocol):
    """What a file of sound must be able to do: a part of `io.RawIOBase`."""

    def read(self, size: int, /) -> bytes: ...
    def seek(self, offset: int, whence: int = 0, /) -> int: ...
    def tell(self) -> int: ...


class AudioStream(SlicedStream):
    """Blocks of a file's samples, to be iterated once: int16 [n] (`split`: [c, n]), n ≤ 16,000, 16 kHz.

    `name` is what messages call the file; `offset` and `length` (samples) choose a slice of it. An `AudioError` may
    come at once or after any block, `MemoryError` where libav or numpy may have no more. `flags` is complete when the
    blocks are. Memory does not grow with length.
    """

    def __init__(
        self,
        file: Bytes,
        name: str,
        *,
        channels: str = "mix",
        max_audio_s: int,
        offset: int | None = None,
        length: int | None = None,
    ) -> None:
        self._channels = channels
        super().__init__(name, max_audio_s, offset, length)
        self._file = file
        self._damage: str | None = None  # what libav said of the first packet it could not decode
        self._cut: str | None = None  # what it said when it could not read on
        self._head = file.read(_HEAD)
        file.seek(0)
        self._open()

    def __enter__(self) -> AudioStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._container.close()

    # ---- opening

    def _open(self) -> None:
        if not self._head:
            raise EmptyAudioError(f"{self._name}: the file is empty (0 bytes)")
        try:
            self._container = av.open(
                self._file,
                mode="r",
                container_options={"format_whitelist": FORMATS, "protocol_whitelist": "none"},
                metadata_errors="replace",
                buffer_size=_AV_BUFFER,
                io_open=_refuse,
            )
        except MemoryError:  # av's own is an FFmpegError too
            raise
        except (av.FFmpegError, ValueError) as error:
            refused = getattr(error, "errno", None) == errno.EINVAL  # a format that is not among ours
            reason = "its content is of no known format" if refused else _reason(error)
            raise DamagedAudioError(f"{self._name}: no audio file that can be read ({reason})") from None
        try:
            self._choose_track()
        except BaseException:
            self._container.close()
            raise

    def _choose_track(self) -> None:
        stream = self._container.streams.best("audio")
        if stream is None:
            raise NoAudioStreamError(f"{self._name}: no audio in this file")
        if stream.codec_context is None:
            raise DamagedAudioError(f"{self._name}: no decoder for its audio codec")
        for other in self._container.streams:
            if other.index != stream.index:
                other.discard = Discard.all  # a film's pictures are not even fetched
        stream.codec_context.thread_count = 1
        self._stream = stream
        self._promised_s = self._promise()
        self._check_promise()

    def _promise(self) -> float | None:
        """The length in seconds that the header states, where its format states it exactly."""
        container, stream, head = self._container, self._stream, self._head
        form, alone = container.format.name, len(container.streams) == 1
        if form == "wav":  # libav shortens the header's length to the file's
            return wav_seconds(head) if stream.codec_context.name.startswith("pcm_") else None
        if form == "matroska,webm":
            exact = alone and container.duration and (container.start_time or 0) < _SHORT * av.time_base
            return container.duration / av.time_base if exact else None
        known = form in _PROMISES or (form == "mp3" and _XING.search(head) is not None)
        return float(stream.duration * stream.time_base) if known and stream.duration is not None else None

    def _seek(self, offset: int) -> int:
        """Skip what lies before `offset` where that is exact; return the sample decoding begins at.

        One second earlier, on a whole second: the resampler then gives what it gives without a seek.
        """
        second = offset // SAMPLE_RATE - 1
        exact = self._container.format.name in _PCM_SEEKS and self._stream.codec_context.name.startswith("pcm_")
        if second < 1 or not exact:
            return 0
        if self._stream.duration is not None and second >= self._stream.duration * self._stream.time_base:
            return 0  # beyond the end: reading through tells how long it is
        try:
            self._container.seek(round(second / self._stream.time_base), stream=self._stream)
        except MemoryError:
            raise
        except av.FFmpegError as error:
            raise DamagedAudioError(f"{self._name}: cannot be read at {second} s ({_reason(error)})") from None
        return second * SAMPLE_RATE

    # ---- packets → frames → blocks

    def _packets(self) -> Iterator[Any]:
        errors = 0
        while True:
            try:
                for packet in self._container.demux(self._stream):
                    errors = 0
                    yield packet
                return
            except MemoryError:
                raise
            except av.FFmpegError as error:
                errors += 1
                if errors == _READ_ERRORS:
                    self._cut = _reason(error)
                    return

    def _frames(self) -> Iterator[Any]:
        for packet in self._packets():
            try:
                yield from packet.decode()
            except av.error.EOFError:
                continue  # flushed twice, after an error in reading
            except MemoryError:
                raise
            except av.FFmpegError as error:
                self.flags.add("damaged_packets")
                self._damage = self._damage or _reason(error)

    def _blocks(self) -> Iterator[Pcm]:
        """Mono samples in blocks that begin on whole seconds, unless a gap or a new format comes between."""
        mixer, clock = _Split(self.flags, self._name) if self._channels == "split" else _Mixer(self.flags), _Clock()
        convert: Converter | None = None
        form = None
        for frame in self._frames():
            gap = clock.gap_before(frame)
            if gap or form != _form(frame):
                yield from self._converted(convert, None, mixer)
                yield from map(mixer.widen, self._silence(gap))
                form = _form(frame)
                convert = self._converter(frame)
            frame.pts = None
            yield from self._converted(convert, frame, mixer)
        yield from self._converted(convert, None, mixer)

    def _converter(self, frame: Any) -> Converter:
        if frame.sample_rate not in _RATES:
            raise DamagedAudioError(f"{self._name}: a sample rate of {frame.sample_rate} Hz")
        return _Join() if _form(frame) in _OURS else _Resampler(frame.layout)

    def _converted(self, convert: Converter | None, frame: Any, mixer: _Mixer | _Split) -> Iterator[Pcm]:
        """What the converter has ready with `frame` (None: all that is left in it), mixed."""
        try:
            ready = list(convert(frame)) if convert is not None else []
        except MemoryError:
            raise
        except (av.FFmpegError, ValueError) as error:
            raise DamagedAudioError(f"{self._name}: its samples cannot be converted ({_reason(error)})") from None
        for block in ready:
            yield mixer.mix(block)

    def _silence(self, gap_s: float) -> Iterator[Pcm]:
        left = round(gap_s * SAMPLE_RATE)
        if left:
            self.flags.add("gap_filled")
        while left:
            block = np.zeros(min(left, SAMPLE_RATE), np.int16)
            left -= len(block)
            yield block

    # ---- the end

    def _check_end(self, position: int) -> None:
        """Raise where the sound ended too early: `position` samples were decoded, or skipped in seeking."""
        if position == 0 and self._damage:
            raise DamagedAudioError(f"{self._name}: no packet of it can be decoded ({self._damage})")
        if self._cut:
            raise DamagedAudioError(f"{self._name}: reading fails after {seconds(position):.1f} s ({self._cut})")
        super()._check_end(position)
        if position == 0 and self._promised_s is None and self._container.format.name not in _HEADER_IS_ALL:
            raise DamagedAudioError(f"{self._name}: ends after its header")


class _Resampler:
    """Frames of one form → 16 kHz int16 [c, n], in blocks of a second."""

    def __init__(self, layout: Any) -> None:
        # Interleaved: PyAV 18.1 reads past the planes of a planar frame that has eight channels or more, and crashes.
        self._resampler = av.AudioResampler(format="s16", layout=layout, rate=SAMPLE_RATE, frame_size=SAMPLE_RATE)

    def __call__(self, frame: Any) -> Iterator[NDArray[np.int16]]:
        for block in self._resampler.resample(frame):
            yield block.to_ndarray().reshape(block.samples, -1).T


class _Join:
    """The same for frames that are mono 16 kHz int16 already, at a tenth of the cost."""

    def __init__(self) -> None:
        self._parts: list[NDArray[np.int16]] = []  # [1, n] each
        self._n_samples = 0

    def __call__(self, frame: Any) -> Iterator[NDArray[np.int16]]:
        if frame is not None:
            self._parts.append(frame.to_ndarray().reshape(1, -1))
            self._n_samples += frame.samples
        while self._n_samples >= SAMPLE_RATE or (frame is None and self._n_samples):
            joined = np.concatenate(self._parts, axis=1)
            block, rest = joined[:, :SAMPLE_RATE], joined[:, SAMPLE_RATE:]
            self._parts, self._n_samples = [rest], rest.shape[1]
            yield block


class _Clock:
    """Compares the frames' timestamps with the samples that came."""

    def __init__(self) -> None:
        self._origin: float | None = None  # the timestamp at which the sound began
        self._heard = 0.0  # seconds since, with gaps
        self._expected = 0.0  # the next frame's timestamp

    def gap_before(self, frame: Any) -> float:
        """Seconds of silence that belong before `frame`."""
        length = frame.samples / frame.sample_rate if frame.sample_rate else 0.0
        gap = 0.0
        if frame.pts is not None:
            time = float(frame.time)
            if self._origin is None:
                self._origin = self._expected = time
            leap, late = time - self._expected, time - self._origin - self._heard
            if abs(leap) > _MOST_GAP:
                self._origin = time - self._heard
            elif min(leap, late) >= _LEAST_GAP:
                gap = min(leap, late)
            self._expected = time + length
        self._heard += gap + length
        return gap


class _Mixer:
    """Channels → one. Knows which channel it used last, so as not to change over between two alike."""

    def __init__(self, flags: set[str]) -> None:
        self._flags = flags
        self._channel: int | None = None

    def mix(self, channels: NDArray[np.int16]) -> Pcm:
        """The average of int16 [c, n], or its louder channel where the others take most of it away.

        They do where the sum has less than a tenth of the power of that channel alone: 16 dB down for two.
        """
        if len(channels) == 1:
            first: Pcm = channels[0]
            return first
        total = channels.sum(axis=0, dtype=np.int32)
        power = np.square(channels, dtype=np.float64).mean(axis=1)
        loudest = power.max()
        if loudest <= 64 or np.square(total, dtype=np.float64).mean() >= loudest / 10:  # 64: -72 dBFS, silence
            self._channel = None
            mean: Pcm = np.rint(total / len(channels)).astype(np.int16)
            return mean
        if self._channel is None or self._channel >= len(power) or power[self._channel] < loudest / 4:
            self._channel = int(power.argmax())
        self._flags.add("channel_cancelled")
        return np.ascontiguousarray(channels[self._channel])

    def widen(self, silence: Pcm) -> Pcm:
        return silence


class _Split:
    """Channels → as many as there were at first."""

    def __init__(self, flags: set[str], name: str) -> None:
        self._flags, self._name = flags, name
        self._n_channels = 0  # unknown

    def mix(self, channels: NDArray[np.int16]) -> Pcm:
        """int16 [c, n]; [n] of one channel."""
        n_channels = len(channels)
        self._n_channels = self._n_channels or n_channels
        if n_channels > MAX_CHANNELS:
            raise TooManyChannelsError(
                f"{self._name}: {n_channels} channels; channels: split takes {MAX_CHANNELS} (mix takes any)"
            )
        if n_channels > self._n_channels:
            raise DamagedAudioError(f"{self._name}: {self._n_channels} channels become {n_channels}")
        if n_channels < self._n_channels:
            self._flags.add("channels_changed")
            silent = np.zeros((self._n_channels - n_channels, channels.shape[1]), np.int16)
            channels = np.concatenate([channels, silent])
        return np.ascontiguousarray(channels) if self._n_channels > 1 else channels[0]

    def widen(self, silence: Pcm) -> Pcm:
        return np.tile(silence, (self._n_channels, 1)) if self._n_channels > 1 else silence


def _form(frame: Any) -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.sample_rate


def _refuse(url: str, flags: int, options: dict[str, str]) -> Any:
    """libav's way to open another file than the one it was given."""
    raise PermissionError("a file that refers to others")


def _reason(error: BaseException) -> str:
    """What libav said, without the parts that name no cause."""
    text = getattr(error, "strerror", None) or str(error)
    return text.splitlines()[0][:200] if text else type(error).__name__


# The frame that tells an MP3's length, with the flag that it does.
_XING = re.compile(rb"(?:Xing|Info)\0\0\0[\x01\x03\x05\x07\x09\x0b\x0d\x0f]")
