"""What counts as committed, which of two attempts wins, and what a run still has to do."""

from __future__ import annotations

import itertools
import json
import os
import random
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commits import OPEN, begin, failed, ok, put, read_ledger, unreadable, winner

from pipeline.errors import ManifestError, OutputError, OutputMismatchError
from pipeline.ledger import SNAPSHOTS, Ledger, ledger_path
from pipeline.output import CONFIG, INPUTS, LEDGER, newest_inputs, read_input_ids, read_output, write_inputs
from pipeline.pieces import DATA, data_path
from pipeline.store import Store
from pipeline.types import Recording, Spent, UnitResult


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store.at(str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("s3") + "/out")


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store.at(str(tmp_path / "out"))


# ---- the output


def test_a_new_output_is_begun_and_found_again(store: Store) -> None:
    first = begin(store)
    assert (first.run.n_shards, first.run.keys["suppress_tokens"]) == (3, [-1])
    again = begin(store, n_shards=64, settings={"pool": "other"})  # neither can change a result
    assert again == first
    assert read_output(store.uri) == first
    assert store.sizes("_run").keys() == {"config.json"}  # the probe is gone


def test_another_configuration_is_refused_by_its_keys(local: Store) -> None:
    begin(local)
    with pytest.raises(OutputMismatchError) as caught:
        begin(local, keys={"model": "demo", "chunk_length_s": 30, "task": "translate"})
    assert caught.value.exit_code == 4
    text = str(caught.value)
    assert "chunk_length_s: 10 there, 30 here" in text
    assert "suppress_tokens: [-1] there, '(not set)' here" in text
    assert "task: '(not set)' there, 'translate' here" in text
    assert "model:" not in text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(OutputError, match="cannot write") as caught:
        begin(Store.at(str(tmp_path / "out")))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("uri", ["{tmp}/file/out", "/proc/out", "http://127.0.0.1:1/out", "s3://no-such-bucket/out"])
