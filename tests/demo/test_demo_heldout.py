"""Held-out recordings: deterministic, truly held out, with exact times."""

import json
from itertools import pairwise
from pathlib import Path
from random import Random
from zlib import crc32

import numpy as np
import pytest

from pipeline.demo.train import numerals
from pipeline.demo.train.heldout import Clip, cut_at_pauses, make_clip, make_long, make_set, write_set
from pipeline.demo.train.lexicon import LANGUAGES, Language
from pipeline.demo.train.sentences import draw, draw_split, is_held_out
from pipeline.demo.train.synth import HELD_OUT_VOICES, TRAINING_VOICES, EspeakError, Voice, speak


def gaps(clip: Clip) -> list[float]:
    return [after.start - before.end for before, after in pairwise(clip.sentences)]


def test_the_same_arguments_give_the_same_samples_whatever_came_before() -> None:
    first = make_clip("en", 2, seed=5)
    make_clip("es", 1, seed=8)
    again = make_clip("en", 2, seed=5)
    np.testing.assert_array_equal(first.pcm, again.pcm)
    assert first.sentences == again.sentences
    assert make_clip("en", 2, seed=6).text != first.text


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_and_voices_are_held_out(language: Language) -> None:
    for sentence in make_clip(language, 3, seed=1, one_voice=False).sentences:
        assert crc32(sentence.english.encode()) % 10 == 0
        assert sentence.voice.split("+")[1] in HELD_OUT_VOICES
    assert not set(HELD_OUT_VOICES) & set(TRAINING_VOICES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_lie_where_the_sound_is(language: Language) -> None:
    clip = make_clip(language, 3, seed=2, noise=0.0)
    spoken = np.zeros(len(clip.pcm), bool)
    for sentence in clip.sentences:
        start, end = round(sentence.start * 16_000), round(sentence.end * 16_000)
        spoken[start:end] = True
        assert np.abs(clip.pcm[start : start + 400]).max() > 50  # begins within 25 ms
        assert np.abs(clip.pcm[end - 800 : end]).max() > 50
    assert not clip.pcm[~spoken].any()


def test_words_cover_their_sentence() -> None:
    for sentence in make_clip("de", 3, seed=3).sentences:
        assert " ".join(word.text for word in sentence.words) == sentence.text
        assert sentence.words[0].start == sentence.start
        assert sentence.words[-1].end == pytest.approx(sentence.end)
        assert all(before.end == after.start for before, after in pairwise(sentence.words))
        assert all(0.02 < word.end - word.start < 2 for word in sentence.words)


def test_long_recordings() -> None:
    clip = make_long("es", seed=1, n_sentences=30)
    assert len(clip.sentences) == 30
    assert all(0.2 <= gap <= 5.001 for gap in gaps(clip))
    assert make_long("es", seed=1, minutes=0.2).duration_s >= 12


def test_long_recordings_without_pauses() -> None:
    clip = make_long("en", seed=1, n_sentences=8, pause_s=(0.0, 0.05))
    assert all(-1e-6 <= gap <= 0.0501 for gap in gaps(clip))


def test_a_long_recording_needs_one_length() -> None:
    with pytest.raises(ValueError, match="either"):
        make_long("en", seed=1)


def test_pieces_cover_the_recording() -> None:
    clip = make_long("de", seed=2, n_sentences=10)
    pieces = list(cut_at_pauses(clip, longest_s=10))
    assert len(pieces) > 1
    assert all(len(piece) <= 10 * 16_000 for piece in pieces)
    np.testing.assert_array_equal(np.concatenate(pieces), clip.pcm)


def test_a_set_on_disk(tmp_path: Path) -> None:
    clips = make_set(4, seed=1)
    write_set(tmp_path, clips, "clean")
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == list(clips)
    assert [row["spoken_language"] for row in rows] == ["en", "de", "es", "en"]
    references = json.loads((tmp_path / "references.json").read_text(encoding="utf-8"))
    for row in rows:
        size = (tmp_path / row["audio_filepath"]).stat().st_size
        assert (size - 44) / 32_000 == pytest.approx(row["duration"], abs=1e-4)
        assert references[row["id"]]["language"] == row["spoken_language"]


def test_an_unknown_voice_is_an_error() -> None:
    with pytest.raises(EspeakError, match="no voice"):
        speak("Hello.", Voice("en-us", "nobody"))


def test_the_split_is_a_tenth() -> None:
    random = Random(0)
    share = sum(is_held_out(draw(random).en) for _ in range(5_000)) / 5_000
    assert 0.08 < share < 0.12
    assert not is_held_out(draw_split(random, held_out=False).en)


def test_numerals() -> None:
    assert [numerals.english(n) for n in (0, 12, 20, 21)] == ["zero", "twelve", "twenty", "twenty-one"]
    assert [numerals.german(n) for n in (1, 21, 30)] == ["eins", "einundzwanzig", "dreißig"]
    assert [numerals.spanish(n) for n in (22, 30, 31)] == ["veintidós", "treinta", "treinta y uno"]
