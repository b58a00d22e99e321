"""What `clean` removes, what it never removes, killed between any two steps, and who comes late."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import murmur
from commits import begin, failed, ok, put, read_ledger, read_table, winner

from pipeline import clean as cleaning
from pipeline import finalize as finalizing
from pipeline.clean import clean
from pipeline.errors import OutputHeldError
from pipeline.finalize import finalize, read_success
from pipeline.lease import FINALIZE_LEASE, PATIENCE_S, RUN_LEASE, Lease
from pipeline.ledger import SNAPSHOTS, Ledger, ledger_path
from pipeline.output import INPUTS, LEDGER, Output, write_inputs
from pipeline.pieces import DATA, data_path
from pipeline.store import Store
from pipeline.todo import FOLDER as TODO
from pipeline.types import Recording
from pipeline.verify import check

NAMES = {f"r{i}" for i in range(6)}


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Output:
    uri = str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("s3") + "/out"
    return littered(uri)


@pytest.fixture
def local(tmp_path: Path) -> Output:
    return littered(str(tmp_path / "out"))


def littered(uri: str) -> Output:
    """Six recordings in n0 ... n2; and of everything that can be left behind, one."""
    output = begin(Store.at(uri))
    store = output.store
    for i in range(3):
        put(store, ok(f"r{2 * i}"), ok(f"r{2 * i + 1}"), name=f"n{i}")
        listed(output)
        finalize(output, use_ray=False)
    put(store, ok("r0", text=" lost the race"), name="n3")
    put(store, ok("r9"), name="orphan")
    store.delete(ledger_path("orphan"))
    put(store, ok("r8"), name="half")
    store.put(ledger_path("half"), (store.get(ledger_path("half")) or b"")[:-9])
    store.put("_run/probe-0", b"")
    store.put(f"{TODO}/0", b"")
    return output


def listed(output: Output) -> None:
    write_inputs(output.store, [Recording(name, f"{name}.wav") for name in sorted(NAMES)])


def tidy(output: Output) -> cleaning.Rubbish:
    waited: list[float] = []
    found = clean(output, sleep=waited.append)
    assert waited in ([], [PATIENCE_S])
    return found


def objects(output: Output) -> dict[str, set[str]]:
    return {folder: set(output.store.sizes(folder)) for folder in (DATA, LEDGER, SNAPSHOTS, INPUTS)}


def assert_exact(output: Output) -> None:
    """The ledger and the tables hold the six recordings, and nothing that they need is gone."""
    assert read_ledger(output.store).resume().ok == NAMES
    finalize(output, use_ray=False)
    assert {row["recording_id"]: row["text"] for row in read_table(output.store, "recordings")} == {
        name: f"{name} unit 0." for name in NAMES
    }
    assert check(output).is_well


def test_what_goes_and_what_stays(output: Output) -> None:
    before, success = objects(output), read_success(output.store)
    assert success is not None
    would = clean(output, dry_run=True).to_json()
    assert objects(output) == before
    found = tidy(output)
    assert found.to_json() == would | {"snapshots": 2}  # and one more is written
    assert (found.orphans, found.half_written, found.superseded) == ({"orphan"}, {"half"}, {"n3"})
    assert objects(output) == {
        DATA: {"n0.arrow", "n1.arrow", "n2.arrow"},
        LEDGER: set(),
        SNAPSHOTS: {"000003.parquet", "000004.parquet"},
        INPUTS: {"000003.parquet"},
    }
    assert "probe-0" not in output.store.sizes("_run")
    assert output.store.sizes(TODO) == {}
    assert_exact(output)
    assert read_success(output.store) == replace(success, snapshot=4)
    again = tidy(output)
    assert not any(again.to_json().values())


def test_what_is_new_after_it_counts_as_ever(local: Output) -> None:
    tidy(local)
    put(local.store, ok("r0", text=" too late"), ok("new"), name="m0")
    put(local.store, failed("r1"), name="m1")
    ledger = read_ledger(local.store)
    assert ledger.resume().ok == NAMES | {"new"}
    assert (winner(ledger, "r0"), winner(ledger, "r1")) == ("n0", "n0")
    finalize(local, use_ray=False)
    tidy(local)
    assert read_ledger(local.store).resume().ok == NAMES | {"new"}
    assert objects(local)[DATA] == {f"{name}.arrow" for name in ("n0", "n1", "n2", "m0")}
    assert check(local).is_well


def test_reading_a_cleaned_ledger_reads_no_ledger_object(local: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    tidy(local)
    put(local.store, ok("new"), name="m0")
    get, read = Store.get, []
    monkeypatch.setattr(Store, "get", lambda self, name: (read.append(name), get(self, name))[1])
    read_ledger(local.store)
    assert [name for name in read if LEDGER in name] == [ledger_path("m0")]


def test_a_writer_that_slept_since_before(local: Output) -> None:
    """Its data object was taken for an orphan, and rightly: now it puts the ledger object, which counts for nothing."""
    whole = local.store.get(data_path("orphan")) or b""
    tidy(local)
    put(local.store, ok("r9"), name="orphan")
    local.store.delete(data_path("orphan"))
    assert "r9" not in read_ledger(local.store).resume().ok
    assert_exact(local)
    local.store.put(data_path("orphan"), whole)  # even so
    assert "r9" not in read_ledger(local.store).resume().ok
    tidy(local)
    assert objects(local)[LEDGER] == set()
    put(local.store, ok("r9"), name="m0")  # done again, by another attempt
    assert read_ledger(local.store).resume().ok == NAMES | {"r9"}


def test_a_commit_between_the_two_looks_is_no_orphan(local: Output) -> None:
    raw = local.store.get(data_path("orphan"))

    def meanwhile(_: float) -> None:
        put(local.store, ok("r9"), name="orphan")
        assert local.store.get(data_path("orphan")) == raw

    found = clean(local, sleep=meanwhile)
    assert "orphan" not in found.orphans
    assert read_ledger(local.store).resume().ok == NAMES | {"r9"}


def test_a_listing_that_lags_makes_no_orphans(local: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data object is listed, and its ledger object, put long ago, is not yet."""
    put(local.store, ok("r7"), name="m0")
    sizes = Store.sizes

    def lagging(self: Store, folder: str) -> dict[str, int]:
        return {name: size for name, size in sizes(self, folder).items() if (folder, name) != (LEDGER, "m0.json")}

    with monkeypatch.context() as patch:
        patch.setattr(Store, "sizes", lagging)
        tidy(local)
    assert "r7" in read_ledger(local.store).resume().ok
    assert finalize(local, use_ray=False).counts["unlisted"] == 1


