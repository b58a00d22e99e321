"""Recordings of held-out sentences at places that the caller chooses, with sounds between them or under them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeline.demo.train.heldout import Clip, Sentence, make_clip
from pipeline.demo.train.lexicon import Language
from pipeline.types import SAMPLE_RATE
from tests.sounds import Sound


def one_sentence(language: Language, seed: int) -> Clip:
    """A held-out sentence by a held-out voice, nothing before or after it, no noise under it."""
    return make_clip(language, 1, seed, lead_s=0.0, tail_s=0.0, noise=0.0)


def lay_out(
    language: Language,
    placed: Sequence[tuple[float, Clip]],
    duration_s: float,
    sounds: Sequence[tuple[float, Sound]] = (),
) -> Clip:
    """One recording of `duration_s`: each clip, and each sound of full scale 1, from its second on, added up."""
    audio = np.zeros(round(duration_s * SAMPLE_RATE), np.float32)
    for start, sound in [*((start, clip.samples) for start, clip in placed), *sounds]:
        at = round(start * SAMPLE_RATE)
        audio[at : at + len(sound)] += sound[: len(audio) - at]
    pcm = np.rint(np.clip(audio * 32768, -32768, 32767)).astype(np.int16)
    sentences = [_shifted(one, start) for start, clip in placed for one in clip.sentences]
    return Clip(language, pcm, tuple(sorted(sentences, key=lambda one: one.start)))


def _shifted(sentence: Sentence, by_s: float) -> Sentence:
    words = tuple(word.shifted(by_s) for word in sentence.words)
    return replace(sentence, start=sentence.start + by_s, end=sentence.end + by_s, words=words)
