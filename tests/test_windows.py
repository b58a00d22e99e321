"""Spans: they cover every sample with what is skipped, hold all speech, and no word is cut."""

from __future__ import annotations

import numpy as np
import pytest
from speech import frames, pcm_at, talk

from pipeline.types import SAMPLE_RATE, VAD_FRAME, DecodeOptions, Plan, Range, Recording, Unit
from pipeline.vad import MAYBE_SPEECH, Frames, detect
from pipeline.windows import MARGIN, PAUSE, SILENCE, energy, join, language_slice, lowest, pauses, plan

RECORDING = Recording("a", "a.wav")


def unit(speech: Frames | None, n_samples: int | None = None) -> Unit:
    """A unit of counted samples, as long as its speech if nothing else is said."""
    n = n_samples if n_samples is not None else len(speech if speech is not None else ()) * VAD_FRAME
    return Unit(RECORDING, 0, 0, np.arange(n).astype(np.int16), is_last=True, speech=speech)


def spans_of(drawing: str, chunk_length_s: int = 30) -> list[tuple[int, int]]:
    """Spans in frames."""
    planned = plan(unit(frames(drawing)), DecodeOptions(chunk_length_s=chunk_length_s))
    return [(span.start // VAD_FRAME, span.stop // VAD_FRAME) for span in planned.spans]


def check_cover(planned: Plan, n_samples: int) -> None:
    """Spans and skips, sorted, are exactly [0, n)."""
    parts = sorted([(r.start, r.stop) for r in planned.spans] + [(s.start, s.stop) for s in planned.skipped])
    assert all(start < stop for start, stop in parts)
    assert [0, *(stop for _, stop in parts)] == [*(start for start, _ in parts), n_samples]
    assert list(planned.spans) == sorted(planned.spans, key=lambda span: span.start)
    assert all(bound % VAD_FRAME == 0 or bound == n_samples for part in parts for bound in part)


# 30 s are 937.5 frames, their last third begins at frame 625; 1 s is 31.25 frames.
@pytest.mark.parametrize(
    ("drawing", "expected"),
    [
        ("", []),
        ("1.", []),  # no speech at all: nothing to decode, however short
        ("1#", [(0, 1)]),
        ("1?", [(0, 1)]),  # doubtful speech is decoded
        ("5000.", []),
        ("937#", [(0, 937)]),
        ("62. 5# 62.", [(0, 129)]),  # pauses just below 2 s stay
        ("63. 5# 63.", [(56, 75)]),  # and at 2.02 s they are skipped but for 0.22 s
        ("5# 62. 5#", [(0, 72)]),
        ("5# 63. 5#", [(0, 12), (61, 73)]),
        ("5# 30. 1? 31. 5#", [(0, 72)]),  # one doubtful frame divides a silence
        ("700# 10. 300#", [(0, 705), (705, 1010)]),  # a short pause is cut in its middle
        ("700# 40. 300#", [(0, 734), (734, 1040)]),  # a longer one 0.2 s before what follows
        ("700# 4. 300#", [(0, 702), (702, 1004)]),  # the shortest pause
        ("700# 3. 300#", [(0, 1003)]),  # too short: the span goes on ...
        ("700# 3. 400# 5. 50#", [(0, 1105), (1105, 1158)]),  # ... to the next pause
        ("500# 30. 700#", [(0, 1230)]),  # a pause before the last third is none
        ("700# 20. 100# 16. 300#", [(0, 830), (830, 1136)]),  # of long pauses the latest
        ("700# 12. 100# 6. 300#", [(0, 706), (706, 1118)]),  # of short ones the longest
        ("700# 6. 100# 6. 300#", [(0, 809), (809, 1112)]),  # of equal ones the latest
        ("935# 20. 300#", [(0, 937), (937, 1255)]),  # the pause reaches into the window by two frames
        ("936# 20. 300#", [(0, 950), (950, 1256)]),  # by one only: on to the same pause, further in
        ("800# 20. 110# 40.", [(0, 937)]),
        ("900# 60.", [(0, 937)]),  # what is cut off at the end without speech is not decoded
    ],
)
def test_spans(drawing: str, expected: list[tuple[int, int]]) -> None:
    assert spans_of(drawing) == expected


@pytest.mark.parametrize(
    ("drawing", "expected"),
    [
        ("31#", [(0, 31)]),
        ("200#", [(0, 200)]),  # no word is cut, however short the window
        ("20# 5. 20# 5. 20#", [(0, 22), (22, 47), (47, 70)]),
        ("25# 4. 100# 4. 10#", [(0, 27), (27, 131), (131, 143)]),
    ],
)
def test_one_second_windows_run_on_to_a_pause(drawing: str, expected: list[tuple[int, int]]) -> None:
    assert spans_of(drawing, chunk_length_s=1) == expected


def test_a_deep_pause_is_better_than_a_doubtful_one() -> None:
    speech = frames("700# 12. 100# 12. 300#")
    speech[812:824] = MAYBE_SPEECH - 1
    assert plan(unit(speech), DecodeOptions()).spans[0].stop == 706 * VAD_FRAME


@pytest.mark.parametrize("n_samples", [30 * SAMPLE_RATE, 30 * SAMPLE_RATE - 1])
def test_what_fits_one_window_is_one_span(n_samples: int) -> None:
    speech = np.full(-(-n_samples // VAD_FRAME), 255, np.uint8)
    speech[700:730] = 0
    assert plan(unit(speech, n_samples), DecodeOptions()).spans == (Range(0, n_samples),)
    longer = plan(unit(speech, 30 * SAMPLE_RATE + 1), DecodeOptions())
    assert [span.stop for span in longer.spans] == [724 * VAD_FRAME, 30 * SAMPLE_RATE + 1]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("chunk_length_s", [1, 5, 30])
def test_plans_of_random_speech(seed: int, chunk_length_s: int) -> None:
    """Runs of speech and silence of many lengths; what must hold of every plan."""
    draw = np.random.default_rng(seed)
    n_runs, longest = int(draw.integers(1, 80)), int(draw.choice([5, 30, 100, 1500]))
    runs = [np.full(draw.integers(1, longest), draw.choice([0, 20, 25, 26, 60, 255])) for _ in range(n_runs)]
    speech = np.concatenate(runs).astype(np.uint8)
    n_samples = len(speech) * VAD_FRAME - int(draw.integers(0, VAD_FRAME))
    planned = plan(unit(speech, n_samples), DecodeOptions(chunk_length_s=chunk_length_s))
    check_cover(planned, n_samples)
    heard = speech >= MAYBE_SPEECH
    found = pauses(speech)
    for span in planned.spans:
        first, last = span.start // VAD_FRAME, -(-span.stop // VAD_FRAME)
        assert heard[first:last].any()
        n_frames = chunk_length_s * SAMPLE_RATE // VAD_FRAME
        if span.n_samples > chunk_length_s * SAMPLE_RATE:
            assert found.cut(first + -(-2 * n_frames // 3), first + n_frames) is None
        for bound in {first, last} - {0, len(speech)}:
            assert not heard[max(0, bound - 2) : bound + 2].any()
    for skip in planned.skipped:
        assert skip.reason == "silence"
        assert not heard[skip.start // VAD_FRAME : -(-skip.stop // VAD_FRAME)].any()
    assert all(len(run) < SILENCE for run in silences_inside(planned, heard))


def silences_inside(planned: Plan, heard: np.ndarray) -> list[np.ndarray]:
    """Runs of silent frames within spans."""
    runs = []
    for span in planned.spans:
        inside = heard[span.start // VAD_FRAME : -(-span.stop // VAD_FRAME)]
        edges = np.flatnonzero(np.diff(inside.astype(int))) + 1
        runs += [run for run in np.split(inside, edges) if not run[0]]
    return runs


@pytest.mark.parametrize("peak_dbfs", [-6, -60])
@pytest.mark.parametrize("chunk_length_s", [1, 5, 10, 30])
def test_no_spoken_word_is_lost_or_halved(chunk_length_s: int, peak_dbfs: float) -> None:
    audio, words = talk(20)
    pcm = pcm_at(audio, peak_dbfs)
    planned = plan(
        Unit(RECORDING, 0, 0, pcm, is_last=True, speech=detect(pcm)), DecodeOptions(chunk_length_s=chunk_length_s)
    )
    check_cover(planned, len(pcm))
    decoded = np.zeros(len(pcm), bool)
    for span in planned.spans:
        decoded[span.start : span.stop] = True
    assert [word for word in words if not decoded[word.start : word.stop].all()] == []
    bounds = {bound for span in planned.spans for bound in (span.start, span.stop)} - {0, len(pcm)}
    assert len(bounds) > 2
    # espeak counts the pause after a word to it, so sound tells: none in the 32 ms around a cut.
    assert max(np.abs(audio[max(0, bound - 256) : bound + 256]).max() for bound in bounds) < 0.02


def test_sequential_is_one_span_with_nothing_skipped() -> None:
    planned = plan(unit(frames("100# 500. 100# 3000.")), DecodeOptions(algorithm="sequential"))
    assert planned == Plan((Range(0, 3700 * VAD_FRAME),), ())


@pytest.mark.parametrize("algorithm", ["windows", "sequential"])
@pytest.mark.parametrize("speech", [None, np.zeros(0, np.uint8)], ids=["no vad", "vad"])
def test_nothing_plans_to_nothing(algorithm: str, speech: Frames | None) -> None:
    assert plan(unit(speech, 0), DecodeOptions(algorithm=algorithm)) == Plan((), ())  # type: ignore[arg-type]


@pytest.mark.parametrize("n_samples", [1, 511, 480_000, 480_001, 2_000_003])
def test_without_a_vad_nothing_is_skipped_and_cuts_are_where_it_is_quiet(n_samples: int) -> None:
    pcm = np.random.default_rng(2).normal(0, 3000, n_samples).astype(np.int16)
    quiet = np.arange(0, n_samples, 25 * SAMPLE_RATE)[1:]  # a faint 0.2 s in every window's last third
    for at in quiet:
        pcm[at : at + SAMPLE_RATE // 5] //= 100
    planned = plan(Unit(RECORDING, 0, 0, pcm, is_last=True), DecodeOptions())
    check_cover(planned, n_samples)
    assert planned.skipped == ()
    assert all(span.n_samples <= 30 * SAMPLE_RATE for span in planned.spans)
    inner = [span.stop for span in planned.spans[:-1]]
    assert len(inner) == -(-(n_samples - 30 * SAMPLE_RATE) // (25 * SAMPLE_RATE)) or not inner
    assert all(at + 1024 <= cut <= at + SAMPLE_RATE // 5 - 512 for at, cut in zip(quiet, inner, strict=False))


def test_one_second_windows_without_a_vad_are_one_second() -> None:
    planned = plan(unit(None, 100_000), DecodeOptions(chunk_length_s=1))
    check_cover(planned, 100_000)
    assert max(span.n_samples for span in planned.spans) <= SAMPLE_RATE


def test_speech_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="3 speech frames for 2048 samples"):
        plan(unit(frames("3#"), 2048), DecodeOptions())


@pytest.mark.parametrize(
    ("values", "first", "last", "expected"),
    [
        ([9, 9, 0, 0, 0, 0, 9, 9], 2, 8, 4),
        ([9, 0, 0, 0, 0, 0, 0, 9], 2, 8, 5),  # the latest of equals
        ([9, 9, 9, 9, 9, 9, 0, 0], 2, 8, 6),  # four whole frames, not two at the edge
        ([5, 5, 5, 5, 5, 5, 5, 5], 2, 4, 4),
        ([1, 1, 1, 1, 9, 9, 9, 9], 4, 5, 4),
    ],
)
def test_lowest(values: list[int], first: int, last: int, expected: int) -> None:
    assert lowest(np.array(values, np.uint8), first, last) == expected


def test_energy_does_not_overflow() -> None:
    assert energy(np.full(513, -32768, np.int16)).tolist() == [512 << 30, 1 << 30]


@pytest.mark.parametrize(
    ("drawing", "start", "n_frames"),
    [
        ("20. 30#", 13, 37),
        ("3. 30#", 0, 33),  # no more audio before it
        ("20. 2? 30. 5? 30# 100.", 45, 142),  # from the first sure speech's own beginning
        ("20. 2? 30.", 13, 39),  # doubtful speech where there is no other
        ("20. 2000#", 13, 30 * SAMPLE_RATE / VAD_FRAME),
    ],
)
def test_language_slice(drawing: str, start: int, n_frames: float) -> None:
    a_unit = unit(frames(drawing))
    heard = language_slice(a_unit)
    assert heard is not None
    np.testing.assert_array_equal(heard, a_unit.pcm[start * VAD_FRAME :][: int(n_frames * VAD_FRAME)])
    assert not np.shares_memory(heard, a_unit.pcm)


def test_language_slice_without_a_vad_is_the_beginning() -> None:
    a_unit = unit(None, 40 * SAMPLE_RATE)
    np.testing.assert_array_equal(language_slice(a_unit), a_unit.pcm[: 30 * SAMPLE_RATE])


@pytest.mark.parametrize(
    "empty", [unit(frames("")), unit(frames("50.")), unit(None, 0)], ids=["0", "silence", "no vad"]
)
def test_no_language_without_speech(empty: Unit) -> None:
    assert language_slice(empty) is None


def test_margins_and_pauses_are_what_the_contract_asks() -> None:
    assert (PAUSE - 1) * VAD_FRAME < 0.1 * SAMPLE_RATE <= (PAUSE - 1) * VAD_FRAME + VAD_FRAME
    assert MARGIN * VAD_FRAME >= 0.2 * SAMPLE_RATE
    assert (SILENCE - 1) * VAD_FRAME < 2 * SAMPLE_RATE <= SILENCE * VAD_FRAME


# ---- `language: window`


PHRASES = DecodeOptions(chunk_length_s=10, language="window")


@pytest.mark.parametrize(
    ("drawing", "n_spans"),
    [
        ("100# 20. 100# 20. 60#", 3),  # 0.64 s of pause each
        ("100# 12. 100#", 1),  # 0.38 s: within a sentence
        ("30# 20. 100# 20. 30#", 1),  # the first and the last are too short for phrases of their own
        ("100# 20. 30# 20. 100#", 2),  # one in the middle belongs to what follows
        ("100# 70. 100#", 2),  # 2.2 s: silence, as ever
        ("700#", 1),  # running speech of 22 s
        ("100# 20. 700# 20. 100#", 3),
        ("250# 6. 250# 20. 100#", 3),  # a phrase of more than 10 s is cut as any other
        ("100.", 0),
    ],
)
def test_phrases_are_cut_in_every_pause(drawing: str, n_spans: int) -> None:
    one = unit(frames(drawing))
    planned = plan(one, PHRASES)
    assert len(planned.spans) == n_spans
    covered = sorted([(span.start, span.stop) for span in (*planned.spans, *planned.skipped)])
    assert [0, *(stop for _, stop in covered)] == [*(start for start, _ in covered), one.n_samples]
    assert all(span.n_samples >= 47 * VAD_FRAME for span in planned.spans)


def test_neighbours_in_one_language_are_joined_up_to_a_window() -> None:
    spans = [Range(0, 3), Range(3, 6), Range(6, 9), Range(9, 12), Range(15, 17)]
    assert join(spans, [0, 0, 1, 1, 1], limit=10) == [range(2), range(2, 4), range(4, 5)]
    assert join(spans, [0] * 5, limit=6) == [range(2), range(2, 4), range(4, 5)]
    assert join(spans, [0] * 5, limit=100) == [range(4), range(4, 5)]
    assert join([Range(0, 50)], [0], limit=6) == [range(1)]  # running speech is longer
    assert join([], [], limit=6) == []
