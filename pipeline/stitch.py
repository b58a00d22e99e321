"""What the engine answered, put back in its place: Hypotheses to a UnitResult, UnitResults to a Transcript. Pure.

Nothing vanishes here: `n_skipped` plus what was decoded is the duration to the sample, and speech that no text
covers is counted. What else may be doubted is flagged by the rules of `pipeline.flags`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from pipeline import flags
from pipeline.flags import COVERED_S, UNCOVERED
from pipeline.types import (
    SAMPLE_RATE,
    VAD_FRAME,
    Failure,
    Hypothesis,
    Plan,
    Range,
    Segment,
    Skip,
    Transcript,
    Unit,
    UnitResult,
    Word,
    seconds,
)
from pipeline.vad import SPOKEN, SURE_SPEECH, Frames, most_together, voiced_s

MARGIN = round(COVERED_S * SAMPLE_RATE)
# The flag is set where a span with EMPTY of sure speech has no text at all, or anywhere SPOKEN of it lies together and
# no segment covers it. In frames of 32 ms.
EMPTY = 8  # 0.26 s, a short word
UNPLACED_S = 0.05  # seconds: no word is that short
CHARACTERS_PER_S = 12  # of slow speech


def stitch_unit(unit: Unit, plan: Plan, hypotheses: Sequence[Hypothesis]) -> UnitResult:
    """The result of a Unit from the hypothesis of each of its plan's spans, in order.

    Times become absolute and are clipped to their span (the engine pads beyond it), starts never go back. Segments
    without text are left out; they cover nothing.
    """
    if len(hypotheses) != len(plan.spans):
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(plan.spans)} spans")
    placed = [place(unit, span, hypothesis) for span, hypothesis in zip(plan.spans, hypotheses, strict=True)]
    segments = tuple(segment for of_span in placed for segment in of_span)
    language = next((h for h in hypotheses if h.language is not None), None)
    result = UnitResult(
        recording=unit.recording,
        index=unit.index,
        is_last=unit.is_last,
        start=unit.start,
        n_samples=unit.n_samples,
        segments=segments,
        skipped=tuple(Skip(unit.start + s.start, unit.start + s.stop, s.reason) for s in plan.skipped),
        language=language.language if language else None,
        language_probability=language.language_probability if language else None,
        n_windows=sum(h.n_windows for h in hypotheses),
        n_fallbacks=sum(h.n_fallbacks for h in hypotheses),
        tokens_generated=sum(h.tokens_generated for h in hypotheses),
        tokens_input=sum(h.tokens_input for h in hypotheses),
        flags=unit.flags,
        attempts=unit.attempts,
    )
    if unit.speech is None:
        return result
    empty = [span for span, of_span in zip(plan.spans, placed, strict=True) if not of_span]
    return _with_coverage(result, unit.speech, empty)


def place(unit: Unit, span: Range, hypothesis: Hypothesis) -> tuple[Segment, ...]:
    """The segments of one span of a Unit's plan, as `stitch_unit` has them."""
    placed = _place(hypothesis, Range(unit.start + span.start, unit.start + span.stop))
    return tuple(replace(segment, flags=flags.of_segment(segment, _speech_s(segment, unit))) for segment in placed)


def failed_unit(unit: Unit, failure: Failure) -> UnitResult:
    """The result of a Unit that could not be read or decoded: all of it is skipped, its speech uncovered."""
    stop = unit.start + unit.n_samples
    speech = None if unit.speech is None else _n_samples(unit.speech >= SURE_SPEECH, unit.n_samples)
    return UnitResult(
        recording=unit.recording,
        index=unit.index,
        is_last=unit.is_last,
        start=unit.start,
        n_samples=unit.n_samples,
        skipped=(Skip(unit.start, stop, failure.kind),) if unit.n_samples else (),
        speech=speech,
        uncovered_speech=speech,
        flags=unit.flags,
        failure=failure,
        attempts=unit.attempts,
    )


def stitch(results: Sequence[UnitResult]) -> Transcript:
    """The Transcript of one recording from all its Units, given in any order.

    Failed if one of them is; the failure is the first one's. Raises `ValueError` where a Unit is missing, doubled or
    of another recording.
    """
    units = sorted(results, key=lambda result: result.index)
    _check_complete(units)
    language = next((unit for unit in units if unit.language is not None), None)
    failure = next((unit.failure for unit in units if unit.failure is not None), None)
    segments, flagged = flags.of_recording(
        [segment for unit in units for segment in unit.segments], (flag for unit in units for flag in unit.flags)
    )
    return Transcript(
        recording=units[0].recording,
        status="ok" if failure is None else "failed",
        segments=segments,
        language=language.language if language else None,
        language_probability=language.language_probability if language else None,
        duration=units[-1].start + units[-1].n_samples,
        skipped=tuple(skip for unit in units for skip in _skips(unit)),
        speech=_sum_known(unit.speech for unit in units),
        uncovered_speech=_sum_known(unit.uncovered_speech for unit in units),
        n_windows=sum(unit.n_windows for unit in units),
        n_fallbacks=sum(unit.n_fallbacks for unit in units),
        tokens_generated=sum(unit.tokens_generated for unit in units),
        tokens_input=sum(unit.tokens_input for unit in units),
        flags=flagged,
        failure=failure,
        attempts=max(unit.attempts for unit in units),
    )


