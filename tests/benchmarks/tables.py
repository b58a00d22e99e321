"""The README's tables, made from the committed results: `python -m tests.benchmarks.tables` prints them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def accuracy(figures: dict[str, Any]) -> str:
    """Of `heldout_accuracy.json`."""
    short, reference, long = figures["short"], figures["reference"], figures["long"]
    rows = [
        (f"WER, {short['clips']} clips of 1 to 5 sentences: en, de, es", _rates(short["wer"])),
        ("the same by openai-whisper, same weights, its own 30 s windows", _rates(reference["reference_wer"])),
        ("`sequential`: texts equal to openai-whisper's", f"{reference['text_equal']} of {reference['clips']}"),
        ("language right", _percent(short["language_right"])),
        ("sentence boundaries, median error", f"{short['boundary_error_median_s']:.3f} s"),
        ("word starts, median error", f"{short['word_start_error_median_s']:.3f} s"),
        (f"{long['minutes']:.0f} minutes, {long['sentences']} sentences", _coverage(long)),
        ("5 minutes with `chunk_length_s: 1`", _coverage(figures["chunk_1s"])),
    ]
    for language, by_gap in figures["no_pause"].items():
        for gaps, found in by_gap.items():
            name = f"5 minutes of {language}, {found['sentences']} sentences, {gaps}"
            theirs = f"openai-whisper: {found['reference_missing']} and {found['reference_doubled']}"
            rows.append((name, f"{_coverage(found)} ({theirs})"))
    lines = ["| what | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)


def speed(figures: dict[str, Any]) -> str:
    """Of `engine_cpu_base.json`: how many times as long the others take, in the same rounds."""
    rows = []
    for ratio in figures["ratios"].values():
        took = ratio["ours_is_faster"]
        spread = f"{took['median']:.1f} ({took['min']:.1f} to {took['max']:.1f})"
        rows.append((ratio["best"], spread, f"{took['by_cpu_time']:.1f}"))
    lines = ["| in its best setting | times the wall time of ours | times the processor time |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in sorted(rows))])


def _coverage(found: dict[str, Any]) -> str:
    return f"{found['missing']} lost, {found['doubled']} doubled, times true to {found['end_error_s']:.2f} s at the end"


def _rates(by_language: dict[str, float]) -> str:
    return ", ".join(_percent(by_language[language]) for language in ("en", "de", "es"))


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"


if __name__ == "__main__":
    print(accuracy(json.loads((RESULTS / "heldout_accuracy.json").read_text())))
    print(speed(json.loads((RESULTS / "engine_cpu_base.json").read_text())))
