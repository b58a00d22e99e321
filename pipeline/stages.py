"""The callables that Ray Data runs in its workers: each a few lines over a pure function, and the row between them.

    decode: blocks of todo → rows of one Unit each      EngineStage: rows of Units → rows to commit

Every batch crosses as an Arrow table with a schema of ours, so that no column's type hangs on what happens to be in
a block: an all-null column is typed, a block of equal lengths is like any other. PCM is `binary` (the int16 samples'
own bytes, little-endian) and not Ray's tensor type, which differs between ragged and uniform blocks; read back with
`np.frombuffer` it is as zero-copy. A Unit of 7,200 s is 230 MB, far below binary's 2 GiB a block.
"""

from __future__ import annotations

import asyncio
import dataclasses
import faulthandler
import functools
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from pipeline import channels, logs
from pipeline.census import ALONE, BLOCK_DEATHS, CRASHES, DEFERRED, IN_A_ROW, LATER, Verdict
from pipeline.config import Config
from pipeline.engine import Engine, EngineConfig, load_engine
from pipeline.engine.fake import Faults
from pipeline.errors import (
    ConfigError,
    CrashLoopError,
    EngineError,
    MurmurError,
    StoreError,
    WorkerCrashError,
    failure_of,
)
from pipeline.manifest import identity, store_of
from pipeline.metrics import Meters, Metric, Record
from pipeline.progress import News
from pipeline.schema import UNITS, to_table, unit_row
from pipeline.served import ServedEngine
from pipeline.stitch import failed_unit
from pipeline.stopwatch import Rate, clocked
from pipeline.todo import Item, Source, from_json, to_json
from pipeline.types import DecodeOptions, Failure, Recording, Spent, Unit, UnitResult, seconds
from pipeline.units import read_units
from pipeline.windows import n_windows

log = logging.getLogger(__name__)
AnyEngine = Engine | ServedEngine
_PACK = 512 << 10  # 16 s of audio

UNIT_ROW = pa.schema(
    [
        ("recording", pa.string()),
        ("index", pa.int32()),
        ("start", pa.int64()),
        ("is_last", pa.bool_()),
        ("channels", pa.int8()),  # of `pcm` and `speech`; null: they have no such dimension
        ("pcm", pa.binary()),  # null: decoding failed
        ("speech", pa.binary()),
        ("language_pcm", pa.binary()),
        ("flags", pa.list_(pa.string())),
        ("attempts", pa.int32()),
        ("failure", pa.string()),  # JSON of every field of `Failure`
        ("spent", pa.string()),  # JSON of every field of `Spent`
    ]
)


def decode(
    blocks: pa.Table,
    source: Source,
    config: Config,
    faults: Faults | None = None,
    census: Any = None,
    is_final: bool = True,
) -> Iterator[pa.Table]:
    """One row for each Unit still to be done of the recordings in `blocks`; what cannot be read is a row too.

    Every recording is read from its start, also where some of its Units are done: only so are they cut the same way.
    With a `census` (the handle of a `pipeline.census.Census`), a source that fails is put off unless the pass
    `is_final`. Raises `StoreError` where a store refuses everything.
    """
    _set_up_worker(config, census)
    for place in blocks.to_pylist():
        items = source.read(**place)
        block = _Block(census, items[0].recording.id, is_final) if census is not None else None
        yield from _packed(_rows_of_block(items, block, config, faults))
        if block is not None:
            block.close()


def _rows_of_block(
    items: Iterable[Item], block: _Block | None, config: Config, faults: Faults | None
) -> Iterator[dict[str, Any]]:
    for item in items:
        units = _still_to_do(_read(_identified(item.recording), config, faults), item.done, item.gap_start)
        watched = units if block is None else block.watched(item.recording, units)
        with logs.about(item.recording.id):
            for unit, spent in clocked(watched):
                count_decoded(unit, spent)
                yield unit_to_row(dataclasses.replace(unit, spent=spent))


