"""What the voice detector costs beside the engine, and what it finds: the figures in `pipeline/vad.py`.

    python -m tests.benchmarks.vad_cost [--rounds 5] [--windows 16] [--tokens 100] [--size base] [--out FILE]

Cost: core-seconds (the process's CPU time, all threads) for 30 s of speech, the detector's and the engine's in turn in
one process. The engine is of whisper-base size with random weights, dtype auto, T tokens a window, fallback off; it
hears the same speech. Accuracy: synthetic sentences of unseen voices in clean and bad audio, and sounds in which
nobody speaks. Prints a table and one JSON object on the last line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.engine import EngineConfig, load_engine
from pipeline.engine.random_checkpoint import write_random_checkpoint
from pipeline.types import SAMPLE_RATE, DecodeOptions, Range, Recording, Unit
from pipeline.vad import MAYBE_SPEECH, SURE_SPEECH, Frames, believed, detect
from pipeline.windows import plan
from tests import sounds
from tests.benchmarks.machine import machine
from tests.speech import frame_loop, loud_frames, pcm_at, talk

Figures = dict[str, Any]
Sound = NDArray[np.float32]


# -- cost ----------------------------------------------------------------------------------------------------


def measure_cost(rounds: int, n_windows: int, tokens: int, size: str) -> Figures:
    """Medians over rounds of: the engine on `n_windows` windows of 30 s, then the detector on the same audio."""
    speech = pcm_at(talk(12 * n_windows, longest_pause_s=0.9)[0], -6)
    windows = [np.resize(part, 30 * SAMPLE_RATE) for part in np.array_split(speech, n_windows)]
    options = DecodeOptions(language="en", temperature_fallback=False, max_tokens=tokens, no_speech_threshold=None)
    silence = np.zeros_like(windows[0])
    ours: list[float] = []
    engines: list[Clock] = []
    silent: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(Path(folder), size, mean_tokens=None)
        with load_engine(EngineConfig(model=folder, lanes=n_windows)) as engine:
            info = engine.info
            engine.decode(windows[:2], options)
            detect(windows[0])
            for _ in range(rounds):
                engines.append(timed(lambda: engine.decode(windows, options)))
                ours.append(timed(lambda: [detect(window) for window in windows]).core_s / n_windows)
                silent.append(timed(lambda: [detect(silence) for _ in range(8)]).core_s / 8)
    core_s = median(clock.core_s for clock in engines) / n_windows
    return {
        "engine": {"size": size, "dtype": info.dtype, "lanes": info.lanes, "windows": n_windows, "tokens": tokens},
        "rounds": rounds,
        "vad_core_s_per_30_s": round(median(ours), 5),
        "vad_core_s_per_30_s_of_digital_silence": round(median(silent), 5),
        "engine_core_s_per_window": round(core_s, 4),
        "engine_wall_s_per_window": round(median(clock.wall_s for clock in engines) / n_windows, 4),
        "share": round(median(ours) / core_s, 4),
        "share_of_each_round": [round(v / (c.core_s / n_windows), 4) for v, c in zip(ours, engines, strict=True)],
    }


@dataclass(frozen=True, slots=True)
class Clock:
    core_s: float
    wall_s: float


def timed(work: Callable[[], object]) -> Clock:
    core, wall = time.process_time(), time.perf_counter()
    work()
    return Clock(time.process_time() - core, time.perf_counter() - wall)


# -- speech is found -----------------------------------------------------------------------------------------


def bad_audio(audio: Sound) -> dict[str, tuple[Sound, float]]:
    """Name → audio and its full scale in dBFS. The speech's peak is 1; as loud as the speech: equal power."""
    rms = float(np.sqrt(np.square(audio[np.abs(audio) > 0.02]).mean()))
    white = np.random.default_rng(0).standard_normal(len(audio)).astype(np.float32) * rms
    return {
        "peak -6 dBFS": (audio, -6.0),
        "peak -50 dBFS": (audio, -50.0),
        "peak -60 dBFS": (audio, -60.0),
        "white noise, 10 dB below": (audio + white * np.float32(10**-0.5), -12.0),
        "white noise as loud as the speech": (audio + white, -12.0),
        "clipped 20 times over": (np.clip(audio * 20, -1, 1), 0.0),
    }


def measure_speech(n_sentences: int) -> Figures:
    audio, words = talk(n_sentences)
    voiced = loud_frames(audio)
    found = {}
    for name, (spoilt, dbfs) in bad_audio(audio).items():
        pcm = pcm_at(spoilt, dbfs)
        heard = detect(pcm)[: len(voiced)][voiced]
        found[name] = {
            "voiced_frames_at_the_low_bar": round(float((heard >= MAYBE_SPEECH).mean()), 4),
            "voiced_frames_at_the_high_bar": round(float((heard >= SURE_SPEECH).mean()), 4),
            "words_outside_the_spans": len(words) - sum(held(words, believed(detect(pcm)), len(pcm))),
            "without_believed": len(words) - sum(held(words, detect(pcm), len(pcm))),
        }
    return {"words": len(words), "voiced_frames": int(voiced.sum())} | found


