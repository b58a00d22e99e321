"""Continuous batching: walks ask, one batch on the device answers them all (see `step`).

A walk's next wish waits until a lane is free; a lane that ends is refilled at once, and a fallback is just another
wish with its window already encoded. No walk waits for another. Lanes are shared fairly over the owners of walks.
Out of memory, the lanes are halved and what was in them begins again.
Single-threaded: one dispatcher calls it. It knows tokens and tensors, not recordings or futures.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine import EngineLoad
from pipeline.engine.beam import Beam
from pipeline.engine.decoding import Align, Decode, Decoded, DetectLanguage, Request, Sampler, Window
from pipeline.engine.fairness import FairQueue
from pipeline.engine.features import LogMel
from pipeline.engine.model import WhisperModel
from pipeline.engine.timing import WordTiming, attention_cost, warp, word_timings
from pipeline.engine.tokens import Tokenizer
from pipeline.errors import EngineError

log = logging.getLogger(__name__)

WINDOW_BATCH = 4  # windows encoded together, a little ahead of the lanes; or aligned, or asked for their language
LANGUAGES_REMEMBERED = 4096  # detections, by name of their audio: all Units of a recording ask the same
GIVES_WAY_S = 1.0  # that encoding waits for clips of a few seconds, before it has half of that to go on
LENGTH_STEP = 64  # self-attention is bounded by a multiple of this, so that shapes repeat


@dataclass(slots=True, eq=False)
class Task:
    """A walk on its way. `done` is called once, with its result or with the error that ended it.

    Walks of one `owner` (a request, a Unit) share what lanes are due to it; None: the walk is its own. Somebody waits
    for a `brief` one, and it is over soon: others' encoding waits for it, see `_gives_way`.
    """

    walk: Generator[Request, Any, Any]
    done: Callable[[Any], None]
    owner: Hashable = None
    brief: bool = False
    cancelled: bool = False

    @property
    def whose(self) -> Hashable:
        return self if self.owner is None else self.owner


@dataclass(slots=True, eq=False)
class _Ask:
    """A task's current wish; a `Decode` with several candidates is answered when all of them are."""

    task: Task
    request: Request
    answers: list[Decoded] = field(default_factory=list)
    heard: _Candidate | None = None  # an `Align`: who still sits in a lane with its window


@dataclass(slots=True, eq=False)
class _Candidate:
    """One try at a window's text, in one lane, or for a beam in one lane for each hypothesis."""

    ask: _Ask
    decode: Decode
    seed: int
    no_speech_prob: float = 0.0
    heard: tuple[str, float] | None = None
    lanes: list[int] = field(default_factory=list)
    beam: Beam | None = None
    length: int = 0  # tokens in the lanes: prompt and what was sampled
    is_ending: bool = False  # it has ended, and its text is on its way to the host

    @property
    def n_lanes(self) -> int:
        return self.decode.beam_size or 1


