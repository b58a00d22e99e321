"""Stitching: times in place, every sample accounted for, and speech without text is seen."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from speech import frames, pcm_at, talk

from pipeline.stitch import UNCOVERED, failed_unit, stitch, stitch_unit
from pipeline.types import (
    SAMPLE_RATE,
    VAD_FRAME,
    DecodeOptions,
    Failure,
    Hypothesis,
    Plan,
    Range,
    Recording,
    Segment,
    Skip,
    Unit,
    UnitResult,
    Word,
)
from pipeline.vad import SURE_SPEECH, Frames, detect
from pipeline.windows import plan

RECORDING = Recording("a", "a.wav")
FAILURE = Failure("engine", "it broke", "engine", 2)


def said(start: float, end: float, text: str = " word", **more: object) -> Segment:
    segment = Segment(
        start=start,
        end=end,
        text=text,
        tokens=(1,),
        avg_logprob=-0.1,
        compression_ratio=1.0,
        no_speech_prob=0.0,
        temperature=0.0,
    )
    return replace(segment, **more)  # type: ignore[arg-type]


def answer(*segments: Segment, language: str | None = "en", **more: int) -> Hypothesis:
    return Hypothesis(segments, language, 0.9 if language else None, **more)


def unit_of(
    seconds: float = 0, *, start_s: float = 0, speech: Frames | None = None, index: int = 0, is_last: bool = True
) -> Unit:
    n = len(speech) * VAD_FRAME if speech is not None else round(seconds * SAMPLE_RATE)
    return Unit(RECORDING, index, round(start_s * SAMPLE_RATE), np.zeros(n, np.int16), is_last, speech)


def spans(*bounds_s: tuple[float, float]) -> Plan:
    return Plan(tuple(Range(round(a * SAMPLE_RATE), round(b * SAMPLE_RATE)) for a, b in bounds_s), ())


def times(result: UnitResult) -> list[tuple[float, float]]:
    return [(segment.start, segment.end) for segment in result.segments]


# Spans of 0 to 10 s and 20 to 30 s in a unit that begins at 100 s.
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([(0, 2), (2, 10)], [(0.5, 1)], [(100, 102), (102, 110), (120.5, 121)]),
        ([(9, 12)], [(0, 29.98)], [(109, 110), (120, 130)]),  # the engine pads beyond a span
        ([(11, 12)], [], [(110, 110)]),  # wholly beyond it
        ([(3, 2)], [], [(103, 103)]),  # no end before its start
        ([(5, 6), (4, 8), (4.5, 5)], [], [(105, 106), (105, 108), (105, 105)]),  # starts never go back
        ([(-1, 1)], [(-1, 1)], [(100, 101), (120, 121)]),
        ([(1.1, 2.2)], [(0.1 + 0.2, 1.1)], [(101.1, 102.2), (120.3, 121.1)]),  # not 120.30000000000001
    ],
)
def test_times_are_absolute_inside_their_span_and_in_order(
    first: list[tuple[float, float]], second: list[tuple[float, float]], expected: list[tuple[float, float]]
) -> None:
    answers = [answer(*(said(*pair) for pair in pairs)) for pairs in (first, second)]
    result = stitch_unit(unit_of(30, start_s=100), spans((0, 10), (20, 30)), answers)
    assert times(result) == expected


def test_words_move_with_their_segment() -> None:
    words = (Word(" a", -0.5, 0.2, 0.9), Word(" b", 0.2, 0.1, 0.9), Word(" c", 0.1, 99, 0.8))
    result = stitch_unit(unit_of(10, start_s=50), spans((0, 10)), [answer(said(0.1, 3, words=words))])
    moved = [(word.word, word.start, word.end) for word in result.segments[0].words]
    assert moved == [(" a", 50.0, 50.2), (" b", 50.2, 50.2), (" c", 50.2, 60)], "a first word may lead its segment"


def test_a_segment_without_text_is_left_out_and_covers_nothing() -> None:
    result = stitch_unit(unit_of(speech=frames("100#")), spans((0, 3.2)), [answer(said(0, 3, ""), said(0, 3, " \n"))])
    assert result.segments == ()
    assert result.uncovered_speech == result.speech == 100 * VAD_FRAME
    assert UNCOVERED in result.flags


def test_languages() -> None:
    answers = [
        answer(said(0, 1), language=None),
        answer(said(0, 1), said(1, 2, language="de", language_probability=0.5), language="es"),
    ]
    result = stitch_unit(unit_of(20), spans((0, 10), (10, 20)), answers)
    assert [(s.language, s.language_probability) for s in result.segments] == [(None, None), ("es", 0.9), ("de", 0.5)]
    assert (result.language, result.language_probability) == ("es", 0.9)
    assert stitch_unit(unit_of(10), spans((0, 10)), [answer(language=None)]).language is None


def test_counts_are_summed_and_the_units_own_facts_kept() -> None:
    unit = replace(unit_of(20, start_s=7, index=3, is_last=False), flags=("hard_cut",))
    answers = [
        answer(n_windows=2, n_fallbacks=1, tokens_generated=10, tokens_input=3),
        answer(n_windows=1, n_fallbacks=5, tokens_generated=7, tokens_input=4),
    ]
    planned = replace(spans((0, 5), (10, 20)), skipped=(Skip(5 * SAMPLE_RATE, 10 * SAMPLE_RATE, "silence"),))
    result = stitch_unit(unit, planned, answers)
    assert (result.n_windows, result.n_fallbacks, result.tokens_generated, result.tokens_input) == (3, 6, 17, 7)
    assert (result.index, result.is_last, result.start, result.n_samples) == (
        3,
        False,
        7 * SAMPLE_RATE,
        20 * SAMPLE_RATE,
    )
    assert result.skipped == (Skip(12 * SAMPLE_RATE, 17 * SAMPLE_RATE, "silence"),)
    assert result.flags == ("hard_cut",)
    assert (result.speech, result.uncovered_speech) == (None, None)


@pytest.mark.parametrize("n_answers", [0, 1, 3])
def test_an_answer_for_every_span(n_answers: int) -> None:
    with pytest.raises(ValueError, match=f"{n_answers} hypotheses for 2 spans"):
        stitch_unit(unit_of(20), spans((0, 10), (10, 20)), [answer()] * n_answers)


def test_an_empty_unit_is_an_empty_result() -> None:
    result = stitch_unit(unit_of(speech=frames("")), Plan((), ()), [])
    assert (result.n_samples, result.speech, result.uncovered_speech, result.flags) == (0, 0, 0, ())


# One unit of one span; frames are 32 ms, so 100 of them are 3.2 s; a segment covers 0.3 s (10 frames) around it.
@pytest.mark.parametrize(
    ("drawing", "segments", "uncovered", "flagged"),
    [
        ("100#", [(0, 3.2)], 0, False),
        ("100.", [], 0, False),
        ("100?", [], 0, False),  # doubtful speech is owed no text
        ("7#", [], 7, False),  # too little for a word
        ("8#", [], 8, True),  # a word, and the span has no text at all
        ("100#", [(0.3, 2.9)], 0, False),
        ("100#", [(0, 2.0)], 28, False),  # 2.3 s are covered, to the end of that frame
        ("100#", [(0, 1.6)], 40, True),
        ("31# 50. 31#", [(2.7, 4)], 31, True),
        ("30# 50. 31#", [(2.7, 4)], 30, False),
        ("20# 30. 11# 50. 31#", [(3.7, 5)], 31, True),  # a short pause does not hide it
        ("20# 31. 20# 50. 31#", [(4, 6)], 40, False),  # uncovered, but nowhere a second together
    ],
)
def test_uncovered_speech(drawing: str, segments: list[tuple[float, float]], uncovered: int, flagged: bool) -> None:
    speech = frames(drawing)
    unit = unit_of(speech=speech, start_s=64)
    planned = Plan((Range(0, unit.n_samples),), ())
    result = stitch_unit(unit, planned, [answer(*(said(*pair) for pair in segments))])
    assert result.speech == (speech >= SURE_SPEECH).sum() * VAD_FRAME
    assert result.uncovered_speech == uncovered * VAD_FRAME
    assert (UNCOVERED in result.flags) == flagged


# 94 frames, 3 s, of sure speech; the segment ends after 1 s, where the alignment put the words it found no time for.
@pytest.mark.parametrize(
    ("lengths", "uncovered"),
    [
        ([0.5, 0.5], 53),  # none: 1.3 s are covered, to the end of that frame
        ([0.5, 0.4, 0.06], 53),  # short, but it has been placed
        ([0.5, 0.5, 0.0], 40),  # " word" takes 0.42 s
        ([0.5, 0.5, 0.0, 0.04, 0.0], 14),
        ([0.5, 0.5, 0.0, 0.0, 0.0, 0.0], 1),
        ([0.5, 0.0, 0.0, 0.5], 53),  # inside the segment it makes no difference
        ([], 53),
    ],
)
def test_words_that_were_given_no_time_cover_the_speech_that_follows(lengths: list[float], uncovered: int) -> None:
    def word(at: float, length: float) -> Word:
        return Word(" word", at, at + length, 0.5)

    starts = np.concatenate([[0.0], np.cumsum(lengths)])
    words = tuple(word(min(float(at), 1.0), length) for at, length in zip(starts, lengths, strict=False))
    unit = unit_of(speech=frames("94#"))
    result = stitch_unit(unit, Plan((Range(0, unit.n_samples),), ()), [answer(said(0, 1, words=words))])
    assert result.uncovered_speech == uncovered * VAD_FRAME
    assert (UNCOVERED in result.flags) == (uncovered >= 31)
    assert result.segments[0].end == 1.0, "times stay the engine's"


def test_first_words_that_were_given_no_time_cover_the_speech_before() -> None:
    words = (*(Word(" word", 2.0, 2.0, 0.5) for _ in range(4)), Word(" word", 2.0, 3.0, 0.5))
    unit = unit_of(speech=frames("94#"))
    result = stitch_unit(unit, Plan((Range(0, unit.n_samples),), ()), [answer(said(2, 3, words=words))])
    assert result.uncovered_speech == 1 * VAD_FRAME


@pytest.mark.parametrize(("n_samples", "speech"), [(1, 1), (VAD_FRAME + 1, VAD_FRAME + 1), (2 * VAD_FRAME, 1024)])
def test_a_short_last_frame_counts_its_samples_only(n_samples: int, speech: int) -> None:
    unit = replace(unit_of(speech=frames("2#")[: -(-n_samples // VAD_FRAME)]), pcm=np.zeros(n_samples, np.int16))
    result = stitch_unit(unit, Plan((Range(0, n_samples),), ()), [answer()])
    assert (result.speech, result.uncovered_speech) == (speech, speech)
    assert failed_unit(unit, FAILURE).uncovered_speech == speech


def test_a_failed_unit_is_skipped_whole() -> None:
    unit = replace(unit_of(speech=frames("10# 10."), start_s=64, index=2, is_last=False), flags=("x",))
    result = failed_unit(unit, FAILURE)
    assert result.skipped == (Skip(unit.start, unit.start + unit.n_samples, "engine"),)
    assert (result.speech, result.uncovered_speech) == (10 * VAD_FRAME, 10 * VAD_FRAME)
    assert (result.index, result.is_last, result.flags, result.failure) == (2, False, ("x",), FAILURE)
    assert failed_unit(unit_of(0), FAILURE).skipped == ()


# --- whole recordings ---------------------------------------------------------------------------------------------


def results(*lengths: int, last: int | None = None) -> list[UnitResult]:
    """Results of consecutive units with these many samples."""
    starts = np.cumsum([0, *lengths])
    last = len(lengths) - 1 if last is None else last
    return [
        UnitResult(RECORDING, index, index == last, int(start), n)
        for index, (start, n) in enumerate(zip(starts, lengths, strict=False))
    ]


def test_units_in_any_order_make_one_transcript() -> None:
    units = [
        replace(
            result,
            segments=(said(i, i + 0.5, f" {i}"),),
            flags=flags,
            language=language,
            language_probability=0.1 * i,
            speech=speech,
            uncovered_speech=speech,
            n_windows=1,
            n_fallbacks=2,
            tokens_generated=3,
            tokens_input=4,
        )
        for i, (result, flags, language, speech) in enumerate(
            zip(results(10, 20, 30), [("b",), ("a", "b"), ("c",)], [None, "de", "en"], [5, None, 7], strict=True)
        )
    ]
    one, two, three = units
    transcript = stitch([three, one, two])
    assert transcript == stitch(units)
    assert (transcript.status, transcript.failure, transcript.duration) == ("ok", None, 60)
    assert transcript.text == "0 1 2"
    assert (transcript.language, transcript.language_probability) == ("de", 0.1)
    assert transcript.flags == ("b", "a", "c")
    assert (transcript.speech, transcript.uncovered_speech) == (12, 12)
    assert (transcript.n_windows, transcript.n_fallbacks) == (3, 6)
    assert (transcript.tokens_generated, transcript.tokens_input) == (9, 12)


def test_a_failed_unit_fails_the_recording_and_keeps_the_rest() -> None:
    first, second, third, fourth = results(10, 20, 30, 0)
    first = replace(first, segments=(said(0, 1, " kept"),), skipped=(Skip(2, 5, "silence"),))
    second = replace(second, failure=FAILURE)
    third = replace(third, failure=Failure("worker_crash", "later", "engine"))
    fourth = replace(fourth, failure=Failure("source", "lost", "decode"))
    transcript = stitch([fourth, third, second, first])
    assert (transcript.status, transcript.failure) == ("failed", FAILURE)
    assert transcript.skipped == (Skip(2, 5, "silence"), Skip(10, 30, "engine"), Skip(30, 60, "worker_crash"))
    assert transcript.text == "kept"
    assert transcript.speech is None
    assert transcript.duration - transcript.n_skipped == 7


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([], "without units"),
        (results(10, 20, 30)[1:], "missing or doubled"),
        (results(10, 20, 30)[::2], "missing or doubled"),
        (results(10, 20, 30)[:2], "marked"),
        ([*results(10, 20), results(10, 20)[1]], "missing or doubled"),
        (results(10, 20, 30, last=1), "marked"),
        ([results(10, 20)[0], replace(results(10, 20)[1], start=11)], "starts at 11, not 10"),
        ([replace(results(10)[0], start=1)], "starts at 1, not 0"),
        ([results(10, 20)[0], replace(results(10, 20)[1], recording=Recording("b", "b.wav"))], "several recordings"),
    ],
)
def test_units_that_do_not_make_a_recording_are_refused(units: list[UnitResult], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stitch(units)


@pytest.mark.parametrize("seed", range(20))
def test_decoded_and_skipped_are_the_duration_to_a_sample(seed: int) -> None:
    draw = np.random.default_rng(seed)
    runs = [np.full(draw.integers(1, 200), draw.choice([0, 255])) for _ in range(40)]
    speech = np.concatenate(runs).astype(np.uint8)
    n_samples = len(speech) * VAD_FRAME - int(draw.integers(0, VAD_FRAME))
    bounds = [0, *np.sort(draw.integers(1, len(speech), 4)) * VAD_FRAME, n_samples]
    done, decoded = [], 0
    for index, (start, stop) in enumerate(pairwise(bounds)):
        part = speech[start // VAD_FRAME : -(-stop // VAD_FRAME)]
        unit = Unit(RECORDING, index, int(start), np.zeros(stop - start, np.int16), stop == n_samples, part)
        planned = plan(unit, DecodeOptions(chunk_length_s=5))
        if draw.random() < 0.3:
            done.append(failed_unit(unit, FAILURE))
        else:
            done.append(stitch_unit(unit, planned, [answer()] * len(planned.spans)))
            decoded += sum(span.n_samples for span in planned.spans)
    transcript = stitch(done)
    assert transcript.duration == n_samples
    assert transcript.n_skipped + decoded == n_samples
    ends = [0] + [skip.stop for skip in transcript.skipped]
    assert all(
        skip.start >= end and skip.stop > skip.start for skip, end in zip(transcript.skipped, ends, strict=False)
    )
    assert transcript.speech == (speech >= SURE_SPEECH).sum() * VAD_FRAME - (
        len(speech) * VAD_FRAME - n_samples if speech[-1] else 0
    )


# --- what the flag is for -----------------------------------------------------------------------------------------


def transcribed(unit: Unit, lost: np.random.Generator, chunk_length_s: int) -> tuple[UnitResult, bool]:
    """A unit as an engine would answer that hears all speech but says nothing for a tenth of the spans, and whether
    one of those held speech."""
    assert unit.speech is not None
    planned = plan(unit, DecodeOptions(chunk_length_s=chunk_length_s))
    answers, affected = [], False
    for span in planned.spans:
        sure = np.flatnonzero(unit.speech[span.start // VAD_FRAME : -(-span.stop // VAD_FRAME)] >= SURE_SPEECH)
        if lost.random() < 0.1:
            answers.append(answer())
            affected |= len(sure) > 0
        elif len(sure):
            heard = said(sure[0] * 0.032 + 0.2, sure[-1] * 0.032 - 0.2)  # timestamps that are a little tight
            answers.append(answer(heard))
        else:
            answers.append(answer())
    return stitch_unit(unit, planned, answers), affected


@pytest.fixture(scope="module")
def recordings() -> list[Unit]:
    """60 recordings of 5 to 60 s of synthetic speech, with pauses of up to 3 s, one unit each."""
    pcm, draw = pcm_at(talk(20)[0], -6), np.random.default_rng(1)
    speech, found = detect(pcm), []
    for _ in range(60):
        first, n_frames = int(draw.integers(0, len(speech) - 160)), int(draw.integers(160, 1900))
        part = pcm[first * VAD_FRAME :][: n_frames * VAD_FRAME]
        found.append(Unit(RECORDING, 0, 0, part, is_last=True, speech=speech[first:][:n_frames]))
    return found


@pytest.mark.parametrize("chunk_length_s", [1, 10, 30])
def test_recordings_with_emptied_windows_are_flagged_and_others_are_not(
    recordings: list[Unit], chunk_length_s: int
) -> None:
    lost = np.random.default_rng(0)
    answered = [transcribed(unit, lost, chunk_length_s) for unit in recordings]
    flags = [UNCOVERED in stitch([result]).flags for result, _ in answered]
    affected = [hit for _, hit in answered]
    assert sum(affected) >= 10
    assert sum(flag for flag, hit in zip(flags, affected, strict=True) if hit) >= 0.95 * sum(affected)
    assert affected.count(False) >= 5
    assert not any(flag for flag, hit in zip(flags, affected, strict=True) if not hit)
