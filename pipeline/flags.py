"""Signs that a transcript, or a part of it, is not to be trusted: each one rule on what is known anyway. Pure.

`FLAGS` is the one list of all that the tables' `flags` columns may hold; the README's table is made of it. What a
segment shows by itself is flagged when its Unit is stitched (`of_segment`), what only the whole recording shows when
that is (`of_recording`), so that the job, the endpoint and a notebook agree. A recording has each flag that one of its
segments has. Flags decide nothing: no text is dropped for one.

The language of a text is py3langid's guess: a table of byte sequences in the package, the same answer every time, no
network. Knows neither audio nor a model; it costs a tenth of a millisecond for a short text, and a second once in a
process.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from pipeline.types import Segment

REPETITION = "repetition"
LOW_CONFIDENCE = "low_confidence"
INVENTED = "invented_on_silence"
SWITCHED = "language_switched"
REDECODED = "tail_redecoded"
MISMATCH = "language_mismatch"
UNCOVERED = "uncovered_speech"
TRUNCATED = "truncated_audio"
HARD_CUT = "hard_cut"
RESTART = "sequential_restart"

COMPRESSION = 2.4  # openai/whisper's own thresholds, at which it decodes again
LOGPROB = -1.0
NO_SPEECH = 0.6
SURELY_HEARD = 0.9  # probability of another language from which what the model was told is doubted
PHRASE = 8  # words of the longest phrase that is looked for again
TIMES = 4  # a phrase, or a segment, that is said so often in a row
REPEATED = 8  # words that the repeated phrases must be together: "no, no, no, no" is speech
CHARACTERS_PER_S = 25  # more than a fast speaker says
COVERED_S = 0.3  # a text covers speech this close to its time: timestamps are that exact
LETTERS = 20  # a text with fewer has no language that could be told
LOOKED_AT = 240  # characters of a text that are looked at: its beginning, middle and end
UNLIKELY = 0.1  # a language that is less likely than this is not the text's

# Whisper's languages that py3langid knows; others would only take from these.
_LANGUAGES = (
    "af am ar as az ba be bg bn br bs ca cs cy da de el en es et eu fa fi fo fr gl gu ha he hi hr ht hu hy id is it "
    "ja ka kk km kn ko la lb ln lo lt lv mg mk ml mn mr ms mt my ne nl nn no oc pa pl ps pt ro ru sa si sk sl sn so "
    "sq sr sv sw ta te tg th tk tl tr tt uk ur uz vi yo yue zh"
)
# Spoken, or written, so much alike that one passes for the other.
_KIN = (("no", "nn", "da"), ("hr", "bs", "sr"), ("id", "ms"), ("zh", "yue"), ("hi", "ur"))


@dataclass(frozen=True, slots=True)
class Flag:
    """One value of the `flags` columns: what it is set on, and when."""

    name: str
    of: Literal["segment", "recording"]  # a recording has its segments' too
    rule: str


FLAGS = (
    Flag(
        REPETITION,
        "segment",
        f"its window's text compresses more than {COMPRESSION} times; or a phrase of up to {PHRASE} words stands"
        f" {TIMES} times in a row in it, {REPEATED} words or more; or it is one of {TIMES} or more segments in a row"
        " with the same text",
    ),
    Flag(LOW_CONFIDENCE, "segment", f"`avg_logprob` below {LOGPROB:g}, the last temperature tried"),
    Flag(
        INVENTED,
        "segment",
        "the voice detector heard nobody from 0.3 s before it to 0.3 s after, or so little that it would be more than"
        f" {CHARACTERS_PER_S} characters a second; with `vad: none`: `no_speech_prob` above {NO_SPEECH}",
    ),
    Flag(SWITCHED, "segment", "its language is not that of the segment before it in its channel (`language: window`)"),
    Flag(
        REDECODED,
        "segment",
        "the first one of a window that begins where the window before it had begun a text that it did not finish, "
        "or where it had ended while somebody goes on speaking",
    ),
    Flag(
        MISMATCH,
        "segment",
        "the model, told the language or having found it elsewhere in the recording, hears another one in its window"
        f" with {SURELY_HEARD} or more; of a recording also: the text, where it has {LETTERS} letters or more, is in"
        f" the language of its segments with a probability below {UNLIKELY}, by the letters alone"
        " (so is all that `task: translate` did translate)",
    ),
    Flag(UNCOVERED, "recording", "somebody speaks for 1 s or more, or in a whole span, and no segment covers it"),
    Flag(TRUNCATED, "recording", "the file is damaged; what could be read before that is transcribed"),
    Flag("damaged_packets", "recording", "packets in the middle of the file could not be decoded"),
    Flag("gap_filled", "recording", "the file's time stamps leave a gap; it is silence here"),
    Flag("slice_beyond_end", "recording", "the manifest's slice reaches beyond the end of the audio"),
    Flag("channel_cancelled", "recording", "channels that cancel each other: the louder one was taken"),
    Flag("channels_changed", "recording", "the number of channels changes within the file"),
    Flag(HARD_CUT, "recording", "a Unit had to end where somebody speaks"),
    Flag(RESTART, "recording", "`sequential`: the history began anew after `sequential_max_s`"),
)
_ORDER = {flag.name: number for number, flag in enumerate(FLAGS)}


def table() -> str:
    """`FLAGS` as a table in Markdown."""
    rows = [f"| `{flag.name}` | {flag.of} | {flag.rule} |" for flag in FLAGS]
    return "\n".join(["| flag | of a | set where |", "|---|---|---|", *rows])


def of_segment(segment: Segment, speech_s: float | None) -> tuple[str, ...]:
    """The flags of a segment by itself, those that it has already first.

    `speech_s`: seconds in which the voice detector heard somebody in its time, 0.3 s more on either side; None where
    none was run.
    """
    found = (
        *segment.flags,
        *([REPETITION] if segment.compression_ratio > COMPRESSION or repeats(segment.text) else []),
        *([LOW_CONFIDENCE] if segment.avg_logprob < LOGPROB else []),
        *([INVENTED] if _is_invented(segment, speech_s) else []),
    )
    return tuple(dict.fromkeys(found))


def of_recording(segments: Sequence[Segment], flags: Iterable[str]) -> tuple[tuple[Segment, ...], tuple[str, ...]]:
    """The segments of a whole recording with the flags that only their neighbours show, and the recording's own:
    `flags`, which its Units have, then those of its segments."""
    flagged = _with_neighbours(segments)
    found = {flag for segment in flagged for flag in segment.flags}
    if has_mismatch(flagged):
        found.add(MISMATCH)
    ordered = sorted(found, key=lambda name: (_ORDER.get(name, len(_ORDER)), name))
    return flagged, tuple(dict.fromkeys((*flags, *ordered)))


def repeats(text: str) -> bool:
    """Whether a phrase stands in `text` several times in a row. Text without a space is taken letter by letter."""
    words = text.split()
    if len(words) == 1:
        words = list(words[0])
    if len(words) - len(set(words)) < REPEATED - REPEATED // TIMES:
        return False  # too few come again, as nearly always
    for length in range(1, PHRASE + 1):
        run = 0  # words in a row that are the same as `length` before
        for word, before in zip(words[length:], words, strict=False):
            run = run + 1 if word == before else 0
            if run >= length * (TIMES - 1) and run + length >= REPEATED:
                return True
    return False


def has_mismatch(segments: Sequence[Segment]) -> bool:
    """Whether the text that any of the segments' languages has is surely in another."""
    texts: defaultdict[str, list[str]] = defaultdict(list)
    for segment in segments:
        if segment.language is not None:
            texts[segment.language].append(segment.text)
    return any(is_other_language("".join(parts), language) for language, parts in texts.items())


