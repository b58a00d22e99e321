"""Speech for sentences: espeak-ng through its C library, 16 kHz samples and the exact start of every word.

The library comes from the `espeakng-loader` wheel, else from the system. Its state is global to the process and
outlives a call (the pitch wobble goes on where the last sentence left it), so every utterance is spoken by a freshly
loaded copy: 0.4 ms, and the same request gives the same samples whatever was said before.
Knows nothing about windows, tokens or models.

    python -m pipeline.demo.train.synth CORPUS --en 11000 --de 9000 --es 9000 --seed 5
"""

from __future__ import annotations

import _ctypes
import argparse
import ctypes
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.demo.train.lexicon import LANGUAGES, Language
from pipeline.demo.train.sentences import draw_split

SAMPLE_RATE = 16_000

# Voice variants. Evaluation and the clips use the held-out ones only.
TRAINING_VOICES = (
    "m1 m2 m3 m4 m6 m7 f1 f2 f4 f5 Andy Alicia max linda steph Annie robert pablo john edward2 anika boris"
).split()
HELD_OUT_VOICES = "m5 f3 belinda paul".split()
# American twice: it is what the held-out recordings mostly are. "en" is espeak's name for its British voice.
ACCENTS: dict[Language, tuple[str, ...]] = {
    "en": ("en-us", "en-us", "en", "en-gb-x-rp"),
    "de": ("de",),
    "es": ("es", "es-419"),
}

_ESPEAK_RATE = 22_050
_QUIET = 0.003  # amplitude below which the edges of an utterance are silence
_HEAD = SAMPLE_RATE // 100  # 10 ms kept before the first sound
_TAIL = SAMPLE_RATE // 40  # 25 ms kept after the last


@dataclass(frozen=True, slots=True)
class Word:
    """A word as it is written, punctuation included; seconds, half-open."""

    text: str
    start: float
    end: float

    def shifted(self, seconds: float) -> Word:
        return Word(self.text, self.start + seconds, self.end + seconds)


@dataclass(frozen=True, slots=True)
class Voice:
    """Who speaks and how: an espeak accent with a variant, words a minute, and pitch and its range from 0 to 99."""

    accent: str
    variant: str
    speed: int = 155
    pitch: int = 50
    pitch_range: int = 50

    @property
    def name(self) -> str:
        return f"{self.accent}+{self.variant}"


@dataclass(frozen=True, slots=True)
class Speech:
    """One spoken sentence, edges trimmed; its words begin at 0 and cover it to its end."""

    samples: NDArray[np.float32]
    words: tuple[Word, ...]

    @property
    def duration_s(self) -> float:
        return len(self.samples) / SAMPLE_RATE


class EspeakError(RuntimeError):
    """The library is missing, does not start, or does not know a voice."""


def speak(text: str, voice: Voice) -> Speech:
    """Synthesise one sentence. The same arguments give the same samples, from any thread."""
    from scipy.signal import resample_poly

    raw, events = _run_espeak(text, voice)
    samples = resample_poly(raw.astype(np.float32) / 32768, 320, 441).astype(np.float32)
    loud = np.flatnonzero(np.abs(samples) > _QUIET)
    if not len(loud):
        raise EspeakError(f"voice {voice.name} gave no sound for {text!r}")
    first, last = max(0, loud[0] - _HEAD), min(len(samples), loud[-1] + _TAIL)
    trimmed = samples[first:last]
    starts = [(position, second - first / SAMPLE_RATE) for position, second in events]
    return Speech(trimmed, _words(text, starts, len(trimmed) / SAMPLE_RATE))


def draw_voice(random: Random, language: Language, *, held_out: bool) -> Voice:
    """A speaker from one side of the split; held-out ones keep to three common speeds."""
    return Voice(
        accent=random.choice(ACCENTS[language]),
        variant=random.choice(HELD_OUT_VOICES if held_out else TRAINING_VOICES),
        speed=random.choice((140, 155, 172)) if held_out else random.randint(125, 190),
        pitch=random.randint(30, 70),
        pitch_range=random.randint(35, 65),
    )


# --- word times -------------------------------------------------------------------------------------------------


