"""What our engine's time and memory go to, and what the machine could do at most (for `pipeline/bench.py`).

The engine is measured from outside, by its public faces; only the stages are taken by clocks put around the methods
that do them, for as long as one measurement lasts. Nothing here knows other runtimes or tables.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.engine.contestants import Ours
from pipeline.engine.decoding import Sampler
from pipeline.engine.features import LogMel
from pipeline.engine.floors import encoder_flop
from pipeline.engine.local import LocalEngine
from pipeline.engine.model import WhisperModel
from pipeline.engine.pipelined import Encoder, Steps
from pipeline.engine.scheduler import Scheduler
from pipeline.types import VAD_FRAME, DecodeOptions, Pcm, Recording, Unit, UnitResult

Measured = dict[str, Any]  # at least `wall_s` and `cpu_s`
Spent = NDArray[np.float64]

# Stage → the methods that are it. What a stage's method calls of another stage is that other one's time.
STAGES: dict[str, tuple[tuple[type, str], ...]] = {
    "mel": ((LogMel, "window"), (LogMel, "windows"), (LogMel, "maximum_of")),
    "encoder": ((WhisperModel, "encode"), (Encoder, "__call__")),
    "prefill": ((WhisperModel, "prefill"),),
    "step": ((WhisperModel, "step"), (Steps, "take")),  # captured: with the rules, which are in it
    "rules": ((Sampler, "sample"), (Sampler, "admit"), (Sampler, "advance"), (Sampler, "fresh")),
    "words": ((Scheduler, "_align"),),
}


def now() -> Spent:
    """Wall clock and processor time of all threads, [2]; only their differences mean something."""
    return np.array([time.perf_counter(), time.process_time()])


class Clocks:
    """Seconds and calls of every stage while `running`. On a CUDA device each call is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.spent = {stage: np.zeros(2) for stage in STAGES}
        self.calls = dict.fromkeys(STAGES, 0)
        self._wait = waiting_for(device)
        self._inner = [np.zeros(2)]  # what nested stages took, one entry for each stage that is under way

    @contextmanager
    def running(self) -> Iterator[None]:
        plain = [(owner, name, getattr(owner, name)) for methods in STAGES.values() for owner, name in methods]
        for stage, methods in STAGES.items():
            for owner, name in methods:
                setattr(owner, name, self._timed(stage, getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, method in plain:
                setattr(owner, name, method)

    def _timed(self, stage: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            self._wait()
            start = now()
            self._inner.append(np.zeros(2))
            try:
                result = method(*arguments, **keywords)
                self._wait()
                return result
            finally:
                took = now() - start
                self.spent[stage] += took - self._inner.pop()
                self.calls[stage] += 1
                self._inner[-1] += took

        return timed


class Probe:
    """The measurements of one loaded engine. Each returns plain figures."""

    def __init__(self, ours: Ours) -> None:
        assert isinstance(ours.engine, LocalEngine)
        self._ours, self._engine = ours, ours.engine
        self._model = ours.engine._scheduler._model

    # -- one answer to the window ---------------------------------------------------------------------------

    def stages(self, windows: Sequence[Pcm], n_tokens: int, words: bool) -> Measured:
        """Where the seconds of one `decode` go; `host` is what no stage accounts for.

        `encoder_at_peak` is what the encoder would take at the speed of one large matrix product, tried just before.
        """
        products = len(windows) * encoder_flop(self._model.dims) / PRODUCT_FLOP
        at_peak = products * _product(self._model.dtype, self._model.device)
        clocks = Clocks(self._model.device)
        with clocks.running():
            measured = self.decode(windows, n_tokens, words)
        host = np.array([measured["wall_s"], measured["cpu_s"]]) - sum(clocks.spent.values())
        stages = _seconds({**clocks.spent, "host": host, "encoder_at_peak": at_peak})
        return {**measured, "encoder_at_peak": stages.pop("encoder_at_peak"), "stages": stages, "calls": clocks.calls}

    def decode(self, windows: Sequence[Pcm], n_tokens: int, words: bool) -> Measured:
        """All of them, with or without word times."""
        options = self._ours.options(n_tokens, word_timestamps=words)
        return _measured(lambda: self._engine.decode(windows, options))

    # -- windows of different lengths -----------------------------------------------------------------------

    def refilled(self, windows: Sequence[Pcm], lengths: Sequence[int]) -> Measured:
        """Each window has its own number of tokens; all are there from the beginning, a free lane takes the next."""
        return self._submit([list(zip(windows, lengths, strict=True))])

    def static(self, windows: Sequence[Pcm], lengths: Sequence[int], padded: bool) -> Measured:
        """The same in batches of as many as there are lanes, the next one only when all of a batch have ended.

        `padded`: a row that has ended stays and is computed on until the batch ends, as in transformers' `generate`
        and openai-whisper's `decode`; else it leaves, as in CTranslate2.
        """
        pairs, n = list(zip(windows, lengths, strict=True)), self._engine.info.lanes
        batches = [pairs[i : i + n] for i in range(0, len(pairs), n)]
        if padded:
            batches = [[(pcm, max(length for _, length in batch)) for pcm, _ in batch] for batch in batches]
        return self._submit(batches)

    def _submit(self, batches: Sequence[Sequence[tuple[Pcm, int]]]) -> Measured:
        options = self._ours.options(1)
        asked = [
            [(_unit(pcm, str(i)), replace(options, max_tokens=length)) for i, (pcm, length) in enumerate(batch)]
            for batch in batches
        ]
        clocks = Clocks(self._model.device)
        with clocks.running():
            measured = _measured(lambda: [asyncio.run(self._gather(batch)) for batch in asked])
        return {**measured, "stages": _seconds(clocks.spent), "steps": clocks.calls["step"]}

    async def _gather(self, asked: Sequence[tuple[Unit, DecodeOptions]]) -> None:
        await asyncio.gather(*(self._engine.submit(unit, options) for unit, options in asked))

    # -- whole recordings -----------------------------------------------------------------------------------

    def recordings(
        self, windows: Sequence[Pcm], count: int, n_tokens: int, algorithm: str, conditioned: bool
    ) -> Measured:
        """The windows as so many recordings, all of them at once: seconds, and how many windows they really were."""
        options = self._ours.options(n_tokens, algorithm=algorithm, condition_on_previous_text=conditioned)
        each = len(windows) // count
        units = [_talk(windows[i * each : (i + 1) * each], str(i)) for i in range(count)]
        results: list[UnitResult] = []
        measured = _measured(lambda: results.extend(self._engine.run(units, options)))
        return {
            **measured,
            "windows": sum(result.n_windows for result in results),
            "tokens": sum(result.tokens_generated - result.n_windows for result in results),  # end tokens are none
            "prompt_tokens": sum(result.tokens_input for result in results),
        }

    # -- the device's limits --------------------------------------------------------------------------------

    def floors(self, windows: Sequence[Pcm], n_tokens: int, window_s: float) -> dict[str, Any]:
        """Each stage's share of what the device could do at most; `window_s` are the seconds that a window takes."""
        from pipeline.engine.steady import measured_peak, share_of_floors, stage_seconds

        peak = measured_peak(self._model.device, self._model.dtype)
        stages = stage_seconds(self._engine, windows[0], n_tokens)
        return share_of_floors(self._engine, n_tokens, peak, stages, window_s)

    # -- memory and arithmetic ------------------------------------------------------------------------------

    def facts(self) -> dict[str, int]:
        """Sizes; and the floating-point operations of one window's encoder, a multiply and an add being two."""
        return {
            "lanes": self._engine.info.lanes,
            "lane_bytes": self._model.lane_bytes(),
            "weights_bytes": sum(tensor.nbytes for tensor in _tensors(vars(self._model))),
            "encoder_flop": encoder_flop(self._model.dims),
        }


def machine_peaks(device: str) -> dict[str, float]:
    """The best of several tries at a matrix product of the encoder's kind, and at reading memory once through."""
    where = torch.device(device)
    numbers = torch.ones(1 << 27, device=where)  # 512 MB: more than any cache
    return {
        "bfloat16_tflops": PRODUCT_FLOP / _product(torch.bfloat16, where)[0] / 1e12,
        "float32_tflops": PRODUCT_FLOP / _product(torch.float32, where)[0] / 1e12,
        "read_gb_per_s": numbers.nbytes / _least(numbers.sum, where)[0] / 1e9,
    }


_M, _K, _N = 6000, 512, 2048  # four windows of whisper-base through the first matrix of a feed-forward layer
PRODUCT_FLOP = 2 * _M * _K * _N


def _product(dtype: torch.dtype, device: torch.device) -> Spent:
    a, b = torch.randn(_M, _K, device=device).to(dtype), torch.randn(_N, _K, device=device).to(dtype)
    return _least(lambda: torch.nn.functional.linear(a, b), device)


def least_s(work: Callable[[], Any], device: torch.device, budget_s: float = 1.0) -> float:
    """Wall seconds of the fastest call."""
    return float(_least(work, device, budget_s)[0])


def _least(work: Callable[[], Any], device: torch.device, budget_s: float = 1.0) -> Spent:
    """The least wall and the least processor time of the calls that fit into the budget, the first one not counted."""
    wait = waiting_for(device)
    work()
    least, stop = np.full(2, np.inf), time.perf_counter() + budget_s
    while time.perf_counter() < stop:
        wait()
        start = now()
        work()
        wait()
        least = np.minimum(least, now() - start)
    return least


def _measured(work: Callable[[], Any]) -> Measured:
    start = now()
    work()
    wall_s, cpu_s = now() - start
    return {"wall_s": float(wall_s), "cpu_s": float(cpu_s)}


def _seconds(spent: Mapping[str, Spent]) -> dict[str, dict[str, float]]:
    return {stage: {"wall_s": float(wall_s), "cpu_s": float(cpu_s)} for stage, (wall_s, cpu_s) in spent.items()}


def waiting_for(device: torch.device) -> Callable[[], None]:
    """What must be called before a clock is read: on a CUDA device work goes on after the call."""
    return _wait_for_cuda if device.type == "cuda" else lambda: None


def _wait_for_cuda() -> None:
    if not torch.cuda.is_current_stream_capturing():  # nothing runs then, and to wait would break the capture
        torch.cuda.synchronize()


def _tensors(value: Any, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """Every tensor that an object's fields, lists and dicts lead to, each once; packed ones have no address."""
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        if id(value) not in seen:
            seen.add(id(value))
            yield value
        return
    if isinstance(value, dict):
        inside: Sequence[Any] = list(value.values())
    elif isinstance(value, list | tuple):
        inside = value
    else:
        names = getattr(type(value), "__slots__", ()) or getattr(value, "__dict__", ())
        inside = [getattr(value, name, None) for name in names]
    for part in inside:
        if part is not None and not isinstance(part, str | int | float | torch.device | torch.dtype):
            yield from _tensors(part, seen)


def _unit(pcm: Pcm, name: str) -> Unit:
    return Unit(Recording(id=name, uri=name), index=0, start=0, pcm=pcm, is_last=True)


_PHRASE = 900  # frames of the VAD, 28.8 s: then `windows` finds a pause, and both algorithms make as many windows
_PAUSE = 20


def _talk(windows: Sequence[Pcm], name: str) -> Unit:
    """One recording of that much of each window, with a pause that the VAD has seen where one ends."""
    pcm = np.concatenate([window[: _PHRASE * VAD_FRAME] for window in windows])
    speech = np.full(_PHRASE * len(windows), 255, np.uint8)
    for i in range(1, len(windows)):
        speech[i * _PHRASE - _PAUSE // 2 : i * _PHRASE + _PAUSE // 2] = 0
    return replace(_unit(pcm, name), speech=speech)
