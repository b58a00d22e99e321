"""Figures of several rounds as one: the middle and the range, and quotients taken within a round."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

Figures = dict[str, Any]  # plain JSON; a measured round has `wall_s` and `cpu_s`, all threads of its process together


def middle(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def quotient(over: Sequence[Figures], under: Sequence[Figures]) -> dict[str, float]:
    """How many times as long `over` took as `under`, round by round; and the same in processor time, which other
    work on the machine disturbs less."""
    pairs = list(zip(over, under, strict=True))
    wall = [a["wall_s"] / b["wall_s"] for a, b in pairs]
    return {**middle(wall), "by_cpu_time": median([a["cpu_s"] / b["cpu_s"] for a, b in pairs])}


def per_window(rounds: Sequence[Figures], windows: int) -> dict[str, float]:
    """Wall seconds for each of so many windows."""
    return middle([measured["wall_s"] / windows for measured in rounds])
