"""A Recording to its Units: consecutive audio, cut in silence, the same for the same bytes on every try.

Cutting is pure and streams: `cut_units` holds one unit of audio and what the detector has not answered for yet.
`read_units` feeds it from a file and turns what goes wrong there into rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import chain

import numpy as np

from pipeline.channels import first_speech
from pipeline.config import Config
from pipeline.decoder import Audio, Strike, open_audio
from pipeline.errors import AudioError, DamagedAudioError, failure_of
from pipeline.flags import HARD_CUT, RESTART, TRUNCATED
from pipeline.types import SAMPLE_RATE, VAD_FRAME, Algorithm, Pcm, Recording, Unit, UnitResult
from pipeline.vad import MAYBE_SPEECH, Frames, SileroVad, believed
from pipeline.windows import SILENCE, energy, language_slice, lowest, pauses


def cut_units(
    recording: Recording,
    blocks: Iterable[Pcm],
    *,
    vad: SileroVad | None,
    unit_length_s: int,
    algorithm: Algorithm,
    sequential_max_s: int,
) -> Iterator[Unit]:
    """The Units of a stream of audio, at least one, the last one marked.

    Blocks are [n], or [c, n] where channels are transcribed apart: these are cut at the same points, where none of
    them speaks. `vad` is a fresh detector, or None: then `speech` is None and units are cut where the audio is
    quietest. Units are at most `unit_length_s` long (`sequential`: `sequential_max_s`) and cut as `cut_frame` says.
    Every Unit after the one in which speech begins carries that beginning as `language_pcm`.
    """
    limit = (sequential_max_s if algorithm == "sequential" else unit_length_s) * SAMPLE_RATE // VAD_FRAME
    pending = _Pending(vad)
    language_pcm: Pcm | None = None
    index = start = 0
    for block in chain(blocks, [None]):
        if block is None:
            pending.finish()
        else:
            pending.push(block)
        while (more := pending.has_more_than(limit)) or block is None:
            pcm, speech, flags = pending.take(limit) if more else pending.take_rest()
            if index and algorithm == "sequential":
                flags = (RESTART, *flags)
            unit = Unit(recording, index, start, pcm, not more, speech, language_pcm, flags)
            if pcm.ndim == 2 and language_pcm is None:  # the channels' Units must not each detect one of their own
                language_pcm = first_speech(unit)
                unit = replace(unit, language_pcm=language_pcm)
            yield unit
            if not more:
                return
            language_pcm = language_slice(unit) if language_pcm is None and pcm.ndim == 1 else language_pcm
            index, start = index + 1, start + unit.n_samples


def cut_frame(values: Frames, limit: int) -> tuple[int, bool]:
    """Where to end a unit whose first `limit` frames of speech are `values`, and whether that is in a word.

    The longest pause (2 s and more are as good) in the last third, the latest of equals; else in the last nine
    tenths; else the least speech-like 0.13 s of the last third.
    """
    found = pauses(values)
    for first in (2 * limit // 3, limit // 10):
        cut = found.cut(first, limit, enough=SILENCE)
        if cut is not None:
            return cut, False
    return lowest(values, 2 * limit // 3, limit), True


def read_units(recording: Recording, config: Config, strike: Strike | None = None) -> Iterator[Unit | UnitResult]:
    """The Units of a recording's file; what cannot be read becomes a failed `UnitResult`, never an exception.

    - Nothing decoded: one failed result, index 0, no samples.
    - Damage after some speech: the last Unit carries `truncated_audio`.
    - Damage after silence only, or another error half-way (the source, a limit): all that was decoded comes as Units,
      then a failed result without samples, so that the recording counts as failed and is tried again.
    The stream's own flags are on the last Unit. `strike` gives the decoder faults to suffer.
    """
    try:
        with open_audio(
            recording,
            channels=config.channels,
            max_audio_s=config.max_audio_s,
            memory_mb=config.decode_memory_mb,
            timeout_s=config.decode_timeout_s,
            strike=strike,
        ) as audio:
            yield from _read(recording, audio, config)
    except AudioError as error:
        yield _lost(recording, 0, 0, error, error.attempts)


def _read(recording: Recording, audio: Audio, config: Config) -> Iterator[Unit | UnitResult]:
    blocks = _UntilError(audio)
    spoken = False
    for unit in cut_units(
        recording,
        blocks,
        vad=SileroVad() if config.vad == "silero" else None,
        unit_length_s=config.unit_length_s,
        algorithm=config.algorithm,
        sequential_max_s=config.sequential_max_s,
    ):
        spoken = spoken or _speaks(unit)
        if unit.is_last:
            flagged = replace(unit, flags=(*unit.flags, *sorted(audio.flags)))
            yield from _last(flagged, blocks.error, audio.attempts, spoken)
        else:
            yield replace(unit, attempts=audio.attempts)


def _last(unit: Unit, error: AudioError | None, attempts: int, spoken: bool) -> Iterator[Unit | UnitResult]:
    """How a stream ends that stopped with `error`, or without one."""
    unit = replace(unit, attempts=attempts)
    if error is None:
        yield unit
    elif isinstance(error, DamagedAudioError) and spoken:
        yield replace(unit, flags=(*unit.flags, TRUNCATED))
    elif unit.n_samples:
        yield replace(unit, is_last=False)
        yield _lost(unit.recording, unit.index + 1, unit.start + unit.n_samples, error, attempts)
    else:
        yield _lost(unit.recording, unit.index, unit.start, error, attempts)


def _lost(recording: Recording, index: int, start: int, error: AudioError, attempts: int) -> UnitResult:
    """The row of the rest of a recording that nobody knows the length of."""
    failure = failure_of(error, "decode", attempts)
    return UnitResult(recording, index, is_last=True, start=start, n_samples=0, failure=failure, attempts=attempts)


def _speaks(unit: Unit) -> bool:
    return bool(unit.n_samples) if unit.speech is None else bool((unit.speech >= MAYBE_SPEECH).any())


class _UntilError:
    """Blocks of a stream up to its end or its error, which is kept."""

    def __init__(self, blocks: Iterable[Pcm]) -> None:
        self.error: AudioError | None = None
        self._blocks = blocks

    def __iter__(self) -> Iterator[Pcm]:
        try:
            yield from self._blocks
        except AudioError as error:
            self.error = error


class _Pending:
    """Audio that is in no Unit yet, and what the detector has said about it so far."""

    def __init__(self, vad: SileroVad | None) -> None:
        self._vads = None if vad is None else [vad]  # one a channel
        self._blocks: list[Pcm] = []
        self._n_samples = 0
        self._speech: Frames | None = None  # [frames] or [c, frames]; None: nothing was heard yet

    def push(self, block: Pcm) -> None:
        self._blocks.append(block)
        self._n_samples += block.shape[-1]
        if self._vads is not None:
            channels = np.atleast_2d(block)
            self._vads += [deepcopy(self._vads[0]) for _ in channels[len(self._vads) :]]  # fresh: it is the first block
            self._hear([vad.push(channel) for vad, channel in zip(self._vads, channels, strict=True)])

    def finish(self) -> None:
        if self._vads is not None:
            self._hear([vad.finish() for vad in self._vads])

    def has_more_than(self, n_frames: int) -> bool:
        """Whether the next unit must be cut, and all that decides where is known."""
        heard = self._vads is None or (self._speech is not None and self._speech.shape[-1] >= n_frames)
        return heard and self._n_samples > n_frames * VAD_FRAME

    def take(self, limit: int) -> tuple[Pcm, Frames | None, tuple[str, ...]]:
        """The next unit of at most `limit` frames: its audio, its speech, its flags."""
        if self._speech is None:
            audio = np.atleast_2d(self._joined()[..., : limit * VAD_FRAME])
            loudness = np.sum([energy(channel) for channel in audio], axis=0)
            return *self._split(lowest(loudness, 2 * limit // 3, limit)), ()
        frame, hard = cut_frame(np.atleast_2d(self._speech)[:, :limit].max(axis=0), limit)
        return *self._split(frame), (HARD_CUT,) if hard else ()

    def take_rest(self) -> tuple[Pcm, Frames | None, tuple[str, ...]]:
        return *self._split(-(-self._n_samples // VAD_FRAME)), ()

    def _hear(self, found: list[Frames]) -> None:
        frames = found[0] if len(found) == 1 else np.stack(found)
        self._speech = frames if self._speech is None else np.concatenate([self._speech, frames], axis=-1)

    def _split(self, frame: int) -> tuple[Pcm, Frames | None]:
        audio, at = self._joined(), frame * VAD_FRAME
        # Copies: a Unit that is a view would keep what follows it alive, and the other way round.
        self._blocks = [audio[..., at:].copy()]
        self._n_samples = self._blocks[0].shape[-1]
        if self._speech is None:
            return audio[..., :at].copy(), None
        speech, self._speech = self._speech[..., :frame].copy(), self._speech[..., frame:]
        heard = believed(speech) if speech.ndim == 1 else np.stack([believed(channel) for channel in speech])
        return audio[..., :at].copy(), heard

    def _joined(self) -> Pcm:
        if len(self._blocks) != 1:
            self._blocks = [np.concatenate(self._blocks, axis=-1) if self._blocks else np.zeros(0, np.int16)]
        return self._blocks[0]
