"""The bytes of a recording on any store, read at any place: asked for again where the store fails for a moment.

Stores that are asked over a network (fsspec's asynchronous ones) are read in ranges. The first one tells the length, so
that a small file is one request; the range after the one in use is fetched meanwhile. At most three ranges are held.

- A range that fails in passing (408, 425, 429, 5xx, a connection that is reset, cut or silent) is asked for again, five
  times in all, after waits that double from half a second, or as long as the store asks (`Retry-After`, a minute at
  most). `attempts` is the number of tries of the range that took most.
- A range of n bytes must come within 15 s + n / 64 KiB/s, or the source is given up (`SourceTimeoutError`): a slower
  one would hold up a decoder that others could use.
- What can only be read from its start is first copied to a temporary file, from its start again if it breaks off.
- A member of a tar shard is a part of that, read in ranges like any file; the shard is looked through first where the
  address does not say where it lies. One that is packed is unpacked into a temporary file, once for its neighbours.
- Audio inside Parquet is fetched a few rows at a time, on from the last row that was read.

Knows nothing of sound.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import posixpath
import re
import tempfile
import time
import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Protocol, TypeVar

from fsspec.asyn import AsyncFileSystem
from tenacity import AsyncRetrying, RetryCallState, Retrying, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_exponential, wait_random

from pipeline import cells, tars
from pipeline.errors import (
    AudioError,
    DamagedAudioError,
    ForbiddenError,
    NotFoundError,
    SourceError,
    SourceTimeoutError,
)
from pipeline.manifest import filesystem, folder_of, http_status, name_of, public_uri, resolve, source_error
from pipeline.stopwatch import spending

FIRST = 1 << 20  # bytes of the first range: all of a small file
RANGE = 4 << 20  # bytes of a later one
TRIES = 5
FIRST_WAIT_S, MOST_WAIT_S = 0.5, 20.0  # seconds between two tries
MOST_RETRY_AFTER_S = 60.0
PATIENCE_S = 15.0  # seconds for a range to come, and
SLOWEST = 64 << 10  # bytes a second
MOST_SPOOLED = 16 << 30  # bytes; what states no length and is longer is a broadcast that never ends
_KEPT = 2  # ranges, besides the one that is being fetched
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}  # answers after which asking again may help
_PERMANENT = (ImportError, IsADirectoryError, LookupError, NotImplementedError, TypeError, ValueError)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)|bytes \*/(\d+)")

_T = TypeVar("_T")
# Bytes [start, stop), as far as there are any, and how many the whole file has, where the store says so.
Fetch = Callable[[int, int], Awaitable[tuple[bytes, int | None]]]


class _Bytes(Protocol):
    """A file, a part of one, or what lies in one."""

    @property
    def size(self) -> int: ...
    def read_at(self, offset: int, size: int) -> bytes: ...
    def close(self) -> None: ...


class Source:
    """One file; for one thread at a time. Every method raises an `AudioError` where the store refuses."""

    def __init__(self, uri: str) -> None:
        self._tries = _Tries()
        self._uri = uri
        try:
            self._bytes = _open(uri, self._tries)
        except Exception as error:  # every store's library has exceptions of its own
            raise self._refusal(error) from None

    @property
    def size(self) -> int:
        """Bytes."""
        return self._bytes.size

    @property
    def attempts(self) -> int:
        return self._tries.most

    @spending("source")
    def read_at(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on; fewer at the end."""
        try:
            return self._bytes.read_at(offset, size)
        except Exception as error:
            raise self._refusal(error) from None

    def close(self) -> None:
        self._bytes.close()

    def _refusal(self, error: Exception) -> AudioError:
        name = public_uri(self._uri)
        refusal = source_error(error, self._uri)
        if isinstance(error, _TooSlowError):
            refusal = SourceTimeoutError(f"{name}: {error}")
        elif _is_silence(error):
            refusal = SourceTimeoutError(f"{name}: the server does not answer")
        elif isinstance(error, _EndlessError):
            refusal = SourceError(f"{name}: {error}")
        elif isinstance(error, (tars.DamagedTarError, cells.DamagedCellsError)):
            refusal = DamagedAudioError(f"{name}: {error}")
        refusal.attempts = self._tries.most
        return refusal


def _open(uri: str, tries: _Tries) -> _Bytes:
    if member := tars.parse(uri):
        return _open_member(member, tries)
    if cell := cells.parse(uri):
        return _open_cell(cell, tries)
    return _open_part(uri, tries)


