"""What was really said: the text of a recording's reference, and where they are known its language and word times.

They come from the `reference` and `metadata` columns of an output (the manifest's `text` and its other keys), or from
a file of their own. A manifest's `language` tells the model what to write, so the language that a reference is in has
a key of its own, `spoken_language`; in a file of references `language` means the same. `words` is a list of
`{"word", "start", "end"}`, in seconds of the recording.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.errors import ManifestError
from pipeline.manifest import read_references


class SpokenWord(NamedTuple):
    """A word and its times in seconds."""

    word: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Reference:
    """What was said in one recording."""

    text: str
    language: str | None = None
    words: tuple[SpokenWord, ...] = ()


def from_file(file: str) -> dict[str, Reference]:
    """The references of a file, by recording. Lines without a text are left out.

    Raises `ManifestError` for a file that cannot be read, a doubled id, `words` that are none, or no text at all.
    """
    found: dict[str, Reference] = {}
    places: dict[str, str] = {}
    for line in read_references(file):
        if line.id in places:
            raise ManifestError(f"the id {line.id!r} is given twice: {places[line.id]} and {line.source}")
        places[line.id] = line.source
        if line.reference is not None:
            about = _about(line.metadata)
            try:
                words = _words(about.get("words"))
            except ValueError as error:
                raise ManifestError(f"{line.source}: {error}") from None
            found[line.id] = Reference(line.reference, line.language or _language(about), words)
    if not found:
        raise ManifestError(f"{file}: no line has a text: `id` and `text` are what a reference is made of")
    return found


def from_row(row: Mapping[str, Any]) -> Reference | None:
    """The reference of a row of `recordings` (columns `reference` and `metadata`); None where there is none.

    Metadata is the user's: `words` that look otherwise mean something else there.
    """
    if row["reference"] is None:
        return None
    about = _about(row["metadata"])
    try:
        words = _words(about.get("words"))
    except ValueError:
        words = ()
    return Reference(row["reference"], _language(about), words)


def _about(metadata: str | None) -> Mapping[str, Any]:
    if metadata is None or ('"words"' not in metadata and '"spoken_language"' not in metadata):
        return {}
    about = json.loads(metadata)
    return about if isinstance(about, dict) else {}


def _language(about: Mapping[str, Any]) -> str | None:
    language = about.get("spoken_language")
    return language.strip().lower() or None if isinstance(language, str) else None


def _words(value: Any) -> tuple[SpokenWord, ...]:
    """Raises `ValueError` with what is wrong. A CSV's cell holds them as JSON."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError("words: JSON was expected") from None
    if value is None or value == "":
        return ()
    if not isinstance(value, list):
        raise ValueError("words: a list was expected")
    return tuple(_checked(value))


def _checked(words: list[Any]) -> Iterator[SpokenWord]:
    for number, word in enumerate(words):
        if not isinstance(word, Mapping):
            raise ValueError(f"words[{number}]: word, start and end were expected")
        text, start, end = (word.get(key) for key in ("word", "start", "end"))
        if not isinstance(text, str):
            raise ValueError(f"words[{number}].word: a text was expected")
        yield SpokenWord(text.strip(), _seconds(start, number), _seconds(end, number))


def _seconds(value: Any, number: int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"words[{number}]: start and end in seconds were expected")
    return float(value)
