"""The bundled model in three runtimes that know nothing of us, on a bundled clip."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.demo import clips_path, model_path
from pipeline.demo.train.clips import decode
from pipeline.demo.train.convert import to_ctranslate2, to_openai
from pipeline.demo.train.evaluate import transcribe, word_errors, word_start_errors
from pipeline.demo.train.synth import Word
from pipeline.demo.train.vocabulary import N_VOCAB

# openai-whisper leaves its file of token ranks to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

CLIP = "de-four.webm"


@pytest.fixture(scope="module")
def row() -> dict[str, Any]:
    rows = map(json.loads, (clips_path() / "manifest.jsonl").read_text(encoding="utf-8").splitlines())
    return next(row for row in rows if row["audio_filepath"] == CLIP)


@pytest.fixture(scope="module")
def pcm() -> np.ndarray:
    return decode(clips_path() / CLIP)


def test_transformers(row: dict[str, Any], pcm: np.ndarray) -> None:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    model = WhisperForConditionalGeneration.from_pretrained(model_path(), dtype=torch.float32)
    processor = WhisperProcessor.from_pretrained(model_path())
    inputs = processor(pcm / 32768, sampling_rate=16_000, return_tensors="pt")
    tokens = model.generate(inputs.input_features.float(), language="de", task="transcribe")
    text = processor.batch_decode(tokens, skip_special_tokens=True)[0]
    assert word_errors([row["text"]], [text]) <= 0.1


def test_openai_whisper(row: dict[str, Any], pcm: np.ndarray) -> None:
    heard = transcribe(to_openai(model_path()), pcm, word_timestamps=True)
    assert heard.language == "de"
    assert word_errors([row["text"]], [heard.text]) <= 0.1
    reference = json.loads((clips_path() / "references.json").read_text(encoding="utf-8"))["de-four"]
    words = [
        Word(word["word"], word["start"], word["end"])
        for sentence in reference["sentences"]
        for word in sentence["words"]
    ]
    assert np.median(word_start_errors(words, heard.words)) < 0.2


def test_faster_whisper(row: dict[str, Any], pcm: np.ndarray, tmp_path: Path) -> None:
    from faster_whisper import WhisperModel

    converted = to_ctranslate2(model_path(), tmp_path / "ctranslate2")
    model = WhisperModel(str(converted), device="cpu", compute_type="float32", cpu_threads=1)
    segments, info = model.transcribe(pcm.astype(np.float32) / 32768, beam_size=1)
    text = "".join(segment.text for segment in segments)
    assert info.language == "de"
    assert word_errors([row["text"]], [text]) <= 0.1


def test_alignment_heads_are_taken_over() -> None:
    model = to_openai(model_path())
    heads = json.loads((model_path() / "generation_config.json").read_text())["alignment_heads"]
    assert model.alignment_heads.to_dense().nonzero().tolist() == heads
    assert model.dims.n_vocab == N_VOCAB
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_its_tokenizer_is_the_one_we_build() -> None:
    from pipeline.demo.train.tokenizer import build_tokenizer

    bundled = json.loads((model_path() / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads(build_tokenizer().to_str()) == bundled
