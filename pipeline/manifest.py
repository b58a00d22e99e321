"""Every kind of INPUT on any fsspec store → Recordings, streamed, each id once.

An INPUT is a manifest (`.jsonl`, `.csv`, `.parquet`), a folder, a glob, a tar shard, or an audio file. A manifest's
line names its audio under `audio_filepath` (or `uri`, `path`, `audio`), relative to the manifest's own folder; `id`,
`duration`, `offset`, `text`, `language`, `task` and `initial_prompt` are known, and every other key travels in
`metadata`. A Parquet file may hold the audio itself (`pipeline.cells`), a tar shard does (`pipeline.tars`).

A local file's uri is its absolute path, whether it was named relatively, absolutely or as `file://`; every other uri
is kept as it was given. The default id is the uri without secrets; of a shard's member `SHARD/MEMBER`, of audio
inside Parquet the path beside it, else `FILE#ROW`. This module opens no audio: a row that names
a file which is not there costs that recording only, later.
"""

from __future__ import annotations

import codecs
import csv
import functools
import io
import itertools
import json
import logging
import math
import os
import posixpath
import re
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from pipeline import cells, tars
from pipeline.errors import AudioError, ForbiddenError, ManifestError, NotFoundError, SourceError, redact
from pipeline.tars import is_tar
from pipeline.types import LANGUAGE, Recording, Task, samples

logger = logging.getLogger(__name__)

# What a folder or a glob is searched for. A file named outright may have any other name: its content decides.
AUDIO_EXTENSIONS = frozenset(
    ".3g2 .3gp .aac .ac3 .aif .aifc .aiff .amr .ape .asf .au .avi .caf .dts .eac3 .flac .flv .m2ts .m4a .m4b .m4v .mka"
    " .mkv .mov .mp2 .mp3 .mp4 .mpeg .mpg .mts .mxf .oga .ogg .ogv .opus .ra .rm .snd .spx .sph .tak .ts .tta .vob .voc"
    " .w64 .wav .wave .webm .wma .wmv .wv".split()
)
_NO_AUDIO = frozenset(".arrow .bz2 .gz .json .md .ndjson .tsv .txt .xlsx .xz .yaml .yml .zip .zst".split())

AUDIO_KEYS = ("audio_filepath", "uri", "path", "audio")
_BESIDE_KEYS = {"id", "duration", "text", "language", "task", "initial_prompt"}  # known also where audio is at hand
_KEYS = {*AUDIO_KEYS, *_BESIDE_KEYS, "offset"}
_HEADERS_AHEAD = 256 << 10  # bytes read at a time in looking through a shard
_MAX_LINE = 64 << 20  # bytes; a longer one is no line of a manifest but another kind of file
_MAX_SECONDS = 1e9  # 31 years: no offset or duration of a recording

Row = tuple[int, dict[str, Any]]  # its line (or row) counted from 1, its keys


def read_inputs(inputs: Sequence[str]) -> Iterator[Recording]:
    """The Recordings of all `inputs`, in order. Raises `ManifestError` at the first thing that is wrong, but for an
    id that is given twice: that is said after the last one.

    Rows are read as they are asked for; what stays in memory is eight bytes an id. A folder or a glob is listed at
    once, since it is sorted.
    """
    if not inputs:
        raise ManifestError("no input was given")
    if not all(text.strip() for text in inputs):
        raise ManifestError("an input is an empty text: name a file, a folder, a glob or a manifest")
    hashes = array("q")
    for recording in _read_all(inputs):
        hashes.append(hash(recording.id))
        yield recording
    if repeated := _repeated(hashes):
        _refuse_twice(recording for recording in _read_all(inputs) if hash(recording.id) in repeated)


