"""Flags: each rule, on both sides of its edge; the languages of texts; the list is all there is."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from commits import segment

from pipeline import flags
from pipeline.demo.train.heldout import make_set
from pipeline.flags import INVENTED, LOW_CONFIDENCE, MISMATCH, REPETITION, SWITCHED, has_mismatch, is_other_language
from pipeline.types import Segment

ROOT = Path(__file__).parent.parent
ENGLISH = " The exam is on Thursday, the twelfth of April."
GERMAN = " Wie viele Kaninchen hat Hugo in der Bibliothek?"


def said(text: str = ENGLISH, **fields: object) -> Segment:
    return replace(segment(text), **fields)  # type: ignore[arg-type]


# ---- of a segment


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no, no, no, no", False),  # four words are speech
        ("no no no no no no no no", True),
        ("the cat the cat the cat the cat", True),
        ("the cat the cat the cat the dog", False),  # three times
        ("he says: one two three four one two three four one two three four one two three four", True),
        ("a b c d e f g h i " * 3, False),
        ("a b c d e f g h i " * 6, False),  # nine words: no phrase; the compression ratio sees it
        (ENGLISH, False),
        ("1000000", False),
        ("好的好的好的好的", True),
        ("hahahahaha", True),
        ("", False),
    ],
)
def test_repetition(text: str, expected: bool) -> None:
    assert flags.repeats(text) == expected
    assert (REPETITION in flags.of_segment(said(text, compression_ratio=1.0), 9.0)) == expected


@pytest.mark.parametrize(
    ("fields", "speech_s", "expected"),
    [
        ({}, 2.0, ()),
        ({"compression_ratio": 2.4}, 2.0, ()),
        ({"compression_ratio": 2.5}, 2.0, (REPETITION,)),
        ({"avg_logprob": -1.0}, 2.0, ()),
        ({"avg_logprob": -1.1}, 2.0, (LOW_CONFIDENCE,)),
        ({"no_speech_prob": 0.9}, 2.0, ()),  # the voice detector knows better
        ({"no_speech_prob": 0.9}, None, (INVENTED,)),
        ({"no_speech_prob": 0.6}, None, ()),
        ({}, 0.0, (INVENTED,)),
        ({"text": " Yes."}, 0.032, ()),
        ({}, 0.5, (INVENTED,)),  # 47 characters in half a second
        ({"flags": ("tail_redecoded",), "avg_logprob": -2.0}, 2.0, ("tail_redecoded", LOW_CONFIDENCE)),
    ],
)
def test_rules_of_a_segment(fields: dict[str, object], speech_s: float | None, expected: tuple[str, ...]) -> None:
    assert flags.of_segment(said(**fields), speech_s) == expected


# ---- of a recording


def of(*segments: Segment, units: Sequence[str] = ()) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    flagged, mine = flags.of_recording(segments, units)
    return [one.flags for one in flagged], mine


def test_a_recording_has_the_flags_of_its_units_and_of_its_segments() -> None:
    one = said(flags=(LOW_CONFIDENCE,))
    assert of(one, said(), units=("hard_cut", "hard_cut")) == ([(LOW_CONFIDENCE,), ()], ("hard_cut", LOW_CONFIDENCE))
    assert of() == ([], ())


def test_a_language_that_is_not_the_one_before() -> None:
    german = said(GERMAN, language="de")
    assert of(said(), german, german, said()) == ([(), (SWITCHED,), (), (SWITCHED,)], (SWITCHED,))
    other = replace(german, channel=1)
    assert of(said(), other, said(), other) == ([()] * 4, ())  # each channel for itself


def test_one_text_over_and_over() -> None:
    thanks = said(" Thank you for watching this video.")
    assert of(*[thanks] * 3)[1] == ()
    assert of(said(), *[thanks] * 4)[0] == [(), *[(REPETITION,)] * 4]


def test_a_text_in_another_language_than_its_segments() -> None:
    assert of(said(GERMAN, language="en"))[1] == (MISMATCH,)
    assert of(said(GERMAN, language="de"))[1] == ()
    assert of(said(), said(), said(GERMAN, language="de"))[1] == (SWITCHED,)  # each language's text is its own
    assert not has_mismatch([said(GERMAN, language=None)])


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        (GERMAN, "en", True),
        (GERMAN, "de", False),
        (" Ja, gut.", "en", False),  # too short to tell
        ("1234 5678 9012 3456 7890 1234", "en", False),
        ("我们明天早上八点在图书馆见面然后一起去学校吃午饭", "en", True),
        ("我们明天早上八点在图书馆见面然后一起去学校吃午饭", "yue", False),
        ("Jeg kommer ikke til å være hjemme i morgen tidlig", "nn", False),
        (ENGLISH, "haw", False),  # nobody knows how that is written
        (GERMAN * 1000, "en", True),
    ],
)
def test_the_language_of_a_text(text: str, language: str, expected: bool) -> None:
    assert is_other_language(text, language) == expected


def test_texts_of_the_demo_domain_are_told_apart() -> None:
    """90 texts of one to five sentences, each against its own language and the two others."""
    texts = [(clip.text, clip.language) for clip in make_set(90, seed=8).values()]
    assert not [text for text, language in texts if is_other_language(text, language)]
    others = [(text, other) for text, mine in texts for other in ("en", "de", "es") if other != mine]
    caught = sum(is_other_language(text, other) for text, other in others)
    assert caught >= 0.97 * len(others)


def test_only_languages_of_whisper_are_guessed() -> None:
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    known = set(flags._identifier().labels)
    assert known < set(LANGUAGES)
    assert len(known) > 90


# ---- the list


def test_every_flag_that_is_set_is_in_the_list() -> None:
    """Flags are constants of `pipeline.flags`, or texts added to a stream's `flags`."""
    added = set()
    for path in (ROOT / "pipeline").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_add = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add"
            if is_add and "flags" in ast.unparse(node.func) and isinstance(node.args[0], ast.Constant):
                added.add(node.args[0].value)
    constants = {
        value for name, value in vars(flags).items() if name.isupper() and name[0] != "_" and isinstance(value, str)
    }
    assert len(added) >= 4
    assert {flag.name for flag in flags.FLAGS} == added | constants


def test_the_readme_shows_the_list() -> None:
    assert flags.table() in (ROOT / "README.md").read_text(encoding="utf-8")
