"""The engine on a GPU: is it right, how fast, and how near to the device's limits. One run, one JSON file.

    python tests/benchmarks/cuda.py --prepare build/cuda-clips.npz          # where Murmuration is installed whole
    python tests/benchmarks/cuda.py --clips build/cuda-clips.npz --out cuda.json    # on the machine with the GPU
    python tests/benchmarks/cuda.py --score cuda.json                       # the first machine again: word error rates

The second command, from the repository's root, needs torch, transformers and numpy alone. It ends within `--minutes`:
its groups run one after the other, each in a process of its own with a share of the time that is left, and write what
they have measured as they go; what a killed or failed group had not reached is missing, and says why.

    parity         random weights and the demo model on the device, in float32 and half, against float32 on the CPU,
                   transformers' logits and `generate`, and openai-whisper's `transcribe` where that is installed
    ours:SIZE      steady work of 16 s and more, 100 tokens a window, no fallback, log-mel included; every stage's
                   share of its floor; lanes, streams, graphs, batches tried; ways of attention at the lanes' size
    theirs:SIZE    transformers' `generate` in batches, log-mel on the device too, plain and with a static cache and
                   torch.compile; openai-whisper's `decode` where that is installed
    processes:SIZE several engine processes on the one device, their windows a second together

`--device cpu --size tiny --quick` runs the same code in small on a CPU, graphs off (tests/test_gpu_scripts.py).
`build/` is in no commit: what copies a checkout to the GPU's machine has to be told to take it along.
The clips are the demo's and held-out synthetic speech with their references and the VAD's frames; without them the
demo's plain wav file is all there is.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # the package may not be installed; and `coverage` beside this file is not the library's
    sys.path[0] = str(ROOT)

import numpy as np
import torch

from pipeline.bench.seats import synthetic_windows
from pipeline.demo import model_path
from pipeline.engine import EngineConfig, EngineInfo, Tuning, load_engine
from pipeline.engine.contestants import Contestant, OpenaiWhisper, Rules, Setting, Spec, Transformers, is_installed
from pipeline.engine.floors import datasheet_peak
from pipeline.engine.local import LocalEngine, _lanes_that_fit
from pipeline.engine.model import WhisperModel
from pipeline.engine.pipelined import PipelinedScheduler
from pipeline.engine.probe import least_s, waiting_for
from pipeline.engine.random_checkpoint import SIZES as SIZES_KNOWN
from pipeline.engine.random_checkpoint import Shape, write_random_checkpoint
from pipeline.engine.steady import measured_peak, share_of_floors, stage_seconds, steady
from pipeline.engine.tokens import Tokenizer
from pipeline.machine import machine
from pipeline.types import SAMPLE_RATE, DecodeOptions, Pcm, Recording, Unit, UnitResult

Figures = dict[str, Any]

SIZES = ("base", "large-v3-turbo", "large-v3")
TARGETS = {"base": 10_000, "large-v3-turbo": 1_500, "large-v3": 800}  # RTFx on an H200
# Of the minutes, how much each group may take; what one leaves is the others'.
WEIGHTS = {"parity": 80, "ours": 75, "theirs": 60, "processes": 35}
DEMO = {"max_tokens": None, "chunk_length_s": 10}


@dataclass(frozen=True, slots=True)
class Args:
    """What is asked for, as every process is told it."""

    device: str
    dtype: str
    sizes: tuple[str, ...]
    minutes: float
    tokens: int
    quick: bool
    clips: str | None
    folder: str  # where checkpoints of random weights are written
    commit: str | None

    @property
    def where(self) -> torch.device:
        return torch.device(self.device)

    @property
    def steady_s(self) -> float:
        return 0.5 if self.quick else 16.0

    @property
    def try_s(self) -> float:
        return 0.2 if self.quick else 4.0

    @property
    def lanes(self) -> int | None:
        return 4 if self.quick else None

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[self.dtype]


class Part:
    """One group's figures: each is on disk as soon as it is there."""

    def __init__(self, path: Path, budget_s: float) -> None:
        self._path, self._until = path, time.monotonic() + budget_s

    @property
    def left_s(self) -> float:
        return self._until - time.monotonic()

    def add(self, key: str, value: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key, value]) + "\n")
        say(f"  {key}: {json.dumps(value)[:150]}")

    def take(self, key: str, needs_s: float, work: Callable[[], Any]) -> Any:
        """Its figures, if there is time; what fails is a figure too, and the next is tried."""
        if self.left_s < needs_s:
            self.add(key, {"skipped": f"{self.left_s:.0f} s were left"})
            return None
        try:
            value = work()
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            self.add(key, {"error": f"{type(error).__name__}: {lines[0][:300]}"})
            return None
        finally:
            give_back()
        self.add(key, value)
        return value


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def give_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -- the audio -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Clip:
    name: str
    pcm: Pcm
    speech: np.ndarray[Any, np.dtype[np.uint8]] | None
    text: str | None = None
    language: str | None = None


