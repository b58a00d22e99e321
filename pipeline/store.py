"""An output folder on any fsspec store, as few operations as commit and resume need: put, create, get, list, delete.

No rename and no append: object stores have neither. `put` and `create` write one whole object. On a local disk a
killed writer can leave half of one, so who reads takes an object that does not parse for one that is not there.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import OutputError, StoreError, redact

# Requests in flight at once. Listing aside, everything here is many small objects: latency, not bandwidth.
THREADS = 16
_BUCKETS = {"s3", "gs", "gcs", "abfs", "az", "adl", "http", "https"}


@dataclass(frozen=True, slots=True)
class Store:
    """A folder. It pickles as its address: every process opens a connection of its own."""

    uri: str  # absolute, without a slash at the end

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
        with self._refusals("write", name):
            _make_folder(fs, path)
            fs.pipe_file(path, data)

    def create(self, name: str, data: bytes) -> bool:
        """Write the object `name` unless it is there. Some stores cannot tell two creators apart: read it again."""
        fs, path = self._find(name)
        with self._refusals("write", name):
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

    def get(self, name: str, start: int | None = None, stop: int | None = None) -> bytes | None:
        """The object `name`, or its bytes [start, stop); None where there is none."""
        fs, path = self._find(name)
        with self._refusals("read", name):
            try:
                return bytes(fs.cat_file(path, start=start, end=stop))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def get_all(self, names: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
        """(name, object) for each of `names`, in order, several at a time and no more than that in memory."""
        names = list(names)
        with ThreadPoolExecutor(THREADS) as pool:
            for at in range(0, len(names), 4 * THREADS):
                some = names[at : at + 4 * THREADS]
                yield from zip(some, pool.map(self.get, some), strict=True)

    def sizes(self, folder: str) -> dict[str, int]:
        """The objects right in `folder` with their bytes, by name; a folder that is not there has none."""
        fs, path = self._find(folder)
        with self._refusals("list", folder):
            fs.invalidate_cache()  # s3fs and others remember listings; another process may have written since
            try:
                found = fs.ls(path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
        return {info["name"].rsplit("/", 1)[1]: info["size"] for info in found if info["type"] == "file"}

    def delete(self, name: str) -> None:
        """Remove the object `name`, which may be gone already."""
        fs, path = self._find(name)
        with self._refusals("delete", name), suppress(FileNotFoundError):
            fs.rm_file(path)

    @contextmanager
    def open(self, name: str, mode: str = "rb") -> Iterator[Any]:
        """The object as a binary file, for what is too large to hold; written, it is there only once closed."""
        fs, path = self._find(name)
        verb = "read" if mode == "rb" else "write"
        with self._refusals(verb, name):
            if verb == "write":
                _make_folder(fs, path)
            fs.invalidate_cache()
            file = fs.open(path, mode)
        try:
            with file:
                yield file
        except OSError as error:
            raise self._refused(verb, name, error) from error

    def _find(self, name: str) -> tuple[Any, str]:
        fs, root = fsspec.core.url_to_fs(self.uri)
        return fs, f"{root.rstrip('/')}/{name}" if name else root

    @contextmanager
    def _refusals(self, verb: str, name: str) -> Iterator[None]:
        """What a store's library raises becomes a `StoreError` of one line; each has its own exceptions."""
        try:
            yield
        except Exception as error:
            raise self._refused(verb, name, error) from error

    def _refused(self, verb: str, name: str, error: Exception) -> StoreError:
        return StoreError(f"cannot {verb} {self}/{name}: {redact(_reason(error))}")


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
