"""Measures a Whisper folder of the demo domain on held-out sentences and voices.

openai-whisper on the converted weights, float32, greedy: word and character error rates, language, translation,
long recordings with segment and word times, silence. Then the same clips in transformers and faster-whisper: do they
say the same? Prints a table and, on the last line, one JSON object.
Knows the demo sentences; knows nothing about how the model was trained.

    python -m pipeline.demo.train.evaluate [FOLDER] --clips 30
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.demo import model_path
from pipeline.demo.train.convert import to_ctranslate2, to_openai
from pipeline.demo.train.heldout import Clip, Sentence, cut_at_pauses, make_clip, make_long
from pipeline.demo.train.lexicon import LANGUAGES, Language
from pipeline.demo.train.synth import SAMPLE_RATE, Word

if TYPE_CHECKING:
    from torch import Tensor
    from whisper.model import Whisper

Figures = dict[str, Any]
_WINDOW_S = 30


@dataclass(frozen=True, slots=True)
class Heard:
    """What openai-whisper's `transcribe` made of a recording."""

    text: str
    language: str
    segments: tuple[tuple[float, float], ...]
    words: tuple[Word, ...]


# --- error rates ------------------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Lower case, no punctuation; "-" for nothing, since an empty reference has no error rate."""
    return " ".join(re.sub(r"[^\w\s']", " ", text.lower()).split()) or "-"


def word_errors(references: Sequence[str], heard: Sequence[str]) -> float:
    """Word error rate over all texts together."""
    import jiwer

    return float(jiwer.wer([normalise(text) for text in references], [normalise(text) for text in heard]))


def character_errors(references: Sequence[str], heard: Sequence[str]) -> float:
    """Character error rate over all texts together."""
    import jiwer

    return float(jiwer.cer([normalise(text) for text in references], [normalise(text) for text in heard]))


