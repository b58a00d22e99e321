"""Channels transcribed apart (`channels: split`): a Unit of several to Units of one, and their results back to one.

A Unit is a range of time: its channels are cut at the same points, travel and are committed together, so indices,
starts and resume are those of `mix`. Each is planned and decoded as if it were alone. What comes back:

- Segments of all channels in order of their starts, at equal starts the lower channel first; so is the text.
- `skipped` is what no channel's decoder has looked at, so that decoded and skipped make the duration to the sample.
- Speech, covered or not, is summed over the channels: two who talk at once for a second are two seconds.
- Where one channel fails, the Unit fails: its time is lost as a whole, and a retry redoes it as a whole.
- The language is one for the recording, as with `mix`: of the first speech in any channel. `language: window` asks in
  every window, where the channels speak different ones.

Pure.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from pipeline.types import Pcm, Range, Skip, Unit, UnitResult
from pipeline.vad import MAYBE_SPEECH
from pipeline.windows import language_slice

_TAG = "channel "  # a flag that a channel's Unit has on its way through an engine


def split(unit: Unit) -> list[Unit]:
    """A Unit for each channel, in their order; of one channel the Unit itself."""
    if unit.pcm.ndim == 1:
        return [unit]
    speech = [None] * len(unit.pcm) if unit.speech is None else unit.speech
    return [replace(unit, pcm=pcm, speech=its) for pcm, its in zip(unit.pcm, speech, strict=True)]


def merge(results: Sequence[UnitResult]) -> UnitResult:
    """The result of a Unit from those of its channels, in their order."""
    first = results[0]
    if len(results) == 1:
        return first
    failure = next((result.failure for result in results if result.failure is not None), None)
    stop = first.start + first.n_samples
    speech, uncovered = (_total(results, name) for name in ("speech", "uncovered_speech"))
    segments = [replace(segment, channel=channel) for channel, one in enumerate(results) for segment in one.segments]
    skipped = _common(results)
    if failure is not None:
        segments, skipped, uncovered = [], (Skip(first.start, stop, failure.kind),), speech
    return replace(
        first,
        segments=tuple(sorted(segments, key=lambda segment: (segment.start, segment.channel))),
        skipped=skipped,
        speech=speech,
        uncovered_speech=uncovered,
        language=next((one.language for one in results if one.language is not None), None),
        language_probability=next((one.language_probability for one in results if one.language is not None), None),
        n_windows=sum(one.n_windows for one in results),
        n_fallbacks=sum(one.n_fallbacks for one in results),
        tokens_generated=sum(one.tokens_generated for one in results),
        tokens_input=sum(one.tokens_input for one in results),
        flags=tuple(dict.fromkeys(flag for one in results for flag in one.flags)),
        failure=failure,
    )


def tagged(units: Iterable[Unit]) -> Iterator[Unit]:
    """The Units of all channels of `units`, so that `merged` can tell them apart."""
    for unit in units:
        for channel, one in enumerate(split(unit)):
            yield replace(one, flags=(f"{_TAG}{channel}", *unit.flags))


def merged(results: Iterable[UnitResult]) -> list[UnitResult]:
    """The results of the Units of one recording that `tagged` was given, from those of what it gave, in any order."""
    units: defaultdict[int, dict[int, UnitResult]] = defaultdict(dict)
    for result in results:
        tag, *flags = result.flags
        units[result.index][int(tag.removeprefix(_TAG))] = replace(result, flags=tuple(flags))
    return [merge([of_unit[channel] for channel in sorted(of_unit)]) for of_unit in units.values()]


def first_speech(unit: Unit) -> Pcm | None:
    """What the language of a Unit's recording is detected on, if nobody spoke before: of the channel that speaks first.

    Without a VAD, of the channel that is loudest.
    """
    units = split(unit)
    if unit.speech is None:
        return language_slice(max(units, key=lambda one: np.square(one.pcm, dtype=np.float64).sum()))
    slices = [(_first_frame(one), one) for one in units]
    _, earliest = min(slices, key=lambda pair: pair[0])
    return language_slice(earliest)


def _first_frame(unit: Unit) -> int:
    """Where the channel begins to speak; one that does not comes last."""
    at = np.flatnonzero(unit.speech >= MAYBE_SPEECH) if unit.speech is not None else np.zeros(0, np.intp)
    return int(at[0]) if len(at) else unit.n_samples + 1


def _total(results: Sequence[UnitResult], name: str) -> int | None:
    counts = [getattr(result, name) for result in results]
    return None if None in counts else sum(counts)


def _common(results: Sequence[UnitResult]) -> tuple[Skip, ...]:
    """What all of them have skipped; the reason is the first channel's."""
    common: list[Skip] = list(results[0].skipped)
    for result in results[1:]:
        common = [
            Skip(both.start, both.stop, skip.reason)
            for skip in common
            for other in result.skipped
            if (both := Range(max(skip.start, other.start), min(skip.stop, other.stop))).n_samples > 0
        ]
    return tuple(common)
