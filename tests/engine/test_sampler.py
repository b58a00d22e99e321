"""The token rules as tensors over lanes, against the reference's filters applied to one row at a time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from whisper.decoding import ApplyTimestampRules, SuppressBlank, SuppressTokens
from whisper.tokenizer import get_tokenizer

from pipeline.demo import model_path
from pipeline.engine.decoding import Decode, Sampler, Span, Window
from pipeline.engine.tokens import Tokenizer

N_VOCAB = 51865
TIME = 50364  # <|0.00|>
TEXT = 1000

# Each row is what a lane has sampled so far.
HISTORIES: list[list[int]] = [
    [],  # a time within the first second must come
    [TIME],  # text must follow a single opening time
    [TIME, TEXT],  # anything but an earlier time
    [TIME, TEXT, TIME + 100],  # its pair or the end
    [TIME, TEXT, TIME + 100, TIME + 100],  # text
    [TIME, TEXT, TIME + 100, TIME + 120, TEXT],  # text or a later time
    [TIME + 50, TEXT, TEXT, TEXT],
    [TIME, TEXT, TIME + 1500],  # the very end of the window
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(model_path(), N_VOCAB)


def sampler_after(
    tokenizer: Tokenizer, histories: Sequence[list[int]], temperature: float = 0.0, exact: bool = True
) -> Sampler:
    """A sampler whose lanes have sampled `histories`: forced there by logits that allow nothing else."""
    sampler = Sampler(tokenizer, len(histories), torch.device("cpu"), exact)
    suppress = tuple(tokenizer.suppressed((-1,)))
    window = Window(Span(torch.zeros(0, dtype=torch.int16).numpy()), 0, 0)
    for lane, history in enumerate(histories):
        seeds = (lane,)
        sampler.admit(lane, Decode(window, (), 0, temperature, seeds, suppress, 224), seed=lane)
        for token in history:
            sampler.record(torch.tensor([token]), slice(lane, lane + 1))
    return sampler


def reference_logits(history: list[int], logits: Tensor) -> Tensor:
    """One row through the reference's filters, prompt of three tokens in front."""
    whisper = get_tokenizer(True, num_languages=99, language="en", task="transcribe")
    prompt = [50258, 50259, 50359]
    banned = {*whisper.non_speech_tokens, 50358, 50359, 50258, 50361, 50360, 50362}
    filters = [
        SuppressBlank(whisper, len(prompt)),
        SuppressTokens(sorted(banned)),
        ApplyTimestampRules(whisper, len(prompt), max_initial_timestamp_index=50),
    ]
    row = logits[None].clone()
    for rule in filters:
        rule.apply(row, torch.tensor([prompt + history]))
    return row[0]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("tilt", [-6.0, 0.0, 6.0], ids=["text-likely", "even", "times-likely"])
def test_greedy_choice_and_log_probability_match_the_reference(tokenizer: Tokenizer, tilt: float, exact: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(5):
        logits = torch.randn(len(HISTORIES), N_VOCAB, generator=generator) * 3
        logits[:, TIME:] += tilt
        sampler = sampler_after(tokenizer, HISTORIES, exact=exact)
        sampler.sample(logits.clone(), slice(0, len(HISTORIES)))
        chosen = sampler.last
        listed = sampler_after(tokenizer, HISTORIES).log_probabilities(logits, slice(0, len(HISTORIES)))
        for i, history in enumerate(HISTORIES):
            expected = reference_logits(history, logits[i])
            assert chosen[i] == expected.argmax(), history
            assert torch.allclose(listed[i], expected.log_softmax(-1), atol=1e-4), history
            tolerance = 0 if exact else 1e-4
            assert sampler.sum_logprob[i] == pytest.approx(float(expected.log_softmax(-1).max()), abs=tolerance)


def test_a_row_draws_the_same_alone_and_among_others(tokenizer: Tokenizer) -> None:
    logits = torch.randn(len(HISTORIES), N_VOCAB, generator=torch.Generator().manual_seed(6))
    together = sampler_after(tokenizer, HISTORIES, temperature=0.8)
    n = len(HISTORIES)
    together.sample(logits.clone(), slice(0, n), hot=torch.arange(n))
    for i in range(len(HISTORIES)):
        alone = sampler_after(tokenizer, HISTORIES, temperature=0.8)
        alone.sample(logits[i : i + 1].clone(), torch.tensor([i]), hot=torch.tensor([0]))
        assert alone.last[i] == together.last[i]
        assert alone.sum_logprob[i] == together.sum_logprob[i]


def test_cold_rows_are_greedy_beside_hot_ones(tokenizer: Tokenizer) -> None:
    logits = torch.randn(2, N_VOCAB, generator=torch.Generator().manual_seed(7))
    sampler = sampler_after(tokenizer, [[TIME], [TIME]], temperature=0.0)
    sampler._temperature[1] = 1.0
    sampler.sample(logits.clone(), slice(0, 2), hot=torch.tensor([1]))
    assert sampler.last[0] == reference_logits([TIME], logits[0]).argmax()


def test_hypotheses_that_change_places_go_on_by_the_rules(tokenizer: Tokenizer) -> None:
    """`restate` leaves a lane as if it had sampled the tokens one by one."""
    histories = [[TIME, TEXT, TIME + 100], [TIME, TEXT, TEXT], [TIME + 3, TEXT, TEXT]]
    stepped, restated = sampler_after(tokenizer, histories), sampler_after(tokenizer, histories[::-1])
    restated.restate(torch.arange(3), histories)
    logits = torch.randn(3, N_VOCAB, generator=torch.Generator().manual_seed(8))
    rows = slice(0, 3)
    assert torch.equal(stepped.log_probabilities(logits, rows), restated.log_probabilities(logits, rows))


def test_draws_follow_the_softmax(tokenizer: Tokenizer) -> None:
    """Three tokens at 1 : 2 : 5 of probability, 2,000 seeds; chi-square below its 0.999 point."""
    n = 2000
    logits = torch.full((1, N_VOCAB), -1e4)
    logits[0, [TEXT, TEXT + 1, TEXT + 2]] = torch.tensor([1.0, 2.0, 5.0]).log()
    sampler = sampler_after(tokenizer, [[TIME]], temperature=1.0)
    counts = [0, 0, 0]
    for seed in range(n):
        sampler._seed[0] = seed * 7919
        sampler.count[0] = 1
        noise = sampler._gumbel(slice(0, 1), N_VOCAB)
        counts[int((logits + noise).argmax()) - TEXT] += 1
    expected = [n / 8, n / 4, n * 5 / 8]
    assert sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True)) < 13.8