def _place(hypothesis: Hypothesis, span: Range) -> Iterator[Segment]:
    """The segments with text of one span, in absolute time."""
    earliest = seconds(span.start)
    for segment in hypothesis.segments:
        if not segment.text.strip():
            continue
        start, end = _moved(segment.start, segment.end, span, earliest)
        earliest = start
        yield replace(
            segment,
            start=start,
            end=end,
            words=tuple(_place_words(segment.words, span)),
            language=hypothesis.language if segment.language is None else segment.language,
            language_probability=(
                hypothesis.language_probability if segment.language is None else segment.language_probability
            ),
        )


def _place_words(words: Iterable[Word], span: Range) -> Iterator[Word]:
    """A first word may begin a little before its segment: the reference leaves it so, and so do we."""
    earliest = seconds(span.start)
    for word in words:
        start, end = _moved(word.start, word.end, span, earliest)
        earliest = start
        yield replace(word, start=start, end=end)


def _moved(start: float, end: float, span: Range, earliest: float) -> tuple[float, float]:
    """Times relative to `span` as absolute ones: inside it, not before `earliest`, start <= end; whole milliseconds
    but for the span's own bounds."""
    offset, latest = seconds(span.start), seconds(span.stop)
    start = min(max(round(offset + start, 3), earliest), latest)
    return start, min(max(round(offset + end, 3), start), latest)


def _with_coverage(result: UnitResult, speech: Frames, empty: Sequence[Range]) -> UnitResult:
    """`result` with its speech counted, and flagged where too much of it has no text. `empty`: spans without any."""
    sure = speech >= SURE_SPEECH
    uncovered = sure & ~_covered(result.segments, result.start, len(speech))
    silent = any(sure[span.start // VAD_FRAME : -(-span.stop // VAD_FRAME)].sum() >= EMPTY for span in empty)
    flagged = silent or most_together(uncovered) >= SPOKEN
    return replace(
        result,
        speech=_n_samples(sure, result.n_samples),
        uncovered_speech=_n_samples(uncovered, result.n_samples),
        flags=tuple(dict.fromkeys((*result.flags, UNCOVERED))) if flagged else result.flags,
    )


def _speech_s(segment: Segment, unit: Unit) -> float | None:
    """Seconds in which somebody may speak within MARGIN of a segment's time, its unplaced words included."""
    if unit.speech is None:
        return None
    frames = _frames_of(segment, unit.start)
    return voiced_s(unit.speech[frames])


def _covered(segments: Sequence[Segment], unit_start: int, n_frames: int) -> NDArray[np.bool_]:
    """[n_frames] the frames that a segment, widened by MARGIN and by its unplaced words, touches."""
    covered = np.zeros(n_frames, np.bool_)
    for segment in segments:
        covered[_frames_of(segment, unit_start)] = True
    return covered


def _frames_of(segment: Segment, unit_start: int) -> slice:
    """The frames of its Unit that a segment, widened by MARGIN and by its unplaced words, touches."""
    before, after = _unplaced(segment.words), _unplaced(segment.words[::-1])
    start = round((segment.start - before) * SAMPLE_RATE) - unit_start - MARGIN
    stop = round((segment.end + after) * SAMPLE_RATE) - unit_start + MARGIN
    return slice(max(0, start // VAD_FRAME), max(0, -(-stop // VAD_FRAME)))


def _unplaced(words: Sequence[Word]) -> float:
    """Seconds that the first of `words` took to say, if they were given next to no time.

    An alignment that loses its way puts the rest of a sentence at one point, and its end pulls the segment's there.
    """
    lost = takewhile(lambda word: word.end - word.start < UNPLACED_S, words)
    return sum(len(word.word) for word in lost) / CHARACTERS_PER_S


def _n_samples(frames: NDArray[np.bool_], n_samples: int) -> int:
    """Samples that the set frames hold; the last frame may be short."""
    short = len(frames) * VAD_FRAME - n_samples if len(frames) and frames[-1] else 0
    return int(frames.sum()) * VAD_FRAME - short


def _skips(unit: UnitResult) -> tuple[Skip, ...]:
    if unit.failure is None:
        return unit.skipped
    return (Skip(unit.start, unit.start + unit.n_samples, unit.failure.kind),) if unit.n_samples else ()


def _sum_known(counts: Iterable[int | None]) -> int | None:
    """The sum of the numbers among `counts`; None if there is none."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _check_complete(units: Sequence[UnitResult]) -> None:
    if not units:
        raise ValueError("a recording without units")
    name = units[0].recording.id
    if any(unit.recording.id != name for unit in units):
        raise ValueError(f"units of several recordings: {name!r} and others")
    if [unit.index for unit in units] != list(range(len(units))):
        raise ValueError(f"recording {name!r}: units {[unit.index for unit in units]}, some missing or doubled")
    if [unit.is_last for unit in units] != [False] * (len(units) - 1) + [True]:
        raise ValueError(f"recording {name!r}: the last of its {len(units)} units is not the one marked so")
    expected = 0
    for unit in units:
        if unit.start != expected:
            raise ValueError(f"recording {name!r}: unit {unit.index} starts at {unit.start}, not {expected}")
        expected += unit.n_samples