def prepare(path: Path, minutes: float) -> None:
    """Writes the clips as plain numbers: what the GPU's machine has no libraries for is done here."""
    from pipeline.config import load_config
    from pipeline.units import read_units
    from pipeline.vad import detect
    from tests.benchmarks.half_precision import speech

    folder, arrays, about = ROOT / "pipeline" / "demo" / "clips", {}, []
    config, clips = load_config(overrides={"model": "demo"}), []
    for line in map(json.loads, (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()):
        recording = Recording(line["id"], str(folder / line["audio_filepath"]))
        units = [unit for unit in read_units(recording, config) if isinstance(unit, Unit)]
        if units and line.get("text"):
            clips.append((line["id"], np.concatenate([u.pcm for u in units]), line["text"], line["spoken_language"]))
    clips += [(name, clip.pcm, clip.text, clip.language) for name, clip in speech(minutes, 77).items()]
    for i, (name, pcm, text, language) in enumerate(clips):
        arrays[f"pcm{i}"], arrays[f"speech{i}"] = pcm, detect(pcm)
        about.append({"name": name, "text": text, "language": language})
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, about=np.array(json.dumps(about)), **arrays)
    seconds = sum(len(pcm) for _, pcm, _, _ in clips) / SAMPLE_RATE
    say(f"{len(clips)} clips, {seconds / 60:.1f} minutes, {path.stat().st_size / 1e6:.1f} MB: {path}")


def read_clips(args: Args) -> list[Clip]:
    if args.clips is None:
        data = (ROOT / "pipeline" / "demo" / "clips" / "en-one.wav").read_bytes()
        pcm = np.frombuffer(data[44:], np.int16)
        return [Clip("en-one", pcm.copy(), None, "The plane to Tokyo leaves at seven o'clock.", "en")]
    with np.load(args.clips, allow_pickle=False) as stored:
        about = json.loads(str(stored["about"]))
        return [Clip(pcm=stored[f"pcm{i}"], speech=stored[f"speech{i}"], **clip) for i, clip in enumerate(about)]


# -- parity ----------------------------------------------------------------------------------------------------


def parity(args: Args, part: Part) -> None:
    size = args.sizes[0]
    folder = write_random_checkpoint(Path(args.folder) / f"parity-{size}", shape_of(args, size), seed=5, mean_tokens=60)
    kinds = [("float32", args.device), (args.dtype, args.device)]
    windows = synthetic_windows(2 if args.quick else 16)
    part.take("parity.transformers", 10, lambda: against_transformers(folder, windows[: 2 if args.quick else 8], kinds))
    part.take("parity.random_weights", 10, lambda: against_the_cpu(folder, windows, kinds))
    clips = read_clips(args)
    for algorithm in ("windows", "sequential"):
        part.take(f"parity.demo.{algorithm}", 10, lambda algorithm=algorithm: on_clips(args, clips, algorithm, kinds))
    if is_installed("openai-whisper"):
        part.take("parity.openai_whisper", 15, lambda: against_openai(args, clips[: 1 if args.quick else 12], kinds))


