"""The public tables: what is published, what is written again, what a reader finds; on a disk and on S3."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from commits import begin, failed, ok, put, read_ledger, read_table, segment, table, texts, unreadable

from pipeline import finalize as finalizing
from pipeline import pieces
from pipeline.errors import OutputHeldError, StoreError
from pipeline.finalize import SCHEMAS, Success, finalize, read_success
from pipeline.lease import FINALIZE_LEASE, Lease
from pipeline.ledger import SNAPSHOTS, commit
from pipeline.output import SUCCESS, Output, write_inputs
from pipeline.pieces import data_path
from pipeline.schema import shard_of
from pipeline.store import Store
from pipeline.types import Recording

FILES = [f"{table}/part-{shard:05d}-of-00003.parquet" for table in ("recordings", "segments") for shard in range(3)]
NO_WORDS = "words/part-00000-of-00003.parquet"


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Output:
    uri = str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("s3") + "/out"
    return begin(Store.at(uri))


@pytest.fixture
def local(tmp_path: Path) -> Output:
    return begin(Store.at(str(tmp_path / "out")))


def tables(output: Output) -> Success:
    return finalize(output, use_ray=False)


def listed(output: Output, *names: str) -> None:
    write_inputs(output.store, [Recording(name, f"{name}.wav") for name in names])


@pytest.fixture
def puts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all objects that are put or created from now on, but for leases."""
    seen: list[str] = []
    for name in ("put", "create"):
        whole = getattr(Store, name)

        def record(self: Store, name: str, data: bytes, whole: Any = whole) -> Any:
            seen.extend([] if "lease" in name else [name])
            return whole(self, name, data)

        monkeypatch.setattr(Store, name, record)
    return seen


def test_tables_of_a_finished_run(output: Output) -> None:
    long = [ok("long", i, last=i == 3) for i in range(4)]
    put(output.store, long[2], ok("b"), long[0])
    put(output.store, unreadable("broken"), long[3], long[1])
    listed(output, "long", "b", "broken")
    success = tables(output)
    assert success.complete
    assert success.counts == {"inputs": 3, "ok": 2, "failed": 1, "skipped": 0, "missing": 0, "unlisted": 0}
    assert success.audio_s == 50.0
    recordings = {row["recording_id"]: row for row in read_table(output.store, "recordings")}
    assert recordings["long"]["text"] == "long unit 0. long unit 1. long unit 2. long unit 3."
    assert recordings["long"]["duration_s"] == 40.0
    assert (recordings["broken"]["status"], recordings["broken"]["error_kind"]) == ("failed", "damaged_audio")
    assert recordings["b"]["options_fingerprint"] == output.run.fingerprint
    segments = [row for row in read_table(output.store, "segments") if row["recording_id"] == "long"]
    assert [(row["segment_id"], row["start"]) for row in segments] == [(0, 0.0), (1, 10.0), (2, 20.0), (3, 30.0)]


def test_success_says_what_is_on_disk(local: Output) -> None:
    put(local.store, ok("a"), ok("b"))
    listed(local, "a", "b")
    success = tables(local)
    assert json.loads(local.store.get(SUCCESS) or b"")["complete"] is True
    assert read_success(local.store) == success
    assert sorted(success.files) == sorted([*FILES, NO_WORDS])
    for path, about in success.files.items():
        raw = local.store.get(path) or b""
        assert about["sha256"] == hashlib.sha256(raw).hexdigest(), path
        assert about["bytes"] == len(raw)
        assert about["rows"] == pq.read_metadata(pa.BufferReader(raw)).num_rows
    there = {f"{folder}/{name}" for folder in SCHEMAS for name in local.store.sizes(folder)}
    assert there == success.files.keys()


def test_plain_readers_read_them(local: Output) -> None:
    """Few recordings over three shards, nulls only in many columns, no words: every file has the whole schema."""
    bare = ok(
        "a", segments=(), skipped=(), language=None, language_probability=None, speech=None, uncovered_speech=None
    )
    put(local.store, bare, ok("b", text=" 日本 🎧"))
    tables(local)
    for name, schema in SCHEMAS.items():
        folder = f"{local.store.uri}/{name}"
        for file in Path(folder).iterdir():
            assert pq.read_schema(file).equals(schema), file
        found = ds.dataset(folder).to_table()
        assert found.schema.equals(schema)
        assert len(pd.read_parquet(folder)) == len(found)
        counted = duckdb.sql(f"select count(*) from read_parquet('{folder}/*.parquet')").fetchall()
        assert counted == [(len(found),)]
    rows = duckdb.sql(
        f"select recording_id, text, speech_s, len(skipped) from '{local.store.uri}/recordings/*.parquet' order by 1"
    )
    assert rows.fetchall() == [("a", "", None, 0), ("b", "日本 🎧", 5.0, 1)]
    frame = pd.read_parquet(f"{local.store.uri}/segments")
    assert frame["tokens"].tolist()[0].tolist() == [1, 2, 50364]