def boundary_errors(sentences: Sequence[Sentence], segments: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean distance in seconds of a sentence's start and end from those of the segment whose middle is nearest."""
    starts, ends = [], []
    for sentence in sentences:
        middle = (sentence.start + sentence.end) / 2
        start, end = min(segments, key=lambda segment: abs((segment[0] + segment[1]) / 2 - middle))
        starts.append(abs(start - sentence.start))
        ends.append(abs(end - sentence.end))
    return fmean(starts), fmean(ends)


def word_start_errors(reference: Sequence[Word], heard: Sequence[Word]) -> list[float]:
    """Distances in seconds between the starts of the words that both texts share, in order."""
    said = [normalise(word.text) for word in reference]
    found = [normalise(word.text) for word in heard]
    blocks = SequenceMatcher(None, said, found, autojunk=False).get_matching_blocks()
    return [abs(heard[block.b + k].start - reference[block.a + k].start) for block in blocks for k in range(block.size)]


# --- openai-whisper ---------------------------------------------------------------------------------------------


def transcribe(model: Whisper, pcm: NDArray[np.int16], **options: Any) -> Heard:
    """A whole recording: language detected, no conditioning on earlier text unless asked for."""
    samples = pcm.astype(np.float32) / np.float32(32768)
    settings = {"fp16": False, "condition_on_previous_text": False} | options
    result: dict[str, Any] = model.transcribe(samples, **settings)
    segments = tuple((segment["start"], segment["end"]) for segment in result["segments"])
    words = (word for segment in result["segments"] for word in segment.get("words", ()))
    return Heard(
        text=result["text"].strip(),
        language=result["language"],
        segments=segments,
        words=tuple(Word(word["word"].strip(), word["start"], word["end"]) for word in words),
    )


def _mels(clips: Sequence[NDArray[np.float32]]) -> Tensor:
    """[clips, 80, 3000], each clip padded to one window."""
    import torch
    import whisper

    windows = [whisper.pad_or_trim(torch.from_numpy(samples)) for samples in clips]
    return torch.stack([whisper.log_mel_spectrogram(window) for window in windows])


def _decode(model: Whisper, mels: Tensor, batch: int = 10, **options: Any) -> list[Any]:
    import whisper

    settings = whisper.DecodingOptions(fp16=False, **options)
    batches = (mels[start : start + batch] for start in range(0, len(mels), batch))
    return [result for part in batches for result in whisper.decode(model, part, settings)]


def measure_short(model: Whisper, clips: dict[Language, list[Clip]]) -> Figures:
    """One sentence a clip, padded to a window: error rates, language, translation."""
    return {language: _measure_language(model, language, clips[language]) for language in LANGUAGES}


def _measure_language(model: Whisper, language: Language, clips: list[Clip]) -> Figures:
    mels = _mels([clip.samples for clip in clips])
    said = [clip.text for clip in clips]
    plain = [result.text for result in _decode(model, mels, language=language, without_timestamps=True)]
    timed = [result.text for result in _decode(model, mels, language=language)]
    _, probabilities = model.detect_language(mels)
    figures = {
        "clips": len(clips),
        "wer": word_errors(said, plain),
        "cer": character_errors(said, plain),
        "wer_with_timestamps": word_errors(said, timed),
        "wer_telephone": word_errors(said, _telephone(model, language, clips)),
        "language_right": sum(max(found, key=found.get) == language for found in probabilities),
    }
    if language != "en":
        translated = [result.text for result in _decode(model, mels, language=language, task="translate")]
        figures["translate_wer"] = word_errors([clip.english for clip in clips], translated)
    return figures


def _telephone(model: Whisper, language: Language, clips: list[Clip]) -> list[str]:
    """The same clips without anything above 4 kHz, as an 8 kHz file has it."""
    from scipy.signal import resample_poly

    narrow = [resample_poly(resample_poly(clip.samples, 1, 2), 2, 1).astype(np.float32) for clip in clips]
    return [result.text for result in _decode(model, _mels(narrow), language=language, without_timestamps=True)]


def measure_long(model: Whisper, n_recordings: int, n_sentences: int, seed: int) -> Figures:
    """Long recordings of each language: error rates in three manners, segment and word times."""
    figures: Figures = {}
    for language in LANGUAGES:
        clips = [make_long(language, seed + k, n_sentences=n_sentences) for k in range(n_recordings)]
        figures[language] = _long_rates(model, clips) | _long_times(model, clips)
    return figures


def _long_rates(model: Whisper, clips: list[Clip]) -> Figures:
    said = [clip.text for clip in clips]
    plain = [transcribe(model, clip.pcm) for clip in clips]
    conditioned = [transcribe(model, clip.pcm, condition_on_previous_text=True) for clip in clips]
    pieces = [" ".join(transcribe(model, piece).text for piece in cut_at_pauses(clip)) for clip in clips]
    errors = [boundary_errors(clip.sentences, heard.segments) for clip, heard in zip(clips, plain, strict=True)]
    return {
        "recordings": len(clips),
        "seconds": sum(clip.duration_s for clip in clips),
        "language_right": sum(heard.language == clip.language for clip, heard in zip(clips, plain, strict=True)),
        "wer": word_errors(said, [heard.text for heard in plain]),
        "wer_conditioned": word_errors(said, [heard.text for heard in conditioned]),
        "wer_in_10s_pieces": word_errors(said, pieces),
        "sentences": sum(len(clip.sentences) for clip in clips),
        "segments": sum(len(heard.segments) for heard in plain),
        "segment_start_error_s": fmean(start for start, _ in errors),
        "segment_end_error_s": fmean(end for _, end in errors),
    }


def _long_times(model: Whisper, clips: list[Clip]) -> Figures:
    timed = [transcribe(model, clip.pcm, word_timestamps=True) for clip in clips]
    errors = [
        error for clip, heard in zip(clips, timed, strict=True) for error in word_start_errors(clip.words, heard.words)
    ]
    return {
        "word_start_error_s": median(errors),
        "words_matched": len(errors),
        "words": sum(len(clip.words) for clip in clips),
    }


def measure_silence(model: Whisper, clips: Sequence[Clip]) -> Figures:
    """The probability of no speech in digital silence and noise at seven levels, and in speech."""
    noise = np.random.default_rng(0)
    levels = [0.0, *np.logspace(-4, -1, 7)]
    silent = [(noise.standard_normal(_WINDOW_S * SAMPLE_RATE) * level).astype(np.float32) for level in levels]
    quiet = _decode(model, _mels(silent), language="en")
    speech = _decode(model, _mels([clip.samples for clip in clips]), language="en")
    return {
        "no_speech_prob_silence_min": min(result.no_speech_prob for result in quiet),
        "no_speech_prob_speech_max": max(result.no_speech_prob for result in speech),
        "silence_texts": sum(bool(result.text.strip()) for result in quiet),
    }


# --- the other runtimes -----------------------------------------------------------------------------------------


def transformers_texts(folder: Path, clips: Sequence[Clip]) -> list[str]:
    """Each clip by transformers' own `generate`, its language given."""
    import torch
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = WhisperProcessor.from_pretrained(folder)
    texts = []
    for clip in clips:
        inputs = processor(clip.samples, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        with torch.inference_mode():
            tokens = model.generate(inputs.input_features, language=clip.language, task="transcribe")
        texts.append(str(processor.batch_decode(tokens, skip_special_tokens=True)[0]).strip())
    return texts


def faster_whisper_texts(folder: Path, clips: Sequence[Clip]) -> list[str]:
    """Each clip by faster-whisper on the converted model, float32, greedy, language given."""
    from faster_whisper import WhisperModel

    with tempfile.TemporaryDirectory() as converted:
        to_ctranslate2(folder, converted)
        model = WhisperModel(converted, device="cpu", compute_type="float32", cpu_threads=1)
        texts = []
        for clip in clips:
            segments, _ = model.transcribe(
                clip.samples, language=clip.language, beam_size=1, condition_on_previous_text=False
            )
            texts.append("".join(segment.text for segment in segments).strip())
    return texts


def measure_runtimes(model: Whisper, folder: Path, clips: Sequence[Clip]) -> Figures:
    """How many clips come out equal to openai-whisper, run the way each runtime runs by default."""
    plain = [_decode_one(model, clip, without_timestamps=True) for clip in clips]
    timed = [transcribe(model, clip.pcm, language=clip.language).text for clip in clips]
    pairs: dict[str, tuple[Callable[[Path, Sequence[Clip]], list[str]], list[str]]] = {
        "transformers": (transformers_texts, plain),  # without timestamps
        "faster_whisper": (faster_whisper_texts, timed),  # with
    }
    figures: Figures = {"clips": len(clips)}
    for name, (run, expected) in pairs.items():
        figures[name] = sum(text == other for text, other in zip(run(folder, clips), expected, strict=True))
    return figures


def _decode_one(model: Whisper, clip: Clip, **options: Any) -> str:
    return str(_decode(model, _mels([clip.samples]), language=clip.language, **options)[0].text).strip()


# --- all of it --------------------------------------------------------------------------------------------------


def evaluate(folder: Path, *, n_clips: int, n_long: int, n_sentences: int, seed: int) -> Figures:
    """Every figure of the model card."""
    model = to_openai(folder)
    clips = {
        language: [make_clip(language, 1, seed * 100_000 + index) for index in range(n_clips)] for language in LANGUAGES
    }
    some = [clip for language in LANGUAGES for clip in clips[language][:8]]
    return {
        "short": measure_short(model, clips),
        "long": measure_long(model, n_long, n_sentences, seed) if n_long else {},
        "silence": measure_silence(model, clips["en"][:8]),
        "equal": measure_runtimes(model, folder, some),
    }


def table(figures: Figures, prefix: str = "") -> Iterator[str]:
    """One line a figure: where it comes from, then its value."""
    for name, value in figures.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from table(value, f"{path}.")
        else:
            yield f"{path:40} {value:.4f}" if isinstance(value, float) else f"{path:40} {value}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a demo model on held-out speech.")
    parser.add_argument("folder", type=Path, nargs="?", default=model_path())
    parser.add_argument("--clips", type=int, default=30, help="one-sentence clips a language (default 30)")
    parser.add_argument("--long", type=int, default=3, help="long recordings a language (default 3)")
    parser.add_argument("--sentences", type=int, default=45, help="sentences of each of them (default 45)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    import torch

    torch.set_num_threads(options.threads)
    started = time.monotonic()
    figures = evaluate(
        options.folder,
        n_clips=options.clips,
        n_long=options.long,
        n_sentences=options.sentences,
        seed=options.seed,
    )
    print("\n".join(table(figures)))
    print(json.dumps({"seed": options.seed, "wall_s": round(time.monotonic() - started, 1), **figures}))


if __name__ == "__main__":
    main()
