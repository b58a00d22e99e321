"""What our engine's time and memory go to: stages, their floors, word times, VAD, refilled lanes, the two algorithms.

Measured in the seat of the first of our dtypes when the other contestants have left. The measurements themselves are
`pipeline/engine/probe.py`'s; what is compared is measured in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.bench.rounds import Figures, middle, per_window, quotient
from pipeline.bench.seats import PAUSE_S, WINDOW_S, Seat, synthetic_windows
from pipeline.types import SAMPLE_RATE

if TYPE_CHECKING:
    from pipeline.bench.engine import Plan

SHORTEST, LONGEST = 10, 220  # tokens a window of the spread
RECORDING_WINDOWS = 3  # of each recording in `sequential`


def measure_ours(plan: Plan, seat: Seat, say: Callable[[str], None]) -> Figures:
    """The parts of the plan that concern ours alone."""
    seat.ask("probe", "decode", plan.windows, min(plan.tokens, 8), True)  # whatever happens at the first time only
    figures: Figures = {"memory": {**seat.ask("facts"), "peak_rss_mb": round(seat.ask("peak_rss_mb"))}}
    measures = {
        "stages": _stages, "floors": _floors, "words": _words, "vad": _vad,
        "spread": _spread, "sequential": _sequential,
    }  # fmt: skip
    for part, measure in measures.items():
        if part in plan.parts:
            say(f"measuring {part}")
            figures[part] = measure(plan, seat)
    return figures


def _ask(seat: Seat, *question: object) -> Figures:
    time.sleep(PAUSE_S)
    measured: Figures = seat.ask("probe", *question)
    return measured


def _stages(plan: Plan, seat: Seat) -> Figures:
    """Seconds a window, of the round in the middle, with word times asked for, so that their stage is there too."""
    rounds = [_ask(seat, "stages", plan.windows, plan.tokens, True) for _ in range(plan.rounds)]
    median = sorted(rounds, key=lambda measured: float(measured["cpu_s"]))[len(rounds) // 2]
    encoder = [measured["stages"]["encoder"] for measured in rounds]
    flop = plan.windows * seat.ask("facts")["encoder_flop"]
    return {
        "s_per_window": {name: spent["wall_s"] / plan.windows for name, spent in median["stages"].items()},
        "cpu_s_per_window": {name: spent["cpu_s"] / plan.windows for name, spent in median["stages"].items()},
        "calls": median["calls"],
        "encoder_tflops": middle([flop / spent["wall_s"] / 1e12 for spent in encoder]),
        "encoder_share_of_peak": quotient([measured["encoder_at_peak"] for measured in rounds], encoder),
    }


def _floors(plan: Plan, seat: Seat) -> Figures:
    """Each stage's share of its floor, by a product and a copy measured beside it."""
    took = _ask(seat, "decode", plan.windows, plan.tokens, False)
    shares: Figures = _ask(seat, "floors", 1, plan.tokens, took["wall_s"] / plan.windows)
    return shares


def _words(plan: Plan, seat: Seat) -> Figures:
    """What word times add to the same tokens."""
    rounds = [
        [_ask(seat, "decode", plan.windows, plan.tokens, words) for words in (False, True)] for _ in range(plan.rounds)
    ]
    without, with_words = zip(*rounds, strict=True)
    return {
        "s_per_window": per_window(without, plan.windows),
        "s_per_window_with_words": per_window(with_words, plan.windows),
        "takes_times_as_long": quotient(with_words, without),
    }


def _vad(plan: Plan, seat: Seat) -> Figures:
    """The VAD on the same audio, all of it loud enough for its network, beside the engine's time for it."""
    audio = np.concatenate(synthetic_windows(plan.windows))
    _detect(audio[: WINDOW_S * SAMPLE_RATE])
    engine, vad = [], []
    for _ in range(plan.rounds):
        engine.append(_ask(seat, "decode", plan.windows, plan.tokens, False))
        time.sleep(PAUSE_S)
        vad.append(_detect(audio))
    return {"s_per_window": per_window(vad, plan.windows), "share_of_engine": quotient(vad, engine)}


def _detect(audio: np.ndarray[tuple[int], np.dtype[np.int16]]) -> Figures:
    from pipeline.vad import detect

    cpu, start = time.process_time(), time.perf_counter()
    detect(audio)
    return {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}


def _spread(plan: Plan, seat: Seat) -> Figures:
    """Windows of 10 to 220 tokens: lanes refilled as they end, against static batches.

    So many that the last ones, when nobody waits for a free lane, are a small part, as they are in a bulk job: of
    eight for each lane they were a tenth of the steps.
    """
    count = 16 * seat.ask("facts")["lanes"]
    lengths = spread(min(SHORTEST, plan.tokens), min(LONGEST, 2 * plan.tokens + 20), count)
    kinds = {"refilled": ("refilled",), "static": ("static", False), "static_padded": ("static", True)}
    rounds = {name: [] for name in kinds}  # type: dict[str, list[Figures]]
    for _ in range(_few(plan)):
        for name, (method, *more) in kinds.items():
            rounds[name].append(_ask(seat, method, count, lengths, *more))
    return {
        "windows": count,
        "tokens": {"shortest": min(lengths), "longest": max(lengths), "mean": sum(lengths) / count},
        **{name: _spread_figures(measured, count) for name, measured in rounds.items()},
        "refill_is_faster_than": {
            name: quotient(rounds[name], rounds["refilled"]) for name in ("static", "static_padded")
        },
    }


def _spread_figures(rounds: Sequence[Figures], windows: int) -> Figures:
    decoding = ("prefill", "step", "rules")
    return {
        "s_per_window": per_window(rounds, windows),
        "decoder_s_per_window": middle(
            [sum(measured["stages"][stage]["wall_s"] for stage in decoding) / windows for measured in rounds]
        ),
        "steps": rounds[0]["steps"],
    }


def spread(low: int, high: int, count: int) -> list[int]:
    """`count` numbers of tokens from `low` to `high`, evenly, in an order that has nothing to do with their size."""
    lengths = np.linspace(low, high, count).round().astype(int)
    return [int(length) for length in np.random.default_rng(0).permutation(lengths)]


def _sequential(plan: Plan, seat: Seat) -> Figures:
    """Recordings of three windows, all at once: windows a second of `sequential` beside `windows`."""
    kinds = {
        "windows": ("windows", False),
        "sequential": ("sequential", False),
        "sequential_conditioned": ("sequential", True),
    }
    count = plan.recordings * RECORDING_WINDOWS
    rounds = {name: [] for name in kinds}  # type: dict[str, list[Figures]]
    for _ in range(_few(plan)):
        for name, how in kinds.items():
            rounds[name].append(_ask(seat, "recordings", count, plan.recordings, plan.tokens, *how))
    return {
        "recordings": plan.recordings,
        **{
            name: {
                "windows_per_s": middle([run["windows"] / run["wall_s"] for run in measured]),
                **{key: measured[0][key] for key in ("windows", "tokens", "prompt_tokens")},
            }
            for name, measured in rounds.items()
        },
        "share_of_windows": {
            name: quotient(rounds["windows"], rounds[name]) for name in ("sequential", "sequential_conditioned")
        },
    }


def _few(plan: Plan) -> int:
    """The long measurements, many times as many windows each, are made twice at most."""
    return min(plan.rounds, 2)
