"""What a driver leaves of itself: its record and its log, up to the last minute before it was killed."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import journal
from pipeline.errors import StoreError
from pipeline.journal import LOGS, RUNS, Journal, read_drivers
from pipeline.store import Store

log = logging.getLogger("pipeline.test")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.at(str(tmp_path / "out"))


def lines(store: Store) -> list[dict[str, object]]:
    """All log lines in the output, in order."""
    objects = [store.get(f"{LOGS}/{name}") or b"" for name in sorted(store.sizes(LOGS))]
    return [json.loads(line) for raw in objects for line in raw.decode().splitlines()]


def test_a_run_that_ends_well(store: Store) -> None:
    with Journal(store, command="transcribe") as one:
        one.note(to_do=7)
        log.warning("failed", extra={"recording": "a", "kind": "not_found"})
        one.note(recordings=7, rtfx=3.5)
    (driver,) = read_drivers(store)
    assert driver.outcome == "done"
    assert driver.started <= driver.ended <= driver.seen + 1  # type: ignore[operator]
    assert driver.said.items() >= {"command": "transcribe", "to_do": 7, "recordings": 7, "rtfx": 3.5}.items()
    assert "ray" in driver.said["versions"]
    (line,) = lines(store)
    assert (line["message"], line["recording"], line["kind"]) == ("failed", "a", "not_found")


def test_a_run_that_ends_with_an_error(store: Store) -> None:
    with pytest.raises(StoreError), Journal(store, command="transcribe"):
        raise StoreError("s3://user:pw@bucket refuses?X-Amz-Signature=1")
    (driver,) = read_drivers(store)
    assert driver.outcome == "store"
    (line,) = lines(store)
    assert line["message"] == "the run ended: s3://bucket refuses"


KILLED = """
import logging, os, signal, sys, time
from pipeline import journal
from pipeline.store import Store
journal.EVERY_S = 0.1
with journal.Journal(Store.at(sys.argv[1]), command="transcribe"):
    logging.getLogger("pipeline").warning("before the kill")
    time.sleep(60)
"""


def test_a_run_that_is_killed_leaves_what_it_had(store: Store) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, store.uri])
    deadline = time.monotonic() + 30
    while not store.sizes(LOGS) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    (driver,) = read_drivers(store)
    assert (driver.ended, driver.outcome) == (None, None)
    assert driver.seen > driver.started
    assert [line["message"] for line in lines(store)] == ["before the kill"]


def test_a_store_that_refuses_does_not_end_the_run(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And what could not be put is put later."""
    with Journal(store, command="transcribe") as one:
        log.warning("kept")
        place = Path(store.uri, LOGS)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("a file where the folder should be")
        one._write()
        place.unlink()
        log.warning("and this")
    assert "the run's own log cannot be written" in caplog.text
    kept, *_, last = [line["message"] for line in lines(store)]
    assert (kept, last) == ("kept", "and this")


def test_lines_are_not_held_without_end(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MOST_LINES", 10)
    with Journal(store, command="transcribe"):
        for i in range(100):
            log.warning("line %d", i)
    assert len(lines(store)) == 10


def test_drivers_come_in_order_and_what_is_no_record_is_left_out(store: Store) -> None:
    for outcome in ("first", "second"):
        with Journal(store, command=outcome):
            pass
        time.sleep(1.1)  # their names count seconds
    store.put(f"{RUNS}/half.json", b'{"run": "ha')
    store.put(f"{RUNS}/other.json", b'{"some": "thing"}')
    assert [driver.said["command"] for driver in read_drivers(store)] == ["first", "second"]
    assert read_drivers(Store.at(store.uri + "-none")) == []
