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


def languages(figures: dict[str, Any]) -> str:
    """Of `languages.json`."""
    clips = figures["recordings"]
    rows = [(f"{clips['clips']} clips in one language: the recording's", _percent(clips["right"]))]
    rows += [
        (f"several in each recording, `language: window`, {name}: the segments'", _percent(one["right"]))
        for name, one in figures["mixed"].items()
    ]
    rows += [(f"flag `language_mismatch`: {name}", f"{n} of {of}") for name, (n, of) in figures["mismatch"].items()]
    return "\n".join(["| what | right, or flagged |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def two_algorithms(figures: dict[str, Any]) -> str:
    """Of `two_algorithms.json`."""
    lines = [
        "| WER, 95 % interval; language right | `windows` | `sequential` | difference, points |",
        "|---|---|---|---|",
    ]
    for name, part in figures["parts"].items():
        apart = part["sequential_minus_windows"]
        each = [f"{_with_interval(one)}; {_percent(one['language_right'])}" for one in _both(part)]
        spread = f"{apart['points']:.1f} ({apart['interval'][0]:.1f} to {apart['interval'][1]:.1f})"
        lines.append(f"| {name} | {' | '.join(each)} | {spread} |")
    return "\n".join(lines)


def _both(part: dict[str, Any]) -> list[dict[str, Any]]:
    return [part[algorithm] for algorithm in ("windows", "sequential")]


def _with_interval(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['wer_percent']:.1f} % ({low:.1f} to {high:.1f})"


def adversarial(figures: dict[str, Any]) -> str:
    """Of `adversarial.json`: sentences lost and invented, and how many of these have a flag."""
    settings = ("windows, 10 s", "sequential, 10 s", "sequential, 30 s")
    head = [f"`{one.split(',')[0]}`,{one.split(',')[1]}" for one in settings]
    lines = [f"| lost, invented (flagged) | sentences | {' | '.join(head)} |", "|---|---|---|---|---|"]
    for case, found in figures["cases"].items():
        counts = [_lost_and_invented(found[one]) for one in settings]
        lines.append(f"| {case} | {found[settings[0]]['sentences']} | {' | '.join(counts)} |")
    return "\n".join(lines)


def _lost_and_invented(found: dict[str, Any]) -> str:
    flagged = f" ({found['flagged']})" if found["invented"] else ""
    return f"{found['lost']}, {found['invented']}{flagged}"


def speed(figures: dict[str, Any]) -> str:
    """Of `engine_cpu_base.json`: how many times as long the others take, in the same rounds."""
    rows = []
    for ratio in figures["ratios"].values():
        took = ratio["ours_is_faster"]
        spread = f"{took['median']:.1f} ({took['min']:.1f} to {took['max']:.1f})"
        rows.append((ratio["best"], spread, f"{took['by_cpu_time']:.1f}"))
    lines = ["| in its best setting | times the wall time of ours | times the processor time |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in sorted(rows))])


CORPUS_H = 100_000  # hours: what the sizing table works out


def sizing(engine: dict[str, Any], vad: dict[str, Any], decode: dict[str, Any] | None = None) -> str:
    """Of `engine_cpu_base.json`, `vad_cost.json` and, once it is there, `decode_speed.json`: hours of audio that one
    core gets through in an hour, from the processor time that each took."""
    ours = [one for one in engine["contestants"] if one["library"] == "ours" and one["error"] is None]
    rows = [
        (f"engine, whisper-{engine['plan']['size']} in {one['dtype']}", hours_per_core_hour(30, _core_s(one)))
        for one in ours
    ]
    rows.append(("voice detection", hours_per_core_hour(30, vad["cost"]["vad_core_s_per_30_s"])))
    for name, core_s in (decode or {}).get("core_s_per_audio_hour", {}).items():
        rows.append((f"reading and decoding, {name}", hours_per_core_hour(3600, core_s)))
    lines = [f"| what | hours of audio a core-hour | core-hours for {CORPUS_H:,} hours |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {rate:,.0f} | {CORPUS_H / rate:,.0f} |" for name, rate in rows)])


def hours_per_core_hour(audio_s: float, core_s: float) -> float:
    """How much audio a core gets through in its time, where `audio_s` took it `core_s`."""
    return audio_s / core_s


def _core_s(contestant: dict[str, Any]) -> float:
    return float(contestant["cpu_s_per_window"]["median"])


def result(name: str) -> dict[str, Any] | None:
    """A committed result; None where it has not been measured yet."""
    path = RESULTS / name
    found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return found


def _coverage(found: dict[str, Any]) -> str:
    return f"{found['missing']} lost, {found['doubled']} doubled, times true to {found['end_error_s']:.2f} s at the end"


def _rates(by_language: dict[str, float]) -> str:
    return ", ".join(_percent(by_language[language]) for language in ("en", "de", "es"))


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"


if __name__ == "__main__":
    print(accuracy(json.loads((RESULTS / "heldout_accuracy.json").read_text())))
    print(speed(json.loads((RESULTS / "engine_cpu_base.json").read_text())))
    engine, vad = (json.loads((RESULTS / name).read_text()) for name in ("engine_cpu_base.json", "vad_cost.json"))
    print(sizing(engine, vad, result("decode_speed.json")))
