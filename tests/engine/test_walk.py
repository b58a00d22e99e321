"""The seek loop without a device: a script answers what a walk asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from speech import frames

from pipeline.demo import model_path
from pipeline.engine.decoding import Decode, Decoded, DetectLanguage, Span, compression_ratio, walk
from pipeline.engine.tokens import Tokenizer, check_options
from pipeline.errors import ConfigError, NonFiniteError
from pipeline.flags import REDECODED
from pipeline.types import DecodeOptions, Hypothesis
from pipeline.vad import Frames

TIME = 50364
GOOD, BAD, SILENT = -0.3, -3.0, 0.9


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(model_path(), 51865)


def at(seconds: float) -> int:
    return TIME + round(seconds * 50)


Answer = Callable[[Decode], tuple[list[int], float, float]]


def run(
    seconds: float,
    options: DecodeOptions,
    tokenizer: Tokenizer,
    answer: Answer,
    heard: tuple[str, float] | None = None,
    speech: Frames | None = None,
) -> tuple[Hypothesis, list[Decode]]:
    """Walks through `seconds` of audio; `answer` gives (tokens, mean log-probability, no-speech probability)."""
    steps = walk(Span(np.zeros(round(seconds * 16000), np.int16), speech=speech), options, tokenizer)
    asked: list[Decode] = []
    reply: Any = None
    try:
        while True:
            request = steps.send(reply)
            if isinstance(request, DetectLanguage):
                every = np.array([0.8 * (code == "de") for code in tokenizer.languages])
                reply = every if request.every else ("de", 0.8)
            else:
                assert isinstance(request, Decode)
                asked.append(request)
                tokens, mean, no_speech = answer(request)
                reply = [Decoded(tokens, mean * (len(tokens) + 1), no_speech, heard)] * len(request.seeds)
    except StopIteration as stop:
        return stop.value, asked


def windows(asked: list[Decode]) -> list[tuple[float, float]]:
    return [(d.window.seek / 100, d.window.n_frames / 100) for d in asked]


EN = DecodeOptions(language="en")
SEQUENTIAL = DecodeOptions(language="en", algorithm="sequential")


def test_an_unfinished_tail_is_decoded_again(tokenizer: Tokenizer) -> None:
    word = tokenizer.encode(" word")

    def answer(request: Decode) -> tuple[list[int], float, float]:
        if request.window.seek == 0:
            return [at(0), *word, at(12), at(12), *word], GOOD, 0.0
        return [at(0), *word, at(10)], GOOD, 0.0

    hypothesis, asked = run(40, SEQUENTIAL, tokenizer, answer)
    assert windows(asked) == [(0, 30), (12, 28)]
    assert [(s.start, s.end) for s in hypothesis.segments] == [(0, 12), (12, 22)]
    assert hypothesis.n_windows == 2


def test_history_and_its_reset(tokenizer: Tokenizer) -> None:
    word = tokenizer.encode(" word")
    said = [at(0), *word, at(28), at(28)]

    def answer(request: Decode) -> tuple[list[int], float, float]:
        cold_in_second = request.window.seek == 2800 and request.temperature < 0.5
        return said, BAD if cold_in_second else GOOD, 0.0

    _, asked = run(90, SEQUENTIAL, tokenizer, answer)
    by_window = {d.window.seek: d for d in asked}
    assert by_window[0].prompt == (50258, 50259, 50359)
    assert by_window[2800].prompt == (50361, *said[:-1], 50258, 50259, 50359)
    assert by_window[2800].temperature == 0.6
    assert by_window[5600].prompt == by_window[0].prompt, "not fed on after a temperature above 0.5"


def test_windows_carries_no_history_and_prompts_the_first_window_only(tokenizer: Tokenizer) -> None:
    options = DecodeOptions(language="en", initial_prompt="names", chunk_length_s=30)
    said = [at(0), *tokenizer.encode(" word"), at(20), at(20)]
    _, asked = run(70, options, tokenizer, lambda _: (said, GOOD, 0.0))
    prompted = [tokenizer.sot_prev in d.prompt for d in asked]
    assert prompted == [True, False, False, False]


@pytest.mark.parametrize(
    ("options", "temperatures"),
    [
        ({}, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ({"temperature_fallback": False}, [0.0]),
        ({"temperature": 0.3}, [0.3]),
        ({"logprob_threshold": None}, [0.0]),
    ],
)
def test_temperatures(tokenizer: Tokenizer, options: dict[str, Any], temperatures: list[float]) -> None:
    said = [at(0), *tokenizer.encode(" word"), at(5)]
    hypothesis, asked = run(6, DecodeOptions(language="en", **options), tokenizer, lambda _: (said, BAD, 0.0))
    assert [d.temperature for d in asked] == temperatures
    assert hypothesis.segments[0].temperature == temperatures[-1], "if all fail the last is kept"
    assert hypothesis.n_fallbacks == len(temperatures) - 1
    assert len({d.seeds for d in asked}) == len(asked)


def test_repetition_falls_back(tokenizer: Tokenizer) -> None:
    loop = [at(0), *tokenizer.encode(" again and again" * 20), at(5)]
    once = [at(0), *tokenizer.encode(" once"), at(5)]
    hypothesis, _ = run(6, EN, tokenizer, lambda d: (loop if d.temperature == 0 else once, GOOD, 0.0))
    assert hypothesis.segments[0].text == " once"
    assert hypothesis.segments[0].temperature == 0.2


def test_silence_is_accepted_at_once_and_passed_over(tokenizer: Tokenizer) -> None:
    said = [at(0), *tokenizer.encode(" thank you"), at(5)]
    hypothesis, asked = run(70, SEQUENTIAL, tokenizer, lambda _: (said, BAD, SILENT))
    assert hypothesis.segments == ()
    assert windows(asked) == [(0, 30), (30, 30), (60, 10)]


def test_likely_text_is_kept_whatever_the_no_speech_probability(tokenizer: Tokenizer) -> None:
    said = [at(0), *tokenizer.encode(" thank you"), at(5)]
    hypothesis, _ = run(6, EN, tokenizer, lambda _: (said, GOOD, SILENT))
    assert hypothesis.segments[0].text == " thank you"


def test_candidates_compete(tokenizer: Tokenizer) -> None:
    _, asked = run(6, DecodeOptions(language="en", temperature=0.5, best_of=3), tokenizer, lambda _: ([at(0)], GOOD, 0))
    assert len(set(asked[0].seeds)) == 3


# -- windows cut in running speech -------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["windows", "sequential"])
def test_a_window_in_which_nothing_ended_grows(tokenizer: Tokenizer, algorithm: Any) -> None:
    """A sentence of 3 s with chunk_length_s 1: told only when the window holds it."""

    def answer(request: Decode) -> tuple[list[int], float, float]:
        length = request.window.n_frames / 100
        if request.window.seek == 0 and length < 4:
            return [at(0), *tokenizer.encode(" half a"), at(length)], GOOD, 0.0
        return [at(0), *tokenizer.encode(" whole sentence"), at(3), at(3)], GOOD, 0.0

    options = DecodeOptions(language="en", algorithm=algorithm, chunk_length_s=1)
    hypothesis, asked = run(6, options, tokenizer, answer)
    assert windows(asked)[:4] == [(0, 1), (0, 2), (0, 4), (3, 1)]
    assert hypothesis.segments[0].text == " whole sentence"
    assert "half" not in "".join(s.text for s in hypothesis.segments)


@pytest.mark.parametrize("algorithm", ["windows", "sequential"])
@pytest.mark.parametrize("chunk_length_s", [1, 5, 8, 10, 20, 30])
def test_growing_windows_leave_nothing_out(tokenizer: Tokenizer, chunk_length_s: int, algorithm: Any) -> None:
    """Nothing ever ends: windows grow to 30 s and no further, and lie end to end."""
    said = [at(0), *tokenizer.encode(" endless")]
    options = DecodeOptions(language="en", algorithm=algorithm, chunk_length_s=chunk_length_s)
    _, asked = run(100, options, tokenizer, lambda _: (said, GOOD, 0.0))
    assert max(d.window.n_frames for d in asked) == 3000
    longest = {d.window.seek: d.window.n_frames for d in asked}
    seek = 0
    while seek < 10_000:
        seek += longest[seek]
    assert seek == 10_000


def test_a_time_behind_a_short_window_moves_nothing(tokenizer: Tokenizer) -> None:
    """`sequential` in windows of 10 s, where the model thinks on: what follows keeps its own times."""

    def answer(request: Decode) -> tuple[list[int], float, float]:
        begun, whole = tokenizer.encode(" begun"), tokenizer.encode(" whole")
        if (request.window.seek, request.window.n_frames) == (0, 1000):
            return [at(0), *whole, at(7), at(7), *begun, at(14)], GOOD, 0.0
        return [at(0), *whole, at(5), at(5)], GOOD, 0.0

    options = DecodeOptions(language="en", algorithm="sequential", chunk_length_s=10)
    hypothesis, asked = run(17, options, tokenizer, answer)
    assert windows(asked)[:2] == [(0, 10), (7, 10)]
    assert [(s.text, s.start, s.end) for s in hypothesis.segments][:2] == [(" whole", 0, 7), (" whole", 7, 12)]


@pytest.mark.parametrize("text", ["", " thank you"])
def test_a_short_window_without_speech_is_passed_over(tokenizer: Tokenizer, text: str) -> None:
    """Empty and sure of it, or full and unlikely. Its last second is heard again: somebody may have begun to speak."""

    def answer(request: Decode) -> tuple[list[int], float, float]:
        if request.window.seek < 1700:
            return [at(0), *tokenizer.encode(text)], GOOD if not text else BAD, SILENT
        return [at(0.5), *tokenizer.encode(" spoken"), at(3), at(3)], GOOD, 0.0

    options = DecodeOptions(language="en", algorithm="sequential", chunk_length_s=10)
    hypothesis, asked = run(22, options, tokenizer, answer)
    assert windows(asked)[:3] == [(0, 10), (9, 10), (18, 4)]
    assert [(s.text, s.start) for s in hypothesis.segments][:1] == [(" spoken", 18.5)]
    _, asked = run(4, replace(options, chunk_length_s=1), tokenizer, answer)
    assert windows(asked)[:3] == [(0, 1), (0.5, 1), (1, 1)], "half of it at least is done with"


def test_a_short_window_in_which_speech_is_likely_grows_however_empty(tokenizer: Tokenizer) -> None:
    options = DecodeOptions(language="en", algorithm="sequential", chunk_length_s=10)
    for changed in (options, replace(options, no_speech_threshold=None)):
        no_speech = 0.5 if changed is options else SILENT
        _, asked = run(22, changed, tokenizer, lambda _, given=no_speech: ([at(0)], GOOD, given))
        assert windows(asked)[:2] == [(0, 10), (0, 20)]


SPOKEN = " Felix travels from Lisbon to Oslo on Sunday morning."  # as much as is said in four seconds


def test_a_sentence_heard_behind_the_end_is_not_believed(tokenizer: Tokenizer) -> None:
    spoken, invented = tokenizer.encode(SPOKEN), tokenizer.encode(" On Thursday the pig laughs in the forest.")
    said = [at(0), *spoken, at(5.5), at(5.98), *invented, at(8)]
    hypothesis, _ = run(6, EN, tokenizer, lambda _: (said, GOOD, 0.0))
    assert [s.text for s in hypothesis.segments] == [SPOKEN]
    sequential, _ = run(6, SEQUENTIAL, tokenizer, lambda _: (said, GOOD, 0.0))
    assert len(sequential.segments) == 2, "the reference keeps it"


@pytest.mark.parametrize("voice", ["", "40. 135? 13."])
def test_a_sentence_behind_the_end_may_be_said_in_the_time_of_the_one_before(tokenizer: Tokenizer, voice: str) -> None:
    """The model joined two sentences: the text of one of them has five seconds, 4.3 s of voice in them."""
    said = [at(0), *tokenizer.encode(" Nine minus four is five."), at(5.5), at(5.98), *tokenizer.encode(SPOKEN), at(8)]
    speech = frames(voice) if voice else None
    hypothesis, _ = run(6, EN, tokenizer, lambda _: (said, GOOD, 0.0), speech=speech)
    assert [s.text for s in hypothesis.segments] == [" Nine minus four is five.", SPOKEN]


def test_a_time_that_is_too_short_for_both_texts_excuses_none(tokenizer: Tokenizer) -> None:
    """The model ended too early: in two seconds of voice it has one word, and made up a sentence behind the end."""
    said = [at(0), *tokenizer.encode(" A lamp."), at(2), at(5.98), *tokenizer.encode(SPOKEN), at(8)]
    hypothesis, _ = run(6, EN, tokenizer, lambda _: (said, GOOD, 0.0), speech=frames("62# 126."))
    assert [s.text for s in hypothesis.segments] == [" A lamp."]


@pytest.mark.parametrize(
    ("voice", "doubted", "kept"),
    [
        ("125# 50.", " Oscar?", 1),  # 4 s of it and silence, which music is for the voice detector
        ("125# 10. 1# 5. 2? 32.", " Oscar?", 1),  # its first beats
        ("128# 47.", " Oscar?", 1),  # the end of the last word
        ("125# 10. 3# 37.", " Oscar?", 2),
        ("125# 10. 7? 33.", " Oscar?", 2),  # a quiet word
        ("125# 10. 7? 33.", " Who is it?", 1),  # 11 characters in 0.22 s
        ("125# 10. 8? 32.", " Who is it?", 2),
        ("125# 10. 15? 25.", " Sophie buys twelve doors.", 1),  # a noise's onset
        ("125# 10. 16? 24.", " Sophie buys twelve doors.", 1),  # it lasts, and is too short for that
        ("125# 10. 3# 12? 25.", " Sophie buys twelve doors.", 2),  # surely a voice
        ("120. 3# 52.", " Oscar?", 1),
        ("", " Oscar?", 2),  # `vad: none`
    ],
)
def test_a_sentence_behind_the_last_voice_is_not_believed(
    tokenizer: Tokenizer, voice: str, doubted: str, kept: int
) -> None:
    said = [at(0), *tokenizer.encode(SPOKEN), at(4), at(4.2), *tokenizer.encode(doubted), at(4.6), at(4.6)]
    speech = frames(voice) if voice else None
    hypothesis, asked = run(5.6, EN, tokenizer, lambda d: (said if d.window.seek == 0 else [], GOOD, 0.0), None, speech)
    assert [s.text for s in hypothesis.segments if s.text] == [SPOKEN, doubted][:kept]
    assert windows(asked)[:1] == [(0, 5.6)]


@pytest.mark.parametrize(("spoken", "kept"), [("今日はとても寒いです。", False), ("寒い。", True)])
def test_scripts_without_spaces_say_as_much_in_fewer_characters(tokenizer: Tokenizer, spoken: str, kept: bool) -> None:
    said = [at(0), *tokenizer.encode(spoken), at(3), at(3.2), *tokenizer.encode("ご視聴ありがとう"), at(3.6), at(3.6)]
    hypothesis, _ = run(4.6, EN, tokenizer, lambda _: (said, GOOD, 0.0), speech=frames("94# 50."))
    assert len(hypothesis.segments) == 1 + kept


@pytest.mark.parametrize(
    ("voice", "ahead", "kept"),
    [
        ("35. 125#", (0.2, 1.0), False),  # 33 characters in 0.8 s, and nobody is heard
        ("8. 2# 25. 125#", (0.2, 1.0), False),
        ("8. 3# 24. 125#", (0.2, 1.0), True),  # surely a voice
        ("35. 125#", (0.0, 1.2), False),
        ("", (0.2, 1.0), True),
    ],
)
def test_a_fragment_ahead_of_the_voice_is_not_believed(
    tokenizer: Tokenizer, voice: str, ahead: tuple[float, float], kept: bool
) -> None:
    fragment = " to Rome leaves at eight o'clock."
    said = [at(ahead[0]), *tokenizer.encode(fragment), at(ahead[1]), at(1.2), *tokenizer.encode(SPOKEN), at(5.1)]
    speech = frames(voice) if voice else None
    hypothesis, _ = run(5.12, EN, tokenizer, lambda _: (said, GOOD, 0.0), speech=speech)
    assert [s.text for s in hypothesis.segments if s.text] == ([fragment] if kept else []) + [SPOKEN]


def test_a_text_ahead_of_the_voice_may_be_said_in_the_time_of_the_next(tokenizer: Tokenizer) -> None:
    texts = " to Rome leaves at eight o'clock.", " Nine minus four is five."
    said = [at(0.2), *tokenizer.encode(texts[0]), at(1), at(1.2), *tokenizer.encode(texts[1]), at(5.1)]
    hypothesis, _ = run(5.12, EN, tokenizer, lambda _: (said, GOOD, 0.0), speech=frames("35. 125#"))
    assert tuple(s.text for s in hypothesis.segments) == texts


def test_all_sentences_behind_the_last_voice_go_and_none_before_it(tokenizer: Tokenizer) -> None:
    texts = [tokenizer.encode(f" {text}") for text in ("one", "two", "three", "four")]
    said = [token for i, text in enumerate(texts) for token in (at(i), *text, at(i + 0.8))]
    hypothesis, _ = run(4, EN, tokenizer, lambda _: (said, GOOD, 0.0), speech=frames("24# 7. 24# 70."))
    assert [s.text for s in hypothesis.segments if s.text] == [" one", " two"]


def test_the_first_sentence_of_a_span_is_believed_wherever_its_time_is(tokenizer: Tokenizer) -> None:
    said = [at(1), *tokenizer.encode(" late"), at(1.4), at(1.4)]
    hypothesis, _ = run(2, EN, tokenizer, lambda _: (said, GOOD, 0.0), speech=frames("20# 43."))
    assert [s.text for s in hypothesis.segments if s.text] == [" late"]


@pytest.mark.parametrize(("voice", "n_windows"), [("125# 50.", 1), ("125# 10. 20# 20.", 2)])
def test_a_tail_that_nobody_speaks_in_is_not_decoded_again(tokenizer: Tokenizer, voice: str, n_windows: int) -> None:
    one, two = tokenizer.encode(" one"), tokenizer.encode(" two")
    answers = iter([[at(0), *one, at(4), at(4), *two], [at(0), *two, at(1)]])
    hypothesis, asked = run(5.6, EN, tokenizer, lambda _: (next(answers), GOOD, 0.0), speech=frames(voice))
    assert len(asked) == n_windows
    assert [s.text for s in hypothesis.segments] == [" one", " two"][:n_windows]


@pytest.mark.parametrize(
    ("voice", "end_s", "again_s"),
    [
        ("125# 10. 178#", 4, 4.0),
        ("313#", 4, 4.0),
        ("125# 80. 31# 77.", 4, 6.24),  # 1 s of it, and the pause is left out
        ("125# 80. 30# 78.", 4, None),  # what `uncovered_speech` is not said of
        ("134# 10# 169.", 4.3, None),  # the last breath of what was said
        ("125# 10. 178?", 4, None),  # perhaps music
        ("125# 188.", 4, None),
        ("313#", 1, None),  # 53 characters in a second: where they really end nobody knows
        ("", 4, None),  # `vad: none`
    ],
)
def test_a_voice_that_goes_on_behind_the_last_text_is_decoded_again(
    tokenizer: Tokenizer, voice: str, end_s: float, again_s: float | None
) -> None:
    """Where the reference goes on with the next window."""
    said = [at(0), *tokenizer.encode(SPOKEN), at(end_s)]
    rest = [at(0), *tokenizer.encode(" And what else?"), at(9)]
    answer = lambda d: (said if d.window.seek == 0 else rest, GOOD, 0.0)  # noqa: E731
    options = replace(EN, chunk_length_s=10)
    speech = frames(voice) if voice else None
    hypothesis, asked = run(10, options, tokenizer, answer, speech=speech)
    assert windows(asked) == ([(0, 10), (again_s, 10 - again_s)] if again_s else [(0, 10)])
    assert [(s.text, s.flags) for s in hypothesis.segments] == [
        (SPOKEN, ()), (" And what else?", (REDECODED,)),
    ][: len(asked)]  # fmt: skip
    speech = frames(f"{voice} 625. 313#") if voice else None
    _, asked = run(40, replace(options, chunk_length_s=30), tokenizer, answer, speech=speech)
    assert windows(asked)[1] == ((again_s, 30) if again_s else (30, 10)), "in the middle of a span too"
    sequential, asked = run(10, SEQUENTIAL, tokenizer, answer)
    assert (len(asked), sequential.segments[0].text) == (1, SPOKEN)


def test_text_up_to_the_cut_is_not_believed(tokenizer: Tokenizer) -> None:
    def answer(request: Decode) -> tuple[list[int], float, float]:
        a, b = tokenizer.encode(" first"), tokenizer.encode(" sec")
        if request.window.seek == 0:
            return [at(0), *a, at(6), at(6.5), *b, at(10)], GOOD, 0.0
        return [at(0), *tokenizer.encode(" second"), at(5)], GOOD, 0.0

    hypothesis, asked = run(16, DecodeOptions(language="en", chunk_length_s=10), tokenizer, answer)
    assert windows(asked) == [(0, 10), (6.5, 9.5)]
    assert "".join(s.text for s in hypothesis.segments) == " first second"


def test_a_sentence_made_up_from_its_first_syllable_is_not_believed(tokenizer: Tokenizer) -> None:
    invented = [at(0), *tokenizer.encode(" The meeting is on Sunday, the eleventh of May."), at(0.3), at(0.3)]
    real = [at(0), *tokenizer.encode(" The meeting is over."), at(2), at(2)]

    def answer(request: Decode) -> tuple[list[int], float, float]:
        return invented if request.window.n_frames == 100 else real, GOOD, 0.0

    hypothesis, _ = run(8, DecodeOptions(language="en", chunk_length_s=1), tokenizer, answer)
    assert {s.text for s in hypothesis.segments if s.text} == {" The meeting is over."}


def test_the_last_window_of_a_span_is_the_reference_s(tokenizer: Tokenizer) -> None:
    """It ends in a pause, not in a word: text without a closing time is kept to the window's end."""
    said = [at(0), *tokenizer.encode(" all of it")]
    hypothesis, _ = run(8, EN, tokenizer, lambda _: (said, GOOD, 0.0))
    assert [(s.text, s.end) for s in hypothesis.segments] == [(" all of it", 8.0)]