def read_references(text: str) -> Iterator[Recording]:
    """The lines of a file of references: a manifest (`.jsonl`, `.csv`, `.parquet`) that may leave out the audio.

    `id` names the recording, or the audio does, as in a manifest; `text` is the reference, and a Recording without one
    is a line without one. Its uri is empty. Raises `ManifestError`.
    """
    name = public_uri(text)
    with _refusals(text):
        place = _Place(name, text, *filesystem(text))
        if _suffix(text) not in _MANIFESTS:
            raise ManifestError(f"{name}: no file of references (.jsonl, .csv, .parquet)")
        base = posixpath.dirname(place.path) if place.is_local else folder_of(place.uri)
        with place.fs.open(place.path, "rb") as file:
            for line, row in _reference_rows(file, place):
                where = f"{name}:{line}"
                try:
                    if _id(row) is None and not any(row.get(key) for key in AUDIO_KEYS):
                        raise ValueError("no id")
                    default = "" if _id(row) else default_id(resolve(_audio_of(row), base))
                    yield _recording(row, "", where, default=default, known=_KEYS)
                except ValueError as error:
                    raise ManifestError(f"{where}: {error}") from None


def _reference_rows(file: Any, place: _Place) -> Iterator[Row]:
    if _suffix(place.uri) == ".csv":
        yield from _csv_rows(file, place.name, ("id", *AUDIO_KEYS))
    elif _suffix(place.uri) == ".jsonl":
        yield from _jsonl_rows(file, place.name)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.ParquetFile(file)
            audio = cells.audio_column(table.schema_arrow, AUDIO_KEYS)
            columns = None if audio is None else cells.without_bytes(table.schema_arrow, audio)
            for line, row in _parquet_rows(table, range(table.num_row_groups), columns):
                if audio is not None:
                    row |= {audio.name: (row.get(audio.name) or {}).get("path")}
                yield line, row
        except pa.ArrowException as error:
            raise ManifestError(f"{place.name}: not Parquet ({str(error).splitlines()[0]})") from None


def _read_all(inputs: Sequence[str]) -> Iterator[Recording]:
    return itertools.chain.from_iterable(map(_read_input, inputs))


def _repeated(hashes: array[int]) -> set[int]:
    ordered = np.sort(np.frombuffer(hashes, np.int64))
    return set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())


def _refuse_twice(suspects: Iterable[Recording]) -> None:
    """Raise at the first id that comes again; two of one hash may still be two."""
    sources: dict[str, str] = {}
    for recording in suspects:
        if recording.id in sources:
            raise ManifestError(
                f"the id {_short(recording.id)} is given twice: {sources[recording.id]} and {recording.source}"
                " (slices of one file need ids of their own)"
            )
        sources[recording.id] = recording.source


# ---- addresses and stores

# Azure names the container before the @ of a host, an archive's member may have one; elsewhere it is a user's.
_USER = re.compile(r"(?!(?:abfss?|adl|az|wasbs?|tar|zip):)([a-z][a-z0-9+.-]*://)[^/?#]*@", re.IGNORECASE)
_SIGNING = re.compile(
    r"x-(amz|goog|oss|cos|ms)-.*|awsaccesskeyid|googleaccessid|ossaccesskeyid|signature|expires|policy|key-pair-id"
    r"|sig|.*token|api_?key|hdn(ea|ts|tl)|q-(sign|ak|key|header|url|signature).*",
    re.IGNORECASE,
)
_SHARED_ACCESS = re.compile(  # Azure's short names, which mean this only beside `sig`
    r"s[eiprstv]|srt|spr|sip|sdd|ses|sk(oid|tid|[estv])|saoid|suoid|scid|rsc[cdelt]", re.IGNORECASE
)

_NO_CREDENTIALS = frozenset(  # what the libraries of S3, Google and Azure raise before they have asked at all
    "NoCredentialsError PartialCredentialsError CredentialRetrievalError TokenRetrievalError SSOTokenLoadError"
    " UnauthorizedSSOTokenError NoAuthTokenError DefaultCredentialsError RefreshError ClientAuthenticationError".split()
)


