"""What is still to do: the order, the portions, and what a killed or failed run has left."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path

import pytest

from pipeline import todo
from pipeline.errors import StoreError
from pipeline.ledger import Ledger, commit
from pipeline.schema import UNITS, to_table, unit_row
from pipeline.store import Store
from pipeline.todo import Item, Listing, Todo
from pipeline.types import Failure, Recording, UnitResult


def rec(name: str, duration_s: float | None = None, **more: object) -> Recording:
    return Recording(id=name, uri=f"/audio/{name}.wav", duration_s=duration_s, **more)  # type: ignore[arg-type]


def to_do(*recordings: Recording) -> Todo:
    return Todo.of(map(Item, recordings))


def listing(*names: str) -> Listing:
    return Listing(rec(name, 9.0) for name in names)


def handed_out(left: Todo, folder: Path, tasks: int = 1, **options: int) -> list[list[Item]]:
    """The items of each block, as a decode task reads them."""
    with left.put(Store.at(str(folder)), tasks, **options) as blocks:
        places = [place for table in blocks.tables() for place in table.to_pylist()]
        assert len(places) == len(blocks)
        return [blocks.source.read(**place) for place in places]


def names(block: Iterable[Item]) -> list[str]:
    return [item.recording.id for item in block]


def test_the_longest_first_and_the_unknown_in_their_order(tmp_path: Path) -> None:
    given = [rec("u1"), rec("short", 3), rec("u2"), rec("long", 900), rec("sized", size=32_000 * 60)]
    blocks = handed_out(to_do(*given), tmp_path)
    assert [name for block in blocks for name in names(block)] == ["long", "sized", "short", "u1", "u2"]


def test_blocks_are_bounded_by_rows_and_seconds(tmp_path: Path) -> None:
    given = [rec("day", 86_400), *(rec(f"m{i}", 100) for i in range(12)), *map(rec, map(str, range(400)))]
    blocks = handed_out(to_do(*given), tmp_path)
    assert [item.recording for block in blocks for item in block] == given
    assert names(blocks[0]) == ["day"]  # alone
    assert [len(block) for block in blocks[1:3]] == [6, 32]  # 600 s; then the rest of the minutes with those of none
    assert max(map(len, blocks)) == todo.MAX_ROWS
    assert [len(block) for block in handed_out(to_do(*given), tmp_path, max_rows=1)] == [1] * len(given)


@pytest.mark.parametrize(("n", "tasks", "blocks"), [(1, 4, 1), (12, 2, 12), (80, 2, 8)])
def test_few_recordings_make_small_blocks(n: int, tasks: int, blocks: int, tmp_path: Path) -> None:
    assert len(handed_out(to_do(*(rec(str(i)) for i in range(n))), tmp_path, tasks)) == blocks


def test_more_than_fits_in_memory_at_once_is_ordered_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(todo, "_FEW", 7)
    monkeypatch.setattr(todo, "_MANY", 50)
    monkeypatch.setattr(todo, "_PAGE", 20)
    monkeypatch.setattr(todo, "MAX_TASKS", 10)
    lengths = [float(i * 7919 % 1009) for i in range(1000)]
    left = to_do(*(rec(str(i), length_s or None) for i, length_s in enumerate(lengths)))
    with left.put(Store.at(str(tmp_path)), tasks=2) as blocks:
        found = [
            [item for place in task.to_pylist() for item in blocks.source.read(**place)] for task in blocks.tables()
        ]
        in_order = [blocks.source.read(*place) for place in blocks.places.tolist()]
    assert [item.recording.duration_s or 0 for block in in_order for item in block] == sorted(lengths, reverse=True)
    assert len(found) == 10  # each with its share of the long ones, which it begins with
    assert sorted(name for task in found for name in names(task)) == sorted(map(str, range(1000)))
    shares = [[item.recording.duration_s or 0 for item in task] for task in found]
    assert all(share == sorted(share, reverse=True) for share in shares)
    assert min(share[0] for share in shares) > 900


def test_what_is_handed_out_lies_in_the_output_for_a_pass_only_and_says_no_secret(tmp_path: Path) -> None:
    signed = Recording(id="a", uri="https://h/a.wav?X-Amz-Signature=verysecret", metadata='{"k": 1}')
    folder = tmp_path / todo.FOLDER
    folder.mkdir(parents=True)
    (folder / "left by a driver that was killed").write_bytes(b"x")
    with to_do(signed).put(Store.at(str(tmp_path)), tasks=1) as blocks:
        (path,) = folder.iterdir()
        assert b"verysecret" not in path.read_bytes()
        assert b"https" not in path.read_bytes()
        source = pickle.loads(pickle.dumps(blocks.source))
        assert source.read(*blocks.places[0].tolist()) == [Item(signed)]
        path.unlink()
        with pytest.raises(StoreError, match="another driver"):
            source.read(*blocks.places[0].tolist())
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("recording", "hinted", "guessed", "unknown"),
    [
        (rec("a", 5.0), 5.0, 0.0, 0),
        (rec("a", 5.0, size=10**9), 5.0, 0.0, 0),
        (rec("a", 5.0, offset=0, length=32_000), 2.0, 0.0, 0),  # a slice
        (rec("a", size=320_000), 0.0, 10.0, 0),
        (Recording(id="a", uri="https://h/a.mp3?sig=x.wav", size=120_000), 0.0, 10.0, 0),
        (Recording(id="a", uri="tar://b/a.FLAC::s3://b/x.tar", size=160_000), 0.0, 10.0, 0),
        (rec("a"), 0.0, 0.0, 1),
    ],
)
def test_a_length_is_estimated(recording: Recording, hinted: float, guessed: float, unknown: int) -> None:
    assert to_do(recording).estimate == todo.Estimate(1, 1, hinted, guessed, unknown)


def test_an_estimate_tells_hints_from_guesses() -> None:
    listed = Listing([rec("a", 5.0), rec("b", size=320_000), rec("c")])
    assert todo.missing(listed, None).estimate == todo.Estimate(3, 3, hinted_s=5.0, guessed_s=10.0, unknown=1)


def test_nothing_to_do(tmp_path: Path) -> None:
    left = todo.missing(Listing([]), Ledger.read(Store.at(str(tmp_path)), 1))
    assert (len(left), left.estimate) == (0, todo.Estimate(0, 0, 0.0, 0.0, 0))
    assert handed_out(left, tmp_path) == []


def test_what_is_read_through_stays_together(tmp_path: Path) -> None:
    """Rows of Parquet and members of a packed shard: in the order given, whatever their length, in larger blocks."""
    cells = [Recording(id=f"c{i}", uri=f"parquet://{i + 1}/audio::/x.parquet", duration_s=i) for i in range(700)]
    packed = [Recording(id=f"p{i}", uri=f"tar://512+9/{i}.wav::https://h/x.tar.gz?s", duration_s=i) for i in range(60)]
    plain = [Recording(id=f"t{i}", uri=f"tar://512+9/{i}.wav::s3://b/x.tar", duration_s=1 + i) for i in range(40)]
    blocks = handed_out(to_do(*cells, *packed, *plain), tmp_path)
    order = [name for block in blocks for name in names(block)]
    assert order == [f"t{i}" for i in range(39, -1, -1)] + [r.id for r in cells + packed]
    assert max(map(len, blocks)) == 800 // 4  # a quarter of all, for one decode task
    assert to_do(*cells).estimate.hinted_s == sum(range(700))


FULL = rec("ä", 1.5, size=3, etag="e", offset=1, length=2, reference="r", language="de", metadata='{"k": 1}')


def test_a_recording_survives_the_journey(tmp_path: Path) -> None:
    assert todo.from_json(todo.to_json(FULL)) == FULL
    items = [Item(FULL, frozenset({0, 2}), 4711), Item(rec("b"), frozenset(), 0), Item(rec("c"))]
    assert [item for block in handed_out(Todo.of(items), tmp_path) for item in block] == items
    assert list(Listing([FULL, rec("b")]).recordings()) == [FULL, rec("b")]


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
    recording = rec(name, 9.0, size=7, reference="what was said", offset=16_000)
    return UnitResult(recording, index, is_last, start=0, n_samples=n, failure=failure)


def _commit(store: Store, *units: UnitResult) -> None:
    commit(store, to_table(map(unit_row, units), UNITS), 1)


def items(left: Todo, folder: Path) -> dict[str, Item]:
    return {item.recording.id: item for block in handed_out(left, folder) for item in block}


def test_what_is_done_or_failed_is_not_missing(ledger: Ledger, tmp_path: Path) -> None:
    left = todo.missing(listing("new", "failed", "begun", "done"), ledger)
    assert left.estimate == todo.Estimate(4, 2, 18.0, 0.0, 0)
    assert items(left, tmp_path) == {
        "new": Item(rec("new", 9.0)),
        "begun": Item(rec("begun", 9.0), frozenset({0, 2}), gap_start=100),
    }


def test_only_what_is_not_there_yet_runs_in_whatever_order_it_is_listed(ledger: Ledger, tmp_path: Path) -> None:
    everything = ["done", "failed", "begun", *(f"new-{i}" for i in range(20))]
    for order in (everything, everything[::-1], everything[5:] + everything[:5]):
        assert items(todo.missing(listing(*order), ledger), tmp_path).keys() == set(everything) - {"done", "failed"}


def test_a_retry_takes_the_failed_ones_only(ledger: Ledger, tmp_path: Path) -> None:
    left = todo.failed(listing("new", "failed", "done"), ledger)
    assert items(left, tmp_path) == {"failed": Item(rec("failed", 9.0), frozenset({0, 2}))}
    assert len(todo.failed(Listing([]), ledger)) == 0


def test_a_retry_without_inputs_finds_them_in_the_ledger(ledger: Ledger, tmp_path: Path) -> None:
    (again,) = items(todo.failed(None, ledger), tmp_path).values()
    found = again.recording
    assert (found.id, found.reference, found.offset) == ("failed", "what was said", 16_000)
    assert (again.done, again.gap_start) == ({0, 2}, None)


def test_what_a_pass_has_put_off_is_done_from_where_it_stands(tmp_path: Path) -> None:
    store = Store.at(str(tmp_path))
    bad = Failure("engine", "no", "engine")
    _commit(store, unit("done", 0, 100), unit("done", 1, 50, is_last=True, failure=bad))
    _commit(store, unit("gap", 0, 100), unit("gap", 2, 30, is_last=True), unit("open", 0, 100), unit("open", 1, 10))
    put_off = listing("done", "gap", "new", "open")
    ledger = Ledger.read(store, 1)
    left = todo.again(put_off, ledger, round=0)
    assert (
        items(left, tmp_path)
        == items(todo.again(left, ledger, round=0), tmp_path)
        == {
            "gap": Item(rec("gap", 9.0), frozenset({0, 2}), gap_start=100),
            "new": Item(rec("new", 9.0)),
            "open": Item(rec("open", 9.0), frozenset({0, 1}), gap_start=110),
        }
    )
    in_a_retry = items(todo.again(put_off, ledger, round=1), tmp_path)
    assert in_a_retry["done"] == Item(rec("done", 9.0), frozenset({0}))  # its failed Unit is of an earlier round
    assert len(todo.again(Listing([]), ledger, round=0)) == 0
