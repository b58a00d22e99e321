"""One driver per output: a lease beside the data, renewed by a heartbeat, taken over only from a dead holder.

No store offers locks and no two machines agree on the time, so a lease is an object with a counter. On its own host
a holder is judged by its process: gone means free, at once. From another host only the counter can be seen: what has
not moved for `PATIENCE_S` of the observer's own monotonic clock is free. A paused machine can come back and believe
that it still holds it; so what must not be written twice asks `still_ours` right before, and what is written twice
all the same is settled by the ledger, not by the lease.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

from pipeline.errors import OutputHeldError, StoreError
from pipeline.store import Store

log = logging.getLogger(__name__)

BEAT_S = 5.0
PATIENCE_S = 30.0  # six heartbeats
RUN_LEASE = "_run/lease.json"
FINALIZE_LEASE = "_run/finalize-lease.json"  # tables may be made while a run goes on, but not by two at once


@dataclass(frozen=True, slots=True)
class Holder:
    """What the lease object says."""

    host: str
    machine: str  # tells hosts of one name apart: the boot, and the process namespace that `pid` counts in
    pid: int
    started: str | None  # when the process began, as the system counts it: a pid is used again
    token: str
    beat: int

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()


class Lease:
    """A held lease: `acquire` it, ask `still_ours`, `release` it (or use it as a context manager)."""

    def __init__(self, store: Store, name: str, holder: Holder) -> None:
        self.store, self.name = store, name
        self._once = replace(store, attempts=1)  # a beat that is late may find another holder: the next one is in time
        self._holder = holder
        self._lost = False
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    @property
    def token(self) -> str:
        return self._holder.token

    @classmethod
    def acquire(
        cls,
        store: Store,
        name: str = RUN_LEASE,
        *,
        wait_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> Lease:
        """Take the lease, or wait up to `wait_s` for a live holder to let it go. Raises `OutputHeldError`."""
        mine, began = me(), clock()
        seen, since = None, began  # what the lease said last, and since when it has said so
        while True:
            raw = store.get(name)
            holder = _parse(raw)
            stands_still = raw == seen and clock() - since >= PATIENCE_S
            here = _is_here(holder)
            if _take(store, name, raw, mine, free=_is_dead(holder) if here else stands_still):
                break
            alive = here or (raw is not None and seen is not None and raw != seen)
            if alive and clock() - began >= wait_s:
                raise OutputHeldError(_held(store, holder))
            if raw != seen:
                seen, since = raw, clock()
            sleep(1.0)
        lease = cls(store, name, mine)
        lease._thread.start()
        return lease

    def still_ours(self) -> bool:
        """Whether nobody took it over, as the store says now."""
        with self._lock:
            self._lost = self._lost or not holds(self.store, self.name, self.token)
            return not self._lost

    def check(self) -> None:
        """Raise `OutputHeldError` where it was taken over."""
        if not self.still_ours():
            raise OutputHeldError(_held(self.store, _parse(self.store.get(self.name))))

    def release(self) -> None:
        """Stop the heartbeat and give the lease back; twice is fine."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            if self.still_ours():
                self.store.delete(self.name)
                self._lost = True
        except StoreError as error:  # the next driver finds a dead process, or a counter that stands still
            log.warning("lease not released: %s", error)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                if not self.still_ours():
                    log.error("%s: another driver took over", self.store)
                    return
                with self._lock:
                    self._holder = replace(self._holder, beat=self._holder.beat + 1)
                    self._once.put(self.name, self._holder.to_bytes())
            except StoreError as error:  # an outage: if it lasts, another may take over, and the next beat sees it
                log.warning("heartbeat: %s", error)


def holds(store: Store, name: str, token: str) -> bool:
    """Whether the lease still carries `token`: for a worker, which has no `Lease`.

    An object that does not parse is one that is being written, on a disk, now: no reason to give up.
    """
    raw = store.get(name)
    holder = _parse(raw)
    return raw is not None and (holder is None or holder.token == token)


def _take(store: Store, name: str, raw: bytes | None, mine: Holder, *, free: bool) -> bool:
    """Whether the lease is `mine` now: there was none, or it is `free`. Read back: not every store honours `create`."""
    if raw is None:
        store.create(name, mine.to_bytes())
    elif free:
        store.put(name, mine.to_bytes())
    else:
        return False
    return holds(store, name, mine.token)


def me() -> Holder:
    """This process, as the holder of a new lease."""
    pid = os.getpid()
    return Holder(socket.gethostname(), _machine(), pid, _started(pid), uuid.uuid4().hex, 0)


def _parse(raw: bytes | None) -> Holder | None:
    try:
        return Holder(**json.loads(raw or b""))
    except (ValueError, TypeError):
        return None


def _is_here(holder: Holder | None) -> bool:
    return holder is not None and (holder.host, holder.machine) == (socket.gethostname(), _machine())


def _is_dead(holder: Holder | None) -> bool:
    """Whether the holder, which ran on this host, is gone."""
    if holder is None:
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it lives, and is another user's
    return _is_zombie(holder.pid) or _started(holder.pid) != holder.started


def _machine() -> str:
    """Boot id and pid namespace, where the system tells them: two containers can share a host name."""
    parts = []
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the command's name, or none where the system has no such file."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _is_zombie(pid: int) -> bool:
    return _stat(pid)[:1] in (["Z"], ["X"])


def _started(pid: int) -> str | None:
    stat = _stat(pid)
    return stat[19] if len(stat) > 19 else None  # clock ticks since boot


def _held(store: Store, holder: Holder | None) -> str:
    who = f"process {holder.pid} on {holder.host}" if holder else "another driver"
    return f"output {store} is held by {who}, which is alive; wait for it, or stop it and run this again"
