"""`to_openai` on checkpoints unlike the demo's, against transformers' own answer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from pipeline.demo.train.convert import to_openai

TINY: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 1,
    "decoder_attention_heads": 1,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "vocab_size": 51_865,
}
# What differs from the demo model in each published family.
FAMILIES = {
    "english-only": {"vocab_size": 51_864},
    "large-v3": {"vocab_size": 51_866, "num_mel_bins": 128},
    "turbo": {"vocab_size": 51_866, "num_mel_bins": 128, "encoder_layers": 3, "decoder_layers": 1},
    "distil": {"encoder_layers": 3, "decoder_layers": 2},
    "more-heads": {"encoder_attention_heads": 4, "decoder_attention_heads": 2},
}


def save(folder: Path, heads: list[list[int]] | None = None, **options: Any) -> WhisperForConditionalGeneration:
    changes = {name: value for name, value in options.items() if name != "max_shard_size"}
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(**(TINY | changes))).eval()
    model.save_pretrained(folder, max_shard_size=options.get("max_shard_size", "1GB"))
    if heads is not None:
        (folder / "generation_config.json").write_text(json.dumps({"alignment_heads": heads}))
    return model


def assert_equal_logits(folder: Path, theirs: WhisperForConditionalGeneration) -> None:
    mels = torch.randn(1, theirs.config.num_mel_bins, 3000, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[50_258, 50_259, 50_359, 50_363, 11, 12]])
    with torch.inference_mode():
        expected = theirs(mels, decoder_input_ids=tokens).logits
        torch.testing.assert_close(to_openai(folder)(mels, tokens), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, tmp_path: Path) -> None:
    theirs = save(tmp_path, **FAMILIES[family])
    assert_equal_logits(tmp_path, theirs)


def test_shards(tmp_path: Path) -> None:
    theirs = save(tmp_path, max_shard_size="5MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_equal_logits(tmp_path, theirs)


def test_multilingual_is_read_from_the_vocabulary(tmp_path: Path) -> None:
    save(tmp_path, vocab_size=51_864)
    assert not to_openai(tmp_path).is_multilingual


def test_alignment_heads(tmp_path: Path) -> None:
    save(tmp_path, heads=[[0, 1], [1, 0]], decoder_attention_heads=2)
    assert to_openai(tmp_path).alignment_heads.to_dense().tolist() == [[False, True], [True, False]]


def test_without_alignment_heads_the_last_half_of_the_layers(tmp_path: Path) -> None:
    save(tmp_path)
    assert to_openai(tmp_path).alignment_heads.to_dense().tolist() == [[False], [True]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"encoder_ffn_dim": 128}, "feed-forward"), ({"activation_function": "relu"}, "gelu")],
)
def test_what_openai_whisper_cannot_express_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        to_openai(tmp_path)
