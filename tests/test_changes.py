"""Files that were replaced since they were read: found, named, and done again once where that is wished."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from audio_files import tone, write_wav
from commits import begin, failed, ok, put, read_ledger, read_table, texts
from rich.console import Console

from pipeline import changes, job, todo
from pipeline.changes import Replaced, find, settle
from pipeline.config import Config
from pipeline.finalize import finalize
from pipeline.manifest import identity
from pipeline.output import Output, read_output
from pipeline.store import Store
from pipeline.types import Recording


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return begin(Store.at(str(tmp_path / "out")))


@pytest.fixture
def files(tmp_path: Path) -> Callable[[str], Recording]:
    """A recording of a real file, as a manifest's line gives it: without size and etag."""

    def make(name: str) -> Recording:
        path = tmp_path / f"{name}.wav"
        path.write_bytes(name.encode() * 100)
        return Recording(id=name, uri=str(path))

    return make


def told(recording: Recording) -> Recording:
    """As a folder's listing gives it, and as it is committed."""
    size, etag = identity(recording.uri)
    return dataclasses.replace(recording, size=size, etag=etag)


def replace_bytes(recording: Recording) -> None:
    """By as many others, a second later."""
    path = Path(recording.uri)
    path.write_bytes(bytes(path.stat().st_size))
    os.utime(path, (0, path.stat().st_mtime + 1))


def test_a_listing_tells(output: Output, files: Callable[[str], Recording]) -> None:
    same, other, new, gone = map(files, ("same", "other", "new", "gone"))
    put(output.store, *(ok(one.id, recording=told(one)) for one in (same, other, gone)))
    replace_bytes(other)
    Path(gone.uri).unlink()
    listed = todo.Listing([told(same), told(other), told(new), gone])
    for ask in (False, True):
        assert find(listed, read_ledger(output.store), ask=ask) == Replaced(done=("other",))


def test_a_manifests_lines_are_asked_on_request_or_half_done(output: Output, files: Callable[[str], Recording]) -> None:
    done, bad, half = map(files, ("done", "bad", "half"))
    put(output.store, ok("done", recording=told(done)), failed("bad", recording=told(bad)))
    put(output.store, ok("half", 1, recording=told(half)))
    put(output.store, ok("unknown"))  # committed when nothing was noted
    for one in (done, bad, half):
        replace_bytes(one)
    listed = todo.Listing([done, bad, half, Recording("unknown", done.uri)])
    assert find(listed, read_ledger(output.store), ask=False) == Replaced(begun=("half",))
    assert find(listed, read_ledger(output.store), ask=True) == Replaced(begun=("half",), done=("done", "bad"))


def test_what_is_done_stays_and_is_named(
    output: Output, files: Callable[[str], Recording], caplog: pytest.LogCaptureFixture
) -> None:
    recordings = [files(f"r{i}") for i in range(7)]
    put(output.store, *(ok(one.id, recording=told(one)) for one in recordings))
    for one in recordings:
        replace_bytes(one)
    ledger = read_ledger(output.store)
    with caplog.at_level(logging.WARNING):
        settle(todo.Listing(map(told, recordings)), ledger, check=False)
    assert caplog.messages == [
        "7 recordings have other bytes now than when they were read (r0, r1, r2, r3, r4, ...): "
        "what was done stays; --check-inputs does it again"
    ]
    assert len(ledger.resume().ok) == len(read_ledger(output.store).resume().ok) == 7


def test_done_again_once(output: Output, files: Callable[[str], Recording]) -> None:
    """The old Units never count again, whoever commits them, and however late; A, B and A again is three versions."""
    one, other = files("a"), files("b")
    put(output.store, ok("a", recording=told(one)), ok("b", recording=told(other)), name="n5")
    finalize(output, use_ray=False)
    late = told(one)
    for version in ("second", "third"):
        replace_bytes(one)
        listed = todo.Listing([told(one), told(other)])
        ledger = read_ledger(output.store)
        settle(listed, ledger, check=True, dry_run=True)
        assert len(todo.missing(listed, ledger)) == 1
        assert read_ledger(output.store).resume().ok == {"a", "b"}  # it only looked
        ledger = read_ledger(output.store)
        settle(listed, ledger, check=True)
        assert ledger.resume().ok == {"b"}
        assert len(todo.missing(listed, ledger)) == 1
        put(output.store, ok("a", text=" of the old bytes", recording=late), name="n0")  # by a driver that slept
        assert read_ledger(output.store).resume().ok == {"b"}
        put(output.store, ok("a", text=f" {version}", recording=told(one)), round=ledger.round)
        ledger = read_ledger(output.store)
        settle(listed, ledger, check=True)
        assert ledger.resume().ok == {"a", "b"}
        finalize(output, use_ray=False)
        assert texts(read_table(output.store, "recordings")) == {"a": version, "b": "b unit 0."}


