"""Checkpoints: every shape and layout of Whisper loads as transformers loads it; what is wrong is refused by name."""

from __future__ import annotations

import fnmatch
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.engine import EngineConfig, load_engine
from pipeline.engine.checkpoint import _WANTED, model_fingerprint, resolve_model, revision_of
from pipeline.engine.model import WhisperModel
from pipeline.engine.random_checkpoint import SIZES, Shape, write_random_checkpoint
from pipeline.errors import ModelError
from pipeline.types import DecodeOptions

SMALL = Shape(64, 1, 2, 2)
TOKENS = torch.tensor([[50258, 50259, 50359, 50363, 400, 1000, 9, 77]])


def loaded(folder: Path) -> WhisperModel:
    return WhisperModel(resolve_model(str(folder)), torch.device("cpu"), torch.float32)


def mel(n_mels: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(0, 0.5, (1, n_mels, 3000)).astype(np.float32))


def logits(model: WhisperModel, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    everywhere = torch.arange(tokens.shape[1])[None]
    return model.prefill(model.allocate(1), [0], model.encode(mel(model.dims.n_mels)), tokens, everywhere)


def theirs(folder: Path, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """The same numbers by transformers."""
    from transformers import WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        result: torch.Tensor = model(
            input_features=mel(model.config.num_mel_bins), decoder_input_ids=tokens
        ).logits.float()
    return result


def assert_same(ours: torch.Tensor, other: torch.Tensor) -> None:
    assert other.std() > 1, "logits worth comparing"
    torch.testing.assert_close(ours, other, atol=2e-3, rtol=0)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without its tokenizer, which the network does without."""
    folder = write_random_checkpoint(tmp_path_factory.mktemp("template"), SMALL)
    (folder / "tokenizer.json").unlink()
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    """A copy of it that may be spoilt."""
    return Path(shutil.copytree(template, tmp_path / "model"))


# -- what loads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["tiny", "large-v3", "large-v3-turbo", "distil-large-v3", "distil-small.en"])
def test_every_size_loads_and_decodes(tmp_path: Path, size: str) -> None:
    """The published shapes but for their width, which would take gigabytes, and the depth of large encoders."""
    shape = replace(SIZES[size], width=64, heads=1, encoder_layers=min(4, SIZES[size].encoder_layers))
    write_random_checkpoint(tmp_path, shape, dtype="float16")
    model = loaded(tmp_path)
    assert (model.dims.n_audio_layer, model.dims.n_text_layer) == (shape.encoder_layers, shape.decoder_layers)
    assert (model.dims.n_mels, model.dims.n_vocab) == (shape.n_mels, shape.n_vocab)
    assert_same(logits(model), theirs(tmp_path))
    pcm = np.random.default_rng(0).integers(-9000, 9000, 16_000 * 5).astype(np.int16)
    options = DecodeOptions(word_timestamps=True, temperature_fallback=False, no_speech_threshold=None, max_tokens=9)
    with load_engine(EngineConfig(model=str(tmp_path), device="cpu", dtype="float32", lanes=2)) as engine:
        (heard,) = engine.decode([pcm], options)
        assert len(engine.info.languages) == {51_864: 0, 51_865: 99, 51_866: 100}[shape.n_vocab]
        assert heard.tokens_generated > 3


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    weights = folder / "model.safetensors"
    changed = change(load_file(weights))
    save_file({name: tensor.contiguous() for name, tensor in changed.items()}, weights, metadata={"format": "pt"})


def configure(folder: Path, name: str = "config.json", **keys: Any) -> int:
    content = json.loads((folder / name).read_text()) | keys
    return (folder / name).write_text(json.dumps({key: v for key, v in content.items() if v is not ...}))


def untied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    other = tensors["model.decoder.embed_tokens.weight"].roll(1, dims=0)
    return {**tensors, "proj_out.weight": other}


def in_shards(folder: Path, n: int) -> dict[str, Any]:
    """The weights in `n` files; returns the index, which is written."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    where = {tensor: names[i % n] for i, tensor in enumerate(sorted(tensors))}
    for name in names:
        save_file({t: tensors[t] for t in tensors if where[t] == name}, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def as_type(dtype: torch.dtype) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: {k: t.to(dtype) for k, t in tensors.items()})


LAYOUTS: dict[str, Callable[[Path], object]] = {
    "as it is": lambda _: None,
    "sharded": lambda folder: in_shards(folder, 3),
    "float16": as_type(torch.float16),
    "bfloat16": as_type(torch.bfloat16),
    "bare names": lambda folder: rewrite(folder, lambda ts: {k.removeprefix("model."): t for k, t in ts.items()}),
    "output beside, the same": lambda folder: rewrite(
        folder, lambda ts: {**ts, "proj_out.weight": ts["model.decoder.embed_tokens.weight"].clone()}
    ),
    "output beside, another": lambda folder: rewrite(folder, untied),
    "output of its own": lambda folder: rewrite(folder, untied) if configure(folder, tie_word_embeddings=False) else 0,
    "a trainer's folder": lambda folder: [
        (folder / name).write_bytes(b"x") for name in ("optimizer.pt", "training_args.bin", "rng_state.pth")
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_as_transformers_loads_it(template: Path, folder: Path, layout: str) -> None:
    LAYOUTS[layout](folder)
    ours = logits(loaded(folder))
    assert_same(ours, theirs(folder))
    difference = (ours - logits(loaded(template))).abs().mean()
    assert (difference > 1) == (layout in ("output beside, another", "output of its own"))


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ([[1, 0], [0, 0]], ((0, 0), (1, 0))),
        (..., ((1, 0),)),  # no such key: all heads of the last half of the layers
        ([], ((1, 0),)),
        (None, ((1, 0),)),
        ([[0, 0], [25, 3]], ((1, 0),)),  # a teacher's, which has more layers
        ([[0, 1]], ((1, 0),)),
        ([[-1, 0]], ((1, 0),)),
    ],
)
def test_alignment_heads(folder: Path, listed: Any, expected: object, caplog: pytest.LogCaptureFixture) -> None:
    configure(folder, "generation_config.json", alignment_heads=listed)
    with caplog.at_level(logging.WARNING):
        assert loaded(folder).alignment_heads == expected
    assert bool(caplog.records) == (listed in ([[0, 0], [25, 3]], [[0, 1]], [[-1, 0]]))


@pytest.mark.parametrize(("n_layers", "layers"), [(1, [0]), (2, [1]), (3, [1, 2]), (4, [2, 3])])
def test_the_last_half_of_the_layers(tmp_path: Path, n_layers: int, layers: list[int]) -> None:
    """turbo has four, distilled models two; of an odd number the larger half, as in the reference."""
    write_random_checkpoint(tmp_path, Shape(64, 2, 1, n_layers), dtype="float16")
    (tmp_path / "generation_config.json").unlink()
    assert loaded(tmp_path).alignment_heads == tuple((layer, head) for layer in layers for head in range(2))


# -- what is refused -----------------------------------------------------------------------------------------

FC1 = "model.decoder.layers.1.fc1.weight"


def with_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: {**tensors, name: change(tensors[name].clone())})


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 5] = value
        return tensor

    return change


