"""Segments as the cues of subtitles: lines and times that can be read. Pure.

A segment is cut into as few cues as fit (`Rules`), at ends of sentences, at commas and in pauses where there are any,
never in a word that fits a line. The times of a cue are those of its words; without word times a segment's time is
shared out by characters. Text without spaces (Chinese, Japanese) is cut between its characters. A cue that would be
gone too soon stays on as long as the next one lets it, or is joined with a neighbour. Cues never overlap.
"""

from __future__ import annotations

import math
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import regex  # for its \X, what a reader sees as one character

from pipeline.errors import UsageError
from pipeline.formats import Cue, one_line
from pipeline.types import Segment

_FRAME_S = 0.04  # of 25 a second: no cue is shorter, no two begin closer together
_PAUSE_S = 0.4  # between two words: as good a place to cut as a comma
_NEAR_S = 0.5  # cues that are joined lie no further apart
_LINE = 1000.0  # one line more costs more than any balance gains
_SENTENCE, _CLAUSE = tuple(".?!…。？！؟।"), tuple(",;:—、，；：،")
_CLOSING = frozenset("、。，．！？；：）」』】〉》…ー々ぁぃぅぇぉっゃゅょァィゥェォッャュョ")  # begin no line


@dataclass(frozen=True, slots=True)
class Rules:
    """What a cue may be. Lengths are in characters (Chinese and Japanese want lines of 16), times in seconds."""

    max_line_length: int = 42
    max_lines: int = 2
    min_cue_s: float = 1.0  # where the next cue leaves room
    max_cue_s: float = 7.0
    max_chars_per_s: float = 20.0  # aimed at: a cue is held longer, up to the next one, to be read at this speed

    def __post_init__(self) -> None:
        if self.max_line_length < 1 or self.max_lines < 1:
            raise UsageError("max_line_length and max_lines: whole numbers from 1 up")
        if not _FRAME_S <= self.min_cue_s <= self.max_cue_s < math.inf:
            raise UsageError(f"min_cue_s and max_cue_s: seconds from {_FRAME_S} up, the first no more than the second")
        if not 0 < self.max_chars_per_s < math.inf:
            raise UsageError("max_chars_per_s: a number above 0")

    def is_fast(self, cue: Cue) -> bool:
        """Whether nobody reads it in its time."""
        return sum(map(len, cue.lines)) > self.max_chars_per_s * (cue.end - cue.start) + 1e-6

    def is_short(self, cue: Cue) -> bool:
        return cue.end - cue.start < self.min_cue_s - 1e-6


def cues(segments: Iterable[Segment], rules: Rules, duration_s: float = math.inf) -> list[Cue]:
    """The cues of one channel's segments, in order of their starts; none is held beyond `duration_s`."""
    drafts = [draft for segment in segments for draft in _drafts(segment, rules)]
    drafts = _apart(_joined(drafts, rules))
    return [
        Cue(draft.start, _end(draft, following, rules, duration_s), _lines(draft.tokens, rules))
        for draft, following in pairwise([*drafts, None])
        if draft is not None
    ]


@dataclass(frozen=True, slots=True)
class _Token:
    """What is not cut any further, and when it is said."""

    text: str
    spaced: bool  # a blank stands before it
    start: float
    end: float

    @property
    def size(self) -> int:
        return len(self.text) + self.spaced


@dataclass(frozen=True, slots=True)
class _Draft:
    """A cue to be: its tokens, and when it appears."""

    tokens: tuple[_Token, ...]
    start: float

    @property
    def end(self) -> float:
        return max(token.end for token in self.tokens)