def test_sorted_by_recording_and_time(local: Output) -> None:
    names = [f"r{i}" for i in (7, 3, 11, 0, 5, 9, 1)]
    for name in names:
        put(local.store, ok(name, 1), ok(name, 0, last=False))
    tables(local)
    for shard in range(3):
        rows = pq.read_table(f"{local.store.uri}/segments/part-{shard:05d}-of-00003.parquet").to_pylist()
        keys = [(row["recording_id"], row["start"]) for row in rows]
        assert keys == sorted(keys)
        assert {shard_of(row["recording_id"], 3) for row in rows} <= {shard}
    assert len(read_table(local.store, "segments")) == 14


def test_words(tmp_path: Path) -> None:
    output = begin(Store.at(str(tmp_path / "out")), settings={"chunk_level": "word"})
    put(output.store, ok("a", segments=(segment(" one two", words=True),)), ok("b"))
    success = tables(output)
    assert sum(path.startswith("words/") for path in success.files) == 3
    rows = read_table(output.store, "words")
    assert [(row["recording_id"], row["word_id"], row["word"]) for row in rows] == [("a", 0, "one"), ("a", 1, "two")]


def test_no_inputs_at_all(local: Output) -> None:
    listed(local)
    success = tables(local)
    assert success.complete
    assert set(success.counts.values()) == {0}
    assert ds.dataset(f"{local.store.uri}/segments").to_table().schema.equals(SCHEMAS["segments"])


def test_two_attempts_are_published_once(output: Output) -> None:
    put(output.store, ok("a", text=" second"), name="n5")
    put(output.store, ok("a", text=" first"), ok("b"), name="n3")
    tables(output)
    assert texts(read_table(output.store, "recordings")) == {"a": "first", "b": "b unit 0."}
    put(output.store, ok("a", text=" too late"), ok("c"), name="n1")
    success = tables(output)
    assert texts(read_table(output.store, "recordings")) == {"a": "first", "b": "b unit 0.", "c": "c unit 0."}
    assert success.counts["unlisted"] == 3


def test_the_same_unit_twice_in_one_object(local: Output) -> None:
    put(local.store, ok("a", text=" once"), ok("a", text=" twice"))
    tables(local)
    assert texts(read_table(local.store, "recordings")) == {"a": "once"}


def test_a_driver_that_counted_in_other_shards_loses_nothing(local: Output) -> None:
    """Two began the output at once, on a store that cannot tell them apart, with other numbers of shards."""
    commit(local.store, table(ok(f"r{i}") for i in range(9)), n_shards=7)
    assert tables(local).counts["unlisted"] == 9
    for shard in range(3):
        rows = pq.read_table(f"{local.store.uri}/recordings/part-{shard:05d}-of-00003.parquet")
        assert {shard_of(name, 3) for name in rows["recording_id"].to_pylist()} == {shard}


def test_an_orphan_is_not_published(local: Output) -> None:
    put(local.store, ok("a"))
    put(local.store, ok("b"), name="n1")
    local.store.delete("_run/ledger/n1.json")
    tables(local)
    assert texts(read_table(local.store, "recordings")).keys() == {"a"}


def test_a_failed_unit_fails_its_recording_and_hides_nothing(local: Output) -> None:
    put(local.store, ok("a", 0, last=False), failed("a", 1, last=False), ok("a", 2))
    listed(local, "a")
    success = tables(local)
    (row,) = read_table(local.store, "recordings")
    assert (row["status"], row["error_kind"], row["n_segments"]) == ("failed", "engine", 2)
    assert {"start": 10.0, "end": 20.0, "reason": "engine"} in row["skipped"]
    assert row["decoded_s"] + row["skipped_s"] == row["duration_s"] == 30.0
    assert [s["start"] for s in read_table(local.store, "segments")] == [0.0, 20.0]
    assert (success.complete, success.counts["failed"]) == (True, 1)
    put(local.store, ok("a", 1, last=False), round=1)
    assert tables(local).counts["ok"] == 1
    assert texts(read_table(local.store, "recordings")) == {"a": "a unit 0. a unit 1. a unit 2."}


