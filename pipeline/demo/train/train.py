"""Trains the demo network, on a CPU or a CUDA device, for a time or a number of steps.

Windows are made by processes of their own while the network learns. Window lengths are mixed in every phase: with
one length at a time the network forgets the others. Knows nothing about exporting.

    python -m pipeline.demo.train.train CHECKPOINT --corpus CORPUS --minutes 150
    python -m pipeline.demo.train.train CHECKPOINT --corpus CORPUS --init EARLIER --decoder-layers 4 --minutes 48
    python -m pipeline.demo.train.train CHECKPOINT --corpus CORPUS --init FOLDER --minutes 42 --lr 4e-4 --warmup 50
"""

from __future__ import annotations

import argparse
import math
import os
import queue
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import torch

from pipeline.demo.train.checkpoint import from_folder, load_checkpoint, save_checkpoint
from pipeline.demo.train.data import N_CHARACTER_CLASSES, Batch, Corpus, WindowMaker, make_batch
from pipeline.demo.train.loss import Losses, compute_losses, to_device
from pipeline.demo.train.net import Net, NetConfig, silence_new_layers
from pipeline.demo.train.vocabulary import Vocabulary, demo_vocabulary

# Encoder positions of a window -> windows a step, about the same work each.
BATCH_SIZES = {200: 32, 500: 12, 1_500: 4}
# Shares of the three lengths until a fraction of the run: short ones teach words, long ones to find the sentence.
SCHEDULE = ((0.35, (0.80, 0.15, 0.05)), (0.7, (0.45, 0.20, 0.35)), (1.0, (0.10, 0.10, 0.80)))
_FINAL_MIX = ((1.0, (0.10, 0.10, 0.80)),)  # when going on from a checkpoint
_FINE_TUNING_MIX = ((1.0, (0.15, 0.25, 0.60)),)  # when going on from an exported folder
_HEADS_MIX = ((1.0, (0.50, 0.30, 0.20)),)  # when only the training heads learn

_LOG_EVERY = 50  # steps
_SAVE_EVERY_S = 300.0


@dataclass(frozen=True, slots=True)
class Settings:
    """One run. It ends at `minutes` or `steps`, whichever is given; at the first reached when both are."""

    corpora: tuple[Path, ...]
    minutes: float | None = None
    steps: int | None = None
    device: str = "cpu"
    learning_rate: float = 1.5e-3
    warmup_steps: int = 200
    producers: int = 1  # processes that make windows; 0: in this one
    batch_scale: int = 1  # times the windows of BATCH_SIZES; a GPU wants 16 and more
    seed: int = 0
    held_out: Path | None = None  # a corpus to measure on

    def __post_init__(self) -> None:
        if self.minutes is None and self.steps is None:
            raise ValueError("give minutes, steps or both")

    def progress(self, elapsed_s: float, step: int) -> float:
        """0 at the start, 1 or more when the run is over."""
        by_time = elapsed_s / (60 * self.minutes) if self.minutes else 0.0
        by_step = step / self.steps if self.steps else 0.0
        return max(by_time, by_step)


Schedule = Sequence[tuple[float, tuple[float, float, float]]]
Report = Callable[[str], None]
_say = partial(print, flush=True)  # a log file is read while the run goes on


def train(
    net: Net,
    vocabulary: Vocabulary,
    settings: Settings,
    *,
    schedule: Schedule = SCHEDULE,
    checkpoint: Path | None = None,
    report: Report = _say,
) -> dict[str, float]:
    """Trains `net` in place; returns how far it came. The network is on the CPU again at the end."""
    device = torch.device(settings.device)
    net.to(device).train()
    optimiser = _optimiser(net, settings)
    journal, progress = _Journal(report), 0.0
    with _batches(vocabulary, settings, schedule) as next_batch:
        held_out = _held_out_batches(vocabulary, settings)
        batch = next_batch(0.0)  # the producers are up: the clock starts
        started = saved = time.monotonic()
        step = 0
        while True:
            losses = _step(net, optimiser, batch, device, _learning_rate(settings, step, progress))
            step += 1
            journal.add(batch, losses)
            now = time.monotonic()
            progress = settings.progress(now - started, step)
            if step % _LOG_EVERY == 0:
                journal.write(step, now - started)
            if now - saved > _SAVE_EVERY_S or progress >= 1.0:
                saved = now
                state = {"step": step, "minutes": (now - started) / 60, "audio_h": journal.audio_s / 3600}
                state |= _measure(net, held_out, device)
                report(" ".join(f"{name} {value:.3f}" for name, value in state.items()))
                if checkpoint:
                    save_checkpoint(checkpoint, net, vocabulary, state)
            if progress >= 1.0:
                break
            batch = next_batch(progress)
    net.to("cpu").eval()
    return state


