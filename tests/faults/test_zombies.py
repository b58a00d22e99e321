"""Drivers that were stopped and come back, two at once, and a reader who looks all the while: real processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import pytest
from commands import FAKE, command
from commits import begin, failed, ok, put, read_ledger, read_table, texts

from pipeline.finalize import finalize, read_success
from pipeline.output import SUCCESS, Output, write_inputs
from pipeline.store import Store
from pipeline.types import Recording
from pipeline.verify import check, repair

TESTS = Path(__file__).parent.parent

# A driver that holds the run's lease, stops itself at a point of its finalize, and goes on when it is woken. It beats
# ten times a second, and patience is a second: what counts is that a stopped one does not beat.
DRIVER = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
from commits import begin, ok, put
from pipeline import finalize as f, lease as leases, ledger
from pipeline.errors import MurmurError
from pipeline.store import Store
leases.BEAT_S, leases.PATIENCE_S = 0.1, 1.0
me, point = sys.argv[2], sys.argv[4] if len(sys.argv) > 4 else ""
if not point:
    leases._machine = lambda: "another machine"
def stop():
    print("stopped", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
def before(module, name, when=lambda *a: True):
    whole, done = getattr(module, name), []
    def first(*args, **more):
        if not done and when(*args):
            done.append(1)
            stop()
        return whole(*args, **more)
    setattr(module, name, first)
store = Store.at(sys.argv[1])
output = begin(store)
try:
    with leases.Lease.acquire(store) as lease:
        put(store, *(ok(f"{me}{i}") for i in range(6)), ok("both", text=f" {me}"), name=f"{me}-object")
        if point == "before":
            stop()
        if point == "pinned":
            before(f, "_bring_up")
        if point == "built":
            before(f, "build_shard")
        if point == "table":
            before(Store, "put", lambda self, name, data: name.startswith("recordings/"))
        if point == "success":
            before(Store, "put", lambda self, name, data: name == "_SUCCESS" and b'"rewriting": []' in data)
        f.finalize(output, use_ray=False, lease=lease)
    code = 0
except MurmurError as error:
    print(error, file=sys.stderr, flush=True)
    code = error.exit_code
os._exit(code)  # as `murmur` ends (`cli.script`): threads of C++ libraries abort the end of some interpreters
"""


def driver(uri: str, name: str, *point: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, uri, name, str(TESTS), *point],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture
def stopped() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a driver and wait until it has stopped itself."""
    processes = []

    def start(uri: str, point: str) -> subprocess.Popen[str]:
        process = driver(uri, "a", point)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "stopped\n", process.communicate()[1]
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("point", ["before", "pinned", "built", "table", "success"])
def test_stopped_and_woken_after_another_took_over(
    tmp_path: Path, stopped: Callable[..., subprocess.Popen[str]], point: str
) -> None:
    output = begin(Store.at(str(tmp_path / "out")))
    names = [f"{who}{i}" for who in "ab" for i in range(6)] + ["both"]
    write_inputs(output.store, [Recording(name, f"{name}.wav") for name in names])
    zombie = stopped(output.store.uri, point)
    said = driver(output.store.uri, "b").communicate(timeout=120)
    assert said == ("", "")
    assert read_ledger(output.store).resume().ok == set(names)
    expected = texts(read_table(output.store, "recordings"))
    assert set(expected) == set(names)

    zombie.send_signal(signal.SIGCONT)
    _, error = zombie.communicate(timeout=120)
    if point in ("before", "pinned", "built"):  # it asks the leases before it puts anything
        assert "another driver took" in error
        assert zombie.returncode == (0 if point == "before" else 2)  # 0: it finds that nothing is left to do
        assert check(output).is_well
        assert texts(read_table(output.store, "recordings")) == expected
    # Else it was stopped between asking and putting: one stale file, that the next finalize, or a repair, finds.
    assert len(read_table(output.store, "recordings")) == len(texts(read_table(output.store, "recordings")))
    repair(output)
    assert check(output).is_well
    assert texts(read_table(output.store, "recordings")) == expected
    success = read_success(output.store)
    assert success is not None
    assert success.complete


BELIEVER = """
import sys
sys.path.insert(0, sys.argv[3])
from commits import begin, ok, put
from pipeline import finalize as f
from pipeline.errors import MurmurError
from pipeline.store import Store
f._check_leases = lambda build: None  # it believes to hold them
class Believed:
    name = token = ""
    def __enter__(self): return self
    def __exit__(self, *error): pass
f.Lease = type("Lease", (), {"acquire": staticmethod(lambda *a, **k: Believed())})
output = begin(Store.at(sys.argv[1]))
for turn in range(6):
    put(output.store, *(ok(f"{sys.argv[2]}{turn}-{i}") for i in range(4)), ok(f"both{turn}"))
    try:
        f.finalize(output, use_ray=False)
    except MurmurError as error:
        print(error, file=sys.stderr)
