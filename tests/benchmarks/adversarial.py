"""Audio that is meant to make a transcriber invent or lose sentences: what each algorithm does with it, counted.

    python -m tests.benchmarks.adversarial [--seeds 1] [--more 0] [--case NAME] [--out FILE]

Held-out sentences of three languages at known places, the demo model in float32: `windows` and `sequential` (without
conditioning on earlier text) as the demo is configured, in windows of 10 s, and `sequential` in windows of 30 s, which
is openai-whisper's. The cases are `CASES`; each gives a recording a language and seed. Recordings of which `sequential`
in 30 s loses or invents something go to openai-whisper as well, on the same weights and samples: `reference` says of
how many, how many of its texts are ours to the letter, and in how many of the others a temperature above 0 drew some of
our text (each program draws from a stream of its own).

`--more` seeds go through `windows` alone: its rules were made while the first four were looked at.

A sentence counts where all of it is in the recording; of one that the file's end cuts off nothing is counted, neither
as lost nor as invented.

- lost: half of a sentence's words or more have nothing in their place and no segment is its own
  (`heldout_accuracy.lost_and_doubled`), or no segment shares a moment with it; whichever are more in a recording. A
  misheard sentence is not lost: that is what the word error rate is for.
- invented: a segment that shares no moment with anything that is said, or a run of four or more words that nobody said
  there (`lost_and_doubled`'s "doubled": a sentence that was written twice); whichever are more. `flagged`: of the
  segments in nobody's time, those with a flag that the README's query leaves out.

Progress goes to stderr, one JSON object to the last line. Its small form runs in the suite (`tests/test_bars.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from pipeline.demo.train.evaluate import transcribe as transcribe_openai
from pipeline.demo.train.heldout import Clip
from pipeline.demo.train.lexicon import LANGUAGES, Language
from pipeline.machine import machine
from pipeline.scoring import Score, word_score
from pipeline.selection import TRAINING
from pipeline.types import SAMPLE_RATE, Algorithm, Pcm, Transcript
from tests.benchmarks.half_precision import transcribe
from tests.benchmarks.heldout_accuracy import demo_config, lost_and_doubled, reference_model
from tests.benchmarks.laid_out import lay_out, one_sentence
from tests.sounds import MUSIC, Sound, noise

Case = Callable[[Language, int], Clip]
Found = tuple[str, Sequence[tuple[float, float]]]  # the text and the times of the segments that have one

PEAK = 0.2  # of noise and music between sentences, of full scale; a sentence's is 0.3
EDGE_S = 29.9  # where sentences are cut
DOUBTED = set(TRAINING.exclude_flags)
SETTINGS: tuple[tuple[Algorithm, int], ...] = (("windows", 10), ("sequential", 10), ("sequential", 30))


def in_pauses(
    pauses_s: Sequence[float], sound: Callable[[float, int], Sound] | None = None, peak: float = PEAK
) -> Case:
    """A sentence, a pause, a sentence ...: as many pauses, shuffled, each filled with `sound` (seconds, seed)."""

    def case(language: Language, seed: int) -> Clip:
        random = Random(f"pauses/{language}/{seed}")
        pauses, at = random.sample(pauses_s, len(pauses_s)), 0.5
        placed: list[tuple[float, Clip]] = []
        sounds: list[tuple[float, Sound]] = []
        for index, pause in enumerate([*pauses, 0.5]):
            placed.append((at, one_sentence(language, 100 * seed + index)))
            at += placed[-1][1].duration_s
            if sound is not None and index < len(pauses):  # 0.2 s of silence before it and after it
                sounds.append((at + 0.2, np.float32(peak) * sound(pause - 0.4, 100 * seed + index)))
            at += pause
        return lay_out(language, placed, at, sounds)

    return case


def under(sound: Callable[[float, int], Sound], below_db: float) -> Case:
    """Sentences with short pauses, and `sound` under all of it, so much weaker than they are."""

    def case(language: Language, seed: int) -> Clip:
        clean = in_pauses((0.5, 1.0, 0.8, 1.2, 0.6))(language, seed)
        spoken = np.concatenate([_between(clean, one.start, one.end) for one in clean.sentences])
        rms = float(np.sqrt(np.mean(np.square(spoken, dtype=np.float64)))) * 10 ** (-below_db / 20) / 32768
        floor = sound(clean.duration_s, seed)
        audio = clean.samples + floor * np.float32(rms / floor.std())
        pcm = np.rint(np.clip(audio * 32768, -32768, 32767)).astype(np.int16)
        return Clip(language, pcm, clean.sentences)

    return case


def nobody(sound: Callable[[float, int], Sound], duration_s: float = 30.0) -> Case:
    """Only `sound`."""
    return lambda language, seed: lay_out(language, [], duration_s, [(0.0, np.float32(PEAK) * sound(duration_s, seed))])


def across_the_edge(language: Language, seed: int) -> Clip:
    """Two sentences, one that is being said at EDGE_S, two more. How much of it is said by then goes with the seed."""
    share = (0.5, 0.05, 0.95, 0.25, 0.75)[seed % 5]
    clips = [one_sentence(language, 100 * seed + index) for index in range(5)]
    start = EDGE_S - share * clips[2].duration_s
    places, at = [start], start
    for clip in (clips[1], clips[0]):  # close before it: nothing but the window's length cuts there
        at -= clip.duration_s + 0.5
        places.insert(0, at)
    at = start + clips[2].duration_s + 0.5
    for clip in clips[3:]:
        places.append(at)
        at += clip.duration_s + 0.5
    return lay_out(language, list(zip(places, clips, strict=True)), at)


def packed_across_the_edge(language: Language, seed: int) -> Clip:
    """Sentences with pauses of 0.5 s from the beginning on, one of them being said at EDGE_S and one at twice that."""
    placed: list[tuple[float, Clip]] = []
    at, edge = 0.3, EDGE_S
    for index in range(30):
        clip = one_sentence(language, 100 * seed + index)
        if at <= edge < at + clip.duration_s + 0.5:  # half of it is said by then
            at = max(at, edge - clip.duration_s / 2)
            edge += EDGE_S
        placed.append((at, clip))
        at += clip.duration_s + 0.5
        if edge > 2.5 * EDGE_S:
            break
    return lay_out(language, placed, at)


def ends_within(language: Language, seed: int) -> Clip:
    """Three sentences, and a fourth that the end of the file cuts off at EDGE_S."""
    share = (0.5, 0.3, 0.7, 0.4, 0.6)[seed % 5]
    clips = [one_sentence(language, 100 * seed + index) for index in range(4)]
    at = EDGE_S - share * clips[3].duration_s
    places = [at]
    for clip in reversed(clips[:3]):
        at -= clip.duration_s + 0.5
        places.insert(0, at)
    return lay_out(language, list(zip(places, clips, strict=True)), EDGE_S)


def _noise(colour: str) -> Callable[[float, int], Sound]:
    return lambda duration_s, seed: noise(colour, duration_s, seed=seed)


def _music(name: str) -> Callable[[float, int], Sound]:
    return lambda duration_s, _: MUSIC[name](duration_s)


def _between(clip: Clip, start: float, end: float) -> Pcm:
    return clip.pcm[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]


SHORT_S = (4.0, 7.0, 10.0, 14.0, 20.0)
CASES: dict[str, Case] = {
    "digital silence of 5 to 60 s": in_pauses((5.0, 15.0, 30.0, 45.0, 60.0)),
    "a quiet room's noise of 5 to 60 s": in_pauses((5.0, 15.0, 30.0, 45.0, 60.0), _noise("pink"), 0.01),
    **{f"{one} noise of 4 to 20 s": in_pauses(SHORT_S, _noise(one)) for one in ("white", "brown")},
    **{f"music of 4 to 20 s, {one}": in_pauses(SHORT_S, _music(one)) for one in MUSIC},
    "white noise under it, 20 dB weaker": under(_noise("white"), 20.0),
    "music under it, 20 dB weaker": under(_music("band"), 20.0),
    "nobody, white noise": nobody(_noise("white")),
    "nobody, music": nobody(_music("band")),
    "silence, then a sentence cut at 29.9 s": across_the_edge,
    "sentences throughout, two cut at 29.9 s": packed_across_the_edge,
    "the file ends at 29.9 s in a sentence": ends_within,
}


# -- counting ----------------------------------------------------------------------------------------------------------


def count(clip: Clip, found: Found) -> dict[str, int]:
    """Sentences that count, and how many of them are lost, how many were invented."""
    text, segments = found
    whole = Clip(clip.language, clip.pcm, tuple(one for one in clip.sentences if one.end <= clip.duration_s))
    outside = [one for one in segments if _is_nobodys(one, clip)]
    if not whole.sentences:
        return {"sentences": 0, "lost": 0, "invented": len(outside)}
    untouched = sum(not any(_meet(one, (s.start, s.end)) for one in segments) for s in whole.sentences)
    missing, doubled = lost_and_doubled(whole, text, segments)
    if len(whole.sentences) < len(clip.sentences):  # what was written for the one that is cut off is nobody's
        doubled = 0
    # A segment in nobody's time is most often a run of words that nobody said, too.
    return {
        "sentences": len(whole.sentences),
        "lost": max(missing, untouched),
        "invented": max(len(outside), doubled),
    }


def flagged(clip: Clip, transcript: Transcript) -> int:
    """Of the segments in nobody's time, those with a flag that says so."""
    segments = (one for one in transcript.segments if one.text and DOUBTED.intersection(one.flags))
    return sum(_is_nobodys((one.start, one.end), clip) for one in segments)


