"""Training windows, made on the fly: sentences laid out in a window, what else is heard, log-mel, and what the decoder
shall say.

A window is 4, 10 or 30 s. A short one stands for a random slice of the 30 s that the model always sees: it takes
encoder positions and timestamps from anywhere among the 1,500, so all of them are learnt at a seventh of the price.
Knows the tokens; knows nothing about the network or its losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.demo.train.lexicon import LANGUAGES, Language
from pipeline.demo.train.sounds import Samples, SoundBank
from pipeline.demo.train.synth import SAMPLE_RATE, Utterance, read_corpus
from pipeline.demo.train.targets import (
    IGNORED,
    MAX_ORDER,
    N_POSITIONS,
    POSITIONS_PER_S,
    Placed,
    Style,
    Targets,
    Task,
    write_targets,
)
from pipeline.demo.train.vocabulary import END, FIRST_TIMESTAMP, PREVIOUS, Vocabulary, encode_word

if TYPE_CHECKING:
    from torch import Tensor

SAMPLES_PER_POSITION = SAMPLE_RATE // POSITIONS_PER_S
N_SLOTS = 448  # of the decoder
N_MELS = 80

CHARACTERS = " abcdefghijklmnopqrstuvwxyzäöüßáéíóúñ'"
_CHARACTER_CLASS = {character: index for index, character in enumerate(CHARACTERS, start=1)}
N_CHARACTER_CLASSES = len(CHARACTERS) + 1  # and the CTC blank, which is 0

_TELEPHONE_MELS = (58, 62)  # the bands at 3.4 and 4.0 kHz
_MEL_RANGE = 8.0  # decades below the loudest that a window keeps
_LEAST_ROOM_S = 0.3  # at the window's end, less than this is not begun
_LEAST_PAUSE_S = 0.25  # that a sound is put into
_LOUD = 0.3  # about a sentence's peak


# --- the corpus -------------------------------------------------------------------------------------------------


class Corpus:
    """The utterances of some folders by language. Audio stays on disk until it is asked for."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.by_language: dict[Language, list[tuple[int, Utterance]]] = {language: [] for language in LANGUAGES}
        self._shards: list[NDArray[np.int16]] = []
        for stem in sorted(path.with_suffix("") for folder in folders for path in folder.glob("*.npy")):
            audio, utterances = read_corpus(stem)
            for utterance in utterances:
                self.by_language[utterance.language].append((len(self._shards), utterance))
            self._shards.append(audio)
        missing = [language for language, found in self.by_language.items() if not found]
        if missing:
            raise ValueError(f"no sentences in {', '.join(missing)} under {', '.join(map(str, folders))}")

    def draw(self, random: Random, language: Language) -> tuple[Utterance, Samples]:
        shard, utterance = random.choice(self.by_language[language])
        audio = self._shards[shard][utterance.offset : utterance.offset + utterance.n_samples]
        return utterance, audio.astype(np.float32) / np.float32(32768)

    def draw_text(self, random: Random, language: Language, task: Task) -> str:
        _, utterance = random.choice(self.by_language[language])
        return utterance.english if task == "translate" else utterance.text


# --- one window -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scene:
    """What makes a window hard, beside what is said in it. Most windows have at least one of these."""

    long_pauses: bool
    sounds_in_pauses: bool
    sound_under_it: bool
    padded: bool  # digital silence from some moment after the last sentence on, as a decoder sees a short span


@dataclass(frozen=True, slots=True)
class Example:
    """One finished window."""

    samples: Samples
    style: Style
    placed: tuple[Placed, ...]
    targets: Targets
    first_slot: int  # of the decoder's positions

    @property
    def characters(self) -> list[int]:
        """Classes of all that is heard, for CTC."""
        text = " ".join(word.text for sentence in self.placed for word in sentence.words)
        text = text.lower().replace("-", " ")
        return [_CHARACTER_CLASS[character] for character in text if character in _CHARACTER_CLASS]


