"""Ours beside openai-whisper on the same samples, decode by decode: `compare` says equal, a near-tie, different, or
that the reference stood still.

The reference is run as it is. Watched are its decodes (`Trace`): what each was prompted with, the tokens it chose, and
the gap between the best two tokens at every step, in its own logits after its own filters. Where its temperature is
above 0 it is given our noise, so that both draw the same tokens. `tests/engine` and `tests/benchmarks/parity.py` share
this page.
"""

from __future__ import annotations

import importlib
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any
from unittest import mock

import numpy as np
import torch
import whisper
from torch import Tensor
from whisper.decoding import BeamSearchDecoder, DecodingOptions, DecodingTask

from pipeline.engine import Engine, decoding
from pipeline.engine.decoding import Decode, Sampler, Span, Window, avg_logprob
from pipeline.types import SAMPLE_RATE, DecodeOptions, Pcm, Recording, Unit, UnitResult

NEAR_TIE = 1e-3  # logits: a smaller gap in the reference excuses another token, and is counted
SCORE = 1e-4  # tolerance of a window's figures
# The reference's float32 softmax over 50,000 tokens is itself off by up to 1.1e-4, measured against float64, where the
# demo model's unused tokens, all equally unlikely, add up.
WORD_PROBABILITY = 3e-4
WORD_S = 0.02  # tolerance of words' times
TIME_S = 1e-6  # of segments' times where no word pulled at them

PROMPT = "Anna buys three red apples in Berlin."

# Options to compare under. The demo model is sure of what it hears, so limits are moved to where they decide something.
PROFILES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "words": {"word_timestamps": True},
    "prompt": {"initial_prompt": PROMPT},
    "carried prompt": {"initial_prompt": PROMPT, "carry_initial_prompt": True},
    "endless prompt, carried": {"initial_prompt": " ".join([PROMPT] * 40), "carry_initial_prompt": True},
    "prompt of 223 tokens, carried": {"initial_prompt": " ".join(["a"] * 223), "carry_initial_prompt": True},
    "no history": {"condition_on_previous_text": False, "word_timestamps": True},
    "clips": {"clip_timestamps": (1.5, 6.0, 8.0, 20.0, 25.0), "word_timestamps": True},
    "no thresholds": {
        "compression_ratio_threshold": None, "logprob_threshold": None, "no_speech_threshold": None,
    },
    "ladder": {"logprob_threshold": -0.35, "compression_ratio_threshold": 1.5, "max_tokens": 50},
    "ladder, best of 3": {"logprob_threshold": -0.25, "best_of": 3, "word_timestamps": True, "max_tokens": 40},
    "ladder, silence": {"logprob_threshold": -0.1, "no_speech_threshold": 0.3, "max_tokens": 20},
    "temperature 0.4": {"temperature": 0.4, "word_timestamps": True, "max_tokens": 100},
    "temperature 0.8, best of 4": {"temperature": 0.8, "best_of": 4, "length_penalty": 0.6, "max_tokens": 60},
    "skipped silence": {"logprob_threshold": -0.05, "no_speech_threshold": 0.3, "temperature_fallback": False},
    "anomalies after 0.5 s": {"word_timestamps": True, "hallucination_silence_threshold": 0.5},
    "anomalies after 2 s": {
        "word_timestamps": True, "hallucination_silence_threshold": 2.0, "condition_on_previous_text": False,
    },
    "more suppressed": {"suppress_tokens": (-1, 11, 13, 30)},
    "listed suppressed": {"suppress_tokens": (11, 13)},
    "none suppressed": {"suppress_tokens": ()},
    "translate": {"task": "translate", "word_timestamps": True},
    "short texts": {"max_tokens": 12, "word_timestamps": True},
    "beam 5": {"beam_size": 5},
    "beam 5, words": {"beam_size": 5, "word_timestamps": True, "initial_prompt": PROMPT},
    "beam 5, patience 2": {"beam_size": 5, "patience": 2.0, "length_penalty": 0.8},
    "beam 3, ladder": {
        "beam_size": 3, "best_of": 2, "logprob_threshold": -0.3, "max_tokens": 60, "condition_on_previous_text": False,
    },
}  # fmt: skip

TRANSCRIBE = importlib.import_module("whisper.transcribe")  # `whisper.transcribe` is the function


