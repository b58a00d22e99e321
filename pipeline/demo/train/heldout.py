"""Recordings that training never heard: held-out sentences by held-out voices, with exact times.

`make_clip` and `make_long` give audio in memory for tests and benchmarks; the command line writes WAV files with
`manifest.jsonl` and `references.json` beside them. The same arguments give the same samples.
Knows nothing about models.

    python -m pipeline.demo.train.heldout SET --clips 30 --seed 1
    python -m pipeline.demo.train.heldout SET --long-minutes 30 --language en [--no-pause]
"""

from __future__ import annotations

import argparse
import json
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.demo.train.lexicon import LANGUAGES, Language
from pipeline.demo.train.sentences import draw_split
from pipeline.demo.train.synth import SAMPLE_RATE, Speech, Voice, Word, draw_voice, speak, to_int16

_PEAK = 0.3  # of full scale, for the loudest sample of every sentence
_NO_PAUSE_S = (0.05, 0.09)  # below the 0.1 s that a cut needs


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence of a recording; seconds from its beginning."""

    text: str
    english: str  # what a translation should say
    start: float
    end: float
    words: tuple[Word, ...]
    voice: str


@dataclass(frozen=True, slots=True)
class Clip:
    """A recording of 16 kHz mono samples and all that is said in it."""

    language: Language
    pcm: NDArray[np.int16]
    sentences: tuple[Sentence, ...]

    @property
    def duration_s(self) -> float:
        return len(self.pcm) / SAMPLE_RATE

    @property
    def text(self) -> str:
        return " ".join(sentence.text for sentence in self.sentences)

    @property
    def english(self) -> str:
        return " ".join(sentence.english for sentence in self.sentences)

    @property
    def words(self) -> tuple[Word, ...]:
        return tuple(word for sentence in self.sentences for word in sentence.words)

    @property
    def samples(self) -> NDArray[np.float32]:
        """The audio as float32 in [-1, 1), as 16-bit files are read."""
        return self.pcm.astype(np.float32) / np.float32(32768)


def make_clip(
    language: Language,
    n_sentences: int,
    seed: int,
    *,
    pause_s: tuple[float, float] = (0.1, 0.7),
    lead_s: float = 0.2,
    tail_s: float = 0.3,
    noise: float = 0.002,
    one_voice: bool = True,
) -> Clip:
    """A short recording: `n_sentences` by one speaker (or each by another), with pauses within `pause_s`.

    `noise` is the standard deviation of the white noise under all of it, of full scale.
    """
    random = Random(f"clip/{language}/{seed}")
    speaker = draw_voice(random, language, held_out=True) if one_voice else None
    builder = _Builder(language, lead_s)
    for index in range(n_sentences):
        if index:
            builder.pause(random.uniform(*pause_s))
        builder.say(random, speaker)
    builder.pause(tail_s)
    return builder.finish(noise, seed)


def make_long(
    language: Language,
    seed: int,
    *,
    minutes: float | None = None,
    n_sentences: int | None = None,
    pause_s: tuple[float, float] | None = None,
    noise: float = 0.002,
) -> Clip:
    """A long recording, every sentence by another voice, until `minutes` or `n_sentences` are reached.

    Pauses are within `pause_s`; by default they last 0.2 to 1.2 s and one in twenty 2 to 5 s. Below 0.1 s there is
    none to cut in; below 0.05 s nothing but the words themselves tells where a sentence ends.
    """
    if (minutes is None) == (n_sentences is None):
        raise ValueError("give either minutes or n_sentences")
    random = Random(f"long/{language}/{seed}")
    builder = _Builder(language, lead_s=0.2)
    while not builder.reached(minutes, n_sentences):
        builder.say(random, None)
        builder.pause(_draw_pause(random, pause_s))
    return builder.finish(noise, seed)


def _draw_pause(random: Random, pause_s: tuple[float, float] | None) -> float:
    if pause_s is not None:
        return random.uniform(*pause_s)
    return random.uniform(2.0, 5.0) if random.random() < 0.05 else random.uniform(0.2, 1.2)


class _Builder:
    """A recording as it grows. All places are whole samples, so the reference times are exact."""

    def __init__(self, language: Language, lead_s: float) -> None:
        self.language: Language = language
        self.pieces: list[NDArray[np.float32]] = []
        self.n_samples = 0
        self.sentences: list[Sentence] = []
        self.pause(lead_s)

    def reached(self, minutes: float | None, n_sentences: int | None) -> bool:
        if minutes is not None:
            return self.n_samples >= minutes * 60 * SAMPLE_RATE
        return n_sentences is not None and len(self.sentences) >= n_sentences

    def pause(self, seconds: float) -> None:
        self._append(np.zeros(round(seconds * SAMPLE_RATE), np.float32))

    def say(self, random: Random, speaker: Voice | None) -> None:
        """The next held-out sentence, by `speaker` or by a voice of its own."""
        sentence = draw_split(random, held_out=True)
        voice = speaker or draw_voice(random, self.language, held_out=True)
        text = sentence.in_language(self.language)
        speech = speak(text, voice)
        self.sentences.append(self._placed(text, sentence.en, voice, speech))
        self._append(speech.samples * np.float32(_PEAK / np.abs(speech.samples).max()))

    def _placed(self, text: str, english: str, voice: Voice, speech: Speech) -> Sentence:
        start = self.n_samples / SAMPLE_RATE
        words = tuple(word.shifted(start) for word in speech.words)
        return Sentence(text, english, start, start + speech.duration_s, words, voice.name)

    def _append(self, samples: NDArray[np.float32]) -> None:
        self.pieces.append(samples)
        self.n_samples += len(samples)

    def finish(self, noise: float, seed: int) -> Clip:
        audio = np.concatenate(self.pieces)
        floor = np.random.default_rng(seed).standard_normal(len(audio), dtype=np.float32)
        return Clip(self.language, to_int16(audio + np.float32(noise) * floor), tuple(self.sentences))


def cut_at_pauses(
    clip: Clip, longest_s: float = 10.0, *, pcm: NDArray[np.int16] | None = None
) -> Iterator[NDArray[np.int16]]:
    """The recording in pieces of whole sentences up to `longest_s`, cut in the middle of pauses.

    `pcm` stands for the clip's own samples, where they went through a lossy format.
    """
    samples = clip.pcm if pcm is None else pcm
    middles = [(left.end + right.start) / 2 for left, right in pairwise(clip.sentences)]
    begin = 0.0
    for middle, following in pairwise([*middles, clip.duration_s]):
        if following - begin > longest_s:
            yield samples[round(begin * SAMPLE_RATE) : round(middle * SAMPLE_RATE)]
            begin = middle
    yield samples[round(begin * SAMPLE_RATE) :]


# --- files ------------------------------------------------------------------------------------------------------


def reference(clip: Clip) -> dict[str, Any]:
    """A clip's entry in `references.json`; times to 0.1 ms."""
    return {
        "language": clip.language,
        "sentences": [
            {
                "text": sentence.text,
                "english": sentence.english,
                "start": round(sentence.start, 4),
                "end": round(sentence.end, 4),
                "words": [
                    {"word": word.text, "start": round(word.start, 4), "end": round(word.end, 4)}
                    for word in sentence.words
                ],
            }
            for sentence in clip.sentences
        ],
    }