class WindowMaker:
    """Draws windows from a corpus. Its state is its random generators, so a seed fixes all that it draws."""

    def __init__(self, corpus: Corpus, seed: int) -> None:
        self.corpus = corpus
        self.random = Random(seed)
        self.generator = np.random.default_rng(seed)
        self._noises = _noise_bank(self.generator)
        self._sounds = SoundBank(seed)

    def draw(self, n_positions: int) -> Example:
        style = self._draw_style(n_positions)
        scene = self._draw_scene(style)
        samples, placed = self._lay_out(style, scene)
        samples = self._furnish(samples, placed, scene)
        prompt = self._draw_prompt(style)
        targets = write_targets(style, placed, prompt)
        return Example(
            samples=self._pad(self._degrade(samples, speech=bool(placed)), placed, scene),
            style=style,
            placed=tuple(placed),
            targets=targets,
            first_slot=self._draw_slot(style, prompt, len(targets.tokens)),
        )

    def draw_equaliser(self) -> NDArray[np.float32]:
        """[mels] in log10: flat, or for 40 % of the windows a smooth curve, as another microphone would give.

        15 % have nothing above 3.4 to 4 kHz, as a telephone would give.
        """
        curve = np.zeros(N_MELS)
        if self.random.random() < 0.4:
            knots = self.generator.uniform(-0.3, 0.3, 5)
            curve = np.interp(np.arange(N_MELS), np.linspace(0, N_MELS - 1, 5), knots)
        if self.random.random() < 0.15:
            curve[self.random.randint(*_TELEPHONE_MELS) :] = -_MEL_RANGE
        return curve.astype(np.float32)

    def _draw_style(self, n_positions: int) -> Style:
        random, full = self.random, n_positions == N_POSITIONS
        language = random.choices(LANGUAGES, (0.36, 0.32, 0.32))[0]
        translate = random.random() < (0.05 if language == "en" else 0.35)
        timestamps = random.random() < (0.62 if full else 0.5)
        return Style(
            n_positions=n_positions,
            first_position=0 if full or random.random() < 0.5 else random.randint(0, N_POSITIONS - n_positions),
            language=language,
            task="translate" if translate else "transcribe",
            timestamps=timestamps,
            speech=random.random() >= 0.08,
            names_task=translate or not timestamps or random.random() >= 0.1,
        )

    def _draw_scene(self, style: Style) -> Scene:
        hard = [self.random.random() < share for share in (0.3, 0.3 if style.speech else 0.7, 0.2, 0.3)]
        return Scene(style.full and hard[0], hard[1], hard[2], hard[3])

    # What is heard.

    def _lay_out(self, style: Style, scene: Scene) -> tuple[Samples, list[Placed]]:
        """Sentences of one language one after another, until there are enough or the window is full."""
        samples = np.zeros(style.n_positions * SAMPLES_PER_POSITION, np.float32)
        placed: list[Placed] = []
        cursor, wanted = self._draw_lead(style, scene), self._draw_number(style)
        while len(placed) < wanted and cursor <= style.seconds - _LEAST_ROOM_S:
            inside = not placed and style.task == "transcribe" and self.random.random() < 0.08
            cursor = 0.0 if inside else cursor
            sentence, audio = self._draw_sentence(style, cursor, inside)
            if sentence.end > style.seconds:
                if not placed and not inside and cursor > 0:
                    cursor = 0.0  # a window needs something in it: try again from its start
                    continue
                placed.extend(self._cut_off(style, sentence, audio, samples))
                break
            self._mix(samples, audio, cursor)
            placed.append(sentence)
            cursor = sentence.end + self._draw_gap(scene)
        return samples, placed

    def _draw_lead(self, style: Style, scene: Scene) -> float:
        if not style.speech or self.random.random() < 0.3:
            return 0.0
        if scene.long_pauses and self.random.random() < 0.5:
            return self.random.uniform(2, 24)
        late = style.seconds >= 8 and self.random.random() < 0.15
        return self.random.uniform(1, 4) if late else self.random.uniform(0, 1)

    def _draw_number(self, style: Style) -> int:
        """How many sentences: half of the windows are filled, the others stop early."""
        if not style.speech:
            return 0
        return 99 if self.random.random() < 0.5 else self.random.randint(1, max(1, int(style.seconds / 3)))

    def _draw_gap(self, scene: Scene) -> float:
        """Mostly the pauses of a speaker; some sentences follow at once, some after a long silence."""
        kind = self.random.random()
        if scene.long_pauses and kind < 0.5:
            return self.random.uniform(2, 20)
        if kind < 0.25:
            return self.random.uniform(0.0, 0.1)
        return self.random.uniform(0.05, 0.7) if kind < 0.88 else self.random.uniform(0.7, 2.5)

    def _draw_sentence(self, style: Style, start: float, inside: bool) -> tuple[Placed, Samples]:
        """A sentence at `start`; `inside`: its beginning was before the window."""
        utterance, audio = self.corpus.draw(self.random, style.language)
        skipped = self.random.uniform(0.1, 0.8 * len(audio) / SAMPLE_RATE) if inside else 0.0
        audio = audio[int(skipped * SAMPLE_RATE) :]
        words = tuple(word.shifted(start - skipped) for word in utterance.words if word.start - skipped >= -0.03)
        return Placed(start, start + len(audio) / SAMPLE_RATE, words, utterance.english), audio

    def _cut_off(self, style: Style, sentence: Placed, audio: Samples, samples: Samples) -> list[Placed]:
        """The beginning of a sentence that does not fit; half of the time the window stays silent instead."""
        # Half a sentence has no translation, and without timestamps nothing else says that it was cut.
        if self.random.random() < 0.5 or (style.task == "translate" and not style.timestamps):
            return []
        self._mix(samples, audio, sentence.start)
        words = tuple(word for word in sentence.words if word.end <= style.seconds + 0.02)
        return [Placed(sentence.start, style.seconds, words, sentence.english, cut_off=True)]

    def _mix(self, samples: Samples, audio: Samples, start_s: float) -> None:
        start = int(start_s * SAMPLE_RATE)
        audio = audio[: len(samples) - start]
        samples[start : start + len(audio)] += audio * np.float32(_gain(self.random.uniform(-6, 0)))

    def _furnish(self, samples: Samples, placed: Sequence[Placed], scene: Scene) -> Samples:
        """Sounds in which nobody speaks: in the pauses, or all of the window where nobody does, from 40 dB below a
        sentence to as loud as one; and 6 to 30 dB below it under all that is said."""
        if scene.sounds_in_pauses:
            for start, end in _pauses(placed, len(samples) / SAMPLE_RATE):
                self._play(samples, start, end)
        if scene.sound_under_it and placed:
            spoken = samples[samples != 0]
            sound = self._sounds.draw(self.random, len(samples))
            loudness = float(spoken.std() / max(sound.std(), 1e-6)) if len(spoken) else 0.0
            samples = samples + sound * np.float32(loudness * _gain(-self.random.uniform(6, 30)))
        return samples

    def _play(self, samples: Samples, start: float, end: float) -> None:
        """A sound in a pause, or a part of it; seconds."""
        if self.random.random() < 0.5:  # not from edge to edge
            start += self.random.uniform(0, min(0.4, (end - start) / 3))
            end -= self.random.uniform(0, min(0.4, (end - start) / 3))
        first, last = round(start * SAMPLE_RATE), round(end * SAMPLE_RATE)
        if self.random.random() < 0.1 or last - first < _LEAST_PAUSE_S * SAMPLE_RATE:
            return
        sound = self._sounds.draw(self.random, last - first)
        fade = round(self.random.choice((0.002, 0.02, 0.1)) * SAMPLE_RATE)
        ramp = np.minimum(1.0, np.arange(1, fade + 1, dtype=np.float32) / fade)
        sound[:fade] *= ramp
        sound[-fade:] *= ramp[::-1]
        samples[first:last] += sound * np.float32(_LOUD * _gain(-max(0.0, self.random.uniform(-10, 40))))

    def _pad(self, samples: Samples, placed: Sequence[Placed], scene: Scene) -> Samples:
        """Nothing at all from some moment after the last sentence on."""
        last = placed[-1].end if placed else self.random.uniform(0.2, 20)
        if scene.padded:
            samples[round((last + self.random.choice((0.2, self.random.uniform(0, 3)))) * SAMPLE_RATE) :] = 0
        return samples

    def _degrade(self, samples: Samples, *, speech: bool) -> Samples:
        """Another volume and, for 60 %, noise 28 to 60 dB below the loudest sample."""
        samples = samples * np.float32(_gain(self.random.uniform(-18, 0)))
        if self.random.random() >= 0.6:
            return samples
        peak = max(float(np.abs(samples).max()), 1e-3 if speech else 0.1)
        level = 0.5 * peak * _gain(-self.random.uniform(28, 60))
        noise = self.random.choice(self._noises)
        start = self.random.randrange(len(noise) - len(samples))
        return samples + noise[start : start + len(samples)] * np.float32(level)

    # What is given to the decoder.

    def _draw_prompt(self, style: Style) -> list[int]:
        """The tokens of earlier text, for some windows; begins anywhere within a sentence."""
        if self.random.random() >= (0.3 if style.full else 0.12):
            return []
        length = self.random.randint(1, 223 if style.full else 30)
        language: Language = "en" if style.task == "translate" else style.language
        tokens: list[int] = []
        position = 0
        while len(tokens) < length:
            text = self.corpus.draw_text(self.random, language, style.task)
            words = [token for word in text.split() for token in encode_word(word)]
            if style.timestamps and position < 1_400:
                end = min(position + self.random.randint(60, 180), N_POSITIONS)
                words = [FIRST_TIMESTAMP + position, *words, FIRST_TIMESTAMP + end]
                position = end
            tokens += words
        return [PREVIOUS, *tokens[-length:]]

    def _draw_slot(self, style: Style, prompt: list[int], n_tokens: int) -> int:
        """Short windows have short texts: half of them begin anywhere, so that late slots are learnt as well."""
        if style.full or prompt or self.random.random() < 0.5:
            return 0
        return self.random.randint(0, max(0, N_SLOTS - 1 - n_tokens))