def _words(text: str, starts: list[tuple[int, float]], duration_s: float) -> tuple[Word, ...]:
    """Words of `text` from (character, second) events; a word ends where the next one starts.

    espeak sometimes joins short words and sends one event for both: the gap is then shared by letters.
    """
    matches = list(re.finditer(r"\S+", text))
    known: dict[int, float] = {0: 0.0, len(matches): duration_s}
    for position, second in starts:
        index = max((i for i, match in enumerate(matches) if match.start() <= position), default=0)
        known.setdefault(index, min(max(0.0, second), duration_s))
    lengths = [len(match.group()) for match in matches]
    bounds = _fill_gaps(known, lengths)
    return tuple(Word(match.group(), bounds[i], bounds[i + 1]) for i, match in enumerate(matches))


def _fill_gaps(known: dict[int, float], lengths: list[int]) -> list[float]:
    """All word bounds, the unknown ones interpolated in proportion to word lengths."""
    at_letter = np.concatenate([[0], np.cumsum(lengths)])
    indices = sorted(known)
    seconds = np.maximum.accumulate([known[i] for i in indices])
    return [float(bound) for bound in np.interp(at_letter, at_letter[indices], seconds)]


# --- the C library ----------------------------------------------------------------------------------------------


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # characters, from 1
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
_LAST_EVENT, _WORD_EVENT = 0, 1
_SYNCHRONOUS = 2
_RATE, _PITCH, _RANGE = 1, 3, 4
_UTF8 = 1
_LOCK = threading.Lock()


def _run_espeak(text: str, voice: Voice) -> tuple[NDArray[np.int16], list[tuple[int, float]]]:
    """The samples at espeak's own rate, and (character position, second) of every word event."""
    pieces: list[NDArray[np.int16]] = []
    starts: list[tuple[int, float]] = []

    def receive(samples: Any, n_samples: int, events: Any) -> int:
        if n_samples > 0 and samples:
            pieces.append(np.ctypeslib.as_array(samples, shape=(n_samples,)).copy())
        words = (event for event in _until_last(events) if event.type == _WORD_EVENT)
        starts.extend((event.text_position - 1, event.sample / _ESPEAK_RATE) for event in words)
        return 0

    callback = _Callback(receive)
    with _LOCK, _fresh_library() as espeak:
        espeak.espeak_SetSynthCallback(callback)
        _set_voice(espeak, voice)
        encoded = text.encode() + b"\0"
        espeak.espeak_Synth(encoded, len(encoded), 0, 1, 0, _UTF8, None, None)
        espeak.espeak_Synchronize()
    if not pieces:
        raise EspeakError(f"voice {voice.name} gave no audio for {text!r}")
    return np.concatenate(pieces), starts


def _until_last(events: Any) -> Iterator[Any]:
    index = 0
    while events[index].type != _LAST_EVENT:
        yield events[index]
        index += 1


def _set_voice(espeak: ctypes.CDLL, voice: Voice) -> None:
    # An unknown accent leaves the voice as it was, and an unknown variant is dropped without a word.
    known = (_data_folder(espeak) / "voices" / "!v" / voice.variant).is_file()
    if espeak.espeak_SetVoiceByName(voice.name.encode()) != 0 or not known:
        raise EspeakError(f"espeak-ng has no voice {voice.name!r}")
    for parameter, value in ((_RATE, voice.speed), (_PITCH, voice.pitch), (_RANGE, voice.pitch_range)):
        espeak.espeak_SetParameter(parameter, value, 0)


def _data_folder(espeak: ctypes.CDLL) -> Path:
    folder = ctypes.c_char_p()
    espeak.espeak_Info(ctypes.byref(folder))
    return Path((folder.value or b"").decode())


@contextmanager
def _fresh_library() -> Iterator[ctypes.CDLL]:
    """A copy of the library whose static state is new; unloaded afterwards."""
    library, data = _locate()
    try:
        espeak = ctypes.CDLL(library)
    except OSError as error:
        raise EspeakError("espeak-ng is missing: install the extra 'train', or the system's espeak-ng") from error
    try:
        if espeak.espeak_Initialize(_SYNCHRONOUS, 500, data, 0) != _ESPEAK_RATE:
            raise EspeakError(f"espeak-ng at {library} does not start with its data at {data!r}")
        if hasattr(espeak, "espeak_ng_SetRandSeed"):  # since 1.52: breath noise
            espeak.espeak_ng_SetRandSeed(1)
        yield espeak
        espeak.espeak_Terminate()
    finally:
        _ctypes.dlclose(espeak._handle)


