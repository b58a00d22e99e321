"""The webhooks' folder: what was promised a caller lies here until it has been delivered, whatever is killed meanwhile.

    lock                     one process owns the folder
    jobs/ID/request.json     put last, by rename: a folder without it was never promised, and is swept away
    jobs/ID/audio            until there is an answer
    jobs/ID/answer.json      the very bytes that are delivered
    jobs/ID/state.json       tries and attempts so far, and when the next is due
    dead/ID.json             what was given up: a note for the operator

Every step leaves, killed half way, what `Spool.open` puts right. Blocking: call it in threads. Knows files, not HTTP,
nor what an order or an answer says.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, MurmurError, UsageError

log = logging.getLogger(__name__)

MOST_DEAD = 1000  # notes that are kept; the oldest go
_ROOM = 1024  # bytes that a job is taken to need besides its audio, request and answer
_FULL = {errno.ENOSPC, errno.EDQUOT}
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class SpoolFullError(MurmurError):
    """No room for another job now; later there may be."""

    kind = "spool_full"


class SpoolHeldError(UsageError):
    kind = "spool_held"


@dataclass(slots=True)
class Job:
    """One promise: where it stands. The order and the answer stay on the disk."""

    id: str
    seq: int  # order of acceptance
    url: str
    host: str
    answered: bool = False
    tries: int = 0  # to get an answer
    attempts: int = 0  # to deliver it
    due: float = 0.0  # the next of either, in seconds since 1970
    reason: str = ""  # why the last one failed


class Spool:
    """The folder, open. Methods that write one job may run at the same time as those of another."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self._jobs, self._dead = folder / "jobs", folder / "dead"
        self._lock_fd = -1
        self._sizes: dict[str, int] = {}
        self._used = 0
        self._counting = threading.Lock()

    def open(self) -> tuple[list[Job], list[dict[str, Any]]]:
        """Own the folder; what an earlier process left: jobs in order of acceptance, and the dead, oldest first.

        Raises `SpoolHeldError` where another live process owns it, `ConfigError` where it cannot be used.
        """
        try:
            for folder in (self.folder, self._jobs, self._dead):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.folder.stat().st_uid != os.geteuid():  # its owner could read and exchange what lies in it
                raise ConfigError(f"webhook.spool {self.folder} belongs to another user")
            for folder in (self.folder, self._jobs, self._dead):
                folder.chmod(0o700)
            self._lock()
        except OSError as error:
            raise ConfigError(f"webhook.spool {self.folder}: {error.strerror}") from error
        try:
            dead = self._load_dead()
            jobs = self._load_jobs(dead)
        except BaseException:
            self.close()
            raise
        return jobs, dead

    def close(self) -> None:
        """Let another process own it; twice is fine."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def accept(self, job: Job, order: Mapping[str, Any], audio: Path) -> None:
        """Move `audio` in and put the request beside it. When this returns both survive a power cut.

        Raises `SpoolFullError`, and then as after any other failure nothing of it is left.
        """
        if not _ID.fullmatch(job.id):
            raise ValueError("a request id has 1 to 64 characters of A-Z a-z 0-9 _ -")
        request = {"id": job.id, "seq": job.seq, "url": job.url, "host": job.host, "order": dict(order)}
        data = json.dumps(request).encode()
        self._reserve(job.id, audio.stat().st_size + len(data))
        folder = self._jobs / job.id
        try:
            folder.mkdir(mode=0o700)
            _move(audio, folder / "audio")
            _put(folder / "request.json", data)
            _sync(folder)
            _sync(self._jobs)
        except BaseException as error:
            self.remove(job.id)
            if isinstance(error, OSError) and error.errno in _FULL:
                raise SpoolFullError("no space left for webhooks") from error
            raise

    def order(self, job: Job) -> tuple[dict[str, Any], Path]:
        """What was asked, and its audio."""
        folder = self._jobs / job.id
        return json.loads((folder / "request.json").read_bytes())["order"], folder / "audio"

    def answer(self, job: Job, body: bytes) -> None:
        """Keep what is to be delivered, and let go of the audio. Not held to the cap: the job is already promised."""
        folder = self._jobs / job.id
        _put(folder / "answer.json", body)
        _sync(folder)
        (folder / "audio").unlink(missing_ok=True)
        self._account(job.id, len(body))

    def body(self, job: Job) -> bytes:
        return (self._jobs / job.id / "answer.json").read_bytes()

    def note(self, job: Job) -> None:
        """Keep the job's counts. A kill loses none; a power cut, or a disk without space, may: nothing waits for it."""
        state = {"tries": job.tries, "attempts": job.attempts, "due": job.due, "reason": job.reason}
        try:
            _put(self._jobs / job.id / "state.json", json.dumps(state).encode(), durable=False)
        except OSError as error:
            log.warning("webhook %s: its state is not kept: %s", job.id, error.strerror)

    def remove(self, request_id: str) -> None:
        """Delete the job; its request first, without which the rest is nothing."""
        folder = self._jobs / request_id
        with suppress(OSError):
            (folder / "request.json").unlink()
        shutil.rmtree(folder, ignore_errors=True)
        self._account(request_id, 0)

    def bury(self, letter: dict[str, Any]) -> None:
        """Delete the job and leave a note of it."""
        data = json.dumps(letter).encode()
        _put(self._dead / f"{letter['request_id']}.json", data)
        self.remove(letter["request_id"])
        self._account(f"dead/{letter['request_id']}", len(data))

    def forget(self, request_id: str) -> None:
        """Delete the note of a dead job."""
        (self._dead / f"{request_id}.json").unlink(missing_ok=True)
        self._account(f"dead/{request_id}", 0)

    def _lock(self) -> None:
        fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 20, 0).decode("ascii", "replace")
            os.close(fd)
            raise SpoolHeldError(
                f"webhook.spool {self.folder} is in use by process {holder}, which is alive; stop it, or give this "
                "server a spool of its own"
            ) from None
        except BaseException:
            os.close(fd)
            raise
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        self._lock_fd = fd

    def _load_jobs(self, dead: list[dict[str, Any]]) -> list[Job]:
        """The jobs, in order of acceptance; what is none is deleted, and what cannot be read joins the `dead`."""
        buried, jobs = {letter["request_id"] for letter in dead}, []
        for folder in self._jobs.iterdir():
            request = folder / "request.json"
            if folder.name in buried or not request.exists():
                self.remove(folder.name)
                continue
            try:
                jobs.append(self._load(folder))
            except (ValueError, TypeError, KeyError):  # no kill leaves this: it was changed, or the disk is damaged
                letter = {"request_id": folder.name, "host": "", "reason": "its request cannot be read", "attempts": 0}
                dead.append(letter | {"when": request.stat().st_mtime})
                self.bury(dead[-1])
        return sorted(jobs, key=lambda job: job.seq)

    def _load(self, folder: Path) -> Job:
        request, audio, answer = (folder / name for name in ("request.json", "audio", "answer.json"))
        said = json.loads(request.read_bytes())
        job = Job(folder.name, int(said["seq"]), str(said["url"]), str(said["host"]), answered=answer.exists())
        for half in folder.glob("*.new"):
            half.unlink()
        if job.answered:
            audio.unlink(missing_ok=True)
        with suppress(OSError, ValueError, TypeError, KeyError):
            state = json.loads((folder / "state.json").read_bytes())
            job.tries, job.attempts = int(state["tries"]), int(state["attempts"])
            job.due, job.reason = float(state["due"]), str(state["reason"])
        self._account(job.id, sum(file.stat().st_size for file in (request, audio, answer) if file.exists()))
        return job

    def _load_dead(self) -> list[dict[str, Any]]:
        letters = []
        for half in self._dead.glob("*.new"):
            half.unlink()
        for file in self._dead.glob("*.json"):
            data = file.read_bytes()
            try:
                letter = json.loads(data)
                letters.append(letter | {"request_id": file.stem, "when": float(letter["when"])})
            except (ValueError, TypeError, KeyError):  # a power cut, or somebody's hand
                file.unlink()
                continue
            self._account(f"dead/{file.stem}", len(data))
        return sorted(letters, key=lambda letter: letter["when"])

    def _reserve(self, key: str, size: int) -> None:
        with self._counting:
            if key in self._sizes:
                raise ValueError("a job of this id is in the spool already")
            if self._used + size + _ROOM > self.most_bytes:
                raise SpoolFullError("too much is waiting for webhooks")
            self._sizes[key] = size + _ROOM
            self._used += size + _ROOM

    def _account(self, key: str, size: int) -> None:
        """The entry holds `size` bytes now; 0: it is gone."""
        with self._counting:
            self._used -= self._sizes.pop(key, 0)
            if size:
                self._sizes[key] = size + _ROOM
                self._used += size + _ROOM


def _put(path: Path, data: bytes, *, durable: bool = True) -> None:
    """The whole file or none of it, also under its new name only when it is on the disk."""
    new = path.with_name(path.name + ".new")
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(fd)
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def _move(source: Path, target: Path) -> None:
    """`source` becomes `target`, on the disk, readable by its owner only."""
    try:
        os.rename(source, target)
        copied = False
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copied = True
    if copied:
        with source.open("rb") as read, os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as written:
            shutil.copyfileobj(read, written, 1 << 20)
    target.chmod(0o600)
    _sync(target)
    if copied:
        source.unlink()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