class _Layout:
    """Tokens one after the other, in lines of at most `max_line_length`."""

    def __init__(self, tokens: Sequence[_Token], rules: Rules) -> None:
        self.tokens, self.rules = tokens, rules
        self._sizes = [0, *accumulate(token.size for token in tokens)]
        self._full: list[int] = []  # where the line that begins with a token is full
        stop = 0
        for start in range(len(tokens)):
            stop = max(stop, start)  # a token can be longer than a line, if it is one character to a reader
            while stop < len(tokens) and self.length(start, stop + 1) <= rules.max_line_length:
                stop += 1
            self._full.append(stop)

    def length(self, start: int, stop: int) -> int:
        """Characters of the tokens in [start, stop), on one line."""
        return self._sizes[stop] - self._sizes[start] - self.tokens[start].spaced

    def fits(self, start: int, stop: int) -> bool:
        """Whether these tokens fit into the lines of a cue."""
        for _ in range(self.rules.max_lines):
            start = self._full[start] if start < stop else stop
        return start >= stop

    def cues(self) -> list[tuple[int, int]]:
        return _partition(len(self.tokens), self._cue_cost)

    def lines(self) -> list[tuple[int, int]]:
        return _partition(len(self.tokens), self._line_cost)

    def _cue_cost(self, start: int, stop: int) -> float | None:
        """Of a cue by itself, of a bad place to end it, of a length of nearly nothing."""
        first, last, rules = self.tokens[start], self.tokens[stop - 1], self.rules
        if stop - start > 1 and (last.end - first.start > rules.max_cue_s or not self.fits(start, stop)):
            return None
        cost = 0.5 + 0.3 * (1 - self.length(start, stop) / (rules.max_line_length * rules.max_lines)) ** 2
        if stop == len(self.tokens) or last.text.endswith(_SENTENCE):
            return cost
        is_break = last.text.endswith(_CLAUSE) or self.tokens[stop].start - last.end >= _PAUSE_S
        return cost + (0.25 if is_break else 0.7)

    def _line_cost(self, start: int, stop: int) -> float | None:
        """As few lines as will do, of much the same length, better ended where a clause ends."""
        share = self.length(start, stop) / self.rules.max_line_length
        if share > 1:
            return None
        is_break = stop == len(self.tokens) or self.tokens[stop - 1].text.endswith(_SENTENCE + _CLAUSE)
        return _LINE + share**2 + (0.0 if is_break else 0.2)


def _drafts(segment: Segment, rules: Rules) -> Iterator[_Draft]:
    tokens = list(_tokens(segment, rules.max_line_length))
    for start, stop in _Layout(tokens, rules).cues():
        yield _Draft(tuple(tokens[start:stop]), tokens[start].start)


def _lines(tokens: Sequence[_Token], rules: Rules) -> tuple[str, ...]:
    return tuple(_text(tokens[start:stop]) for start, stop in _Layout(tokens, rules).lines())


def _partition(n: int, cost: Callable[[int, int], float | None]) -> list[tuple[int, int]]:
    """The half-open ranges that make up [0, n) at the least sum of their costs; None is the cost of one too long."""
    best, cut = [0.0] + [math.inf] * n, [0] * (n + 1)
    for stop in range(1, n + 1):
        for start in reversed(range(stop)):
            own = cost(start, stop)
            if own is None:
                break
            if best[start] + own < best[stop]:
                best[stop], cut[stop] = best[start] + own, start
    ranges = []
    while n:
        ranges.append((cut[n], n))
        n = cut[n]
    return ranges[::-1]


def _text(tokens: Sequence[_Token]) -> str:
    return "".join(f" {token.text}" if token.spaced else token.text for token in tokens).lstrip(" ")


# ---- times


def _joined(drafts: Sequence[_Draft], rules: Rules) -> list[_Draft]:
    """Without those that would be gone too soon, where a neighbour has room for them."""
    done: list[_Draft] = []
    for draft, following in pairwise([*drafts, None]):
        assert draft is not None
        both = _both(done[-1], draft, rules) if done else None
        if both and (_is_brief(draft, following, rules) or _is_brief(done[-1], draft, rules)):
            done[-1] = both
        else:
            done.append(draft)
    return done


def _is_brief(draft: _Draft, following: _Draft | None, rules: Rules) -> bool:
    """Whether the next one leaves it less than `min_cue_s`."""
    return following is not None and following.start - draft.start < rules.min_cue_s


