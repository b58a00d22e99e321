"""The engine as a GPU runs it, on a CPU with the graphs off: the same steps over the same buffers, answered late.

Its results are the plain scheduler's to the bit, and a step does nothing that a CUDA graph cannot hold.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.demo.train.heldout import Clip, make_clip
from pipeline.engine import EngineConfig, Tuning, load_engine
from pipeline.engine.decoding import Decode, Sampler, Span, Window
from pipeline.engine.device import Cuda, Host
from pipeline.engine.features import N_SAMPLES, Cut, LogMel
from pipeline.engine.local import LocalEngine
from pipeline.engine.model import WhisperModel
from pipeline.engine.pipelined import (
    LENGTH_BUCKETS,
    Encoder,
    PipelinedScheduler,
    Steps,
    encoder_bucket,
    lane_bucket,
    length_bucket,
)
from pipeline.engine.random_checkpoint import Shape, write_random_checkpoint
from pipeline.types import DecodeOptions, Recording, Unit

PLAIN = DecodeOptions(chunk_length_s=10)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipelined() -> Iterator[LocalEngine]:
    """The demo model in float32; four lanes, so that they are refilled, two at a time."""
    tuning = Tuning(static=True, refill=2, window_batch=3)
    with load_engine(EngineConfig("demo", device="cpu", dtype="float32", lanes=4, tuning=tuning)) as engine:
        assert isinstance(engine, LocalEngine)
        yield engine


@pytest.fixture(scope="module")
def pcms() -> list[Any]:
    clips: list[Clip] = [make_clip(("en", "de", "es")[i % 3], 1 + i % 3, seed=300 + i) for i in range(7)]  # type: ignore[arg-type]
    return [clip.pcm for clip in clips]


@pytest.mark.parametrize(
    "options",
    [
        PLAIN,
        replace(PLAIN, word_timestamps=True, initial_prompt="One more time", language="en"),
        replace(PLAIN, temperature=0.7, best_of=3, language="en"),
        replace(PLAIN, beam_size=2, word_timestamps=True),
        replace(PLAIN, algorithm="sequential", logprob_threshold=-0.05),  # everything falls back, up to 1.0
        replace(PLAIN, max_tokens=1, temperature_fallback=False),
    ],
    ids=["plain", "words", "hot", "beam", "fallback", "one-token"],
)
def test_the_results_are_the_plain_schedulers(
    engine: LocalEngine, pipelined: LocalEngine, pcms: list[Any], options: DecodeOptions
) -> None:
    pcms = pcms[:3] if options.algorithm == "sequential" else pcms
    assert pipelined.decode(pcms, options) == engine.decode(pcms, options)
    assert pipelined._scheduler.idle
    assert pipelined._scheduler._lanes.count(None) == 4


def test_beams_share_the_lanes_with_what_is_answered_late(
    engine: LocalEngine, pipelined: LocalEngine, pcms: list[Any]
) -> None:
    """Each row is what it would have been alone, whichever way its neighbours are decoded."""
    kinds = [replace(PLAIN, beam_size=3), PLAIN, replace(PLAIN, max_tokens=1), replace(PLAIN, word_timestamps=True)]

    async def go(which: LocalEngine) -> list[Any]:
        units = [Unit(Recording(str(i), str(i)), 0, 0, pcm, is_last=True) for i, pcm in enumerate(pcms)]
        asked = zip(units, [kinds[i % len(kinds)] for i in range(len(units))], strict=True)
        results = await asyncio.gather(*(which.submit(unit, options) for unit, options in asked))
        return [(result.language, result.segments) for result in results]

    assert asyncio.run(go(pipelined)) == asyncio.run(go(engine))


@pytest.mark.parametrize("lag", [0, 3])
def test_how_late_the_answers_are_changes_nothing(engine: LocalEngine, pcms: list[Any], lag: int) -> None:
    tuning = Tuning(static=True, lag=lag)
    with load_engine(EngineConfig("demo", device="cpu", dtype="float32", lanes=3, tuning=tuning)) as late:
        assert late.decode(pcms[:5], PLAIN) == engine.decode(pcms[:5], PLAIN)


def test_what_is_cancelled_while_its_answer_is_on_the_way_frees_its_lane(
    pipelined: LocalEngine, pcms: list[Any]
) -> None:
    expected = pipelined.decode(pcms[:2], PLAIN)

    async def go() -> None:
        units = [Unit(Recording(str(i), str(i)), 0, 0, pcm, is_last=True) for i, pcm in enumerate(pcms)]
        tasks = [asyncio.ensure_future(pipelined.submit(unit, PLAIN)) for unit in units]
        while not any(task.done() for task in tasks):
            await asyncio.sleep(0.001)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(go())
    assert pipelined.decode(pcms[:2], PLAIN) == expected
    assert pipelined._scheduler._lanes.count(None) == 4


def run_out(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int) -> Iterator[int]:
    """Memory runs out in this call, counted from 0, of a method. Returns the count of the next one."""
    method, calls = getattr(owner, name), count()

    def failing(*arguments: Any) -> Any:
        if next(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return method(*arguments)

    monkeypatch.setattr(owner, name, failing)
    return calls


def test_out_of_memory_begins_again_with_half_the_lanes(
    engine: LocalEngine, pcms: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a step, while earlier answers are on their way."""
    run_out(monkeypatch, Steps, "take", call=6)
    config = EngineConfig("demo", device="cpu", dtype="float32", lanes=4, tuning=Tuning(static=True))
    with load_engine(config) as small:
        assert isinstance(small, LocalEngine)
        assert small.decode(pcms, PLAIN) == engine.decode(pcms, PLAIN)
        assert small._scheduler.n_lanes == 2