"""


def test_two_at_once_that_both_believe_to_hold_it(tmp_path: Path) -> None:
    output = begin(Store.at(str(tmp_path / "out")))
    names = {f"{who}{turn}-{i}" for who in "ab" for turn in range(6) for i in range(4)}
    names |= {f"both{turn}" for turn in range(6)}
    write_inputs(output.store, [Recording(name, f"{name}.wav") for name in sorted(names)])
    both = [
        subprocess.Popen([sys.executable, "-c", BELIEVER, output.store.uri, who, str(TESTS)], stderr=subprocess.PIPE)
        for who in "ab"
    ]
    for process in both:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        assert b"Traceback" not in error
    success = finalize(output, use_ray=False)
    assert (success.complete, success.counts["ok"]) == (True, len(names))
    rows = read_table(output.store, "recordings")
    assert sorted(row["recording_id"] for row in rows) == sorted(names)
    repair(output)  # a file of the same length and of other bytes no listing tells
    assert check(output).is_well


@pytest.mark.ray
def test_two_drivers_started_at_once(corpus: Callable[[int], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = command("transcribe", str(corpus(6)), "--output", str(out), *FAKE, "--json")
    slow = [*job, "--set", "fake.faults=[{kind: hang, text: '0.3'}]"]
    both = [
        subprocess.Popen(slow, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        for _ in range(2)
    ]
    ended = [(process.communicate(timeout=240), process.returncode) for process in both]
    assert sorted(code for _, code in ended) == [0, 2], ended
    (refused,) = (error for (_, error), code in ended if code == 2)
    assert "is held by process" in refused
    (done,) = (said for (said, _), code in ended if code == 0)
    assert json.loads(done.splitlines()[-1])["ok"] == 6
    rows = duckdb.sql(f"select recording_id from '{out}/recordings/*.parquet'").fetchall()
    assert len(rows) == len(set(rows)) == 6


def test_a_reader_sees_no_row_twice(tmp_path: Path) -> None:
    """The list grows, what failed is tried again, and the tables are made a second and a third time meanwhile."""
    output = begin(Store.at(str(tmp_path / "out")))
    seen: list[int] = []
    wrong: list[str] = []
    ended = threading.Event()

    def look() -> None:
        success, session = Path(output.store.uri, SUCCESS), duckdb.connect()
        while not ended.is_set():
            time.sleep(0.001)
            try:
                before = success.read_bytes()
                said = json.loads(before)
                read = {}
                for table, key in (("recordings", "recording_id"), ("segments", "(recording_id, segment_id)")):
                    files = [f"{output.store.uri}/{path}" for path in said["files"] if path.startswith(table)]
                    query = f"select count(*), count(distinct {key}) from read_parquet({files})"
                    (read[table],) = session.sql(query).fetchall()
                if success.read_bytes() != before or not said["complete"]:
                    continue  # replaced meanwhile: it says so before the first file is
            except (OSError, ValueError, duckdb.Error):
                continue  # not there yet, or half a file: replaced meanwhile
            counts = said["counts"]
            seen.append(counts["inputs"])
            wrong.extend(f"{table}: {rows} rows, {keys} keys" for table, (rows, keys) in read.items() if rows != keys)
            if read["recordings"][0] != counts["ok"] + counts["failed"] + counts["unlisted"]:
                wrong.append(f"{read} and {counts}")

    reader = threading.Thread(target=look)
    reader.start()
    try:
        story(output, lambda: time.sleep(0.3))
    finally:
        ended.set()
        reader.join()
    assert wrong == []
    assert {8, 40} <= set(seen)


def story(output: Output, pause: Callable[[], None]) -> None:
    store = output.store

    def listed(n: int) -> None:
        write_inputs(store, [Recording(f"r{i}", f"r{i}.wav") for i in range(n)])

    listed(8)
    put(store, *(ok(f"r{i}", k, last=k == 1) for i in range(7) for k in range(2)), failed("r7"), name="n5")
    assert finalize(output, use_ray=False).complete
    pause()
    listed(40)
    for i in range(8, 40):
        put(store, ok(f"r{i}"), ok(f"r{i - 1}", text=" twice"))  # each a second time, by an attempt that was late
        if i % 8 == 0:
            finalize(output, use_ray=False)
    assert finalize(output, use_ray=False).counts["failed"] == 0
    pause()
    put(store, ok("r7"), name="n0", round=1)
    for _ in range(2):
        put(store, ok("r3", 1, text=" zombie"), name="n1")
        assert finalize(output, use_ray=False).counts["ok"] == 40
        pause()


def test_nothing_is_decided_by_the_wall_clock() -> None:
    """F17: a clock that is set back an hour. Leases count on a monotonic one, winners have none.

    When a Unit was committed is noted beside it (`clock`), for whoever looks at a run: no table and no winner has it.
    """
    modules = ("ledger", "entries", "pieces", "void", "lease", "finalize", "clean", "verify", "changes", "store")
    for name in modules:
        text = (TESTS.parent / "pipeline" / f"{name}.py").read_text()
        used = [line for line in text.splitlines() if "time.time(" in line or "datetime" in line]
        assert [line for line in used if not line.strip().startswith("clock = ")] == [], name
