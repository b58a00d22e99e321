"""Where in a stream of audio somebody speaks: Silero's packaged network through onnxruntime, never torch.

One number a frame of 512 samples (32 ms): speech probability x 255. The stream is cut into blocks of 1,024 frames at
fixed places, and the network's state goes on from one to the next. So the same samples give the same numbers however
they arrive. Before the network, by rows of 32 frames (1 s): rows of digital near-silence are left out and get 0, quiet
rows are amplified and clipped ones attenuated. After it, `believed` drops what sounds like a voice for a moment only.

Measured on synthetic speech (48 sentences, 361 words, of four unseen voices, en, de, es; silence between them), by
`tests/benchmarks/vad_cost.py`:
- against Silero's own loop of one frame a call: 1 of 4,543 frames differs, by 1; where silent rows are left out, of
  6,309 frames 0 lie on the other side of the low bar and 1 of the high one;
- 1,700 times real time on one core (0.017 s for 30 s) against the loop's 200; digital silence 27,000;
- voiced frames found at the low bar: 99.9 % at a peak of -6 dBFS, 99.8 % at -50, 99.7 % at -60, 99.0 % in white noise
  as loud as the speech, 99.5 % clipped 20 times over; in all of these no word lay outside the spans planned from it;
- false alarms at the low bar: none in white, pink and brown noise, dither and DC, 0.1 % of frames of hum, 0.4 % of
  synthetic music. Spans planned from them would hold 747 s of 24,360 s; those of `believed` hold 2.7 s, where a
  plucked string sounds at once at the beginning.

This module knows samples and frames; what to do with speech is for `units`, `windows` and `stitch`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.silero import fresh_state, probabilities
from pipeline.stopwatch import spending
from pipeline.types import SAMPLE_RATE, VAD_FRAME, Pcm

Frames = NDArray[np.uint8]  # [n_frames] speech probability x 255

# Losing speech is the worst fault, so what is skipped or cut through lies below the low bar (probability 0.1);
# what a transcript owes text for lies above the high one (0.5, Silero's own).
MAYBE_SPEECH = 26
SURE_SPEECH = 128

# What sounds like speech for a moment only is none (`believed`). In frames.
APART = 31  # 1.0 s
SPOKEN = 31  # 1.0 s of sure speech together: somebody says something
SURE_FRAMES = 3
LASTING, DENSE = 16, 0.6  # 0.5 s, most of it
WORD = 7  # 0.22 s: the voice of a short word

BLOCK_FRAMES = 1024  # 32.8 s: long enough to amortise a call (0.05 s), short enough not to hold much
ROW_FRAMES = 32  # 1.02 s: the grain of the energy gate and of the gain
CONTEXT = 64  # samples before a frame that the network also sees
GATE = 3 / 32768  # -81 dBFS; speech that peaks at -60 dBFS reaches 33 / 32768
LEVEL = 0.1  # quieter rows are amplified to this peak ...
MAX_GAIN = 100.0  # ... but by 40 dB at most
CLIPPED = 0.998  # rows that reach it are brought down to LEVEL: the network hears little in loud square waves
MAX_OFFSET = 1 / 256  # a block's mean beyond this is DC; speech itself has up to 0.001

_BLOCK = BLOCK_FRAMES * VAD_FRAME


class SileroVad:
    """The detector over one stream: `push` audio as it comes, then `finish` once.

    Both return the numbers of the frames that are complete by then, so all calls together return
    `ceil(n_samples / VAD_FRAME)`; a short last frame is padded with zeros.
    """

    def __init__(self) -> None:
        self._waiting: list[Pcm] = []
        self._n_waiting = 0
        self._context = np.zeros(CONTEXT, np.int16)
        self._state = fresh_state()

    @spending("vad")
    def push(self, pcm: Pcm) -> Frames:
        self._waiting.append(pcm)
        self._n_waiting += len(pcm)
        if self._n_waiting < _BLOCK:
            return np.zeros(0, np.uint8)
        audio = np.concatenate(self._waiting)
        n_ready = len(audio) - len(audio) % _BLOCK
        # A copy: a view would keep the whole of a large push alive.
        self._waiting, self._n_waiting = [audio[n_ready:].copy()], len(audio) - n_ready
        return np.concatenate([self._detect(audio[i : i + _BLOCK]) for i in range(0, n_ready, _BLOCK)])

    @spending("vad")
    def finish(self) -> Frames:
        if not self._n_waiting:
            return np.zeros(0, np.uint8)
        audio = np.concatenate(self._waiting)
        self._waiting, self._n_waiting = [], 0
        return self._detect(np.pad(audio, (0, -len(audio) % VAD_FRAME)))

    def _detect(self, block: Pcm) -> Frames:
        """Numbers of one block, whole frames; takes context and state from the block before and leaves its own."""
        frames, live = prepare(block, self._context)
        self._context = block[-CONTEXT:]
        found = np.zeros(len(live), np.uint8)
        if len(frames):
            probability, self._state = probabilities(frames, self._state)
            found[live] = np.rint(probability * 255)
        return found


def detect(pcm: Pcm) -> Frames:
    """The numbers of a whole recording: `[ceil(n / VAD_FRAME)]`."""
    vad = SileroVad()
    return np.concatenate([vad.push(pcm), vad.finish()])


def believed(speech: Frames) -> Frames:
    """`speech` without what sounds like a voice for a moment only: tones and plucked strings do, here and there.

    Frames at the low bar that lie no more than APART from one another belong together. They are speech if three of
    them reach the high bar, or if it lasts: at least LASTING of them, close together. Others fall below the bar.
    """
    at = np.flatnonzero(speech >= MAYBE_SPEECH)
    if not len(at):
        return speech
    first = np.flatnonzero(np.diff(at, prepend=at[0] - APART - 1) > APART)
    n = np.diff(first, append=len(at))
    n_sure = np.add.reduceat((speech[at] >= SURE_SPEECH).astype(np.intp), first)
    lasts = (n >= LASTING) & (n > DENSE * (at[first + n - 1] - at[first] + 1))
    result = speech.copy()
    result[at[np.repeat((n_sure < SURE_FRAMES) & ~lasts, n)]] = MAYBE_SPEECH - 1
    return result


def voice_s(speech: Frames) -> float:
    """For how long there is a voice in these frames by themselves, whatever was said before them; infinite where it is
    surely one, in SURE_FRAMES.

    Else what is `believed` counts, or the longest run at the low bar, from WORD frames on. A word 30 dB below the
    sentence before it has such a run in two cases of three, but so has one onset of white, pink or brown noise in
    three, and of music in seven.
    """
    kept = believed(speech)
    if (kept >= SURE_SPEECH).sum() >= SURE_FRAMES:
        return math.inf
    start, stop = runs(speech >= MAYBE_SPEECH)
    longest = int((stop - start).max(initial=0))
    return max(voiced_s(kept), longest * VAD_FRAME / SAMPLE_RATE if longest >= WORD else 0.0)


def most_together(frames: NDArray[np.bool_]) -> int:
    """The most frames set that lie together, with no more than APART between one and the next."""
    at = np.flatnonzero(frames)
    groups = np.split(at, np.flatnonzero(np.diff(at) > APART) + 1)
    return max(len(group) for group in groups)


def voiced_s(speech: Frames) -> float:
    """Seconds of the frames that reach the low bar."""
    return int((speech >= MAYBE_SPEECH).sum()) * VAD_FRAME / SAMPLE_RATE


def runs(mask: NDArray[np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Where runs of true values start and stop, half-open."""
    edges = np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8))
    return np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)


