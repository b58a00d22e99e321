"""An engine without a model: what it says is a hash of what it hears, and it fails on request.

It runs the whole job and the whole server on a CPU in milliseconds, and injects what a real engine would do
(`fake.faults`). Knows nothing about Ray; imports no torch. Text depends on a span's samples and nothing else, so two
runs, two orders or two cuts of a batch that should agree can be compared byte for byte.
"""

from __future__ import annotations

import asyncio
import fnmatch
import hashlib
import os
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import numpy as np

from pipeline.config import Fault, FaultStage
from pipeline.engine import EngineConfig, EngineInfo, EngineLoad, Heard, options_for
from pipeline.errors import (
    EngineError,
    EngineMemoryError,
    MurmurError,
    NonFiniteError,
    StoreError,
    failure_of,
)
from pipeline.stitch import failed_unit, stitch_unit
from pipeline.store import Store
from pipeline.types import DecodeOptions, Hypothesis, Pcm, Segment, Unit, UnitResult, Word, seconds
from pipeline.windows import n_windows, plan

_LEXICON = "amber birch cedar delta ember fjord grove haven inlet jetty kayak lotus maple north ocean pearl".split()
_AUDIBLE = 328  # of 32,768: -40 dB; quieter samples are silence to the fake
_WORDS_PER_S = 2.0
_FOREVER_S = 3600.0  # a hang, unless the fault's text gives other seconds
_LOOP = 60  # repetitions of a hallucinated loop: enough for a compression ratio far above 2.4

_ENGINE_ERRORS: dict[str, type[MurmurError]] = {"raise": EngineError, "oom": EngineMemoryError, "nan": NonFiniteError}
_SINK_ERRORS: dict[str, type[MurmurError]] = {"raise": StoreError}
_ERRORS: dict[FaultStage, dict[str, type[MurmurError]]] = {
    "engine": _ENGINE_ERRORS,
    "sink": _SINK_ERRORS,
}


class Faults:
    """The faults of a run, and how often each has struck.

    A strike is an object of its own under `state`, made before the fault acts: so the count outlives the process
    that a fault of kind `exit` kills, and the driver.
    """

    def __init__(self, faults: Sequence[Fault], state: str | None) -> None:
        self._faults = tuple(faults)
        self.state = state or f"memory://murmur-faults-{uuid.uuid4().hex}"
        self._store = Store.at(self.state)

    def strike(self, recording_id: str, stage: FaultStage) -> Fault | None:
        """The first fault that this recording still has to suffer at this stage, now counted."""
        for number, fault in enumerate(self._faults):
            mine = fault.stage == stage and fnmatch.fnmatchcase(recording_id, fault.match)
            if mine and self._count(number, fault, recording_id):
                return fault
        return None

    def inject(self, recording_id: str, stage: FaultStage) -> None:
        """Lets that fault act, if there is one: what the stages before and after the engine call."""
        fault = self.strike(recording_id, stage)
        if fault is not None:
            act(fault, stage)

    def _count(self, number: int, fault: Fault, recording_id: str) -> bool:
        key = hashlib.sha256(recording_id.encode()).hexdigest()[:16]
        return fault.times is None or any(
            self._store.create(f"{number}-{key}-{n}", b"struck\n") for n in range(fault.times)
        )


def act(fault: Fault, stage: FaultStage, sleep: Callable[[float], object] = time.sleep) -> None:
    """Does to this process what `fault` says: raises, hangs or ends it. Kinds that change the text do nothing here.

    Faults of stage `decode` are for the decoder's own process (`decoder_child.py`).
    """
    if fault.kind == "exit":
        os._exit(1)
    if fault.kind == "hang":
        sleep(hang_s(fault))
    error = _ERRORS[stage].get(fault.kind)
    if error is not None:
        raise error(fault.text or f"injected {fault.kind}")


def hang_s(fault: Fault) -> float:
    """How long a hang lasts: its text in seconds, else an hour."""
    return float(fault.text) if fault.text else _FOREVER_S


