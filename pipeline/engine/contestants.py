"""Ours and the other Whisper runtimes as one thing: int16 windows in, tokens out (for `pipeline/bench.py`).

All of them get the same weights, windows, language and task, decode greedily without fallback or thresholds, and may
sample no end token, so that each window gives as many tokens as were asked for. Each makes its own log-mel in its own
way. The other runtimes are imported here and nowhere else, each only when it runs. Nothing here knows how it is timed
against another.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.engine import EngineConfig, Tuning, load_engine
from pipeline.engine.checkpoint import read_json
from pipeline.engine.tokens import Tokenizer
from pipeline.types import SAMPLE_RATE, DecodeOptions, Pcm

LANGUAGE = "en"


@dataclass(frozen=True, slots=True)
class Setting:
    """How a contestant is run: windows a batch, and in how many threads of one core each batches run side by side."""

    batch: int
    side_by_side: int = 1
    long_form: bool = False  # not in batches but by the call that the runtime itself has for recordings

    def __str__(self) -> str:
        return (
            "alone"
            if self.long_form
            else f"{self.batch}" + (f" x {self.side_by_side}" if self.side_by_side > 1 else "")
        )


@dataclass(frozen=True, slots=True)
class Spec:
    """One contestant, before it is loaded."""

    library: str
    dtype: str
    folder: str  # the checkpoint
    converted: str | None = None  # its conversion for CTranslate2
    device: str = "cpu"
    threads: int = 1
    lanes: int | None = None
    tuning: Tuning = field(default_factory=Tuning)  # of ours


@dataclass(slots=True)
class Answer:
    """The tokens of each window, without prompt and end token; seconds by stage where the runtime lets one look."""

    tokens: list[list[int]]
    stages: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - start


class Contestant:
    """One runtime with one checkpoint loaded."""

    dtype: str  # the one it really computes in

    def __init__(self, spec: Spec) -> None:
        self.spec, self.dtype = spec, spec.dtype
        self.rules = Rules(Path(spec.folder))
        torch.set_num_threads(spec.threads)

    def settings(self, batches: Sequence[int], windows: int) -> list[Setting]:
        """What is worth trying for so many windows."""
        return [Setting(batch) for batch in batches]

    def run(self, windows: Sequence[Pcm], n_tokens: int, setting: Setting) -> Answer:
        return _joined([self.run_batch(batch, n_tokens) for batch in _batches(windows, setting.batch)])

    def run_batch(self, windows: Sequence[Pcm], n_tokens: int) -> Answer:
        raise NotImplementedError

    def close(self) -> None:
        """Gives back what outlives a call."""


class Rules:
    """The token rules that all contestants share, of one checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.vocabulary = Tokenizer.load(folder, read_json(folder, "config.json")["vocab_size"])
        self.prompt = self.vocabulary.sot_sequence(LANGUAGE, "transcribe")

    def suppressed(self, timestamps: bool) -> list[int]:
        """All that is no text. With timestamps <|0.00|> stays: the rules open every window with a time, and no
        later one can follow, so nothing cuts the window before its last token."""
        first = self.vocabulary.timestamp_begin + timestamps
        return [*range(self.vocabulary.eot, self.vocabulary.timestamp_begin), *range(first, self.vocabulary.n_vocab)]


