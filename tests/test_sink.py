"""The commit: the data, then what makes it count; on a disk, on S3, killed half way, and as Ray Data's sink."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from commits import failed, ok, put, read_ledger, table

from pipeline.errors import StoreError
from pipeline.ledger import Committed, commit, ledger_path
from pipeline.output import LEDGER
from pipeline.pieces import DATA, data_path, from_bytes
from pipeline.schema import DATA as DATA_SCHEMA
from pipeline.schema import UNITS, shard_of, unit_from_row
from pipeline.sink import LedgerSink
from pipeline.store import Store


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store.at(str(tmp_path / "out"))


def test_a_commit_can_be_read_back(local: Store) -> None:
    results = [ok("a"), failed("b"), ok("ä 日本", text=" 日本")]
    done = commit(local, table(results), 3, name="n1")
    assert done == Committed("n1", units=3, failed=1, n_samples=480_000)
    raw = local.get(data_path("n1")) or b""
    rows = from_bytes(raw)
    assert rows.schema.equals(DATA_SCHEMA)
    assert [unit_from_row(row) for row in rows.to_pylist()] == results
    assert rows["shard"].to_pylist() == [shard_of(r.recording.id, 3) for r in results]
    said = json.loads(local.get(ledger_path("n1")) or b"")
    assert said["sha256"] == hashlib.sha256(raw).hexdigest()


def test_every_attempt_has_a_name_of_its_own(local: Store) -> None:
    names = {put(local, ok("a")).name for _ in range(3)}
    assert len(names) == 3
    assert local.sizes(LEDGER).keys() == {f"{name}.json" for name in names}


def test_nothing_to_commit_writes_nothing(local: Store) -> None:
    assert commit(local, UNITS.empty_table(), 3) == Committed("")
    assert local.sizes(DATA) == {}


def test_another_schema_commits_nothing(local: Store) -> None:
    with pytest.raises(TypeError, match="schema mismatch"):
        commit(local, table([ok("a")]).drop_columns(["speech"]), 3)
    assert local.sizes(DATA) == {}


def test_a_refused_ledger_object_leaves_an_orphan_that_does_not_count(local: Store) -> None:
    (Path(local.uri) / LEDGER).mkdir(parents=True)
    (Path(local.uri) / ledger_path("n1")).mkdir()  # in the way
    with pytest.raises(StoreError, match=r"cannot write .*n1\.json: IsADirectoryError"):
        put(local, ok("a"), name="n1")
    assert local.sizes(DATA).keys() == {"n1.arrow"}
    assert read_ledger(local).resume().ok == set()


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from commits import ok, table
from pipeline.ledger import commit
from pipeline.store import Store
commit(Store.at(sys.argv[1]), table([ok("a")]), 3, between=lambda _: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_killed_between_the_two_puts(local: Store) -> None:
    process = subprocess.run([sys.executable, "-c", KILLED, local.uri, str(Path(__file__).parent)], check=False)
    assert process.returncode == -9
    assert len(local.sizes(DATA)) == 1
    assert read_ledger(local).resume().ok == set()
    put(local, ok("a"))
    assert read_ledger(local).resume().ok == {"a"}


def test_the_sink_commits_all_blocks_of_a_write(local: Store) -> None:
    sink = LedgerSink(local, 3, rows_per_write=4)
    assert sink.min_rows_per_write == 4
    blocks = [table([ok("a")]), UNITS.empty_table(), table([ok("b"), failed("c")]), pa.table({})]
    done = sink.write(iter(blocks), None)
    assert (done.units, done.failed) == (3, 1)
    assert read_ledger(local).resume().ok == {"a", "b"}
    assert sink.write(iter([]), None) == Committed("")


def test_the_sink_marks_what_a_retry_commits(local: Store) -> None:
    put(local, failed("a"))
    LedgerSink(local, 3, round=1).write([table([failed("a", kind="non_finite")])], None)
    (row,) = read_ledger(local).winners.to_pylist()
    assert (row["kind"], row["round"]) == ("non_finite", 1)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The first put of each ledger object is refused, as by a store that is out of quota."""
    refused: list[str] = []
    whole = Store.put

    def once(self: Store, name: str, data: bytes) -> None:
        if name.startswith(LEDGER) and not refused:
            refused.append(name)
            raise StoreError(f"cannot write {name}")
        whole(self, name, data)

    monkeypatch.setattr(Store, "put", once)
    return refused


def test_a_repeated_commit_after_a_refusal_is_exact(local: Store, flaky: list[str]) -> None:
    with pytest.raises(StoreError):
        put(local, ok("a"))
    put(local, ok("a"))
    assert len(flaky) == 1
    assert read_ledger(local).resume().ok == {"a"}


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore:`use_push_based_shuffle`:DeprecationWarning")  # ray copies its own context
def test_as_the_end_of_a_dataset(local: Store, ray_cluster: None) -> None:
    import ray.data

    blocks = [table((failed if i % 5 == 4 else ok)(f"r{i}") for i in (2 * k, 2 * k + 1)) for k in range(10)]
    ray.data.from_arrow(blocks).write_datasink(LedgerSink(local, 3, rows_per_write=4))
    resume = read_ledger(local).resume()
    assert resume.ok == {f"r{i}" for i in range(20) if i % 5 != 4}
    assert resume.failed.keys() == {"r4", "r9", "r14", "r19"}
    assert len(local.sizes(LEDGER)) == 5  # 4 rows a write
