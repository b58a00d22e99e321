"""The method: how a span of audio becomes segments (openai/whisper `transcribe.py` and `decoding.py`, same numbers).

`walk` is the reference's seek loop as a generator. It *yields* what it wants from the device (`Decode`, `Align`,
`DetectLanguage`) and is sent the answer, so the loop reads as if it ran alone while the scheduler batches the wishes
of hundreds of walks. `Sampler` holds the token rules of all lanes as tensors; it has no loop over rows.

This page knows nothing of lanes' memory, threads or requests.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.engine.features import FRAMES_PER_SECOND, HOP, N_FRAMES, Cut, LogMel
from pipeline.engine.language import Heard, follow
from pipeline.engine.timing import CLOSING, OPENING, Draft, WordTiming, frames, last_word_end, place_words
from pipeline.engine.tokens import Tokenizer
from pipeline.errors import NonFiniteError
from pipeline.flags import COVERED_S, MISMATCH, REDECODED, SURELY_HEARD, are_kin, is_too_long
from pipeline.types import SAMPLE_RATE, VAD_FRAME, DecodeOptions, Hypothesis, Pcm, Segment
from pipeline.vad import SPOKEN, SURE_SPEECH, Frames, most_together, voice_s, voiced_s

TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
FRAMES_PER_TOKEN = 2  # a timestamp token is 20 ms
SECONDS_PER_TOKEN = FRAMES_PER_TOKEN / FRAMES_PER_SECOND
MAX_INITIAL_TIMESTAMP = 50  # tokens: the first timestamp is at most 1.0 s
TEXT_CONTEXT = 448  # decoder positions; half of them hold history, half are sampled
FAST_CHARACTERS_PER_S, SLOW_CHARACTERS_PER_S = 20, 10  # what speakers say
CUT_MARGIN_S = 0.5  # text that ends nearer to a cut in running speech may be cut, or made up, itself
DYING_S = 0.1  # a voice may go on so long behind the end that its sentence was given
LATE_S = 0.3  # a sentence may begin so much earlier than the time that it was given
ONSET = 1 * FRAMES_PER_SECOND  # of a short window without speech that is heard again with what follows
PROMPT_CONTEXT = TEXT_CONTEXT // 2 - 1  # tokens of history that fit: 223
RESET_TEMPERATURE = 0.5  # above it a window's text is not fed to the next


# -- what a walk asks of the device ----------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Span:
    """Audio that one walk goes through, and where the 8-decade clamp of its log-mel starts from."""

    pcm: Pcm
    start: int = 0  # its first sample in the recording: seeds the sampling
    global_maximum: bool = False  # the span's own maximum (`sequential`), or each window's (`windows`)
    speech: Frames | None = None  # [ceil(n / VAD_FRAME)] what the voice detector heard; None: nobody is to ask it
    _maximum: float | None = None

    @property
    def content_frames(self) -> int:
        return len(self.pcm) // HOP

    def maximum(self, features: LogMel) -> float | None:
        if self.global_maximum and self._maximum is None:
            self._maximum = features.maximum_of(self.pcm)
        return self._maximum

    def voice_s(self, start_s: float, end_s: float = math.inf) -> float:
        """For how long somebody speaks between the two, by itself: without what was said before, whose last breath it
        may be. See `vad.voice_s`; infinite where there is nobody to ask."""
        return math.inf if self.speech is None else voice_s(self._frames(self.speech, start_s, end_s))

    def voiced_s(self, start_s: float, end_s: float) -> float:
        """Seconds between the two in which there may be a voice; all of them where there is nobody to ask."""
        return end_s - start_s if self.speech is None else voiced_s(self._frames(self.speech, start_s, end_s))

    def next_voice_s(self, start_s: float, end_s: float) -> float | None:
        """When somebody begins to speak between the two who surely says something; None where nobody does, or there is
        nobody to ask."""
        if self.speech is None:
            return None
        sure = self._frames(self.speech, start_s, end_s) >= SURE_SPEECH
        return None if most_together(sure) < SPOKEN else start_s + int(sure.argmax()) * VAD_FRAME / SAMPLE_RATE

    @staticmethod
    def _frames(speech: Frames, start_s: float, end_s: float) -> Frames:
        first = max(0, math.ceil(round(start_s * SAMPLE_RATE) / VAD_FRAME))
        return speech[first : None if end_s == math.inf else max(first, round(end_s * SAMPLE_RATE) // VAD_FRAME)]


@dataclass(slots=True, eq=False)
class Window:
    """One encoder input of a span: frames [seek, seek + n_frames). Encoded once, whatever is asked of it."""

    span: Span
    seek: int
    n_frames: int
    hidden: Tensor | None = None  # [n_audio_ctx, d], once the scheduler has encoded it
    key: bytes | None = None  # names its audio: a language detected on it is remembered under this
    ready: Any = None  # what another stream waits for before it reads `hidden`, see `device.Device.use`

    def mel(self, features: LogMel) -> Tensor:
        return features.window(self.span.pcm, self.seek, self.n_frames, self.span.maximum(features))

    def cut(self, features: LogMel) -> Cut:
        return Cut(self.span.pcm, self.seek, self.n_frames, self.span.maximum(features))

    @property
    def start_s(self) -> float:
        return self.seek * HOP / SAMPLE_RATE

    @property
    def end_s(self) -> float:
        return self.start_s + self.n_frames / FRAMES_PER_SECOND


@dataclass(frozen=True, slots=True, eq=False)
class Decode:
    """Sample text for a window: `seeds` says how many candidates, each with its own random stream."""

    window: Window
    prompt: tuple[int, ...]  # everything up to the first sampled token
    sot_index: int  # where in it <|startoftranscript|> stands
    temperature: float
    seeds: tuple[int, ...]
    suppress: tuple[int, ...]
    max_tokens: int
    beam_size: int | None = None  # a beam search instead of sampling
    patience: float | None = None

    @property
    def most_tokens(self) -> int:
        """Tokens that may be sampled: also no more than leave the context by one, as in the reference."""
        return min(self.max_tokens, TEXT_CONTEXT + 1 - len(self.prompt))


@dataclass(frozen=True, slots=True)
class Decoded:
    """One candidate: its tokens without the end token, the sum of their log-probabilities, end token included."""

    tokens: list[int]
    sum_logprob: float
    no_speech_prob: float
    # The language that the model hears in the window, whatever it was told, and how surely; None: it knows only one.
    heard: tuple[str, float] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Align:
    """Times for the words of a window's text."""

    window: Window
    text_tokens: tuple[int, ...]
    language: str | None
    task: str


