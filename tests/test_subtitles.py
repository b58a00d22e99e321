"""Cues keep the rules of subtitles, whatever is said and however it is timed, and lose no word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import regex
import srt
from hypothesis import given
from hypothesis import strategies as st
from srt import Subtitle

from pipeline import formats
from pipeline.errors import UsageError
from pipeline.formats import Cue
from pipeline.subtitles import Rules, cues
from pipeline.types import Segment, Word

RULES = Rules()
PLAIN = Segment(0.0, 0.0, "", (), -0.1, 1.0, 0.0, 0.0)
SPEECH = (
    " The committee met on Tuesday, and nobody was surprised by what it said; the figures had been known for weeks."
    " They had, after all, been printed in every paper of the country. What came next was another matter."
)


def said(text: str, start: float, end: float, words: Sequence[tuple[str, float, float]] = ()) -> Segment:
    return replace(PLAIN, text=text, start=start, end=end, words=tuple(Word(*word, 1.0) for word in words))


def text_of(found: Sequence[Cue]) -> str:
    return " ".join(" ".join(cue.lines) for cue in found)


def obeys(found: Sequence[Cue], rules: Rules) -> None:
    for cue in found:
        assert 1 <= len(cue.lines) <= rules.max_lines
        for line in cue.lines:
            assert line
            assert line == line.strip(" ")
            assert len(line) <= rules.max_line_length or regex.fullmatch(r"\X", line)  # which cannot be cut
        assert 0 < cue.end - cue.start <= rules.max_cue_s + 1e-9
    assert all(one.end <= other.start + 1e-9 for one, other in pairwise(found))


def test_a_long_segment_is_cut_at_its_sentences_and_commas() -> None:
    found = cues([said(SPEECH, 0.0, 15.0)], RULES)
    obeys(found, RULES)
    assert [cue.lines for cue in found] == [
        ("The committee met on Tuesday,", "and nobody was surprised by what it said;"),
        ("the figures had been known for weeks.",),
        ("They had, after all, been printed", "in every paper of the country."),
        ("What came next was another matter.",),
    ]
    assert text_of(found) == SPEECH.strip()
    assert (found[0].start, found[-1].end) == (0.0, 15.0)


def test_words_give_the_times() -> None:
    words = [(f" word{n}", 10 + n, 10 + n + 0.5) for n in range(12)]
    found = cues([said("".join(word for word, *_ in words), 10.0, 22.0, words)], Rules(max_cue_s=4.0))
    starts = {f"word{n}": 10.0 + n for n in range(12)}
    assert len(found) >= 3
    assert all(cue.start == starts[cue.lines[0].split()[0]] for cue in found)
    assert all(starts[cue.lines[-1].split()[-1]] + 0.5 <= cue.end for cue in found)


def test_without_words_a_time_is_shared_by_characters() -> None:
    found = cues([said(" aaaa bbbb", 0.0, 9.0)], Rules(max_line_length=4, max_lines=1))
    assert [(cue.lines, cue.start) for cue in found] == [(("aaaa",), 0.0), (("bbbb",), 5.0)]
    assert found[0].end == 4.0


def test_words_that_are_not_in_the_text_are_not_believed() -> None:
    found = cues([said(" one two", 0.0, 4.0, [(" other", 3.0, 3.5)])], RULES)
    assert found == [Cue(0.0, 4.0, ("one two",))]


def test_a_cue_is_held_to_be_read_but_not_into_the_next_nor_beyond_the_end() -> None:
    def ends(*segments: Segment, duration_s: float = 100.0) -> list[float]:
        return [cue.end for cue in cues(segments, RULES, duration_s)]

    forty = " " + "x" * 19 + " " + "y" * 20  # at 20 characters a second
    assert ends(said(forty, 0.0, 0.5)) == [2.0]
    assert ends(said(" hm", 0.0, 0.2)) == [1.0]
    assert ends(said(forty, 0.0, 0.5), said(" so", 1.5, 4.0)) == [1.5, 4.0]
    assert ends(said(forty, 0.0, 0.5), duration_s=0.75) == [0.75]


def test_what_would_be_gone_too_soon_is_joined() -> None:
    found = cues([said(" Yes.", 0.0, 0.3), said(" No.", 0.3, 0.6), said(" Well then.", 3.0, 4.0)], RULES)
    assert found == [Cue(0.0, 1.0, ("Yes. No.",)), Cue(3.0, 4.0, ("Well then.",))]
    brief = Rules(max_line_length=5, max_lines=1)
    alone = cues([said(" Yes.", 0.0, 0.3), said(" No.", 0.3, 0.6)], brief)  # no room for both
    assert [cue.lines for cue in alone] == [("Yes.",), ("No.",)]
    assert [brief.is_short(cue) for cue in alone] == [True, False]


def test_fast_cues_are_known() -> None:
    (cue,) = cues([said(" " + "x" * 40, 0.0, 0.5)], RULES, duration_s=0.5)
    assert RULES.is_fast(cue)
    (cue,) = cues([said(" " + "x" * 40, 0.0, 0.5)], RULES, duration_s=9.0)
    assert not RULES.is_fast(cue)


def test_chinese_and_japanese_part_between_characters() -> None:
    text = "今日はとても良い天気ですね、だから公園に行きましょう。そしてお弁当を食べて、映画を見に行くつもりです。"
    rules = Rules(max_line_length=16)
    found = cues([said(text, 0.0, 12.0)], rules)
    obeys(found, rules)
    assert "".join(line for cue in found for line in cue.lines) == text
    assert not [line for cue in found for line in cue.lines if line[0] in "、。"]


def test_hangul_and_long_words_part_as_little_as_can_be() -> None:
    (cue,) = cues([said(" 안녕하세요 여러분", 0.0, 3.0)], Rules(max_line_length=6))
    assert cue.lines == ("안녕하세요", "여러분")
    found = cues([said(" x" + "👩‍👩‍👧" * 9, 0.0, 3.0)], Rules(max_line_length=10, max_lines=1))  # 5 code points each
    assert {mark for cue in found for mark in "".join(cue.lines).replace("x", "").split("👩‍👩‍👧")} == {""}


WORDS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=60)
TIMES = st.floats(0.0, 30.0).map(lambda value: round(value, 3))


@st.composite
def segments(draw: st.DrawFn) -> list[Segment]:
    """Up to six of them with starts that do not go back, some with words, some of those at one point."""
    found = []
    for start in sorted(draw(st.lists(TIMES, max_size=6))):
        words = draw(st.lists(WORDS, min_size=1, max_size=12))
        end = start + draw(TIMES)
        times = sorted(draw(st.lists(TIMES, min_size=len(words), max_size=len(words))))
        spoken = [
            (f" {w}", start + t, start + t + draw(st.sampled_from([0.0, 0.3])))
            for w, t in zip(words, times, strict=True)
        ]
        found.append(said(" " + " ".join(words), start, end, spoken if draw(st.booleans()) else ()))
    return found


@given(segments(), st.sampled_from([RULES, Rules(10, 1, 0.5, 2.0), Rules(1, 1), Rules(16, 3, 2.0, 4.0)]))
def test_any_speech_obeys(spoken: list[Segment], rules: Rules) -> None:
    found = cues(spoken, rules)
    obeys(found, rules)
    everything = "".join(line for cue in found for line in cue.lines)
    wanted = "".join(formats.one_line(segment.text) for segment in spoken)
    assert "".join(everything.split()) == "".join(wanted.split())


def test_a_player_reads_two_lines() -> None:
    found = cues([said(SPEECH, 0.0, 15.0)], RULES)
    read: list[Subtitle] = list(srt.parse(formats.srt(found), ignore_errors=False))
    assert [one.content for one in read] == ["\n".join(cue.lines) for cue in found]


@pytest.mark.parametrize(
    "wrong",
    [{"max_line_length": 0}, {"max_lines": 0}, {"min_cue_s": 0.0}, {"max_cue_s": 0.5}, {"max_chars_per_s": 0.0}],
)
def test_rules_that_nothing_can_keep_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Rules(**wrong)  # type: ignore[arg-type]