def public_uri(uri: str) -> str:
    """`uri` without user info and signing parameters: for tables, logs and messages."""
    if "@" not in uri and "?" not in uri:
        return uri
    has_query = any(_is_http(part) for part in uri.split("::"))  # elsewhere a ? is part of the name
    return "::".join(_public(part, has_query) for part in uri.split("::"))


def default_id(uri: str) -> str:
    """The id of a recording that was given none."""
    return public_uri(uri)


def store_of(uri: str) -> str:
    """The store that `uri` lies on, as it is named in messages: `s3://bucket`, `https://host`, `file` for a disk."""
    scheme, mark, rest = public_uri(uri).split("::")[-1].partition("://")
    return f"{scheme}://{rest.partition('/')[0]}" if mark else "file"


def file_of(uri: str) -> str:
    """The file, as its store knows it, that holds the bytes at `uri`: a shard, a Parquet file, nearly always itself."""
    if member := tars.parse(uri):
        return member.shard
    cell = cells.parse(uri)
    return cell.file if cell else uri


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem that `uri` lies on, and its path there; a local path is absolute.

    Credentials come from the environment, as each filesystem's library reads them. Raises what that library raises.
    """
    fs, path = fsspec.core.url_to_fs(uri, **_http_options(uri))
    return fs, os.path.abspath(path) if isinstance(fs, LocalFileSystem) else path


def source_error(error: BaseException, uri: str) -> AudioError:
    """Why the bytes at `uri` cannot be had, as one line without secrets; `error` is what its store raised."""
    name = public_uri(uri)
    wrapped = _is_http(uri) and isinstance(error, FileNotFoundError) and error.__cause__ is not None
    cause = error.__cause__ if wrapped else error
    status = http_status(error)
    if status in (401, 403) or isinstance(cause, PermissionError):  # s3fs: also an expired token, which is a 400
        return ForbiddenError(f"{name}: access refused")
    if type(cause).__name__ in _NO_CREDENTIALS:
        return ForbiddenError(f"{name}: access refused: {redact(str(cause)).splitlines()[0]}")
    if status in (404, 410) or (status is None and isinstance(cause, FileNotFoundError)):
        return NotFoundError(f"{name}: not found")
    if status is not None:
        return SourceError(f"{name}: the server answered {status}")
    lines = redact(str(cause)).strip().splitlines()
    return SourceError(f"{name}: cannot be read ({': '.join([type(cause).__name__, *lines[:1]])})")


def http_status(error: BaseException) -> int | None:
    """The status with which a server refused, where each store's library keeps it."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, dict):  # botocore's
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        elif type(one).__name__ == "HttpError":  # gcsfs's; aiohttp has a `code` of its own for a body that was cut
            status = getattr(one, "code", None)
        else:  # aiohttp's, or Azure's
            status = getattr(one, "status", getattr(one, "status_code", None))
        if isinstance(status, int) and 400 <= status < 600:
            return status
    return None


def _public(part: str, has_query: bool) -> str:
    user = _USER.match(part)
    if user:
        part = user[1] + part[user.end() :]
    address, mark, query = part.partition("?")
    if not mark or not has_query:
        return part
    parameters = [(parameter.partition("=")[0], parameter) for parameter in query.split("&")]
    shared_access = any(key.lower() == "sig" for key, _ in parameters)
    kept = [
        parameter
        for key, parameter in parameters
        if not _SIGNING.fullmatch(key) and not (shared_access and _SHARED_ACCESS.fullmatch(key))
    ]
    return address + (mark + "&".join(kept) if kept else "")


def _is_http(uri: str) -> bool:
    return uri.partition("://")[0].lower().endswith(("http", "https"))


def _http_options(uri: str) -> dict[str, Any]:
    """No limit on the whole of a download, which may take hours; an address that is encoded is sent as it is."""
    if not uri.lower().startswith(("http://", "https://")):
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
    return {"client_kwargs": {"timeout": timeout}, "encoded": uri.isascii() and "%" in uri and " " not in uri}


