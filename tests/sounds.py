"""Sounds in which nobody speaks, for tests: float32 with a peak of 1, 16 kHz unless another rate is asked for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pipeline.types import SAMPLE_RATE

Sound = NDArray[np.float32]

_CHORDS = ((0, 4, 7), (9, 12, 16), (5, 9, 12), (7, 11, 14))  # semitones above the root: I, vi, IV, V
_BAR_S = 2.0


def noise(colour: str, duration_s: float, rate: int = SAMPLE_RATE, seed: int = 1) -> Sound:
    """`white`, `pink` (power 1/f) or `brown` (1/f²)."""
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(round(duration_s * rate)))
    slope = {"white": 0.0, "pink": 0.5, "brown": 1.0}[colour]
    return _full(np.fft.irfft(spectrum / np.maximum(np.arange(len(spectrum)), 1) ** slope, round(duration_s * rate)))


def hum(hz: float, duration_s: float, rate: int = SAMPLE_RATE) -> Sound:
    """Mains hum with its harmonics."""
    t = _time(duration_s, rate)
    return _full(sum(np.sin(2 * np.pi * hz * k * t) / k for k in range(1, 12)))


def chords(duration_s: float, rate: int = SAMPLE_RATE, root_hz: float = 220.0) -> Sound:
    """Four held chords in turn, as of an organ."""
    t = _time(duration_s, rate)
    sound = np.zeros_like(t)
    for bar, chord in enumerate(_CHORDS):
        playing = (t // _BAR_S).astype(int) % len(_CHORDS) == bar
        swell = np.minimum(1.0, np.minimum(t % _BAR_S, _BAR_S - t % _BAR_S) / 0.05)
        sound += playing * swell * sum(_voice(t, root_hz * 2 ** (note / 12)) for note in chord)
    return _full(sound)


def arpeggio(duration_s: float, rate: int = SAMPLE_RATE, root_hz: float = 220.0, notes_per_s: float = 4.0) -> Sound:
    """The chords' notes one after the other, plucked."""
    t = _time(duration_s, rate)
    sound = np.zeros_like(t)
    for i in range(int(duration_s * notes_per_s) + 1):
        start = i / notes_per_s
        chord = _CHORDS[int(start // _BAR_S) % len(_CHORDS)]
        since = t[round(start * rate) : round((start + 1.0) * rate)] - start
        string = _voice(since, root_hz * 2 ** (chord[i % len(chord)] / 12)) * np.exp(-5 * since)
        sound[round(start * rate) :][: len(since)] += string
    return _full(sound)


def band(duration_s: float, rate: int = SAMPLE_RATE, seed: int = 1) -> Sound:
    """Chords, an arpeggio above, a bass below, and drums of noise."""
    t = _time(duration_s, rate)
    beat = np.exp(-25 * (t % 0.5)) * noise("white", duration_s, rate, seed)
    bass = chords(duration_s, rate, 55.0)
    tune = arpeggio(duration_s, rate, 440.0)
    return _full(chords(duration_s, rate) + tune + bass + 0.8 * beat)


MUSIC: dict[str, Callable[..., Sound]] = {"chords": chords, "arpeggio": arpeggio, "band": band}


def _voice(t: NDArray[np.float64], hz: float) -> NDArray[np.float64]:
    tone: NDArray[np.float64] = sum((np.sin(2 * np.pi * hz * k * t) / k**1.5 for k in range(1, 7)), np.zeros_like(t))
    return tone


def _time(duration_s: float, rate: int) -> NDArray[np.float64]:
    return np.arange(round(duration_s * rate)) / rate


def _full(sound: NDArray[np.float64] | float) -> Sound:
    values = np.asarray(sound, np.float64)
    return (values / max(float(np.abs(values).max(initial=0.0)), 1e-9)).astype(np.float32)
