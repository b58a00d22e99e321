"""A Unit to the spans of audio that are decoded, and the silence that is not. Pure; together they cover `[0, n)`.

With `windows` a span is contiguous audio of at most `chunk_length_s`, cut in a pause so that no word is halved:

    speech   ▆▆▆▂▆▆▆_▆▆▆▆▆▆__▆▆▆▆____________▆▆▆▆▆        _ below MAYBE_SPEECH
    spans    |    a         |   b  |  skip  |   c

Cuts are looked for in the last third of a span, at the latest pause of at least half a second, else at the longest
and deepest one of at least 100 ms. Where there is none the span goes on to the next pause, and the engine walks it
in windows. All bounds are multiples of VAD_FRAME, or n.

With `language: window` spans are phrases, cut in every pause of half a second: a speaker of another language begins
after one. The engine hears which language each is in, and joins those that belong together (`join`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.types import SAMPLE_RATE, VAD_FRAME, DecodeOptions, Pcm, Plan, Range, Skip, Unit
from pipeline.vad import MAYBE_SPEECH, SURE_SPEECH, Frames, runs

# In frames of 32 ms.
PAUSE = 4  # 0.13 s: the shortest run of frames that surely holds 100 ms
ENOUGH = 16  # 0.51 s: a pause between sentences; a longer one is no better to cut in
MARGIN = 7  # 0.22 s kept before and after speech
SILENCE = 63  # 2.02 s without speech are skipped
EDGE = 2  # a cut keeps this distance from speech
PHRASE = 47  # 1.5 s: less tells too little of a language

LANGUAGE_S = 30  # what language detection hears


@dataclass(frozen=True, slots=True)
class Pauses:
    """Runs of at least PAUSE frames without speech, in order: frames [start, stop), and how much quiet each holds."""

    start: NDArray[np.intp]
    stop: NDArray[np.intp]
    quiet: NDArray[np.intp]  # sum of (MAYBE_SPEECH - speech): long and deep is more

    def cut(self, first: int, last: int, enough: int = ENOUGH) -> int | None:
        """The best frame to cut at in [first, last]; None where no pause reaches into it.

        Of pauses with the quiet of `enough` silent frames the latest, else the one with the most quiet. Within the
        pause close to the speech that follows: 0.2 s before it, or the middle where the pause is shorter.
        """
        low, high = np.maximum(self.start + EDGE, first), np.minimum(self.stop - EDGE, last)
        possible = np.flatnonzero(low <= high)
        if not len(possible):
            return None
        worth = np.minimum(self.quiet[possible], enough * MAYBE_SPEECH)
        best = possible[np.flatnonzero(worth == worth.max())[-1]]
        wanted = max((self.start[best] + self.stop[best]) // 2, self.stop[best] - MARGIN + 1)
        return int(np.clip(wanted, low[best], high[best]))

    def next(self, first: int) -> int | None:
        """The earliest frame from `first` on at which a pause can be cut."""
        following = np.flatnonzero(self.stop - EDGE >= first)
        return self.cut(first, int(self.stop[following[0]])) if len(following) else None


def pauses(speech: Frames) -> Pauses:
    """All pauses of `speech`, [n_frames]."""
    start, stop = runs(speech < MAYBE_SPEECH)
    long = stop - start >= PAUSE
    quiet = np.concatenate([[0], np.cumsum(np.maximum(MAYBE_SPEECH - speech.astype(np.intp), 0))])
    start, stop = start[long], stop[long]
    return Pauses(start, stop, quiet[stop] - quiet[start])


def lowest(values: NDArray[np.integer], first: int, last: int) -> int:
    """The frame in [first, last] around which PAUSE consecutive values sum to least, the latest of equals."""
    sums = np.convolve(values.astype(np.int64), np.ones(PAUSE, np.int64))  # sums[i + 1]: the values [i - 2, i + 2)
    around = sums[first + 1 : min(last, len(values) - EDGE) + 2]
    return first + len(around) - 1 - int(np.argmin(around[::-1]))


def energy(pcm: Pcm) -> NDArray[np.int64]:
    """[ceil(n / VAD_FRAME)] sum of squares of each frame: how loud it is where no VAD says whether it is speech."""
    frames = np.pad(pcm, (0, -len(pcm) % VAD_FRAME)).reshape(-1, VAD_FRAME)
    # einsum widens in small buffers; two hours as int64 would be 0.9 GB.
    summed: NDArray[np.int64] = np.einsum("ij,ij->i", frames, frames, dtype=np.int64)
    return summed


def plan(unit: Unit, options: DecodeOptions) -> Plan:
    """The spans of `unit` to decode. `sequential`: all of it as one. Without a VAD nothing is skipped, and spans are
    cut at the quietest 0.13 s of their last third, be it in a word."""
    n_samples = unit.n_samples
    if not n_samples:
        return Plan((), ())
    if options.algorithm == "sequential":
        return Plan((Range(0, n_samples),), ())
    limit = options.chunk_length_s * SAMPLE_RATE
    if unit.speech is None:
        spans = list(_cut_by_energy(energy(unit.pcm), n_samples, limit))
    else:
        phrases = options.language == "window"
        spans = list(_cut_in_pauses(_checked(unit.speech, n_samples), n_samples, limit, phrases))
    return Plan(tuple(spans), tuple(_between(spans, n_samples)))


def join(spans: Sequence[Range], languages: Sequence[int], limit: int) -> list[range]:
    """Which spans, by index, make one: neighbours in one language, without a gap, of at most `limit` samples."""
    groups: list[range] = []
    for i, span in enumerate(spans):
        fits = (
            i > 0
            and languages[i] == languages[i - 1]
            and span.start == spans[i - 1].stop
            and span.stop - spans[groups[-1].start].start <= limit
        )
        groups[-1:] = [range(groups[-1].start, i + 1)] if fits else [*groups[-1:], range(i, i + 1)]
    return groups


def language_slice(unit: Unit) -> Pcm | None:
    """Up to 30 s of contiguous audio from 0.2 s before the unit's first speech; None if there is none.

    The first speech is where the first sure frame's run begins; a unit with doubtful speech only gives that. Without
    a VAD it is the unit's beginning.
    """
    if not unit.n_samples:
        return None
    first = 0 if unit.speech is None else _first_speech(unit.speech)
    if first is None:
        return None
    start = max(0, first - MARGIN) * VAD_FRAME
    return unit.pcm[start : start + LANGUAGE_S * SAMPLE_RATE].copy()


def _first_speech(speech: Frames) -> int | None:
    start, stop = runs(speech >= MAYBE_SPEECH)
    if not len(start):
        return None
    sure = np.flatnonzero(speech >= SURE_SPEECH)
    run = int(np.searchsorted(stop, sure[0], side="right")) if len(sure) else 0
    return int(start[run])


def _checked(speech: Frames, n_samples: int) -> Frames:
    if len(speech) != -(-n_samples // VAD_FRAME):
        raise ValueError(f"{len(speech)} speech frames for {n_samples} samples")
    return speech


def _cut_in_pauses(speech: Frames, n_samples: int, limit: int, phrases: bool = False) -> Iterator[Range]:
    """Spans with speech in them, in order; what lies between them is silence."""
    found = pauses(speech)
    for first, last in _regions(speech):
        stop = min(last * VAD_FRAME, n_samples)
        while True:
            cut = _end_of_phrase(found, first, last) if phrases else None
            if cut is None or (cut - first) * VAD_FRAME > limit:
                if stop - first * VAD_FRAME <= limit:
                    break
                cut = _next_cut(found, first, limit // VAD_FRAME)
            if cut is None or cut >= last:
                break
            if _speaks(speech[first:cut]):
                yield Range(first * VAD_FRAME, cut * VAD_FRAME)
            first = cut
        if _speaks(speech[first:last]):
            yield Range(first * VAD_FRAME, stop)


def _next_cut(found: Pauses, first: int, n_frames: int) -> int | None:
    """Where the span that begins at `first` ends: in its last third, else beyond its length at the next pause."""
    cut = found.cut(first + (2 * n_frames + 2) // 3, first + n_frames)
    return cut if cut is not None else found.next(first + n_frames + 1)


def _end_of_phrase(found: Pauses, first: int, last: int) -> int | None:
    """Where the first pause between sentences can be cut that leaves a phrase before it and another behind it."""
    fits = (found.stop - found.start >= ENOUGH) & (found.start >= first + PHRASE) & (found.stop <= last - PHRASE)
    at = np.flatnonzero(fits)
    return found.cut(int(found.start[at[0]]), int(found.stop[at[0]])) if len(at) else None


def _speaks(speech: Frames) -> bool:
    return bool((speech >= MAYBE_SPEECH).any())


def _regions(speech: Frames) -> Iterator[tuple[int, int]]:
    """Frames [first, last) between long silences, margins included."""
    n_frames = len(speech)
    start, stop = runs(speech < MAYBE_SPEECH)
    long = stop - start >= SILENCE
    # At either end of the unit there is no speech to keep a margin to.
    start = np.where(start > 0, start + MARGIN, 0)[long]
    stop = np.where(stop < n_frames, stop - MARGIN, n_frames)[long]
    for first, last in zip([0, *stop], [*start, n_frames], strict=True):
        if first < last:
            yield int(first), int(last)


def _cut_by_energy(loudness: NDArray[np.int64], n_samples: int, limit: int) -> Iterator[Range]:
    first, n_frames = 0, limit // VAD_FRAME
    while n_samples - first * VAD_FRAME > limit:
        cut = lowest(loudness, first + (2 * n_frames + 2) // 3, first + n_frames)
        yield Range(first * VAD_FRAME, cut * VAD_FRAME)
        first = cut
    yield Range(first * VAD_FRAME, n_samples)


def _between(spans: list[Range], n_samples: int) -> Iterator[Skip]:
    """What the spans leave of [0, n)."""
    bounds = [0, *(bound for span in spans for bound in (span.start, span.stop)), n_samples]
    for start, stop in zip(bounds[::2], bounds[1::2], strict=True):
        if start < stop:
            yield Skip(start, stop, "silence")


def n_windows(n_samples: int, options: DecodeOptions) -> int:
    """Encoder windows that so much audio takes, about."""
    return max(1, -(-n_samples // (options.chunk_length_s * SAMPLE_RATE)))