def name_of(uri: str) -> str:
    """The path or address whose end tells what a file is: of a chain the innermost, of an address without its query."""
    part = next((part for part in uri.split("::") if "://" in part), uri)
    return part.partition("?")[0] if _is_http(part) else part


def _suffix(uri: str) -> str:
    """The lower-case extension of a path or an address, with its dot; empty where there is none."""
    path = uri.split("::")[0]
    path = path.partition("?")[0] if _is_http(path) else path
    return posixpath.splitext(path)[1].lower()


# ---- inputs


@dataclass(frozen=True, slots=True)
class _Place:
    """An input and where it lies."""

    name: str  # for messages: as it was given, without secrets
    uri: str
    fs: Any
    path: str

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def child(self, path: str) -> str:
        """The uri of another path on the same filesystem."""
        first, *outer = self.uri.split("::")
        if self.is_local or _is_http(first):
            return path
        return "::".join([f"{first.partition('://')[0]}://{path}", *outer])


def _short(value: Any) -> str:
    text = redact(repr(value))
    return text if len(text) <= 200 else text[:200] + "..."


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """What a store's library raises becomes a `ManifestError`; each has its own exceptions."""
    try:
        yield
    except ManifestError:
        raise
    except Exception as error:
        raise ManifestError(str(source_error(error, name))) from None


def _read_input(text: str) -> Iterator[Recording]:
    name = public_uri(text)
    with _refusals(text):
        place = _Place(name, text, *filesystem(text))
        if _is_pattern(place):
            yield from _read_glob(place)
        else:
            yield from _read_one(place)


def _is_pattern(place: _Place) -> bool:
    if _is_http(place.uri):
        return "*" in place.path.partition("?")[0]
    return any(mark in place.path for mark in "*?[") and not place.fs.exists(place.path)


def _read_one(place: _Place) -> Iterator[Recording]:
    place.fs.invalidate_cache()  # s3fs and others remember listings; files may have come since
    info = place.fs.info(place.path)
    suffix = _suffix(place.uri)
    if info["type"] == "directory" or (_is_http(place.uri) and place.uri.endswith("/")):
        yield from _read_folder(place)
    elif suffix in _MANIFESTS:
        yield from _read_manifest(place)
    elif is_tar(name_of(place.uri)):
        yield from _read_tar(place)
    elif suffix in _NO_AUDIO:
        raise ManifestError(f"{place.name}: neither a manifest (.jsonl, .csv, .parquet), a tar nor an audio file")
    else:
        yield _found(place, place.path if place.is_local else place.uri, info)


def _read_folder(place: _Place) -> Iterator[Recording]:
    yield from _listed(place, place.fs.find(place.path, detail=True), place.path, AUDIO_EXTENSIONS)


def _read_glob(place: _Place) -> Iterator[Recording]:
    """The audio files, tar shards and manifests that match."""
    place.fs.invalidate_cache()
    found = place.fs.glob(place.path, detail=True)
    if not found:
        raise ManifestError(f"{place.name}: nothing matches")
    root = posixpath.dirname(re.split(r"[*?[]", place.path, maxsplit=1)[0])
    yield from _listed(place, found, root, AUDIO_EXTENSIONS | _MANIFESTS)


def _listed(
    place: _Place, found: Mapping[str, Mapping[str, Any]], root: str, wanted: frozenset[str]
) -> Iterator[Recording]:
    """What of a listing is `wanted`, sorted by path; the rest is counted and said."""
    others: Counter[str] = Counter()
    chosen = []
    for path, info in sorted(found.items()):
        reason = _left_out(place.fs, path, info, root, wanted)
        if reason is None:
            chosen.append(path)
        else:
            others[reason] += 1
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(others.items()))
    if not chosen:
        raise ManifestError(f"{place.name}: no audio files" + (f", only others ({counts})" if counts else ""))
    if others:
        logger.warning("%s: %d files taken, %d others left out (%s)", place.name, len(chosen), others.total(), counts)
    strange = [path for path in chosen if not _is_utf8(path)]
    if strange[1:]:  # one is named where its turn comes
        raise ManifestError(
            f"{place.name}: {len(strange)} file names are not UTF-8, the first one {_short(strange[0])}; rename them"
        )
    for path in chosen:
        uri = place.child(path)
        if is_tar(path) or _suffix(path) in _MANIFESTS:
            inner = _Place(public_uri(uri), uri, place.fs, path)
            yield from _read_tar(inner) if is_tar(path) else _read_manifest(inner)
        else:
            yield _found(place, uri, found[path])


