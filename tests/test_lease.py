"""Who may drive an output: real processes, dead and alive; other hosts and time are made up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipeline import lease as leases
from pipeline.errors import OutputHeldError
from pipeline.lease import FINALIZE_LEASE, PATIENCE_S, RUN_LEASE, Holder, Lease, holds, me
from pipeline.store import Store

HOLD = """
import sys, time
from pipeline.lease import Lease
from pipeline.store import Store
Lease.acquire(Store.at(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.at(str(tmp_path / "out"))


@pytest.fixture
def other(store: Store) -> Iterator[subprocess.Popen[str]]:
    """Another process of this host that holds the lease."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, store.uri], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


class Time:
    """A clock that only sleeping moves; what happens meanwhile elsewhere is `events`, by second."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.events: dict[float, tuple[Store, Holder | None]] = {}

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now - 1000 in self.events:
            store, holder = self.events[self.now - 1000]
            if holder is None:
                store.delete(RUN_LEASE)
            else:
                write(store, holder)


def write(store: Store, holder: Holder) -> None:
    store.put(RUN_LEASE, json.dumps(asdict(holder)).encode())


def elsewhere(beat: int = 7) -> Holder:
    return Holder(host="other-host", machine="boot", pid=os.getpid(), started="1", token="theirs", beat=beat)


def acquire(store: Store, time: Time, wait_s: float = 0.0) -> Lease:
    return Lease.acquire(store, wait_s=wait_s, clock=time.clock, sleep=time.sleep)


def test_a_free_lease_is_taken_and_given_back(store: Store) -> None:
    with Lease.acquire(store) as lease:
        assert lease.still_ours()
        said = json.loads(store.get(RUN_LEASE) or b"")
        assert (said["pid"], said["token"]) == (os.getpid(), lease.token)
    assert store.get(RUN_LEASE) is None
    lease.release()  # twice is fine


def test_a_live_process_of_this_host_holds_it(store: Store, other: subprocess.Popen[str]) -> None:
    with pytest.raises(OutputHeldError, match=f"process {other.pid} on {me().host}") as caught:
        Lease.acquire(store)
    assert caught.value.exit_code == 2
    os.kill(other.pid, signal.SIGSTOP)  # and also while it is stopped: it may go on at any time
    with pytest.raises(OutputHeldError):
        Lease.acquire(store)


def test_a_dead_process_of_this_host_is_succeeded_at_once(store: Store, other: subprocess.Popen[str]) -> None:
    other.kill()
    other.wait()
    time = Time()
    with acquire(store, time) as lease:
        assert lease.still_ours()
    assert time.now == 1000


def test_a_zombie_is_dead(store: Store, other: subprocess.Popen[str]) -> None:
    """Killed, and not yet waited for by its parent: a signal can still be sent to it."""
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    os.kill(other.pid, 0)
    Lease.acquire(store).release()


def test_a_pid_that_is_used_again_is_not_the_holder(store: Store) -> None:
    write(store, replace(me(), started="1"))
    Lease.acquire(store).release()


def test_this_very_process_holds_it(store: Store) -> None:
    with Lease.acquire(store), pytest.raises(OutputHeldError):
        Lease.acquire(store)


def test_another_host_is_succeeded_when_its_heart_stands_still(store: Store) -> None:
    """Its process id means nothing here: that of a live process of ours."""
    write(store, elsewhere())
    time = Time()
    with acquire(store, time) as lease:
        assert lease.still_ours()
    assert PATIENCE_S <= time.now - 1000 <= PATIENCE_S + 1


def test_another_host_is_left_alone_when_its_heart_beats(store: Store) -> None:
    write(store, elsewhere())
    time = Time()
    time.events[29.0] = (store, elsewhere(beat=8))  # late, but in time
    with pytest.raises(OutputHeldError, match="other-host"):
        acquire(store, time)
    assert time.now - 1000 == 29


def test_a_half_written_lease_is_waited_out(store: Store) -> None:
    store.put(RUN_LEASE, b'{"host": "oth')
    time = Time()
    acquire(store, time).release()
    assert time.now - 1000 >= PATIENCE_S


def test_waiting_for_a_live_one_to_let_go(store: Store) -> None:
    write(store, me())
    time = Time()
    time.events[50.0] = (store, None)
    acquire(store, time, wait_s=60).release()
    assert time.now - 1000 == 50
    write(store, me())
    with pytest.raises(OutputHeldError):
        acquire(store, time, wait_s=60)
    assert time.now - 1000 == 110
    store.delete(RUN_LEASE)


def test_a_lost_lease_is_noticed_and_not_taken_back(store: Store) -> None:
    lease = Lease.acquire(store)
    write(store, elsewhere())
    assert not lease.still_ours()
    with pytest.raises(OutputHeldError, match="other-host"):
        lease.check()
    lease.release()
    assert holds(store, RUN_LEASE, "theirs")


def test_the_heart_beats_and_stops_when_it_was_taken_over(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 0.01)
    lease = Lease.acquire(store)
    while (holder := leases._parse(store.get(RUN_LEASE))) is None or holder.beat < 2:
        assert lease._thread.is_alive()
    with lease._lock:  # between two beats
        write(store, elsewhere())
    lease._thread.join(timeout=10)
    assert not lease._thread.is_alive()
    assert holds(store, RUN_LEASE, "theirs")


def test_a_lease_that_is_being_written_is_still_held(store: Store) -> None:
    """A disk shows half of the heartbeat's put; a worker that looks just then goes on."""
    store.put(RUN_LEASE, b"")
    assert holds(store, RUN_LEASE, "any")
    store.delete(RUN_LEASE)
    assert not holds(store, RUN_LEASE, "any")


def test_leases_of_two_names_do_not_meet(store: Store) -> None:
    with Lease.acquire(store), Lease.acquire(store, FINALIZE_LEASE) as second:
        assert second.still_ours()


def test_on_s3(s3: str) -> None:
    store = Store.at(f"{s3}/out")
    with Lease.acquire(store) as lease:
        assert lease.still_ours()
        with pytest.raises(OutputHeldError):
            Lease.acquire(store)
    assert store.get(RUN_LEASE) is None
