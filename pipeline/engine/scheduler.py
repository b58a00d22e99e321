"""Continuous batching: walks ask, one batch on the device answers them all (see `step`).

A walk's next wish waits in a queue until a lane is free; a lane that ends is refilled at once, by whichever walk has
waited longest, and a fallback is just another wish with its window already encoded. No walk waits for another.
Single-threaded: one dispatcher calls it. It knows tokens and tensors, not recordings or futures.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.engine.decoding import Align, Decode, Decoded, DetectLanguage, Request, Sampler, Walk, Window
from pipeline.engine.features import LogMel
from pipeline.engine.model import WhisperModel
from pipeline.engine.timing import WordTiming, attention_cost, word_timings
from pipeline.engine.tokens import Tokenizer

ENCODE_BATCH = 4  # windows encoded together, a little ahead of the lanes
ALIGN_BATCH = 4
ALIGN_PATIENCE = 16  # steps that a smaller batch waits for company while lanes are busy
LANGUAGES_REMEMBERED = 4096  # detections, by name of their audio: all Units of a recording ask the same
LENGTH_STEP = 64  # self-attention is bounded by a multiple of this, so that shapes repeat


@dataclass(slots=True, eq=False)
class Task:
    """A walk on its way. `done` is called once, with its result or with the error that ended it."""

    walk: Walk
    done: Callable[[Any], None]
    cancelled: bool = False


@dataclass(slots=True, eq=False)
class _Ask:
    """A task's current wish; a `Decode` with several candidates is answered when all of them are."""

    task: Task
    request: Request
    answers: list[Decoded] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Lane:
    """What one slot of the batch is doing."""

    ask: _Ask
    decode: Decode
    no_speech_prob: float
    tokens: list[int] = field(default_factory=list)

    def is_full(self, context: int) -> bool:
        n = len(self.tokens)
        return n >= self.decode.max_tokens or len(self.decode.prompt) + n > context