def _packed(rows: Iterable[dict[str, Any]]) -> Iterator[pa.Table]:
    """Rows in tables of some `_PACK` bytes of samples: Ray takes a while over each, however small."""
    some: list[dict[str, Any]] = []
    n_bytes = 0
    for row in rows:
        some.append(row)
        n_bytes += len(row.get("pcm") or b"")
        if n_bytes >= _PACK:
            yield pa.Table.from_pylist(some, schema=UNIT_ROW)
            some, n_bytes = [], 0
    if some:
        yield pa.Table.from_pylist(some, schema=UNIT_ROW)


class _Block:
    """What a decode task tells the census of its recordings, and what it makes of the answers.

    A question a block while all is well: one a recording would be a third of the time of short ones.
    """

    def __init__(self, census: Any, name: str, is_final: bool) -> None:
        context = ray.get_runtime_context()
        self._census, self._name, self._is_final = census, name, is_final
        self._read: dict[str, str] = {}  # by store, the last recording that was read
        self._deaths = ray.get(census.opened.remote(name, context.get_worker_id(), context.get_node_id()))

    def watched(self, recording: Recording, items: Iterable[Unit | UnitResult]) -> Iterator[Unit | UnitResult]:
        """`items` of this recording, but for what is put off."""
        if self._deaths and ray.get(self._census.is_deadly.remote(self._name, recording.id)):
            error = WorkerCrashError(f"{BLOCK_DEATHS} decode processes died while they read this recording")
            yield _unread(recording, error, attempts=BLOCK_DEATHS)
            return
        for item in items:
            failure = item.failure if isinstance(item, UnitResult) else None
            if failure is not None and failure.kind in LATER and not self._is_final:
                self._put_off(recording, failure)
                return
            yield item
        self._read[store_of(recording.uri)] = to_json(recording)

    def close(self) -> None:
        self._census.closed.remote(self._name, list(self._read.items()))

    def _put_off(self, recording: Recording, failure: Failure) -> None:
        store = store_of(recording.uri)
        if store in self._read:
            self._census.answered.remote(store, self._read.pop(store))  # in order, so the count begins anew
        if not ray.get(self._census.refused.remote(store, to_json(recording), failure.kind)):
            raise StoreError(
                f"{store} refuses: more than {IN_A_ROW} recordings in a row could not be read, the last one with"
                f" «{failure.message}»; they are not marked as failed, and the same command goes on with them"
            )


def _still_to_do(
    items: Iterable[Unit | UnitResult], done: frozenset[int], gap_start: int | None
) -> Iterator[Unit | UnitResult]:
    """Those of `items` that are not `done`.

    Audio that can no longer be read ends the recording where the first Unit is missing, or it would stay unfinished.
    """
    for item in items:
        if item.index not in done:
            yield item
        elif isinstance(item, UnitResult) and gap_start is not None:
            gap = next(i for i in range(len(done) + 1) if i not in done)
            yield dataclasses.replace(item, index=gap, start=gap_start)


def _identified(recording: Recording) -> Recording:
    """With size and etag, where no listing told: the ledger notes them, so that other bytes are found out later."""
    if recording.size is not None or recording.etag is not None:
        return recording
    size, etag = identity(recording.uri)
    return dataclasses.replace(recording, size=size, etag=etag)


def _read(recording: Recording, config: Config, faults: Faults | None) -> Iterator[Unit | UnitResult]:
    return read_units(recording, config, partial(faults.strike, recording.id, "decode") if faults else None)


def _unread(recording: Recording, error: MurmurError, attempts: int = 1) -> UnitResult:
    """The row of a recording of which nothing was read."""
    return UnitResult(
        recording, 0, is_last=True, start=0, n_samples=0, failure=failure_of(error, "decode", attempts=attempts)
    )


def fail_before_commit(units: pa.Table, faults: Faults) -> None:
    """Injects the faults of stage `sink`: called when the data object is put and the ledger object is not."""
    for recording_id in units["recording_id"].unique().to_pylist():
        faults.inject(recording_id, "sink")