def _pauses(placed: Sequence[Placed], seconds: float) -> list[tuple[float, float]]:
    """Where nobody speaks in a window of so many seconds; none of it shorter than `_LEAST_PAUSE_S`."""
    starts, ends = [0.0, *(one.end for one in placed)], [*(one.start for one in placed), seconds]
    return [(start, end) for start, end in zip(starts, ends, strict=True) if end - start >= _LEAST_PAUSE_S]


def _gain(decibels: float) -> float:
    return math.pow(10.0, decibels / 20)


def _noise_bank(generator: np.random.Generator) -> list[Samples]:
    """Two minutes each of white, pink and brown noise, of unit deviation."""
    white = generator.standard_normal(120 * SAMPLE_RATE).astype(np.float32)
    spectrum = np.fft.rfft(white)
    frequency = np.arange(len(spectrum)) + 50.0
    coloured = [np.fft.irfft(spectrum / frequency**power) for power in (0.5, 1.0)]
    return [white, *(np.asarray(noise / noise.std(), np.float32) for noise in coloured)]


# --- batches ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Batch:
    """Arrays for one step; b windows of t positions, l decoder slots."""

    mels: NDArray[np.float32]  # [b, mels, 2 t]
    first_positions: NDArray[np.int64]  # [b]
    tokens: NDArray[np.int64]  # [b, l] rows of the reduced vocabulary
    slots: NDArray[np.int64]  # [b, l] decoder positions
    labels: NDArray[np.int64]  # [b, l] rows, or IGNORED
    spans: NDArray[np.int64]  # [b, l, 2] encoder positions, half-open, or -1
    orders: NDArray[np.int64]  # [b, l] which sentence, or IGNORED
    position_orders: NDArray[np.int64]  # [b, t] the sentence heard there, or IGNORED
    characters: NDArray[np.int64]  # [sum of n_characters]
    n_characters: NDArray[np.int64]  # [b]

    @property
    def audio_s(self) -> float:
        return float(self.mels.shape[0] * self.mels.shape[2] / (2 * POSITIONS_PER_S))


