"""The scheduler for a device that computes beside the host: it is told what to do a step ahead, and asked a step late.

What `scheduler.py` does between two tokens costs a GPU more than the token itself: the host asks which rows have ended
and waits, and starts each of some hundred kernels by hand. Here

- a decoder step, from the last tokens to the next ones with all token rules and the sampling, is one piece of work
  over buffers that stay where they are (`Steps`), one for each number of lanes and length of self-attention in
  `lane_bucket` and `length_bucket`. `device.py` captures it as a CUDA graph; on a CPU it runs as it is;
- rows that have ended stay as they are, whatever more is computed, so the host may learn of it late: each step's flags
  are copied into pinned memory behind it and read when the next step has been given to the device (`Tuning.lag`). The
  texts of ended rows come the same way, one step later; in between their lanes are computed on, 2 steps of 100;
- windows are encoded in batches of `Tuning.window_batch`, one batch ahead of the lanes, in shapes of
  `ENCODER_BUCKETS` and captured too; with `Tuning.streams` in a stream of their own, beside the decoder's steps.
  Their samples go up through pinned memory and become log-mel there;
- a prompt's pass writes its keys and values, those of the audio too, from each layer's product into the lanes with one
  kernel. Lanes that end are refilled some together (`Tuning.refill`), since a prompt's pass costs as many kernels as a
  step: while more wait than fit, a sixteenth of the lanes;
- languages are asked for in the same way. Beams, which the host advances, and word times are the parent's: there the
  host waits.

It decides the same as its parent, in the same order for each walk; in float32 its results are the same to the bit.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from pipeline.engine import Tuning
from pipeline.engine.decoding import Sampler, Window
from pipeline.engine.device import ENCODER, Device, Report, Work
from pipeline.engine.features import N_FRAMES, LogMel
from pipeline.engine.model import Lanes, WhisperModel
from pipeline.engine.scheduler import WINDOW_BATCH, Scheduler, _Ask, _Candidate
from pipeline.engine.tokens import Tokenizer

ENCODER_BUCKETS = (1, 2, 4, 8, 16, 32)  # windows a batch
LENGTH_BUCKETS = (64, 128, 256, 448)  # tokens that self-attention reads
PREFILL_BATCH = 32  # windows whose prompts are read together: their hidden states are copied side by side
_MOST_LANES_BY_POWERS = 32  # up to here lanes are rounded up to powers of two, then to multiples of it


def lane_bucket(n: int, lanes: int) -> int:
    """How many lanes a step computes where the first n are in use."""
    if n > _MOST_LANES_BY_POWERS:
        return min(lanes, -(-n // _MOST_LANES_BY_POWERS) * _MOST_LANES_BY_POWERS)
    return min(lanes, 1 << (n - 1).bit_length())


def length_bucket(n: int) -> int:
    """How many tokens self-attention reads where the longest row has n."""
    return next((length for length in LENGTH_BUCKETS if n <= length), LENGTH_BUCKETS[-1])


def encoder_bucket(n: int) -> int:
    return next(size for size in ENCODER_BUCKETS if n <= size)


class Steps:
    """The decoder's step over one set of lanes, in every shape that was asked for so far."""

    def __init__(self, model: WhisperModel, caches: Lanes, sampler: Sampler, positions: Tensor, device: Device) -> None:
        self._model, self._caches, self._sampler, self._positions = model, caches, sampler, positions
        self._device = device
        self._made: dict[tuple[int, int, bool], Work] = {}

    def take(self, n: int, longest: int, any_hot: bool) -> int:
        """One token further in the first n lanes; returns how many were computed.

        `longest`: tokens in the longest row, this one too. `any_hot`: some row has a temperature above 0.
        """
        shape = lane_bucket(n, self._caches.count), length_bucket(longest), any_hot
        if shape not in self._made:
            self._made[shape] = self._device.repeated(partial(self.advance, *shape))
        self._made[shape]()
        return shape[0]

    @property
    def shapes(self) -> list[tuple[int, int, bool]]:
        return list(self._made)

    def advance(self, n: int, length: int, any_hot: bool) -> None:
        """The work itself: nothing but these buffers is read or written, and the host is asked nothing."""
        sampler, positions = self._sampler, self._positions
        positions[:n] += ~sampler.ended[:n]
        logits = self._model.step(self._caches, sampler.last[:n], positions[:n], length)
        sampler.advance(logits, slice(0, n), any_hot)


