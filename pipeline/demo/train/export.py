"""A trained checkpoint as a Hugging Face folder: the full table of 51,865 tokens, fp16, tokenizer and all.

Knows nothing about training; `convert` takes the folder to other runtimes.

    python -m pipeline.demo.train.export CHECKPOINT FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.demo.train.checkpoint import load_checkpoint
from pipeline.demo.train.loss import ALIGNMENT_LAYERS
from pipeline.demo.train.net import Net, NetConfig
from pipeline.demo.train.tokenizer import write_tokenizer
from pipeline.demo.train.vocabulary import (
    END,
    N_VOCAB,
    NO_SPEECH,
    NO_TIMESTAMPS,
    PREVIOUS,
    START,
    TRANSCRIBE,
    TRANSLATE,
    Vocabulary,
    whisper_tokenizer,
)

_TABLE = "decoder.embed_tokens.weight"
_SPACE = 220


def export(net: Net, vocabulary: Vocabulary, folder: Path) -> None:
    """Writes the folder that transformers, and our converters, read."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.half().contiguous() for name, tensor in full_state(net, vocabulary).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _model_config(net.config))
    _write_json(folder / "generation_config.json", _generation_config())
    write_tokenizer(folder)


def full_state(net: Net, vocabulary: Vocabulary) -> dict[str, Tensor]:
    """The tensors of encoder and decoder by Hugging Face's names, every unused token's row being the dummy one.

    Equal rows compress to almost nothing, so the full table costs little in an archive.
    """
    state = {
        f"model.{name}": tensor.detach()
        for name, tensor in net.state_dict().items()
        if name.startswith(("encoder.", "decoder."))
    }
    rows = torch.from_numpy(vocabulary.row_of)
    state[f"model.{_TABLE}"] = state[f"model.{_TABLE}"][rows]
    return state


def _model_config(config: NetConfig) -> dict[str, Any]:
    return {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "activation_function": "gelu",
        "d_model": config.d_model,
        "vocab_size": N_VOCAB,
        "num_mel_bins": config.n_mels,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "num_hidden_layers": config.encoder_layers,
        "encoder_attention_heads": config.heads,
        "decoder_attention_heads": config.heads,
        "encoder_ffn_dim": 4 * config.d_model,
        "decoder_ffn_dim": 4 * config.d_model,
        "max_source_positions": config.n_positions,
        "max_target_positions": config.n_slots,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "scale_embedding": False,
        "use_cache": True,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "init_std": 0.02,
        "median_filter_width": 7,
        "torch_dtype": "float16",
        **_token_roles(),
    }


def _generation_config() -> dict[str, Any]:
    tokenizer = whisper_tokenizer()
    never = {TRANSLATE, TRANSCRIBE, tokenizer.sot_lm, PREVIOUS, NO_SPEECH}
    return {
        "alignment_heads": [[layer, 0] for layer in ALIGNMENT_LAYERS],
        "is_multilingual": True,
        "lang_to_id": {
            f"<|{code}|>": tokenizer.to_language_token(code) for code in sorted(tokenizer.all_language_codes)
        },
        "task_to_id": {"transcribe": TRANSCRIBE, "translate": TRANSLATE},
        "no_timestamps_token_id": NO_TIMESTAMPS,
        "prev_sot_token_id": PREVIOUS,
        "max_initial_timestamp_index": 50,
        "max_length": 448,
        "return_timestamps": False,
        "begin_suppress_tokens": [_SPACE, END],
        "suppress_tokens": sorted(never | set(tokenizer.non_speech_tokens)),
        **_token_roles(),
    }


def _token_roles() -> dict[str, int]:
    return {"bos_token_id": END, "eos_token_id": END, "pad_token_id": END, "decoder_start_token_id": START}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a checkpoint as a Hugging Face folder.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    net, vocabulary = load_checkpoint(options.checkpoint)
    export(net, vocabulary, options.folder)
    size = (options.folder / "model.safetensors").stat().st_size
    print(f"{size / 1e6:.1f} MB of weights in {options.folder}")


if __name__ == "__main__":
    main()