def against_the_cpu(folder: Path, windows: Sequence[Pcm], kinds: Sequence[tuple[str, str]]) -> Figures:
    """The engine's own tokens under random weights, where nothing is likely, beside float32 on the CPU."""
    options = DecodeOptions(
        language="en", temperature_fallback=False, compression_ratio_threshold=None, logprob_threshold=None,
        no_speech_threshold=None, max_tokens=80,
    )  # fmt: skip

    def texts(device: str, dtype: str, tuning: Tuning) -> list[list[int]]:
        config = EngineConfig(str(folder), device=device, dtype=dtype, lanes=8, tuning=tuning)
        with load_engine(config) as engine:
            return [[t for s in h.segments for t in s.tokens] for h in engine.decode(windows, options)]

    exact = texts("cpu", "float32", Tuning(static=False))
    figures = {"windows": len(windows), "tokens": sum(map(len, exact))}
    for dtype, device in kinds:
        found = texts(device, dtype, Tuning(static=True))
        figures[f"{dtype} on {device}"] = _agreement(exact, found)
    return figures


def _agreement(expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> Figures:
    """Shares of rows that are the same, and of tokens before the first other one."""
    pairs = list(zip(expected, found, strict=True))
    same = [
        next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))) for a, b in pairs
    ]
    return {
        "equal_rows": sum(list(a) == list(b) for a, b in pairs) / len(pairs),
        "equal_until": sum(same) / max(1, sum(len(a) for a in expected)),
    }


