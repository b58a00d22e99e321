"""The nouns of Murmuration, from one file of audio to its transcript.

    Recording ──decode──▶ Unit ──plan──▶ Span ──engine──▶ Hypothesis ──stitch──▶ UnitResult ──stitch──▶ Transcript

A type here carries data and a few derived properties, no behaviour. Inside, time is a whole number of samples
at 16 kHz and every range is half-open, `[start, stop)`; seconds are floats and appear only in `Segment`, `Word`
and `Transcript`. This module imports numpy and nothing of ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE = 16_000
VAD_FRAME = 512  # samples; Silero's hop at 16 kHz, 32 ms. Unit and span cuts lie on multiples of it.

MAX_CHANNELS = 8  # that are transcribed apart: 7.1

LANGUAGE = re.compile("[a-z]{2,3}|window")  # what a model's code looks like; which ones it has, its vocabulary says

Algorithm = Literal["windows", "sequential"]
Task = Literal["transcribe", "translate"]
Status = Literal["ok", "failed", "skipped"]
Pcm = NDArray[np.int16]


def seconds(samples: int) -> float:
    """Samples at 16 kHz as seconds: the one place where the one becomes the other."""
    return samples / SAMPLE_RATE


def samples(seconds: float) -> int:
    """Seconds as the nearest whole number of samples at 16 kHz."""
    return round(seconds * SAMPLE_RATE)


@dataclass(frozen=True, slots=True)
class Recording:
    """One audio file, or a slice of one, that a manifest names: the grain of the result tables."""

    id: str
    uri: str  # where the bytes are; may hold a signature, so log `public_uri` of `pipeline.manifest`, never this
    source: str = ""  # where it was listed, for messages: "calls.jsonl:12"
    size: int | None = None  # bytes, where a listing told us
    etag: str | None = None  # the store's version mark, where a listing told us
    duration_s: float | None = None  # a hint for planning; never trusted
    offset: int | None = None  # a slice starts here ...
    length: int | None = None  # ... and is this long; None: to the end
    reference: str | None = None  # the manifest's `text`
    language: str | None = None  # these three override the run's options
    task: Task | None = None
    initial_prompt: str | None = None
    metadata: str | None = None  # the manifest's other keys, as one JSON object


@dataclass(frozen=True, slots=True)
class Range:
    """A half-open range of samples, `[start, stop)`."""

    start: int
    stop: int

    @property
    def n_samples(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Skip:
    """Samples of a recording that no decoder has looked at, and why."""

    start: int
    stop: int
    reason: str  # "silence", or the `kind` of the error that lost them

    @property
    def n_samples(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of wall clock that one Unit took, by stage; None: not measured. To be shown, never to decide by."""

    source_s: float | None = None  # waiting for the store
    decode_s: float | None = None  # from bytes to samples
    vad_s: float | None = None
    engine_s: float | None = None  # from being handed in to its result, beside all others in the batch


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """Consecutive audio of one recording, cut in silence: the row that travels through Ray and is committed."""

    recording: Recording
    index: int  # 0, 1, 2 ... within the recording
    start: int  # its first sample within the recording (or slice)
    pcm: Pcm  # int16 [n], 16 kHz; [c, n] where channels are transcribed apart, see `pipeline.channels`
    is_last: bool
    # [ceil(n / VAD_FRAME)] (or that of each channel) speech probability x 255; None: no VAD was run
    speech: NDArray[np.uint8] | None = None
    language_pcm: Pcm | None = None  # the recording's first speech, if it lies in an earlier Unit; else None
    flags: tuple[str, ...] = ()
    attempts: int = 1  # how often its source was asked, or its decoder was started, until the audio was there
    spent: Spent | None = None

    @property
    def n_samples(self) -> int:
        return int(self.pcm.shape[-1])


@dataclass(frozen=True, slots=True)
class Plan:
    """How a Unit is decoded: `spans` and `skipped` together cover `[0, n)` of it, in order, without overlap."""

    spans: tuple[Range, ...]
    skipped: tuple[Skip, ...]


