"""Word times from cross-attention: alignment heads → dynamic time warping → words (openai/whisper `timing.py`).

Works on what a teacher-forced pass left behind; it runs no model. Times are seconds within the window until
`place_words` puts them on segments. The reference's corrections of implausible words are kept, quirks included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.features import FRAMES_PER_SECOND
from pipeline.engine.tokens import Tokenizer
from pipeline.types import Word

POSITIONS_PER_SECOND = 50  # encoder positions: two frames each
MEDIAN_WIDTH = 7
SENTENCE_ENDS = ".。!！?？"
OPENING = "\"'“¿([{-"
CLOSING = "\"'.。,，!！?？:：”)]}、"
CACHED_HEADS = 2  # 1.2 MB for 100 tokens: on two cores one by one took 1.3 times as long, all eight 2.5 times
_REACH = MEDIAN_WIDTH // 2  # neighbours on either side


@dataclass(slots=True)
class WordTiming:
    """A word being timed, in seconds; merged punctuation leaves an empty `word` behind."""

    word: str
    tokens: list[int]
    start: float
    end: float
    probability: float


@dataclass(slots=True)
class Draft:
    """A segment being made: seconds within the span, and its words once they are known."""

    start: float
    end: float
    tokens: list[int]
    text: str
    words: list[Word] = field(default_factory=list)


def attention_cost(scores: Tensor, n_frames: int, n_sot: int) -> NDArray[np.float64]:
    """One window's alignment scores [heads, p, t] → DTW cost [p - n_sot - 1, n_frames // 2].

    Softmax over time, standardised over tokens, median over time, mean over heads, negated; the prompt's rows and
    the end token's go only after the standardisation, as in the reference.
    """
    scores = scores[:, :, : max(1, n_frames // 2)]  # one frame has a position too
    heads = torch.split(scores, CACHED_HEADS) if scores.device.type == "cpu" else [scores]
    weights = [_standardised(head) for head in heads]
    smooth = _mean_of_medians(weights, _median_of_seven)
    if smooth.isnan().any():  # a position that no token looks at: a sort puts it last, minima and maxima spread it
        smooth = _mean_of_medians(weights, _median_by_sorting)
    return -smooth[n_sot:-1].double().cpu().numpy()


def _standardised(scores: Tensor) -> Tensor:
    """Softmax over time, then each position's mean over the tokens taken off and its deviation divided out.

    That is the same at any scale, so a position's weights, which may be 1e-30, are first divided by their largest:
    float32 could not hold their squares.
    """
    weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(dim=-1)
    weights /= weights.amax(dim=-2, keepdim=True)
    weights -= weights.mean(dim=-2, keepdim=True)
    return weights / weights.square().mean(dim=-2, keepdim=True).sqrt_()


def _mean_of_medians(heads: Sequence[Tensor], median: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """The mean over all heads [h, p, t] of the median over time; too short a row stays as it is."""
    n = heads[0].shape[-1]
    if n <= _REACH:
        return torch.cat(list(heads)).mean(dim=0)
    even, odd = zip(*(median(_reflected(head)) for head in heads), strict=True)
    means = torch.cat(even).mean(dim=0), torch.cat(odd).mean(dim=0)
    return torch.stack(means, dim=-1).flatten(-2)[..., :n]


def _reflected(x: Tensor) -> Tensor:
    """x [..., t] with `_REACH` values mirrored at either end, and one more that makes their number even."""
    before, after = x[..., 1 : _REACH + 1].flip(-1), x[..., -_REACH - 1 : -1].flip(-1)
    return torch.cat([before, x, after, after[..., -1:]], dim=-1)[..., : (x.shape[-1] + 1) // 2 * 2 + 2 * _REACH]


def _median_of_seven(x: Tensor) -> tuple[Tensor, Tensor]:
    """Medians of every seven neighbours in x [..., t]: those that begin at an even place, those at an odd one.

    Two such neighbourhoods share six values, three pairs of which each is shared with others again; the median is the
    seventh value held between the middle two of the six. Ten minima and maxima for a median, where a sort of every
    place's seven took 30 times as long.
    """
    even, odd = x[..., 0::2].contiguous(), x[..., 1::2].contiguous()
    n = even.shape[-1] - _REACH
    low, high = _ordered(odd[..., :-1], even[..., 1:])
    _, *lows = _ordered_three(*(low[..., i : i + n] for i in range(3)))  # the least of six is not in the middle
    *highs, _ = _ordered_three(*(high[..., i : i + n] for i in range(3)))
    third, fourth = _ordered(torch.maximum(lows[0], highs[0]), torch.minimum(lows[1], highs[1]))
    outer = even[..., :n], odd[..., _REACH:]
    first, second = (torch.maximum(third, torch.minimum(value, fourth)) for value in outer)
    return first, second


def _ordered(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.minimum(a, b), torch.maximum(a, b)


def _ordered_three(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = _ordered(a, b)
    middle, high = _ordered(high, c)
    low, middle = _ordered(low, middle)
    return low, middle, high


def _median_by_sorting(x: Tensor) -> tuple[Tensor, Tensor]:
    medians = x.unfold(-1, MEDIAN_WIDTH, 1).sort(dim=-1).values[..., _REACH]
    return medians[..., 0::2], medians[..., 1::2]


def warp(costs: Sequence[NDArray[np.float64]]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The cheapest monotone path through each `cost` [n, m]: its row and column indices.

    Filled along anti-diagonals, a few vector operations over all the costs each; where every sum came from is told
    afterwards, for all at once. The diagonal is taken only if strictly cheaper than both others, then up if strictly
    cheaper, else left: ties decide word times, so the rule is the reference's. Costs are summed in float32, as there.
    """
    n, m, k = *(max(cost.shape[axis] for cost in costs) for axis in (0, 1)), len(costs)
    # [anti-diagonal + 2, row + 1, cost], so that the neighbours before the first row and column are there, infinite.
    # A diagonal of all costs lies in one piece: so one operation over sixteen takes no longer than over one.
    sums = np.full((n + m + 1, n + 1, k), np.inf, np.float32)
    along, down, _ = sums.strides
    for i, cost in enumerate(costs):
        as_strided(sums[2:, 1:, i], cost.shape, (along + down, along))[:] = cost
    sums[0, 0] = 0.0  # the corner before (0, 0)
    above, level = (sums.reshape(-1, (n + 1) * k)[:, part] for part in (slice(None, -k), slice(k, None)))
    least, tied = np.empty(n * k, np.float32), np.empty(n * k, np.bool_)
    has_nan = any(np.isnan(cost).any() for cost in costs)
    for diagonal, up, left, here in zip(above, above[1:], level[1:], level[2:], strict=False):
        np.minimum(diagonal, up, out=least)
        np.copyto(least, left, where=np.equal(diagonal, up, out=tied))  # even if it is dearer
        np.minimum(least, left, out=least)
        if has_nan:  # it is no less than anything: then left it is
            np.copyto(least, left, where=np.isnan(least))
        np.add(here, least, out=here)
    flat = sums.data.cast("B").cast("f")  # its values as Python's own numbers, one at a time, in a third of the time
    return [_trace_back(flat, sums.shape, i, cost.shape) for i, cost in enumerate(costs)]