def _is_nobodys(segment: tuple[float, float], clip: Clip) -> bool:
    return not any(_meet(segment, (one.start, one.end)) for one in clip.sentences)


def _meet(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return min(a[1], b[1]) > max(a[0], b[0])


def measure_case(clips: dict[str, Clip]) -> dict[str, Any]:
    """One case's recordings, by setting; and what the reference makes of those that the last one gets wrong."""
    report: dict[str, Any] = {"audio_s": round(sum(clip.duration_s for clip in clips.values()))}
    found: dict[str, Found] = {}
    done: dict[str, Transcript] = {}
    for algorithm, length_s in SETTINGS:
        done, found, report[f"{algorithm}, {length_s} s"] = _measured(clips, algorithm, length_s)
    wrong = report[f"{algorithm}, {length_s} s"]["where"]
    heard = {name: transcribe_openai(reference_model(), clips[name].pcm) for name in wrong}
    theirs: dict[str, Found] = {name: (one.text, one.segments) for name, one in heard.items()}
    different = [name for name in wrong if theirs[name][0] != found[name][0]]
    report["reference"] = _sum({name: clips[name] for name in wrong}, theirs) | {
        "recordings": len(wrong),
        "texts_equal": len(wrong) - len(different),
        "different_and_drawn": sum(done[name].n_fallbacks > 0 for name in different),
    }
    return report


def measure_windows(seeds: Sequence[int], cases: Sequence[str]) -> dict[str, Any]:
    """Every case's recordings of these seeds in `windows`, all in one sum."""
    clips = {
        f"{case}, {lang}/{seed}": CASES[case](lang, seed) for case in cases for lang in LANGUAGES for seed in seeds
    }
    return {"seeds": list(seeds), "recordings": len(clips), **_measured(clips, *SETTINGS[0])[2]}


def _measured(
    clips: dict[str, Clip], algorithm: Algorithm, length_s: int
) -> tuple[dict[str, Transcript], dict[str, Found], dict[str, Any]]:
    """The recordings' Transcripts in one setting, what of them is counted, and the counts."""
    config = demo_config(algorithm=algorithm, chunk_length_s=length_s)
    assert not config.condition_on_previous_text
    done = transcribe(clips, config, "cpu", "float32")
    found: dict[str, Found] = {k: (t.text, [(s.start, s.end) for s in t.segments if s.text]) for k, t in done.items()}
    n_flagged = sum(flagged(clip, done[name]) for name, clip in clips.items())
    return done, found, _sum(clips, found) | {"flagged": n_flagged}


def _sum(clips: dict[str, Clip], found: dict[str, Found]) -> dict[str, Any]:
    counts = {name: count(clip, found[name]) for name, clip in clips.items()}
    score = sum((word_score(clip.text, found[name][0], clip.language) for name, clip in clips.items()), Score())
    total: dict[str, Any] = {key: sum(one[key] for one in counts.values()) for key in ("sentences", "lost", "invented")}
    if score.n_reference:
        total["wer_percent"] = round(100 * score.rate, 1)
    total["where"] = sorted(name for name, one in counts.items() if one["lost"] or one["invented"])
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--more", type=int, default=0)
    parser.add_argument("--case", choices=CASES, action="append", help="all, if not given")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    report: dict[str, Any] = {
        "benchmark": "adversarial",
        "recordings_of_each_case": len(LANGUAGES) * arguments.seeds,
        "cases": {},
        "machine": machine(),
    }
    seeds = range(1, arguments.seeds + 1)
    for case in arguments.case or CASES:
        clips = {f"{language}/{seed}": CASES[case](language, seed) for language in LANGUAGES for seed in seeds}
        report["cases"][case] = measure_case(clips)
        print(case, report["cases"][case], file=sys.stderr)
        if arguments.out is not None:  # after each: a run that is stopped has measured something
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.more:
        others = range(arguments.seeds + 1, arguments.seeds + arguments.more + 1)
        report["windows_on_other_seeds"] = measure_windows(others, arguments.case or list(CASES))
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