@dataclass(frozen=True, slots=True)
class Draw:
    """One candidate of a decode: its tokens without the end token, and the reference's gap at every step."""

    tokens: tuple[int, ...]
    gaps: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Attempt:
    """One decode of one window, ours or the reference's."""

    seek: int  # frames
    temperature: float
    prompt: tuple[int, ...]
    chosen: Draw
    candidates: tuple[Draw, ...]
    avg_logprob: float
    no_speech_prob: float


@dataclass(frozen=True, slots=True)
class Language:
    """A language that was guessed."""

    code: str
    probability: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a comparison; `detail` says where the two part."""

    kind: str  # "equal", "near-tie", "different" or "standstill"
    detail: str = ""
    gap: float | None = None


EQUAL = Verdict("equal")


# -- the reference, watched --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Theirs:
    """A run of the reference: its own result, and what it did on the way.

    It stands still where a window's last word ends at the window's beginning: it decodes the window again, perhaps for
    ever. Ours goes on, so the run is ended there, without a result.
    """

    result: dict[str, Any]
    attempts: list[Attempt]
    languages: list[Language]
    stands_still: bool = False


class StandstillError(Exception):
    """The reference is about to decode a window again."""


def transcribe_theirs(model: Any, pcm: Pcm, options: DecodeOptions) -> Theirs:
    """The reference's `transcribe()` with what corresponds to our options."""
    samples = pcm.astype(np.float32) / np.float32(32768)
    with watched(model) as trace, np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Word-level timestamps on translations")
        warnings.filterwarnings("ignore", "__array_wrap__")  # its beam search hands numpy a tensor
        try:
            result: dict[str, Any] = model.transcribe(samples, **reference_options(options))
        except StandstillError:
            return Theirs({"segments": []}, trace.attempts, trace.languages, stands_still=True)
    return Theirs(result, trace.attempts, trace.languages)


def reference_options(options: DecodeOptions) -> dict[str, Any]:
    """Ours in the reference's words."""
    same = (
        "language", "task", "best_of", "beam_size", "patience", "length_penalty", "compression_ratio_threshold",
        "logprob_threshold", "no_speech_threshold", "condition_on_previous_text", "initial_prompt",
        "carry_initial_prompt", "word_timestamps", "hallucination_silence_threshold",
    )  # fmt: skip
    ladder = options.temperature == 0 and options.temperature_fallback
    return {name: getattr(options, name) for name in same} | {
        "temperature": decoding.TEMPERATURES if ladder else options.temperature,
        "clip_timestamps": list(options.clip_timestamps),
        "suppress_tokens": list(options.suppress_tokens),
        "sample_len": options.max_tokens,
        "fp16": False,
    }


def events(theirs: Theirs) -> Counter[str]:
    """What the reference came across, so that a test can say that it tested something."""
    windows = {attempt.seek for attempt in theirs.attempts}
    with_segments = {segment["seek"] for segment in theirs.result["segments"]}
    counts = {
        "decodes": len(theirs.attempts),
        "windows": max(0, len(windows) - 1),  # beyond the first
        "skipped": len(windows - with_segments),  # silence, or not believed
        "fallbacks": len(theirs.attempts) - len(windows),
        "hot": sum(attempt.temperature > 0 for attempt in theirs.attempts),
        "segments": len(theirs.result["segments"]),
        "words": sum(len(segment.get("words", ())) for segment in theirs.result["segments"]),
    }
    return +Counter(counts)


@dataclass(slots=True)
class Trace:
    """What the reference did so far, and where it stands."""

    attempts: list[Attempt] = field(default_factory=list)
    languages: list[Language] = field(default_factory=list)
    seek: int = 0
    tries: int = 0  # of the current window