def prepare(block: Pcm, context: Pcm) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """What the network is shown of a block of n whole frames: the frames that are loud enough, and which those are.

    `context` is the audio before the block, [64]. Returns float32 [n_live, 576], each frame with its context, free
    of a large DC and levelled by rows; and bool [n].
    """
    audio = np.concatenate([context, block]).astype(np.float32) / np.float32(32768)
    offset = audio[CONTEXT:].mean()
    if abs(offset) > MAX_OFFSET:
        audio -= offset
    level = _row_levels(audio[CONTEXT:])
    gain = np.where(level < CLIPPED, np.clip(LEVEL / np.maximum(level, 1e-9), 1.0, MAX_GAIN), LEVEL).astype(np.float32)
    n_frames = len(block) // VAD_FRAME
    live = _by_frame(level > GATE, n_frames)
    frames = np.lib.stride_tricks.sliding_window_view(audio, CONTEXT + VAD_FRAME)[::VAD_FRAME]
    return frames[live] * _by_frame(gain, n_frames)[live, None], live


def _row_levels(audio: NDArray[np.float32]) -> NDArray[np.float32]:
    """[rows] peak of each row and its two neighbours, so that no gain clips and words may run into silence."""
    starts = np.arange(0, len(audio), ROW_FRAMES * VAD_FRAME)
    wide = np.pad(np.maximum.reduceat(np.abs(audio), starts), 1)
    level: NDArray[np.float32] = np.maximum(np.maximum(wide[:-2], wide[2:]), wide[1:-1])
    return level


def _by_frame(rows: NDArray[Any], n_frames: int) -> NDArray[Any]:
    return np.repeat(rows, ROW_FRAMES)[:n_frames]