class Scheduler:
    def __init__(self, model: WhisperModel, tokenizer: Tokenizer, features: LogMel, lanes: int) -> None:
        self._model, self._tokenizer, self._features = model, tokenizer, features
        self._held: Counter[Hashable] = Counter()  # lanes, by owner
        self._decodes: FairQueue[_Candidate] = FairQueue(self._held)
        self._detects: deque[_Ask] = deque()
        self._aligns: deque[_Ask] = deque()
        self._ending: _Candidate | None = None  # whose text is being handed in
        self._tasks: set[Task] = set()
        self._languages: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        self._codes = list(tokenizer.languages)
        self._language_ids = torch.tensor([*tokenizer.languages.values()], dtype=torch.int64, device=model.device)
        self._window_batch = WINDOW_BATCH
        self._ahead = 0  # windows encoded before a lane is free for them
        self._n_brief = 0  # of the tasks
        self._gave_way, self._gave_way_s = False, 0.0  # in the last turn; how long, less what it was let off
        self._turn_s, self._began = 0.0, time.monotonic()  # how long the last turn took, when this one began
        self._progress = time.monotonic()  # when a walk was last answered, a window encoded or a token sampled
        self._allocate(lanes)

    def _allocate(self, lanes: int) -> None:
        self._lanes: list[_Candidate | None] = [None] * lanes
        self._caches = self._model.allocate(lanes)
        self._sampler = Sampler(self._tokenizer, lanes, self._model.device, exact=self._model.dtype == torch.float32)
        self._positions = torch.zeros(lanes, dtype=torch.int64, device=self._model.device)

    @property
    def idle(self) -> bool:
        return not self._tasks

    @property
    def n_lanes(self) -> int:
        return len(self._lanes)

    @property
    def n_windows(self) -> int:
        """Encoder windows admitted and not yet answered: each walk has one at a time."""
        return len(self._tasks)

    def load(self) -> EngineLoad:
        """Also for other threads: it reads whole values only, which may be of two moments next to each other."""
        idle_s = 0.0 if self.idle else time.monotonic() - self._progress
        in_lanes = {candidate.ask.task for candidate in self._live()}
        busy = len(self._lanes) - self._lanes.count(None)
        return EngineLoad(len(self._lanes), busy, max(0, len(self._tasks) - len(in_lanes)), idle_s)

    def start(self, task: Task) -> None:
        self._tasks.add(task)
        self._n_brief += task.brief
        self._advance(task, None)

    def cancel(self, task: Task) -> None:
        """The task's lanes are free at once; `done` is not called."""
        task.cancelled = True
        task.walk.close()
        self._leave(task)
        self._decodes.remove(task.whose, lambda candidate: candidate.ask.task is task)
        for queue in (self._detects, self._aligns):
            for ask in [ask for ask in queue if ask.task is task]:
                queue.remove(ask)
        for candidate in self._live():
            if candidate.ask.task is task:
                self._free(candidate)

    def fail_all(self, error: Exception) -> None:
        """After the device failed: every task ends with `error`, every lane is free."""
        tasks, self._tasks, self._n_brief = self._tasks, set(), 0
        for queue in (self._decodes, self._detects, self._aligns):
            queue.clear()
        self._lanes = [None] * len(self._lanes)
        self._held.clear()
        for task in tasks:
            task.done(error)

    @torch.inference_mode()
    def step(self) -> None:
        """One turn: fill the free lanes, take every live lane one token further, answer what has ended."""
        began = time.monotonic()
        self._turn_s, self._began = began - self._began, began
        try:
            self._encode_ahead()
            self._answer_detects()
            self._answer_aligns()  # those that lost their lane come before those who want one
            self._fill_lanes()
            self._decode_token()
            self._answer_aligns()
        except RuntimeError as error:  # torch.OutOfMemoryError is one; on a CPU it has no class of its own
            if not _is_out_of_memory(error) or not self._make_room():
                raise

    # -- asking and answering --------------------------------------------------------------------------------

    def _advance(self, task: Task, answer: Any) -> None:
        """Sends a task its answer and queues its next wish."""
        if task.cancelled:
            return
        self._progress = time.monotonic()
        try:
            request = task.walk.send(answer)
        except StopIteration as stop:
            self._finish(task, stop.value)
        except Exception as error:  # a fault of one walk is that walk's answer
            self._finish(task, error)
        else:
            self._queue(_Ask(task, request))

    def _finish(self, task: Task, result: Any) -> None:
        self._leave(task)
        task.done(result)

    def _leave(self, task: Task) -> None:
        if task in self._tasks:
            self._tasks.remove(task)
            self._n_brief -= task.brief

    def _queue(self, ask: _Ask) -> None:
        match ask.request:
            case Decode() as decode:
                for seed in decode.seeds:
                    self._decodes.push(ask.task.whose, _Candidate(ask, decode, seed))
            case DetectLanguage() as detect:
                known = None if detect.every else self._languages.get(detect.window.key or b"")
                if known is None:
                    self._detects.append(ask)
                else:
                    self._advance(ask.task, known)
            case Align() as align:
                if self._ending is not None and self._ending.decode.window is align.window:
                    ask.heard = self._ending
                self._aligns.append(ask)

    # -- memory ----------------------------------------------------------------------------------------------

    def _make_room(self) -> bool:
        """Halves the lanes and the batches beside them; what was in the lanes goes back to the head of its line.

        False: there is nothing left to give up.
        """
        if self.n_lanes == 1 and self._window_batch == 1:
            return False
        for ask in self._aligns:
            if ask.heard is not None:
                self._free(ask.heard)
                ask.heard = None
        for candidate in reversed(self._live()):
            self._free(candidate)
            candidate.beam = None
            self._decodes.push_front(candidate.ask.task.whose, candidate)
        had, self._window_batch = self.n_lanes, max(1, self._window_batch // 2)
        self._release()
        lanes = max(1, had // 2)
        while not self._try_to_allocate(lanes):
            if lanes == 1:
                raise EngineError("out of memory: not even one lane fits beside the model")
            lanes //= 2
        log.warning("engine: out of memory; going on with %d lanes instead of %d", lanes, had)
        return True

    def _release(self) -> None:
        del self._caches, self._sampler, self._positions

    def _try_to_allocate(self, lanes: int) -> bool:
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            self._allocate(lanes)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            return False
        return True

    # -- the encoder -----------------------------------------------------------------------------------------

    def _encode_ahead(self) -> None:
        """Encodes the windows next in line, if one of them holds up a free lane or a language."""
        free = self._lanes.count(None)
        asks = list(self._detects)
        candidates = self._decodes.upcoming(lambda candidate: candidate.n_lanes)
        asks += [candidate.ask for candidate in islice(candidates, free + self._ahead + self._window_batch)]
        line = {ask.request.window: ask for ask in asks if ask.request.window.hidden is None}
        if not any(ask.request.window in line for ask in asks[: len(self._detects) + free + self._ahead]):
            return
        batch = list(line)
        if not self._n_brief:
            self._gave_way, self._gave_way_s = False, 0.0
        elif not all(ask.task.brief for ask in line.values()) and self._gives_way():
            batch = [window for window, ask in line.items() if ask.task.brief]
        if not batch:
            return
        self._encode(batch[: self._window_batch])
        self._progress = time.monotonic()

    def _encode(self, windows: list[Window]) -> None:
        mel = torch.stack([window.mel(self._features) for window in windows])
        for window, hidden in zip(windows, self._model.encode(mel), strict=True):
            window.hidden = hidden

    def _hidden(self, windows: Sequence[Window]) -> Tensor:
        """The windows' hidden states as one batch [b, n_audio_ctx, d]."""
        return torch.stack([window.hidden for window in windows if window.hidden is not None])

    def _gives_way(self) -> bool:
        """Whether the encoder does nothing this turn for others than brief tasks: on a CPU four windows take as long as
        fifteen tokens of all lanes, so a clip beside hours of audio took ten times as long as alone. It gives way for
        `GIVES_WAY_S`, and then for half of it between one batch and the next, however many clips there are.
        """
        self._gave_way_s += self._turn_s if self._gave_way else 0.0
        self._gave_way = self._gave_way_s <= GIVES_WAY_S
        if not self._gave_way:
            self._gave_way_s -= GIVES_WAY_S / 2
        return self._gave_way

    def _answer_detects(self) -> None:
        encoded = (ask.request.window for ask in self._detects if ask.request.window.hidden is not None)
        windows = list(islice(dict.fromkeys(encoded), self._window_batch))  # all spans of a Unit ask about one
        if not windows:
            return
        spoken = self._spoken(self._model.first_logits(self._hidden(windows), self._tokenizer.sot))
        asks = [ask for ask in self._detects if ask.request.window in windows]  # they stay in line until it is known
        self._detects = deque(ask for ask in self._detects if ask.request.window not in windows)
        self._answer_languages(windows, asks, spoken)

    def _answer_languages(self, windows: list[Window], asks: list[_Ask], spoken: Tensor) -> None:
        self._tell_languages(windows, asks, spoken)

    def _spoken(self, logits: Tensor) -> Tensor:
        """How likely each of the tokenizer's languages is, among them alone: [b, languages].

        `logits`: [b, vocab] at start-of-transcript.
        """
        return logits[:, self._language_ids].softmax(-1)

    def _likeliest(self, spoken: Tensor) -> list[tuple[str, float] | None]:
        """Of each row of `_spoken`; None for a model of one language."""
        if not len(self._codes):
            return [None] * len(spoken)
        best = spoken.max(-1)
        return [(self._codes[i], value) for i, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)]

    def _tell_languages(self, windows: list[Window], asks: list[_Ask], spoken: Tensor) -> None:
        every = dict(zip(windows, spoken.double().cpu().numpy(), strict=True))
        answers = {w: heard for w, heard in zip(windows, self._likeliest(spoken), strict=True) if heard is not None}
        for window, answer in answers.items():
            self._remember_language(window, answer)
        for ask in asks:
            wants_every = isinstance(ask.request, DetectLanguage) and ask.request.every
            self._advance(ask.task, (every if wants_every else answers)[ask.request.window])

    def _remember_language(self, window: Window, answer: tuple[str, float]) -> None:
        if window.key is not None:
            self._languages[window.key] = answer
            if len(self._languages) > LANGUAGES_REMEMBERED:
                self._languages.popitem(last=False)

    # -- the decoder -----------------------------------------------------------------------------------------

    def _live(self) -> list[_Candidate]:
        """The candidates in the lanes, each once, by their first lane."""
        return list(dict.fromkeys(candidate for candidate in self._lanes if candidate is not None))

    def _fill_lanes(self) -> None:
        """Gives the free lanes, lowest first, to the candidates next in line whose windows are encoded."""
        free = deque(i for i, lane in enumerate(self._lanes) if lane is None)
        admitted: list[_Candidate] = []
        while free and len(self._decodes):
            candidate = self._decodes.pop()
            if candidate.n_lanes > self.n_lanes:
                needs = f"beam_size {candidate.n_lanes} needs as many lanes; there are {self.n_lanes}"
                self._finish(candidate.ask.task, EngineError(needs))
                continue
            if candidate.n_lanes > len(free) or candidate.decode.window.hidden is None:
                self._decodes.push_front(candidate.ask.task.whose, candidate)
                break
            self._seat(candidate, [free.popleft() for _ in range(candidate.n_lanes)])
            admitted.append(candidate)
        if admitted:
            self._begin(admitted)

    def _seat(self, candidate: _Candidate, lanes: list[int]) -> None:
        candidate.lanes = lanes
        for lane in lanes:
            self._lanes[lane] = candidate
        self._held[candidate.ask.task.whose] += len(lanes)

    def _free(self, candidate: _Candidate) -> None:
        for lane in candidate.lanes:
            self._lanes[lane] = None
        owner = candidate.ask.task.whose
        self._held[owner] -= len(candidate.lanes)
        if not self._held[owner]:
            del self._held[owner]
        candidate.lanes = []

    def _begin(self, candidates: list[_Candidate]) -> None:
        """Prompts into the lanes, and everybody's first token."""
        firsts = [candidate.lanes[0] for candidate in candidates]
        logits = self._prefill(firsts, [candidate.decode for candidate in candidates])  # [b, 2, vocab]
        silence = logits[:, 0].softmax(-1)[:, self._tokenizer.no_speech].tolist()
        languages = self._likeliest(self._spoken(logits[:, 0]))
        for candidate, probability, heard in zip(candidates, silence, languages, strict=True):
            candidate.no_speech_prob, candidate.heard = probability, heard
            candidate.length = len(candidate.decode.prompt)
            first, *others = candidate.lanes
            self._sampler.admit(first, candidate.decode, candidate.seed)
            if candidate.decode.beam_size:
                candidate.beam = Beam(candidate.decode.beam_size, candidate.decode.patience, self._tokenizer.eot)
            for lane in others:
                self._move(first, lane, candidate.length)
        lanes = [lane for candidate in candidates for lane in candidate.lanes]
        repeats = torch.tensor([len(candidate.lanes) for candidate in candidates], device=logits.device)
        self._take(candidates, logits[:, 1].repeat_interleave(repeats, 0), lanes)

    def _move(self, source: int, target: int, length: int) -> None:
        self._caches.copy(source, target, length)
        self._sampler.copy(source, target)
        self._positions[target] = self._positions[source]

    def _prefill(self, rows: list[int], decodes: list[Decode]) -> Tensor:
        """Float32 logits [b, 2, vocab] at each prompt's start-of-transcript and at its last token."""
        longest = max(len(decode.prompt) for decode in decodes)
        tokens = torch.full((len(decodes), longest), self._tokenizer.eot)
        for i, decode in enumerate(decodes):
            tokens[i, : len(decode.prompt)] = torch.tensor(decode.prompt)
        wanted = torch.tensor([[decode.sot_index, len(decode.prompt) - 1] for decode in decodes])
        device = self._model.device
        self._positions[rows] = wanted[:, 1].to(device)
        hidden = self._hidden([decode.window for decode in decodes])
        return self._model.prefill(self._caches, rows, hidden, tokens.to(device), wanted.to(device))

    def _decode_token(self) -> None:
        """One token further in every live lane; the caches of lanes [0, n) are used as they lie."""
        if not len(self._decodes):
            self._close_gaps()
        live = self._live()
        if not live:
            return
        n = 1 + max(lane for candidate in live for lane in candidate.lanes)
        self._positions[:n] += 1
        longest = 1 + max(candidate.length for candidate in live)
        length = min(-(-longest // LENGTH_STEP) * LENGTH_STEP, self._model.dims.n_text_ctx)
        idle = [i for i in range(n) if self._lanes[i] is None]
        if idle:
            self._positions[idle] = 0  # an idle lane in between computes along; its first position is never read
        logits = self._model.step(self._caches, self._sampler.last[:n], self._positions[:n], length)
        self._take(live, logits, range(n))

    def _take(self, candidates: list[_Candidate], logits: Tensor, lanes: list[int] | range) -> None:
        """Samples the next token of `lanes`, whose float32 `logits` these are, and ends what is complete."""
        row_of = {lane: row for row, lane in enumerate(lanes)}
        beams = [candidate for candidate in candidates if candidate.beam is not None]
        chosen = {candidate: self._advance_beam(candidate, logits, row_of) for candidate in beams}
        hot = [row_of[c.lanes[0]] for c in candidates if c.beam is None and c.decode.temperature > 0]
        rows = slice(lanes.start, lanes.stop) if isinstance(lanes, range) else self._index(lanes)
        self._sampler.sample(logits, rows, self._index(hot) if hot else None)
        for candidate, (sources, hypotheses) in chosen.items():
            self._follow(candidate, sources, hypotheses)
        ended = self._sampler.ended.tolist()
        self._progress = time.monotonic()
        for candidate in candidates:
            candidate.length += 1
            if ended[candidate.lanes[0]] or (candidate.beam is not None and candidate.beam.is_complete):
                self._end(candidate)

    def _advance_beam(
        self, candidate: _Candidate, logits: Tensor, row_of: dict[int, int]
    ) -> tuple[list[int], list[list[int]]]:
        """A beam's next hypotheses: which of the present ones each continues, and all its tokens."""
        beam = candidate.beam
        assert beam is not None
        rows = self._index([row_of[lane] for lane in candidate.lanes])
        scores = self._sampler.log_probabilities(logits[rows], self._index(candidate.lanes))
        best = scores.topk(beam.size + 1)
        sums = best.values + torch.tensor(beam.sums, device=scores.device)[:, None]
        return beam.advance(sums.tolist(), best.indices.tolist()), beam.rows

    def _follow(self, candidate: _Candidate, sources: list[int], rows: list[list[int]]) -> None:
        """Puts a beam's hypotheses into its lanes, in place of what the sampler took there."""
        lanes = self._index(candidate.lanes)
        if sources != list(range(len(sources))):
            origin = self._index([candidate.lanes[source] for source in sources])
            self._caches.reorder(lanes, origin, candidate.length)
        self._sampler.restate(lanes, rows)

    def _index(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self._model.device)

    def _end(self, candidate: _Candidate) -> None:
        """Hands in what was found and frees the lanes, one of them only after the words in it are timed.

        The task's next wish is in line when this returns.
        """
        self._hand_in(candidate, candidate.beam.answers() if candidate.beam else [self._found(candidate)])

    def _found(self, candidate: _Candidate) -> tuple[list[int], float]:
        return self._sampler.found(candidate.lanes[0])

    def _hand_in(self, candidate: _Candidate, found: list[tuple[list[int], float]]) -> None:
        ask = candidate.ask
        ask.answers += [Decoded(tokens, total, candidate.no_speech_prob, candidate.heard) for tokens, total in found]
        if candidate.beam is not None or len(ask.answers) == len(candidate.decode.seeds):
            self._ending = candidate
            self._advance(ask.task, ask.answers)
            self._ending = None
        if not (self._aligns and self._aligns[-1].heard is candidate):
            self._free(candidate)

    def _close_gaps(self) -> None:
        """With nobody waiting, moves the last live lanes into free ones before them: a shorter batch from here on."""
        while None in self._lanes:
            gap = self._lanes.index(None)
            last = max((i for i, lane in enumerate(self._lanes) if lane is not None), default=-1)
            if last < gap:
                return
            candidate = self._lanes[last]
            assert candidate is not None
            self._move(last, gap, candidate.length)
            candidate.lanes[candidate.lanes.index(last)] = gap
            self._lanes[gap], self._lanes[last] = candidate, None

    # -- words -----------------------------------------------------------------------------------------------

    def _answer_aligns(self) -> None:
        """Times the words of windows whose decoding has just ended: their lanes still hold what the decoder hears.

        One whose lane was taken away, when memory ran out, is put into a free one, or waits for it.
        """
        free = iter([i for i, lane in enumerate(self._lanes) if lane is None])
        lanes = {ask: ask.heard.lanes[0] if ask.heard is not None else next(free, None) for ask in self._aligns}
        ready = deque((ask, lane) for ask, lane in lanes.items() if lane is not None)
        while ready:
            batch = [ready.popleft() for _ in range(min(self._window_batch, len(ready)))]
            timings = self._align(batch)
            for (ask, _), words in zip(batch, timings, strict=True):
                self._aligns.remove(ask)
                if ask.heard is not None:
                    self._free(ask.heard)
                self._advance(ask.task, words)

    def _align(self, asks: list[tuple[_Ask, int]]) -> list[list[WordTiming]]:
        """One teacher-forced pass over the windows' texts without timestamps, then each window's own path."""
        tokenizer = self._tokenizer
        for ask, lane in asks:
            if ask.heard is None:
                self._model.listen(self._caches, lane, self._hidden([ask.request.window])[0])
        aligns = [ask.request for ask, _ in asks if isinstance(ask.request, Align)]
        sots = [tokenizer.sot_sequence(align.language, align.task) for align in aligns]
        rows = [
            [*sot, tokenizer.no_timestamps, *align.text_tokens, tokenizer.eot]
            for sot, align in zip(sots, aligns, strict=True)
        ]
        tokens = torch.full((len(rows), max(map(len, rows))), tokenizer.eot)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
        x, scores = self._model.align(self._caches, [lane for _, lane in asks], tokens.to(self._model.device))
        costs = [
            attention_cost(scores[i, :, : len(row)], align.window.n_frames, len(sot))
            for i, (align, sot, row) in enumerate(zip(aligns, sots, rows, strict=True))
        ]
        return [
            word_timings(path, likely, align.text_tokens, tokenizer, align.language)
            for path, likely, align in zip(warp(costs), self._likelihoods(x, sots, aligns), aligns, strict=True)
        ]

    def _likelihoods(self, x: Tensor, sots: list[list[int]], aligns: list[Align]) -> list[NDArray[np.float64]]:
        """How likely each text token of each window was among all text tokens; x [b, p, d] is where that was asked."""
        lengths = [len(align.text_tokens) for align in aligns]
        asked = torch.cat([x[i, len(sots[i]) :][:n] for i, n in enumerate(lengths)])
        tokens = self._index([token for align in aligns for token in align.text_tokens])
        likely = self._model.likelihood(asked, tokens, self._tokenizer.eot)
        return np.split(likely.double().cpu().numpy(), np.cumsum(lengths)[:-1])


def _is_out_of_memory(error: RuntimeError) -> bool:
    """torch has a class for it on devices; on a CPU its allocator only says so."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
