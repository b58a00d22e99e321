"""A Transcript as text, subtitles (srt, vtt), tab-separated values or a JSON object. Pure."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterator
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


def to_txt(transcript: Transcript) -> str:
    """One line per segment; nothing for no speech."""
    return "".join(f"{_line(segment)}\n" for segment in transcript.segments)


def to_srt(transcript: Transcript) -> str:
    """SubRip: one cue per segment, counted from 1. Its text has no escapes; only an arrow could be taken for times."""
    cues = [
        f"{number}\n{_times(segment, ',')}\n{_ARROW.sub('->', _line(segment))}\n"
        for number, segment in enumerate(transcript.segments, start=1)
    ]
    return "\n".join(cues)


def to_vtt(transcript: Transcript) -> str:
    """WebVTT: one cue per segment, text escaped, so that what was said can be neither a tag nor a timing line."""
    cues = (
        f"\n{_times(segment, '.')}\n{html.escape(_line(segment), quote=False)}\n" for segment in transcript.segments
    )
    return "WEBVTT\n" + "".join(cues)


def to_tsv(transcript: Transcript) -> str:
    """start, end (whole milliseconds) and text, with a heading line."""
    rows = (f"{_ms(segment.start)}\t{_ms(segment.end)}\t{_line(segment)}\n" for segment in transcript.segments)
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


def _times(segment: Segment, point: str) -> str:
    return f"{timestamp(segment.start, point)} --> {timestamp(segment.end, point)}"


def _line(segment: Segment) -> str:
    """The text on one line: a blank line would end a cue, a tab a field."""
    return _BREAKS.sub(" ", segment.text.strip())


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
