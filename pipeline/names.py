"""A recording's id as a file name that every file system takes, and back. Pure.

Percent-encoding, as in addresses: letters, digits and `-_.` stay, and so does what is printable in other scripts; all
else is written as `%XX` of its UTF-8, so that no separator, blank, control or wildcard is left. Not plain either: a
leading dot or dash, the names that Windows keeps for devices, and all beyond ASCII in an id that is not in NFC, which
some file systems would make another one. What stands behind a `~`, which no id leaves plain, is ours:

    call%20%2342.srt          the id `call #42`
    Call~u1f0c2d9a.srt        one of several ids that a file system blind to case or composition would take for one
    s3%3A%2F%2F...~x8 bytes   an id too long for a name: cut, and to be found in the index alone

Or as the audio lies in its folder, for a player that looks for `calls/a talk.srt` where it plays `calls/a talk.mp3`:
such names are the audio's own, which its file system took, and only the index leads back from them.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from itertools import accumulate
from urllib.parse import unquote

MAX_BYTES = 255  # of a name on ext4, XFS, APFS; NTFS counts UTF-16 units, which are never more

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")
_DEVICES = re.compile(r"(?:con|prn|aux|nul|(?:com|lpt)[0-9¹²³])(?:\.|$)", re.IGNORECASE)
_TOLD_APART, _CUT = "u", "x"


def file_name(recording_id: str, ending: str, *, told_apart: bool = False) -> str:
    """The name of a recording's file, at most `MAX_BYTES` long; `ending` is `.srt` or, of a channel, `~1.srt`.

    `told_apart`: with a hash of the id, for ids that `folded` gives the same text.
    """
    pieces = _pieces(recording_id)
    ending = f"~{_TOLD_APART}{_hash(recording_id, 4)}{ending}" if told_apart else ending
    if len("".join(pieces).encode()) + len(ending) > MAX_BYTES:
        ending = f"~{_CUT}{_hash(recording_id, 8)}{ending}"
        sizes = accumulate(len(piece.encode()) for piece in pieces)
        pieces = [piece for piece, size in zip(pieces, sizes, strict=True) if size + len(ending) <= MAX_BYTES]
    return "".join(pieces) + ending


def recording_id(name: str) -> str | None:
    """The id that `file_name` made `name` of; None where it had to be cut."""
    stem, *marks = name.rpartition(".")[0].split("~")
    if any(mark.startswith(_CUT) for mark in marks):
        return None
    return unquote(stem, errors="surrogatepass")


def folded(recording_id: str) -> str:
    """What is left of a name where neither case nor composition counts: the same for ids that need telling apart."""
    return folded_path("".join(_pieces(recording_id)))


def folded_path(path: str) -> str:
    """The same for a name that is already one."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", path).casefold())


def beside(path: str) -> tuple[str, str]:
    """What a file that lies as the audio at `path` may be named, without its ending: without the audio's extension,
    or, where that is another's name too, with it. `path` is relative, with slashes."""
    folder, slash, name = path.rpartition("/")
    stem = name.rpartition(".")[0]
    return f"{folder}{slash}{stem or name}", path


def path_name(path: str, recording_id: str, ending: str, *, told_apart: bool = False) -> str:
    """The path of a recording's file: one that `beside` gave, and `ending`; told apart and cut as in `file_name`."""
    ending = f"~{_TOLD_APART}{_hash(recording_id, 4)}{ending}" if told_apart else ending
    folder, slash, name = path.rpartition("/")
    if len(name.encode("utf-8", "surrogatepass")) + len(ending) > MAX_BYTES:
        ending = f"~{_CUT}{_hash(recording_id, 8)}{ending}"
        name = name.encode("utf-8", "surrogatepass")[: MAX_BYTES - len(ending)].decode("utf-8", "ignore")
    return f"{folder}{slash}{name}{ending}"


def _pieces(text: str) -> list[str]:
    """A character or its `%XX` each: what a name can be cut between."""
    composed = unicodedata.is_normalized("NFC", text)
    pieces = [c if c in _PLAIN or (composed and not c.isascii() and c.isprintable()) else _percent(c) for c in text]
    if text.startswith((".", "-")) or _DEVICES.match(text):
        pieces[0] = _percent(text[0])
    return pieces


def _percent(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))


def _hash(text: str, size: int) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).hexdigest()