@dataclass(frozen=True, slots=True, eq=False)
class DetectLanguage:
    """The likeliest language of a window and its probability; or of `every` one its own, [languages] in float64."""

    window: Window
    every: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Opening:
    """The language that a span's first window was found to be in, and that window, if just it was listened to."""

    language: str
    probability: float
    window: Window | None = None


Request = Decode | Align | DetectLanguage
Walk = Generator[Request, Any, Hypothesis]


# -- the seek loop ---------------------------------------------------------------------------------------


def first_window(span: Span, options: DecodeOptions) -> Window | None:
    """Where a walk through a span of `windows` begins; None: there is nothing to walk through."""
    n_frames = min(options.chunk_length_s * FRAMES_PER_SECOND, span.content_frames)
    return Window(span, 0, n_frames) if n_frames else None


def hear(window: Window) -> Generator[Request, Any, Heard]:
    """How likely each language is in a window."""
    heard: Heard = yield DetectLanguage(window, every=True)
    return heard


def walk(
    span: Span,
    options: DecodeOptions,
    tokenizer: Tokenizer,
    voice: Window | None = None,
    first: bool = True,
    opening: Opening | None = None,
) -> Walk:
    """Goes through a span window by window and returns its Hypothesis, times relative to the span.

    A language that the options leave open is detected on `voice`, or without one on the span's first 30 s, as the
    reference does; or on every window, where the options say so, by the rule of `pipeline.engine.language`: then
    `opening` is what the Unit's other spans made of the first one. `first` says that the span opens its recording:
    `initial_prompt` belongs there.

    A window under 30 s that ends in the middle of its span was cut in running speech, which the reference never does.
    Only what it surely finished is kept, the rest is decoded again from there; where nothing was finished the window
    grows, up to 30 s, so that no word is halved however short `chunk_length_s` is. `sequential` skips a silent one, but
    for its last second: somebody may just have begun to speak.

    `windows` skips silence, and what a span holds of it ahead of the first voice and behind the last one is a margin,
    no more: where `span.speech` knows that nobody speaks, or not for as long as the text takes, what the model hears
    there (a beat of music, a noise that breaks off) is not believed, and there is nothing to decode again. Where it
    knows that somebody goes on speaking behind a window's last text, the window is decoded again from there.
    """
    history = History(tokenizer, options, first)
    each_window = options.language == "window"
    state = _State(language="en" if not tokenizer.multilingual else None if each_window else options.language)
    redecoded = False  # whether the window before had begun a text that this one is to finish
    chunk = options.chunk_length_s * FRAMES_PER_SECOND
    for seek, stop in _clips(options.clip_timestamps, span.content_frames):
        length = chunk
        while seek < stop:
            if not _voice_after_s(span, state.segments, seek * HOP / SAMPLE_RATE):
                break
            window = Window(span, seek, min(length, stop - seek))
            told = opening if state.n_windows == 0 else None
            if told is not None and told.window is not None and told.window.n_frames == window.n_frames:
                window = told.window  # it is encoded
            running_on = seek + window.n_frames < stop and window.n_frames < N_FRAMES
            if each_window and tokenizer.multilingual:
                yield from _follow_language(window, told, tokenizer, state)
            elif state.language is None:
                state.language, state.language_probability = yield DetectLanguage(voice or _opening(window))
            decoded, temperature = yield from _decode_with_fallback(window, history.prompt(), options, tokenizer, state)
            state.n_windows += 1
            drafts, advance, single_ending = _cut(decoded.tokens, window, tokenizer)
            n_begun = len(drafts) + _has_tail(decoded.tokens, drafts, tokenizer)
            silence = _is_silence(decoded, options)
            if running_on and options.algorithm == "sequential" and (silence or _is_empty(decoded, options, tokenizer)):
                seek += max(window.n_frames - ONSET, window.n_frames // 2)
                length, redecoded = chunk, False
                continue
            if running_on:
                advance = 0 if silence else _keep_finished(drafts, window)
                if not advance:
                    length = min(2 * length, N_FRAMES)
                    redecoded = redecoded or not silence
                    continue
            length = chunk
            if silence:
                seek += window.n_frames
                redecoded = False
                continue
            marks = _marks(decoded, None if each_window else state.language), [REDECODED] if redecoded else []
            redecoded = len(drafts) < n_begun
            if options.algorithm == "windows":
                _drop_what_nobody_says(drafts, span, state.segments)
                _clear_empty(drafts)  # before words are timed: asking for words never changes the text
                said = _until_the_voice_goes_on(drafts, window)
                if said < advance:
                    advance, redecoded = said, True
            next_seek, believed = seek + advance, True
            if options.word_timestamps:
                next_seek, believed = yield from _time_words(
                    window, drafts, single_ending, next_seek, options, tokenizer, state
                )
            if believed:
                if options.algorithm == "sequential":
                    _clear_empty(drafts)
                state.segments += _segments(drafts, decoded, temperature, tokenizer, state, *marks)
                history.extend(drafts, temperature)
            # A last word that ends where the window began would never let go of it.
            seek = next_seek if next_seek > seek else seek + window.n_frames
    return state.hypothesis()


def _follow_language(
    window: Window, told: Opening | None, tokenizer: Tokenizer, state: _State
) -> Generator[Request, Any, None]:
    """The language of a window for itself: what was `told` is settled, else it follows the one before."""
    if told is not None:
        state.language, state.language_probability = told.language, told.probability
        return
    heard = yield from hear(window)
    codes = list(tokenizer.languages)
    found = follow(None if state.language is None else codes.index(state.language), heard)
    state.language, state.language_probability = codes[found], float(heard[found])


@dataclass(slots=True)
class _State:
    """What a walk has so far."""

    language: str | None
    language_probability: float | None = None  # None where nobody had to guess
    last_speech_s: float = 0.0
    segments: list[Segment] = field(default_factory=list)
    n_windows: int = 0
    n_fallbacks: int = 0
    tokens_generated: int = 0
    tokens_input: int = 0

    def hypothesis(self) -> Hypothesis:
        """Its language is that of the first text, where each window has its own."""
        first = next((segment for segment in self.segments if segment.text.strip()), self)
        return Hypothesis(
            segments=tuple(self.segments),
            language=first.language,
            language_probability=first.language_probability,
            n_windows=self.n_windows,
            n_fallbacks=self.n_fallbacks,
            tokens_generated=self.tokens_generated,
            tokens_input=self.tokens_input,
        )


class History:
    """The tokens of earlier windows, and which of them the next window is prompted with.

    As in the reference the initial prompt is the oldest history and scrolls out. `windows` carries no history, so
    there it stands before the recording's first window only, or before all with `carry_initial_prompt`. A blank one is
    none (the reference prompts with a space then). Hotwords,
    which the reference does not have, stand before every window's prompt and take their room from the history.
    """

    def __init__(self, tokenizer: Tokenizer, options: DecodeOptions, first: bool) -> None:
        self._hotwords = tokenizer.hotwords(options.hotwords)
        self._context = PROMPT_CONTEXT - len(self._hotwords)
        self._carry = options.carry_initial_prompt
        self._keep = options.condition_on_previous_text and options.algorithm == "sequential"
        prompt = (options.initial_prompt or "").strip()
        self._initial = tokenizer.encode(" " + prompt) if prompt and (first or self._carry) else []
        self._tokens = list(self._initial)
        self._reset = 0  # history before this index is not used

    def prompt(self) -> list[int]:
        if self._carry:
            room = self._context - len(self._initial)
            recent = self._tokens[max(len(self._initial), self._reset) :][-room:]  # -0 keeps all: the reference's quirk
            tokens = self._initial + recent
        else:
            tokens = self._tokens[self._reset :]
        return self._hotwords + tokens[-self._context :]

    def extend(self, drafts: Sequence[Draft], temperature: float) -> None:
        """A window's accepted tokens, timestamps too; not used further after a high temperature."""
        self._tokens += [token for draft in drafts for token in draft.tokens]
        if not self._keep or temperature > RESET_TEMPERATURE:
            self._reset = len(self._tokens)


def _clips(clip_timestamps: Sequence[float], content_frames: int) -> list[tuple[int, int]]:
    """(start, stop) frames; an odd list is closed with the end of the content."""
    points = [frames(t) for t in clip_timestamps] or [0]
    if len(points) % 2:
        points.append(content_frames)
    return [(a, min(b, content_frames)) for a, b in zip(points[::2], points[1::2], strict=True)]


def _opening(window: Window) -> Window:
    """The span's first 30 s, where the reference detects the language whatever the clips are; behind a shorter span
    lies the silence that it appends there, not the zeros that fill up the last window."""
    return window if (window.seek, window.n_frames) == (0, N_FRAMES) else Window(window.span, 0, N_FRAMES)


def _decode_with_fallback(
    window: Window, prompt: Sequence[int], options: DecodeOptions, tokenizer: Tokenizer, state: _State
) -> Generator[Request, Any, tuple[Decoded, float]]:
    """The first temperature whose text passes the checks, else the last one's."""
    sot = tokenizer.sot_sequence(state.language, options.task)
    before = [tokenizer.sot_prev, *prompt] if prompt else []
    ladder = TEMPERATURES if options.temperature == 0 and options.temperature_fallback else (options.temperature,)
    suppress = tuple(tokenizer.suppressed(options.suppress_tokens))
    for attempt, temperature in enumerate(ladder):
        candidates = (options.best_of or 1) if temperature > 0 else 1
        beam_size = options.beam_size if temperature == 0 else None
        answers: list[Decoded] = yield Decode(
            window=window,
            prompt=(*before, *sot),
            sot_index=len(before),
            temperature=temperature,
            seeds=tuple(_seed(window, attempt, i) for i in range(candidates)),
            suppress=suppress,
            max_tokens=options.max_tokens or TEXT_CONTEXT // 2,
            beam_size=beam_size,
            patience=options.patience if beam_size else None,
        )
        decoded = max(answers, key=lambda a: _rank(a, options.length_penalty))
        state.tokens_input += len(before) + len(sot)
        if not _needs_fallback(decoded, options, tokenizer):
            break
    state.n_fallbacks += attempt
    state.tokens_generated += len(decoded.tokens) + 1
    return decoded, temperature


def _seed(window: Window, attempt: int, candidate: int) -> int:
    """A random stream's name: where in the recording, which try, which candidate; never whose request it is."""
    text = f"{window.span.start} {window.seek} {attempt} {candidate}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "little")


def _rank(decoded: Decoded, length_penalty: float | None) -> float:
    """The score candidates compete by: mean log-probability, or Google's length penalty."""
    length = len(decoded.tokens)
    penalty = length if length_penalty is None else ((5 + length) / 6) ** length_penalty
    return decoded.sum_logprob / penalty if penalty else float("-inf")


def avg_logprob(decoded: Decoded) -> float:
    return decoded.sum_logprob / (len(decoded.tokens) + 1)


def compression_ratio(text: str) -> float:
    """Bytes of the text over bytes of its zlib form: far above 2 for text that repeats itself."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))


def _repetition(decoded: Decoded, tokenizer: Tokenizer) -> float:
    """The compression ratio of a window's text, as the reference takes it: all of it, stripped, a language token that
    was sampled by its name."""
    return compression_ratio(tokenizer.decode_with_names(decoded.tokens).strip())


def _needs_fallback(decoded: Decoded, options: DecodeOptions, tokenizer: Tokenizer) -> bool:
    if math.isnan(decoded.sum_logprob):
        raise NonFiniteError("the model gave values that are no numbers")
    too_unlikely = options.logprob_threshold is not None and avg_logprob(decoded) < options.logprob_threshold
    if (
        too_unlikely
        and options.no_speech_threshold is not None
        and decoded.no_speech_prob > options.no_speech_threshold
    ):
        return False  # silence: no temperature makes text of it
    ratio = _repetition(decoded, tokenizer)
    too_repetitive = options.compression_ratio_threshold is not None and ratio > options.compression_ratio_threshold
    return too_unlikely or too_repetitive


def _is_silence(decoded: Decoded, options: DecodeOptions) -> bool:
    """No speech is likely and the text is not: the window is passed over."""
    if not _is_without_speech(decoded, options):
        return False
    return options.logprob_threshold is None or avg_logprob(decoded) <= options.logprob_threshold


def _is_empty(decoded: Decoded, options: DecodeOptions, tokenizer: Tokenizer) -> bool:
    """No speech is likely and there is no text, however sure the model is of that."""
    return _is_without_speech(decoded, options) and not any(token < tokenizer.eot for token in decoded.tokens)


def _is_without_speech(decoded: Decoded, options: DecodeOptions) -> bool:
    """No speech is likely."""
    return options.no_speech_threshold is not None and decoded.no_speech_prob > options.no_speech_threshold


def _cut(tokens: list[int], window: Window, tokenizer: Tokenizer) -> tuple[list[Draft], int, bool]:
    """A window's tokens → its segments, how many frames are done with, and whether it ends in a single timestamp.

    Two timestamps in a row end one segment and begin the next. Text after the last pair is unfinished: it is dropped
    and decoded again from that timestamp, unless a single timestamp closes it.
    """
    begin = tokenizer.timestamp_begin
    is_time = [token >= begin for token in tokens]
    single_ending = is_time[-2:] == [False, True]
    cuts = [i for i in range(1, len(tokens)) if is_time[i - 1] and is_time[i]]
    if not cuts:
        times = [token - begin for token in tokens if token >= begin]
        known = bool(times) and times[-1] != 0
        duration = times[-1] * SECONDS_PER_TOKEN if known else window.n_frames * HOP / SAMPLE_RATE
        whole = _draft(window.start_s, window.start_s + duration, tokens, tokenizer)
        return [whole], window.n_frames, single_ending
    if single_ending:
        cuts.append(len(tokens))
    drafts = []
    for start, stop in zip([0, *cuts], cuts, strict=False):
        part = tokens[start:stop]
        start_s = window.start_s + (part[0] - begin) * SECONDS_PER_TOKEN
        drafts.append(_draft(start_s, window.start_s + (part[-1] - begin) * SECONDS_PER_TOKEN, part, tokenizer))
    advance = window.n_frames if single_ending else (tokens[cuts[-1] - 1] - begin) * FRAMES_PER_TOKEN
    return drafts, advance, single_ending


def _has_tail(tokens: list[int], drafts: Sequence[Draft], tokenizer: Tokenizer) -> bool:
    """Whether text follows what `_cut` made of a window's tokens."""
    n_used = sum(len(draft.tokens) for draft in drafts)
    return any(token < tokenizer.eot for token in tokens[n_used:])


def _marks(decoded: Decoded, told: str | None) -> list[str]:
    """The flag of a window in which the model surely hears another language than it was `told`."""
    if decoded.heard is None or told is None:
        return []
    heard, probability = decoded.heard
    return [MISMATCH] if probability >= SURELY_HEARD and not are_kin(heard, told) else []


def _keep_finished(drafts: list[Draft], window: Window) -> int:
    """Drops what the end of a window cut in running speech may have halved; returns how many frames are done with.

    A segment is finished if it ends `CUT_MARGIN_S` before the cut and a voice can have said it in its time: shown
    the first syllables alone, a model may make up the sentence. An unfinished one that begins later than the window
    is begun again there; 0 says that there was nothing else.
    """
    limit = window.end_s - CUT_MARGIN_S
    finished = next((i for i, d in enumerate(drafts) if d.end > limit or _is_invented(d)), len(drafts))
    end = drafts[finished].start if finished < len(drafts) else drafts[-1].end
    del drafts[finished:]
    return max(0, frames(end) - window.seek)


def _is_invented(draft: Segment | Draft) -> bool:
    """More text than a voice can say in its time."""
    return is_too_long(draft.text, draft.end - draft.start)


def _drop_what_nobody_says(drafts: list[Draft], span: Span, segments: Sequence[Segment]) -> None:
    """Drops the last ones as long as nobody can be saying them, `segments` being what the span has before them; then
    the first one, if another follows and nobody speaks before that.

    A text stays where its neighbour's time is enough for both of them and too much for one: a model that joins two
    sentences gives the third a time behind them.
    """
    while drafts and _is_nobodys(drafts[-1], [*segments, *drafts[:-1]], span):
        del drafts[-1]
    if not segments and len(drafts) > 1 and _is_ahead_of_the_voice(drafts[0], drafts[1], span):
        del drafts[0]


def _is_nobodys(draft: Draft, before: Sequence[Segment | Draft], span: Span) -> bool:
    """Of a span's last text. One that begins where the audio ends was heard in the padding, where a model may make one
    up; and what begins behind the last voice can be as much as is heard of one there, a quiet word perhaps."""
    previous = _last_said(before)
    if previous is not None and _has_time_for(draft, previous, span):
        return False
    end = len(span.pcm) / SAMPLE_RATE
    if draft.start >= end - 0.1 and is_too_long(draft.text, end - draft.start):
        return True
    voice_s = _voice_after_s(span, before, draft.start)
    return not voice_s or is_too_long(draft.text, voice_s)


def _until_the_voice_goes_on(drafts: Sequence[Draft], window: Window) -> int:
    """How many frames of a window its texts are done with: all, unless somebody surely goes on speaking behind the last
    one. A model may end its text there, and the reference then leaves what follows, up to half a minute."""
    last = _last_said(drafts)
    if last is None or _is_invented(last):
        return window.n_frames
    begins_s = window.span.next_voice_s(last.end + COVERED_S, window.end_s)
    if begins_s is None:
        return window.n_frames
    # Not with the pause before it, to whose beginning the model may put that of the text.
    done = frames(max(last.end, begins_s - COVERED_S)) - window.seek
    return done if done > 0 else window.n_frames


def _voice_after_s(span: Span, before: Sequence[Segment | Draft], begins_s: float) -> float:
    """For how long somebody can be saying what begins then, after what the span has `before`; infinite for its first
    text, and where it is surely a voice."""
    previous = _last_said(before)
    return math.inf if previous is None else span.voice_s(max(previous.end + DYING_S, begins_s - LATE_S))


def _last_said(texts: Sequence[Segment | Draft]) -> Segment | Draft | None:
    return next((one for one in reversed(texts) if one.text.strip()), None)


def _is_ahead_of_the_voice(draft: Draft, following: Draft, span: Span) -> bool:
    """More text than anybody is heard saying before `following`."""
    too_long = is_too_long(draft.text, span.voice_s(0.0, following.start - LATE_S))
    return too_long and not _has_time_for(draft, following, span)


def _has_time_for(draft: Draft, neighbour: Segment | Draft, span: Span) -> bool:
    """Whether there is more voice in the neighbour's time than its own text takes, and as much as both take.

    A script that puts no spaces between words has a third of the characters.
    """
    time_s = span.voiced_s(neighbour.start, neighbour.end) / (1 if " " in neighbour.text.strip() else 3)
    is_too_much_for_one = len(neighbour.text) + 5 < SLOW_CHARACTERS_PER_S * time_s
    return is_too_much_for_one and len(neighbour.text + draft.text) <= 5 + FAST_CHARACTERS_PER_S * time_s


def _clear_empty(drafts: Sequence[Draft]) -> None:
    """An instantaneous segment, or one without text, stays as an empty row."""
    for draft in drafts:
        if draft.start == draft.end or not draft.text.strip():
            draft.text, draft.tokens, draft.words = "", [], []


def _draft(start: float, end: float, tokens: list[int], tokenizer: Tokenizer) -> Draft:
    return Draft(start, end, tokens, tokenizer.decode(tokens))


def _segments(
    drafts: Sequence[Draft],
    decoded: Decoded,
    temperature: float,
    tokenizer: Tokenizer,
    state: _State,
    flags: Sequence[str],
    flags_of_first: Sequence[str],
) -> list[Segment]:
    """The drafts with what is known of their window; the reference gives all segments of a window the same figures."""
    ratio = _repetition(decoded, tokenizer)
    first = next((draft for draft in drafts if draft.text.strip()), None)
    return [
        Segment(
            start=draft.start,
            end=draft.end,
            text=draft.text,
            tokens=tuple(draft.tokens),
            avg_logprob=avg_logprob(decoded),
            compression_ratio=ratio,
            no_speech_prob=decoded.no_speech_prob,
            temperature=temperature,
            language=state.language,
            language_probability=state.language_probability,
            words=tuple(draft.words),
            flags=(*flags, *(flags_of_first if draft is first else ())),
        )
        for draft in drafts
    ]


# -- words -----------------------------------------------------------------------------------------------


def _time_words(
    window: Window,
    drafts: list[Draft],
    single_ending: bool,
    next_seek: int,
    options: DecodeOptions,
    tokenizer: Tokenizer,
    state: _State,
) -> Generator[Request, Any, tuple[int, bool]]:
    """Gives the drafts their words; returns where the walk goes on and whether the window is believed at all.

    In `windows` that is where it would have gone without words: asking for words never changes the text. In
    `sequential` the last word's end rules and anomalous segments may be dropped, as in the reference.
    """
    text = tuple(token for draft in drafts for token in draft.tokens if token < tokenizer.eot)
    timings: list[WordTiming] = (yield Align(window, text, state.language, options.task)) if text else []
    place_words(drafts, timings, window.start_s, state.last_speech_s, tokenizer.eot)
    believed = True
    if options.algorithm == "sequential":
        end = last_word_end(drafts)
        if not single_ending and end is not None and end > window.start_s:
            next_seek = frames(end)
        if options.hallucination_silence_threshold is not None:
            check = _HallucinationCheck(window, drafts, options.hallucination_silence_threshold, state.last_speech_s)
            next_seek, believed = check.next_seek(next_seek, single_ending)
    end = last_word_end(drafts)
    if believed and end is not None:
        state.last_speech_s = end
    return next_seek, believed


@dataclass(frozen=True, slots=True)
class _HallucinationCheck:
    """The reference's `hallucination_silence_threshold`: implausible words amid silence are not believed."""

    window: Window
    drafts: list[Draft]
    threshold: float  # seconds
    last_speech_s: float

    def next_seek(self, seek: int, single_ending: bool) -> tuple[int, bool]:
        """Where to go on, and False if the whole window is discarded; islands are removed from `drafts`."""
        window, drafts = self.window, self.drafts
        end_s = window.start_s + N_FRAMES / FRAMES_PER_SECOND  # of the 30 s window, even if there is less content
        if not single_ending:
            end = last_word_end(drafts)
            if end is not None and end > window.start_s:
                silent_rest = end_s - end > self.threshold
                seek = frames(end) if silent_rest else window.seek + window.n_frames
        leading = _first_with_words(drafts)
        if leading is not None and _is_anomalous(leading):
            gap = leading.start - window.start_s
            if gap > self.threshold:
                return window.seek + frames(gap), False
        return self._drop_islands(seek, end_s), True

    def _drop_islands(self, seek: int, end_s: float) -> int:
        """Drops the first anomalous segment with silence or more anomaly on both sides, and all after it."""
        window, drafts = self.window, self.drafts
        content_s = window.span.content_frames / FRAMES_PER_SECOND
        good_end = self.last_speech_s
        for i, draft in enumerate(drafts):
            if not draft.words:
                continue
            if _is_anomalous(draft):
                following = _first_with_words(drafts[i + 1 :])
                next_start = following.words[0].start if following else window.end_s
                before = (
                    draft.start - good_end > self.threshold
                    or draft.start < self.threshold
                    or draft.start - window.start_s < 2.0
                )
                after = next_start - draft.end > self.threshold or _is_anomalous(following) or end_s - draft.end < 2.0
                if before and after:
                    too_little_left = content_s - draft.end < self.threshold
                    del drafts[i:]
                    return (
                        window.span.content_frames if too_little_left else frames(max(window.start_s + 1, draft.start))
                    )
            good_end = draft.end
        return seek


def _first_with_words(drafts: Sequence[Draft]) -> Draft | None:
    return next((draft for draft in drafts if draft.words), None)


def _is_anomalous(draft: Draft | None) -> bool:
    """Very short, very long or improbable words, judged on the first eight that are no punctuation."""
    if draft is None or not draft.words:
        return False
    words = [w for w in draft.words if w.word not in OPENING + CLOSING][:8]
    score = 0.0
    for word in words:
        duration = word.end - word.start
        score += 1.0 if word.probability < 0.15 else 0.0
        score += (0.133 - duration) * 15 if duration < 0.133 else 0.0
        score += duration - 2.0 if duration > 2.0 else 0.0
    return score >= 3 or score + 0.01 >= len(words)


# -- the token rules, all lanes at once ------------------------------------------------------------------


class Sampler:
    """What each lane has sampled so far, and the rules for its next token, as tensors over all lanes.

    `rows` below is a slice or an index tensor of lanes. Nothing here asks the host for a value, and no loop goes over
    rows. A vocabulary is 50,000 wide, so the greedy path goes over the logits four times and masks only sums; where
    the rest is `exact` it does what the reference does, which takes twice as long.
    """

    def __init__(self, tokenizer: Tokenizer, lanes: int, device: torch.device, exact: bool) -> None:
        self._exact = exact
        self._eot, self._begin = tokenizer.eot, tokenizer.timestamp_begin
        self._times = torch.arange(self._begin, tokenizer.n_vocab, device=device)

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(lanes, *shape, dtype=dtype, device=device)

        self.last = zeros(torch.int64)  # the token to feed next
        self.tokens = zeros(torch.int64, TEXT_CONTEXT)  # what was sampled, `count` of them
        self.count = zeros(torch.int64)
        self.sum_logprob = zeros(torch.float32)
        self.ended = zeros(torch.bool)  # the last token was the end, or the lane is full
        self._before_last = zeros(torch.int64)
        self._last_time = zeros(torch.int64)  # the last timestamp token; 0: none yet
        self._most = zeros(torch.int64)  # tokens that may be sampled
        self._suppress = zeros(torch.float32, tokenizer.n_vocab)  # added to the logits: 0 or -inf
        self._temperature = zeros(torch.float32)
        self._seed = zeros(torch.int64)
        self._no_timestamps = tokenizer.no_timestamps
        self._nothing = torch.full((), float("-inf"), device=device)
        self._progress = (
            self.last, self.tokens, self.count, self.sum_logprob, self.ended, self._before_last, self._last_time,
        )  # fmt: skip
        self._settings = (self._most, self._suppress, self._temperature, self._seed)

    def admit(self, lane: int, request: Decode, seed: int) -> None:
        for state in self._progress:
            state[lane] = 0
        self._suppress[lane] = 0.0
        self._suppress[lane, list(request.suppress)] = float("-inf")
        self._suppress[lane, self._no_timestamps] = float("-inf")
        self._temperature[lane] = request.temperature
        self._seed[lane] = seed
        self._most[lane] = request.most_tokens

    def copy(self, source: int, target: int) -> None:
        """Lane `target` becomes what `source` is."""
        for state in self._progress + self._settings:
            state[target] = state[source]

    def restate(self, lanes: Tensor, tokens: Sequence[Sequence[int]]) -> None:
        """Each of the lanes has sampled just these tokens, all equally many: a beam's hypotheses change places."""
        sampled = torch.tensor(tokens, device=self.last.device)
        n = sampled.shape[1]
        self.tokens[lanes, :n] = sampled
        self.count[lanes] = n
        self.last[lanes] = sampled[:, -1]
        self._before_last[lanes] = sampled[:, -2] if n > 1 else 0
        self._last_time[lanes] = torch.where(sampled >= self._begin, sampled, 0).amax(-1)  # times never run backwards
        self.ended[lanes] = self.count[lanes] >= self._most[lanes]

    def found(self, lane: int) -> tuple[list[int], float]:
        """What a lane has sampled, without the end token, and the sum of its log-probabilities, end token included."""
        tokens: list[int] = self.tokens[lane, : int(self.count[lane])].tolist()
        return tokens[:-1] if tokens[-1] == self._eot else tokens, float(self.sum_logprob[lane])

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: slice | Tensor, hot: Tensor | None = None) -> None:
        """Takes lanes `rows` one token further, given their float32 logits [n, vocab], which are used up.

        `hot` are the indices into `rows` of those with a temperature above 0. The log-probability that is summed is
        of the filtered logits without the temperature.
        """
        logits += self._suppress[rows]
        likely = None if hot is None else self._masked(logits[hot], self._lanes(rows)[hot])
        chosen, logprob = self._greedy_as_the_reference(logits, rows) if self._exact else self._greedy(logits, rows)
        if hot is not None and likely is not None:
            lanes = self._lanes(rows)[hot]
            drawn = (likely / self._temperature[lanes][:, None] + self._gumbel(lanes, likely.shape[1])).argmax(-1)
            chosen[hot], logprob[hot] = drawn, _log_probability(likely, drawn)
        self.sum_logprob[rows] += logprob
        self.record(chosen, rows)

    @torch.inference_mode()
    def log_probabilities(self, logits: Tensor, rows: slice | Tensor) -> Tensor:
        """Filtered log-probabilities [n, vocab] of lanes `rows`; nothing is taken further."""
        return self._masked(logits + self._suppress[rows], rows).log_softmax(-1)

    def record(self, chosen: Tensor, rows: slice | Tensor) -> None:
        """Tokens [n] are the next ones of lanes `rows`."""
        places = self.count[rows].clamp(max=TEXT_CONTEXT - 1)  # an idle lane computes along without end
        self.tokens[self._lanes(rows), places] = chosen
        self._before_last[rows] = self.last[rows]
        self.last[rows] = chosen
        self._last_time[rows] = torch.where(chosen >= self._begin, chosen, self._last_time[rows])
        self.count[rows] += 1
        self.ended[rows] = (chosen == self._eot) | (self.count[rows] >= self._most[rows])

    # -- the same without a word to the host: see `pipelined.py` --------------------------------------------

    def fresh(self, lanes: Tensor, most: Tensor, temperature: Tensor, seeds: Tensor, suppress: Tensor) -> None:
        """Lanes [n] begin: their most tokens, temperatures and seeds [n], and what is added to their logits [n, vocab]
        (`suppression`)."""
        for state in self._progress:
            state.index_fill_(0, lanes, 0)
        for setting, values in zip(self._settings, (most, suppress, temperature, seeds), strict=True):
            setting.index_copy_(0, lanes, values)

    def suppression(self, tokens: Sequence[int]) -> Tensor:
        """What is added to the logits of a lane that may not sample `tokens`, [vocab]: 0 or -inf."""
        row = torch.zeros_like(self._suppress[0])
        row[[*tokens, self._no_timestamps]] = float("-inf")
        return row

    @torch.inference_mode()
    def advance(self, logits: Tensor, rows: slice | Tensor, any_hot: bool) -> None:
        """As `sample`, but rows that have ended stay as they are, and which rows are hot is seen on the device.

        Only that none is, which spares the noise, must be known before.
        """
        logits += self._suppress[rows]
        likely = self._masked(logits.clone(), rows) if any_hot else None
        chosen, logprob = self._greedy_as_the_reference(logits, rows) if self._exact else self._greedy(logits, rows)
        if likely is not None:
            temperature = self._temperature[rows]
            is_hot = temperature > 0
            divisor = temperature + (~is_hot).float()
            drawn = (likely / divisor[:, None] + self._gumbel(self._lanes(rows), likely.shape[1])).argmax(-1)
            chosen = torch.where(is_hot, drawn, chosen)
            logprob = torch.where(is_hot, _log_probability(likely, drawn), logprob)
        self._record_live(chosen, logprob, rows)

    def _record_live(self, chosen: Tensor, logprob: Tensor, rows: slice | Tensor) -> None:
        lanes, live, count = self._lanes(rows), ~self.ended[rows], self.count[rows]
        places = count.clamp(max=TEXT_CONTEXT - 1)
        last, last_time, total = self.last[rows], self._last_time[rows], self.sum_logprob[rows]
        self.tokens[lanes, places] = torch.where(live, chosen, self.tokens[lanes, places])
        self._before_last[rows] = torch.where(live, last, self._before_last[rows])
        self.last[rows] = torch.where(live, chosen, last)
        self._last_time[rows] = torch.where(live & (chosen >= self._begin), chosen, last_time)
        self.sum_logprob[rows] = torch.where(live, total + logprob, total)
        count = count + live
        self.count[rows] = count
        self.ended[rows] = ~live | (chosen == self._eot) | (count >= self._most[rows])

    def _lanes(self, rows: slice | Tensor) -> Tensor:
        return rows if isinstance(rows, Tensor) else torch.arange(rows.start, rows.stop, device=self.last.device)

    def _greedy_as_the_reference(self, logits: Tensor, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        """The best token that the rules allow, and its log-probability. The logits are overwritten.

        The same operations as in the reference, in their order: its sums over 50,000 numbers in float32 are off by
        1e-5, and a window's mean may lie that near to the threshold of the fallback.
        """
        chosen = self._masked(logits, rows).max(-1).indices
        return chosen, _log_probability(logits, chosen)

    def _greedy(self, logits: Tensor, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        """The same, to within what float32 can tell, and faster.

        Text, the special tokens behind it and times are summed apart: the rules ban each as a whole, times one by
        one. The logits are overwritten.
        """
        first, closing, banned_times = self._bans(rows)
        nothing = self._nothing
        special, special_token = logits[:, self._eot : self._begin].max(-1)
        special_sum = logits[:, self._eot : self._begin].logsumexp(-1)
        times = logits[:, self._begin :].masked_fill(banned_times, float("-inf"))
        time, time_token = times.max(-1)
        time_sum = times.logsumexp(-1)
        words = logits[:, : self._eot]
        word, word_token = words.max(-1)
        words -= word.clamp(min=torch.finfo(word.dtype).min)[:, None]
        word_sum = words.exp_().sum(-1).log() + word
        no_words, no_special = first | closing, first
        word, word_sum = torch.where(no_words, nothing, word), torch.where(no_words, nothing, word_sum)
        special, special_sum = torch.where(no_special, nothing, special), torch.where(no_special, nothing, special_sum)

        text = torch.maximum(word, special)
        text_token = torch.where(word >= special, word_token, special_token + self._eot)
        time_only = time_sum > text  # together the times outweigh every single text token
        total = torch.where(time_only, time_sum, torch.logaddexp(torch.logaddexp(word_sum, special_sum), time_sum))
        is_time = time_only | (time > text)
        return torch.where(is_time, time_token + self._begin, text_token), torch.where(is_time, time, text) - total

    def _masked(self, logits: Tensor, rows: slice | Tensor) -> Tensor:
        """The logits, suppressed tokens out already, with everything else out that the rules ban: they are changed."""
        first, closing, banned_times = self._bans(rows)
        words, text, times = logits[:, : self._eot], logits[:, : self._begin], logits[:, self._begin :]
        times.masked_fill_(banned_times, float("-inf"))
        words.masked_fill_(closing[:, None], float("-inf"))
        text.masked_fill_(first[:, None], float("-inf"))
        time_only = times.logsumexp(-1) > text.max(-1).values
        text.masked_fill_(time_only[:, None], float("-inf"))
        return logits

    def _bans(self, rows: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rules that make timestamps come in pairs, never run backwards and open every window: rows where only a
        time may come [n], rows where no word may come [n], and the times that may not [n, times]."""
        count, last, last_time = self.count[rows], self.last[rows], self._last_time[rows]
        first = count == 0
        after_time = ~first & (last >= self._begin)
        in_pair = after_time & ((count < 2) | (self._before_last[rows] >= self._begin))  # text must follow
        closing = after_time & ~in_pair  # a time or the end must follow
        floor = (last_time + (~closing).long()) * (last_time != 0)
        too_early = self._times[None, :] < floor[:, None]
        too_late = first[:, None] & (self._times > self._begin + MAX_INITIAL_TIMESTAMP)[None, :]
        return first, closing, too_early | too_late | in_pair[:, None]

    def _gumbel(self, rows: slice | Tensor, n: int) -> Tensor:
        """Gumbel noise [rows, n] that depends on the lane's seed, step and token alone: no generator's state, so a
        row draws the same alone and in any batch. A 64-bit mix of the three gives the uniform numbers."""
        x = (self._seed[rows] + self.count[rows] * 0x9E3779B97F4A7C1)[:, None]
        x = x + torch.arange(n, device=x.device)[None, :] * 0x632BE59BD9B4E019
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
            x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
        uniform = ((x >> 11) & ((1 << 53) - 1)).double() * 2.0**-53 + 2.0**-54
        return -torch.log(-torch.log(uniform)).float()


def _log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of one token [n] in each row of logits [n, vocab]."""
    return logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
