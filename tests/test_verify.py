"""Every kind of damage is found and named, and a repair costs what was damaged and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import murmur
from commits import begin, failed, ok, put, read_ledger, read_table, table, texts

from pipeline import finalize as finalizing
from pipeline.errors import OutputHeldError
from pipeline.finalize import SCHEMAS, finalize, read_success, table_paths
from pipeline.lease import Lease
from pipeline.ledger import commit, ledger_path
from pipeline.output import SUCCESS, Output, write_inputs
from pipeline.pieces import data_path
from pipeline.schema import RECORDINGS, shard_of, to_table
from pipeline.store import Store
from pipeline.types import Recording
from pipeline.verify import Findings, check, repair

SHARD_1 = {table: f"{table}/part-00001-of-00003.parquet" for table in ("segments", "recordings")}
NAMES = [f"r{i}" for i in range(9)]


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Output:
    uri = str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("s3") + "/out"
    return finished(uri)


@pytest.fixture
def local(tmp_path: Path) -> Output:
    return finished(str(tmp_path / "out"))


def finished(uri: str) -> Output:
    """Nine recordings of two Units each, in three objects n0, n1 and n2, and their tables."""
    output = begin(Store.at(uri))
    for i in range(3):
        put(output.store, *(ok(name, k, last=k == 1) for name in NAMES[i::3] for k in range(2)), name=f"n{i}")
    write_inputs(output.store, [Recording(name, f"{name}.wav") for name in NAMES])
    finalize(output, use_ray=False)
    return output


def damaged(found: Findings) -> dict[str, str]:
    return {one.path: one.what for one in (*found.tables, *found.data)}


def test_all_is_well(output: Output) -> None:
    found = check(output)
    assert found.is_well
    assert (found.exit_code, found.n_files, found.n_pieces, found.orphans) == (0, 7, 3, 0)
    assert "put it right" not in " ".join(found.lines("out"))


def test_a_truncated_table_file_is_named_with_its_shard(output: Output) -> None:
    whole = output.store.get(SHARD_1["segments"]) or b""
    output.store.put(SHARD_1["segments"], whole[:-100])
    found = check(output)
    (damage,) = found.tables
    assert (damage.path, damage.shard) == (SHARD_1["segments"], 1)
    assert damage.what == f"has {len(whole) - 100} bytes, not {len(whole)}"
    assert found.exit_code == 3
    done = repair(output)
    assert (done.exit_code, done.to_redo, done.repaired) == (0, 0, True)
    assert output.store.get(SHARD_1["segments"]) == whole
    assert check(output).is_well
    said = read_success(output.store)
    assert said is not None
    assert said.complete


def test_a_repair_writes_the_damaged_shards_only(local: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = bytearray(local.store.get(SHARD_1["recordings"]) or b"")
    raw[50] ^= 1  # of the same length, which no listing tells
    local.store.put(SHARD_1["recordings"], bytes(raw))
    assert damaged(check(local)) == {SHARD_1["recordings"]: "has other bytes than were written (SHA-256)"}
    built: list[int] = []
    build = finalizing.build_shard
    monkeypatch.setattr(finalizing, "build_shard", lambda it, shard: (built.append(shard), build(it, shard))[1])
    assert repair(local).exit_code == 0
    assert built == [1]
    assert check(local).is_well


@pytest.mark.parametrize("what", ["gone", "cut short", "other bytes"])
def test_a_damaged_data_object_costs_its_units_only(local: Output, what: str) -> None:
    output = local
    whole = output.store.get(data_path("n1")) or b""
    if what == "gone":
        output.store.delete(data_path("n1"))
    else:
        output.store.put(data_path("n1"), whole[:-100] if what == "cut short" else whole[:500] + b"?" + whole[501:])
    found = check(output)
    assert list(damaged(found)) == [data_path("n1")]
    assert what in damaged(found)[data_path("n1")]
    assert found.exit_code == 3

    done = repair(output)
    assert (done.to_redo, done.exit_code) == (6, 3)  # three recordings of two Units
    assert "6 Units are not done any more: the same `murmur transcribe` does them again" in done.lines("out")
    resume = read_ledger(output.store).resume()
    assert resume.ok == set(NAMES) - set(NAMES[1::3])
    assert not resume.partial
    assert texts(read_table(output.store, "recordings")).keys() == resume.ok
    assert check(output).is_well
    said = read_success(output.store)
    assert said is not None
    assert (said.complete, said.counts["missing"]) == (False, 3)

    put(output.store, *(ok(name, k, last=k == 1, text=" again") for name in NAMES[1::3] for k in range(2)), name="n9")
    assert finalize(output, use_ray=False).complete
    assert texts(read_table(output.store, "recordings"))["r1"] == "again again"
    assert len(read_table(output.store, "recordings")) == 9
    assert check(output).is_well


def test_a_void_cannot_be_undone_by_who_slept(local: Output) -> None:
    """A finalize that has read the ledger before, and a writer that puts its object once more."""
    asleep = read_ledger(local.store)
    raw = local.store.get(ledger_path("n1")) or b""
    local.store.delete(data_path("n1"))
    repair(local)
    asleep.move(asleep.winners)  # as after a merge: it has something to pin
    asleep.pin()
    local.store.put(ledger_path("n1"), raw)
    for _ in range(2):
        assert read_ledger(local.store).resume().ok == set(NAMES) - set(NAMES[1::3])
        assert finalize(local, use_ray=False).counts["ok"] == 6


def test_another_attempt_takes_the_place_of_a_damaged_one(local: Output) -> None:
    put(local.store, *(ok(name, k, last=k == 1, text=" too") for name in NAMES[1::3] for k in range(2)), name="n8")
    finalize(local, use_ray=False)
    local.store.delete(data_path("n1"))
    done = repair(local)
    assert (done.to_redo, done.exit_code) == (0, 0)
    assert texts(read_table(local.store, "recordings"))["r1"] == "too too"


def test_both_attempts_damaged(local: Output) -> None:
    put(local.store, *(ok(name, k, last=k == 1) for name in NAMES[1::3] for k in range(2)), name="n8")
    finalize(local, use_ray=False)
    local.store.delete(data_path("n1"))
    local.store.delete(data_path("n8"))
    assert repair(local).to_redo == 6


@pytest.mark.parametrize(
    ("table", "change", "what"),
    [
        ("recordings", lambda rows: rows[:-1], "does not join recordings"),
        ("recordings", lambda rows: [*rows, *rows], "has one twice"),
        ("recordings", lambda rows: rows[::-1], "is not sorted"),
        ("recordings", lambda rows: [*rows, rows[-1] | {"recording_id": "zzz", "n_segments": 0}], "of another shard"),
        ("segments", lambda rows: rows[1:], "does not join recordings"),
        ("segments", lambda rows: rows[::-1], "does not join recordings"),
    ],
)
def test_laws(local: Output, table: str, change: Callable[[list[Any]], list[Any]], what: str) -> None:
    """Files that are what `_SUCCESS` says, and wrong all the same: as a mistake of finalize would make them."""
    shard = shard_of("r0", 3)
    assert sum(shard_of(name, 3) == shard for name in NAMES) > 1
    path = table_paths(local, shard)[table]
    rows = pq.read_table(pa.BufferReader(local.store.get(path)), schema=SCHEMAS[table])
    forge(local, path, to_table(change(rows.to_pylist()), SCHEMAS[table]))
    assert any(what in said for said in damaged(check(local)).values())
    assert repair(local).exit_code == 0
    assert check(local).is_well


def test_a_sum_that_is_not_the_duration(local: Output) -> None:
    path = SHARD_1["recordings"]
    rows = pq.read_table(pa.BufferReader(local.store.get(path)), schema=RECORDINGS)
    at = rows.schema.get_field_index("decoded_s")
    less = pa.array([value - 0.001 for value in rows["decoded_s"].to_pylist()])
    forge(local, path, rows.set_column(at, rows.schema.field(at), less))
    assert damaged(check(local)) == {path: "has rows in which decoded_s + skipped_s is not duration_s"}


def forge(output: Output, path: str, rows: pa.Table) -> None:
    """Put this file, and say in `_SUCCESS` that it is right."""
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink)
    raw = sink.getvalue().to_pybytes()
    output.store.put(path, raw)
    said = json.loads(output.store.get(SUCCESS) or b"")
    said["files"][path] = {"rows": len(rows), "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    output.store.put(SUCCESS, json.dumps(said).encode())


def test_a_lost_or_cut_success(local: Output) -> None:
    first = read_success(local.store)
    local.store.put(SUCCESS, b"{")
    assert damaged(check(local)) == {SUCCESS: "does not parse"}
    local.store.delete(SUCCESS)
    assert damaged(check(local)) == {SUCCESS: "is gone, and there are tables"}
    assert repair(local).exit_code == 0
    assert read_success(local.store) == first


def test_a_stray_file_among_the_tables_is_named_and_left(local: Output) -> None:
    local.store.put("segments/copy.parquet", b"anything")
    found = check(local)
    assert (found.strays, found.exit_code) == (("segments/copy.parquet",), 3)
    assert repair(local).exit_code == 3
    assert local.store.get("segments/copy.parquet") == b"anything"


def test_in_the_middle_of_a_run_nothing_is_wrong(tmp_path: Path) -> None:
    """No tables yet; a writer between its puts; half a ledger object; recordings half done."""
    output = begin(Store.at(str(tmp_path / "out")))
    put(output.store, ok("a"), ok("b", 0, last=False), failed("c"), name="n1")
    put(output.store, ok("d"), name="n2")
    output.store.delete(ledger_path("n2"))
    put(output.store, ok("e"), name="n3")
    output.store.put(ledger_path("n3"), (output.store.get(ledger_path("n3")) or b"")[:-9])
    with Lease.acquire(output.store):
        found = check(output)
        assert found.is_well
        assert (found.orphans, found.half_written) == (1, 1)


def test_tables_that_are_being_written_raise_no_alarm(local: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finalize begins, and ends, while verify is at the first shard."""
    put(local.store, *(ok(f"new{i}") for i in range(9)))
    get, done = Store.get, []

    def meanwhile(self: Store, name: str) -> bytes | None:
        if name.startswith("segments/") and not done:
            done.append(name)
            finalize(local, use_ray=False)
        return get(self, name)

    monkeypatch.setattr(Store, "get", meanwhile)
    assert check(local).is_well
    assert done