def test_mid_run_only_whole_recordings_are_published(local: Output) -> None:
    listed(local, "done", "begun", "waiting")
    put(local.store, ok("done"), ok("begun", 0, last=False))
    success = tables(local)
    assert not success.complete
    assert success.rewriting == []
    assert success.counts == {"inputs": 3, "ok": 1, "failed": 0, "skipped": 0, "missing": 2, "unlisted": 0}
    assert texts(read_table(local.store, "recordings")).keys() == {"done"}
    put(local.store, ok("begun", 1), ok("waiting"))
    success = tables(local)
    assert success.complete
    assert success.counts["ok"] == 3


def test_rows_that_are_listed_no_more_stay_and_are_counted(local: Output) -> None:
    put(local.store, ok("a"), ok("b"))
    listed(local, "a", "b")
    tables(local)
    listed(local, "b", "new")
    success = tables(local)
    assert success.counts == {"inputs": 2, "ok": 1, "failed": 0, "skipped": 0, "missing": 1, "unlisted": 1}
    assert texts(read_table(local.store, "recordings")).keys() == {"a", "b"}


def test_a_second_time_nothing_is_written(output: Output, puts: list[str]) -> None:
    put(output.store, ok("a"), ok("b"))
    listed(output, "a", "b")
    first = tables(output)
    puts.clear()
    assert tables(output) == first
    assert puts == []


def test_only_touched_shards_are_written_again(local: Output, puts: list[str]) -> None:
    put(local.store, *(ok(f"r{i}") for i in range(9)))
    tables(local)
    new = next(name for i in range(100) if shard_of(name := f"new{i}", 3) == 1)
    put(local.store, ok(new))
    put(local.store, ok("r0", text=" lost the race"))  # commits to a shard, and changes nothing in it
    puts.clear()
    tables(local)
    assert puts == [
        f"{SNAPSHOTS}/000002.parquet",
        SUCCESS,
        "segments/part-00001-of-00003.parquet",
        "recordings/part-00001-of-00003.parquet",
        SUCCESS,
    ]


def test_the_order_of_the_first_time(local: Output, puts: list[str]) -> None:
    put(local.store, ok("a"))
    puts.clear()
    tables(local)
    assert puts[:2] == [f"{SNAPSHOTS}/000001.parquet", SUCCESS]
    assert puts[-1] == SUCCESS
    assert sorted(puts[2:-1]) == sorted([*FILES, NO_WORDS])


@pytest.mark.parametrize("survivors", range(7))
def test_killed_at_any_put_and_run_again(local: Output, monkeypatch: pytest.MonkeyPatch, survivors: int) -> None:
    """Of the puts of a second finalize only the first few happen; then it is run again."""
    put(local.store, ok("a"), ok("b"), ok("c"))
    tables(local)
    put(local.store, *(ok(f"r{i}") for i in range(9)))
    listed(local, "a", "b", "c", *(f"r{i}" for i in range(9)))
    whole, done = Store.put, []

    def dies(self: Store, name: str, data: bytes) -> None:
        if "lease" not in name:
            if len(done) == survivors:
                raise KeyboardInterrupt
            done.append(name)
        whole(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", dies)
        with pytest.raises(KeyboardInterrupt):
            tables(local)
    said = read_success(local.store)
    assert said is not None
    assert not said.complete
    for path, about in said.files.items():  # what it vouches for is there, also now
        assert hashlib.sha256(local.store.get(path) or b"").hexdigest() == about["sha256"]
    success = tables(local)
    assert success.complete
    assert success.counts["ok"] == len(read_table(local.store, "recordings")) == 12


def test_a_file_that_was_removed_or_cut_is_made_again(local: Output, puts: list[str]) -> None:
    put(local.store, *(ok(f"r{i}") for i in range(9)))
    first = tables(local)
    local.store.delete(FILES[1])
    local.store.put(FILES[5], (local.store.get(FILES[5]) or b"")[:-100])
    puts.clear()
    assert tables(local).files == first.files
    assert read_success(local.store) == first  # and not what it said meanwhile
    assert set(puts) - {SUCCESS} == {FILES[1], FILES[2], FILES[4], FILES[5]}  # both tables of shards 1 and 2
    assert hashlib.sha256(local.store.get(FILES[5]) or b"").hexdigest() == first.files[FILES[5]]["sha256"]


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"complete": true}'])
def test_half_a_success_is_none(local: Output, raw: bytes) -> None:
    put(local.store, ok("a"))
    first = tables(local)
    local.store.put(SUCCESS, raw)
    assert tables(local) == first