@pytest.mark.parametrize(("algorithm", "speech"), [("windows", None), ("windows", "2032#"), ("sequential", None)])
@pytest.mark.parametrize("tokens", [[], [TIME], [TIME, TIME + 1], [TIME + 1], [TIME, 1000], [1000], [TIME, 1000, TIME]])
def test_every_walk_ends(tokenizer: Tokenizer, algorithm: Any, speech: str | None, tokens: list[int]) -> None:
    """Whatever a model says, a walk goes on: seeks never stand still."""
    options = DecodeOptions(language="en", algorithm=algorithm, chunk_length_s=2)
    voice = frames(speech) if speech else None
    _, asked = run(65, options, tokenizer, lambda _: (tokens, GOOD, 0.0), speech=voice)
    assert len(asked) < 65 * 50


# -- language and options ----------------------------------------------------------------------------------------------


def test_language_is_detected_once_or_on_every_window(tokenizer: Tokenizer) -> None:
    said = [at(0), *tokenizer.encode(" ja"), at(29), at(29)]
    hypothesis, asked = run(70, DecodeOptions(algorithm="sequential"), tokenizer, lambda _: (said, GOOD, 0.0))
    assert (hypothesis.language, hypothesis.language_probability) == ("de", 0.8)
    assert all(tokenizer.languages["de"] in d.prompt for d in asked)
    each, _ = run(70, DecodeOptions(language="window"), tokenizer, lambda _: (said, GOOD, 0.0))
    assert {s.language for s in each.segments} == {"de"}


