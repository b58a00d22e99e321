"""The output's store on a bad day: refusals and cut answers, wrong keys, no rename, listings that lag."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from audio_files import tone, write_wav
from commands import FAKE, murmur
from commits import begin, failed, ok, put, read_ledger, read_table
from fsspec.implementations.local import LocalFileSystem
from s3_faults import Faults

from pipeline import finalize as finalizing
from pipeline.clean import clean
from pipeline.errors import StoreError
from pipeline.finalize import finalize
from pipeline.lease import Lease
from pipeline.output import Output, write_inputs
from pipeline.store import Store
from pipeline.types import Recording
from pipeline.verify import check

NAMES = [f"r{i}" for i in range(12)]


@pytest.fixture
def faults(s3: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    monkeypatch.setattr("pipeline.store.PAUSE_S", 0.001)
    with Faults(s3_server, seed=5) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def live(output: Output) -> None:
    """All that happens to an output: committed by several, failed, tried again, published, merged, cleaned."""
    store = output.store
    for name in NAMES[:6]:
        put(store, ok(name, 0, last=False), ok(name, 1))
    put(store, *(failed(name) for name in NAMES[6:8]), ok(NAMES[0], 1, text=" late"))
    write_inputs(store, [Recording(name, f"{name}.wav") for name in NAMES])
    with Lease.acquire(store) as lease:
        assert finalize(output, use_ray=False, lease=lease).counts["missing"] == 4
    put(store, *(ok(name) for name in NAMES[6:8]), round=read_ledger(store).next_round())
    put(store, *(ok(name) for name in NAMES[8:]))
    success = finalize(output, use_ray=False)
    assert (success.complete, success.counts["ok"]) == (True, len(NAMES))
    clean(output, sleep=lambda _: None)
    assert finalize(output, use_ray=False).files == success.files
    assert check(output).is_well
    assert sorted(row["recording_id"] for row in read_table(store, "recordings")) == sorted(NAMES)


def test_an_output_lives_through_a_bad_day(s3: str, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request in ten is refused, one in fifty cut off: nobody notices."""
    monkeypatch.setattr(finalizing, "MERGE_AT", 4)
    faults.refused, faults.cut = 0.1, 0.02
    live(begin(Store.at(f"{s3}/out")))
    assert faults.seen["refused"] > 20
    assert faults.seen["cut"] > 2


def test_wrong_keys_end_the_command_at_once(s3: str, faults: Faults, tmp_path: Path) -> None:
    faults.denied = True
    write_wav(tmp_path / "in" / "a.wav", tone(300, 1.0))
    done = murmur("transcribe", tmp_path / "in", "--output", f"{s3}/out", *FAKE)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"murmur: output {s3}/out: cannot")
    assert "PermissionError" in line
    assert faults.requests < 10
    faults.denied = False
    assert Store.at(f"{s3}/out").sizes("_run") == {}


def test_keys_that_expire_leave_what_was_committed(s3: str, faults: Faults) -> None:
    store = begin(Store.at(f"{s3}/out")).store
    faults.expires_after = faults.requests + 5  # two puts of the first, two of the second, one of the third
    for name in NAMES[:2]:
        put(store, ok(name))
    with pytest.raises(StoreError, match="The provided token has expired"):
        put(store, ok(NAMES[2]))
    faults.expires_after = None
    assert read_ledger(store).resume().ok == set(NAMES[:2])
    put(store, ok(NAMES[2]))
    assert read_ledger(store).resume().ok == set(NAMES[:3])


# ---- a store without rename, whose listings lag


class Lagging(LocalFileSystem):  # type: ignore[misc]
    """A disk as an object store that is slow to list: what is young is not in a listing, what was removed still is.

    Its rename is a copy and a removal; whoever uses it here fails.
    """

    protocol = "lagging"
    lag_s = 0.15
    removed: dict[str, tuple[float, dict[str, Any]]] = {}  # noqa: RUF012

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> Any:
        now = time.time()
        there = [one for one in super().ls(path, detail=True, **kwargs) if now - one["mtime"] > self.lag_s]
        names = {one["name"] for one in there}
        gone = [info for name, (at, info) in self.removed.items() if now - at < self.lag_s and name not in names]
        there += [info for info in gone if info["name"].rsplit("/", 1)[0] == self._strip_protocol(path).rstrip("/")]
        return there if detail else [one["name"] for one in there]

    def rm_file(self, path: str) -> None:
        info = self.info(path)
        super().rm_file(path)
        self.removed[info["name"]] = (time.time(), info)

    def mv(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("renamed")

    mv_file = rename = move = mv


@pytest.fixture
def lagging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Output:
    fsspec.register_implementation("lagging", Lagging, clobber=True)
    return begin(Store(f"lagging://{tmp_path}/out"))


def test_no_rename_and_lagging_listings(lagging: Output) -> None:
    """What is not listed yet is done a moment later; killed at any put it is the same (F15, F1)."""
    store = lagging.store
    write_inputs(store, [Recording(name, f"{name}.wav") for name in NAMES])
    whole, put_bytes = [], Store.put
    for survivors, name in enumerate(NAMES):
        put(store, ok(name, 0, last=False), ok(name, 1))
        put(store, ok(name, 1, text=" late"))
        left = [survivors]

        def dies(self: Store, path: str, data: bytes, left: list[int] = left) -> None:
            left[0] -= "lease" not in path
            if left[0] < 0:
                raise KeyboardInterrupt
            put_bytes(self, path, data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "put", dies)
            try:
                whole.append(finalize(lagging, use_ray=False).complete)
            except KeyboardInterrupt:
                time.sleep(Lagging.lag_s)  # the next driver is not that quick
    time.sleep(2 * Lagging.lag_s)
    success = finalize(lagging, use_ray=False)
    time.sleep(2 * Lagging.lag_s)
    assert (success.complete, success.counts["ok"]) == (True, len(NAMES))
    clean(lagging, sleep=lambda _: None)
    time.sleep(2 * Lagging.lag_s)
    assert finalize(lagging, use_ray=False).counts == success.counts
    time.sleep(2 * Lagging.lag_s)
    assert check(lagging).is_well
    assert json.loads(store.get("_SUCCESS") or b"")["complete"] is True