def _left_out(fs: Any, path: str, info: Mapping[str, Any], root: str, wanted: frozenset[str]) -> str | None:
    """Why a listed path is no input, in a word for the count; None if it is one."""
    if info["type"] == "directory":
        return "folder"
    if info["type"] == "other" and not fs.isfile(path):  # a symbolic link, and not one to a file
        return "link to a folder" if fs.isdir(path) else "broken link"
    if "/." in path.removeprefix(root):
        return "hidden"
    return None if is_tar(path) or _suffix(path) in wanted else _suffix(path) or "without extension"


def _is_utf8(path: str) -> bool:
    """A table holds no other names."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _found(place: _Place, uri: str, info: Mapping[str, Any]) -> Recording:
    if not _is_utf8(uri):
        raise ManifestError(f"{place.name}: the file name {_short(uri)} is not UTF-8; rename it")
    size, etag = _identity(info)
    return Recording(id=default_id(uri), uri=uri, source=place.name, size=size, etag=etag)


def identity(uri: str) -> tuple[int | None, str | None]:
    """Size and etag of the file at `uri`, of a shard's member or a Parquet file's row those of the whole file.

    None where they cannot be had, whatever the reason: reading it will tell. HTTP servers are not asked: many answer
    slowly, or with another etag each time.
    """
    file = file_of(uri)
    if _is_http(file):
        return None, None
    try:
        fs, path = filesystem(file)
        fs.invalidate_cache(fs._parent(path))
        return _identity(fs.info(path))
    except Exception:  # every store's library has exceptions of its own
        return None, None


def _identity(info: Mapping[str, Any]) -> tuple[int | None, str | None]:
    """Of a listing's entry. A disk has no etags: there it is the time of the last change."""
    etag = info.get("ETag") or info.get("etag")
    if not etag and isinstance(info.get("mtime"), float):
        etag = f"{info['mtime']:.6f}"
    return info.get("size"), str(etag).strip('"') if etag else None


# ---- tar shards


def _read_tar(place: _Place) -> Iterator[Recording]:
    """The audio in a shard, with what the files beside it say; what else lies there is counted and said."""
    n_found = 0
    with place.fs.open(place.path, "rb", block_size=_HEADERS_AHEAD) as file:
        listing = tars.Listing(file, name_of(place.uri), AUDIO_EXTENSIONS)
        try:
            for audio, beside in listing.samples():
                row = _row_beside(beside, place.name)
                n_found += len(audio)
                yield from (_in_tar(place, member, row) for member in audio)
        except tars.DamagedTarError as error:
            raise ManifestError(f"{place.name}: {error}") from None
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(listing.left_out.items()))
    if not n_found:
        raise ManifestError(f"{place.name}: no audio files" + (f", only others ({counts})" if counts else ""))
    if counts:
        others = listing.left_out.total()
        logger.warning("%s: %d files taken, %d others left out (%s)", place.name, n_found, others, counts)


def _row_beside(beside: Mapping[str, tars.Member], shard: str) -> dict[str, Any]:
    """What a shard says of an audio file, as a manifest's row: its `.json`, else its `.txt` is the text; its `.cls`."""
    row: dict[str, Any] = {}
    for suffix, member in beside.items():
        where = f"{shard}/{member.name}"
        try:
            text = (member.data or b"").removeprefix(codecs.BOM_UTF8).decode()
        except UnicodeDecodeError:
            raise ManifestError(f"{where}: not UTF-8") from None
        said = _json_object(text, where) if suffix == ".json" else {"text" if suffix == ".txt" else "cls": text.strip()}
        row = row | said if suffix == ".json" else said | row
    return row