def make_batch(maker: WindowMaker, vocabulary: Vocabulary, n_windows: int, n_positions: int) -> Batch:
    """`n_windows` new windows of one length."""
    import torch

    examples = [maker.draw(n_positions) for _ in range(n_windows)]
    equaliser = np.stack([maker.draw_equaliser() for _ in examples])
    audio = torch.from_numpy(np.stack([example.samples for example in examples]))
    mels = log_mel(audio, torch.from_numpy(equaliser)).numpy()
    return collate(examples, mels, vocabulary)


def collate(examples: Sequence[Example], mels: NDArray[np.float32], vocabulary: Vocabulary) -> Batch:
    """Pads the targets to a common length; token i predicts label i + 1."""
    longest = max(len(example.targets.tokens) for example in examples) - 1
    n_slots = min(N_SLOTS, -(-longest // 16) * 16)  # few shapes are kinder to the allocator
    shape = (len(examples), n_slots)
    tokens = np.full(shape, vocabulary.row_of[END])
    labels, orders = np.full(shape, IGNORED), np.full(shape, IGNORED)
    spans = np.full((*shape, 2), -1)
    position_orders = np.full((len(examples), examples[0].style.n_positions), IGNORED)
    for row, example in enumerate(examples):
        targets, n = example.targets, min(len(example.targets.tokens) - 1, n_slots)
        tokens[row, :n] = vocabulary.row_of[targets.tokens[:n]]
        wanted = np.array(targets.labels[1 : n + 1])
        labels[row, :n] = np.where(wanted == IGNORED, IGNORED, vocabulary.row_of[np.maximum(wanted, 0)])
        spans[row, :n] = targets.spans[1 : n + 1]
        order = np.array(targets.orders[1 : n + 1])
        orders[row, :n] = np.where(order < 0, IGNORED, order)
        _mark_positions(position_orders[row], example.placed)
    first_slots = np.array([[example.first_slot] for example in examples])
    characters = [np.array(example.characters, np.int64) for example in examples]
    return Batch(
        mels=mels,
        first_positions=np.array([example.style.first_position for example in examples]),
        tokens=tokens,
        slots=np.minimum(first_slots + np.arange(n_slots), N_SLOTS - 1),
        labels=labels,
        spans=spans,
        orders=orders,
        position_orders=position_orders,
        characters=np.concatenate(characters),
        n_characters=np.array([len(found) for found in characters]),
    )


def _mark_positions(positions: NDArray[np.int64], placed: Sequence[Placed]) -> None:
    for order, sentence in enumerate(placed):
        start, end = int(sentence.start * POSITIONS_PER_S), int(sentence.end * POSITIONS_PER_S)
        positions[start:end] = min(order, MAX_ORDER)


def log_mel(audio: Tensor, equaliser: Tensor | None = None) -> Tensor:
    """[b, samples] -> [b, mels, 2 t]: Whisper's features, the maximum being each window's own."""
    import torch

    spectrum = torch.stft(audio, 400, 160, window=torch.hann_window(400), return_complex=True)
    power = spectrum[..., :-1].abs() ** 2
    mels = (_mel_filters() @ power).clamp(min=1e-10).log10()
    if equaliser is not None:
        mels = mels + equaliser[:, :, None]
    loudest: Tensor = mels.amax((1, 2), keepdim=True)
    return (torch.maximum(mels, loudest - _MEL_RANGE) + 4.0) / 4.0


@cache
def _mel_filters() -> Tensor:
    from whisper.audio import mel_filters

    filters: Tensor = mel_filters("cpu", N_MELS)
    return filters
