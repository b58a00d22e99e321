"""The real engine: one dispatcher thread owns the device, the faces of `Engine` put work into its inbox.

It knows how a Unit becomes walks and their Hypotheses a result; batching is `scheduler.py`'s, the method
`decoding.py`'s.
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import hashlib
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial
from typing import Any, Self

import numpy as np
import torch

from pipeline.engine import EngineConfig, EngineInfo, EngineLoad, Heard, Tuning, options_for
from pipeline.engine.checkpoint import resolve_model, revision_of
from pipeline.engine.decoding import Opening, Request, Span, Window, first_window, hear, walk
from pipeline.engine.device import device_for
from pipeline.engine.features import HOP, N_SAMPLES, LogMel
from pipeline.engine.language import Heard as HeardLanguages
from pipeline.engine.language import settle
from pipeline.engine.model import WhisperModel
from pipeline.engine.pipelined import PipelinedScheduler
from pipeline.engine.scheduler import Scheduler, Task
from pipeline.engine.tokens import Tokenizer, check_options
from pipeline.errors import ConfigError, EngineError, ModelError, MurmurError, failure_of
from pipeline.machine import has_bfloat16
from pipeline.stitch import failed_unit, place, stitch_unit
from pipeline.types import SAMPLE_RATE, VAD_FRAME, DecodeOptions, Hypothesis, Pcm, Plan, Range, Unit, UnitResult
from pipeline.windows import join, language_slice, plan

log = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class LocalEngine:
    """See `pipeline.engine.Engine`."""

    def __init__(
        self, model: WhisperModel, tokenizer: Tokenizer, info: EngineInfo, tuning: Tuning | None = None
    ) -> None:
        self.info = info
        self._tokenizer = tokenizer
        features = LogMel(model.dims.n_mels, model.device)
        self._device = model.device
        self._scheduler = _scheduler(model, tokenizer, features, info.lanes, tuning)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closed = False
        self._door = threading.Lock()  # nothing is posted behind the end
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._dispatch, name="engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread still inside torch when the interpreter ends aborts the process

    @classmethod
    def open(cls, config: EngineConfig) -> LocalEngine:
        folder = resolve_model(config.model, config.revision)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        device, dtype = _device(config.device), config.dtype
        if dtype == "auto":
            dtype = half_of(device.type) or "float32"
        if device.type == "cpu":
            _keep_memory()
        model = WhisperModel(folder, device, _DTYPES[dtype])
        tokenizer = Tokenizer.load(folder, model.dims.n_vocab)
        info = EngineInfo(
            model=config.model,
            revision=revision_of(folder, config.revision),
            device=str(device),
            dtype=dtype,
            lanes=config.lanes or _lanes_that_fit(model),
            lane_bytes=model.lane_bytes(),
            languages=tuple(tokenizer.languages),
        )
        return cls(model, tokenizer, info, config.tuning)

    # -- faces -----------------------------------------------------------------------------------------------

    def decode(self, windows: Sequence[Pcm], options: DecodeOptions) -> list[Hypothesis]:
        check_options(options, self._tokenizer)
        too_long = next((i for i, pcm in enumerate(windows) if len(pcm) > N_SAMPLES), None)
        if too_long is not None:
            raise EngineError(f"window {too_long} has {len(windows[too_long])} samples; at most {N_SAMPLES} fit")
        whose = object()
        futures = [self._start_walk(Span(pcm), options, whose) for pcm in windows]
        return [future.result() for future in futures]

    def run(self, units: Iterable[Unit], options: DecodeOptions) -> Iterator[UnitResult]:
        check_options(options, self._tokenizer)
        finished: queue.SimpleQueue[_UnitJob] = queue.SimpleQueue()
        todo = iter(units)
        jobs: dict[_UnitJob, Unit] = {}
        more = True
        try:
            while more or jobs:
                # Twice the lanes' worth of spans keeps them filled while the caller handles a result.
                while more and (not jobs or sum(job.n_spans for job in jobs) < 2 * self._scheduler.n_lanes):
                    unit = next(todo, None)
                    if unit is None:
                        more = False
                        break
                    try:
                        job = self._submit(unit, options)
                    except ConfigError as error:  # what this recording's manifest line asks for
                        yield failed_unit(unit, failure_of(error, "engine"))
                        continue
                    jobs[job] = unit
                    job.future.add_done_callback(partial(_hand_over, finished, job))
                if jobs:
                    job = finished.get()
                    yield job.result(jobs.pop(job))
        finally:  # a caller that goes away takes its work along
            for job in jobs:
                job.future.cancel()

    async def submit(
        self, unit: Unit, options: DecodeOptions, heard: Heard | None = None, brief: bool = False
    ) -> UnitResult:
        return await asyncio.wrap_future(self._submit(unit, options, heard, brief).future)

    @property
    def n_windows(self) -> int:
        return self._scheduler.n_windows

    def load(self) -> EngineLoad:
        return self._scheduler.load()

    def close(self) -> None:
        with self._door:
            if not self._closed:
                self._closed = True
                self._inbox.put(None)
        self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- from a Unit to walks --------------------------------------------------------------------------------

    def _submit(self, unit: Unit, options: DecodeOptions, heard: Heard | None = None, brief: bool = False) -> _UnitJob:
        options = options_for(unit.recording, options)
        check_options(options, self._tokenizer)
        job = _UnitJob(self, unit, options, heard, brief)
        self._post(job.start)
        return job

    def _start_walk(self, span: Span, options: DecodeOptions, whose: object) -> Future[Any]:
        future: Future[Any] = Future()
        task = Task(walk(span, options, self._tokenizer), lambda result: _settle(future, result), whose)
        self._post(lambda: self._scheduler.start(task))
        return future

    # -- the dispatcher --------------------------------------------------------------------------------------

    def _post(self, work: Callable[[], None]) -> None:
        with self._door:
            if self._closed:
                raise EngineError("the engine is closed")
            self._inbox.put(work)

    def _dispatch(self) -> None:
        """Owns the device: takes in what came, then one step for all, until closed."""
        torch.set_num_threads(self._threads)  # OpenMP keeps the number for each thread
        if self._device.type == "cuda" and self._device.index is not None:
            torch.cuda.set_device(self._device)  # CUDA keeps the present device for each thread
        while True:
            while self._scheduler.idle or not self._inbox.empty():
                work = self._inbox.get()
                if work is None:
                    self._scheduler.fail_all(EngineError("the engine was closed"))
                    return
                try:
                    work()
                except Exception:  # it has told its own future; the dispatcher serves all others
                    log.exception("engine: a request could not be started")
                del work  # and with it the Unit, however long the next one is in coming
            try:
                self._scheduler.step()
            except Exception as error:  # the device's state is unknown: everything in flight ends, the engine goes on
                self._scheduler.fail_all(EngineError(f"{type(error).__name__}: {error}"))


class _UnitJob:
    """One Unit in flight: all its spans are walked at once, the last one's end makes the result."""

    def __init__(
        self, engine: LocalEngine, unit: Unit, options: DecodeOptions, heard: Heard | None, brief: bool
    ) -> None:
        self._heard, self._n_told = heard, 0  # spans whose segments it was told
        self._is_brief = brief
        self.future: Future[UnitResult] = Future()
        self._engine, self._unit, self._options = engine, unit, options
        self._plan = plan(unit, options)
        self._hypotheses: dict[int, Hypothesis] = {}
        self._tasks: list[Task] = []
        self.n_spans = len(self._plan.spans)
        self.future.add_done_callback(self._clean_up)

    def result(self, unit: Unit) -> UnitResult:
        """What became of the Unit, which is this; an error that is its own makes it a failed one."""
        try:
            return self.future.result()
        except EngineError as error:
            return failed_unit(unit, failure_of(error, "engine"))

    def start(self) -> None:
        """On the dispatcher's thread, as all that follows."""
        try:
            self._start_walks()
        except Exception as error:
            _settle(self.future, error)
            raise

    def _start_walks(self) -> None:
        if not self.n_spans:
            self._finish()
            return
        if self._options.language == "window" and self._options.algorithm == "windows":
            self._listen()
        else:
            self._walk({})

    def _spans(self) -> list[Span]:
        """`sequential` asks the voice detector nothing: it is the reference's method."""
        unit, whole = self._unit, self._options.algorithm == "sequential"
        speech = None if whole else unit.speech
        return [
            Span(
                unit.pcm[r.start : r.stop],
                unit.start + r.start,
                global_maximum=whole,
                speech=None if speech is None else speech[r.start // VAD_FRAME : -(-r.stop // VAD_FRAME)],
            )
            for r in self._plan.spans
        ]

    def _listen(self) -> None:
        """Hears every phrase, then walks through what belongs together: see `pipeline.engine.language`."""
        codes = list(self._engine._tokenizer.languages)
        nothing = np.full(max(1, len(codes)), 1 / max(1, len(codes)))  # is heard where one cannot tell
        heard = [nothing] * self.n_spans
        windows: dict[int, Window] = {}
        if len(codes) and self.n_spans > 1:
            found = enumerate(first_window(span, self._options) for span in self._spans())
            windows = {i: window for i, window in found if window is not None}
        left = set(windows)

        def take(i: int, result: HeardLanguages | Exception) -> None:
            if isinstance(result, Exception):
                _settle(self.future, result)
                return
            heard[i] = result
            left.remove(i)
            if not left and not self.future.done():
                self._join(np.array(heard), windows)
                windows.clear()  # the tasks know this function

        for i, window in tuple(windows.items()):
            self._start(hear(window), partial(take, i))
        if not windows:
            self._joined([0] * self.n_spans)  # a model of one language, or nothing to join
            self._walk({})

    def _join(self, heard: HeardLanguages, windows: Mapping[int, Window]) -> None:
        """Walks through the phrases, neighbours in one language together."""
        codes, languages = list(self._engine._tokenizer.languages), settle(heard)
        openings = {}
        for i, group in enumerate(self._joined(languages)):
            k = languages[group[0]]
            window = windows.get(group[0]) if len(group) == 1 else None
            openings[i] = Opening(codes[k], float(heard[group, k].mean()), window)
        self._walk(openings)

    def _joined(self, languages: Sequence[int]) -> list[range]:
        """Makes the plan's phrases into spans; returns which phrases are in each."""
        spans = self._plan.spans
        groups = join(spans, languages, self._options.chunk_length_s * SAMPLE_RATE)
        joined = tuple(Range(spans[group[0]].start, spans[group[-1]].stop) for group in groups)
        self._plan, self.n_spans = Plan(joined, self._plan.skipped), len(joined)
        return groups

    def _walk(self, openings: Mapping[int, Opening]) -> None:
        unit, voice = self._unit, self._voice()
        for i, span in enumerate(self._spans()):
            is_first = unit.index == 0 and i == 0
            steps = walk(span, self._options, self._engine._tokenizer, voice, is_first, openings.get(i))
            self._start(steps, partial(self._take, i))

    def _start(self, steps: Generator[Request, Any, Any], done: Callable[[Any], None]) -> None:
        if not self.future.done():
            task = Task(steps, done, owner=self, brief=self._is_brief)
            self._tasks.append(task)
            self._engine._scheduler.start(task)

    def _voice(self) -> Window | None:
        """What the recording's language is detected on; None: the span's own first 30 s, the reference's way."""
        if self._options.language is not None:
            return None
        pcm = self._unit.language_pcm
        if pcm is None and self._options.algorithm == "windows":
            pcm = language_slice(self._unit)
        if pcm is None or len(pcm) < HOP:
            return None
        key = hashlib.blake2b(pcm.tobytes(), digest_size=16).digest()
        return Window(Span(pcm), seek=0, n_frames=min(len(pcm), N_SAMPLES) // HOP, key=key)

    def _take(self, i: int, result: Hypothesis | Exception) -> None:
        if isinstance(result, Exception):
            _settle(self.future, result)
            return
        self._hypotheses[i] = result
        if self._heard is not None:
            self._tell(self._heard)
        if len(self._hypotheses) == self.n_spans:
            self._finish()

    def _tell(self, heard: Heard) -> None:
        """What is decided up to the first span that is not."""
        while self._n_told in self._hypotheses and not self.future.done():
            span, hypothesis = self._plan.spans[self._n_told], self._hypotheses[self._n_told]
            self._n_told += 1
            if segments := place(self._unit, span, hypothesis):
                try:
                    heard(segments)
                except Exception:  # its loop has ended, say: that may not cost the others in the batch anything
                    log.exception("engine: a listener failed")
                    self._heard = None
                    return

    def _finish(self) -> None:
        hypotheses = [self._hypotheses[i] for i in range(self.n_spans)]
        try:
            result: Any = stitch_unit(self._unit, self._plan, hypotheses)
        except Exception as error:  # whatever it is, somebody awaits this future
            result = error
        _settle(self.future, result)

    def _clean_up(self, future: Future[UnitResult]) -> None:
        """Ended in whatever way: what is left of it gives up its lanes, and it its samples."""
        if future.cancelled() or future.exception() is not None:
            self._engine._inbox.put(self._give_up)
        else:
            self._let_go()

    def _give_up(self) -> None:
        for task in self._tasks:
            self._engine._scheduler.cancel(task)
        self._let_go()

    def _let_go(self) -> None:
        """A job, its future and its tasks know each other: what they hold would wait for the garbage collector, which
        is long in coming, and a Unit has up to 10 MB."""
        self._tasks.clear()
        del self._unit


def _settle(future: Future[Any], result: Any) -> None:
    """Tells whoever awaits it, unless they have cancelled; an error that is not of our tree is an `EngineError`."""
    with suppress(InvalidStateError):
        if not isinstance(result, Exception):
            future.set_result(result)
        elif isinstance(result, MurmurError):
            future.set_exception(result)
        else:
            error = EngineError(f"{type(result).__name__}: {result}")
            error.__cause__ = result
            future.set_exception(error)


def _scheduler(
    model: WhisperModel, tokenizer: Tokenizer, features: LogMel, lanes: int, tuning: Tuning | None
) -> Scheduler:
    tuning = tuning or Tuning()
    if not (model.device.type == "cuda" if tuning.static is None else tuning.static):
        return Scheduler(model, tokenizer, features, lanes)
    device = device_for(model.device, tuning.graphs, tuning.streams)
    return PipelinedScheduler(model, tokenizer, features, lanes, tuning, device)


def half_of(device: str) -> str | None:
    """The half precision that a kind of device computes fast in; None: it has none."""
    if device == "cuda":
        return "float16"
    return "bfloat16" if device == "cpu" and has_bfloat16() else None


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is none of auto, cpu, cuda, cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {name!r}: torch finds no CUDA device here")
    return device


def _lanes_that_fit(model: WhisperModel) -> int:
    """As many lanes as a part of the free memory holds: a larger batch than this gains nothing more."""
    if model.device.type == "cuda":
        free, most, part = torch.cuda.mem_get_info(model.device)[0], 256, 0.6
    else:
        free, most, part = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), 16, 0.25
    return max(1, min(most, int(free * part) // model.lane_bytes()))


def _keep_memory() -> None:
    """Tells glibc to keep what tensors give back: asking for it again took 5-10 % of the encoder's time."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # musl has none
            mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # as high as it goes
            mallopt(_M_TRIM_THRESHOLD, 512 << 20)


def _hand_over(finished: queue.SimpleQueue[_UnitJob], job: _UnitJob, _: Future[UnitResult]) -> None:
    finished.put(job)