def _open_part(uri: str, tries: _Tries, part: tuple[int, int] | None = None) -> _File | _Ranges:
    """The file, or the `part` of it that begins at this byte and has this many."""
    fs, path = filesystem(uri)
    if isinstance(fs, AsyncFileSystem) and not fs.asynchronous:
        try:
            return _Ranges(_asked_once(fs), path, tries, part)
        except _NoRangesError:
            return tries.sync(lambda: _File(_spooled(fs.open(path, "rb", block_size=0)), tries, part))
    if "file" in fs.protocol:
        return _File(_seekable(fs.open(path, "rb")), tries, part)
    return tries.sync(
        lambda: _File(_seekable(fs.open(path, "rb", block_size=RANGE, cache_type="readahead")), tries, part)
    )


class _File:
    """A file that lies here, or whose library reads ahead by itself; or a part of one."""

    def __init__(self, file: Any, tries: _Tries, part: tuple[int, int] | None = None) -> None:
        self._file, self._tries = file, tries
        n_bytes = int(file.seek(0, 2))
        self._start, size = part or (0, n_bytes)
        self.size = max(0, min(size, n_bytes - self._start))

    def read_at(self, offset: int, size: int) -> bytes:
        return self._tries.sync(lambda: self._read_at(offset, min(size, self.size - offset)))

    def close(self) -> None:
        self._file.close()

    def _read_at(self, offset: int, size: int) -> bytes:
        if size <= 0:
            return b""
        self._file.seek(self._start + offset)
        return bytes(self._file.read(size))