def test_what_is_committed_while_it_removes_stays(local: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    """A zombie commits after the snapshots were pinned: its ledger object is in none of them."""
    pin = cleaning._pin_twice

    def then(ledger: Ledger) -> Any:
        names = pin(ledger)
        put(local.store, ok("r0", text=" zombie"), ok("late"), name="m0")
        return names

    monkeypatch.setattr(cleaning, "_pin_twice", then)
    tidy(local)
    assert objects(local)[LEDGER] == {"m0.json"}
    assert read_ledger(local.store).resume().ok == NAMES | {"late"}


@pytest.mark.parametrize("name", [RUN_LEASE, FINALIZE_LEASE])
def test_it_is_refused_while_somebody_works(local: Output, name: str) -> None:
    before = objects(local)
    with Lease.acquire(local.store, name), pytest.raises(OutputHeldError):
        tidy(local)
    assert objects(local) == before


def test_killed_at_any_step_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each of its writes and removals in turn; whatever is left, all is exact, and the next clean ends it."""
    littered(str(tmp_path / "litter"))
    is_over, survivors = False, 0
    while not is_over:
        output = begin(Store.at(shutil.copytree(tmp_path / "litter", tmp_path / f"out-{survivors}")))
        with monkeypatch.context() as patch:
            counted = [0]
            for method in ("put", "create", "delete"):
                patch.setattr(Store, method, dying(getattr(Store, method), counted, survivors))
            try:
                tidy(output)
                is_over = True
            except Killed:
                survivors += 1
        assert_exact(output)
        tidy(output)
        assert read_ledger(output.store).resume().ok == NAMES
        assert objects(output)[DATA] == {"n0.arrow", "n1.arrow", "n2.arrow"}
    assert survivors > 12


class Killed(BaseException):
    pass


def dying(whole: Any, counted: list[int], survivors: int) -> Any:
    def method(self: Store, name: str, *data: bytes) -> Any:
        if "lease" not in name:
            counted[0] += 1
            if counted[0] > survivors:
                raise Killed
        return whole(self, name, *data)

    return method


def test_a_damaged_snapshot_afterwards_costs_nothing(local: Output) -> None:
    tidy(local)
    newest = max(objects(local)[SNAPSHOTS])
    local.store.put(f"{SNAPSHOTS}/{newest}", (local.store.get(f"{SNAPSHOTS}/{newest}") or b"")[:-50])
    assert_exact(local)
    tidy(local)
    assert_exact(local)


def test_a_reader_that_is_overtaken_starts_again(local: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has seen the old snapshot, and lists the ledger when the objects are gone."""
    put(local.store, ok("new"), name="m0")
    sizes, done = Store.sizes, []

    def overtaken(self: Store, folder: str) -> dict[str, int]:
        if folder == LEDGER and not done:
            done.append(folder)
            finalize(local, use_ray=False)
            tidy(local)
        return sizes(self, folder)

    monkeypatch.setattr(Store, "sizes", overtaken)
    assert read_ledger(local.store).resume().ok == NAMES | {"new"}
    assert done


def test_who_pins_too_late_starts_from_the_newest(local: Output) -> None:
    """Asleep since the first snapshot, whose successor's number is free again by now."""
    asleep = read_ledger(local.store)
    put(local.store, ok("new"), name="m0")
    for _ in range(3):
        tidy(local)
        put(local.store, ok("new"), name=f"m{len(objects(local)[DATA])}")
        finalize(local, use_ray=False)
    asleep.move(asleep.winners)
    asleep.pin()
    assert asleep.resume().ok == NAMES | {"new"}
    assert read_ledger(local.store).resume().ok == NAMES | {"new"}


def test_merged_objects_are_removed_with_their_names(local: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finalizing, "MERGE_AT", 1)
    put(local.store, ok("new"), name="m0")
    first = finalize(local, use_ray=False)
    texts_before = read_table(local.store, "recordings")
    assert len(tidy(local).superseded) == 5  # n0 ... n3 and m0
    assert len(objects(local)[DATA]) == 1
    assert finalize(local, use_ray=False) == replace(first, snapshot=5)
    for path in first.files:
        local.store.delete(path)
    finalize(local, use_ray=False)
    assert read_table(local.store, "recordings") == texts_before
    assert check(local).is_well


def test_the_command(tmp_path: Path) -> None:
    output = begin(Store.at(str(tmp_path / "out")))
    put(output.store, ok("a"), name="n0")
    output.store.put("_run/probe-1", b"")
    done = murmur("clean", output.store.uri, "--dry-run", "--json")
    assert json.loads(done.stdout)["probes"] == 1
    done = murmur("clean", output.store.uri)
    assert (done.returncode, done.stderr, done.stdout) == (
        0,
        "",
        "removed: 1 of the ledger that its snapshot holds too, 1 probes of writing\n",
    )
    assert read_ledger(output.store).resume().ok == {"a"}
    assert murmur("clean", output.store.uri).stdout == "removed: nothing\n"