def _trace_back(
    sums: memoryview[float], of: tuple[int, ...], number: int, shape: tuple[int, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The path to the far corner of cost `number`, of this shape, in `warp`'s flat `sums` of the shape `of`."""
    _, rows, k = of
    along = rows * k
    i, j = shape[0] - 1, shape[1] - 1
    path = []
    while i >= 0 and j >= 0:
        path.append((i, j))
        at = ((i + j + 1) * rows + i) * k + number  # of the neighbour above
        diagonal, up, left = sums[at - along], sums[at], sums[at + k]
        if j == 0 or (i > 0 and up < diagonal and up < left):
            i -= 1
        elif i > 0 and diagonal < up and diagonal < left:
            i, j = i - 1, j - 1
        else:
            j -= 1
    tokens, positions = np.array(path[::-1], np.int64).reshape(-1, 2).T
    return tokens, positions


def word_timings(
    path: tuple[NDArray[np.int64], NDArray[np.int64]],
    probabilities: NDArray[np.float64],
    text_tokens: Sequence[int],
    tokenizer: Tokenizer,
    language: str | None,
) -> list[WordTiming]:
    """Words of one window with their times, from the path of n + 1 tokens and `probabilities` [n] of n text tokens."""
    words, word_tokens = tokenizer.split_words([*text_tokens, tokenizer.eot], language)
    if len(words) <= 1:
        return []
    rows, columns = path
    starts_row = np.diff(rows, prepend=-1) > 0  # where the path enters a new token
    token_times = columns[starts_row] / POSITIONS_PER_SECOND
    bounds = np.concatenate([[0], np.cumsum([len(ids) for ids in word_tokens[:-1]])])
    return [
        WordTiming(word, ids, float(token_times[a]), float(token_times[b]), float(np.mean(probabilities[a:b])))
        for word, ids, a, b in zip(words[:-1], word_tokens[:-1], bounds[:-1], bounds[1:], strict=True)
    ]


def place_words(
    drafts: list[Draft], timings: list[WordTiming], offset_s: float, last_speech_s: float, eot: int
) -> None:
    """Gives each draft its words and pulls its start and end to them. `offset_s` is the window's start in the span.

    `last_speech_s` is where speech last ended before this window: a word after a long pause is held to be short.
    """
    durations = np.array([t.end - t.start for t in timings])
    durations = durations[durations.nonzero()]
    median = min(0.7, float(np.median(durations))) if len(durations) else 0.0
    longest = 2 * median
    if len(durations):
        _shorten_at_sentence_ends(timings, longest)
    _merge_punctuation(timings)
    left = iter(timings)
    for draft in drafts:
        words = _take_words(left, sum(1 for token in draft.tokens if token < eot), offset_s)
        if words:
            _fit_to_pause(words, last_speech_s, median, longest)
            _fit_to_segment(words, draft, median)
            last_speech_s = draft.end
        draft.words = [Word(w.word, w.start, w.end, w.probability) for w in words]


def last_word_end(drafts: Sequence[Draft]) -> float | None:
    """The end of the last word of the last draft that has any; without words, the last draft's end."""
    ends = (word.end for draft in reversed(drafts) for word in reversed(draft.words))
    return next(ends, drafts[-1].end if drafts else None)


def _take_words(timings: Iterator[WordTiming], n_tokens: int, offset_s: float) -> list[WordTiming]:
    """The next words, up to `n_tokens` tokens, on the span's clock, rounded to 10 ms."""
    words = []
    taken = 0
    while taken < n_tokens and (timing := next(timings, None)) is not None:
        taken += len(timing.tokens)
        if timing.word:
            start, end = round(offset_s + timing.start, 2), round(offset_s + timing.end, 2)
            words.append(WordTiming(timing.word, timing.tokens, start, end, timing.probability))
    return words


def _shorten_at_sentence_ends(timings: list[WordTiming], longest: float) -> None:
    """A sentence's end mark, and the word after one, tend to swallow the pause between sentences."""
    for previous, timing in pairwise(timings):
        if timing.end - timing.start > longest:
            if timing.word in SENTENCE_ENDS:
                timing.end = timing.start + longest
            elif previous.word in SENTENCE_ENDS:
                timing.start = timing.end - longest


def _merge_punctuation(timings: list[WordTiming]) -> None:
    """Opening marks join the word after them, closing marks the word before; times stay the word's own."""
    following = len(timings) - 1
    for i in range(len(timings) - 2, -1, -1):
        mark, word = timings[i], timings[following]
        if mark.word.startswith(" ") and mark.word.strip() in OPENING:
            word.word, word.tokens = mark.word + word.word, mark.tokens + word.tokens
            mark.word, mark.tokens = "", []
        else:
            following = i
    previous = 0
    for i in range(1, len(timings)):
        word, mark = timings[previous], timings[i]
        if not word.word.endswith(" ") and mark.word in CLOSING:
            word.word, word.tokens = word.word + mark.word, word.tokens + mark.tokens
            mark.word, mark.tokens = "", []
        else:
            previous = i


def _fit_to_pause(words: list[WordTiming], last_speech_s: float, median: float, longest: float) -> None:
    """The first one or two words after a pause of more than four median words are not longer than twice the median."""
    first = words[0]
    second = words[1] if len(words) > 1 else None
    if first.end - last_speech_s <= median * 4:
        return
    if first.end - first.start <= longest and (second is None or second.end - first.start <= longest * 2):
        return
    if second is not None and second.end - second.start > longest:
        first.end = second.start = max(second.end / 2, second.end - longest)
    first.start = max(0.0, first.end - longest)


def _fit_to_segment(words: list[WordTiming], draft: Draft, median: float) -> None:
    """Words rule the segment's times, unless they lie more than half a second outside: then the timestamps do."""
    first, last = words[0], words[-1]
    if draft.start < first.end and draft.start - 0.5 > first.start:
        first.start = max(0.0, min(first.end - median, draft.start))
    else:
        draft.start = first.start
    if draft.end > last.start and draft.end + 0.5 < last.end:
        last.end = max(last.start + median, draft.end)
    else:
        draft.end = last.end


def frames(seconds: float) -> int:
    """Seconds as the nearest frame, as the reference rounds."""
    return round(seconds * FRAMES_PER_SECOND)