def shards(spoil: Callable[[Path, dict[str, Any]], object]) -> Callable[[Path], None]:
    """Two shards whose index is written again after `spoil` changed it."""

    def make(folder: Path) -> None:
        index = in_shards(folder, 2)
        spoil(folder, index["weight_map"])
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return make


def moved_out(folder: Path) -> None:
    """Weights one folder up, and an index that points there."""
    weights = (folder / "model.safetensors").rename(folder.parent / "stray.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(weights), "../stray.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "a tensor is missing": (
        lambda f: rewrite(f, lambda ts: {k: t for k, t in ts.items() if k != FC1}),
        f"{FC1} is missing",
    ),
    "all of them are": (
        lambda f: rewrite(f, lambda _: {"lm_head.weight": torch.zeros(2, 2)}),
        r"encoder\.conv1\.weight is missing",
    ),
    "another shape": (with_tensor(FC1, lambda t: t[:10]), rf"{FC1} has shape \(10, 64\)"),
    "more layers than the config has": (
        lambda f: configure(f, decoder_layers=1),
        r"tensor model\.decoder\.layers\.1\.\S+ has no place",
    ),
    "more in the config": (
        lambda f: configure(f, encoder_layers=3),
        r"tensor model\.encoder\.layers\.2\.\S+ is missing",
    ),
    "other mels": (lambda f: configure(f, num_mel_bins=128), r"encoder\.conv1\.weight has shape \(64, 80, 3\)"),
    "no number": (with_tensor(FC1, with_value(float("nan"))), f"{FC1} has values that are no numbers"),
    "infinite": (with_tensor(FC1, with_value(float("-inf"))), f"{FC1} has values that are no numbers"),
    "quantised": (with_tensor(FC1, lambda t: t.to(torch.int8)), f"{FC1} is int8"),
    "quantised, says the config": (
        lambda f: configure(f, quantization_config={"load_in_8bit": True}),
        "quantization_config",
    ),
    "scaled embeddings": (lambda f: configure(f, scale_embedding=True), "scale_embedding True"),
    "another activation": (lambda f: configure(f, activation_function="relu"), "activation_function relu"),
    "no width": (lambda f: configure(f, d_model=...), "lacks 'd_model'"),
    "a width of 0": (lambda f: configure(f, d_model=0), "n_state is 0"),
    "a width in words": (lambda f: configure(f, d_model="64"), "n_state is '64'"),
    "heads that do not divide it": (lambda f: configure(f, decoder_attention_heads=3), "no multiple"),
    "a shorter window": (lambda f: configure(f, max_source_positions=750), "750 audio"),
    "another kind of model": (lambda f: configure(f, model_type="wav2vec2"), "not a Whisper checkpoint"),
    "alignment heads in words": (lambda f: configure(f, "generation_config.json", alignment_heads="all"), "no list of"),
    "a config that is no JSON": (lambda f: (f / "config.json").write_text("{"), "not readable as JSON"),
    "cut": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]), "damaged"),
    "overwritten": (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x02}q\x00." * 999), "damaged"),
    "an adapter": (
        lambda f: (f / "config.json").rename(f / "adapter_config.json"),
        r"adapter \(LoRA\) without its model",
    ),
    "a shard is missing": (
        shards(lambda f, _: (f / "model-00002-of-00002.safetensors").unlink()),
        r"model-00002-of-00002\.safetensors, which holds tensor model\.\S+, is in the index and missing",
    ),
    "a tensor is in no shard": (
        shards(lambda f, where: where.update({k: min(where.values()) for k in list(where)})),
        r"tensor model\.\S+ is missing",
    ),
    "shards that are pickled": (
        shards(lambda f, where: where.update({FC1: "pytorch_model-00001-of-00002.bin"})),
        r"pytorch_model-00001-of-00002\.bin, which its index names, is pickled and refused",
    ),
    "shards elsewhere": (moved_out, r"'\.\./stray\.safetensors', which its index names, is no safetensors file"),
    "an index without a list": (shards(lambda f, where: where.update({FC1: 5})), "weight_map is no list"),
    "pickled": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), r"pytorch_model\.bin is pickled"),
    "pickled, openai's": (lambda f: (f / "model.safetensors").rename(f / "small.pt"), r"small\.pt is pickled"),
    "nothing": (lambda f: (f / "model.safetensors").unlink(), "pickled weights are refused, convert"),
}  # fmt: skip