def test_a_repair_is_refused_while_a_driver_lives(local: Output) -> None:
    with Lease.acquire(local.store), pytest.raises(OutputHeldError):
        repair(local)


def test_of_merged_objects_only_the_damaged_one_counts(local: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was merged still lies in its own objects until `clean`: so nothing is to be done again."""
    monkeypatch.setattr(finalizing, "MERGE_AT", 1)
    put(local.store, ok("new"), name="n7")
    finalize(local, use_ray=False)
    merged = set(read_ledger(local.store).winners["data"].to_pylist())
    assert len(merged) == 1
    local.store.delete(data_path("n1"))  # nobody needs it any more
    assert check(local).is_well
    (name,) = merged
    local.store.put(data_path(name), (local.store.get(data_path(name)) or b"")[:-40])
    assert list(damaged(check(local))) == [data_path(name)]
    done = repair(local)
    assert (done.to_redo, done.exit_code) == (6, 3)  # those of n1
    assert check(local).is_well


def test_the_command(local: Output) -> None:
    done = murmur("verify", local.store.uri)
    assert (done.returncode, done.stderr) == (0, "")
    assert "7 files of tables and 3 pieces of committed data were checked" in done.stdout
    local.store.put(SHARD_1["segments"], (local.store.get(SHARD_1["segments"]) or b"")[:-100])
    done = murmur("verify", local.store.uri, "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["tables"][0]["shard"] == 1
    assert "(shard 1)" in done.stderr
    assert murmur("verify", local.store.uri, "--repair").returncode == 0


def test_other_shards_do_not_matter(local: Output) -> None:
    """A driver that counted in other shards committed too: its rows are where they belong."""
    commit(local.store, table(ok(f"s{i}") for i in range(5)), 7)
    finalize(local, use_ray=False)
    assert check(local).is_well