def train_heads(
    net: Net, vocabulary: Vocabulary, settings: Settings, n_steps: int, *, report: Report = _say
) -> dict[str, float]:
    """Trains the training heads alone, on other windows than a run of `settings` draws; all else stays as it is.

    Fresh heads would otherwise spoil, with their large gradients, the encoder that they sit on.
    """
    trunk = [p for part in (net.encoder, net.decoder) for p in part.parameters() if p.requires_grad]
    own = replace(
        settings,
        minutes=None,
        steps=n_steps,
        learning_rate=3e-3,
        warmup_steps=10,
        seed=settings.seed + 1_000,
        held_out=None,
    )
    for parameter in trunk:
        parameter.requires_grad_(False)
    try:
        return train(net, vocabulary, own, schedule=_HEADS_MIX, report=report)
    finally:
        for parameter in trunk:
            parameter.requires_grad_(True)


def _step(
    net: Net, optimiser: torch.optim.Optimizer, batch: Batch, device: torch.device, learning_rate: float
) -> Losses:
    for group in optimiser.param_groups:
        group["lr"] = learning_rate
    losses = compute_losses(net, to_device(batch, device))
    optimiser.zero_grad(set_to_none=True)
    losses.total.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimiser.step()
    return losses


def _optimiser(net: Net, settings: Settings) -> torch.optim.Optimizer:
    """AdamW; only matrices decay."""
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() >= 2]
    vectors = [parameter for parameter in trained if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)


def _learning_rate(settings: Settings, step: int, progress: float) -> float:
    """A linear warm-up, then a cosine over the run down to a hundredth."""
    warm = min(1.0, (step + 1) / settings.warmup_steps)
    return settings.learning_rate * warm * (0.505 + 0.495 * math.cos(math.pi * min(progress, 1.0)))


# --- batches ----------------------------------------------------------------------------------------------------


@contextmanager
def _batches(vocabulary: Vocabulary, settings: Settings, schedule: Schedule) -> Iterator[Callable[[float], Batch]]:
    """A function from progress to the next batch, while its producers run."""
    if settings.producers == 0:
        draw = _Drawer(vocabulary, settings, schedule, settings.seed)
        yield draw
        return
    context = get_context("spawn")  # a forked process could not use what CUDA has begun
    progress = context.Value("d", 0.0)
    ready: Any = context.Queue(maxsize=2 + 2 * settings.producers)
    arguments = [
        (ready, progress, vocabulary, settings, schedule, settings.seed + k) for k in range(settings.producers)
    ]
    workers = [context.Process(target=_produce, args=each, daemon=True) for each in arguments]
    for worker in workers:
        worker.start()

    def take(now: float) -> Batch:
        progress.value = now
        return _take(ready, workers)

    try:
        yield take
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _take(ready: Any, workers: Sequence[Any]) -> Batch:
    """The next batch; a dead producer is an error, not a long wait."""
    while True:
        try:
            batch: Batch = ready.get(timeout=10)
            return batch
        except queue.Empty:
            if not all(worker.is_alive() for worker in workers):
                raise RuntimeError("a process that makes windows has died") from None


def _produce(
    ready: Any, progress: Any, vocabulary: Vocabulary, settings: Settings, schedule: Schedule, seed: int
) -> None:
    torch.set_num_threads(1)
    os.nice(2)  # the network comes first
    draw = _Drawer(vocabulary, settings, schedule, seed)
    while True:
        ready.put(draw(progress.value))


class _Drawer:
    """Batches of lengths mixed by progress, from one seed."""

    def __init__(self, vocabulary: Vocabulary, settings: Settings, schedule: Schedule, seed: int) -> None:
        self._vocabulary, self._schedule, self._scale = vocabulary, schedule, settings.batch_scale
        self._maker = WindowMaker(Corpus(settings.corpora), seed)
        self._random = Random(f"lengths/{seed}")

    def __call__(self, progress: float) -> Batch:
        shares = next((mix for until, mix in self._schedule if progress < until), self._schedule[-1][1])
        n_positions = self._random.choices(tuple(BATCH_SIZES), shares)[0]
        return make_batch(self._maker, self._vocabulary, self._scale * BATCH_SIZES[n_positions], n_positions)


# --- what a run says --------------------------------------------------------------------------------------------