@dataclass(frozen=True, slots=True)
class Word:
    """One word with its times in seconds. `word` is raw: a leading space where the tokenizer put one."""

    word: str
    start: float
    end: float
    probability: float


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of text between two timestamps, in seconds. `text` is raw token text, usually with a leading space."""

    start: float
    end: float
    text: str
    tokens: tuple[int, ...]
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    temperature: float
    language: str | None = None
    language_probability: float | None = None
    words: tuple[Word, ...] = ()
    flags: tuple[str, ...] = ()
    channel: int = 0


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """The engine's answer for one span of audio (usually one Window); times are relative to the span's start."""

    segments: tuple[Segment, ...]
    language: str | None
    language_probability: float | None
    n_windows: int = 1  # encoder inputs looked at
    n_fallbacks: int = 0  # decodes repeated at a higher temperature
    tokens_generated: int = 0
    tokens_input: int = 0  # prompt tokens fed


@dataclass(frozen=True, slots=True)
class Failure:
    """Why something has no transcript. `kind` is the stable name of an error class in `pipeline.errors`."""

    kind: str
    message: str
    stage: str  # "manifest", "decode", "engine" or "sink"
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class UnitResult:
    """What became of one Unit: the row that is committed. Times are absolute within the recording."""

    recording: Recording
    index: int
    is_last: bool
    start: int  # samples
    n_samples: int
    segments: tuple[Segment, ...] = ()
    skipped: tuple[Skip, ...] = ()
    speech: int | None = None  # samples the VAD called speech; None: no VAD was run
    uncovered_speech: int | None = None  # of those, how many no segment covers
    language: str | None = None
    language_probability: float | None = None
    n_windows: int = 0
    n_fallbacks: int = 0
    tokens_generated: int = 0
    tokens_input: int = 0
    flags: tuple[str, ...] = ()
    failure: Failure | None = None
    attempts: int = 1  # its Unit's; a failure counts its own
    spent: Spent | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Transcript:
    """All that is known of one recording: a row of `recordings` with its segments and words."""

    recording: Recording
    status: Status
    segments: tuple[Segment, ...] = ()
    language: str | None = None
    language_probability: float | None = None
    duration: int = 0  # samples, as decoded
    skipped: tuple[Skip, ...] = ()
    speech: int | None = None
    uncovered_speech: int | None = None
    n_windows: int = 0
    n_fallbacks: int = 0
    tokens_generated: int = 0
    tokens_input: int = 0
    flags: tuple[str, ...] = ()
    failure: Failure | None = None
    attempts: int = 1  # the most that any of its Units took

    @property
    def text(self) -> str:
        """The raw text of all segments joined as the tokenizer wrote it, then stripped."""
        return "".join(segment.text for segment in self.segments).strip()

    @property
    def n_skipped(self) -> int:
        return sum(skip.n_samples for skip in self.skipped)

    @property
    def n_words(self) -> int:
        return sum(len(segment.words) for segment in self.segments)


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """The options of one request. Field names are openai/whisper's where it has the option.

    `temperature` 0 with `temperature_fallback` climbs 0, 0.2 ... 1 on failed checks; x > 0 means x only.
    """

    algorithm: Algorithm = "windows"
    chunk_length_s: int = 30  # 1 ... 30
    task: Task = "transcribe"
    language: str | None = None  # None: detected once per recording; "window": for every window
    initial_prompt: str | None = None
    carry_initial_prompt: bool = False
    temperature: float = 0.0
    temperature_fallback: bool = True
    best_of: int | None = None  # candidates where temperature > 0
    beam_size: int | None = None
    patience: float | None = None
    length_penalty: float | None = None
    compression_ratio_threshold: float | None = 2.4
    logprob_threshold: float | None = -1.0
    no_speech_threshold: float | None = 0.6
    condition_on_previous_text: bool = True  # `sequential` only; `windows` carries no history
    suppress_tokens: tuple[int, ...] = (-1,)  # -1 stands for the non-speech symbols
    max_tokens: int | None = None  # per window; None: 224, half the text context
    word_timestamps: bool = False
    hallucination_silence_threshold: float | None = None  # seconds; `sequential` with words only
    clip_timestamps: tuple[float, ...] = field(default=(0.0,))  # seconds; `sequential` only
    hotwords: str | None = None