def manifest_row(clip: Clip, clip_id: str, file_name: str, kind: str) -> dict[str, Any]:
    """A clip's line in `manifest.jsonl`. The language is to be detected, so it travels under a free key."""
    return {
        "audio_filepath": file_name,
        "id": clip_id,
        "text": clip.text,
        "duration": round(clip.duration_s, 4),
        "kind": kind,
        "spoken_language": clip.language,
    }


def write_index(folder: Path, rows: list[dict[str, Any]], references: dict[str, Any]) -> None:
    """`manifest.jsonl` and `references.json` of a folder of clips."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "manifest.jsonl").write_text("".join(lines), encoding="utf-8")
    text = json.dumps(references, ensure_ascii=False, indent=1)
    (folder / "references.json").write_text(text + "\n", encoding="utf-8")


def write_wav(path: Path, clip: Clip) -> None:
    """16 kHz mono 16-bit WAV."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(clip.pcm.tobytes())


def write_set(folder: Path, clips: dict[str, Clip], kind: str) -> None:
    """WAV files with their manifest and references."""
    folder.mkdir(parents=True, exist_ok=True)
    for clip_id, clip in clips.items():
        write_wav(folder / f"{clip_id}.wav", clip)
    rows = [manifest_row(clip, clip_id, f"{clip_id}.wav", kind) for clip_id, clip in clips.items()]
    write_index(folder, rows, {clip_id: reference(clip) for clip_id, clip in clips.items()})


def make_set(n_clips: int, seed: int) -> dict[str, Clip]:
    """`n_clips` clips of 1 to 5 sentences, the languages in turn."""
    sizes = Random(f"set/{seed}")
    clips: dict[str, Clip] = {}
    for index in range(n_clips):
        language = LANGUAGES[index % len(LANGUAGES)]
        clips[f"{language}-{seed}-{index:04d}"] = make_clip(language, sizes.randint(1, 5), seed * 100_000 + index)
    return clips


def main() -> None:
    parser = argparse.ArgumentParser(description="Write held-out recordings with manifest and references.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=30, help="short clips, the three languages in turn")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--long-minutes", type=float, help="one long recording instead of clips")
    parser.add_argument("--language", choices=LANGUAGES, default="en", help="of the long recording")
    parser.add_argument("--no-pause", action="store_true", help="long recording: sentences without gaps")
    options = parser.parse_args()
    if options.long_minutes is None:
        clips, kind = make_set(options.clips, options.seed), "clean"
    else:
        pause_s = _NO_PAUSE_S if options.no_pause else None
        clip = make_long(options.language, options.seed, minutes=options.long_minutes, pause_s=pause_s)
        clips, kind = {f"{options.language}-{options.seed}-long": clip}, "long"
    write_set(options.folder, clips, kind)
    print(f"{len(clips)} recordings, {sum(clip.duration_s for clip in clips.values()):.0f} s, in {options.folder}")


if __name__ == "__main__":
    main()