class Scheduler:
    def __init__(self, model: WhisperModel, tokenizer: Tokenizer, features: LogMel, lanes: int) -> None:
        self._model, self._tokenizer, self._features = model, tokenizer, features
        self._caches = model.allocate(lanes)
        self._sampler = Sampler(tokenizer, lanes, model.device)
        self._positions = torch.zeros(lanes, dtype=torch.int64, device=model.device)
        self._lanes: list[_Lane | None] = [None] * lanes
        self._decodes: deque[tuple[_Ask, Decode, int]] = deque()  # with the candidate's seed
        self._detects: deque[tuple[_Ask, DetectLanguage]] = deque()
        self._aligns: deque[tuple[_Ask, Align]] = deque()
        self._aligns_waited = 0  # steps
        self._tasks: set[Task] = set()
        self._languages: OrderedDict[bytes, tuple[str, float]] = OrderedDict()

    @property
    def idle(self) -> bool:
        return not self._tasks

    def start(self, task: Task) -> None:
        self._tasks.add(task)
        self._advance(task, None)

    def cancel(self, task: Task) -> None:
        """The task's lanes are free at the next step; `done` is not called."""
        task.cancelled = True
        task.walk.close()
        self._tasks.discard(task)

    def fail_all(self, error: Exception) -> None:
        """After the device failed: every task ends with `error`, every lane is free."""
        tasks, self._tasks = self._tasks, set()
        for queue in (self._decodes, self._detects, self._aligns):
            queue.clear()
        self._lanes = [None] * len(self._lanes)
        for task in tasks:
            task.done(error)

    @torch.inference_mode()
    def step(self) -> None:
        """One turn: fill the free lanes, take every live lane one token further, answer what has ended."""
        self._drop_cancelled()
        self._encode_ahead()
        self._answer_detects()
        self._fill_lanes()
        self._decode_token()
        self._answer_aligns()

    # -- asking and answering --------------------------------------------------------------------------------

    def _advance(self, task: Task, answer: Any) -> None:
        """Sends a task its answer and queues its next wish."""
        if task.cancelled:
            return
        try:
            request = task.walk.send(answer)
        except StopIteration as stop:
            self._finish(task, stop.value)
        except Exception as error:  # a fault of one walk is that walk's answer
            self._finish(task, error)
        else:
            self._queue(_Ask(task, request))

    def _finish(self, task: Task, result: Any) -> None:
        self._tasks.discard(task)
        task.done(result)

    def _queue(self, ask: _Ask) -> None:
        match ask.request:
            case Decode() as decode:
                self._decodes.extend((ask, decode, seed) for seed in decode.seeds)
            case DetectLanguage() as detect:
                known = self._languages.get(detect.window.key or b"")
                if known is None:
                    self._detects.append((ask, detect))
                else:
                    self._advance(ask.task, known)
            case Align() as align:
                self._aligns.append((ask, align))

    def _drop_cancelled(self) -> None:
        for i, lane in enumerate(self._lanes):
            if lane is not None and lane.ask.task.cancelled:
                self._lanes[i] = None
        for queue in (self._decodes, self._detects, self._aligns):
            if any(entry[0].task.cancelled for entry in queue):
                live = [entry for entry in queue if not entry[0].task.cancelled]
                queue.clear()
                queue.extend(live)  # type: ignore[arg-type]

    # -- the encoder -----------------------------------------------------------------------------------------

    def _encode_ahead(self) -> None:
        """Encodes the windows next in line, if one of them holds up a free lane or a language."""
        free = self._lanes.count(None)
        line: list[Window] = [detect.window for _, detect in self._detects]
        line += [decode.window for _, decode, _ in self._decodes]
        urgent = line[: len(self._detects) + free]
        if all(window.hidden is not None for window in urgent):
            return
        batch = list(dict.fromkeys(window for window in line if window.hidden is None))[:ENCODE_BATCH]
        mel = torch.stack([window.mel(self._features) for window in batch])
        for window, hidden in zip(batch, self._model.encode(mel), strict=True):
            window.hidden = hidden

    def _answer_detects(self) -> None:
        ready = [entry for entry in self._detects if entry[1].window.hidden is not None]
        if not ready:
            return
        self._detects = deque(entry for entry in self._detects if entry[1].window.hidden is None)
        windows = list(dict.fromkeys(detect.window for _, detect in ready))  # all spans of a Unit ask about one
        sot = torch.full((len(windows), 1), self._tokenizer.sot, device=self._model.device)
        logits, _ = self._model.forward(_stack(windows), sot)
        codes = list(self._tokenizer.languages)
        ids = torch.tensor(list(self._tokenizer.languages.values()), device=logits.device)
        best = logits[:, 0, ids].softmax(-1).max(-1)
        found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        answers = {window: (codes[i], value) for window, (i, value) in zip(windows, found, strict=True)}
        for window, answer in answers.items():
            self._remember_language(window, answer)
        for ask, detect in ready:
            self._advance(ask.task, answers[detect.window])

    def _remember_language(self, window: Window, answer: tuple[str, float]) -> None:
        if window.key is not None:
            self._languages[window.key] = answer
            if len(self._languages) > LANGUAGES_REMEMBERED:
                self._languages.popitem(last=False)

    # -- the decoder -----------------------------------------------------------------------------------------

    def _fill_lanes(self) -> None:
        """Gives the free lanes, lowest first, to the longest-waiting decodes whose windows are encoded."""
        free = [i for i, lane in enumerate(self._lanes) if lane is None]
        entries: list[tuple[_Ask, Decode, int]] = []
        while self._decodes and len(entries) < len(free) and self._decodes[0][1].window.hidden is not None:
            entries.append(self._decodes.popleft())
        if not entries:
            return
        rows = torch.tensor(free[: len(entries)], device=self._model.device)
        logits = self._prefill(rows, [decode for _, decode, _ in entries])  # [b, 2, vocab]
        silence = logits[:, 0].softmax(-1)[:, self._tokenizer.no_speech].tolist()
        for lane, (ask, decode, seed), probability in zip(free, entries, silence, strict=False):
            self._lanes[lane] = _Lane(ask, decode, probability)
            self._sampler.admit(lane, decode, seed)
        hot = any(decode.temperature > 0 for _, decode, _ in entries)
        self._take(free[: len(entries)], self._sampler.sample(logits[:, 1], rows, hot))

    def _prefill(self, rows: Tensor, decodes: list[Decode]) -> Tensor:
        """Float32 logits [b, 2, vocab] at each prompt's start-of-transcript and at its last token."""
        longest = max(len(decode.prompt) for decode in decodes)
        tokens = torch.full((len(decodes), longest), self._tokenizer.eot)
        for i, decode in enumerate(decodes):
            tokens[i, : len(decode.prompt)] = torch.tensor(decode.prompt)
        wanted = torch.tensor([[decode.sot_index, len(decode.prompt) - 1] for decode in decodes])
        self._positions[rows] = wanted[:, 1].to(rows.device)
        hidden = _stack([decode.window for decode in decodes])
        return self._model.prefill(self._caches, rows, hidden, tokens.to(rows.device), wanted.to(rows.device))

    def _decode_token(self) -> None:
        """One token further in every live lane; the caches of lanes [0, n) are used as they lie."""
        if not self._decodes:
            self._close_gaps()
        live = [i for i, lane in enumerate(self._lanes) if lane is not None]
        if not live:
            return
        n = live[-1] + 1
        self._positions[:n] += 1
        longest = max(len(lane.decode.prompt) + len(lane.tokens) for lane in self._lanes if lane is not None)
        length = min(-(-longest // LENGTH_STEP) * LENGTH_STEP, self._model.dims.n_text_ctx)
        idle = [i for i in range(n) if self._lanes[i] is None]
        if idle:
            self._positions[idle] = 0  # an idle lane in between computes along; its first position is never read
        logits = self._model.step(self._caches, self._sampler.last[:n], self._positions[:n], length)
        hot = any(lane is not None and lane.decode.temperature > 0 for lane in self._lanes)
        chosen = self._sampler.sample(logits, slice(0, n), hot)
        self._take(live, chosen[live] if idle else chosen)

    def _take(self, lanes: list[int], tokens: Tensor) -> None:
        """Notes the lanes' new tokens and ends those that are complete."""
        for i, token in zip(lanes, tokens.tolist(), strict=True):
            lane = self._lanes[i]
            assert lane is not None
            if token != self._tokenizer.eot:
                lane.tokens.append(token)
                if not lane.is_full(self._model.dims.n_text_ctx):
                    continue
            self._lanes[i] = None
            self._end(lane, float(self._sampler.sum_logprob[i]))

    def _end(self, lane: _Lane, sum_logprob: float) -> None:
        lane.ask.answers.append(Decoded(lane.tokens, sum_logprob, lane.no_speech_prob))
        if len(lane.ask.answers) == len(lane.decode.seeds):
            self._advance(lane.ask.task, lane.ask.answers)

    def _close_gaps(self) -> None:
        """With nobody waiting, moves the last live lanes into free ones before them: a shorter batch from here on."""
        while None in self._lanes:
            gap = self._lanes.index(None)
            last = max((i for i, lane in enumerate(self._lanes) if lane is not None), default=-1)
            if last < gap:
                return
            self._caches.move(last, gap)
            self._sampler.move(last, gap)
            self._positions[gap] = self._positions[last]
            self._lanes[gap], self._lanes[last] = self._lanes[last], None

    # -- words -----------------------------------------------------------------------------------------------

    def _answer_aligns(self) -> None:
        """Times words in batches; a small batch waits a few steps while lanes are busy and more may come."""
        if not self._aligns:
            return
        self._aligns_waited += 1
        busy = any(lane is not None for lane in self._lanes)
        if busy and len(self._aligns) < ALIGN_BATCH and self._aligns_waited < ALIGN_PATIENCE:
            return
        self._aligns_waited = 0
        batch = [self._aligns.popleft() for _ in range(min(ALIGN_BATCH, len(self._aligns)))]
        for (ask, _), timings in zip(batch, self._align([align for _, align in batch]), strict=True):
            self._advance(ask.task, timings)

    def _align(self, aligns: list[Align]) -> list[list[WordTiming]]:
        """One teacher-forced pass over the windows' texts without timestamps, then each window's own path."""
        tokenizer = self._tokenizer
        sots = [tokenizer.sot_sequence(align.language, align.task) for align in aligns]
        rows = [
            [*sot, tokenizer.no_timestamps, *align.text_tokens, tokenizer.eot]
            for sot, align in zip(sots, aligns, strict=True)
        ]
        tokens = torch.full((len(rows), max(map(len, rows))), tokenizer.eot)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
        hidden = _stack([align.window for align in aligns])
        logits, scores = self._model.forward(hidden, tokens.to(self._model.device), with_alignment=True)
        assert scores is not None
        timings = []
        for i, (align, sot, row) in enumerate(zip(aligns, sots, rows, strict=True)):
            text = torch.tensor(align.text_tokens, device=logits.device)
            predicted = logits[i, len(sot) : len(sot) + len(text), : tokenizer.eot].softmax(-1)
            probabilities = predicted.gather(1, text[:, None])[:, 0].double().cpu().numpy()
            cost = attention_cost(scores[i, :, : len(row)], align.window.n_frames, len(sot))
            timings.append(word_timings(cost, probabilities, align.text_tokens, tokenizer, align.language))
        return timings


def _stack(windows: list[Window]) -> Tensor:
    """The windows' hidden states as one batch [b, n_audio_ctx, d]."""
    return torch.stack([window.hidden for window in windows if window.hidden is not None])
