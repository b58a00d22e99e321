"""A request's body on its way in: bounded while it comes, its audio in a file, its fields as they were sent.

Both kinds are streamed to disk, whatever length they promise: many bodies without an end may not grow this process.
`multipart/form-data`: the parts named in `AUDIO` are the audio, with a file name or without (DeepInfra's SDK sends
none). `application/json`: the audio is a data URL. What a field means is the routes' business.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import errno
import json
import os
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copyfileobj
from typing import IO, Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from pipeline.errors import MurmurError
from serve_app.errors import FieldError, RefusedError
from serve_app.limits import READ_BYTES_PER_S, READ_S, BusyError, TooLargeError, TooSlowError

AUDIO = ("audio", "file")  # DeepInfra's name and OpenAI's
MAX_FIELDS = 64
MAX_FIELD_BYTES = 1 << 20  # of all of them together: they are held in memory, and 50 clients may send them at once
# Brackets and commas in a JSON body, and so its values; no data URL has any. Each would become an object: 30 MB of
# `{},` take 1 GB and half a minute, in which nobody else is answered.
MAX_JSON_MARKS = 100_000
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)


@dataclass(slots=True)
class Body:
    """What was sent. A field that came several times has all its values."""

    fields: dict[str, list[Any]] = field(default_factory=dict)
    audio: dict[str, list[Path]] = field(default_factory=dict)  # by the name of the part

    def one_audio(self, name: str) -> Path:
        """The file of the one part with this name. Raises `FieldError`."""
        files = self.audio.get(name, [])
        if not files:
            raise FieldError(name, "the audio to transcribe is missing", "missing")
        if len(files) > 1:
            raise FieldError(name, "one file at a time", "repeated")
        return files[0]

    def single(self, names: Mapping[str, Any] | tuple[str, ...]) -> dict[str, Any]:
        """The fields with these names, each sent at most once. Raises `FieldError`."""
        for name in names:
            if len(self.fields.get(name, ())) > 1:
                raise FieldError(name, "sent more than once", "repeated")
        return {name: self.fields[name][0] for name in names if name in self.fields}

    def others(self, *known: str) -> list[str]:
        """Names of fields that nobody asked for, in their order."""
        return [name for name in {**self.fields, **self.audio} if name not in known]


class Bodies:
    """Reads bodies into files of `folder`; `max_bytes` is the most that one may have."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._parsing = asyncio.Lock()  # JSON is held whole, and twice: one at a time

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[Body]:
        """The request's body; its files are gone when the body of the statement ends, unless they were moved.

        Raises `RefusedError`, `FieldError`, `TooLargeError`, `TooSlowError`, `BusyError` where the disk is full, and
        `ClientDisconnect`.
        """
        promised = request.headers.get("content-length", "")
        if promised.isdigit() and int(promised) > self._max_bytes:
            raise self._too_large()
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        body = Body()
        try:
            if kind == "multipart/form-data":
                await self._read_form(request, body)
            elif kind == "application/json":
                await self._read_json(request, body)
            else:
                what = f"{kind!r} is not understood" if kind else "there is no Content-Type"
                raise RefusedError(415, f"{what}: send multipart/form-data or application/json")
            yield body
        except OSError as error:
            if error.errno in _FULL:
                raise BusyError("busy: no room for uploads at the moment", 10) from None
            raise
        finally:
            files = [file for files in body.audio.values() for file in files]
            # Shielded: who is given up while this waits for a thread would leave them.
            await asyncio.shield(asyncio.ensure_future(asyncio.to_thread(_remove, files)))

    async def _read_form(self, request: Request, body: Body) -> None:
        parser = _Parser(
            request.headers,
            self._bounded(request),
            max_files=2 * len(AUDIO),
            max_fields=MAX_FIELDS,
            max_part_size=MAX_FIELD_BYTES,
        )
        try:
            form = await parser.parse()
        except MultiPartException as error:
            if "maximum size" in error.message:
                raise TooLargeError(
                    "fields that are not a file have more than 1 MB: send the audio as a file"
                ) from None
            raise RefusedError(400, f"multipart/form-data: {error.message}") from None
        try:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile) and name in AUDIO:
                    await asyncio.to_thread(self._keep, value.file, body.audio.setdefault(name, []), name)
                elif isinstance(value, UploadFile):
                    body.fields.setdefault(name, []).append(f"file {value.filename}")
                else:
                    body.fields.setdefault(name, []).append(value)
        finally:
            await form.close()

    async def _read_json(self, request: Request, body: Body) -> None:
        n_marks = 0
        with tempfile.TemporaryFile(dir=self._folder) as file:
            async for chunk in self._bounded(request):
                n_marks += sum(map(chunk.count, (b",", b"[", b"{")))
                if n_marks > MAX_JSON_MARKS:
                    raise TooLargeError(f"the body is JSON of more than {MAX_JSON_MARKS} values")
                await asyncio.to_thread(file.write, chunk)
            file.seek(0)
            async with self._parsing:
                await asyncio.to_thread(self._parse, file, body)

    def _parse(self, file: IO[bytes], body: Body) -> None:
        try:
            pairs = json.loads(file.read(), object_pairs_hook=_Pairs)
        except (ValueError, RecursionError):
            raise RefusedError(400, "the body is not JSON") from None
        if not isinstance(pairs, _Pairs):
            raise RefusedError(400, "the body is not a JSON object")
        for name, value in pairs:
            if name in AUDIO and value is not None:
                if not isinstance(value, str):
                    raise FieldError(name, "a data URL is wanted: data:audio/wav;base64,...", "data_url")
                with _named(self._folder, body.audio.setdefault(name, [])) as audio:
                    audio.write(_from_data_url(value, name))
            elif value is not None:
                body.fields.setdefault(name, []).append(value)

    def _keep(self, file: IO[bytes], files: list[Path], name: str) -> None:
        """A file that came, under a name that others can open; a data URL in its place is decoded."""
        head = file.read(5)
        file.seek(0)
        with _named(self._folder, files) as kept:
            if head == b"data:":
                kept.write(_from_data_url(file.read().decode("latin-1").strip(), name))
            else:
                copyfileobj(file, kept, 1 << 20)

    async def _bounded(self, request: Request) -> AsyncGenerator[bytes, None]:
        """The body as it comes, until it is too long or too long in coming."""
        began, n_bytes = time.monotonic(), 0
        while True:
            left_s = began + READ_S + n_bytes / READ_BYTES_PER_S - time.monotonic()
            try:
                message = await asyncio.wait_for(request.receive(), max(left_s, 0.0))
            except TimeoutError:
                raise TooSlowError(f"{n_bytes} bytes came in {time.monotonic() - began:.0f} s: too slowly") from None
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunk = message.get("body", b"")
            n_bytes += len(chunk)
            if n_bytes > self._max_bytes:
                raise self._too_large()
            if chunk:
                yield chunk
            if not message.get("more_body", False):
                return

    def _too_large(self) -> MurmurError:
        return TooLargeError(f"the body has more than {self._max_bytes >> 20} MB (limits.body_mb)")