def _both(first: _Draft, second: _Draft, rules: Rules) -> _Draft | None:
    """The two in one cue, if that is one."""
    both = _Draft(first.tokens + _after(second.tokens), first.start)
    near = second.start - first.end <= _NEAR_S and both.end - both.start <= rules.max_cue_s
    return both if near and _Layout(both.tokens, rules).fits(0, len(both.tokens)) else None


def _after(tokens: tuple[_Token, ...]) -> tuple[_Token, ...]:
    """Tokens that begin a segment, behind another one's."""
    return (replace(tokens[0], spaced=not _is_wide(tokens[0].text[0])), *tokens[1:])


def _apart(drafts: Sequence[_Draft]) -> list[_Draft]:
    """Starts that go forward by a frame at least: words that an alignment put at one point do not."""
    done: list[_Draft] = []
    for draft in drafts:
        earliest = done[-1].start + _FRAME_S if done else 0.0
        done.append(replace(draft, start=max(draft.start, earliest)))
    return done


def _end(draft: _Draft, following: _Draft | None, rules: Rules, duration_s: float) -> float:
    wanted = draft.start + max(rules.min_cue_s, len(_text(draft.tokens)) / rules.max_chars_per_s)
    end = max(draft.end, min(wanted, duration_s))
    latest = draft.start + rules.max_cue_s
    return max(min(end, latest, following.start if following else math.inf), draft.start + _FRAME_S)


# ---- text to tokens


def _tokens(segment: Segment, longest: int) -> Iterator[_Token]:
    """The segment's words as a line may end behind them, and none longer than a line."""
    text = one_line(segment.text)
    clock = _Clock(segment, text)
    for start, stop in _pieces(text, longest):
        spaced = start > 0 and text[start - 1] == " "
        yield _Token(text[start:stop], spaced, clock.start(start), clock.end(stop))


def _pieces(text: str, longest: int) -> Iterator[tuple[int, int]]:
    """The half-open ranges of `text` between blanks, at places where wide characters part, and within `longest`."""
    for chunk in regex.finditer(r"\S+", text):
        start = chunk.start()
        for mark in regex.finditer(r"\X", text, pos=chunk.start(), endpos=chunk.end()):
            here = mark.start()
            if here > start and (mark.end() - start > longest or _may_part(text[here - 1], text[here])):
                yield start, here
                start = here
        yield start, chunk.end()


def _may_part(before: str, after: str) -> bool:
    return after not in _CLOSING and (_is_wide(before) or _is_wide(after))


def _is_wide(character: str) -> bool:
    """Whether a line may end beside it: Chinese and Japanese, not Hangul, whose words have blanks between them."""
    if character in "、。，！？；：」』）":
        return True
    wide = unicodedata.east_asian_width(character) in "WF" and character.isalnum()
    return wide and not "\uac00" <= character <= "\ud7a3"


class _Clock:
    """When a place in a segment's text is said: within a word by characters, without words within the segment."""

    def __init__(self, segment: Segment, text: str) -> None:
        self._words = _found(segment, text) or [(0, len(text), segment.start, segment.end)]
        self._begins = [begin for begin, *_ in self._words]

    def start(self, at: int) -> float:
        """When the character at `at` begins."""
        number = bisect_right(self._begins, at) - 1
        if number >= 0 and at < self._words[number][1]:
            return self._within(number, at)
        return self._words[min(number + 1, len(self._words) - 1)][2]

    def end(self, at: int) -> float:
        """When the character before `at` ends."""
        return self._within(max(bisect_right(self._begins, at - 1) - 1, 0), at)

    def _within(self, number: int, at: int) -> float:
        begin, stop, start, end = self._words[number]
        return start + (end - start) * min(max((at - begin) / (stop - begin), 0.0), 1.0)


def _found(segment: Segment, text: str) -> list[tuple[int, int, float, float]]:
    """(begin, stop, start, end) of each word: its place in `text`, its time. None of them where one is not found."""
    found, at = [], 0
    for word in segment.words:
        said = one_line(word.word)
        begin = text.find(said, at)
        if begin < 0:
            return []
        at = begin + len(said)
        if said:
            found.append((begin, at, word.start, word.end))
    return found