class Encoder:
    """The encoder in batches of a few sizes, over one buffer in and one out."""

    def __init__(self, model: WhisperModel, most: int, device: Device) -> None:
        dims = model.dims
        self._model, self._device = model, device
        self._mel = torch.zeros(most, dims.n_mels, N_FRAMES, device=model.device)
        self._hidden = torch.zeros(most, dims.n_audio_ctx, dims.n_state, device=model.device, dtype=model.dtype)
        self._made: dict[int, Work] = {}

    def __call__(self, mel: Tensor) -> Tensor:
        """Log-mel [b, n_mels, 3000] → hidden states [b, n_audio_ctx, d], in memory of their own."""
        b = mel.shape[0]
        size = min(encoder_bucket(b), self._mel.shape[0])
        if size not in self._made:
            self._made[size] = self._device.repeated(partial(self._encode, size), ENCODER)
        self._mel[:b] = mel
        self._made[size]()
        return self._hidden[:b].clone()

    def _encode(self, size: int) -> None:
        self._hidden[:size] = self._model.encode(self._mel[:size])


@dataclass(slots=True)
class _Pending:
    """Values on their way, and what is done with them. `lost`: what is done if they will never be read."""

    step: int  # so many had been given to the device then
    report: Report
    then: Callable[..., None]
    lost: Callable[[], None] | None = None


