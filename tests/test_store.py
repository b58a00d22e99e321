"""The few operations on a folder, on a disk and on S3."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_faults import Faults

from pipeline import store as stores
from pipeline.errors import OutputError, StoreError
from pipeline.store import ATTEMPTS, Store


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    uri = str(tmp_path / "out put#1") if request.param == "local" else request.getfixturevalue("s3") + "/out put#1"
    return Store.at(uri)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "PAUSE_S", 0.001)


def test_put_get_list_delete(store: Store) -> None:
    assert store.get("_run/a.json") is None
    assert store.sizes("_run") == {}
    store.put("_run/a.json", b"one")
    store.put("_run/a.json", b"three")
    store.put("_run/deeper/b.json", b"")
    assert store.get("_run/a.json") == b"three"
    assert store.sizes("_run") == {"a.json": 5}
    assert store.sizes("_run/deeper") == {"b.json": 0}
    store.delete("_run/a.json")
    store.delete("_run/a.json")
    assert store.get("_run/a.json") is None


def test_of_two_creators_one_succeeds(store: Store) -> None:
    assert store.create("_run/lease.json", b"first")
    assert not store.create("_run/lease.json", b"second")
    assert store.get("_run/lease.json") == b"first"


def test_a_listing_shows_what_another_process_wrote(store: Store) -> None:
    """s3fs remembers listings; here the second writer goes around it."""
    import boto3

    store.put("x/1", b"1")
    assert store.sizes("x") == {"1": 1}
    if store.uri.startswith("s3://"):
        bucket, _, key = store.uri.removeprefix("s3://").partition("/")
        boto3.client("s3").put_object(Bucket=bucket, Key=f"{key}/x/2", Body=b"22")
    else:
        Path(store.uri, "x", "2").write_bytes(b"22")
    assert store.sizes("x") == {"1": 1, "2": 2}


def test_put_all_takes_more_than_is_held_at_once(store: Store) -> None:
    made = []

    def objects() -> Iterator[tuple[str, bytes]]:
        for number in range(150):
            made.append(number)
            yield f"n/{number:03}", b"x" * number

    assert store.put_all(objects()) == len(made) == 150
    assert store.sizes("n") == {f"{number:03}": number for number in range(150)}


def test_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full half way leaves what was there, and nothing beside it."""
    store = Store.at(str(tmp_path / "out"))
    source = tmp_path / "source"
    source.write_bytes(b"from a file")
    store.put_whole("a", source)
    store.put_whole("a", b"old")

    def full(fs: object, path: str, data: bytes) -> None:
        Path(path).write_bytes(data[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.pipe_file", full)
    with pytest.raises(StoreError, match=r"cannot write .*No space left"):
        store.put_whole("a", b"a new one")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {"a": b"old"}


def test_get_all_keeps_order_and_length(store: Store) -> None:
    names = [f"n/{i:03}" for i in range(70)]
    for name in names[::10]:
        store.put(name, name.encode())
    found = list(store.get_all(names))
    assert [name for name, _ in found] == names
    assert [raw for _, raw in found] == [name.encode() if i % 10 == 0 else None for i, name in enumerate(names)]


def test_a_file_is_put_whole_and_read_in_pieces(store: Store, tmp_path: Path) -> None:
    there = tmp_path / "big"
    there.write_bytes(bytes(range(250)) * 10_000)
    store.put_file("f/big", there)
    with store.open("f/big") as file:
        assert file.seek(-1, 2) == 2_499_999
        assert file.read() == bytes([249])
        file.seek(1_249_998)  # over the border of what is asked for at once
        assert file.read(4) == bytes([248, 249, 0, 1])
        file.seek(0)
        assert file.read() == there.read_bytes()
    with pytest.raises(StoreError, match="cannot read"), store.open("f/none"):
        pass


def test_a_range_of_an_object(store: Store) -> None:
    store.put("a", b"0123456789")
    assert store.get_range("a", 3, 6) == b"345"
    assert store.get_range("a", 8, 99) == b"89"
    assert store.get_range("none", 0, 1) is None
    ranges = [("a", i, i + 1) for i in range(10)]
    assert list(store.get_ranges(ranges)) == [(one, b"%d" % one[1]) for one in ranges]


def test_delete_all(store: Store) -> None:
    for i in range(5):
        store.put(f"d/{i}", b"x")
    store.delete_all([f"d/{i}" for i in range(1, 9)])
    assert store.sizes("d") == {"0": 1}


def test_it_goes_to_a_worker_as_an_address(store: Store) -> None:
    store.put("a", b"1")
    raw = pickle.dumps(store)
    assert len(raw) < 500
    assert pickle.loads(raw).get("a") == b"1"


def test_a_relative_path_means_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store.at("out/")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.put("a", b"1")
    assert (tmp_path / "out" / "a").read_bytes() == b"1"


def test_a_missing_bucket_is_not_made(s3: str) -> None:
    import boto3

    with pytest.raises(StoreError, match="cannot write s3://no-such-bucket"):
        Store.at("s3://no-such-bucket/out").put("a", b"1")
    assert [b["Name"] for b in boto3.client("s3").list_buckets()["Buckets"] if "such" in b["Name"]] == []


@pytest.mark.parametrize("uri", ["nosuch://bucket/out", "http://127.0.0.1:1/out"])
@pytest.mark.usefixtures("no_pauses")
def test_what_cannot_be_an_output(uri: str) -> None:
    with pytest.raises((OutputError, StoreError), match=r"nosuch|127\.0\.0\.1"):
        Store.at(uri).put("a", b"1")


@pytest.mark.usefixtures("no_pauses")
def test_a_refusal_names_no_secret() -> None:
    with pytest.raises(StoreError) as caught:
        Store.at("http://user:hidden@127.0.0.1:1/out").put("a", b"1")
    assert "hidden" not in str(caught.value)


# ---- a store that has bad days


@pytest.fixture
def faults(s3: str, s3_server: str, monkeypatch: pytest.MonkeyPatch, no_pauses: None) -> Iterator[Faults]:
    with Faults(s3_server, seed=3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def test_what_passes_is_tried_again(s3: str, faults: Faults) -> None:
    """One request in ten refused and one in fifty cut off, as the acceptance says; here by far more."""
    faults.refused, faults.cut = 0.2, 0.1
    store = Store.at(f"{s3}/out")
    names = [f"a/{i:02}" for i in range(60)]
    for name in names:
        store.put(name, name.encode() * 100)
    assert [raw for _, raw in store.get_all(names)] == [name.encode() * 100 for name in names]
    assert store.sizes("a") == dict.fromkeys((name[2:] for name in names), 400)
    for name in names:
        store.delete(name)
    assert store.sizes("a") == {}
    assert faults.seen["refused"] > 20
    assert faults.seen["cut"] > 10


def test_a_file_that_is_read_in_pieces_survives_cut_answers(s3: str, faults: Faults, tmp_path: Path) -> None:
    table = pa.table({"n": range(30_000)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=500)
    store = Store.at(f"{s3}/out")
    faults.refused = faults.cut = 0.2
    store.put_file("a.parquet", tmp_path / "a.parquet")
    with store.open("a.parquet") as file:
        groups = pq.ParquetFile(file)
        assert pa.concat_tables(map(groups.read_row_group, range(groups.num_row_groups))).equals(table)


def test_one_loop_of_tries_and_not_three(s3: str, faults: Faults) -> None:
    store = Store.at(f"{s3}/out")
    store.put("a", b"1")
    # A connection that the server closes without a word is opened again once by aiohttp itself.
    for faults.refused, faults.cut, at_most in ((1.0, 0.0, ATTEMPTS), (0.0, 1.0, 2 * ATTEMPTS)):
        for operation in (lambda: store.get("a"), lambda: store.put("b", b"1"), lambda: store.delete("a")):
            before = faults.requests
            with pytest.raises(StoreError, match="cannot"):
                operation()
            assert ATTEMPTS <= faults.requests - before <= at_most
    faults.refused = faults.cut = 0.0
    assert store.get("b") == b"1"  # done by the server, all the same


def test_what_does_not_pass_is_told_at_once(s3: str, faults: Faults) -> None:
    store = Store.at(f"{s3}/out")
    store.put("a", b"1")
    faults.denied = True
    for operation in (lambda: store.get("a"), lambda: store.put("b", b"1"), lambda: store.sizes("")):
        before = faults.requests
        with pytest.raises(StoreError, match="cannot"):
            operation()
        assert faults.requests - before <= 2
    faults.denied, faults.expires_after = False, 0
    with pytest.raises(StoreError, match="expired"):
        store.get("a")


def test_a_creator_whose_answer_was_lost_finds_what_it_made(s3: str, faults: Faults) -> None:
    """`False`, though it was itself that was quicker: who creates reads it again."""
    store = Store.at(f"{s3}/out")
    faults.cut = 1.0
    with pytest.raises(StoreError):
        store.create("lease", b"mine")
    faults.cut = 0.0
    assert not store.create("lease", b"second")
    assert store.get("lease") == b"mine"