def _in_tar(place: _Place, member: tars.Member, row: Mapping[str, Any]) -> Recording:
    shard = place.path if place.is_local else place.uri
    where = f"{place.name}:{member.number} ({_short(member.name)})"
    try:
        member.name.encode()
        recording = _recording(
            row,
            str(tars.Address(shard, member.name, (member.offset, member.size))),
            where,
            default=f"{default_id(shard)}/{member.name}",
            known=_BESIDE_KEYS,
        )
    except UnicodeEncodeError:
        raise ManifestError(f"{where}: its name is not UTF-8") from None
    except ValueError as error:
        raise ManifestError(f"{where}: {error}") from None
    return replace(recording, size=member.size)


# ---- manifests


def _read_manifest(place: _Place) -> Iterator[Recording]:
    base = posixpath.dirname(place.path) if place.is_local else folder_of(place.uri)
    with place.fs.open(place.path, "rb") as file:
        if _suffix(place.uri) == ".parquet":
            yield from _read_parquet(file, place, base)
        else:
            for line, row in _READERS[_suffix(place.uri)](file, place.name):
                yield _listed_in(row, base, f"{place.name}:{line}")


def _listed_in(row: Mapping[str, Any], base: str, where: str) -> Recording:
    """The Recording of a line that names its audio."""
    try:
        uri = resolve(_audio_of(row), base)
        return _recording(row, uri, where, default=default_id(uri), known=_KEYS)
    except ValueError as error:
        raise ManifestError(f"{where}: {error}") from None


def _lines(file: Any, name: str) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their line ends, counted from 1."""
    with io.BufferedReader(file, 1 << 20) as reader:
        for line in itertools.count(1):
            raw = reader.readline(_MAX_LINE + 1)
            if not raw:
                return
            if len(raw) > _MAX_LINE:
                raise ManifestError(f"{name}:{line}: longer than {_MAX_LINE >> 20} MiB")
            try:
                yield line, (raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw).decode()
            except UnicodeDecodeError as error:
                raise ManifestError(f"{name}:{line}: not UTF-8 (byte {error.start + 1} of the line)") from None


def _jsonl_rows(file: Any, name: str) -> Iterator[Row]:
    for line, text in _lines(file, name):
        if not text.strip():
            continue
        yield line, _json_object(text, f"{name}:{line}", cut="" if text.endswith("\n") else "; is the file cut off?")


def _json_object(text: str, where: str, cut: str = "") -> dict[str, Any]:
    try:
        row = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        if "\\u" in text:  # may spell half a surrogate pair, which no table can hold
            json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: not JSON ({error}){cut}") from None
    if not isinstance(row, dict):
        raise ManifestError(f"{where}: a JSON object was expected, not {_short(row)}")
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} twice")
    return row


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _csv_rows(file: Any, name: str, needed: Sequence[str] = AUDIO_KEYS) -> Iterator[Row]:
    """Rows by the line they begin on. An empty cell of a known column is a missing one; every value is text. The
    header has one of the columns `needed`."""
    csv.field_size_limit(_MAX_LINE)  # the module's own limit, 128 KiB, is for the whole process
    reader = csv.reader((text for _, text in _lines(file, name)), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ManifestError(f"{name}:{line}: not CSV ({error})") from None
        if not cells:
            continue
        if header is None:
            header = _csv_header(cells, f"{name}:{line}", needed)
        elif len(cells) != len(header):
            raise ManifestError(f"{name}:{line}: {len(cells)} cells where the header has {len(header)}")
        else:
            row = dict(zip(header, cells, strict=True))
            yield line, {key: value for key, value in row.items() if value or key not in _KEYS}


def _csv_header(cells: list[str], where: str, needed: Sequence[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    if "" in header or len(set(header)) < len(header):
        raise ManifestError(f"{where}: a column without a name, or two of one name")
    if not set(header) & set(needed):
        found = _short(", ".join(header))
        commas = ", with commas between its columns" if len(header) == 1 else ""
        raise ManifestError(
            f"{where}: no column {' or '.join(needed)}, but {found}; is the first line the header{commas}?"
        )
    if cased := [name for name in header if name.lower() in _KEYS and name not in _KEYS]:
        logger.warning("%s: %s: known columns are written in lower case; taken for metadata", where, ", ".join(cased))
    return header


def _read_parquet(file: Any, place: _Place, base: str) -> Iterator[Recording]:
    """The rows of a Parquet file: they name their audio, or hold it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        audio = cells.audio_column(table.schema_arrow, AUDIO_KEYS)
        if audio is None:
            for line, row in _parquet_rows(table, range(table.num_row_groups)):
                yield _listed_in(row, base, f"{place.name}:{line}")
        else:
            yield from _read_cells(table, place, base, audio)
    except pa.ArrowException as error:
        raise ManifestError(f"{place.name}: not Parquet ({str(error).splitlines()[0]})") from None
    except ValueError as error:
        raise ManifestError(f"{place.name}: {error}") from None


