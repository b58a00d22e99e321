"""Recordings to compare two decoders on: held-out speech, and what makes decoding hard. int16 at 16 kHz.

The same kind, language and seed give the same samples.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
from numpy.typing import NDArray

from pipeline.demo.train.heldout import make_clip, make_long
from pipeline.demo.train.lexicon import LANGUAGES, Language
from pipeline.types import SAMPLE_RATE, Pcm
from tests import sounds

Wave = NDArray[np.float64]


def make(kind: str, language: Language, seed: int) -> Pcm:
    """A recording of this kind (a key of `KINDS`)."""
    wave = KINDS[kind](language, seed, Random(f"{kind}/{language}/{seed}"))
    return (np.clip(wave, -1, 1) * 32767).astype(np.int16)


def _speech(language: Language, seed: int, n_sentences: int, pause_s: tuple[float, float] = (0.1, 0.7)) -> Wave:
    return make_clip(language, n_sentences, 70_000 + seed, pause_s=pause_s).pcm / 32768.0


def clean(language: Language, seed: int, random: Random) -> Wave:
    return _speech(language, seed, random.randint(1, 5))


def noisy(language: Language, seed: int, random: Random) -> Wave:
    """Pink or white noise from 30 dB under the speech's peak to nearly as loud."""
    speech = _speech(language, seed, random.randint(1, 4))
    hiss = sounds.noise(random.choice(["white", "pink"]), len(speech) / SAMPLE_RATE, seed=seed)
    return speech + hiss[: len(speech)] * 0.3 * 10 ** random.uniform(-1.5, -0.1)


def phone(language: Language, seed: int, random: Random) -> Wave:
    """300 to 3,400 Hz, quantised to 8 bits by mu-law, some hiss."""
    speech = _speech(language, seed, random.randint(1, 4))
    spectrum = np.fft.rfft(speech)
    hertz = np.fft.rfftfreq(len(speech), 1 / SAMPLE_RATE)
    narrow = np.fft.irfft(spectrum * ((hertz > 300) & (hertz < 3400)), len(speech))
    narrow += np.random.default_rng(seed).normal(0, 10 ** random.uniform(-3, -2), len(speech))
    companded = np.sign(narrow) * np.log1p(255 * np.abs(narrow)) / np.log(256)
    steps = np.round(companded * 127) / 127
    return np.asarray(np.sign(steps) * (256 ** np.abs(steps) - 1) / 255)


def long(language: Language, seed: int, random: Random) -> Wave:
    """Several windows, every sentence by another voice."""
    return make_long(language, 70_000 + seed, minutes=random.uniform(0.8, 1.8)).pcm / 32768.0


def longish(language: Language, seed: int, random: Random) -> Wave:
    """Just more than one window."""
    return make_long(language, 70_000 + seed, minutes=random.uniform(0.52, 0.6)).pcm / 32768.0


def paused(language: Language, seed: int, random: Random) -> Wave:
    """Long silences between the sentences."""
    return _speech(language, seed, random.randint(2, 5), pause_s=(2.0, 9.0))


def silent(language: Language, seed: int, random: Random) -> Wave:
    """Nobody speaks: nothing, or noise of some level."""
    level = random.choice([0.0, 0.0003, 0.003, 0.03])
    return np.random.default_rng(seed).normal(0, 1, random.randint(1, 40) * SAMPLE_RATE) * level


def musical(language: Language, seed: int, random: Random) -> Wave:
    """Speech over music, then music alone, then speech."""
    first, last = _speech(language, seed, random.randint(1, 3)), _speech(language, seed + 1, 1)
    music = sounds.MUSIC[random.choice(sorted(sounds.MUSIC))]
    between = random.uniform(1, 12)
    whole = np.concatenate([first, np.zeros(round(between * SAMPLE_RATE)), last])
    return np.asarray(whole + music(len(whole) / SAMPLE_RATE + 0.01)[: len(whole)] * random.uniform(0.02, 0.2))


def tonal(language: Language, seed: int, random: Random) -> Wave:
    """Hum or music, and nobody speaks."""
    if random.random() < 0.5:
        return np.asarray(sounds.hum(random.choice([50, 60, 440]), random.uniform(2, 20)) * 0.2, np.float64)
    return np.asarray(sounds.MUSIC[random.choice(sorted(sounds.MUSIC))](random.uniform(5, 35)) * 0.3, np.float64)


def truncated(language: Language, seed: int, random: Random) -> Wave:
    """Begins and ends in the middle of a word."""
    speech = _speech(language, seed, random.randint(2, 5))
    return speech[random.randint(2000, 20_000) : -random.randint(8000, 24_000)]


def mixed(language: Language, seed: int, random: Random) -> Wave:
    """Two languages, one after the other."""
    other = random.choice([code for code in LANGUAGES if code != language])
    return np.concatenate(
        [_speech(language, seed, random.randint(1, 3)), _speech(other, seed + 1, random.randint(1, 4))]
    )


def babble(language: Language, seed: int, random: Random) -> Wave:
    """Two people at once: text that no temperature is sure of."""
    one, other = _speech(language, seed, 3), _speech(random.choice(LANGUAGES), seed + 1, 3)
    n = min(len(one), len(other))
    return one[:n] + other[:n] * random.uniform(0.3, 1.0)


KINDS: dict[str, Callable[[Language, int, Random], Wave]] = {
    kind.__name__: kind
    for kind in (clean, noisy, phone, long, longish, paused, silent, musical, tonal, truncated, mixed, babble)
}
