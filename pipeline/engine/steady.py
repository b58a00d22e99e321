"""How fast a loaded engine is in steady work, and which share of the device's limits each of its stages reaches.

Steady: more windows than lanes wait from beginning to end, and the rate is taken between two moments when all lanes
were full; what comes before (shapes are made, lanes fill up) and after (they empty) is in no figure. The stages are
timed one by one on the idle engine, in the shapes of its steady work. Its floors are `floors.py`'s.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from pipeline.engine import floors
from pipeline.engine.decoding import Span, walk
from pipeline.engine.device import Device, Host
from pipeline.engine.features import N_FRAMES, Cut
from pipeline.engine.floors import WINDOW_S, Peak
from pipeline.engine.local import LocalEngine
from pipeline.engine.pipelined import PREFILL_BATCH, Encoder, PipelinedScheduler, Steps
from pipeline.engine.probe import least_s
from pipeline.engine.scheduler import Task
from pipeline.types import DecodeOptions, Pcm

_PROMPT = 3
_GEMM = 8192  # a product that large runs at what the matrix units can give
_COPIED = 1 << 30  # bytes; far more than any cache


def measured_peak(device: torch.device, dtype: torch.dtype, budget_s: float = 1.0) -> Peak:
    """What a large product and a large copy reach on this device: the limits that the floors are taken from."""
    n = _GEMM if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = least_s(lambda: torch.nn.functional.linear(a, b), device, budget_s)
    source = torch.ones(_COPIED if device.type == "cuda" else 1 << 26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = least_s(lambda: target.copy_(source), device, budget_s)
    return Peak(2 * n**3 / product, 2 * source.nbytes / copy)


# -- the rate --------------------------------------------------------------------------------------------------


class _Feed:
    """Keeps so many windows in flight, and notes when each ended.

    The first ones, as many as there are lanes, have fewer tokens, from one to all: so lanes end one after the other
    from then on, as they do in a long run, and not all at once.
    """

    def __init__(self, engine: LocalEngine, windows: Sequence[Pcm], options: DecodeOptions) -> None:
        self.ended: list[float] = []  # seconds since the beginning
        self.tokens: set[int] = set()  # numbers of them in a window, of those that had all
        self.error: Exception | None = None
        self.began = time.perf_counter()
        self._engine, self._windows, self._options = engine, windows, options
        self._n_begun, self._stopped = 0, False
        self._tasks: set[Task] = set()

    def begin(self) -> None:
        """On the dispatcher's thread, as all that follows."""
        engine, i, most = self._engine, self._n_begun, self._options.max_tokens or 1
        self._n_begun += 1
        is_short = i < engine.info.lanes
        options = replace(self._options, max_tokens=1 + i * most // engine.info.lanes) if is_short else self._options
        steps = walk(Span(self._windows[i % len(self._windows)]), options, engine._tokenizer)
        task = Task(steps, lambda result: self._take(task, result, is_short), owner=self)
        self._tasks.add(task)
        engine._scheduler.start(task)

    def _take(self, task: Task, result: Any, is_short: bool) -> None:
        self._tasks.discard(task)
        self.ended.append(time.perf_counter() - self.began)
        if isinstance(result, Exception):
            self.error = self.error or result
        elif not self._stopped:
            if not is_short:
                self.tokens.add(sum(len(segment.tokens) for segment in result.segments))
            self._engine._post(self.begin)

    def stop(self) -> None:
        """What is in flight is given up."""
        self._stopped = True
        done = threading.Event()
        self._engine._post(lambda: self._cancel(done))
        done.wait()

    def _cancel(self, done: threading.Event) -> None:
        for task in self._tasks:
            self._engine._scheduler.cancel(task)
        done.set()


def steady(engine: LocalEngine, windows: Sequence[Pcm], options: DecodeOptions, seconds: float) -> dict[str, Any]:
    """Windows a second, log-mel included, over at least `seconds` with all lanes full; raises what a window raised."""
    lanes, device = engine.info.lanes, torch.device(engine.info.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    feed, before = _Feed(engine, windows, options), lanes + lanes // 2
    for _ in range(lanes + 3 * engine._scheduler._window_batch):
        engine._post(feed.begin)
    while feed.error is None and len(feed.ended) <= before:
        time.sleep(0.005)
    cpu, start = time.process_time(), time.perf_counter()
    while feed.error is None and (len(feed.ended) < before + 3 or feed.ended[-1] - feed.ended[before] < seconds):
        time.sleep(0.005)
    cpu, took = time.process_time() - cpu, time.perf_counter() - start
    until = len(feed.ended)
    feed.stop()
    if feed.error is not None:
        raise feed.error
    counted = feed.ended[before:until]
    rate = (len(counted) - 1) / (counted[-1] - counted[0])
    return {
        "windows": len(counted) - 1,
        "seconds": counted[-1] - counted[0],
        "windows_per_s": rate,
        "rtfx": WINDOW_S * rate,
        "tokens_per_window": sorted(feed.tokens),
        "host_cpu_share": cpu / took,  # processor time of all threads over wall clock
        "memory": _memory(device),
    }


def _memory(device: torch.device) -> dict[str, float] | None:
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    peak_mb = torch.cuda.max_memory_allocated(device) / 1e6
    return {
        "peak_mb": peak_mb,
        "reserved_mb": torch.cuda.memory_reserved(device) / 1e6,
        "used_mb": (total - free) / 1e6,
    }


# -- the stages ------------------------------------------------------------------------------------------------


def stage_seconds(engine: LocalEngine, pcm: Pcm, tokens: int, budget_s: float = 1.0) -> dict[str, float]:
    """Seconds a window of each stage, timed alone on the idle engine: batches and lanes full, kernels warm.

    `prefill` is the audio's keys and values and the prompt's own pass; `step` is all of a window's tokens, with the
    vocabulary, the token rules and the sampling.
    """
    scheduler, model = engine._scheduler, engine._scheduler._model
    device: Device = scheduler._device if isinstance(scheduler, PipelinedScheduler) else Host(model.device)
    batch, lanes = scheduler._window_batch, scheduler.n_lanes
    encoder = Encoder(model, batch, device)
    scheduler._sampler.ended.fill_(True)  # so that no row goes on; whoever is admitted begins anew
    steps = Steps(model, scheduler._caches, scheduler._sampler, scheduler._positions, device)
    rows = torch.arange(min(PREFILL_BATCH, lanes), device=model.device)
    with torch.inference_mode():
        cuts = [Cut(pcm, 0, N_FRAMES)] * batch
        mel = scheduler._features.windows(cuts, device)
        hidden = encoder(mel)[:1].expand(len(rows), -1, -1)
        prompt = torch.full((len(rows), _PROMPT), scheduler._tokenizer.sot, device=model.device)
        wanted = torch.zeros(len(rows), 2, dtype=torch.int64, device=model.device)

        def per_call(work: Callable[[], Any]) -> float:
            for _ in range(3):  # captured at the third
                work()
            return least_s(work, model.device, budget_s)

        return {
            "mel": per_call(lambda: scheduler._features.windows(cuts, device)) / batch,
            "encoder": per_call(lambda: encoder(mel)) / batch,
            "prefill": per_call(lambda: model.prefill(scheduler._caches, rows, hidden, prompt, wanted)) / len(rows),
            "step": per_call(lambda: steps.take(lanes, _PROMPT + tokens, False)) * tokens / lanes,
        }


def share_of_floors(
    engine: LocalEngine, tokens: int, peak: Peak, stages: dict[str, float], window_s: float
) -> dict[str, Any]:
    """Each stage's share of its floor, and that of the whole: `window_s` are the seconds a window in steady work, of
    which what no stage accounts for is the host's, or spent waiting for it (below zero: stages ran beside each other).
    """
    scheduler, dims = engine._scheduler, engine._scheduler._model.dims
    itemsize = scheduler._model.dtype.itemsize
    costs = floors.per_window(dims, scheduler.n_lanes, tokens, scheduler._window_batch, itemsize, _PROMPT)
    stage_costs = {
        "mel": costs["mel"],
        "encoder": costs["encoder"],
        "prefill": costs["cross"],
        "step": costs["step"] + costs["vocabulary"],
    }
    floor_s = floors.floor_s(costs, peak)
    return {
        "peak": {"tflop_per_s": peak.flop_per_s / 1e12, "gb_per_s": peak.bytes_per_s / 1e9},
        "ceiling_rtfx": WINDOW_S / floor_s,
        "share_of_ceiling": floor_s / window_s,
        "unaccounted_s": window_s - sum(stages.values()),
        "stages": floors.shares(stage_costs, peak, stages),
    }
