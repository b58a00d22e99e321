"""Synthetic speech for tests: sentences of held-out voices with pauses between, and where each word lies; and what
Silero's own loop says of it."""

from __future__ import annotations

from functools import cache
from random import Random
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.demo.train.lexicon import Language
from pipeline.demo.train.sentences import draw_split
from pipeline.demo.train.synth import ACCENTS, HELD_OUT_VOICES, Voice, speak
from pipeline.silero import model_path
from pipeline.types import SAMPLE_RATE, VAD_FRAME, Pcm, Range


@cache
def talk(n_sentences: int, *, seed: int = 1, longest_pause_s: float = 3.0) -> tuple[NDArray[np.float32], list[Range]]:
    """Audio with a peak of 1 and digital silence in the pauses, and the samples of each word in order."""
    random = Random(seed)
    parts: list[NDArray[np.float32]] = []
    words: list[Range] = []
    at = 0
    for k in range(n_sentences):
        language = get_args(Language)[k % 3]
        voice = Voice(random.choice(ACCENTS[language]), HELD_OUT_VOICES[k % 4], random.choice((140, 155, 172)))
        said = speak(draw_split(random, held_out=True).in_language(language), voice)
        pause = np.zeros(int(random.uniform(0.1, longest_pause_s) * SAMPLE_RATE), np.float32)
        at += len(pause)
        words += [Range(at + int(w.start * SAMPLE_RATE), at + int(w.end * SAMPLE_RATE)) for w in said.words]
        parts += [pause, said.samples / np.abs(said.samples).max()]
        at += len(said.samples)
    return np.concatenate(parts), words


def pcm_at(audio: NDArray[np.float32], peak_dbfs: float) -> Pcm:
    """`audio` with full scale at 1, as int16 with its full scale at `peak_dbfs`; clipped beyond 0 dBFS."""
    pcm: Pcm = np.rint(np.clip(audio * 10 ** (peak_dbfs / 20) * 32768, -32768, 32767)).astype(np.int16)
    return pcm


def loud_frames(audio: NDArray[np.float32]) -> NDArray[np.bool_]:
    """[n // VAD_FRAME] where there is voice, not only a breath or the end of a word: RMS above 2 % of the peak."""
    whole = audio[: len(audio) // VAD_FRAME * VAD_FRAME].reshape(-1, VAD_FRAME)
    loud: NDArray[np.bool_] = np.sqrt(np.square(whole, dtype=np.float64).mean(axis=1)) > 0.02
    return loud


def frames(drawing: str) -> NDArray[np.uint8]:
    """Speech from a drawing of runs: "30# 10. 5?" is 30 frames of sure speech, 10 of silence, 5 of doubtful speech."""
    level = {"#": 230, "?": 60, ".": 0}
    return np.concatenate(
        [np.zeros(0, np.uint8), *(np.full(int(run[:-1]), level[run[-1]], np.uint8) for run in drawing.split())]
    )


def frame_loop(pcm: Pcm) -> NDArray[np.uint8]:
    """The plain streaming run of Silero's other packaged network: one frame a call, nothing before it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    network = onnxruntime.InferenceSession(str(model_path().with_name("silero_vad.onnx")), options)
    audio = np.pad(pcm, (64, -len(pcm) % VAD_FRAME)).astype(np.float32) / 32768
    state, found = np.zeros((2, 1, 128), np.float32), []
    for at in range(0, len(audio) - 64, VAD_FRAME):
        chunk = audio[None, at : at + 64 + VAD_FRAME]
        probability, state = network.run(None, {"input": chunk, "state": state, "sr": np.array(SAMPLE_RATE)})
        found.append(probability.item())
    return np.asarray(np.rint(np.array(found) * 255), np.uint8)
