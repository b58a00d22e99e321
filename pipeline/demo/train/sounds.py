"""Sounds in which nobody speaks: noise of many colours, hums, and music that is drawn by lot.

A network that has only heard sentences writes sentences for whatever it hears. Everything here is random: pitch, scale,
timbre, rhythm and instruments, so that no piece is like the few fixed ones that the tests play. Knows nothing about
windows or sentences.
"""

from __future__ import annotations

from random import Random

import numpy as np
from numpy.typing import NDArray

from pipeline.demo.train.synth import SAMPLE_RATE

Samples = NDArray[np.float32]

_PIECE_S = 45.0  # longer than a window at the fastest speed
_SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 2, 4, 7, 9))  # major, minor, pentatonic; semitones
_SPEEDS = (0.8, 1.25)  # at which a piece is played


class SoundBank:
    """Pieces of one seed, made when they are first played; every sound is another part of one, at another speed."""

    def __init__(self, seed: int, n_noises: int = 10, n_pieces: int = 24) -> None:
        self._seed, self._sizes = seed, {_noise: n_noises, _music: n_pieces}
        self._pieces: dict[tuple[str, int], Samples] = {}

    def draw(self, random: Random, n_samples: int) -> Samples:
        """[n_samples] with a peak of 1, as often noise as music; a third comes and goes."""
        make = random.choice(tuple(self._sizes))
        key = make.__name__, random.randrange(self._sizes[make])
        if key not in self._pieces:
            self._pieces[key] = make(np.random.default_rng([self._seed, key[1]]))
        piece = self._pieces[key]
        speed = random.uniform(*_SPEEDS)
        start = random.uniform(0, len(piece) - 1 - n_samples * speed)
        at = start + speed * np.arange(n_samples)
        sound: Samples = np.interp(at, np.arange(len(piece)), piece).astype(np.float32)
        if random.random() < 0.35:
            sound *= _coming_and_going(random, n_samples)
        sound /= max(float(np.abs(sound).max(initial=0.0)), 1e-6)
        return sound


def _coming_and_going(random: Random, n_samples: int) -> Samples:
    """A gain between 0 and 1: on and off in turn, for a twentieth of a second up to three, with soft or hard edges."""
    edges, levels, at, on = [0.0], [1.0], 0.0, True
    while at < n_samples:
        at += SAMPLE_RATE * random.choice((random.uniform(0.05, 0.4), random.uniform(0.4, 3.0)))
        soft = SAMPLE_RATE * random.choice((0.002, 0.02, 0.2))
        edges += [at, at + soft]
        levels += [float(on), float(not on)]
        at, on = at + soft, not on
    return np.interp(np.arange(n_samples), edges, levels).astype(np.float32)


def _noise(generator: np.random.Generator) -> Samples:
    """White noise through a random curve, from a hiss to a rumble; one in four with a mains hum in it."""
    n = round(_PIECE_S * SAMPLE_RATE)
    spectrum = np.fft.rfft(generator.standard_normal(n))
    frequency = np.fft.rfftfreq(n, 1 / SAMPLE_RATE)
    knots = np.interp(frequency, np.geomspace(40, 8_000, 8), generator.normal(0, 0.5, 8))
    noise = np.fft.irfft(spectrum * np.exp(knots) / (frequency + 20) ** generator.uniform(0, 1.1), n)
    if generator.random() < 0.25:
        hum_hz = generator.choice((50, 60, 100, 120))
        noise += noise.std() * generator.uniform(0.5, 4) * _tone(_time(_PIECE_S), hum_hz, generator.uniform(0.7, 1.5))
    return _full(noise)


def _music(generator: np.random.Generator) -> Samples:
    """Some of held chords, plucked notes, a tune, a bass and drums, in one key and time."""
    scale, root_hz = _SCALES[generator.integers(len(_SCALES))], generator.uniform(90, 330)
    beat_s, beats = generator.uniform(0.25, 0.75), int(generator.choice((2, 3, 4, 8)))
    degrees = generator.integers(0, len(scale), 4)  # of the chords, one a bar
    parts = generator.random(5) < 0.5
    parts[generator.integers(5)] = True
    n_bars = int(_PIECE_S / (beat_s * beats)) + 1
    sound = np.zeros(round((n_bars + 1) * beat_s * beats * SAMPLE_RATE) + SAMPLE_RATE)
    falloff = generator.uniform(0.8, 2.2)

    def hz(degree: int, octave: float) -> float:
        return float(root_hz * 2 ** (octave + degree // len(scale) + scale[degree % len(scale)] / 12))

    def play(start_s: float, note: NDArray[np.float64]) -> None:
        start = round(start_s * SAMPLE_RATE)
        sound[start : start + len(note)] += note[: max(0, len(sound) - start)]

    decay, attack_s, vibrato = generator.uniform(2, 12), generator.uniform(0.005, 0.2), generator.uniform(0, 0.02)
    kick, pattern = generator.uniform(8, 60), generator.random(beats * 2) < 0.6
    for bar in range(n_bars):
        chord = [int(degrees[bar % 4]) + step for step in (0, 2, 4)]
        bar_s = beat_s * beats
        t = _time(bar_s)
        swell = np.minimum(1.0, np.minimum(t, bar_s - t) / attack_s)
        if parts[0]:
            play(bar * bar_s, swell * sum(_tone(t, hz(degree, 0), falloff) for degree in chord) / 2)
        if parts[1]:
            play(bar * bar_s, swell * _tone(t, hz(chord[0], -1 if root_hz > 120 else 0), falloff))
        for half_beat in range(2 * beats):
            at = bar * bar_s + half_beat * beat_s / 2
            t = _time(min(1.0, 2 * beat_s))
            if parts[2]:
                play(at, _tone(t, hz(chord[half_beat % 3], 1), falloff) * np.exp(-decay * t))
            if parts[3] and generator.random() < 0.5:
                wave = t + vibrato / 10 * np.sin(2 * np.pi * 5.5 * t)
                fade = np.minimum(1.0, np.minimum(t, t[-1] - t) / 0.03)
                play(at, _tone(wave, hz(int(generator.integers(0, 9)), 1), falloff) * fade)
            if parts[4] and pattern[half_beat]:
                play(at, generator.uniform(0.5, 2) * generator.standard_normal(len(t)) * np.exp(-kick * t))
    return _full(sound[: round(_PIECE_S * SAMPLE_RATE)])


def _tone(t: NDArray[np.float64], hz: float, falloff: float) -> NDArray[np.float64]:
    """A note with as many harmonics as there is room for, up to eight."""
    n_harmonics = int(np.clip(7_500 / hz, 1, 8))
    tone: NDArray[np.float64] = sum(
        (np.sin(2 * np.pi * hz * k * t) / k**falloff for k in range(1, n_harmonics + 1)), np.zeros_like(t)
    )
    return tone


def _time(seconds: float) -> NDArray[np.float64]:
    return np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE


def _full(sound: NDArray[np.float64]) -> Samples:
    return (sound / max(float(np.abs(sound).max(initial=0.0)), 1e-9)).astype(np.float32)