class _Parser(MultiPartParser):
    """A part with a name of `AUDIO` is a file also where it has no file name: as text its bytes would be lost.

    `max_part_size` is that of all other parts together.
    """

    _n_field_bytes = 0

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._current_part.file is None:
            self._n_field_bytes += end - start
            if self._n_field_bytes > self.max_part_size:
                raise MultiPartException("the fields exceed their maximum size")
        super().on_part_data(data, start, end)

    def on_headers_finished(self) -> None:
        part = self._current_part
        disposition = part.content_disposition or b""
        plain = disposition.replace(b'"', b"").replace(b" ", b"").lower() + b";"
        if b"filename" not in plain and any(f";name={name};".encode() in plain for name in AUDIO):
            part.content_disposition = disposition + b'; filename=""'
        super().on_headers_finished()


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with every pair that was in it, repeated keys too."""


@asynccontextmanager
async def uploads_folder() -> AsyncIterator[Path]:
    """A private folder for as long as the application runs."""
    with tempfile.TemporaryDirectory(prefix="murmur-uploads-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


class _named:  # noqa: N801
    """A new file of `folder`, open for writing, noted in `files` before anything is in it."""

    def __init__(self, folder: Path, files: list[Path]) -> None:
        number, name = tempfile.mkstemp(dir=folder)
        files.append(Path(name))
        self._file = os.fdopen(number, "wb")

    def __enter__(self) -> IO[bytes]:
        return self._file

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _from_data_url(url: str, name: str) -> bytes:
    """Raises `FieldError` for anything but base64 with something in it."""
    if url[:5].lower() != "data:":
        hint = "; addresses are not fetched, send the audio" if "://" in url[:10] else ""
        raise FieldError(name, f"a data URL is wanted: data:audio/wav;base64,...{hint}", "data_url")
    head, comma, payload = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise FieldError(name, "this data URL is not one of base64: data:audio/wav;base64,...", "data_url")
    try:
        audio = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise FieldError(name, "the data URL's payload is not base64", "data_url") from None
    if not audio:
        raise FieldError(name, "the data URL holds nothing", "data_url")
    return audio


def _remove(files: list[Path]) -> None:
    for file in files:
        with suppress(OSError):
            file.unlink(missing_ok=True)
