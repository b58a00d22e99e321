"""Which segments of which recordings are wanted: thresholds over the columns of the public tables. Pure.

`training` is the recipe for training data; the README has the same as a query, and a test that both select the same.
A criterion that is None, or empty, selects everything. Whether a value that was stored as float32 passes is asked in
float32, as a query does it: a `compression_ratio` of 2.4 passes `<= 2.4`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.types import Segment, Transcript, seconds

ANY = "any"  # as the name of a flag: all of them

Rows = Mapping[str, NDArray[np.int64] | None]  # recording → its segments' numbers; None: all of them


@dataclass(frozen=True, slots=True)
class Selection:
    """What must hold for a segment, and for the recording that it is of."""

    min_avg_logprob: float | None = None
    max_compression_ratio: float | None = None
    max_no_speech_prob: float | None = None
    min_duration_s: float | None = None  # of a segment
    max_duration_s: float | None = None
    languages: tuple[str, ...] = ()  # the segment's is one of them
    exclude_flags: tuple[str, ...] = ()  # of the segment; "any": it has none at all
    exclude_recording_flags: tuple[str, ...] = ()
    max_uncovered_fraction: float | None = None  # uncovered_speech_s / speech_s of the recording
    rows: Rows | None = None  # chosen elsewhere, by a query say

    def keep(self, transcript: Transcript, left_out: Counter[str]) -> tuple[int, ...]:
        """The numbers (`segment_id`) of the segments that pass; the others are counted by what they failed first."""
        reason = self._against_recording(transcript)
        if reason is not None:
            left_out[reason] += len(transcript.segments)
            return ()
        checks = list(self._checks(transcript))
        kept = []
        for number, segment in enumerate(transcript.segments):
            reason = next((name for name, passes in checks if not passes(number, segment)), None)
            if reason is None:
                kept.append(number)
            else:
                left_out[reason] += 1
        return tuple(kept)

    @property
    def is_all(self) -> bool:
        return self == Selection()

    def _against_recording(self, transcript: Transcript) -> str | None:
        if self.rows is not None and transcript.recording.id not in self.rows:
            return "rows"
        if _flagged(transcript.flags, self.exclude_recording_flags):
            return "exclude_recording_flags"
        uncovered, speech = seconds(transcript.uncovered_speech or 0), seconds(transcript.speech or 0)
        if self.max_uncovered_fraction is not None and uncovered > self.max_uncovered_fraction * speech:
            return "max_uncovered_fraction"
        return None

    def _checks(self, transcript: Transcript) -> Iterator[tuple[str, Callable[[int, Segment], bool]]]:
        """(name, whether a segment passes) of each criterion that was set."""
        chosen = self.rows[transcript.recording.id] if self.rows is not None else None
        if chosen is not None:
            numbers = set(chosen.tolist())
            yield "rows", lambda number, segment: number in numbers
        if self.min_avg_logprob is not None:
            least = single(self.min_avg_logprob)
            yield "min_avg_logprob", lambda number, segment: segment.avg_logprob >= least
        for name, column, most in (
            ("max_compression_ratio", "compression_ratio", self.max_compression_ratio),
            ("max_no_speech_prob", "no_speech_prob", self.max_no_speech_prob),
        ):
            if most is not None:
                yield name, _at_most(column, single(most))
        shortest, longest = self.min_duration_s, self.max_duration_s
        if shortest is not None:
            yield "min_duration_s", lambda number, segment: segment.end - segment.start >= shortest
        if longest is not None:
            yield "max_duration_s", lambda number, segment: segment.end - segment.start <= longest
        if self.languages:
            yield "languages", lambda number, segment: segment.language in self.languages
        if self.exclude_flags:
            yield "exclude_flags", lambda number, segment: not _flagged(segment.flags, self.exclude_flags)


TRAINING = Selection(
    min_avg_logprob=-0.7,
    max_compression_ratio=2.4,  # the reference's own limit: above it text repeats itself
    max_no_speech_prob=0.6,
    min_duration_s=0.5,
    max_duration_s=30.0,  # an encoder's input
    # Not those that only tell how a text came about, such as `tail_redecoded` and `language_switched`.
    exclude_flags=("repetition", "low_confidence", "invented_on_silence", "language_mismatch"),
    exclude_recording_flags=("language_mismatch",),
    max_uncovered_fraction=0.1,
)
PRESETS = {"training": TRAINING}


def single(value: float) -> float:
    """`value` as float32, in the digits that tell it from its neighbours: 0.1 is 0.1, not 0.10000000149."""
    return float(str(np.float32(value)))


def _at_most(column: str, most: float) -> Callable[[int, Segment], bool]:
    def passes(number: int, segment: Any) -> bool:
        return bool(getattr(segment, column) <= most)

    return passes


def _flagged(flags: tuple[str, ...], unwanted: tuple[str, ...]) -> bool:
    return bool(flags) if ANY in unwanted else not set(unwanted).isdisjoint(flags)
