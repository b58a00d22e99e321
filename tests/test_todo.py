"""What is still to do: the order, the portions, and what a killed or failed run has left."""

from __future__ import annotations

import dataclasses
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import todo
from pipeline.ledger import Ledger, commit
from pipeline.schema import UNITS, to_table, unit_row
from pipeline.store import Store
from pipeline.types import Failure, Recording, UnitResult


def rec(name: str, duration_s: float | None = None, **more: object) -> Recording:
    return Recording(id=name, uri=f"/audio/{name}.wav", duration_s=duration_s, **more)  # type: ignore[arg-type]


def ids(table: pa.Table) -> list[str]:
    return [todo.from_json(text).id for text in table["recording"].to_pylist()]


def test_the_longest_first_and_the_unknown_in_their_order() -> None:
    given = [rec("u1"), rec("short", 3), rec("u2"), rec("long", 900), rec("sized", size=32_000 * 60)]
    ordered = todo.in_order(map(todo.item, given))
    assert [todo.from_json(it.recording).id for it in ordered] == ["long", "sized", "short", "u1", "u2"]


def test_portions_are_bounded_by_rows_and_seconds() -> None:
    items = [
        todo.item(r)
        for r in [rec("day", 86_400), *(rec(f"m{i}", 100) for i in range(12)), *map(rec, map(str, range(400)))]
    ]
    portions = list(todo.blocks(items, tasks=1))
    assert list(chain.from_iterable(map(ids, portions))) == [todo.from_json(it.recording).id for it in items]
    assert ids(portions[0]) == ["day"]  # alone
    assert [len(p) for p in portions[1:3]] == [6, 32]  # 600 s; then the rest of the minutes with those of no length
    assert max(len(p) for p in portions) == todo.MAX_ROWS
    assert all(p.schema.equals(todo.TODO) for p in portions)


@pytest.mark.parametrize(("n", "tasks", "portions"), [(1, 4, 1), (12, 2, 12), (80, 2, 8), (0, 2, 0)])
def test_few_recordings_make_small_portions(n: int, tasks: int, portions: int) -> None:
    assert len(list(todo.blocks([todo.item(rec(str(i))) for i in range(n)], tasks))) == portions


@pytest.mark.parametrize(
    ("recording", "seconds"),
    [
        (rec("a", 5.0), 5.0),
        (rec("a", 5.0, size=10**9), 5.0),
        (rec("a", 5.0, offset=0, length=32_000), 2.0),  # a slice
        (rec("a", size=320_000), 10.0),
        (Recording(id="a", uri="https://h/a.mp3?sig=x.wav", size=120_000), 10.0),
        (rec("a"), None),
    ],
)
def test_a_length_is_estimated(recording: Recording, seconds: float | None) -> None:
    assert todo.estimate_s(recording) == seconds


def test_an_estimate_tells_hints_from_guesses() -> None:
    items = [todo.item(r) for r in (rec("a", 5.0), rec("b", size=320_000), rec("c"))]
    assert todo.Estimate.of(items, items[1:]) == todo.Estimate(3, 2, hinted_s=0.0, guessed_s=10.0, unknown=1)


def test_a_recording_survives_the_journey_as_json() -> None:
    recording = rec("ä", 1.5, size=3, etag="e", offset=1, length=2, reference="r", language="de", metadata='{"k": 1}')
    assert todo.from_json(todo.to_json(recording)) == recording


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """done: two Units; begun: the first and the third of four; failed: its second Unit; new: nothing."""
    store = Store.at(str(tmp_path))
    _commit(store, unit("done", 0, 100), unit("done", 1, 50, is_last=True))
    _commit(store, unit("begun", 0, 100), unit("begun", 2, 30))
    bad = Failure("engine", "no", "engine")
    _commit(store, unit("failed", 0, 100), unit("failed", 1, 70, failure=bad), unit("failed", 2, 10, is_last=True))
    return Ledger.read(store, 1)


def unit(name: str, index: int, n: int, *, is_last: bool = False, failure: Failure | None = None) -> UnitResult:
    recording = rec(name, 9.0, reference="what was said", offset=16_000)
    return UnitResult(recording, index, is_last, start=0, n_samples=n, failure=failure)


def _commit(store: Store, *units: UnitResult) -> None:
    commit(store, to_table(map(unit_row, units), UNITS), 1)


def test_what_is_done_or_failed_is_not_missing(ledger: Ledger) -> None:
    listed = [todo.item(rec(name, 9.0)) for name in ("new", "failed", "begun", "done")]
    new, begun = todo.missing(listed, ledger)
    assert new == listed[0]
    assert begun == dataclasses.replace(listed[2], done=(0, 2), gap_start=100)


def test_a_retry_takes_the_failed_ones_only(ledger: Ledger) -> None:
    listed = [todo.item(rec(name, 9.0)) for name in ("new", "failed", "done")]
    (again,) = todo.failed(listed, ledger)
    assert (todo.from_json(again.recording), again.done, again.gap_start) == (rec("failed", 9.0), (0, 2), None)


def test_a_retry_without_inputs_finds_them_in_the_ledger(ledger: Ledger) -> None:
    (again,) = todo.failed([], ledger)
    found = todo.from_json(again.recording)
    assert (found.id, found.reference, found.offset) == ("failed", "what was said", 16_000)
    assert again.done == (0, 2)