@pytest.mark.parametrize("fault", SPOILT)
def test_what_is_wrong_is_refused_by_name(folder: Path, fault: str) -> None:
    spoil, message = SPOILT[fault]
    spoil(folder)
    with pytest.raises(ModelError, match=message) as refused:
        loaded(folder)
    assert "\n" not in str(refused.value)


def test_a_number_too_large_for_half_precision_is_refused(folder: Path) -> None:
    rewrite(folder, lambda ts: {**ts, FC1: with_value(1e5)(ts[FC1].clone())})
    loaded(folder)
    with pytest.raises(ModelError, match=f"{FC1} has values that are no numbers in float16"):
        WhisperModel(folder, torch.device("cpu"), torch.float16)


# -- where it comes from -------------------------------------------------------------------------------------

PUBLISHED = (
    "config.json generation_config.json tokenizer.json vocab.json merges.txt normalizer.json preprocessor_config.json "
    "model.safetensors model-00001-of-00002.safetensors model.safetensors.index.json"
).split()
UNWANTED = (
    "pytorch_model.bin pytorch_model-00001-of-00002.bin model.fp32-00001-of-00002.safetensors flax_model.msgpack "
    "tf_model.h5 original-model.fp32.safetensors optimizer.pt onnx/encoder_model.onnx adapter_model.safetensors"
).split()


def test_the_hub_is_asked_for_no_pickle_and_nothing_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[Any, ...]] = []

    def snapshot(model: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((model, revision))
        wanted = {name for name in PUBLISHED + UNWANTED if any(fnmatch.fnmatch(name, p) for p in allow_patterns)}
        assert wanted == set(PUBLISHED)
        return str(write_random_checkpoint(tmp_path / "snapshots" / "abc123", SMALL, dtype="float16"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    folder = resolve_model("openai/whisper-base", "main")
    assert asked == [("openai/whisper-base", "main")]
    assert revision_of(folder, "main") == "abc123"


def test_a_checkpoint_in_a_store_is_fetched_once_and_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    source = write_random_checkpoint(tmp_path / "model", SMALL, dtype="float16", shards=2)
    (source / "pytorch_model.bin").write_bytes(b"pickled")
    store = fsspec.filesystem("memory")
    store.put(str(source), "/models/whisper", recursive=True)
    folder = resolve_model("memory://models/whisper")
    assert not (folder / "pytorch_model.bin").exists()
    assert model_fingerprint(folder) == model_fingerprint(source)
    store.rm("/models/whisper", recursive=True)
    assert resolve_model("memory://models/whisper") == folder


def test_a_fetch_that_breaks_off_leaves_nothing_to_be_taken_for_a_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    store = fsspec.filesystem("memory")
    store.put(str(write_random_checkpoint(tmp_path / "model", SMALL, dtype="float16")), "/m/broken", recursive=True)
    fetch = type(store).get_file

    def broken(self: Any, rpath: str, lpath: str, **more: Any) -> None:
        fetch(self, rpath, lpath, **more)
        if rpath.endswith(".safetensors"):
            raise ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "get_file", broken)
        with pytest.raises(ModelError, match="cannot be fetched: ConnectionError"):
            resolve_model("memory://m/broken")
    assert not list((tmp_path / "home").rglob("*.json"))
    resolve_model("memory://m/broken")


def test_patterns_name_no_pickle() -> None:
    assert not [name for name in UNWANTED if any(fnmatch.fnmatch(name, pattern) for pattern in _WANTED)]