class FakeEngine:
    """`Engine` without a model. Every call is independent; only faults are counted."""

    def __init__(self, config: EngineConfig) -> None:
        self._faults = Faults(config.fake_faults or (), config.fake_state)
        self._n_windows = 0
        self._progress = time.monotonic()  # when a Unit was last taken in or given up
        self.info = EngineInfo(
            model=config.model,
            revision=config.revision,
            device="cpu",
            dtype="float32",
            lanes=config.lanes or 8,
            lane_bytes=0,
            languages=("en", "de", "es"),
        )

    def decode(self, windows: Sequence[Pcm], options: DecodeOptions) -> list[Hypothesis]:
        return [hear(pcm, options) for pcm in windows]

    def run(self, units: Iterable[Unit], options: DecodeOptions) -> Iterator[UnitResult]:
        for unit in units:
            fault = self._faults.strike(unit.recording.id, "engine")
            try:
                with self._in_flight(unit, options):
                    if fault is not None:
                        act(fault, "engine")
                    result = self._result(unit, options, fault)
            except EngineError as error:
                result = failed_unit(unit, failure_of(error, "engine"))
            yield result

    async def submit(
        self, unit: Unit, options: DecodeOptions, heard: Heard | None = None, brief: bool = False
    ) -> UnitResult:
        fault = self._faults.strike(unit.recording.id, "engine")
        with self._in_flight(unit, options):
            if fault is not None and fault.kind == "hang":  # the event loop must go on serving the others
                await asyncio.sleep(hang_s(fault))
            elif fault is not None:
                act(fault, "engine")
            result = self._result(unit, options, fault)
            if heard is not None and result.segments:
                heard(result.segments)
            return result

    @contextmanager
    def _in_flight(self, unit: Unit, options: DecodeOptions) -> Iterator[None]:
        windows = n_windows(unit.n_samples, options)
        self._n_windows += windows
        self._progress = time.monotonic()
        try:
            yield
        finally:
            self._n_windows -= windows
            self._progress = time.monotonic()

    @property
    def n_windows(self) -> int:
        """Those of the Units whose hang somebody awaits; the rest is answered at once."""
        return self._n_windows

    def load(self) -> EngineLoad:
        """As if a hang were the device's: nothing in flight comes further while it lasts."""
        in_flight, lanes = self._n_windows, self.info.lanes
        idle_s = time.monotonic() - self._progress if in_flight else 0.0
        return EngineLoad(lanes, min(lanes, in_flight), max(0, in_flight - lanes), idle_s)

    def close(self) -> None:
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def _result(self, unit: Unit, options: DecodeOptions, fault: Fault | None) -> UnitResult:
        options = options_for(unit.recording, options)
        the_plan = plan(unit, options)
        hypotheses = [hear(unit.pcm[span.start : span.stop], options, fault) for span in the_plan.spans]
        return stitch_unit(unit, the_plan, hypotheses)


def hear(pcm: Pcm, options: DecodeOptions, fault: Fault | None = None) -> Hypothesis:
    """The fake transcript of one span, int16 [n]: one segment over its audible part, none in silence."""
    language = options.language if options.language not in (None, "window") else "en"
    audible = np.flatnonzero(np.abs(pcm.astype(np.int32)) >= _AUDIBLE)
    windows = n_windows(len(pcm), options)
    kind = fault.kind if fault is not None else None
    if len(audible) == 0 or (fault is not None and _is_emptied(pcm, fault)):
        return Hypothesis((), language, 1.0, n_windows=windows)
    start, end = seconds(int(audible[0])), seconds(int(audible[-1]) + 1)
    words = _words(pcm, end - start)
    if fault is not None and kind in ("text", "loop"):
        words = fault.text.split() if kind == "text" else (fault.text or "round and").split() * _LOOP
    segment = _segment(words, start, end, options.word_timestamps)
    return Hypothesis((segment,), language, 1.0, n_windows=windows, tokens_generated=len(words))


def _is_emptied(pcm: Pcm, fault: Fault) -> bool:
    """Whether a span loses its text: all do, or the share that the fault's text says, chosen by their samples."""
    share = float(fault.text or 1.0) if fault.kind == "empty" else 0.0
    return int.from_bytes(hashlib.sha256(pcm.tobytes()).digest()[-4:], "little") < share * 2**32


def _words(pcm: Pcm, duration_s: float) -> list[str]:
    """About two words a second, drawn from the samples' own hash."""
    seed = hashlib.sha256(np.ascontiguousarray(pcm).tobytes()).digest()
    draw = np.random.default_rng(list(seed)).integers(len(_LEXICON), size=max(1, round(duration_s * _WORDS_PER_S)))
    return [_LEXICON[i] for i in draw]


def _segment(words: Sequence[str], start: float, end: float, with_words: bool) -> Segment:
    step = (end - start) / max(1, len(words))
    text = "".join(f" {word}" for word in words).encode()
    timed = tuple(
        Word(f" {word}", start + i * step, start + (i + 1) * step, probability=0.9) for i, word in enumerate(words)
    )
    return Segment(
        start=start,
        end=end,
        text=text.decode(),
        tokens=tuple(_LEXICON.index(word) if word in _LEXICON else len(_LEXICON) for word in words),
        avg_logprob=-0.2,
        compression_ratio=len(text) / max(1, len(zlib.compress(text))),
        no_speech_prob=0.01,
        temperature=0.0,
        words=timed if with_words else (),
    )