def test_damaged_and_lost_data_is_named(local: Output) -> None:
    put(local.store, ok("a"), ok("b"), name="n1")
    whole = local.store.get(data_path("n1")) or b""
    local.store.put(data_path("n1"), whole[:-100])
    with pytest.raises(StoreError, match=r"_run/data/n1\.arrow is damaged"):
        tables(local)
    local.store.delete(data_path("n1"))
    with pytest.raises(StoreError, match=r"_run/data/n1\.arrow is gone; see `murmur verify`"):
        tables(local)
    local.store.put(data_path("n1"), whole[:500] + b"?" + whole[501:])
    with pytest.raises(StoreError, match=r"n1\.arrow is damaged \(other bytes than were written\)"):
        tables(local)
    said = read_success(local.store)
    assert said is not None
    assert not said.complete
    local.store.put(data_path("n1"), whole)
    assert tables(local).counts["unlisted"] == 2


def test_units_that_do_not_belong_together_fail_alone(local: Output) -> None:
    """The audio was replaced while its recording was half done: the Units overlap."""
    put(local.store, ok("torn", 0, last=False), ok("whole"))
    put(local.store, ok("torn", 1, start=77))
    listed(local, "torn", "whole")
    success = tables(local)
    rows = {row["recording_id"]: row for row in read_table(local.store, "recordings")}
    assert (rows["torn"]["status"], rows["torn"]["error_kind"]) == ("failed", "internal")
    assert rows["torn"]["decoded_s"] == 0
    assert rows["whole"]["status"] == "ok"
    assert success.counts["failed"] == 1