def held(words: list[Range], speech: Frames, n_samples: int) -> Iterator[bool]:
    """Of each word, whether it lies in a span."""
    spans = spans_of(speech, n_samples)
    for word in words:
        yield any(span.start <= word.start and word.stop <= span.stop for span in spans)


def spans_of(speech: Frames, n_samples: int) -> tuple[Range, ...]:
    unit = Unit(Recording("x", "x"), 0, 0, np.zeros(n_samples, np.int16), is_last=True, speech=speech)
    return plan(unit, DecodeOptions()).spans


# -- what is no speech is not --------------------------------------------------------------------------------


def not_speech(duration_s: float) -> Iterator[tuple[str, Sound]]:
    for colour in ("white", "pink", "brown"):
        yield "noise", sounds.noise(colour, duration_s)
    for hz in (50, 60):
        yield "hum", sounds.hum(hz, duration_s)
    for root_hz in (110, 165, 220, 262, 330, 440):
        yield "music", sounds.chords(duration_s, root_hz=root_hz)
        for notes_per_s in (2, 4, 8):
            yield "music", sounds.arpeggio(duration_s, root_hz=root_hz, notes_per_s=notes_per_s)
    for seed in range(3):
        yield "music", sounds.band(duration_s, seed=seed)


def measure_false_alarms(duration_s: float) -> Figures:
    """By kind of sound, at full scale and down to -60 dBFS."""
    kinds: dict[str, list[tuple[Frames, int]]] = {}
    for kind, sound in not_speech(duration_s):
        for dbfs in (0, -6, -20, -30, -40, -50, -60):
            pcm = pcm_at(sound, dbfs)
            kinds.setdefault(kind, []).append((detect(pcm), len(pcm)))
    return {kind: _false_alarms(heard) for kind, heard in kinds.items()}


def _false_alarms(heard: list[tuple[Frames, int]]) -> Figures:
    frames = np.concatenate([speech for speech, _ in heard])
    decoded = [sum(span.n_samples for span in spans_of(believed(speech), n)) for speech, n in heard]
    without = [sum(span.n_samples for span in spans_of(speech, n)) for speech, n in heard]
    return {
        "seconds": sum(n for _, n in heard) // SAMPLE_RATE,
        "frames_at_the_low_bar": round(float((frames >= MAYBE_SPEECH).mean()), 5),
        "frames_at_the_high_bar": round(float((frames >= SURE_SPEECH).mean()), 5),
        "decoded_s": round(sum(decoded) / SAMPLE_RATE, 2),
        "decoded_s_without_believed": round(sum(without) / SAMPLE_RATE, 2),
        "files_with_a_span": sum(n > 0 for n in decoded),
        "files": len(heard),
    }


# -- the same numbers as Silero's own ------------------------------------------------------------------------


def measure_equality(n_sentences: int) -> Figures:
    """Against the package's streaming network, one frame a call."""
    spoken = pcm_at(talk(n_sentences, longest_pause_s=0.9)[0], -6)  # no row of it is left out
    with_pauses = pcm_at(talk(n_sentences)[0], -6)
    core = time.process_time()
    theirs = frame_loop(spoken)
    loop_s, core = time.process_time() - core, time.process_time()
    ours = detect(spoken)
    ours_s = time.process_time() - core
    left_out = detect(with_pauses), frame_loop(with_pauses)
    return {
        "frames": len(ours),
        "frames_that_differ": int((ours != theirs).sum()),
        "largest_difference": int(np.abs(ours.astype(int) - theirs).max()),
        "times_real_time_on_one_core": round(len(spoken) / SAMPLE_RATE / ours_s),
        "times_real_time_of_the_loop": round(len(spoken) / SAMPLE_RATE / loop_s),
        "with_silent_rows_left_out": {
            "frames": len(left_out[0]),
            "other_side_of_the_low_bar": _other_side(*left_out, MAYBE_SPEECH),
            "other_side_of_the_high_bar": _other_side(*left_out, SURE_SPEECH),
        },
    }


def _other_side(ours: Frames, theirs: Frames, bar: int) -> int:
    return int(((ours >= bar) != (theirs >= bar)).sum())


def report(figures: Figures, indent: str = "") -> Iterator[str]:
    for key, value in figures.items():
        if isinstance(value, dict):
            yield f"{indent}{key}"
            yield from report(value, indent + "  ")
        else:
            yield f"{indent}{key:44} {value}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--size", default="base")
    parser.add_argument("--sentences", type=int, default=48)
    parser.add_argument("--seconds", type=float, default=120.0, help="of every sound that is no speech")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    figures = {
        "cost": measure_cost(args.rounds, args.windows, args.tokens, args.size),
        "silero": measure_equality(args.sentences),
        "speech": measure_speech(args.sentences),
        "no_speech": measure_false_alarms(args.seconds),
        "machine": machine(),
    }
    print("\n".join(report(figures)), file=sys.stderr)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