@pytest.mark.parametrize(
    ("options", "heard", "flagged"),
    [
        (EN, ("de", 0.9), True),
        (EN, ("de", 0.89), False),
        (EN, ("en", 1.0), False),
        (EN, None, False),
        (DecodeOptions(), ("en", 0.95), True),  # German was found for the recording
        (DecodeOptions(language="hr"), ("sr", 1.0), False),  # one passes for the other
        (DecodeOptions(language="window"), ("en", 1.0), False),  # it is told nothing
    ],
)
def test_another_language_than_it_was_told_is_flagged(
    tokenizer: Tokenizer, options: DecodeOptions, heard: tuple[str, float] | None, flagged: bool
) -> None:
    said = [at(0), *tokenizer.encode(" ja"), at(2), at(2), *tokenizer.encode(" nein"), at(4), at(4)]
    hypothesis, _ = run(4, options, tokenizer, lambda _: (said, GOOD, 0.0), heard)
    assert [s.flags for s in hypothesis.segments] == [("language_mismatch",) if flagged else ()] * 2


def test_a_tail_that_is_decoded_again_is_flagged(tokenizer: Tokenizer) -> None:
    """The first window begins a text that it does not finish; the second begins there."""
    one, two = tokenizer.encode(" one"), tokenizer.encode(" two")
    answers = iter([[at(0), *one, at(4), at(4), *two], [at(0), *two, at(2), at(2), *one, at(3), at(3)], [at(0), *one]])
    hypothesis, asked = run(7, EN, tokenizer, lambda _: (next(answers), GOOD, 0.0))
    assert windows(asked)[:2] == [(0, 7), (4, 3)]
    assert [(s.text, s.flags) for s in hypothesis.segments] == [
        (" one", ()), (" two", ("tail_redecoded",)), (" one", ()),
    ]  # fmt: skip


