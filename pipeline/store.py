"""An output folder on any fsspec store, as few operations as commit and resume need: put, create, get, list, delete.

No rename and no append: object stores have neither. `put` and `create` write one whole object. On a local disk a
killed writer can leave half of one, so who reads takes an object that does not parse for one that is not there.

What passes by itself (429, 500, 503, a connection that is cut or times out) is tried again here, with growing pauses,
and nowhere below: s3fs and botocore each have a loop of their own, which would multiply with this one and are switched
off. What does not pass (403, 404, a bucket that is not there) is told at once. An answer that is lost after the store
has done what it was asked is tried again too: a second `put` writes the same, a second `create` finds what the first
one made and says that somebody was quicker.
"""

from __future__ import annotations

import errno
import io
import itertools
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import IncompleteRead
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from pipeline.errors import OutputError, StoreError, redact

log = logging.getLogger(__name__)
_T = TypeVar("_T")

# Requests in flight at once. Listing aside, everything here is many small objects: latency, not bandwidth.
THREADS = 16
ATTEMPTS = 8  # with the pauses some 13 s of an outage, if every try is refused at once
PAUSE_S, MAX_PAUSE_S = 0.2, 10.0  # the first pause and the longest; each is a random part of that
READ_AHEAD = 1 << 20  # bytes that `open` asks for at once

_BUCKETS = {"s3", "gs", "gcs", "abfs", "az", "adl", "http", "https"}
_S3 = {"s3", "s3a"}
# One try a request; and no HEAD before each GET, which s3fs needs to fetch large objects in pieces.
_S3_OPTIONS = {"config_kwargs": {"retries": {"total_max_attempts": 1, "mode": "standard"}}, "max_concurrency": 1}

_PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504}
_PASSING_CODES = {  # of S3, under a status that says nothing of the kind
    "ConditionalRequestConflict", "IncompleteBody", "OperationAborted", "RequestTimeout", "SlowDown", "Throttling",
    "ThrottlingException",
}  # fmt: skip
# Broken connections, by the names that aiohttp, botocore, requests and azure-core give them and what derives from them.
_PASSING_ERRORS = {
    "ClientConnectionError", "ClientPayloadError", "HTTPClientError", "EndpointConnectionError", "ConnectTimeoutError",
    "IncompleteReadError", "ResponseStreamingError", "ResponseParserError", "ChunkedEncodingError", "Timeout",
    "ServiceRequestError", "ServiceResponseError",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Store:
    """A folder. It pickles as its address: every process opens a connection of its own."""

    uri: str  # absolute, without a slash at the end
    attempts: int = ATTEMPTS  # at each operation, as long as what refuses it may pass

    @classmethod
    def at(cls, uri: str) -> Store:
        """The folder at `uri`; a local path is made absolute here, since workers have other current folders.

        Raises `OutputError` where no store is known under this kind of address, or its library is missing.
        """
        try:
            fs, root = fsspec.core.url_to_fs(str(uri))
        except (ImportError, ValueError, OSError) as error:
            raise OutputError(f"output {redact(str(uri))}: {_reason(error)}") from None
        return cls((root if _is_local(fs) else str(uri)).rstrip("/") or "/")

    def __str__(self) -> str:
        return redact(self.uri)

    def put(self, name: str, data: bytes) -> None:
        """Write the object `name`, whether or not it is there."""
        fs, path = self._find(name)

        def put() -> None:
            _make_folder(fs, path)
            fs.pipe_file(path, data)

        self._try("write", name, put)

    def put_file(self, name: str, file: Path) -> None:
        """Write the object `name` from a local file, for what is too large to hold."""
        fs, path = self._find(name)

        def put() -> None:
            _make_folder(fs, path)
            fs.put_file(str(file), path)

        self._try("write", name, put)

    def put_whole(self, name: str, data: bytes | Path) -> None:
        """Write the object `name` from bytes or a local file, so that nobody ever finds half of it.

        On a disk it is written beside and renamed; elsewhere a put is whole by itself.
        """
        fs, path = self._find(name)
        folder = path.rpartition("/")[0]
        aside = f"{folder}/.{uuid.uuid4().hex}.part" if _is_local(fs) else path

        def put() -> None:
            _make_folder(fs, aside)
            try:
                if isinstance(data, Path):
                    fs.put_file(str(data), aside)
                else:
                    fs.pipe_file(aside, data)
                if aside != path:
                    os.replace(aside, path)
            except BaseException:
                if aside != path:
                    Path(aside).unlink(missing_ok=True)
                raise

        self._try("write", name, put)

    def put_all(self, objects: Iterable[tuple[str, bytes]]) -> int:
        """`put_whole` each (name, object), several at a time, and return how many; no more than that are held."""
        rest, count = iter(objects), 0
        while some := list(itertools.islice(rest, 4 * THREADS)):
            count += sum(1 for _ in self._several(some, lambda one: self.put_whole(*one)))
        return count

    def create(self, name: str, data: bytes) -> bool:
        """Write the object `name` unless it is there. Some stores cannot tell two creators apart: read it again."""
        fs, path = self._find(name)

        def create() -> bool:
            _make_folder(fs, path)
            try:
                _create(fs, path, data)
            except (NotImplementedError, OSError) as error:
                if fs.exists(path):  # each store has its own code for this
                    return False
                if not isinstance(error, NotImplementedError) and error.errno != errno.ENOSYS:
                    raise
                fs.pipe_file(path, data)  # it knows no conditional write
            return True

        return self._try("write", name, create)

    def get(self, name: str) -> bytes | None:
        """The whole object `name`, or None where there is none."""
        return self._get(name, None, None)

    def get_range(self, name: str, start: int, stop: int) -> bytes | None:
        """The bytes `start` ... `stop` of the object, fewer where it ends before, or None where there is none."""
        return self._get(name, start, stop)

    def get_all(self, names: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
        """(name, object) for each of `names`, in order, several at a time and no more than that in memory."""
        return self._several(list(names), self.get)

    def get_ranges(self, ranges: Iterable[tuple[str, int, int]]) -> Iterator[tuple[tuple[str, int, int], bytes | None]]:
        """((name, start, stop), those bytes) for each of `ranges`, as `get_all` does it."""
        return self._several(list(ranges), lambda one: self.get_range(*one))

    def sizes(self, folder: str) -> dict[str, int]:
        """The objects right in `folder` with their bytes, by name; a folder that is not there has none."""
        fs, path = self._find(folder)

        def sizes() -> dict[str, int]:
            fs.invalidate_cache()  # s3fs and others remember listings; another process may have written since
            try:
                found = fs.ls(path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
            return {info["name"].rsplit("/", 1)[1]: info["size"] for info in found if info["type"] == "file"}

        return self._try("list", folder, sizes)

    def delete(self, name: str) -> None:
        """Remove the object `name`, which may be gone already."""
        fs, path = self._find(name)

        def delete() -> None:
            with suppress(FileNotFoundError):
                fs.rm_file(path)

        self._try("delete", name, delete)

    def delete_all(self, names: Iterable[str]) -> None:
        """Remove each of `names`, several at a time."""
        for _ in self._several(list(names), self.delete):
            pass

    @contextmanager
    def open(self, name: str) -> Iterator[Any]:
        """The object as a binary file to read, for what is too large to hold; every read is tried again as `get` is."""
        fs, path = self._find(name)
        if _is_local(fs):
            file = self._try("read", name, lambda: fs.open(path, "rb"))
        else:
            fs.invalidate_cache()
            size = self._try("read", name, lambda: fs.info(path)["size"])
            file = io.BufferedReader(_Ranges(self, name, size), READ_AHEAD)
        try:
            with file:
                yield file
        except OSError as error:
            raise self._refused("read", name, error) from error

    def _get(self, name: str, start: int | None, stop: int | None) -> bytes | None:
        fs, path = self._find(name)

        def get() -> bytes | None:
            try:
                return bytes(fs.cat_file(path, start=start, end=stop))
            except (FileNotFoundError, NotADirectoryError):
                return None

        return self._try("read", name, get)

    def _several(self, items: list[_T], do: Callable[[_T], Any]) -> Iterator[tuple[_T, Any]]:
        with ThreadPoolExecutor(THREADS) as pool:
            for at in range(0, len(items), 4 * THREADS):
                some = items[at : at + 4 * THREADS]
                yield from zip(some, pool.map(do, some), strict=True)

    def _find(self, name: str) -> tuple[Any, str]:
        options = _S3_OPTIONS if self.uri.partition("://")[0] in _S3 else {}
        fs, root = fsspec.core.url_to_fs(self.uri, **options)
        if options:
            fs.retries = 1  # no argument of s3fs; an instance is ours alone, since no one else has these options
        return fs, f"{root.rstrip('/')}/{name}" if name else root

    def _try(self, verb: str, name: str, operation: Callable[[], _T]) -> _T:
        """What `operation` returns. What a store's library raises in the end becomes a `StoreError` of one line; each
        has its own exceptions."""

        def say(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            log.debug("cannot %s %s/%s: %s; once more", verb, self, name, redact(_reason(error)) if error else "")

        retrying = Retrying(
            stop=stop_after_attempt(self.attempts),
            wait=wait_random_exponential(multiplier=PAUSE_S, max=MAX_PAUSE_S),
            retry=retry_if_exception(_may_pass),
            before_sleep=say,
            reraise=True,
        )
        try:
            return retrying(operation)
        except Exception as error:
            raise self._refused(verb, name, error) from error

    def _refused(self, verb: str, name: str, error: BaseException) -> StoreError:
        return StoreError(f"cannot {verb} {self}/{name}: {redact(_reason(error))}")


class _Ranges(io.RawIOBase):
    """An object as a file: every read is a request of its own."""

    def __init__(self, store: Store, name: str, size: int) -> None:
        self._store, self._name, self._size = store, name, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        if stop <= self._at:
            return 0
        found = self._store.get_range(self._name, self._at, stop)
        if found is None or len(found) < stop - self._at:
            raise StoreError(f"{self._store}/{self._name} was removed or replaced while it was read")
        buffer[: len(found)] = found
        self._at = stop
        return len(found)


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: by the answer's code, or since there was none."""
    chain = list(_causes(error))
    for one in chain:
        response = getattr(one, "response", None)
        if isinstance(response, dict) and "Error" in response:  # botocore's
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status in _PASSING_STATUS or response["Error"].get("Code") in _PASSING_CODES
        status = next((getattr(one, name, None) for name in ("status", "status_code", "code")), None)
        if isinstance(status, int):
            return status in _PASSING_STATUS
    return any(
        isinstance(one, TimeoutError | ConnectionError | IncompleteRead)
        or not _PASSING_ERRORS.isdisjoint(kind.__name__ for kind in type(one).__mro__)
        for one in chain
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _make_folder(fs: Any, path: str) -> None:
    """Make the folder that `path` lies in, where a store has folders; where it has buckets, none may be made."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if not protocols & _BUCKETS:
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)


def _create(fs: Any, path: str, data: bytes) -> None:
    if _is_local(fs):  # its `mode="create"` looks first and writes then, so two can both succeed
        with fs.open(path, "xb") as file:
            file.write(data)
    else:
        fs.pipe_file(path, data, mode="create")


def _is_local(fs: Any) -> bool:
    return isinstance(fs, LocalFileSystem)


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
