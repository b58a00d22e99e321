"""What travels between the stages: rows of one type in every block, and nothing lost on the way."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from audio_files import tone, write_wav

from pipeline import schema
from pipeline.config import Config, Fault
from pipeline.engine import engine_config
from pipeline.engine.fake import Faults
from pipeline.errors import StoreError
from pipeline.stages import UNIT_ROW, Door, EngineStage, decode, fail_before_commit, rows_of, unit_from_row, unit_to_row
from pipeline.store import Store
from pipeline.todo import Item, Todo
from pipeline.types import Failure, Recording, Spent, Unit, UnitResult

RECORDING = Recording(id="a", uri="a.wav", reference="hello", metadata='{"k": [1]}')


def same(one: Unit | UnitResult, other: Unit | UnitResult) -> bool:
    """Equal in every field but what they took; arrays in type and content."""
    names = [f.name for f in dataclasses.fields(one) if f.name != "spent"]
    pairs = ((getattr(one, name), getattr(other, name)) for name in names)
    return type(one) is type(other) and all(
        np.array_equal(a, b) and a.dtype == b.dtype if isinstance(a, np.ndarray) else a == b for a, b in pairs
    )


@pytest.mark.parametrize(
    "item",
    [
        Unit(RECORDING, 0, 0, tone(220, 1.0), is_last=True),
        Unit(RECORDING, 3, 16_000, np.zeros(0, np.int16), False, np.zeros(0, np.uint8), tone(220, 0.5), ("a", "b"), 3),
        Unit(RECORDING, 1, 512, tone(220, 2.0), False, np.arange(63, dtype=np.uint8), None),
        UnitResult(
            RECORDING, 2, True, 99, 0, flags=("x",), failure=Failure("damaged_audio", "no", "decode", 3), attempts=3
        ),
    ],
    ids=["plain", "empty", "with speech", "failed"],
)
def test_a_row_gives_back_what_it_was_made_of(item: Unit | UnitResult) -> None:
    table = pa.Table.from_pylist([unit_to_row(item)], schema=UNIT_ROW)
    (row,) = rows_of(table)
    assert same(unit_from_row(row), item)


def test_what_a_unit_took_goes_with_it(tmp_path: Path, config: Config, recording: Recording) -> None:
    """Through both stages; a result is the same whatever it took."""
    with Todo.of([Item(recording)]).put(Store.at(str(tmp_path / "out")), tasks=1) as blocks:
        (task,) = blocks.tables()
        table = next(decode(task, blocks.source, config))
    stage = EngineStage(config, engine_config(config))
    row = asyncio.run(stage(table)).to_pylist()[0]
    spent = row["spent"]
    assert spent.keys() == {"source_s", "decode_s", "vad_s", "engine_s"}
    assert all(seconds >= 0 for seconds in spent.values())
    assert spent["source_s"] > 0
    assert spent["decode_s"] > 0
    result = schema.unit_from_row(row)
    assert result.spent == Spent(**spent)
    assert result == dataclasses.replace(result, spent=None)


def test_samples_are_views_also_in_a_slice_of_chunks() -> None:
    units = [Unit(RECORDING, i, 0, tone(220, 0.1 * (i + 1)), is_last=False) for i in range(5)]
    one = [pa.Table.from_pylist([unit_to_row(u)], schema=UNIT_ROW) for u in units]
    table = pa.concat_tables(one).slice(1, 3)
    for row, unit in zip(rows_of(table), units[1:4], strict=True):
        back = unit_from_row(row)
        assert isinstance(back, Unit)
        assert same(back, unit)
        assert not back.pcm.flags.owndata


@pytest.fixture
def run_decode(tmp_path: Path) -> Callable[..., list[Unit | UnitResult]]:
    def run(config: Config, items: list[Item], faults: Faults | None = None) -> list[Unit | UnitResult]:
        with Todo.of(items).put(Store.at(str(tmp_path / "out")), tasks=1) as blocks:
            tables = [t for task in blocks.tables() for t in decode(task, blocks.source, config, faults)]
        assert all(t.schema.equals(UNIT_ROW) and t.num_rows == 1 for t in tables)
        return [unit_from_row(row) for t in tables for row in rows_of(t)]

    return run


@pytest.fixture
def config(fake_config: Callable[..., Config]) -> Config:
    """Units of half a minute, so that a file of 100 s has several."""
    return fake_config(vad="none", unit_length_s=30)


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    return Recording(id="long", uri=str(write_wav(tmp_path / "long.wav", tone(220, 100.0))))


def test_decode_yields_every_unit_of_every_recording(
    run_decode: Callable[..., list[Unit | UnitResult]], config: Config, recording: Recording
) -> None:
    gone = Recording(id="gone", uri="/no/such/file.wav")
    units = run_decode(config, [Item(gone), Item(recording)])
    first, *rest = units
    assert isinstance(first, UnitResult)
    assert first.failure is not None
    assert (first.failure.kind, first.failure.stage) == ("not_found", "decode")
    assert [u.index for u in rest] == list(range(len(rest)))
    assert len(rest) >= 4
    assert sum(u.n_samples for u in rest) == 1_600_000


def test_decode_leaves_out_what_is_done_and_cuts_the_same(
    run_decode: Callable[..., list[Unit | UnitResult]], config: Config, recording: Recording
) -> None:
    everything = run_decode(config, [Item(recording)])
    rest = run_decode(config, [Item(recording, done=frozenset({0, 2}))])
    assert [u.index for u in rest] == [u.index for u in everything if u.index not in (0, 2)]
    assert all(same(u, everything[u.index]) for u in rest)


def test_audio_that_is_gone_ends_a_begun_recording_at_its_gap(
    run_decode: Callable[..., list[Unit | UnitResult]], config: Config
) -> None:
    gone = Recording(id="gone", uri="/no/such/file.wav")
    (failure,) = run_decode(config, [Item(gone, done=frozenset({0, 1, 3}), gap_start=4711)])
    assert (failure.index, failure.start, failure.is_last) == (2, 4711, True)
    assert (
        run_decode(config, [Item(gone, done=frozenset({0, 1, 3}))]) == []
    )  # a retry: the failure that stands is enough


def test_a_fault_in_decode_costs_its_recording(
    run_decode: Callable[..., list[Unit | UnitResult]], config: Config, recording: Recording
) -> None:
    faults = Faults([Fault(match="lo*", stage="decode", kind="oom")], None)
    (failed,) = run_decode(config, [Item(recording)], faults)
    assert isinstance(failed, UnitResult)
    message = f"{recording.uri}: decoding it needs more than decode_memory_mb (1500 MB)"
    assert failed.failure == Failure("memory", message, "decode", attempts=2)


def stage(config: Config, batch: list[Unit | UnitResult]) -> list[UnitResult]:
    table = pa.Table.from_pylist([unit_to_row(item) for item in batch], schema=UNIT_ROW)
    result = asyncio.run(EngineStage(config, engine_config(config))(table))
    assert result.schema.equals(schema.UNITS)
    return [schema.unit_from_row(row) for row in result.to_pylist()]


def test_the_engine_stage_answers_each_row_in_order(fake_config: Callable[..., Config]) -> None:
    config = fake_config(fake__faults=[{"match": "bad", "kind": "nan"}])
    bad = dataclasses.replace(RECORDING, id="bad")
    unreadable = UnitResult(RECORDING, 0, True, 0, 0, failure=Failure("empty_audio", "no", "decode"))
    good, failed, passed = stage(
        config,
        [Unit(RECORDING, 0, 0, tone(220, 1.0), True), Unit(bad, 0, 0, tone(220, 2.0), True), unreadable],
    )
    assert good.segments
    assert failed.failure is not None
    assert (failed.failure.kind, failed.skipped[0].n_samples) == ("non_finite", 32_000)
    assert passed == unreadable


def test_a_fault_in_the_sink_strikes_between_the_two_objects() -> None:
    faults = Faults([Fault(match="b", stage="sink", kind="raise")], None)
    fail_before_commit(pa.table({"recording_id": ["a", "c"]}), faults)
    with pytest.raises(StoreError):
        fail_before_commit(pa.table({"recording_id": ["a", "b"]}), faults)


def test_units_go_in_as_they_came_until_the_lanes_are_filled_twice() -> None:
    entered: list[tuple[int, int]] = []  # (which, windows of the others that were inside)
    inside: dict[int, int] = {}

    async def unit(door: Door, i: int, windows: int) -> None:
        async with door.opened(windows):
            entered.append((i, sum(inside.values())))
            inside[i] = windows
            await asyncio.sleep(0.001)
            del inside[i]

    async def all_of() -> None:
        door = Door(limit=4)
        await asyncio.gather(*(unit(door, i, 10 if i == 3 else 1) for i in range(12)))

    asyncio.run(all_of())
    assert [i for i, _ in entered] == list(range(12))
    assert [others for _, others in entered[:4]] == [0, 1, 2, 3]  # a long one goes in while there is room for one
    assert max(others for _, others in entered) == 3
    assert entered[4][1] == 0  # nobody beside it