def is_other_language(text: str, language: str) -> bool:
    """Whether `text` is surely not in `language` (a code of Whisper's); False for one that nobody can tell."""
    text = _parts(text.strip())
    if sum(map(str.isalpha, text)) < LETTERS:
        return False
    identifier = _identifier()
    likely: dict[str, float] = dict(identifier.rank(text))
    if language not in likely:
        return False
    return sum(p for one, p in likely.items() if are_kin(one, language)) < UNLIKELY


def get_ready() -> None:
    """Load now what the first text's language would wait a second for."""
    _identifier()


def are_kin(one: str, other: str) -> bool:
    """Whether two languages are the same, or so near that one passes for the other."""
    return one == other or any(one in some and other in some for some in _KIN)


def _is_invented(segment: Segment, speech_s: float | None) -> bool:
    if speech_s is None:
        return segment.no_speech_prob > NO_SPEECH
    return speech_s == 0 or is_too_long(segment.text.strip(), speech_s)


def is_too_long(text: str, voice_s: float) -> bool:
    """More text than anybody says in so many seconds."""
    return len(text) > 5 + CHARACTERS_PER_S * voice_s


def _with_neighbours(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Flags for a language that is not the one before, and for one text over and over; each channel for itself."""
    more: defaultdict[int, list[str]] = defaultdict(list)
    channels: defaultdict[int, list[int]] = defaultdict(list)
    for number, segment in enumerate(segments):
        channels[segment.channel].append(number)
    for numbers in channels.values():
        for before, number in itertools.pairwise(numbers):
            if segments[before].language != segments[number].language:
                more[number].append(SWITCHED)
        for _, run in itertools.groupby(numbers, key=lambda number: segments[number].text.strip()):
            same = list(run)
            if len(same) >= TIMES:
                for number in same:
                    more[number].append(REPETITION)
    if not more:
        return tuple(segments)
    return tuple(
        replace(segment, flags=tuple(dict.fromkeys((*segment.flags, *more[number])))) if number in more else segment
        for number, segment in enumerate(segments)
    )


def _parts(text: str) -> str:
    """Beginning, middle and end of a long text: all of it would tell no more, and take its time."""
    if len(text) <= LOOKED_AT:
        return text
    third, middle = LOOKED_AT // 3, len(text) // 2
    return f"{text[:third]} {text[middle : middle + third]} {text[-third:]}"


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(_LANGUAGES.split())
    return identifier