class PipelinedScheduler(Scheduler):
    def __init__(
        self,
        model: WhisperModel,
        tokenizer: Tokenizer,
        features: LogMel,
        lanes: int,
        tuning: Tuning,
        device: Device,
    ) -> None:
        self._device, self._tuning = device, tuning
        self._pending: deque[_Pending] = deque()
        self._n_steps = 0
        super().__init__(model, tokenizer, features, lanes)
        most = ENCODER_BUCKETS[-1]
        self._window_batch = self._ahead = min(
            most, tuning.window_batch or (most if model.device.type == "cuda" else WINDOW_BATCH)
        )
        self._suppression = lru_cache(maxsize=64)(lambda tokens: self._sampler.suppression(tokens))

    def _allocate(self, lanes: int) -> None:
        super()._allocate(lanes)
        self._sampler.ended.fill_(True)  # an idle lane stays as it is
        self._no_speech = torch.zeros(lanes, device=self._model.device)
        self._languages_heard = torch.zeros(lanes, len(self._codes), device=self._model.device)
        self._steps = Steps(self._model, self._caches, self._sampler, self._positions, self._device)
        self._encoder: Encoder | None = None

    def facts(self) -> dict[str, Any]:
        """How the device is used, as plain JSON."""
        return {
            **self._device.facts(),
            "window_batch": self._window_batch,
            "refill": self._refill,
            "lag": self._tuning.lag,
            "steps": self._n_steps,
            "shapes": [list(shape) for shape in self._steps.shapes],
        }

    def fail_all(self, error: Exception) -> None:
        self._pending.clear()
        super().fail_all(error)

    def _make_room(self) -> bool:
        for pending in self._pending:
            if pending.lost is not None:
                pending.lost()
        self._pending.clear()
        for candidate in self._live():
            candidate.is_ending = False
        made = super()._make_room()
        self._ahead = min(self._ahead, self._window_batch)
        return made

    def _release(self) -> None:
        super()._release()
        del self._steps  # and with it the graphs, which hold memory
        self._encoder = None

    # -- late answers ----------------------------------------------------------------------------------------

    def _post(
        self, tensors: Sequence[Tensor], then: Callable[..., None], lost: Callable[[], None] | None = None
    ) -> None:
        self._pending.append(_Pending(self._n_steps, self._device.report(tensors), then, lost))

    def _settle(self, lag: int) -> None:
        """Reads, in their order, the reports behind which at least `lag` more steps were given to the device."""
        while self._pending and self._pending[0].step <= self._n_steps - lag:
            pending = self._pending.popleft()
            pending.then(*pending.report.wait())

    def _settle_all(self) -> None:
        while self._pending:
            self._settle(0)

    # -- the encoder -----------------------------------------------------------------------------------------

    def _encode(self, windows: list[Window]) -> None:
        with self._device.beside():
            if self._encoder is None:
                self._encoder = Encoder(self._model, self._window_batch, self._device)
            mel = self._features.windows([window.cut(self._features) for window in windows], self._device)
            hidden = self._encoder(mel)
            mark = self._device.mark()
        for window, states in zip(windows, hidden, strict=True):
            window.hidden, window.ready = states, mark

    def _hidden(self, windows: Sequence[Window]) -> Tensor:
        return torch.stack([self._device.use(w.hidden, w.ready) for w in windows if w.hidden is not None])

    def _answer_languages(self, windows: list[Window], asks: list[_Ask], spoken: Tensor) -> None:
        tell = partial(self._tell_languages, windows, asks)
        self._post([spoken], tell, lambda: self._detects.extend(asks))

    # -- the decoder -----------------------------------------------------------------------------------------

    @property
    def _refill(self) -> int:
        return max(1, min(self.n_lanes, self._tuning.refill or self.n_lanes // 16))

    def _fill_lanes(self) -> None:
        free = self._lanes.count(None)
        if free >= self._refill or self._n_brief or len(self._decodes) <= free:
            super()._fill_lanes()

    def _begin(self, candidates: list[_Candidate]) -> None:
        beams = [candidate for candidate in candidates if candidate.decode.beam_size]
        others = [candidate for candidate in candidates if not candidate.decode.beam_size]
        if beams:
            super()._begin(beams)
        for i in range(0, len(others), PREFILL_BATCH):
            self._begin_unseen(others[i : i + PREFILL_BATCH])

    def _begin_unseen(self, candidates: list[_Candidate]) -> None:
        """Prompts into the lanes and everybody's first token, without looking at any."""
        decodes = [candidate.decode for candidate in candidates]
        longest = max(len(decode.prompt) for decode in decodes)
        numbers = self._device.staging((len(candidates), 5 + longest), torch.int64)
        warmth = self._device.staging((len(candidates),), torch.float32)
        for row, candidate in zip(numbers.numpy(), candidates, strict=True):
            decode, end = candidate.decode, len(candidate.decode.prompt) - 1
            row[:5] = candidate.lanes[0], decode.sot_index, end, decode.most_tokens, candidate.seed
            row[5:] = self._tokenizer.eot
            row[5 : 6 + end] = decode.prompt
            candidate.length = len(decode.prompt) + 1
        warmth.copy_(torch.tensor([decode.temperature for decode in decodes]))
        asked = self._device.upload(numbers)
        lanes, seeds = asked[:, 0], asked[:, 4]
        hidden = self._hidden([decode.window for decode in decodes])
        logits = self._model.prefill(self._caches, lanes, hidden, asked[:, 5:], asked[:, 1:3])
        self._positions.index_copy_(0, lanes, asked[:, 2])
        silence = logits[:, 0].softmax(-1)[:, self._tokenizer.no_speech]
        self._no_speech.index_copy_(0, lanes, silence)
        self._languages_heard.index_copy_(0, lanes, self._spoken(logits[:, 0]))
        suppress = torch.stack([self._suppression(decode.suppress) for decode in decodes])
        self._sampler.fresh(lanes, asked[:, 3], self._device.upload(warmth), seeds, suppress)
        self._sampler.advance(logits[:, 1], lanes, any(decode.temperature > 0 for decode in decodes))
        rows = [(candidate, row) for row, candidate in enumerate(candidates)]
        self._post([self._sampler.ended.index_select(0, lanes)], partial(self._look, rows))

    def _decode_token(self) -> None:
        """Gives the device one more step, and reads what an earlier one has ended."""
        if any(candidate.beam is not None for candidate in self._live()):
            self._settle_all()
            self._answer_aligns()  # or those whose words are still to be timed would be taken for live ones
            super()._decode_token()
            return
        active = [candidate for candidate in self._live() if not candidate.is_ending]
        if not active:
            self._settle_all()
            return
        if not len(self._decodes):
            self._close_gaps_for_a_smaller_step()
        n = 1 + max(candidate.lanes[0] for candidate in active)
        longest = 1 + max(candidate.length for candidate in active)
        n = self._steps.take(n, longest, any(candidate.decode.temperature > 0 for candidate in active))
        self._n_steps += 1
        for candidate in active:
            candidate.length += 1
        rows = [(candidate, candidate.lanes[0]) for candidate in active]
        self._post([self._sampler.ended[:n]], partial(self._look, rows))
        self._settle(self._tuning.lag)

    def _look(self, rows: list[tuple[_Candidate, int]], ended: Tensor) -> None:
        """Sends for the texts of those who have ended; each candidate stood in this row of `ended` then, and may have
        been moved or cancelled since."""
        self._progress = time.monotonic()
        flags = ended.tolist()
        found = [c for c, row in rows if flags[row] and c.lanes and not c.is_ending]
        if not found:
            return
        for candidate in found:
            candidate.is_ending = True
        staged = self._device.staging((len(found),), torch.int64)
        staged.copy_(torch.tensor([candidate.lanes[0] for candidate in found]))
        lanes, sampler = self._device.upload(staged), self._sampler
        of_lanes = (sampler.tokens, sampler.count, sampler.sum_logprob, self._no_speech, self._languages_heard)
        values = [x.index_select(0, lanes) for x in of_lanes]
        self._post(values, partial(self._answer, found))

    def _answer(
        self,
        candidates: list[_Candidate],
        tokens: Tensor,
        counts: Tensor,
        sums: Tensor,
        silences: Tensor,
        languages: Tensor,
    ) -> None:
        texts = zip(tokens.numpy(), counts.tolist(), sums.tolist(), strict=True)
        heard = zip(silences.tolist(), self._likeliest(languages), strict=True)
        for candidate, (row, count, total), found in zip(candidates, texts, heard, strict=True):
            if candidate.lanes:  # else it was cancelled meanwhile
                text = row[:count].tolist()
                candidate.no_speech_prob, candidate.heard = found
                self._hand_in(candidate, [(text[:-1] if text[-1] == self._tokenizer.eot else text, total)])

    def _found(self, candidate: _Candidate) -> tuple[list[int], float]:
        """Of one that ended beside a beam: it was begun unseen."""
        lane = candidate.lanes[0]
        candidate.no_speech_prob = float(self._no_speech[lane])
        (candidate.heard,) = self._likeliest(self._languages_heard[lane : lane + 1])
        return super()._found(candidate)

    def _close_gaps_for_a_smaller_step(self) -> None:
        """As the parent's, but only if so many fewer lanes are used that another shape is computed."""
        used = [i for i, lane in enumerate(self._lanes) if lane is not None]
        if lane_bucket(len(used), self.n_lanes) < lane_bucket(used[-1] + 1, self.n_lanes):
            self._close_gaps()

    def _move(self, source: int, target: int, length: int) -> None:
        super()._move(source, target, length)
        self._no_speech[target] = self._no_speech[source]
        self._languages_heard[target] = self._languages_heard[source]