def _locate() -> tuple[str, bytes | None]:
    """(library, data folder); the system's library finds its own data."""
    try:
        import espeakng_loader
    except ImportError:
        return "libespeak-ng.so.1", None
    return str(espeakng_loader.get_library_path()), str(espeakng_loader.get_data_path()).encode()


# --- corpora ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Utterance:
    """One line of a corpus: a sentence and where its samples lie in the shard's audio."""

    language: Language
    text: str
    english: str
    voice: str
    offset: int  # samples
    n_samples: int
    words: tuple[Word, ...]


def write_corpus(
    folder: Path, counts: dict[Language, int], *, seed: int, held_out: bool = False, workers: int = 1
) -> None:
    """Synthesise `counts` sentences a language into `workers` shards: `NN.npy` (int16) and `NN.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    shares = [{language: len(range(k, n, workers)) for language, n in counts.items()} for k in range(workers)]
    jobs = [(folder / f"{k:02d}", share, seed * 1000 + k, held_out) for k, share in enumerate(shares)]
    if workers == 1:
        _write_shard(*jobs[0])
        return
    with get_context("spawn").Pool(workers) as pool:
        pool.starmap(_write_shard, jobs)


def _write_shard(stem: Path, counts: dict[Language, int], seed: int, held_out: bool) -> None:
    random, noise = Random(seed), np.random.default_rng(seed)
    plan = [language for language, count in counts.items() for _ in range(count)]
    random.shuffle(plan)
    audio: list[NDArray[np.int16]] = []
    offset = 0
    with stem.with_suffix(".jsonl").open("w", encoding="utf-8") as lines:
        for language in plan:
            sentence = draw_split(random, held_out=held_out)
            voice = draw_voice(random, language, held_out=held_out)
            text = sentence.in_language(language)
            speech = speak(text, voice)
            samples = speech.samples
            if not held_out and random.random() < 0.25:
                samples = _reverberate(samples, random, noise)
            audio.append(to_int16(samples * (0.5 / np.abs(samples).max())))
            row = Utterance(language, text, sentence.en, voice.name, offset, len(samples), speech.words)
            lines.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
            offset += len(samples)
    np.save(stem.with_suffix(".npy"), np.concatenate(audio))


def _reverberate(samples: NDArray[np.float32], random: Random, noise: np.random.Generator) -> NDArray[np.float32]:
    """A small room: a decaying noise tail of 50 to 250 ms behind the direct sound."""
    from scipy.signal import fftconvolve

    n_tail = int(SAMPLE_RATE * random.uniform(0.05, 0.25))
    decay = np.exp(-np.arange(n_tail) / (n_tail / 5))
    response = noise.standard_normal(n_tail) * decay * random.uniform(0.02, 0.08)
    response[0] = 1.0
    return np.asarray(fftconvolve(samples, response)[: len(samples)], np.float32)


def to_int16(samples: NDArray[np.float32]) -> NDArray[np.int16]:
    """Float samples in [-1, 1] as 16-bit integers, clipped."""
    return np.rint(np.clip(samples, -1.0, 1.0) * 32767).astype(np.int16)


def read_corpus(stem: Path) -> tuple[NDArray[np.int16], list[Utterance]]:
    """One shard: its audio, mapped and not read, and its utterances."""
    audio = np.load(stem.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
    with stem.with_suffix(".jsonl").open(encoding="utf-8") as lines:
        return audio, [_utterance(json.loads(line)) for line in lines]


def _utterance(row: dict[str, Any]) -> Utterance:
    return Utterance(**(row | {"words": tuple(Word(**word) for word in row["words"])}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Synthesise a corpus of demo sentences.")
    parser.add_argument("folder", type=Path)
    for language in LANGUAGES:
        parser.add_argument(f"--{language}", type=int, default=200, help="sentences (default 200)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--held-out", action="store_true", help="held-out sentences and voices, no reverberation")
    parser.add_argument("--workers", type=int, default=2, help="processes, one shard each (default 2)")
    options = parser.parse_args()
    started = time.monotonic()
    counts: dict[Language, int] = {language: getattr(options, language) for language in LANGUAGES}
    write_corpus(options.folder, counts, seed=options.seed, held_out=options.held_out, workers=options.workers)
    seconds = time.monotonic() - started
    print(f"{sum(counts.values())} sentences in {seconds:.1f} s")


if __name__ == "__main__":
    main()
