"""Tar shards: what recordings are in one, where each lies, and what the files beside them say (webdataset's layout).

    tar://OFFSET+SIZE/MEMBER::SHARD    a member as listing the shard has found it: its bytes in the unpacked shard
    tar://MEMBER::SHARD                the same as a manifest may say it, without the place

Nothing is ever unpacked into a folder: a member is a range of bytes, its name a name. Links, devices, sparse files,
and names that lead out of a folder are left out and counted. A shard that is damaged or cut off is refused. Knows files
that are open, and no store.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import posixpath
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import pyarrow as pa

TARS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
BLOCK = 512  # bytes; a member's header is the block before its bytes
SIDECARS = (".json", ".txt", ".cls")
_MAX_SIDECAR = 16 << 20  # bytes
_CHUNK = 1 << 20
_ADDRESS = re.compile(r"tar://(?:(\d+)\+(\d+)/)?(.+?)::(.+)", re.DOTALL)
# What the libraries raise where a shard is not what it says it is.
DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowInvalid)


class DamagedTarError(ValueError):
    """A shard that cannot be read to its end; the text says where."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a shard."""

    name: str
    offset: int  # of its bytes in the unpacked shard
    size: int
    number: int = 0  # from 1: the how manieth thing in the shard it is
    data: bytes | None = None  # of what lies beside audio

    @property
    def stem(self) -> str:
        return posixpath.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1].lower()


@dataclass(frozen=True, slots=True)
class Address:
    """A member and its shard; `place` is its offset and size."""

    shard: str
    member: str
    place: tuple[int, int] | None = None

    def __str__(self) -> str:
        place = "{}+{}/".format(*self.place) if self.place else ""
        return f"tar://{place}{self.member}::{self.shard}"


def parse(uri: str) -> Address | None:
    """The parts of a member's address; None for any other."""
    found = _ADDRESS.fullmatch(uri)
    if found is None:
        return None
    offset, size, member, shard = found.groups()
    return Address(shard, member, (int(offset), int(size)) if offset else None)


def is_tar(path: str) -> bool:
    return path.lower().endswith(TARS)


def is_packed(path: str) -> bool:
    """Whether this shard can only be read from its start."""
    return is_tar(path) and not path.lower().endswith(".tar")


@dataclass(slots=True)
class Listing:
    """A shard, read through once; `left_out` counts by reason what is no recording."""

    file: Any
    path: str  # decides how it is packed
    audio: Collection[str]  # extensions
    left_out: Counter[str] = field(default_factory=Counter)

    def samples(self) -> Iterator[tuple[list[Member], dict[str, Member]]]:
        """The audio of each name with what lies beside it, by extension: neighbours in the shard of one stem.

        Raises `DamagedTarError`.
        """
        for _, group in groupby(self._members(), key=lambda member: member.stem):
            members = list(group)
            audio = [member for member in members if member.data is None]
            beside = {member.suffix: member for member in members if member.data is not None}
            if audio:
                yield audio, beside
            else:
                self.left_out.update(list(beside))

    def _members(self) -> Iterator[Member]:
        for number, info, read in walk(self.file, self.path):
            reason = self._why_not(info)
            if reason is not None:
                self.left_out[reason] += 1
                continue
            member = Member(info.name, info.offset_data, info.size, number)
            yield member if member.suffix in self.audio else Member(info.name, info.offset_data, info.size, data=read())

    def _why_not(self, info: tarfile.TarInfo) -> str | None:
        """Why this is neither audio nor lies beside any, in a word for the count."""
        suffix = posixpath.splitext(info.name)[1].lower()
        if info.isdir():
            return "folder"
        if info.issym() or info.islnk():
            return "link"
        if not info.isreg() or info.issparse():
            return "sparse file" if info.issparse() else "device"
        if info.name.startswith("/") or ".." in info.name.split("/"):
            return "with a path that leads out"
        if "::" in info.name:
            return "with :: in its name"
        if posixpath.basename(info.name).startswith("."):
            return "hidden"
        if suffix in SIDECARS:
            return None if info.size <= _MAX_SIDECAR else f"{suffix} of more than {_MAX_SIDECAR >> 20} MiB"
        return None if suffix in self.audio else suffix or "without extension"


def walk(file: Any, path: str) -> Iterator[tuple[int, tarfile.TarInfo, Callable[[], bytes]]]:
    """Everything in a shard, in order, with its number and a function that reads it, good until the next one."""
    number = 0
    try:
        with unpacked(file, path) as plain, tarfile.open(fileobj=plain, mode="r:") as tar:
            for number, info in enumerate(tar, 1):
                yield number, info, partial(_read, tar, info)
                tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            _check_end(plain, tar.offset)
    except DAMAGE as error:
        where = f"after {number} of its members" if number else "at its start"
        raise DamagedTarError(f"damaged {where} ({str(error) or type(error).__name__})") from None


def find(file: Any, path: str) -> dict[str, tuple[int, int]]:
    """Where the bytes of each file in a shard lie, by its name; of two of one name the first."""
    places: dict[str, tuple[int, int]] = {}
    for _, info, _ in walk(file, path):
        if info.isreg() and not info.issparse():
            places.setdefault(info.name, (info.offset_data, info.size))
    return places


def is_header_of(block: bytes, name: str, size: int) -> bool:
    """Whether this is the header of the member: in a shard that was replaced, something else lies there."""
    try:
        info = tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return False
    is_short = name.isascii() and len(name) < tarfile.LENGTH_NAME  # a longer one stands in a header before
    return info.size == size and (info.name == name or not is_short)


def unpacked(file: Any, path: str) -> Any:
    """A file object of the shard's own bytes; of one that is packed it goes forward only, but for a short way."""
    opened = next((opened for ending, opened in _UNPACKERS.items() if path.lower().endswith(ending)), None)
    return file if opened is None else io.BufferedReader(_Forward(opened(file)), _CHUNK)


_UNPACKERS: dict[str, Callable[[Any], Any]] = {
    "gz": lambda file: gzip.GzipFile(fileobj=file),
    "tgz": lambda file: gzip.GzipFile(fileobj=file),
    "bz2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "zst": lambda file: pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"),
}


class _Forward(io.RawIOBase):
    """What is unpacked on the way: to go forward is to read."""

    def __init__(self, file: Any) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._take(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence != 0 or offset < self._at:
            raise io.UnsupportedOperation("back in a packed shard")
        while self._at < offset and self._take(min(_CHUNK, offset - self._at)):
            pass
        return self._at

    def _take(self, size: int) -> bytes:
        try:
            data: bytes = self._file.read(size)
        except OSError as error:
            if error.errno is not None:  # the store's own
                raise
            raise EOFError(str(error)) from None
        self._at += len(data)
        return data


def _read(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    assert file is not None
    return file.read()


def _check_end(plain: Any, offset: int) -> None:
    """tarfile takes a header that it cannot read for the end; the end is a block of zeros, or of the file."""
    plain.seek(offset)
    block = plain.read(BLOCK)
    if block.strip(b"\0") or 0 < len(block) < BLOCK:
        raise tarfile.ReadError(f"no header at byte {offset}")
