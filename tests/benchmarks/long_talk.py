"""Speech of any length, out of a few clips: for jobs whose words do not matter."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np

from pipeline.types import SAMPLE_RATE, Pcm


def talk(clips: Sequence[Pcm], seconds: float, random: Random, *, pause_s: tuple[float, float]) -> Pcm:
    """Clips drawn at random, each with a pause of so many seconds behind it, until `seconds` are reached."""
    parts: list[Pcm] = []
    while sum(map(len, parts)) < seconds * SAMPLE_RATE:
        parts += [random.choice(clips), np.zeros(int(random.uniform(*pause_s) * SAMPLE_RATE), np.int16)]
    return np.concatenate(parts)