def test_a_retry_of_what_is_done_again_counts(output: Output, files: Callable[[str], Recording]) -> None:
    one = files("a")
    put(output.store, ok("a", recording=told(one)))
    replace_bytes(one)
    ledger = read_ledger(output.store)
    settle(todo.Listing([told(one)]), ledger, check=True)
    put(output.store, failed("a", recording=told(one)), round=ledger.round)
    ledger = read_ledger(output.store)
    assert set(ledger.resume().failed) == {"a"}
    assert ledger.next_round() > ledger.round
    put(output.store, ok("a", recording=told(one)), round=ledger.next_round())
    assert read_ledger(output.store).resume().ok == {"a"}


def test_what_was_half_done_is_begun_again(output: Output, files: Callable[[str], Recording]) -> None:
    """Units of two recordings must not be put together."""
    one = files("a")
    put(output.store, ok("a", 0, last=False, recording=told(one)))
    replace_bytes(one)
    ledger = read_ledger(output.store)
    settle(todo.Listing([one]), ledger, check=False)
    (left,) = [item for table in todo.missing(todo.Listing([one]), ledger).tables() for item in table.to_pylist()]
    assert not left["done"]


def test_identity_of_what_cannot_be_asked(tmp_path: Path, s3: str) -> None:
    for uri in (str(tmp_path / "none.wav"), f"{s3}/none.wav", "http://127.0.0.1:1/a.wav", "nosuch://a/b"):
        assert identity(uri) == (None, None)


def test_identity_on_s3(s3: str) -> None:
    store = Store.at(s3)
    store.put("a.wav", b"one")
    first = identity(f"{s3}/a.wav")
    assert first[0] == 3
    store.put("a.wav", b"two")
    assert identity(f"{s3}/a.wav") != first


@pytest.mark.ray
def test_a_whole_run_over_replaced_files(
    ray_cluster: None, corpus: Callable[[int], Path], tmp_path: Path, fake_config: Callable[..., Config],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder, uri = corpus(3), str(tmp_path / "out")
    manifest = tmp_path / "list.jsonl"
    manifest.write_text("".join(f'{{"audio_filepath": "corpus/clip-{i:03}.wav", "id": "c{i}"}}\n' for i in range(3)))
    quiet = Console(file=io.StringIO())

    def run(**how: bool) -> job.Summary:
        return job.run([str(manifest)], uri, fake_config(vad="none"), console=quiet, **how)

    def durations() -> list[float]:
        rows = pq.read_table(f"{uri}/recordings").sort_by("recording_id")
        return [round(value, 1) for value in rows["duration_s"].to_pylist()]

    assert run().counts["ok"] == 3
    assert durations() == [1.0, 1.1, 1.2]
    write_wav(folder / "clip-001.wav", tone(700, 2.5))
    assert run().work is None  # a manifest's sources are not asked
    assert job.estimate([str(manifest)], uri, fake_config(vad="none"), check_inputs=True).missing == 1
    with caplog.at_level(logging.WARNING):
        again = run(check_inputs=True)
    assert any("1 recording has other bytes" in line and "(c1): done again" in line for line in caplog.messages)
    assert again.work is not None
    assert again.work.recordings == 1
    assert (again.counts["ok"], again.counts["missing"]) == (3, 0)
    assert durations() == [1.0, 2.5, 1.2]
    assert run(check_inputs=True).work is None
    assert read_output(uri).run.n_shards == 1
    assert changes.find(todo.Listing([]), read_ledger(Store.at(uri)), ask=True) == Replaced()