class EngineStage:
    """One engine in a process of its own. Ray calls it with several batches at once; their Units share its lanes.

    With a `census`, a Unit that was in an engine when that died is put off, and run by itself in a pass that is
    `alone`; there one that kills again and again fails. An engine that stands still for `engine_timeout_s` ends its
    own process, which makes a hang a death like any other. Without `engine` it is a running application's.
    """

    def __init__(self, config: Config, engine: EngineConfig | None, census: Any = None, alone: bool = False) -> None:
        _set_up_worker(config, census)
        self._options = config.decode_options()
        self._census, self._alone = census, alone
        self._door = Door()
        self._engine: AnyEngine | MurmurError
        try:
            self._name = _register(census)
            self._engine = ServedEngine(config) if engine is None else load_engine(engine)
            log.info("engine: %s", self._engine.info)
            self._gauges = Gauges(self._engine)
            self._door.limit = 1 if alone else 2 * self._engine.info.lanes
            if census is not None:  # in a process of the job, which is started again
                exit_when_stuck(self._engine, config.engine_timeout_s)
        except MurmurError as error:
            # Raised here it would reach the driver as text inside a dead actor's traceback; from a call it arrives.
            self._engine = error

    async def __call__(self, units: pa.Table) -> pa.Table:
        """One row of `schema.UNITS` for each row of `units`, in order; rows put off say so, and are not committed."""
        if isinstance(self._engine, MurmurError):
            raise self._engine
        items = [unit_from_row(row) for row in rows_of(units)]
        windows = sum(_n_windows(item, self._options) for item in items if isinstance(item, Unit))
        async with self._door.opened(windows):
            results = await self._results(items, self._engine)
        return to_table((unit_row(result) for result in results), UNITS)

    async def _results(self, items: Sequence[Unit | UnitResult], engine: AnyEngine) -> list[UnitResult]:
        units = [item for item in items if isinstance(item, Unit)]
        keys = [(unit.recording.id, unit.index) for unit in units]
        verdicts = dict.fromkeys(keys, Verdict.RUN)
        if self._census is not None and units:
            asked = [(key, to_json(unit.recording)) for key, unit in zip(keys, units, strict=True)]
            answer = await self._census.take.remote(self._name, asked, self._alone)
            verdicts = dict(zip(keys, answer, strict=True))
        results = await asyncio.gather(
            *(
                self._result(item, engine, verdicts[item.recording.id, item.index]) if isinstance(item, Unit)
                else _ready(item)
                for item in items
            )
        )  # fmt: skip
        if self._census is not None and units:
            self._census.done.remote(self._name, keys)
        return results

    async def _result(self, unit: Unit, engine: AnyEngine, verdict: Verdict) -> UnitResult:
        if verdict == Verdict.DEFER:
            return failed_unit(unit, Failure(DEFERRED, "its engine died; it is run alone later", "engine"))
        if verdict == Verdict.FAIL:
            error = WorkerCrashError(f"the engine's process died with this Unit alone in it, {ALONE} times")
            return failed_unit(unit, failure_of(error, "engine", attempts=ALONE + 1))
        with logs.about(unit.recording.id), self._gauges.in_flight():
            return await self._submitted(unit, engine)

    async def _submitted(self, unit: Unit, engine: AnyEngine) -> UnitResult:
        began = time.monotonic()
        try:
            parts = (engine.submit(one, self._options) for one in channels.split(unit))
            result = channels.merge(await asyncio.gather(*parts))
        except (EngineError, ConfigError) as error:  # the latter: what a manifest line asks of this model
            result = failed_unit(unit, failure_of(error, "engine"))
        if result.failure is None:
            self._gauges.transcribed(unit)
        else:
            log.warning("Unit %d: %s: %s", unit.index, result.failure.kind, result.failure.message)
        engine_s = time.monotonic() - began
        meters().spent(Spent(engine_s=engine_s))
        return dataclasses.replace(result, spent=dataclasses.replace(unit.spent or Spent(), engine_s=engine_s))


