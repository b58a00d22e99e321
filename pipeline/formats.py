"""A Transcript as text, subtitles (srt, vtt), tab-separated values or a JSON object. Pure.

Subtitles have one cue per segment here; `pipeline.subtitles` makes cues that fit a screen.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.types import Segment, Transcript, seconds

_ARROW = re.compile(r"-{2,}>")  # also a longer one, whose rest would be one again
_BREAKS = re.compile(r"[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")

MEDIA_TYPES = {
    "txt": "text/plain; charset=utf-8",
    "srt": "application/x-subrip; charset=utf-8",
    "vtt": "text/vtt; charset=utf-8",
    "tsv": "text/tab-separated-values; charset=utf-8",
    "json": "application/json",
}


@dataclass(frozen=True, slots=True)
class Cue:
    """What a player shows from `start` to `end`, in seconds; `lines` hold no line break."""

    start: float
    end: float
    lines: tuple[str, ...]


def to_txt(transcript: Transcript) -> str:
    """One line per segment; nothing for no speech."""
    return "".join(f"{one_line(segment.text)}\n" for segment in transcript.segments)


def to_srt(transcript: Transcript) -> str:
    """SubRip, one cue per segment."""
    return srt(_cues(transcript))


def to_vtt(transcript: Transcript) -> str:
    """WebVTT, one cue per segment."""
    return vtt(_cues(transcript))


def srt(cues: Iterable[Cue]) -> str:
    """SubRip: cues counted from 1. Its text has no escapes; only an arrow could be taken for times."""
    return "\n".join(
        f"{number}\n{_times(cue, ',')}\n{_ARROW.sub('->', _lines(cue))}\n" for number, cue in enumerate(cues, start=1)
    )


def vtt(cues: Iterable[Cue]) -> str:
    """WebVTT: text escaped, so that what was said can be neither a tag nor a timing line."""
    return "WEBVTT\n" + "".join(f"\n{_times(cue, '.')}\n{html.escape(_lines(cue), quote=False)}\n" for cue in cues)


def to_tsv(transcript: Transcript) -> str:
    """start, end (whole milliseconds) and text, with a heading line."""
    rows = (f"{_ms(segment.start)}\t{_ms(segment.end)}\t{one_line(segment.text)}\n" for segment in transcript.segments)
    return "start\tend\ttext\n" + "".join(rows)


def to_json(transcript: Transcript) -> str:
    """`verbose` as one line of JSON."""
    return json.dumps(verbose(transcript), ensure_ascii=False, allow_nan=False) + "\n"


FORMATS: dict[str, Callable[[Transcript], str]] = {
    "txt": to_txt,
    "srt": to_srt,
    "vtt": to_vtt,
    "tsv": to_tsv,
    "json": to_json,
}


def verbose(transcript: Transcript, task: str = "transcribe") -> dict[str, Any]:
    """Plain values as in OpenAI's verbose_json (`language` is a code here, not a name); times in seconds."""
    return {
        "task": transcript.recording.task or task,
        "language": transcript.language,
        "duration": seconds(transcript.duration),
        "text": transcript.text,
        "segments": [_verbose_segment(number, segment) for number, segment in enumerate(transcript.segments)],
        "words": list(_verbose_words(transcript)),
    }


def timestamp(seconds: float, point: str = ".") -> str:
    """`HH:MM:SS.mmm`, rounded to the millisecond; hours grow beyond two digits. Raises `ValueError` below 0."""
    if not seconds >= 0:
        raise ValueError(f"a time of {seconds} s")
    rest, ms = divmod(_ms(seconds), 1000)
    rest, s = divmod(rest, 60)
    hours, minutes = divmod(rest, 60)
    return f"{hours:02d}:{minutes:02d}:{s:02d}{point}{ms:03d}"


def _verbose_segment(number: int, segment: Segment) -> dict[str, Any]:
    return {
        "id": number,
        "seek": round(segment.start * 100),  # in frames of 10 ms, as the reference counts
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "tokens": list(segment.tokens),
        "temperature": segment.temperature,
        "avg_logprob": segment.avg_logprob,
        "compression_ratio": segment.compression_ratio,
        "no_speech_prob": segment.no_speech_prob,
    }


def _verbose_words(transcript: Transcript) -> Iterator[dict[str, Any]]:
    for segment in transcript.segments:
        for word in segment.words:
            yield {"word": word.word.strip(), "start": word.start, "end": word.end, "probability": word.probability}


def _cues(transcript: Transcript) -> Iterator[Cue]:
    for segment in transcript.segments:
        yield Cue(segment.start, segment.end, (one_line(segment.text),))


def _times(cue: Cue, point: str) -> str:
    return f"{timestamp(cue.start, point)} --> {timestamp(cue.end, point)}"


def _lines(cue: Cue) -> str:
    return "\n".join(cue.lines)


def one_line(text: str) -> str:
    """`text` stripped and on one line: a blank line would end a cue, a tab a field."""
    return _BREAKS.sub(" ", text.strip())


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