def test_who_asks_for_a_language_as_memory_ends_is_answered(
    engine: LocalEngine, pcms: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.decode(pcms, PLAIN)
    calls = run_out(monkeypatch, WhisperModel, "first_logits", call=0)
    config = EngineConfig("demo", device="cpu", dtype="float32", lanes=4, tuning=Tuning(static=True))
    with load_engine(config) as small:
        assert small.decode(pcms, PLAIN) == expected
    assert next(calls) > 1


# -- what a CUDA graph can hold --------------------------------------------------------------------------------

# The host would have to wait for a value, or would send one of its own: neither can be captured.
SYNCHRONISING = (
    "_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "unique", "lift_fresh", "scalar_tensor",
    "where.Scalar", "equal.default", "allclose",
)  # fmt: skip


class NothingForTheHost(TorchDispatchMode):
    """Fails on what a captured step may not do, and lists where tensors lie that were written in place."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func).removeprefix("aten.")
        assert not name.startswith(SYNCHRONISING), f"{name} cannot be captured"
        masks = args[1] if name.startswith("index") and len(args) > 1 and isinstance(args[1], list | tuple) else ()
        assert not any(isinstance(m, Tensor) and m.dtype == torch.bool for m in masks), "a mask as an index"
        return func(*args, **(kwargs or {}))


def test_the_guard_finds_what_cannot_be_captured() -> None:
    x = torch.arange(4)
    works: tuple[Callable[[], object], ...] = (
        lambda: x.sum().item(),
        lambda: x[x > 1],
        lambda: torch.tensor([1.0]),
        lambda: torch.where(x > 1, 0, x),
        lambda: x.new_tensor(3.0),
    )
    for work in works:
        with pytest.raises(AssertionError), NothingForTheHost():
            work()


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PipelinedScheduler]:
    """Random weights of a small shape, eight lanes."""
    shape = Shape(128, 2, 2, 2, n_mels=80)
    folder = write_random_checkpoint(tmp_path_factory.mktemp("random"), shape, mean_tokens=None)
    tuning = Tuning(static=True)
    with load_engine(EngineConfig(str(folder), device="cpu", dtype="float32", lanes=8, tuning=tuning)) as engine:
        assert isinstance(engine, LocalEngine)
        assert isinstance(engine._scheduler, PipelinedScheduler)
        yield engine._scheduler


def addresses(scheduler: PipelinedScheduler) -> list[int]:
    sampler, caches = scheduler._sampler, scheduler._caches
    state = (*sampler._progress, *sampler._settings, scheduler._positions, scheduler._no_speech)
    return [t.data_ptr() for t in (*state, caches.self_k, caches.self_v, caches.cross_k, caches.cross_v)]


@pytest.mark.parametrize("any_hot", [False, True])
@torch.inference_mode()
def test_a_step_keeps_to_its_buffers_and_asks_the_host_nothing(scheduler: PipelinedScheduler, any_hot: bool) -> None:
    sampler, steps = scheduler._sampler, scheduler._steps
    sampler.ended[:5] = False
    sampler._most[:5] = 3
    sampler.count[:] = 0
    before = addresses(scheduler)
    for _ in range(4):
        with NothingForTheHost():
            n = steps.take(5, 10, any_hot)
    assert n == 8
    assert addresses(scheduler) == before
    assert sampler.ended.all()  # five at their limit, three idle ones
    assert sampler.count[:5].tolist() == [3] * 5  # the fourth step changed nothing


@torch.inference_mode()
def test_the_encoder_asks_the_host_nothing_and_fills_up_its_shapes(scheduler: PipelinedScheduler) -> None:
    model = scheduler._model
    encoder = Encoder(model, 4, Host(CPU))
    mel = torch.randn(3, model.dims.n_mels, 3000, generator=torch.Generator().manual_seed(1))
    with NothingForTheHost():
        hidden = encoder(mel)
    assert list(encoder._made) == [4]
    again = encoder(mel[:1])
    assert torch.equal(hidden, model.encode(mel))
    assert torch.equal(again[0], hidden[0])  # earlier answers are not written over


class FakeGraph:
    """A CUDA graph as far as order goes: what is begun while it is captured runs at each replay and not before."""

    capturing: FakeGraph | None = None

    def __init__(self) -> None:
        self.works: list[Callable[[], None]] = []

    def replay(self) -> None:
        for work in self.works:
            work()


@contextmanager
def fake_capture(graph: FakeGraph, **how: object) -> Iterator[None]:
    assert set(how) == {"pool", "stream", "capture_error_mode"}
    FakeGraph.capturing = graph
    try:
        yield
    finally:
        FakeGraph.capturing = None


def kernel(work: Callable[[], None]) -> None:
    """Runs it on the pretended device: at once, or whenever the graph that is being captured is replayed."""
    if FakeGraph.capturing is not None:
        FakeGraph.capturing.works.append(work)
    else:
        work()


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", fake_capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    return Cuda(CPU, graphs=True, streams=False)


def test_captured_work_is_done_once_a_call(fake_cuda: Cuda) -> None:
    """Before it is captured, in the call in which it is, and after."""
    done: list[int] = []
    work = fake_cuda.repeated(lambda: kernel(lambda: done.append(1)))
    for calls in range(1, 7):
        work()
        assert len(done) == calls
    assert fake_cuda.facts() == {"graphs": True, "streams": False, "captured": 1, "refused": 0}


def test_what_cannot_be_captured_goes_on_as_it_is(fake_cuda: Cuda, caplog: pytest.LogCaptureFixture) -> None:
    done: list[int] = []

    def asks_the_host() -> None:
        if FakeGraph.capturing is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")
        done.append(1)

    work = fake_cuda.repeated(asks_the_host)
    for calls in range(1, 7):
        work()
        assert len(done) == calls
    assert fake_cuda.facts()["refused"] == 1
    assert [record.getMessage() for record in caplog.records] == [
        "engine: a step could not be captured and goes on without: "
        "CUDA error: operation not permitted when stream is capturing"
    ]


def test_shapes_are_few() -> None:
    assert [lane_bucket(n, 200) for n in (1, 2, 3, 5, 9, 17, 33, 65, 161, 193, 200)] == [
        1, 2, 4, 8, 16, 32, 64, 96, 192, 200, 200,
    ]  # fmt: skip
    assert [length_bucket(n) for n in (1, 64, 65, 129, 257, 448, 449)] == [64, 64, 128, 256, 448, 448, 448]
    assert LENGTH_BUCKETS[-1] == 448
    assert [encoder_bucket(n) for n in (1, 3, 5, 32)] == [1, 4, 8, 32]


def test_log_mel_of_many_windows_is_that_of_each() -> None:
    """Of their own maximum and a given one, at the beginning, inside, and where the span ends within the window."""
    features = LogMel(80, CPU)
    pcm = (np.random.default_rng(4).standard_normal(N_SAMPLES + 9_000) * 3000).astype(np.int16)
    cuts = [
        Cut(pcm, 0, 3000), Cut(pcm, 40, 700), Cut(pcm, 1000, len(pcm) // 160 - 1000), Cut(pcm, 5, 2000, 0.5),
        Cut(pcm[:100], 0, 0), Cut(pcm[:4000], 3, 20, -2.0),
    ]  # fmt: skip
    together = features.windows(cuts, Host(CPU))
    for row, cut in zip(together, cuts, strict=True):
        alone = features.window(cut.pcm, cut.start, cut.n_frames, cut.maximum)
        assert torch.allclose(row, alone, atol=1e-5)
        assert torch.equal(row[:, cut.n_frames :], torch.zeros(80, 3000 - cut.n_frames))
    with pytest.raises(ValueError, match="3001"):
        features.windows([Cut(pcm, 0, 3001)], Host(CPU))


@pytest.mark.parametrize("exact", [True, False])
def test_rows_that_have_ended_stay_as_they_are(engine: LocalEngine, exact: bool) -> None:
    """`advance` beside `sample`: the same for live rows, hot and cold, and nothing for the others."""
    tokenizer, n = engine._tokenizer, 4
    plain, late = (Sampler(tokenizer, n, CPU, exact) for _ in range(2))
    temperatures = [0.0, 0.7, 0.0, 1.0]
    window = Window(Span(np.zeros(0, np.int16)), 0, 0)
    for lane, temperature in enumerate(temperatures):
        plain.admit(lane, Decode(window, (), 0, temperature, (lane,), (5, 6), 224), seed=lane)
    late.fresh(
        torch.arange(n), torch.full((n,), 224), torch.tensor(temperatures), torch.arange(n),
        late.suppression((5, 6)).expand(n, -1),
    )  # fmt: skip
    assert torch.equal(late._suppress, plain._suppress)
    generator = torch.Generator().manual_seed(9)
    for i in range(4):
        logits = torch.randn(n, tokenizer.n_vocab, generator=generator) * 4
        if i == 2:
            late.ended[3] = True
        plain.sample(logits.clone(), slice(0, n), torch.tensor([1, 3]))
        late.advance(logits, slice(0, n), any_hot=True)
        for mine, its in zip(late._progress, plain._progress, strict=True):
            assert torch.equal(mine[:3], its[:3])
    assert late.count.tolist() == [4, 4, 4, 2]
    assert plain.count.tolist() == [4] * 4