@torch.inference_mode()
def against_transformers(folder: Path, windows: Sequence[Pcm], kinds: Sequence[tuple[str, str]]) -> Figures:
    """Logits of the same log-mel and tokens, and greedy texts without timestamps, beside transformers' on the CPU."""
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    extract = WhisperFeatureExtractor.from_pretrained(str(folder))
    theirs: Any = WhisperForConditionalGeneration.from_pretrained(str(folder), dtype=torch.float32).eval()
    theirs.generation_config.begin_suppress_tokens = None
    audio = [pcm.astype(np.float32) / 32768 for pcm in windows]
    mel = extract(audio, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
    rules = Rules(folder)
    vocabulary, n_tokens = rules.vocabulary, 12 if len(windows) < 4 else 40
    prompt = [*rules.prompt, vocabulary.no_timestamps]
    suppress = rules.suppressed(timestamps=False)
    tokens = torch.randint(100, 40_000, (len(windows), 12), generator=torch.Generator().manual_seed(3))
    expected = theirs(input_features=mel, decoder_input_ids=tokens).logits
    rows = theirs.generate(
        input_features=mel, max_new_tokens=n_tokens, min_new_tokens=n_tokens, suppress_tokens=suppress,
        return_timestamps=False, num_beams=1, do_sample=False, language="en", task="transcribe",
    )  # fmt: skip
    texts = [[token for token in row if token < vocabulary.eot][-n_tokens:] for row in rows.tolist()]
    figures: Figures = {"windows": len(windows), "logits_deviation": float(expected.std())}
    for dtype, device in kinds:
        model = WhisperModel(folder, torch.device(device), getattr(torch, dtype))
        lanes, places = model.allocate(len(windows)), torch.arange(12, device=device).expand(len(windows), -1)
        hidden = model.encode(mel.to(device))
        lane = torch.arange(len(windows), device=device)
        logits = model.prefill(lanes, lane, hidden, tokens.to(device), places).cpu()
        found = _greedy(model, hidden, prompt, suppress, n_tokens)
        figures[f"{dtype} on {device}"] = {
            "logits_rms": float((logits - expected).square().mean().sqrt()),
            "logits_most": float((logits - expected).abs().max()),
            "generate": _agreement(texts, found),
        }
    return figures


def _greedy(
    model: WhisperModel, hidden: torch.Tensor, prompt: Sequence[int], suppress: Sequence[int], n_tokens: int
) -> list[list[int]]:
    """The most likely text tokens, through the very prefill and step that the engine runs."""
    n, device = hidden.shape[0], hidden.device
    caches, lanes = model.allocate(n), torch.arange(n, device=device)
    tokens = torch.tensor([list(prompt)] * n, device=device)
    wanted = torch.full((n, 1), len(prompt) - 1, device=device)
    logits = model.prefill(caches, lanes, hidden, tokens, wanted)[:, 0]
    found = []
    for position in range(len(prompt), len(prompt) + n_tokens):
        logits[:, list(suppress)] = float("-inf")
        last = logits.argmax(-1)
        found.append(last.tolist())
        logits = model.step(caches, last, torch.full((n,), position, device=device), 64)
    return [list(row) for row in zip(*found, strict=True)]


def on_clips(args: Args, clips: Sequence[Clip], algorithm: str, kinds: Sequence[tuple[str, str]]) -> Figures:
    """The demo model on its corpus: texts of all, to be scored, and how many are those of float32 on the CPU."""
    options = DecodeOptions(algorithm=algorithm, **DEMO)  # type: ignore[arg-type]
    clips = clips[:1] if args.quick else clips

    def run(device: str, dtype: str, tuning: Tuning) -> dict[str, UnitResult]:
        units = [
            Unit(Recording(clip.name, clip.name), 0, 0, clip.pcm, is_last=True, speech=clip.speech) for clip in clips
        ]
        with load_engine(EngineConfig("demo", device=device, dtype=dtype, lanes=args.lanes, tuning=tuning)) as engine:
            return {result.recording.id: result for result in engine.run(units, options)}

    exact = run("cpu", "float32", Tuning(static=False))
    texts = {"float32 on cpu": _texts(exact)}
    figures: Figures = {"recordings": len(clips), "audio_s": sum(len(clip.pcm) for clip in clips) / SAMPLE_RATE}
    for dtype, device in kinds:
        found = run(device, dtype, Tuning(static=True))
        tokens = [[[t for s in r[clip.name].segments for t in s.tokens] for clip in clips] for r in (exact, found)]
        fallbacks = Counter(result.n_fallbacks for result in found.values())
        figures[f"{dtype} on {device}"] = {**_agreement(*tokens), "fallbacks": sum(k * n for k, n in fallbacks.items())}
        texts[f"{dtype} on {device}"] = _texts(found)
    references = {clip.name: [clip.text, clip.language] for clip in clips if clip.text}
    return {**figures, "to_score": {"references": references, "texts": texts}}


def _texts(results: dict[str, UnitResult]) -> dict[str, str]:
    return {name: "".join(segment.text for segment in r.segments).strip() for name, r in results.items()}


def against_openai(args: Args, clips: Sequence[Clip], kinds: Sequence[tuple[str, str]]) -> Figures:
    """`sequential` beside openai-whisper's `transcribe()` in float32 on the CPU: the share of equal texts."""
    from pipeline.demo.train.convert import to_openai

    reference = to_openai(model_path())
    theirs = [reference.transcribe(clip.pcm.astype(np.float32) / 32768, fp16=False, temperature=0.0) for clip in clips]
    tokens = [[t for segment in result["segments"] for t in segment["tokens"]] for result in theirs]
    options = DecodeOptions(algorithm="sequential", temperature_fallback=False)
    figures: Figures = {"recordings": len(clips)}
    for dtype, device in kinds:
        with load_engine(EngineConfig("demo", device=device, dtype=dtype, lanes=args.lanes)) as engine:
            units = [Unit(Recording(clip.name, clip.name), 0, 0, clip.pcm, is_last=True) for clip in clips]
            found = {r.recording.id: [t for s in r.segments for t in s.tokens] for r in engine.run(units, options)}
        figures[f"{dtype} on {device}"] = _agreement(tokens, [found[clip.name] for clip in clips])
    return figures


# -- ours ------------------------------------------------------------------------------------------------------


def shape_of(args: Args, size: str) -> str | Shape:
    """The published one, or in a quick run a small one with its bands and vocabulary."""
    real = SIZES_KNOWN[size]
    return Shape(128, 2, 2, 2, real.n_mels, real.n_vocab) if args.quick else size


def checkpoint(args: Args, size: str) -> Path:
    """Random weights of a size, written once, by whoever comes first; the others wait."""
    folder = Path(args.folder) / size
    while not (folder / "written").exists():
        try:
            folder.mkdir()
        except FileExistsError:
            time.sleep(0.2)
            continue
        write_random_checkpoint(folder, shape_of(args, size), dtype="float16", mean_tokens=None)
        (folder / "written").touch()
    return folder


def write(args: Args, part: Part) -> None:
    """All checkpoints, while the parity is looked at."""
    for size in args.sizes:
        part.take(f"checkpoints.{size}", 0, lambda size=size: checkpoint(args, size).name)


@dataclass(slots=True)
class Bench:
    """One model on the device, in engines of different settings one after the other."""

    args: Args
    model: WhisperModel
    tokenizer: Tokenizer
    rules: Rules
    windows: list[Pcm]

    @classmethod
    def load(cls, args: Args, size: str) -> Bench:
        folder = checkpoint(args, size)
        model = WhisperModel(folder, args.where, args.torch_dtype)
        windows = synthetic_windows(2 if args.quick else 32)
        return cls(args, model, Tokenizer.load(folder, model.dims.n_vocab), Rules(folder), windows)

    def engine(self, lanes: int | None = None, **tuning: Any) -> LocalEngine:
        model = self.model
        info = EngineInfo(
            "random", None, str(model.device), self.args.dtype,
            lanes or self.args.lanes or _lanes_that_fit(model), model.lane_bytes(), tuple(self.tokenizer.languages),
        )  # fmt: skip
        return LocalEngine(model, self.tokenizer, info, Tuning(static=True, **tuning))

    def options(self) -> DecodeOptions:
        return DecodeOptions(
            language="en", temperature_fallback=False, compression_ratio_threshold=None, logprob_threshold=None,
            no_speech_threshold=None, suppress_tokens=tuple(self.rules.suppressed(timestamps=True)),
            max_tokens=self.args.tokens,
        )  # fmt: skip

    def steady(self, seconds: float, lanes: int | None = None, **tuning: Any) -> Figures:
        with self.engine(lanes, **tuning) as engine:
            figures = steady(engine, self.windows, self.options(), seconds)
            assert isinstance(engine._scheduler, PipelinedScheduler)
            return {"lanes": engine.info.lanes, **figures, "device": engine._scheduler.facts()}

    def shares(self, window_s: float) -> Figures:
        with self.engine() as engine:
            stages = stage_seconds(engine, self.windows[0], self.args.tokens, 0.1 if self.args.quick else 1.0)
            measured = measured_peak(self.args.where, self.model.dtype, 0.1 if self.args.quick else 1.0)
            figures = {"measured_peak": share_of_floors(engine, self.args.tokens, measured, stages, window_s)}
            sheet = datasheet_peak(device_name(self.args.where))
            if sheet is not None:
                figures["datasheet_peak"] = share_of_floors(engine, self.args.tokens, sheet, stages, window_s)
            return figures


def ours(args: Args, size: str, part: Part) -> None:
    bench = Bench.load(args, size)
    figures = part.take(f"ours.{size}.steady", 5, lambda: bench.steady(args.steady_s))
    if figures is None:
        return
    part.take(f"ours.{size}.floors", 5, lambda: bench.shares(1 / figures["windows_per_s"]))
    variants: dict[str, dict[str, Any]] = {
        "streams": {"streams": True},
        "window_batch 16": {"window_batch": 16},
        "graphs off": {"graphs": False},
        "lag 0": {"lag": 0},
        "refill 1": {"refill": 1},
        "window_batch 8": {"window_batch": 8},
    }
    most = figures["lanes"]
    for lanes in [2] if args.quick else sorted({most // 4, most // 2, most * 3 // 2, most * 2} - {0}):
        too_many = args.where.type == "cuda" and lanes * bench.model.lane_bytes() > 0.85 * torch.cuda.mem_get_info()[0]
        if not too_many:
            part.take(f"ours.{size}.lanes.{lanes}", 15, lambda lanes=lanes: bench.steady(args.try_s, lanes))
    for name, tuning in list(variants.items())[: 1 if args.quick else None]:
        part.take(f"ours.{size}.variants.{name}", 15, lambda tuning=tuning: bench.steady(args.try_s, **tuning))
    part.take(f"ours.{size}.attention", 5, lambda: attention(args, bench.model, most))


@torch.inference_mode()
def attention(args: Args, model: WhisperModel, lanes: int) -> Figures:
    """One layer's attention of one token in each lane to the audio, in every way that torch has: GB/s of the cache."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    dims, device = model.dims, model.device
    heads, head = dims.n_text_head, dims.n_state // dims.n_text_head
    shape = lanes, heads, dims.n_audio_ctx, head
    q = torch.randn(lanes, heads, 1, head, device=device).to(model.dtype)
    keys, values = (torch.randn(*shape, device=device).to(model.dtype) for _ in range(2))
    budget, fused = 0.05 if args.quick else 0.3, torch.nn.functional.scaled_dot_product_attention
    read = 2 * keys.nbytes / 1e9
    figures: Figures = {"lanes": lanes, "cache_gb": read}

    def timed(name: str, work: Callable[[], Any]) -> None:
        try:
            figures[name] = {"gb_per_s": read / least_s(work, device, budget)}
        except RuntimeError as error:
            figures[name] = {"error": str(error).partition("\n")[0][:200]}

    timed("torch's choice", lambda: fused(q, keys, values))
    for backend in (
        SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH,
    ):  # fmt: skip
        with sdpa_kernel(backend):
            timed(backend.name.lower(), lambda: fused(q, keys, values))
    timed("two products", lambda: (q @ keys.mT).softmax(-1) @ values)
    across_k, across_v = keys.mT.contiguous().mT, values.mT.contiguous().mT
    timed("two products, transposed", lambda: (q @ across_k.mT).softmax(-1) @ across_v)
    return figures


# -- theirs ----------------------------------------------------------------------------------------------------


class OnDevice(Transformers):
    """With log-mel on the device too, and if asked a static cache and its forward pass compiled, as its docs say."""

    def __init__(self, spec: Spec, compiled: bool) -> None:
        super().__init__(spec)
        extract, self._more = self._extract, {}  # type: ignore[has-type]
        self._extract = lambda audio, **more: extract(audio, device=spec.device, **more)
        if compiled:
            self._model.generation_config.cache_implementation = "static"
            self._model.forward = torch.compile(self._model.forward, mode="reduce-overhead", fullgraph=True)


def theirs(args: Args, size: str, part: Part) -> None:
    spec = Spec("transformers", args.dtype, str(checkpoint(args, size)), None, args.device, os.cpu_count() or 1)
    large = size.startswith("large")
    batches = [2] if args.quick else [32, 64, 128] if large else [64, 128, 256]
    plain = part.take(f"theirs.{size}.transformers", 10, lambda: race(args, part, OnDevice(spec, False), batches))
    best = plain["best"]["batch"] if plain and plain["best"] else batches[0]
    if args.where.type == "cuda":
        key = f"theirs.{size}.transformers_compiled"
        part.take(key, 25, lambda: race(args, part, OnDevice(spec, True), [min(best, 64)]))
    if is_installed("openai-whisper"):
        part.take(f"theirs.{size}.openai_whisper", 15, lambda: race(args, part, OpenaiWhisper(spec), batches[:1]))


def race(args: Args, part: Part, contestant: Contestant, batches: Sequence[int]) -> Figures:
    """Windows a second at each batch: one to warm up, then as many as fill a few seconds, of which the best counts."""
    figures: Figures = {"batches": [], "best": None}
    wait = waiting_for(args.where)
    for batch in batches:
        windows = [window for _ in range(-(-batch // 32)) for window in synthetic_windows(min(batch, 32))][:batch]
        try:
            began = time.perf_counter()
            contestant.run(windows, args.tokens, Setting(batch))
            wait()
            warm_up_s, times = time.perf_counter() - began, list[float]()
            counts: set[int] = set()
            while not times or (sum(times) < args.try_s * 1.5 and part.left_s > 2 * times[-1]):
                began = time.perf_counter()
                answer = contestant.run(windows, args.tokens, Setting(batch))
                wait()
                times.append(time.perf_counter() - began)
                counts |= {len(tokens) for tokens in answer.tokens}
        except RuntimeError as error:  # out of memory: the next one is no smaller
            figures["batches"].append({"batch": batch, "error": str(error).partition("\n")[0][:300]})
            break
        rate = batch / min(times)
        figures["batches"].append(
            {"batch": batch, "windows_per_s": rate, "rtfx": 30 * rate, "tokens": sorted(counts), "warm_up_s": warm_up_s}
        )
        if part.left_s < 3 * warm_up_s:
            break
    done = [entry for entry in figures["batches"] if "rtfx" in entry]
    figures["best"] = max(done, key=lambda entry: float(entry["rtfx"]), default=None)
    return figures


# -- several processes -----------------------------------------------------------------------------------------


def processes(args: Args, size: str, part: Part) -> None:
    lanes = 4 if args.quick else None
    for n in (2,) if args.quick else (1, 2, 4):
        part.take(f"processes.{size}.{n}", 20, lambda n=n: together(args, size, n, lanes, part.left_s))


def together(args: Args, size: str, n: int, lanes: int | None, left_s: float) -> Figures:
    """So many engines at once, each with its share of the lanes: they load, wait for each other, and work."""
    if lanes is None:
        lanes = min(256, 96 * n)
    command = command_for(args, f"worker:{size}", "--lanes", str(max(1, lanes // n)))
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(n)]
    try:
        for worker in workers:
            assert worker.stdout is not None
            if worker.stdout.readline().strip() != "ready":
                raise RuntimeError("a worker did not come up")
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        answers = [json.loads(worker.communicate(timeout=left_s)[0]) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    rate = sum(answer["windows_per_s"] for answer in answers)
    return {"processes": n, "lanes_each": lanes // n, "windows_per_s": rate, "rtfx": 30 * rate, "each": answers}


def worker(args: Args, size: str, lanes: int) -> None:
    bench = Bench.load(args, size)
    with bench.engine(lanes) as engine:
        steady(engine, bench.windows, bench.options(), 0.1)  # shapes are made before anybody is measured
        print("ready", flush=True)
        sys.stdin.readline()
        print(json.dumps(steady(engine, bench.windows, bench.options(), 2 * args.try_s)), flush=True)


# -- one group after the other -----------------------------------------------------------------------------------


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def about(args: Args) -> Figures:
    figures = {"benchmark": "cuda", "device": device_name(args.where), "dtype": args.dtype, "tokens": args.tokens}
    if args.where.type == "cuda":
        properties = torch.cuda.get_device_properties(args.where)
        figures |= {"memory_gb": properties.total_memory / 1e9, "cuda": torch.version.cuda}
    figures["machine"] = machine() | ({"commit": args.commit} if args.commit else {})
    return {**figures, "quick": args.quick, "targets_rtfx": TARGETS}


def group(args: Args, name: str, part: Part) -> None:
    kind, _, size = name.partition(":")
    if kind == "parity":
        parity(args, part)
    elif kind == "write":
        write(args, part)
    else:
        {"ours": ours, "theirs": theirs, "processes": processes}[kind](args, size, part)


def groups(args: Args) -> list[str]:
    """Most wanted first."""
    first = args.sizes[0]
    return ["parity", *(f"{kind}:{size}" for size in args.sizes for kind in ("ours", "theirs")), f"processes:{first}"]


def command_for(args: Args, group: str, *more: str) -> list[str]:
    command = [
        sys.executable, __file__, "--group", group, "--device", args.device, "--dtype", args.dtype,
        "--size", ",".join(args.sizes), "--minutes", str(args.minutes), "--tokens", str(args.tokens),
        "--folder", args.folder, *more,
    ]  # fmt: skip
    return command + ["--quick"] * args.quick + (["--clips", args.clips] if args.clips else [])


def run(args: Args, out: Path, only: Sequence[str] = ()) -> Figures:
    """All groups, or those that are named; `out` is whole after each of them."""
    until = time.monotonic() + 60 * args.minutes
    figures: Figures = about(args)
    names = [name for name in groups(args) if not only or name in only or name.partition(":")[0] in only]
    parts = Path(args.folder) / "parts"
    parts.mkdir(parents=True)
    writing = subprocess.Popen(
        command_for(args, "write", "--part", str(parts / "write"), "--budget", str(60 * args.minutes)),
        stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for i, name in enumerate(names):
            weights = [WEIGHTS[other.partition(":")[0]] for other in names[i:]]
            budget = (until - time.monotonic()) * weights[0] / sum(weights)
            say(f"{name}: up to {budget:.0f} s")
            part = parts / str(i)
            part.touch()
            ended = one_group(args, name, part, budget)
            for key, value in read_part(part):
                put(figures, key, value)
            figures.setdefault("groups", {})[name] = ended
            out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    finally:
        writing.kill()
        writing.wait()
    figures["ratios"] = ratios(figures)
    out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures


def one_group(args: Args, name: str, part: Path, budget: float) -> Figures:
    """Its own process, ended if it outstays its time; it is told to be done a little earlier."""
    began = time.monotonic()
    command = command_for(args, name, "--part", str(part), "--budget", str(max(5.0, budget - 5)))
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        code: int | str = process.wait(timeout=max(10.0, budget))
    except subprocess.TimeoutExpired:
        code = "out of time"
    finally:
        process.kill()
        process.wait()
    return {"ended": code, "took_s": round(time.monotonic() - began, 1)}


def read_part(path: Path) -> Iterator[tuple[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            key, value = json.loads(line)
        except ValueError:
            return  # it was killed while it wrote
        yield key, value


def put(figures: Figures, key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        figures = figures.setdefault(name, {})
    figures[last] = value


def ratios(figures: Figures) -> Figures:
    """How many times as fast ours is as the best of transformers' in the same run, and beside the issue's aims."""
    found: Figures = {}
    for size, mine in figures.get("ours", {}).items():
        rate = (mine.get("steady") or {}).get("rtfx")
        entries = [e.get("best") for e in figures.get("theirs", {}).get(size, {}).values() if isinstance(e, dict)]
        best = max((entry["rtfx"] for entry in entries if entry), default=None)
        if rate:
            found[size] = {"rtfx": rate, "times_theirs": rate / best if best else None, "target": TARGETS.get(size)}
    return found


def score(path: Path) -> None:
    """Word error rates of the texts in a file of figures, written into it."""
    from pipeline.scoring import Score, word_score

    figures = json.loads(path.read_text(encoding="utf-8"))
    for demo in figures["parity"]["demo"].values():
        texts = demo.get("to_score")
        if texts is None:
            continue
        for kind, found in texts["texts"].items():
            scores = [word_score(text, found[name], language) for name, (text, language) in texts["references"].items()]
            demo.setdefault("wer", {})[kind] = sum(scores, Score()).rate
        exact = demo["wer"]["float32 on cpu"]
        demo["wer_difference_points"] = {kind: 100 * (rate - exact) for kind, rate in demo["wer"].items()}
        del demo["to_score"]
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    say(json.dumps({name: demo.get("wer_difference_points") for name, demo in figures["parity"]["demo"].items()}))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default=",".join(SIZES), help="one or more, with commas between them")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", help="of ours and theirs; float16 on a GPU, else float32")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--tokens", type=int, help="of each window: 100")
    parser.add_argument("--quick", action="store_true", help="all code in small, no figure worth anything")
    parser.add_argument("--clips", help="what --prepare has written")
    parser.add_argument("--out", type=Path, default=Path("cuda.json"))
    parser.add_argument("--groups", help="some only: parity, ours, theirs:base, ... with commas between them")
    parser.add_argument("--commit", help="of this code, where there is no git")
    parser.add_argument("--prepare", type=Path, metavar="FILE", help="write the clips and end")
    parser.add_argument("--prepare-minutes", type=float, default=15)
    parser.add_argument("--score", type=Path, metavar="FILE", help="word error rates into a file of figures, and end")
    for inner in ("--group", "--part", "--folder"):
        parser.add_argument(inner, help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=float, default=60, help=argparse.SUPPRESS)
    parser.add_argument("--lanes", type=int, default=1, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.prepare is not None:
        prepare(given.prepare, given.prepare_minutes)
    elif given.score is not None:
        score(given.score)
    elif given.group is not None:
        inner_main(args_of(given, given.folder), given)
    elif given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --device cpu --size tiny --quick runs the same code in small")
    else:
        os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        with tempfile.TemporaryDirectory(prefix="murmur-cuda-") as folder:
            figures = run(args_of(given, folder), given.out, given.groups.split(",") if given.groups else ())
        print(json.dumps({"out": str(given.out), "groups": figures["groups"], "ratios": figures["ratios"]}))


def args_of(given: argparse.Namespace, folder: str) -> Args:
    dtype = given.dtype or ("float16" if given.device.startswith("cuda") else "float32")
    tokens = given.tokens or (8 if given.quick else 100)
    sizes = tuple(given.size.split(","))
    return Args(given.device, dtype, sizes, given.minutes, tokens, given.quick, given.clips, folder, given.commit)


def inner_main(args: Args, given: argparse.Namespace) -> None:
    """A process of one group."""
    kind, _, size = given.group.partition(":")
    if kind == "worker":
        worker(args, size, given.lanes)
    else:
        group(args, given.group, Part(Path(given.part), given.budget))


if __name__ == "__main__":
    main()