@contextmanager
def watched(model: Any) -> Iterator[Trace]:
    """While it is open the reference's decodes are noted, and draw with our noise."""
    trace = Trace()
    pad_or_trim, detect = TRANSCRIBE.pad_or_trim, model.detect_language

    def cut(mel: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        trace.seek, trace.tries = int(mel.storage_offset()), 0  # a slice [:, seek:] of the file's mel
        if trace.attempts and trace.seek <= trace.attempts[-1].seek:
            raise StandstillError
        padded: Tensor = pad_or_trim(mel, *args, **kwargs)
        return padded

    def guess(mel: Tensor) -> Any:
        tokens, probabilities = detect(mel)
        code = max(probabilities, key=probabilities.get)
        trace.languages.append(Language(code, probabilities[code]))
        return tokens, probabilities

    class Task(_WatchedTask):
        def __init__(self, model: Any, options: DecodingOptions) -> None:
            super().__init__(model, options, trace)

    with (
        mock.patch.object(TRANSCRIBE, "pad_or_trim", cut),
        mock.patch.object(whisper.decoding, "DecodingTask", Task),
        mock.patch.object(whisper.decoding, "Categorical", _OurDraw),
        mock.patch.object(model, "detect_language", guess, create=True),
    ):
        yield trace


class _WatchedTask(DecodingTask):  # type: ignore[misc]  # the reference has no types
    """The reference's decode of a window; its decoder tells what it saw."""

    def __init__(self, model: Any, options: DecodingOptions, trace: Trace) -> None:
        super().__init__(model, options)
        self.trace = trace
        seeds = [seed_of(trace.seek, trace.tries, i) for i in range(self.n_group)]
        self.watched = _WatchedDecoder(self.decoder, self.sample_begin, options.temperature, seeds)
        self.decoder: Any = self.watched

    def run(self, mel: Tensor) -> list[Any]:
        (result,) = super().run(mel)
        candidates = self.watched.candidates(self.tokenizer.eot)
        attempt = Attempt(
            seek=self.trace.seek,
            temperature=self.options.temperature,
            prompt=tuple(self.initial_tokens),
            chosen=next((c for c in candidates if c.tokens == tuple(result.tokens)), Draw(tuple(result.tokens))),
            candidates=candidates,
            avg_logprob=result.avg_logprob,
            no_speech_prob=result.no_speech_prob,
        )
        self.trace.attempts.append(attempt)
        self.trace.tries += 1
        return [result]


class _WatchedDecoder:
    """Stands before a `TokenDecoder` and notes every step's gap, a row of the batch each."""

    def __init__(self, decoder: Any, sample_begin: int, temperature: float, seeds: list[int]) -> None:
        self._decoder, self._begin, self._temperature, self._seeds = decoder, sample_begin, temperature, seeds
        self._gaps: list[list[float]] = []  # per step, per row
        self._tokens: list[list[int]] = []
        self._finished: list[list[int]] = []

    def reset(self) -> None:
        self._decoder.reset()

    def update(self, tokens: Tensor, logits: Tensor, sum_logprobs: Tensor) -> Any:
        scores = logits
        if self._temperature > 0:
            noise = gumbel(self._seeds, tokens.shape[1] - self._begin, logits.shape[1])
            scores = logits / self._temperature + noise
            _OurDraw.noise = noise
        if isinstance(self._decoder, BeamSearchDecoder):
            self._gaps.append([beam_gap(logits, sum_logprobs, self._decoder)])
        else:
            best = scores.topk(2).values
            self._gaps.append((best[:, 0] - best[:, 1]).tolist())
        grown, completed = self._decoder.update(tokens, logits, sum_logprobs)
        self._tokens = grown[:, self._begin :].tolist()
        return grown, completed

    def finalize(self, tokens: Tensor, sum_logprobs: Tensor) -> Any:
        sequences, sums = self._decoder.finalize(tokens, sum_logprobs)
        if isinstance(self._decoder, BeamSearchDecoder):
            self._tokens = [sequence[self._begin :].tolist() for sequence in sequences[0]]
        return sequences, sums

    def candidates(self, end: int) -> tuple[Draw, ...]:
        shared = isinstance(self._decoder, BeamSearchDecoder)  # hypotheses change places: one column for all
        columns = list(zip(*self._gaps, strict=True))
        rows = [row[: row.index(end)] if end in row else row for row in self._tokens]
        return tuple(Draw(tuple(row), columns[0 if shared else i]) for i, row in enumerate(rows))


def beam_gap(logits: Tensor, sum_logprobs: Tensor, decoder: BeamSearchDecoder) -> float:
    """Between the last hypothesis that the beam keeps and the first that it drops, in summed log-probability."""
    scores = sum_logprobs[:, None] + logits.float().log_softmax(-1)
    if decoder.finished_sequences is None:
        scores = scores[:1]  # all rows are one at first
    scores = scores.index_fill(1, torch.tensor([decoder.eot]), float("-inf"))
    best = scores.flatten().topk(decoder.beam_size + 1).values
    return float(best[-2] - best[-1])


class _OurDraw:
    """Stands for `torch.distributions.Categorical`: the best of logits and our Gumbel noise is a draw from it."""

    noise: Tensor

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    def sample(self) -> Tensor:
        return (self._logits + self.noise).argmax(dim=-1)


def seed_of(seek: int, attempt: int, candidate: int) -> int:
    """The random stream that our engine gives this try."""
    window = Window(Span(np.zeros(0, np.int16)), seek, 0)
    return decoding._seed(window, attempt, candidate)


def gumbel(seeds: Sequence[int], step: int, n_vocab: int) -> Tensor:
    """Our noise [rows, n_vocab] at this step of these streams."""
    sampler = Sampler.__new__(Sampler)  # the noise needs nothing else of it
    sampler._seed = torch.tensor(seeds)
    sampler.count = torch.full((len(seeds),), step)
    return sampler._gumbel(torch.arange(len(seeds)), n_vocab)


# -- ours, watched -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Ours:
    """A run of our engine on one recording."""

    result: UnitResult
    attempts: list[Attempt]


def transcribe_ours(engine: Engine, pcms: Sequence[Pcm], options: DecodeOptions) -> list[Ours]:
    """All recordings at once, so that they share the lanes."""
    logs: list[list[Attempt]] = []
    names = [str(i) for i in range(len(pcms))]
    units = [Unit(Recording(name, name), 0, 0, pcm, is_last=True) for name, pcm in zip(names, pcms, strict=True)]
    with mock.patch("pipeline.engine.local.walk", _watched_walk(decoding.walk, logs)):
        results = {result.recording.id: result for result in engine.run(units, options)}
    in_order = iter(logs)  # one without a single sample is not walked through
    return [Ours(results[name], next(in_order) if len(pcm) else []) for name, pcm in zip(names, pcms, strict=True)]


def _watched_walk(walk: Callable[..., Any], logs: list[list[Attempt]]) -> Callable[..., Any]:
    """`walk` itself, whose decodes are noted; recordings start in the order they came in."""

    def start(span: Span, options: DecodeOptions, *rest: Any, **named: Any) -> Any:
        log: list[Attempt] = []
        logs.append(log)
        return follow(walk(span, options, *rest, **named), options, log)

    def follow(steps: Any, options: DecodeOptions, log: list[Attempt]) -> Generator[Any, Any, Any]:
        answer = None
        while True:
            try:
                request = steps.send(answer)
            except StopIteration as stop:
                return stop.value
            answer = yield request
            if isinstance(request, Decode):
                log.append(_our_attempt(request, answer, options))

    return start


def _our_attempt(request: Decode, answers: list[Any], options: DecodeOptions) -> Attempt:
    best = max(answers, key=lambda answer: decoding._rank(answer, options.length_penalty))
    return Attempt(
        seek=request.window.seek,
        temperature=request.temperature,
        prompt=tuple(request.prompt),
        chosen=Draw(tuple(best.tokens)),
        candidates=tuple(Draw(tuple(answer.tokens)) for answer in answers),
        avg_logprob=avg_logprob(best),
        no_speech_prob=best.no_speech_prob,
    )


def profile(name: str, **more: Any) -> DecodeOptions:
    """One of `PROFILES` as `sequential` options."""
    return DecodeOptions(algorithm="sequential", **PROFILES[name] | more)


# -- the comparison ----------------------------------------------------------------------------------------------------


def side_by_side(engine: Engine, model: Any, pcms: Sequence[Pcm], options: DecodeOptions) -> list[tuple[Ours, Theirs]]:
    """All of ours at once, then the reference's one after the other."""
    ours = transcribe_ours(engine, pcms, options)
    return [(mine, transcribe_theirs(model, pcm, options)) for mine, pcm in zip(ours, pcms, strict=True)]


def assert_equal(pairs: Sequence[tuple[Ours, Theirs]]) -> None:
    """Not even a near-tie."""
    assert [compare(mine, its) for mine, its in pairs] == [EQUAL] * len(pairs)


def compare(ours: Ours, theirs: Theirs) -> Verdict:
    """Decode by decode, then what is published. A near-tie excuses all that follows from it in the recording."""
    if ours.result.failure is not None:
        return Verdict("different", f"ours failed: {ours.result.failure.message}")
    if theirs.languages:
        verdict = compare_languages(ours.result, theirs.languages[0])
        if verdict != EQUAL:
            return verdict
    decodes = ours.attempts[: len(theirs.attempts)] if theirs.stands_still else ours.attempts
    for i, (mine, its) in enumerate(zip_longest(decodes, theirs.attempts)):
        verdict = compare_attempts(mine, its)
        if verdict != EQUAL:
            return Verdict(verdict.kind, f"decode {i}: {verdict.detail}", verdict.gap)
    if theirs.stands_still:
        return Verdict("standstill", f"equal up to frame {theirs.attempts[-1].seek}, which the reference decodes again")
    lines = list(differing_segments(ours.result, theirs.result))
    return Verdict("different", "; ".join(lines)) if lines else EQUAL


def compare_languages(result: UnitResult, guess: Language) -> Verdict:
    probability = result.language_probability
    if result.language == guess.code and probability is not None and abs(probability - guess.probability) <= SCORE:
        return EQUAL
    return Verdict(
        "different",
        f"language {result.language} {probability}, the reference {guess.code} {guess.probability}",
    )


def compare_attempts(mine: Attempt | None, its: Attempt | None) -> Verdict:
    if mine is None or its is None:
        return Verdict("different", "only one of the two decodes again")
    place = f"window at frame {its.seek}, temperature {its.temperature}"
    for name in ("seek", "temperature", "prompt"):
        a, b = getattr(mine, name), getattr(its, name)
        if a != b:
            return Verdict("different", f"{place}: {name} {a}, the reference {b}")
    if mine.chosen.tokens != its.chosen.tokens:
        return excuse(mine, its, place)
    for name in ("avg_logprob", "no_speech_prob"):
        a, b = getattr(mine, name), getattr(its, name)
        if not abs(a - b) <= SCORE:
            return Verdict("different", f"{place}: {name} {a}, the reference {b}")
    return EQUAL


def excuse(mine: Attempt, its: Attempt, place: str) -> Verdict:
    """Other tokens are excused if every candidate of the reference's that we do not have parted at a near-tie."""
    drawn = {draw.tokens for draw in mine.candidates}
    lost = [draw for draw in its.candidates if draw.tokens not in drawn]
    if not lost:
        return Verdict("different", f"{place}: another of the same candidates was chosen")
    parted = [first_difference(draw, mine.candidates) for draw in lost]
    step, gap = max(parted, key=lambda at: at[1])
    kind = "near-tie" if gap < NEAR_TIE else "different"
    return Verdict(kind, f"{place}: other tokens from step {step}, where the reference's gap is {gap:.6f}", gap)


def first_difference(draw: Draw, others: Sequence[Draw]) -> tuple[int, float]:
    """The step where the most similar of `others` takes another token, and the reference's gap there."""
    step = max(_common_prefix(draw.tokens, other.tokens) for other in others)
    return step, draw.gaps[step] if step < len(draw.gaps) else float("inf")


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def differing_segments(result: UnitResult, expected: dict[str, Any]) -> Iterator[str]:
    """What is published against the reference's segments.

    Two divergences are meant: the reference keeps cleared segments as empty ones, and times past the end of the audio,
    which a model made up, are the end with us.
    """
    end_s = result.n_samples / SAMPLE_RATE
    if result.language != expected["language"]:
        yield f"language {result.language}, the reference {expected['language']}"
    mine = [segment for segment in result.segments if segment.tokens]
    its = [segment for segment in expected["segments"] if segment["tokens"]]
    if [list(segment.tokens) for segment in mine] != [segment["tokens"] for segment in its]:
        yield f"{len(mine)} segments with other tokens than the reference's {len(its)}"
        return
    for segment, other in zip(mine, its, strict=True):
        place = f"segment at {other['start']:.2f} s"
        if segment.text != other["text"]:
            yield f"{place}: text {segment.text!r}, the reference {other['text']!r}"
        tolerance = WORD_S if other.get("words") else TIME_S
        for name in ("start", "end"):
            if abs(getattr(segment, name) - min(other[name], end_s)) > tolerance + 1e-9:
                yield f"{place}: {name} {getattr(segment, name)}, the reference {other[name]}"
        for name in ("avg_logprob", "no_speech_prob", "compression_ratio", "temperature"):
            if not abs(getattr(segment, name) - other[name]) <= SCORE:
                yield f"{place}: {name} {getattr(segment, name)}, the reference {other[name]}"
        yield from _differing_words(segment.words, other.get("words", []), place, end_s)


def _differing_words(mine: Sequence[Any], its: Sequence[dict[str, Any]], place: str, end_s: float) -> Iterator[str]:
    if [word.word for word in mine] != [word["word"] for word in its]:
        yield f"{place}: other words"
        return
    for word, other in zip(mine, its, strict=True):
        for name in ("start", "end"):
            if abs(getattr(word, name) - min(other[name], end_s)) > WORD_S + 1e-9:
                yield f"{place}: {name} of {word.word!r} {getattr(word, name)}, the reference {other[name]}"
        if not abs(word.probability - other["probability"]) <= WORD_PROBABILITY:
            yield f"{place}: probability of {word.word!r} {word.probability}, the reference {other['probability']}"