def _read_cells(table: Any, place: _Place, base: str, audio: Any) -> Iterator[Recording]:
    """The rows of a Parquet file with audio in it, read without that."""
    columns = cells.without_bytes(table.schema_arrow, audio)
    _, etag = identity(place.uri)
    file = place.path if place.is_local else place.uri
    line = 0
    for group in range(table.num_row_groups):
        is_inside = cells.has_bytes(table, group, audio)
        for line, row in _parquet_rows(table, [group], columns, after=line):  # noqa: B020 - goes on counting
            where = f"{place.name}:{line}"
            path = (row.pop(audio.name, None) or {}).get("path")
            if is_inside:
                recording = _in_cell(row, cells.Address(file, audio.name, line), path, where)
                yield replace(recording, etag=etag)
            else:
                yield _listed_in({key: row[key] for key in row if key not in AUDIO_KEYS} | {"path": path}, base, where)


def _in_cell(row: Mapping[str, Any], address: Any, path: str | None, where: str) -> Recording:
    try:
        default = path or f"{default_id(address.file)}#{address.row}"
        return _recording(row, str(address), where, default=default, known=_BESIDE_KEYS | {"offset"})
    except ValueError as error:
        raise ManifestError(f"{where}: {error}") from None


def _parquet_rows(table: Any, groups: Sequence[int], columns: list[str] | None = None, after: int = 0) -> Iterator[Row]:
    import pyarrow as pa

    numbers = [column.name for column in table.schema_arrow if pa.types.is_floating(column.type)]
    batches = table.iter_batches(1024, row_groups=groups, columns=columns)
    for line, row in enumerate((row for batch in batches for row in batch.to_pylist()), after + 1):
        for key in numbers:
            if row[key] != row[key]:  # the NaN that pandas and others write for a missing number
                row[key] = None
        yield line, row


_READERS: dict[str, Callable[[Any, str], Iterator[Row]]] = {".jsonl": _jsonl_rows, ".csv": _csv_rows}
_MANIFESTS = {*_READERS, ".parquet"}


# ---- one line


def _recording(row: Mapping[str, Any], uri: str, where: str, *, default: str, known: Collection[str]) -> Recording:
    """The Recording of one line, its audio at `uri`; keys that are not `known` travel as metadata.

    Raises `ValueError`, its text saying what is wrong with the line.
    """
    duration = _seconds(row, "duration")
    offset = _seconds(row, "offset") if "offset" in known else None
    is_slice = offset is not None
    return Recording(
        id=_id(row) or default,
        uri=uri,
        source=where,
        duration_s=duration,
        offset=samples(offset) if offset is not None else None,
        length=samples(duration) if is_slice and duration is not None else None,
        reference=_text(row, "text"),
        language=_language(row),
        task=_task(row),
        initial_prompt=_text(row, "initial_prompt"),
        metadata=_metadata(row, known),
    )