class Ours(Contestant):
    """`engine.decode`: it batches by itself, in its lanes."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        config = EngineConfig(spec.folder, None, spec.device, spec.dtype, spec.lanes, spec.threads, tuning=spec.tuning)
        self.engine = load_engine(config)
        self.dtype = self.engine.info.dtype

    def options(self, n_tokens: int, **more: Any) -> DecodeOptions:
        return DecodeOptions(
            language=LANGUAGE,
            temperature_fallback=False,
            compression_ratio_threshold=None,
            logprob_threshold=None,
            no_speech_threshold=None,
            suppress_tokens=tuple(self.rules.suppressed(timestamps=True)),
            max_tokens=n_tokens,
            **more,
        )

    def settings(self, batches: Sequence[int], windows: int) -> list[Setting]:
        return [Setting(self.engine.info.lanes)]

    def run(self, windows: Sequence[Pcm], n_tokens: int, setting: Setting) -> Answer:
        hypotheses = self.engine.decode(windows, self.options(n_tokens))
        return Answer([[token for s in hypothesis.segments for token in s.tokens] for hypothesis in hypotheses])

    def close(self) -> None:
        self.engine.close()


class FasterWhisper(Contestant):
    """CTranslate2 as faster-whisper's BatchedInferencePipeline calls it, without what that does to the text after."""

    def __init__(self, spec: Spec) -> None:
        from faster_whisper.feature_extractor import FeatureExtractor

        super().__init__(spec)
        n_mels = read_json(Path(spec.folder), "preprocessor_config.json").get("feature_size", 80)
        self._extract = FeatureExtractor(feature_size=n_mels)
        self._models: dict[int, Any] = {}

    def settings(self, batches: Sequence[int], windows: int) -> list[Setting]:
        """Also whole batches side by side, one thread each (its `num_workers`), where there are enough of them."""
        threads = self.spec.threads if self.spec.device == "cpu" else 1
        at_once = [Setting(batch, threads) for batch in batches if threads > 1 and batch * threads <= windows]
        return super().settings(batches, windows) + at_once

    def run(self, windows: Sequence[Pcm], n_tokens: int, setting: Setting) -> Answer:
        model, batches = self._model(setting.side_by_side), _batches(windows, setting.batch)
        with ThreadPoolExecutor(setting.side_by_side) as pool:
            answers = list(pool.map(lambda batch: self._generate(model, batch, n_tokens), batches))
        return _joined(answers)

    def _generate(self, model: Any, windows: Sequence[Pcm], n_tokens: int) -> Answer:
        from ctranslate2 import StorageView

        answer = Answer([])
        prompt = self.rules.prompt
        with answer.stage("mel"):
            mel = np.stack([self._extract(_as_float(pcm))[:, :-1] for pcm in windows])
        with answer.stage("encoder"):
            hidden = model.encode(StorageView.from_array(np.ascontiguousarray(mel, np.float32)))
        with answer.stage("decoder"):
            results = model.generate(
                hidden,
                [prompt] * len(windows),
                beam_size=1,
                max_length=max(2 * n_tokens, len(prompt) + n_tokens),  # it samples at most half of it
                suppress_tokens=self.rules.suppressed(timestamps=True),
                return_scores=True,
                return_no_speech_prob=True,
            )
        answer.tokens = [list(result.sequences_ids[0]) for result in results]
        return answer

    def _model(self, side_by_side: int) -> Any:
        if side_by_side not in self._models:
            from ctranslate2.models import Whisper

            self._models.clear()  # the weights of one at a time
            self._models[side_by_side] = Whisper(
                self.spec.converted,
                device=self.spec.device,
                compute_type=self.dtype,
                inter_threads=side_by_side,
                intra_threads=max(1, self.spec.threads // side_by_side),
            )
        return self._models[side_by_side]


class OpenaiWhisper(Contestant):
    """`whisper.decode` on a batch of mels, which nothing in it calls; and `transcribe`, which takes one at a time."""

    def __init__(self, spec: Spec) -> None:
        from pipeline.demo.train.convert import to_openai

        super().__init__(spec)
        self._model: Any = to_openai(spec.folder).to(spec.device)

    def settings(self, batches: Sequence[int], windows: int) -> list[Setting]:
        return [*super().settings(batches, windows), Setting(1, long_form=True)]

    def run(self, windows: Sequence[Pcm], n_tokens: int, setting: Setting) -> Answer:
        if not setting.long_form:
            return super().run(windows, n_tokens, setting)
        return Answer([self._transcribe(pcm, n_tokens) for pcm in windows])

    def _transcribe(self, pcm: Pcm, n_tokens: int) -> list[int]:
        result = self._model.transcribe(
            _as_float(pcm),
            temperature=0.0,
            compression_ratio_threshold=None,
            logprob_threshold=None,
            no_speech_threshold=None,
            **self._options(n_tokens),
        )
        return [token for segment in result["segments"] for token in segment["tokens"]]

    def _options(self, n_tokens: int) -> dict[str, Any]:
        return {
            "language": LANGUAGE,
            "sample_len": n_tokens,
            "suppress_tokens": self.rules.suppressed(timestamps=True),
            "fp16": self.dtype == "float16",
        }

    @torch.inference_mode()
    def run_batch(self, windows: Sequence[Pcm], n_tokens: int) -> Answer:
        import whisper

        answer, model = Answer([]), self._model
        options = whisper.DecodingOptions(**self._options(n_tokens))
        with answer.stage("mel"):
            mel = torch.stack([whisper.log_mel_spectrogram(_as_float(pcm), model.dims.n_mels) for pcm in windows])
        with answer.stage("encoder"):
            hidden = model.encoder(mel.to(model.device, torch.float16 if options.fp16 else torch.float32))
        with answer.stage("decoder"):
            results = whisper.decode(model, hidden, options)
        answer.tokens = [list(result.tokens) for result in results]
        return answer


class Transformers(Contestant):
    """`generate` on a batch, without timestamps: its rules for these go through the rows one by one.

    So its prompt is one token longer than the others' and its tokens are others.
    """

    def __init__(self, spec: Spec) -> None:
        from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

        super().__init__(spec)
        self._extract: Any = WhisperFeatureExtractor.from_pretrained(spec.folder)
        model: Any = WhisperForConditionalGeneration.from_pretrained(spec.folder, dtype=getattr(torch, spec.dtype))
        self._model = model.to(spec.device).eval()
        self._model.generation_config.begin_suppress_tokens = None

    @torch.inference_mode()
    def run_batch(self, windows: Sequence[Pcm], n_tokens: int) -> Answer:
        answer, model, vocabulary = Answer([]), self._model, self.rules.vocabulary
        spoken = {"language": LANGUAGE, "task": "transcribe"} if vocabulary.multilingual else {}
        with answer.stage("mel"):
            audio = [_as_float(pcm) for pcm in windows]
            mel = self._extract(audio, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
            mel = mel.to(model.device, model.dtype)
        with answer.stage("encoder"):
            hidden = model.get_encoder()(mel)
        with answer.stage("decoder"):
            rows = model.generate(
                input_features=mel,
                encoder_outputs=hidden,
                max_new_tokens=n_tokens,
                min_new_tokens=n_tokens,
                suppress_tokens=self.rules.suppressed(timestamps=False),
                return_timestamps=False,
                num_beams=1,
                do_sample=False,
                **spoken,
            )
        answer.tokens = [[token for token in row if token < vocabulary.eot] for row in rows.tolist()]
        return answer


CONTESTANTS: dict[str, type[Contestant]] = {
    "ours": Ours,
    "faster-whisper": FasterWhisper,
    "openai-whisper": OpenaiWhisper,
    "transformers": Transformers,
}


def write_models(size: str, given: str | None, folder: str, convert: bool) -> tuple[str, str | None]:
    """The checkpoint to race with, `given` or one of random weights in `folder`, and its conversion for CTranslate2."""
    from pipeline.engine.checkpoint import resolve_model
    from pipeline.engine.random_checkpoint import write_random_checkpoint

    target = Path(folder)
    checkpoint = resolve_model(given) if given else write_random_checkpoint(target / "checkpoint", size)
    if not convert:
        return str(checkpoint), None
    from pipeline.demo.train.convert import to_ctranslate2

    return str(checkpoint), str(to_ctranslate2(checkpoint, target / "ctranslate2"))


def is_installed(library: str) -> bool:
    return all(find_spec(module) is not None for module in _MODULES[library])


_MODULES = {
    "ours": (),
    "faster-whisper": ("faster_whisper", "ctranslate2"),
    "openai-whisper": ("whisper",),
    "transformers": ("transformers",),
}


def _batches(windows: Sequence[Pcm], size: int) -> list[Sequence[Pcm]]:
    return [windows[i : i + size] for i in range(0, len(windows), size)]


def _joined(answers: Sequence[Answer]) -> Answer:
    whole = Answer([tokens for answer in answers for tokens in answer.tokens])
    for answer in answers:
        for name, seconds in answer.stages.items():
            whole.stages[name] = whole.stages.get(name, 0.0) + seconds
    return whole


def _as_float(pcm: Pcm) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return pcm.astype(np.float32) / np.float32(32768)