class _Journal:
    """Mean losses by window length since the last line."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._values: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self.audio_s = 0.0

    def add(self, batch: Batch, losses: Losses) -> None:
        self._values[batch.position_orders.shape[1]].append(losses.values())
        self.audio_s += batch.audio_s

    def write(self, step: int, elapsed_s: float) -> None:
        parts = [f"{elapsed_s / 60:6.1f} min  step {step}  {self.audio_s / 3600:.1f} h"]
        for n_positions, values in sorted(self._values.items()):
            parts.append(f"{n_positions / 50:.0f} s x{len(values)}: {_describe(torch.stack(values).mean(0).tolist())}")
        self._report(" | ".join(parts))
        self._values.clear()


def _describe(values: Sequence[float]) -> str:
    names = ("ce", "ctc", "guide", "order", "text", "time")
    return " ".join(f"{name} {value:.3f}" for name, value in zip(names, values, strict=True))


def _held_out_batches(vocabulary: Vocabulary, settings: Settings) -> dict[int, list[Batch]]:
    """The same few windows every time, short ones and full ones."""
    if settings.held_out is None:
        return {}
    maker = WindowMaker(Corpus([settings.held_out]), seed=0)
    return {n: [make_batch(maker, vocabulary, BATCH_SIZES[n], n) for _ in range(4)] for n in (200, 1_500)}


@torch.no_grad()
def _measure(net: Net, held_out: dict[int, list[Batch]], device: torch.device) -> dict[str, float]:
    """Teacher-forced text accuracy on held-out windows, by length."""
    figures = {}
    for n_positions, batches in held_out.items():
        accuracies = [float(compute_losses(net, to_device(batch, device)).text_accuracy) for batch in batches]
        figures[f"held_out_text_{n_positions // 50}s"] = sum(accuracies) / len(accuracies)
    return figures


# --- command line -----------------------------------------------------------------------------------------------


def grown(init: Path, decoder_layers: int) -> tuple[Net, Vocabulary]:
    """The network of a checkpoint or an exported folder with more decoder layers, the new ones silent at first."""
    small, vocabulary = from_folder(init) if _is_exported(init) else load_checkpoint(init)
    sizes = {name: getattr(small.config, name) for name in NetConfig.__slots__}
    net = Net(NetConfig(**(sizes | {"decoder_layers": decoder_layers})))
    net.load_state_dict(small.state_dict(), strict=False)
    silence_new_layers(net, small.config.decoder_layers)
    return net, vocabulary


def _is_exported(init: Path) -> bool:
    return (init / "config.json").is_file()


def _new(options: argparse.Namespace) -> tuple[Net, Vocabulary]:
    vocabulary = demo_vocabulary()
    config = NetConfig(
        n_rows=vocabulary.n_rows,
        n_unused=vocabulary.n_unused,
        d_model=options.d_model,
        heads=options.d_model // 64,
        encoder_layers=options.encoder_layers,
        decoder_layers=options.decoder_layers,
        n_character_classes=N_CHARACTER_CLASSES,
    )
    return Net(config), vocabulary


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo network.")
    parser.add_argument("checkpoint", type=Path, help="written every five minutes and at the end")
    parser.add_argument("--corpus", type=Path, action="append", required=True, help="made by synth; may be repeated")
    parser.add_argument("--held-out", type=Path, help="a corpus made by synth --held-out, to measure on")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--producers", type=int, default=1, help="processes that make windows")
    parser.add_argument("--batch-scale", type=int, default=1, help="times the windows of a step")
    parser.add_argument("--init", type=Path, help="a checkpoint, or an exported folder, to go on from")
    parser.add_argument(
        "--heads-first", type=int, default=120, help="steps for the heads alone, which an exported folder does not have"
    )
    parser.add_argument("--d-model", type=int, default=192, help="a multiple of 64, the width of a head")
    parser.add_argument("--encoder-layers", type=int, default=4)
    parser.add_argument("--decoder-layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


def main() -> None:
    options = _parse()
    torch.manual_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    net, vocabulary = grown(options.init, options.decoder_layers) if options.init else _new(options)
    settings = Settings(
        corpora=tuple(options.corpus),
        minutes=options.minutes,
        steps=options.steps,
        device=options.device,
        learning_rate=options.lr,
        warmup_steps=options.warmup,
        producers=options.producers,
        batch_scale=options.batch_scale,
        seed=options.seed,
        held_out=options.held_out,
    )
    schedule: Schedule = SCHEDULE
    if options.init:
        schedule = _FINE_TUNING_MIX if _is_exported(options.init) else _FINAL_MIX
    if options.init and _is_exported(options.init) and options.heads_first:
        train_heads(net, vocabulary, settings, options.heads_first)
    train(net, vocabulary, settings, schedule=schedule, checkpoint=options.checkpoint)


if __name__ == "__main__":
    main()