def _audio_of(row: Mapping[str, Any]) -> str:
    given = [key for key in AUDIO_KEYS if row.get(key) is not None]
    if not given:
        raise ValueError(f"no audio: none of {', '.join(AUDIO_KEYS)}")
    if len(given) > 1:
        raise ValueError(f"both {given[0]} and {given[1]}: which is the audio?")
    value = row[given[0]]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{given[0]}: a path or an address was expected, not {_short(value)}")
    return value


def _id(row: Mapping[str, Any]) -> str | None:
    value = row.get("id")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(f"id: a text was expected, not {_short(value)}")
    return str(value)


def _seconds(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number <= _MAX_SECONDS:
        raise ValueError(f"{key}: seconds from 0 up were expected, not {_short(value)}")
    return number


def _text(row: Mapping[str, Any], key: str) -> str | None:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key}: a text was expected, not {_short(value)}")
    return value


def _language(row: Mapping[str, Any]) -> str | None:
    language = _text(row, "language")
    if language is None:
        return None
    code = language.strip().lower()
    if not LANGUAGE.fullmatch(code):
        raise ValueError(f"language: a code such as 'en' was expected, not {_short(language)}")
    return code


def _task(row: Mapping[str, Any]) -> Task | None:
    task = row.get("task")
    if task is None or task == "transcribe" or task == "translate":
        return cast("Task | None", task)
    raise ValueError(f"task: transcribe or translate was expected, not {_short(task)}")


def _metadata(row: Mapping[str, Any], known: Collection[str]) -> str | None:
    rest = {key: value for key, value in row.items() if key not in known}
    return _JSON.encode(rest) if rest else None


def _plain(value: Any) -> str:
    """Dates and decimal numbers of a table, for JSON."""
    if isinstance(value, bytes):
        raise ValueError("metadata: a column of bytes cannot travel as JSON")
    return str(value)


_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=False, allow_nan=False, default=_plain)


def resolve(value: str, base: str) -> str:
    """The uri that a line's `value` means, in a manifest that lies in the folder `base`."""
    scheme, mark, path = value.partition("://")
    if mark:
        if scheme.lower() in ("file", "local") and "::" not in value:
            return os.path.abspath(path)
        if "::" not in value and scheme in _protocols():
            return value  # nearly all: said at once, since there may be millions
        if unknown := [name for name in re.findall(r"([\w+.-]+)://", value) if name.lower() not in _protocols()]:
            raise ValueError(f"nothing is known that opens {unknown[0]}://")
        return value
    return os.path.normpath(value) if value.startswith("/") else _join(base, value)


@functools.cache
def _protocols() -> frozenset[str]:
    return frozenset([*fsspec.available_protocols(), "parquet"])


def folder_of(uri: str) -> str:
    """s3://b/m/a.jsonl → s3://b/m; the query of an address, a signature usually, is the manifest's alone."""
    first, *outer = uri.split("::")
    first = first.partition("?")[0] if _is_http(first) else first
    scheme, _, path = first.partition("://")
    return "::".join([f"{scheme}://{posixpath.dirname(path)}", *outer])


def _join(base: str, relative: str) -> str:
    first, *outer = base.split("::")
    scheme, mark, folder = first.partition("://")
    if not mark:
        return os.path.normpath(os.path.join(base, relative))
    path = f"{folder}/{relative}" if folder else relative
    if {".", ".."} & set(relative.split("/")):  # otherwise kept: "a//b" is a name of its own in an object store
        host, _, path = path.partition("/")
        path = f"{host}{posixpath.normpath('/' + path)}"
    return "::".join([f"{scheme}://{path}", *outer])