class Door:
    """Lets calls into the engine in their order, until the windows of their Units fill its lanes twice.

    The engine shares its lanes fairly: with more Units in it than it needs, all would end late, and a kill would cost
    what each had so far, and make more of them suspect.
    """

    def __init__(self, limit: int = 1) -> None:
        self.limit = limit  # windows
        self._inside = 0
        self._changed = asyncio.Condition()
        self._queue = asyncio.Lock()  # fair: who came first goes in first, also a long one

    @asynccontextmanager
    async def opened(self, windows: int) -> AsyncIterator[None]:
        """Within the body, so many windows are inside."""
        async with self._queue, self._changed:
            await self._changed.wait_for(lambda: self._inside < self.limit)
            self._inside += windows
        try:
            yield
        finally:
            async with self._changed:
                self._inside -= windows
                self._changed.notify_all()


def _n_windows(unit: Unit, options: DecodeOptions) -> int:
    """How many of its windows can be in lanes at once, about."""
    if options.algorithm == "sequential":
        return 1
    return n_windows(unit.pcm.size, options)


def _set_up_worker(config: Config, census: Any) -> None:
    """Log lines of a process of the job (it has a census) look as the driver's do."""
    if census is not None:
        logs.set_up(config.log_format)


async def _ready(result: UnitResult) -> UnitResult:
    return result


def _register(census: Any) -> str:
    """The name of this actor, which a process started in its place has too; the census now knows that it lives.

    Raises `CrashLoopError` where engines die whatever they are given.
    """
    if census is None:
        return ""
    context = ray.get_runtime_context()
    name: str = context.get_actor_id()
    if not ray.get(census.born.remote(name, context.get_node_id())):
        raise CrashLoopError(
            f"the last {CRASHES} engine processes died without one Unit done: it is not the audio; the reason stands"
            " in Ray's worker logs (run with --verbose), and the same command goes on from here"
        )
    return name


def exit_when_stuck(engine: AnyEngine, timeout_s: float) -> None:
    """End this process, with every thread's stack in its log, when `engine` has work and stands still for that long.

    The alarm is a thread of faulthandler's own, in C: it goes off also while whoever hangs holds the interpreter's
    lock. What rearms it is a thread here, for as long as the engine moves.
    """

    def watch() -> None:
        while True:
            if engine.load().idle_s < timeout_s / 2:
                faulthandler.dump_traceback_later(timeout_s / 2, exit=True)
            time.sleep(min(5.0, timeout_s / 8))

    threading.Thread(target=watch, name="watchdog", daemon=True).start()


# ---- what is counted, see `pipeline.metrics`


@functools.cache
def _ray_meters() -> Meters:
    return Meters(_instrument)


def meters() -> Meters:
    """The metrics of this process, exported by the Ray it is connected to; without one they go nowhere."""
    return _ray_meters() if ray.is_initialized() else Meters(lambda metric: lambda value, labels: None)


def _instrument(metric: Metric) -> Record:
    from ray.util import metrics

    about: dict[str, Any] = {"description": metric.help, "tag_keys": tuple(metric.labels)}
    if metric.kind == "counter":
        counter = metrics.Counter(metric.name, **about)
        return lambda value, labels: counter.inc(value, tags=labels)
    if metric.kind == "gauge":
        gauge = metrics.Gauge(metric.name, **about)
        return lambda value, labels: gauge.set(value, tags=labels)
    histogram = metrics.Histogram(metric.name, boundaries=list(metric.buckets), **about)
    return lambda value, labels: histogram.observe(value, tags=labels)


def count_decoded(item: Unit | UnitResult, spent: Spent) -> None:
    """In a decode task, for each Unit that leaves it; a file that failed is in the worker's log with its reason."""
    meters().record("murmur_audio_seconds_total", seconds(item.n_samples), stage="decoded")
    meters().spent(spent)
    failure = item.failure if isinstance(item, UnitResult) else None
    if item.is_last:
        count_retries((failure.attempts if failure else item.attempts) - 1, "decode")
    if failure is not None:
        log.warning("%s: %s", failure.kind, failure.message)


def count_commit(units: int, took_s: float) -> None:
    """In a write task, after each commit; every Unit has its share of the time."""
    for _ in range(units):
        meters().spent({"commit_s": took_s / units})


