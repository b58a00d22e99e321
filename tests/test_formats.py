"""Transcripts as text, subtitles, values and JSON, read back as a player or a program would."""

from __future__ import annotations

import json
import re

import pytest
from commits import ok, segment

from pipeline.formats import FORMATS, MEDIA_TYPES, timestamp, to_json, to_srt, to_tsv, to_txt, to_vtt, verbose
from pipeline.stitch import stitch
from pipeline.types import Recording, Segment, Transcript

EMPTY = Transcript(Recording("empty", "empty.wav"), "ok")
TALK = stitch(
    [
        ok(
            "talk",
            segments=(segment(" Hello <b>you</b> & me.", words=True), segment(" two\tlines\nand\u2028more ", 2.5)),
        ),
    ]
)


def said(*segments: Segment) -> Transcript:
    return Transcript(Recording("x", "x.wav"), "ok", segments=segments)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "00:00:00.000"),
        (0.0004, "00:00:00.000"),
        (0.0006, "00:00:00.001"),
        (59.9996, "00:01:00.000"),  # rounds into the next minute, not to 59.1000
        (3599.9999, "01:00:00.000"),
        (12.345, "00:00:12.345"),
        (86_399.999, "23:59:59.999"),
        (360_000, "100:00:00.000"),  # a hundred hours: three digits, not a day
    ],
)
def test_timestamps(seconds: float, text: str) -> None:
    assert timestamp(seconds) == text
    assert timestamp(seconds, ",") == text.replace(".", ",")


@pytest.mark.parametrize("seconds", [-0.001, float("nan"), float("inf")])
def test_what_is_no_time_is_refused(seconds: float) -> None:
    with pytest.raises((ValueError, OverflowError)):
        timestamp(seconds)


def test_txt() -> None:
    assert to_txt(TALK) == "Hello <b>you</b> & me.\ntwo lines and more\n"


def test_srt_is_what_a_player_reads() -> None:
    cues = to_srt(TALK).rstrip("\n").split("\n\n")
    assert [cue.split("\n") for cue in cues] == [
        ["1", "00:00:00,000 --> 00:00:02,000", "Hello <b>you</b> & me."],
        ["2", "00:00:02,500 --> 00:00:04,500", "two lines and more"],
    ]


def test_vtt_is_escaped() -> None:
    head, *cues = to_vtt(TALK).rstrip("\n").split("\n\n")
    assert head == "WEBVTT"
    assert [cue.split("\n") for cue in cues] == [
        ["00:00:00.000 --> 00:00:02.000", "Hello &lt;b&gt;you&lt;/b&gt; &amp; me."],
        ["00:00:02.500 --> 00:00:04.500", "two lines and more"],
    ]


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        " 00:01 --> 00:02 ",
        "a ---> b --->> c",
        "a\n\nWEBVTT\n\nNOTE x",
        "a\r\n\r\nb",
        "\x85\x85",
    ],
)
def test_no_text_can_leave_its_cue(text: str) -> None:
    transcript = said(segment(text), segment(" end", 5.0))
    for write in (to_vtt, to_srt):
        out = write(transcript)
        assert len(re.findall(r"^\d\d:\d\d:\d\d[.,]\d\d\d --> \d\d:\d\d:\d\d[.,]\d\d\d$", out, re.M)) == 2
        assert out.count("-->") == 2
    assert "<" not in to_vtt(transcript)
    assert [len(line.split("\t")) for line in to_tsv(transcript).splitlines()] == [3, 3, 3]


def test_tsv() -> None:
    assert to_tsv(TALK) == "start\tend\ttext\n0\t2000\tHello <b>you</b> & me.\n2500\t4500\ttwo lines and more\n"


def test_json_is_like_verbose_json() -> None:
    value = json.loads(to_json(TALK))
    assert value == verbose(TALK)
    assert value.keys() == {"task", "language", "duration", "text", "segments", "words"}
    assert (value["task"], value["language"], value["duration"]) == ("transcribe", "en", 10.0)
    assert value["text"] == TALK.text
    assert value["segments"][1] == {
        "id": 1, "seek": 250, "start": 2.5, "end": 4.5, "text": " two\tlines\nand\u2028more ", "tokens": [1, 2, 50364],
        "temperature": 0.0, "avg_logprob": -0.25, "compression_ratio": 1.5, "no_speech_prob": 0.125,
    }  # fmt: skip
    assert [word["word"] for word in value["words"]] == ["Hello", "<b>you</b>", "&", "me."]


def test_a_recording_of_its_own_task_says_so() -> None:
    assert verbose(EMPTY, task="translate")["task"] == "translate"
    own = Transcript(Recording("x", "x.wav", task="translate"), "ok")
    assert verbose(own)["task"] == "translate"


def test_no_speech() -> None:
    assert to_txt(EMPTY) == to_srt(EMPTY) == ""
    assert to_vtt(EMPTY) == "WEBVTT\n"
    assert to_tsv(EMPTY) == "start\tend\ttext\n"
    assert json.loads(to_json(EMPTY)) == {
        "task": "transcribe", "language": None, "duration": 0.0, "text": "", "segments": [], "words": [],
    }  # fmt: skip


def test_a_number_that_json_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json(said(segment(" x", avg_logprob=float("nan"))))


def test_unicode_is_kept() -> None:
    text = " 日本語　テスト — ¿qué? 🎧"  # with an ideographic space, which is text
    for name, write in FORMATS.items():
        assert text.strip() in write(said(segment(text))), name
    assert FORMATS.keys() == MEDIA_TYPES.keys()
