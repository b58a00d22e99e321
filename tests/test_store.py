"""The few operations on a folder, on a disk and on S3."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from pipeline.errors import OutputError, StoreError
from pipeline.store import Store


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    uri = str(tmp_path / "out put#1") if request.param == "local" else request.getfixturevalue("s3") + "/out put#1"
    return Store.at(uri)


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


def test_get_all_keeps_order_and_length(store: Store) -> None:
    names = [f"n/{i:03}" for i in range(70)]
    for name in names[::10]:
        store.put(name, name.encode())
    found = list(store.get_all(names))
    assert [name for name, _ in found] == names
    assert [raw for _, raw in found] == [name.encode() if i % 10 == 0 else None for i, name in enumerate(names)]


def test_open_streams(store: Store) -> None:
    with store.open("f/big", "wb") as file:
        for _ in range(100):
            file.write(b"x" * 1000)
    with store.open("f/big") as file:
        file.seek(99_999)
        assert file.read() == b"x"


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
def test_what_cannot_be_an_output(uri: str) -> None:
    with pytest.raises((OutputError, StoreError), match=r"nosuch|127\.0\.0\.1"):
        Store.at(uri).put("a", b"1")


def test_a_refusal_names_no_secret() -> None:
    with pytest.raises(StoreError) as caught:
        Store.at("http://user:hidden@127.0.0.1:1/out").put("a", b"1")
    assert "hidden" not in str(caught.value)