def test_a_lost_lease_stops_it_before_the_next_put(
    local: Output, puts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(local.store, *(ok(f"r{i}") for i in range(9)))
    build = finalizing.build_shard

    def taken_over(*args: Any) -> Any:
        puts.clear()
        local.store.put(FINALIZE_LEASE, b'{"host":"h","machine":"m","pid":1,"started":null,"token":"theirs","beat":0}')
        return build(*args)

    monkeypatch.setattr(finalizing, "build_shard", taken_over)
    with pytest.raises(OutputHeldError, match="another driver"):
        tables(local)
    assert puts == []


def test_two_that_both_believe_to_hold_it_end_exact(local: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is paused with its snapshot taken; the other takes over, commits, publishes; then the first goes on."""
    put(local.store, *(ok(f"r{i}") for i in range(9)), name="n5")
    build, paused = finalizing.build_shard, []

    def pause(*args: Any) -> Any:
        if not paused:
            paused.append(local.store.get(FINALIZE_LEASE))
            local.store.delete(FINALIZE_LEASE)
            put(local.store, ok("r0", text=" again"), ok("new"), name="n1")
            assert tables(local).counts["unlisted"] == 10
            local.store.put(FINALIZE_LEASE, paused[0])
        return build(*args)

    monkeypatch.setattr(finalizing, "build_shard", pause)
    assert tables(local).counts["unlisted"] == 9
    assert tables(local).counts["unlisted"] == 10
    said = texts(read_table(local.store, "recordings"))
    assert (len(said), said["r0"]) == (10, "r0 unit 0.")


def test_the_runs_own_lease_counts_too(local: Output) -> None:
    put(local.store, ok("a"))
    with Lease.acquire(local.store) as lease:
        finalize(local, use_ray=False, lease=lease)
    put(local.store, ok("b"))
    with pytest.raises(OutputHeldError):
        finalize(local, use_ray=False, lease=lease)


def test_a_file_that_another_is_just_writing_is_named(local: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk a put is not one moment: who wrongly believes to hold the lease may be half way through one."""
    put(local.store, ok("a"))
    (path,) = (file for file in FILES if file.startswith("recordings") and f"-{shard_of('a', 3):05d}-" in file)

    def cut_first(build: finalizing.Build, units: pa.Table) -> Any:
        local.store.put(path, b"")
        return count(build, units)

    count = finalizing._count
    monkeypatch.setattr(finalizing, "_count", cut_first)
    with pytest.raises(StoreError, match=f"{path} is half a file .*; run finalize again"):
        finalize(local, use_ray=False)
    monkeypatch.setattr(finalizing, "_count", count)
    assert finalize(local, use_ray=False).counts["unlisted"] == 1


def test_a_doubled_recording_is_noticed(local: Output) -> None:
    """The law is checked on the files themselves: here one shard's file was copied over another's."""
    put(local.store, *(ok(f"r{i}") for i in range(9)))
    tables(local)
    local.store.put(FILES[0], local.store.get(FILES[1]) or b"")
    said = json.loads(local.store.get(SUCCESS) or b"")
    said["files"][FILES[0]] = said["files"][FILES[1]]
    local.store.put(SUCCESS, json.dumps(said).encode())
    with pytest.raises(StoreError, match="in the tables twice"):
        tables(local)


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore:`use_push_based_shuffle`:DeprecationWarning")  # ray copies its own context
@pytest.mark.parametrize("broken", [False, True])
def test_on_ray_it_is_the_same(tmp_path: Path, ray_cluster: None, broken: bool) -> None:
    results = [ok(f"r{i}", k, last=k == 1) for i in range(9) for k in range(2)] + [unreadable("broken")]
    outputs = [begin(Store.at(str(tmp_path / where))) for where in ("here", "ray")]
    for output in outputs:
        put(output.store, *results, name="n1")
        listed(output, *(f"r{i}" for i in range(9)), "broken")
    here = tables(outputs[0])
    if broken:
        outputs[1].store.delete(data_path("n1"))
        with pytest.raises(StoreError, match=r"n1\.arrow is gone"):
            finalize(outputs[1])
    else:
        assert finalize(outputs[1]) == here
    assert read_ledger(outputs[1].store).snapshot == 1


# ---- many objects


@pytest.fixture
def merging(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with thousands of objects: merged from two on, in several groups, pieces and portions."""
    monkeypatch.setattr(finalizing, "MERGE_AT", 2)
    monkeypatch.setattr(pieces, "_GROUP_OBJECTS", 3)
    monkeypatch.setattr(pieces, "_PIECE_ROWS", 2)
    monkeypatch.setattr(pieces, "_PORTION_BYTES", 10_000)


def many(output: Output, names: Sequence[str]) -> None:
    """Three Units of each, two to an object, mixed; the middle one of some twice, or failed."""
    units = [ok(name, k, last=k == 2) for k in range(3) for name in names]
    for i in range(0, len(units), 2):
        put(output.store, *units[i : i + 2], name=f"{names[0]}-{i:03}")
    put(output.store, *(ok(name, 1, last=False, text=" late") for name in names[::3]), name=f"{names[0]}-z")


def test_merged_or_not_the_tables_are_the_same(tmp_path: Path, merging: None, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"r{i}" for i in range(11)]
    outputs = [begin(Store.at(str(tmp_path / where))) for where in ("merged", "loose")]
    for output in outputs:
        many(output, names)
    merged = tables(outputs[0])
    monkeypatch.setattr(finalizing, "MERGE_AT", 1_000)
    assert tables(outputs[1]) == merged
    assert len(set(read_ledger(outputs[0].store).winners["data"].to_pylist())) == 6  # of 17 objects, 3 to a group
    assert len(set(read_ledger(outputs[1].store).winners["data"].to_pylist())) > 16


def test_what_is_merged_is_not_read_or_merged_again(
    local: Output, merging: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    many(local, [f"r{i}" for i in range(6)])
    tables(local)
    before = set(read_ledger(local.store).winners["data"].to_pylist())
    many(local, [f"new{i}" for i in range(6)])
    read: list[str] = []
    whole = Store.get_range
    monkeypatch.setattr(Store, "get_range", lambda self, name, *at: (read.append(name), whole(self, name, *at))[1])
    assert tables(local).counts["unlisted"] == 12
    assert not [name for name in read if "/data/r" in name]
    assert before < set(read_ledger(local.store).winners["data"].to_pylist())
    assert len(read_table(local.store, "segments")) == 36


@pytest.mark.parametrize("survivors", range(5))
def test_killed_while_it_merges(local: Output, merging: None, monkeypatch: pytest.MonkeyPatch, survivors: int) -> None:
    """After some of the merged objects, or all of them and before the snapshot: they count for nothing."""
    many(local, [f"r{i}" for i in range(6)])
    left = [survivors]
    with monkeypatch.context() as patch:
        for method in ("put", "create"):
            whole = getattr(Store, method)

            def dies(self: Store, name: str, data: bytes, whole: Any = whole) -> Any:
                left[0] -= "lease" not in name
                if left[0] < 0:
                    raise KeyboardInterrupt
                return whole(self, name, data)

            patch.setattr(Store, method, dies)
        with pytest.raises(KeyboardInterrupt):
            tables(local)
    assert tables(local).counts["unlisted"] == 6
    assert len(read_table(local.store, "segments")) == 18


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore:`use_push_based_shuffle`:DeprecationWarning")  # ray copies its own context
def test_merged_on_ray(tmp_path: Path, ray_cluster: None, merging: None) -> None:
    outputs = [begin(Store.at(str(tmp_path / where))) for where in ("here", "ray")]
    for output in outputs:
        many(output, [f"r{i}" for i in range(6)])
    assert finalize(outputs[1]) == tables(outputs[0])
