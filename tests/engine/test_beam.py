"""Beam search against openai-whisper's own decoder, step by step, on made-up logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from whisper.decoding import BeamSearchDecoder

from pipeline.engine.beam import Beam

EOT = 11
VOCABULARY = 12


class NoCache:
    """The reference's decoder tells the model to reorder its cache; the logits here depend on the tokens alone."""

    def rearrange_kv_cache(self, sources: list[int]) -> None:
        pass


def logits_of(tokens: torch.Tensor, seed: int, end: float) -> torch.Tensor:
    """Logits [rows, vocabulary] that depend on each row's tokens, with `end` added to the end token's."""
    rows = []
    for row in tokens.tolist():
        generator = torch.Generator().manual_seed(hash((seed, *row)) % 2**31)
        rows.append(torch.randn(VOCABULARY, generator=generator) * 2)
    logits = torch.stack(rows)
    logits[:, EOT] += end
    return logits


def theirs(size: int, patience: float | None, seed: int, end: float, steps: int) -> list[tuple[list[int], float]]:
    decoder: Any = BeamSearchDecoder(size, EOT, NoCache(), patience)  # type: ignore[arg-type]
    tokens = torch.zeros(size, 1, dtype=torch.int64)
    sums = torch.zeros(size)
    for _ in range(steps):
        tokens, complete = decoder.update(tokens, logits_of(tokens, seed, end), sums)
        if complete:
            break
    (found,), (scores,) = decoder.finalize(tokens[None], sums[None])
    rows = [row[1 : row.tolist().index(EOT)].tolist() for row in found]
    return list(zip(rows, scores, strict=True))


def ours(size: int, patience: float | None, seed: int, end: float, steps: int) -> list[tuple[list[int], float]]:
    beam = Beam(size, patience, EOT)
    for _ in range(steps):
        tokens = torch.tensor([[0, *row] for row in beam.rows])
        best = logits_of(tokens, seed, end).log_softmax(-1).topk(size + 1)
        beam.advance((best.values + torch.tensor(beam.sums)[:, None]).tolist(), best.indices.tolist())
        if beam.is_complete:
            break
    return beam.answers()


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # the reference hands a tensor to numpy
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("patience", [None, 0.5, 2.0])
@pytest.mark.parametrize("end", [-3.0, 0.0, 4.0], ids=["never-ends", "even", "ends-early"])
def test_same_sequences_and_scores(size: int, patience: float | None, end: float) -> None:
    if round(size * (patience or 1)) < 1:
        return
    for seed in range(8):
        expected, found = (search(size, patience, seed, end, steps=9) for search in (theirs, ours))
        assert {tuple(t): s for t, s in found} == pytest.approx({tuple(t): s for t, s in expected}, abs=1e-5)