def test_a_window_that_ends_with_its_text_leaves_no_tail(tokenizer: Tokenizer) -> None:
    said = [at(0), *tokenizer.encode(" one"), at(4), at(4)]
    hypothesis, asked = run(7, EN, tokenizer, lambda d: (said if d.window.seek == 0 else [at(0)], GOOD, 0.0))
    assert len(asked) == 2
    assert [s.flags for s in hypothesis.segments if s.text] == [()]


def test_what_a_cut_in_running_speech_left_is_flagged(tokenizer: Tokenizer) -> None:
    """Windows of 2 s in a span of 5 s: a sentence that ends at the cut is begun again, in a window that grew."""
    one = tokenizer.encode(" one")

    def answer(decode: Decode) -> tuple[list[int], float, float]:
        end = 1.9 if decode.window.n_frames == 200 else 3.0
        return [at(0), *one, at(end), at(end)], GOOD, 0.0

    hypothesis, asked = run(5, DecodeOptions(language="en", chunk_length_s=2), tokenizer, answer)
    assert windows(asked)[:2] == [(0, 2), (0, 4)]
    assert hypothesis.segments[0].flags == ("tail_redecoded",)


def test_hotwords_stand_before_every_window_and_take_room_from_the_history(tokenizer: Tokenizer) -> None:
    said = [at(0), *range(1000, 1100), at(29)]
    options = DecodeOptions(language="en", algorithm="sequential", hotwords=" Murmuration, Lingen ")
    _, asked = run(150, options, tokenizer, lambda _: (said, GOOD, 0.0))
    hot = tokenizer.encode(" Murmuration, Lingen")
    assert all(d.prompt[: len(hot) + 1] == (tokenizer.sot_prev, *hot) for d in asked)
    assert len(asked[-1].prompt) == 1 + 223 + 3, "the history fills what is left of its half of the context"
    assert asked[-1].sot_index == 224
    assert asked[-1].most_tokens == 448 + 1 - 227, "no more than the context holds"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"language": "xx"}, "xx"),
        ({"patience": 2.0}, "beam_size"),
        ({"beam_size": 1, "patience": 0.4}, "candidate"),
        ({"best_of": 0}, "best_of"),
        ({"hotwords": "Lingen " * 60}, "hotwords"),
        ({"chunk_length_s": 31}, "31"),
        ({"clip_timestamps": (1.0,)}, "clip_timestamps"),
        ({"algorithm": "sequential", "hallucination_silence_threshold": 1.0}, "word"),
    ],
)
def test_what_cannot_be_honoured_is_refused(tokenizer: Tokenizer, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check_options(DecodeOptions(**options), tokenizer)


def test_values_that_are_no_numbers(tokenizer: Tokenizer) -> None:
    with pytest.raises(NonFiniteError):
        run(6, EN, tokenizer, lambda _: ([at(0)], float("nan"), 0.0))


def test_compression_ratio() -> None:
    assert compression_ratio("again " * 50) > 10
    assert compression_ratio("a short plain sentence") < 1.5