class _Ranges:
    """A file on a store, or a part of one, that is asked for ranges; the next is on its way while one is used."""

    def __init__(self, fs: Any, path: str, tries: _Tries, part: tuple[int, int] | None = None) -> None:
        self._fs, self._path, self._tries = fs, path, tries
        self._fetch: Fetch = self._over_http if "http" in fs.protocol else self._by_library
        self._kept: OrderedDict[int, bytes] = OrderedDict()  # number of a range → its bytes, last used last
        self._ahead: tuple[int, Future[bytes]] | None = None
        self.size: int = -1
        self._start, size = part or (0, None)
        first = FIRST if size is None else min(FIRST, size)
        head, whole = self._wait(self._tries.asynchronous(lambda: self._in_time(0, first)))
        head = head[:first]  # a server may answer with all there is
        self._keep(0, head)
        size = whole if part is None else size if len(head) == first else len(head)
        if size is None and len(head) == FIRST:
            size = self._wait(self._tries.asynchronous(lambda: self._fs._info(self._path)))["size"]
        self.size = len(head) if size is None else size

    def read_at(self, offset: int, size: int) -> bytes:
        stop = min(offset + size, self.size)
        parts = []
        while offset < stop:
            number = _number(offset)
            start, end = _span(number)
            part = self._range(number)[offset - start : stop - start]
            parts.append(part)
            offset += len(part)
            # Not before the middle: a file whose index is at its end is not read on from its beginning.
            if offset > (start + end) // 2:
                self._look_ahead(number + 1)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        self._forget_ahead()
        self._kept.clear()

    def _range(self, number: int) -> bytes:
        found = self._kept.get(number)
        if found is None:
            self._look_ahead(number)
            assert self._ahead is not None
            _, future = self._ahead
            try:
                found = future.result()
            finally:
                self._forget_ahead()
        self._keep(number, found)
        return found

    def _keep(self, number: int, data: bytes) -> None:
        self._kept[number] = data
        self._kept.move_to_end(number)
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)

    def _look_ahead(self, number: int) -> None:
        """Begin to fetch a range, unless it is here, on its way, or beyond the end."""
        start, stop = _span(number)
        stop = min(stop, self.size)
        if number in self._kept or start >= stop or (self._ahead is not None and self._ahead[0] == number):
            return
        self._forget_ahead()
        self._ahead = number, self._begin(self._tries.asynchronous(lambda: self._whole(start, stop)))

    def _forget_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead[1].cancel()
        self._ahead = None

    # ---- on fsspec's own event loop

    def _begin(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        return asyncio.run_coroutine_threadsafe(work, self._fs.loop)

    def _wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        future = self._begin(work)
        try:
            return future.result()
        except BaseException:  # also an interrupt
            future.cancel()
            raise

    async def _whole(self, start: int, stop: int) -> bytes:
        data, _ = await self._in_time(start, stop)
        if len(data) != stop - start:
            raise ConnectionError(f"{len(data)} of {stop - start} bytes came")
        return data

    async def _in_time(self, start: int, stop: int) -> tuple[bytes, int | None]:
        limit_s = PATIENCE_S + (stop - start) / SLOWEST
        try:
            async with asyncio.timeout(limit_s) as timeout:
                return await self._fetch(self._start + start, self._start + stop)
        except TimeoutError:
            if timeout.expired():
                raise _TooSlowError(f"{stop - start} bytes did not come in {limit_s:.0f} s") from None
            raise

    async def _by_library(self, start: int, stop: int) -> tuple[bytes, int | None]:
        try:
            return await self._fs._cat_file(self._path, start=start, end=stop), None
        except Exception as error:
            if http_status(error) == 416:  # nothing lies there
                return b"", None
            raise

    async def _over_http(self, start: int, stop: int) -> tuple[bytes, int | None]:
        """fsspec's own reading does not say how long the file is, which would be a second request for each."""
        session = await self._fs.set_session()
        options = dict(self._fs.kwargs)
        headers = options.pop("headers", {}) | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        async with session.get(self._fs.encode_url(self._path), headers=headers, **options) as answer:
            found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if answer.status == 416:
                return b"", int(found[3]) if found and found[3] else 0
            answer.raise_for_status()
            if answer.status == 206 and found and found[1] == str(start):
                return await answer.read(), int(found[2])
            if start == 0 and answer.content_length is not None and answer.content_length <= stop:
                return await answer.read(), answer.content_length  # all of it
            raise _NoRangesError


class _Memory:
    """Bytes that are here."""

    def __init__(self, data: bytes) -> None:
        self._data, self.size = data, len(data)

    def read_at(self, offset: int, size: int) -> bytes:
        return self._data[offset : offset + size]

    def close(self) -> None:
        self._data = b""


class _Behind:
    """Bytes without the first few of them."""

    def __init__(self, inner: _Bytes, n: int) -> None:
        self._inner, self._n = inner, n
        self.size = inner.size - n

    def read_at(self, offset: int, size: int) -> bytes:
        return self._inner.read_at(offset + self._n, size)

    def close(self) -> None:
        self._inner.close()


# ---- inside other files


def _open_member(member: tars.Address, tries: _Tries) -> _Bytes:
    """A member of a tar shard, its header looked at: the shard may be another one by now."""
    place = member.place or _places(member.shard, _mark(member.shard)).get(member.member)
    if place is None:
        raise FileNotFoundError(member.member)
    part = place[0] - tars.BLOCK, place[1] + tars.BLOCK
    if tars.is_packed(name_of(member.shard)):
        found: _Bytes = _Unpacked(tries.sync(lambda: _unpack(member.shard, _mark(member.shard))), part)
    else:
        found = _open_part(member.shard, tries, part)
    if found.size < part[1] or not tars.is_header_of(found.read_at(0, tars.BLOCK), member.member, place[1]):
        found.close()
        raise FileNotFoundError(member.member)
    return _Behind(found, tars.BLOCK)


def _mark(uri: str) -> tuple[int, ...]:
    """What changes with a file that lies here; others are taken to stay as they are while this process lives."""
    fs, path = filesystem(uri)
    if "file" not in fs.protocol:
        return ()
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns


@functools.lru_cache(maxsize=8)
def _places(shard: str, mark: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    fs, path = filesystem(shard)
    with fs.open(path, "rb", block_size=256 << 10) as file:
        return tars.find(file, name_of(shard))


class _Spool:
    """A temporary file that is there as long as anyone reads it."""

    def __init__(self, file: Any) -> None:
        self.descriptor, self.size = file.fileno(), file.tell()
        weakref.finalize(self, file.close)


class _Unpacked:
    """A part of one."""

    def __init__(self, spool: _Spool, part: tuple[int, int]) -> None:
        self._spool, (self._start, size) = spool, part
        self.size = max(0, min(size, spool.size - self._start))

    def read_at(self, offset: int, size: int) -> bytes:
        size = min(size, self.size - offset)
        return os.pread(self._spool.descriptor, size, self._start + offset) if size > 0 else b""

    def close(self) -> None:
        """Others may be reading it."""


@functools.lru_cache(maxsize=2)
def _unpack(shard: str, mark: tuple[int, ...]) -> _Spool:
    fs, path = filesystem(shard)
    with fs.open(path, "rb", block_size=RANGE) as file:
        try:
            spool = _spooled(tars.unpacked(file, name_of(shard)))
        except tars.DAMAGE as error:
            raise tars.DamagedTarError(f"the shard is damaged ({error})") from None
    spool.flush()
    return _Spool(spool)


def _open_cell(cell: cells.Address, tries: _Tries) -> _Bytes:
    """The audio in a row of a Parquet file; where there is none, the file that the path beside it names."""
    try:
        data, path = tries.sync(lambda: _cells(cell.file, _mark(cell.file), cell.column).read(cell.row))
    except LookupError as error:
        raise FileNotFoundError(str(error)) from None
    if data is not None:
        return _Memory(data)
    if not path:
        raise FileNotFoundError("neither bytes nor a path")
    base = folder_of(cell.file) if "://" in cell.file else posixpath.dirname(cell.file)
    return _open_part(resolve(path, base), tries)


@functools.lru_cache(maxsize=2)
def _cells(file: str, mark: tuple[int, ...], column: str) -> cells.Cells:
    fs, path = filesystem(file)
    return cells.Cells(fs.open(path, "rb", block_size=RANGE, cache_type="readahead"), column)


def _number(offset: int) -> int:
    """Which range the byte at `offset` lies in."""
    return 0 if offset < FIRST else 1 + (offset - FIRST) // RANGE


def _span(number: int) -> tuple[int, int]:
    """The bytes of a range."""
    return (FIRST + (number - 1) * RANGE, FIRST + number * RANGE) if number else (0, FIRST)


def _asked_once(fs: Any) -> Any:
    """`fs` without the tries of its own, where it is s3fs: those that are made and counted here are enough.

    botocore and s3fs each try five times, so that a store that is down would be asked 125 times for every range.
    """
    if "s3" not in fs.protocol:
        return fs
    config = fs.storage_options.get("config_kwargs", {}) | {"retries": {"total_max_attempts": 1, "mode": "standard"}}
    once = type(fs)(*fs.storage_args, **{**fs.storage_options, "config_kwargs": config})
    once.retries = 1
    return once


def _seekable(file: Any) -> Any:
    """`file`, or all of it in a temporary one: some formats have their index at the end."""
    return file if file.seekable() and getattr(file, "size", 0) is not None else _spooled(file)


def _spooled(file: Any) -> Any:
    spool = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the source
    try:
        with file:
            _copy(file, spool)
    except BaseException:
        spool.close()
        raise
    return spool


def _copy(file: Any, spool: Any) -> None:
    began = time.monotonic()
    while data := file.read(SLOWEST * 4):
        spool.write(data)
        took_s = time.monotonic() - began
        if took_s > PATIENCE_S + spool.tell() / SLOWEST:
            raise _TooSlowError(f"{spool.tell()} bytes came in {took_s:.0f} s")
        if spool.tell() > MOST_SPOOLED:
            raise _EndlessError(f"states no length and goes on after {MOST_SPOOLED >> 30} GiB")


# ---- trying again


class _NoRangesError(Exception):
    """The server sends all or nothing."""


class _TooSlowError(Exception):
    """Fewer bytes came than must."""


class _EndlessError(Exception):
    """More bytes come than any recording has."""


class _Tries:
    """Does things until they succeed, as the module's text says, and remembers what took most tries."""

    def __init__(self) -> None:
        self.most = 1

    def sync(self, work: Callable[[], _T]) -> _T:
        return Retrying(**self._rules())(work)

    async def asynchronous(self, work: Callable[[], Awaitable[_T]]) -> _T:
        async def once() -> _T:  # tenacity awaits only what it can see to be a coroutine function
            return await work()

        return await AsyncRetrying(**self._rules())(once)

    def _rules(self) -> dict[str, Any]:
        return {
            "stop": stop_after_attempt(TRIES),
            "wait": _pause_s,
            "retry": retry_if_exception(_may_pass),
            "before_sleep": self._count,
            "reraise": True,
        }

    def _count(self, state: RetryCallState) -> None:
        self.most = max(self.most, state.attempt_number + 1)


def _pause_s(state: RetryCallState) -> float:
    """Seconds until the next try."""
    backoff = wait_exponential(FIRST_WAIT_S, MOST_WAIT_S) + wait_random(0, FIRST_WAIT_S)
    error = state.outcome.exception() if state.outcome else None
    asked = _retry_after_s(error) if error else 0.0
    return max(backoff(state), min(asked, MOST_RETRY_AFTER_S))


def _may_pass(error: BaseException) -> bool:
    """Whether it may be otherwise a moment later."""
    if not isinstance(error, Exception) or isinstance(error, (_TooSlowError, _NoRangesError, _EndlessError)):
        return False
    if isinstance(source_error(error, ""), (ForbiddenError, NotFoundError)):
        return False
    status = http_status(error)
    return status in _TRANSIENT if status is not None else not isinstance(error, _PERMANENT)


def _is_silence(error: BaseException) -> bool:
    """Whether it was the answer that did not come; a connection that does not come about may be the store's end."""
    kind = type(error).__name__
    return (isinstance(error, TimeoutError) or "Timeout" in kind) and "Connect" not in kind


def _retry_after_s(error: BaseException) -> float:
    """How long the store asks to be left alone; 0 where it does not."""
    text = next((text for e in (error, error.__cause__) if (text := _headers(e).get("retry-after"))), "")
    with contextlib.suppress(ValueError):
        return float(text)
    with contextlib.suppress(ValueError, TypeError):
        return (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
    return 0.0


def _headers(error: BaseException | None) -> Mapping[str, str]:
    """What came with the answer, in lower case."""
    response = getattr(error, "response", None)
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}  # botocore
    headers = getattr(error, "headers", None) or metadata.get("HTTPHeaders") or {}  # aiohttp
    return {str(key).lower(): str(value) for key, value in headers.items()} if isinstance(headers, Mapping) else {}
