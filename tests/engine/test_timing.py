"""Dynamic time warping against the reference's, ties included; and what becomes of implausible words."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from whisper.timing import dtw_cpu, median_filter

from pipeline.engine.timing import (
    Draft,
    WordTiming,
    _mean_of_medians,
    _median_of_seven,
    attention_cost,
    last_word_end,
    place_words,
    warp,
)

EOT = 50257


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (5, 5), (7, 40), (60, 300)])
@pytest.mark.parametrize("levels", [0, 2])
def test_path_is_the_reference_s(shape: tuple[int, int], levels: int) -> None:
    """`levels` 2 leaves nothing but ties."""
    draw = np.random.default_rng(shape[0] * 1000 + shape[1])
    for _ in range(5):
        cost = draw.integers(0, levels, shape).astype(np.float64) if levels else draw.standard_normal(shape)
        expected = dtw_cpu(cost)
        (rows, columns), _ = warp([cost, draw.standard_normal((11, 30))])  # beside another of another size
        assert rows.tolist() == expected[0].tolist()
        assert columns.tolist() == expected[1].tolist()


def test_a_cost_that_is_no_number_is_passed_as_the_reference_passes_it() -> None:
    cost = np.random.default_rng(1).standard_normal((12, 40))
    cost[:, 20:23] = np.nan
    ((rows, columns),) = warp([cost])
    expected = dtw_cpu(cost)
    assert (rows.tolist(), columns.tolist()) == (expected[0].tolist(), expected[1].tolist())


def median(x: torch.Tensor) -> torch.Tensor:
    """Of one head [1, p, t]."""
    return _mean_of_medians([x], _median_of_seven)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 7, 8, 50, 51])
def test_median_filter(n: int) -> None:
    x = torch.randn(1, 3, n, generator=torch.Generator().manual_seed(n))
    assert torch.equal(median(x), median_filter(x, 7)[0])


def test_median_for_every_order() -> None:
    """By the zero-one principle: what finds the middle of all zeros and ones finds it for all numbers."""
    rows = torch.tensor(list(product((0.0, 1.0), repeat=8)))
    even, odd = _median_of_seven(rows)  # of the first seven, and of the last
    assert torch.equal(even[:, 0], rows[:, :7].median(-1).values)
    assert torch.equal(odd[:, 0], rows[:, 1:].median(-1).values)


def test_attention_that_is_next_to_nothing_is_still_told_apart() -> None:
    """Weights of 1e-30, whose squares float32 cannot hold, against the same in double."""
    scores = torch.rand(1, 6, 40, generator=torch.Generator().manual_seed(3))
    scores[:, :, 5:] -= 70.0
    cost = attention_cost(scores, n_frames=80, n_sot=1)
    assert np.isfinite(cost).all()
    assert np.abs(cost - attention_cost(scores.double(), n_frames=80, n_sot=1)).max() < 1e-3


def test_cost_with_positions_that_nobody_looks_at() -> None:
    """The softmax makes them 0 for every token, and 0 / 0 is no number; a sort puts it last."""
    scores = torch.randn(3, 7, 50, generator=torch.Generator().manual_seed(1))
    scores[:, :, 20:23] = -1000.0
    weights = scores.softmax(-1)
    std, mean = torch.std_mean(weights, dim=-2, keepdim=True, unbiased=False)
    expected = -median_filter((weights - mean) / std, 7).mean(0)[1:-1]
    cost = attention_cost(scores, n_frames=100, n_sot=1)
    assert np.isfinite(cost).all()
    assert np.abs(cost - expected.double().numpy()).max() < 1e-5
    scores[:, :, 20:27] = -1000.0  # wider than what a median can pass over
    assert np.isnan(attention_cost(scores, n_frames=100, n_sot=1)).any(0).tolist() == [20 <= i < 27 for i in range(50)]


def timing(word: str, start: float, end: float) -> WordTiming:
    return WordTiming(word, [1], start, end, 0.9)


def test_punctuation_joins_its_word() -> None:
    """And leaves the word's own times; words pull their segment's start and end to them."""
    drafts = [Draft(10.0, 12.0, [1] * 5, "")]
    marks = [timing(' "', 0.0, 0.3), timing("Hello", 0.3, 0.6), timing(",", 0.6, 0.9), timing(" you", 0.9, 1.2)]
    place_words(drafts, [*marks, timing(".", 1.2, 1.5)], 10.0, 10.0, EOT)
    assert [(w.word, w.start, w.end) for w in drafts[0].words] == [(' "Hello,', 10.3, 10.6), (" you.", 10.9, 11.2)]
    assert (drafts[0].start, drafts[0].end) == (10.3, 11.2)


def test_a_first_word_that_swallowed_a_pause_is_shortened() -> None:
    drafts = [Draft(5.0, 6.0, [1, 1, 1], "")]
    place_words(drafts, [timing(" a", 0, 5.0), timing(" b", 5.0, 5.3), timing(" c", 5.3, 5.6)], 0.0, 0.0, EOT)
    first = drafts[0].words[0]
    assert first.end - first.start == pytest.approx(0.6)  # twice the median of 0.3 s
    assert drafts[0].start == first.start


def test_last_word_end() -> None:
    assert last_word_end([]) is None
    assert last_word_end([Draft(0, 2.5, [], "")]) == 2.5
    drafts = [Draft(0, 1, [1], "a"), Draft(1, 2, [], "")]
    place_words(drafts, [timing(" a", 0.2, 0.7)], 0.0, 0.0, EOT)
    assert last_word_end(drafts) == 0.7