def count_ended(news: News) -> None:
    """In the driver, for what the ledger says has ended."""
    meters().record("murmur_recordings_total", news.ok, status="ok")
    meters().record("murmur_recordings_total", news.failed, status="failed")
    for (kind, stage), count in news.failures.items():
        meters().record("murmur_failures_total", count, kind=kind, stage=stage or "other")


def count_retries(tries: int, stage: str) -> None:
    """In the driver, for recordings taken up again; in a decode task, for sources and decoders tried again."""
    meters().record("murmur_retries_total", tries, stage=stage)


class Gauges:
    """What an engine is doing, looked at every two seconds by a thread of its own for as long as the process lives."""

    EVERY_S = 2.0

    def __init__(self, engine: AnyEngine) -> None:
        self._engine, self._n_units, self._rate = engine, 0, Rate()
        threading.Thread(target=self._keep, name="gauges", daemon=True).start()

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """In the body one Unit more is in the engine's hands."""
        self._n_units += 1
        try:
            yield
        finally:
            self._n_units -= 1

    def transcribed(self, unit: Unit) -> None:
        self._rate.add(seconds(unit.n_samples))
        meters().record("murmur_audio_seconds_total", seconds(unit.n_samples), stage="transcribed")

    def _keep(self) -> None:
        while True:
            load = self._engine.load()
            meters().record("murmur_lanes", load.lanes)
            meters().record("murmur_lanes_busy", load.busy)
            meters().record("murmur_windows_queued", load.queued)
            meters().record("murmur_units_in_flight", self._n_units)
            meters().record("murmur_rtfx", self._rate.now())
            time.sleep(self.EVERY_S)


def unit_to_row(item: Unit | UnitResult) -> dict[str, Any]:
    """A row of `UNIT_ROW`; a `UnitResult` is a recording that could not be decoded."""
    row = {
        "recording": to_json(item.recording),
        "index": item.index,
        "start": item.start,
        "is_last": item.is_last,
        "flags": list(item.flags),
        "attempts": item.attempts,
        "spent": json.dumps(dataclasses.asdict(item.spent)) if item.spent else None,
    }
    if isinstance(item, UnitResult):
        return row | {"failure": json.dumps(dataclasses.asdict(item.failure)) if item.failure else None}
    arrays = {name: _bytes(getattr(item, name)) for name in ("pcm", "speech", "language_pcm")}
    return row | arrays | {"channels": len(item.pcm) if item.pcm.ndim == 2 else None}


def unit_from_row(row: Mapping[str, Any]) -> Unit | UnitResult:
    """What `unit_to_row` made the row of; the arrays are read-only views of the row's buffers."""
    common = {
        "recording": from_json(row["recording"]),
        "index": row["index"],
        "start": row["start"],
        "is_last": row["is_last"],
        "flags": tuple(row["flags"]),
        "attempts": row["attempts"],
        "spent": Spent(**json.loads(row["spent"])) if row["spent"] else None,
    }
    if row["pcm"] is None:
        # A failed recording's row has no samples, wherever in it decoding ended.
        return UnitResult(n_samples=0, failure=Failure(**json.loads(row["failure"])), **common)
    shape = (-1,) if row["channels"] is None else (row["channels"], -1)
    return Unit(
        pcm=np.frombuffer(row["pcm"], np.int16).reshape(shape),
        speech=_array(row["speech"], np.uint8, shape),
        language_pcm=_array(row["language_pcm"], np.int16),
        **common,
    )


def rows_of(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows of a table, with `binary` values as buffers instead of copies."""
    for i in range(table.num_rows):
        yield {name: _value(table.column(name)[i]) for name in table.column_names}


def _value(scalar: pa.Scalar) -> Any:
    return scalar.as_buffer() if pa.types.is_binary(scalar.type) and scalar.is_valid else scalar.as_py()


def _bytes(array: np.ndarray[Any, Any] | None) -> bytes | None:
    return None if array is None else np.ascontiguousarray(array).tobytes()


def _array(buffer: Any, dtype: type[np.generic], shape: tuple[int, ...] = (-1,)) -> Any:
    return None if buffer is None else np.frombuffer(buffer, dtype).reshape(shape)
