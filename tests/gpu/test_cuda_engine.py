"""The engine on a GPU: captured steps give what uncaptured ones give, and float32 what the CPU gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.demo.train.heldout import make_clip
from pipeline.engine import EngineConfig, Tuning, load_engine
from pipeline.engine.device import Cuda
from pipeline.engine.local import LocalEngine
from pipeline.engine.pipelined import PipelinedScheduler
from pipeline.types import DecodeOptions, Hypothesis, Pcm

pytestmark = pytest.mark.gpu

PLAIN = DecodeOptions(chunk_length_s=10)


@pytest.fixture(scope="module")
def pcms() -> list[Pcm]:
    return [make_clip(("en", "de", "es")[i % 3], 1 + i % 3, seed=300 + i).pcm for i in range(24)]  # type: ignore[arg-type]


def decode(
    pcms: Sequence[Pcm], options: DecodeOptions, dtype: str, tuning: Tuning, device: str = "cuda", lanes: int = 8
) -> tuple[list[Hypothesis], dict[str, Any]]:
    config = EngineConfig("demo", device=device, dtype=dtype, lanes=lanes, tuning=tuning)
    with load_engine(config) as engine:
        assert isinstance(engine, LocalEngine)
        found, scheduler = engine.decode(pcms, options), engine._scheduler
        return found, scheduler.facts() if isinstance(scheduler, PipelinedScheduler) else {}


def tokens(hypotheses: Sequence[Hypothesis]) -> list[list[int]]:
    return [[token for segment in h.segments for token in segment.tokens] for h in hypotheses]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        PLAIN,
        replace(PLAIN, temperature=0.7, best_of=2),
        replace(PLAIN, word_timestamps=True),
        replace(PLAIN, beam_size=3),
    ],
    ids=["plain", "hot", "words", "beam"],
)
def test_captured_steps_give_what_uncaptured_ones_give(
    pcms: list[Pcm], options: DecodeOptions, dtype: str, streams: bool
) -> None:
    """Lanes are refilled, so that a graph of one state would show in the next."""
    captured, facts = decode(pcms, options, dtype, Tuning(streams=streams))
    plain, _ = decode(pcms, options, dtype, Tuning(graphs=False))
    assert tokens(captured) == tokens(plain)
    assert facts["refused"] == 0
    assert facts["captured"] > 0 or options.beam_size is not None


def test_float32_gives_what_the_cpu_gives(pcms: list[Pcm]) -> None:
    """But for near-ties: sums are taken in another order."""
    expected, _ = decode(pcms, PLAIN, "float32", Tuning(), device="cpu")
    found, _ = decode(pcms, PLAIN, "float32", Tuning())
    same = [a == b for a, b in zip(tokens(expected), tokens(found), strict=True)]
    assert sum(same) >= 0.95 * len(same)


def test_half_precision_says_nearly_the_same(pcms: list[Pcm]) -> None:
    expected, _ = decode(pcms, PLAIN, "float32", Tuning())
    for dtype in ("float16", "bfloat16"):
        found, _ = decode(pcms, PLAIN, dtype, Tuning())
        same = [a == b for a, b in zip(tokens(expected), tokens(found), strict=True)]
        assert sum(same) >= 0.8 * len(same), dtype


def test_what_cannot_be_captured_goes_on_as_it_is() -> None:
    cuda = Cuda(torch.device("cuda"), graphs=True, streams=False)
    total = torch.zeros(1, device="cuda")

    def asks_the_host() -> None:
        total.add_(1 if total.item() >= 0 else 2)

    work = cuda.repeated(asks_the_host)
    for _ in range(5):
        work()
    assert total.item() == 5
    assert (cuda.n_captured, cuda.n_refused) == (0, 1)


def test_a_report_is_of_the_moment_it_was_asked_for() -> None:
    cuda = Cuda(torch.device("cuda"), graphs=True, streams=False)
    values = torch.zeros(1 << 20, device="cuda")
    reports = []
    for _ in range(20):
        values += 1
        reports.append(cuda.report([values[:1]]))
    assert [report.wait()[0].item() for report in reports] == [float(i) for i in range(1, 21)]