def test_outputs_that_cannot_be_written(uri: str, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.store.PAUSE_S", 0.001)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"output .*: cannot write there: ") as caught:
        begin(Store.at(uri.format(tmp=tmp_path)))
    assert "probe" not in str(caught.value)


def test_foreign_files_are_fine_foreign_tables_are_not(local: Store) -> None:
    local.put("notes.txt", b"mine")
    local.put("segments/part-0.parquet", b"somebody's")
    with pytest.raises(OutputError, match="segments"):
        begin(local)
    local.delete("segments/part-0.parquet")
    begin(local)
    assert local.get("notes.txt") == b"mine"


def test_a_configuration_cut_short_at_birth_is_written_again(local: Store) -> None:
    local.put(CONFIG, b'{"model": "de')
    assert begin(local).run.n_shards == 3
    put(local, ok("a"))
    local.put(CONFIG, b'{"model": "de')
    with pytest.raises(OutputError, match="_run/ledger"):  # now something would be lost
        begin(local)
    with pytest.raises(OutputError, match="no run was begun"):
        read_output(local.uri)


def test_of_two_drivers_that_begin_at_once_the_first_decides(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second looks before the first has written, and writes after it."""
    first = begin(local, n_shards=5)
    get, asked = Store.get, []

    def not_there_yet(self: Store, name: str) -> bytes | None:
        asked.append(name)
        return None if len(asked) == 1 else get(self, name)

    monkeypatch.setattr(Store, "get", not_there_yet)
    assert begin(local, n_shards=7).run == first.run


# ---- the inputs


def recordings(n: int) -> Iterator[Recording]:
    return (Recording(f"r{i}", f"https://u:p@h/{i}.wav?sig=1", source=f"m.jsonl:{i}", size=i) for i in range(n))


def test_inputs_are_listed_and_the_newest_list_counts(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.output._INPUTS_PER_WRITE", 10)
    assert list(read_input_ids(local)) == []
    assert newest_inputs(local) is None
    assert write_inputs(local, recordings(3)) == 3
    assert write_inputs(local, recordings(25)) == 25
    batches = list(read_input_ids(local))
    assert len(batches) == 3  # streamed
    assert list(itertools.chain(*batches)) == [f"r{i}" for i in range(25)]
    rows = pq.read_table(pa.BufferReader(local.get(str(newest_inputs(local))))).slice(0, 1).to_pylist()
    assert rows[0] | {"uri": ""} == {
        "recording_id": "r0", "source": "m.jsonl:0", "uri": "", "size": 0, "etag": None, "duration_s": None,
    }  # fmt: skip
    assert "u:p" not in rows[0]["uri"]


def test_no_inputs_is_a_list_too(local: Store) -> None:
    assert write_inputs(local, []) == 0
    assert newest_inputs(local) is not None
    assert list(itertools.chain(*read_input_ids(local))) == []


def test_a_list_that_was_not_finished_is_none(store: Store) -> None:
    def breaks() -> Iterator[Recording]:
        yield from recordings(3)
        raise ManifestError("line 4")

    write_inputs(store, recordings(2))
    with pytest.raises(ManifestError, match="line 4"):
        write_inputs(store, breaks())
    assert list(itertools.chain(*read_input_ids(store))) == ["r0", "r1"]
    store.put(f"{INPUTS}/000007.parquet", (store.get(f"{INPUTS}/000001.parquet") or b"")[:-9])
    assert list(itertools.chain(*read_input_ids(store))) == ["r0", "r1"]
    write_inputs(store, recordings(1))
    assert list(itertools.chain(*read_input_ids(store))) == ["r0"]


# ---- what counts


def test_only_what_a_ledger_object_names_counts(local: Store) -> None:
    """A writer that was killed between its two puts, and a stray file."""
    put(local, ok("a"), name="n1")
    put(local, ok("orphan"), name="n2")
    local.delete(ledger_path("n2"))
    local.put(data_path("stray"), b"anything")
    assert local.sizes(DATA).keys() == {"n1.arrow", "n2.arrow", "stray.arrow"}
    assert read_ledger(local).recordings()["recording_id"].to_pylist() == ["a"]


def test_half_a_ledger_object_does_not_count_until_it_is_whole(local: Store) -> None:
    put(local, ok("a"), name="n1")
    whole = local.get(ledger_path("n1")) or b""
    ledger = Ledger(local, 3)
    for half in (b"", whole[: len(whole) // 2], b"[]", b'{"units": 3}', b'"text"'):
        local.put(ledger_path("n1"), half)
        assert ledger.refresh() == 0
    local.put(ledger_path("n1"), whole)
    assert ledger.refresh() == 1
    assert winner(ledger, "a") == "n1"


def test_refresh_reads_only_what_is_new(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put(local, ok("a"), name="n1")
    ledger = read_ledger(local)
    put(local, ok("b"), name="n2")
    get, read = Store.get, []
    monkeypatch.setattr(Store, "get", lambda self, name: (read.append(name), get(self, name))[1])
    assert ledger.refresh() == 1
    assert read == [ledger_path("n2")]
    assert ledger.refresh() == 0
    assert ledger.resume().ok == {"a", "b"}


# ---- which of two wins


def test_the_smallest_name_wins_however_they_are_listed(local: Store) -> None:
    for name in ("n3", "n1", "n2"):
        put(local, ok("a"), name=name)
    for _ in range(2):
        assert winner(read_ledger(local), "a") == "n1"


def test_any_order_of_reading_gives_the_same_winners(local: Store) -> None:
    """Incrementally, in every order of arrival, as a ledger sees them that is read while a run goes on."""
    attempts = {"n1": failed("a"), "n2": ok("a"), "n3": ok("a"), "n4": failed("b"), "n5": failed("b")}
    for name, result in attempts.items():
        put(local, result, name=name)
    objects = {name: local.get(ledger_path(name)) or b"" for name in attempts}
    for order in list(itertools.permutations(attempts))[::7]:
        for name in order:
            local.delete(ledger_path(name))
        ledger = Ledger(local, 3)
        for name in order:
            local.put(ledger_path(name), objects[name])
            ledger.refresh()
        assert (winner(ledger, "a"), winner(ledger, "b")) == ("n2", "n4")


def test_a_snapshot_pins_the_winner_against_a_smaller_name(store: Store) -> None:
    put(store, ok("a"), name="n5")
    ledger = read_ledger(store)
    assert ledger.pin() == 1
    put(store, ok("a"), name="n1")
    put(store, ok("b"), name="n2")
    for seen in (ledger, read_ledger(store)):
        seen.refresh()
        assert winner(seen, "a") == "n5"
    assert ledger.pin() == 2
    assert ledger.pin() == 2  # nothing new: no new snapshot
    assert winner(read_ledger(store), "a") == "n5"
    assert store.sizes(SNAPSHOTS).keys() == {"000001.parquet", "000002.parquet"}


def test_half_a_snapshot_pins_nothing(local: Store) -> None:
    put(local, ok("a"), name="n5")
    read_ledger(local).pin()
    put(local, ok("b"), name="n6")
    read_ledger(local).pin()
    whole = local.get(f"{SNAPSHOTS}/000002.parquet") or b""
    local.put(f"{SNAPSHOTS}/000002.parquet", whole[:-5])
    put(local, ok("b"), name="n1")
    ledger = read_ledger(local)
    assert (ledger.snapshot, winner(ledger, "b")) == (1, "n1")
    assert ledger.pin() == 3  # never the number of one that somebody may have read


def test_of_two_that_pin_at_once_the_second_starts_from_the_first(local: Store) -> None:
    put(local, ok("a"), name="n5")
    slow = read_ledger(local)
    read_ledger(local).pin()
    put(local, ok("a"), name="n1")
    slow.refresh()
    assert winner(slow, "a") == "n5"
    put(local, ok("b"), name="n2")
    slow.refresh()
    put(local, ok("c"), name="n3")
    read_ledger(local).pin()
    put(local, ok("b"), ok("d"), name="n0")
    assert slow.pin() == 3  # not 2, which it had not seen: b is pinned there
    assert winner(slow, "b") == "n2"
    assert slow.resume().ok == {"a", "b", "c", "d"}


def test_a_retry_mends_also_what_is_pinned(local: Store) -> None:
    put(local, failed("a"), name="n1")
    ledger = read_ledger(local)
    ledger.pin()
    assert ledger.next_round() == 1
    put(local, failed("a", kind="engine_memory"), name="n9", round=1)
    ledger.refresh()
    assert winner(ledger, "a") == "n9"  # it failed again: the newer reason is told
    assert ledger.next_round() == 2
    put(local, ok("a"), name="n8", round=2)
    ledger.refresh()
    assert winner(ledger, "a") == "n8"
    ledger.pin()
    put(local, failed("a"), name="n0", round=3)
    assert winner(read_ledger(local), "a") == "n8"  # what is done well stays


# ---- what is left to do


def test_resume(local: Store) -> None:
    long = [ok("long", i, last=i == 3) for i in range(4)]
    put(local, *long[:2], failed("half", 0, last=False), ok("alone"))
    put(local, long[3], unreadable("broken"))
    put(local, ok("mixed", 0, last=False), failed("mixed", 1, last=False), ok("mixed", 2))
    resume = read_ledger(local).resume()
    assert resume.ok == {"alone"}
    assert resume.partial == {"long": {0, 1, 3}, "half": {0}}
    assert resume.failed == {"broken": set(), "mixed": {0, 2}}
    put(local, long[2])
    assert read_ledger(local).resume().ok == {"alone", "long"}


def test_units_beyond_the_first_last_one_wait_for_a_retry(local: Store) -> None:
    """Unreadable for one driver, readable for another that did not get to the end of it."""
    put(local, unreadable("a"))
    put(local, ok("a", 1, last=False), ok("a", 2))
    ledger = read_ledger(local)
    assert ledger.resume().failed == {"a": {1, 2}}
    assert ledger.recordings()["n_units"].to_pylist() == [1]
    put(local, ok("a", 0, last=False), round=1)
    ledger.refresh()
    assert ledger.resume().ok == {"a"}
    assert ledger.recordings()["n_units"].to_pylist() == [3]


def test_resume_of_nothing(local: Store) -> None:
    resume = read_ledger(local).resume()
    assert (resume.ok, resume.failed, resume.partial) == (frozenset(), {}, {})
    assert read_ledger(local).next_round() == 1


def test_recordings_count_units_and_samples(local: Store) -> None:
    put(local, ok("b", 1), ok("b", 0, last=False), failed("a"), ok("c", 1, last=False))
    rows = read_ledger(local).recordings().select(["recording_id", "status", "n_units", "n_samples"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("a", "failed", 1, 160_000),
        ("b", "ok", 2, 320_000),
        ("c", "partial", 1, 160_000),
    ]


@pytest.mark.parametrize(
    ("before", "now", "changed"),
    [
        ((10, "x"), (10, "x"), False),
        ((10, "x"), (11, "x"), True),
        ((10, "x"), (10, "y"), True),
        ((10, None), (10, "y"), False),  # the listing tells more than the first did
        ((None, None), (10, "y"), False),
        ((10, "x"), (None, None), False),  # or less
        ((None, "x"), (3, "y"), True),
    ],
)
def test_replaced_input_is_noticed(
    local: Store, before: tuple[int | None, str | None], now: tuple[int | None, str | None], changed: bool
) -> None:
    put(local, ok("a", recording=Recording("a", "a.wav", size=before[0], etag=before[1])))
    resume = read_ledger(local).resume()
    assert resume.is_changed(Recording("a", "a.wav", size=now[0], etag=now[1])) is changed
    assert not resume.is_changed(Recording("new", "b.wav", size=1, etag="e"))


def test_a_random_ledger_against_a_plain_count(local: Store) -> None:
    """The vectorised answers against a few lines that look at one recording at a time."""
    chance = random.Random(7)
    expected: dict[str, str] = {}
    results: list[UnitResult] = []
    for i in range(60):
        n = chance.randint(1, 6)
        units = [(failed if chance.random() < 0.1 else ok)(f"r{i}", k, last=k == n - 1) for k in range(n)]
        there = [unit for unit in units if chance.random() < 0.9]
        results += there
        if len(there) == n:
            expected[f"r{i}"] = "failed" if any(unit.failure for unit in units) else "ok"
        elif there:
            expected[f"r{i}"] = "partial"
    chance.shuffle(results)
    for some in itertools.batched(results, 17) if hasattr(itertools, "batched") else [results[:99], results[99:]]:
        put(local, *some)
    rows = read_ledger(local).recordings()
    assert dict(zip(rows["recording_id"].to_pylist(), rows["status"].to_pylist(), strict=True)) == expected


def test_a_ledger_object_says_what_is_in_the_data_object(local: Store) -> None:
    put(local, ok("a"), failed("b", kind="non_finite"), name="n1")
    said = json.loads(local.get(ledger_path("n1")) or b"")
    assert said["data"] == data_path("n1")
    assert said["bytes"] == local.sizes(DATA)["n1.arrow"]
    assert [(u["recording_id"], u["ok"], u["kind"], u["n_samples"]) for u in said["units"]] == [
        ("a", True, None, 160_000),
        ("b", False, "non_finite", 160_000),
    ]
    assert local.sizes(LEDGER).keys() == {"n1.json"}
    assert OPEN["n_shards"] == 3


# ---- what is only to be shown


def test_an_entry_says_when_it_was_committed_and_what_it_took(local: Store) -> None:
    before = time.time()
    spent = Spent(source_s=0.5, decode_s=1.25, vad_s=0.25, engine_s=4.0)
    put(local, ok("a", spent=spent), unreadable("b"))
    well, bad = read_ledger(local).winners.to_pylist()
    assert before - 1 <= well["at"] == bad["at"] <= time.time() + 1
    assert [well[name] for name in ("source_s", "decode_s", "vad_s", "engine_s")] == [0.5, 1.25, 0.25, 4.0]
    assert well["commit_s"] > 0
    assert (well["stage"], well["attempts"]) == (None, None)
    assert (bad["stage"], bad["attempts"], bad["engine_s"]) == ("decode", 2, None)


def test_an_entry_of_before_it_was_recorded_counts_as_before(local: Store) -> None:
    put(local, ok("a"), name="x")
    said = json.loads(local.get(ledger_path("x")) or b"")
    del said["at"], said["commit_s"]
    local.put(ledger_path("x"), json.dumps(said).encode())
    (row,) = read_ledger(local).winners.to_pylist()
    assert row["ok"]
    assert (row["at"], row["commit_s"]) == (None, None)
