"""A Whisper folder in Hugging Face layout, as the other runtimes want it.

`to_openai` makes an openai-whisper model in memory, `to_ctranslate2` a CTranslate2 folder on disk. Works for any
Whisper checkpoint: English-only, 80 or 128 mels, any number of layers. Knows nothing about the demo model.

    python -m pipeline.demo.train.convert FOLDER --ctranslate2 OUT --openai OUT.safetensors
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from whisper.model import ModelDimensions, Whisper

# Module names, Hugging Face's on the left; applied in this order to the dotted path of every tensor.
_RENAMES = (
    ("encoder.embed_positions.weight", "encoder.positional_embedding"),
    ("decoder.embed_positions.weight", "decoder.positional_embedding"),
    ("decoder.embed_tokens.", "decoder.token_embedding."),
    ("encoder.layer_norm.", "encoder.ln_post."),
    ("decoder.layer_norm.", "decoder.ln."),
    (".layers.", ".blocks."),
    (".self_attn_layer_norm.", ".attn_ln."),
    (".encoder_attn_layer_norm.", ".cross_attn_ln."),
    (".final_layer_norm.", ".mlp_ln."),
    (".self_attn.", ".attn."),
    (".encoder_attn.", ".cross_attn."),
    (".q_proj.", ".query."),
    (".k_proj.", ".key."),
    (".v_proj.", ".value."),
    (".out_proj.", ".out."),
    (".fc1.", ".mlp.0."),
    (".fc2.", ".mlp.2."),
)


def to_openai(folder: str | Path) -> Whisper:
    """The model as openai-whisper's own class, float32, on the CPU, in evaluation mode.

    Its alignment heads are those of `generation_config.json`; without any, openai-whisper's default stays
    (all heads of the last half of the decoder).
    """
    from whisper.model import Whisper

    folder = Path(folder)
    config = _read_json(folder / "config.json")
    model = Whisper(_dimensions(config))
    model.load_state_dict(_openai_state(_load_tensors(folder)))
    heads = _read_json(folder / "generation_config.json").get("alignment_heads")
    if heads:
        _set_alignment_heads(model, heads)
    return model.eval()


def to_ctranslate2(folder: str | Path, out: str | Path, *, quantization: str | None = "float32") -> Path:
    """CTranslate2's own conversion, with the files that faster-whisper reads beside the model."""
    from ctranslate2.converters import TransformersConverter

    present = [name for name in ("tokenizer.json", "preprocessor_config.json") if (Path(folder) / name).exists()]
    converter = TransformersConverter(str(folder), copy_files=present)
    converter.convert(str(out), quantization=quantization, force=True)
    return Path(out)


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _dimensions(config: dict[str, Any]) -> ModelDimensions:
    from whisper.model import ModelDimensions

    width = config["d_model"]
    # openai-whisper has no such switches; a model that uses them would load and answer wrongly.
    if config.get("encoder_ffn_dim", 4 * width) != 4 * width or config.get("decoder_ffn_dim", 4 * width) != 4 * width:
        raise ValueError("openai-whisper fixes the feed-forward width at 4 x d_model")
    if config.get("scale_embedding", False) or config.get("activation_function", "gelu") != "gelu":
        raise ValueError("openai-whisper has neither scaled embeddings nor another activation than gelu")
    return ModelDimensions(
        n_mels=config["num_mel_bins"],
        n_audio_ctx=config["max_source_positions"],
        n_audio_state=width,
        n_audio_head=config["encoder_attention_heads"],
        n_audio_layer=config["encoder_layers"],
        n_vocab=config["vocab_size"],
        n_text_ctx=config["max_target_positions"],
        n_text_state=width,
        n_text_head=config["decoder_attention_heads"],
        n_text_layer=config["decoder_layers"],
    )


def _load_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of `model.safetensors` or of its shards."""
    from safetensors.torch import load_file

    index = _read_json(folder / "model.safetensors.index.json")
    shards = sorted(set(index["weight_map"].values())) if index else ["model.safetensors"]
    return {name: tensor for shard in shards for name, tensor in load_file(folder / shard).items()}


def _openai_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    import torch

    named = {name.removeprefix("model."): tensor.float() for name, tensor in tensors.items()}
    output = named.pop("proj_out.weight", None)
    if output is not None and not torch.equal(output, named["decoder.embed_tokens.weight"]):
        raise ValueError("openai-whisper ties the output layer to the token embedding; here they differ")
    return {_openai_name(name): tensor for name, tensor in named.items()}


def _openai_name(name: str) -> str:
    for theirs, openai in _RENAMES:
        name = name.replace(theirs, openai)
    return name


def _set_alignment_heads(model: Whisper, heads: list[list[int]]) -> None:
    import torch

    mask = torch.zeros(model.dims.n_text_layer, model.dims.n_text_head, dtype=torch.bool)
    for layer, head in heads:
        mask[layer, head] = True
    model.register_buffer("alignment_heads", mask.to_sparse(), persistent=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert a Hugging Face Whisper folder for other runtimes.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ctranslate2", type=Path, metavar="OUT", help="write a CTranslate2 folder")
    parser.add_argument("--quantization", default="float32", help="of CTranslate2's weights (default float32)")
    parser.add_argument("--openai", type=Path, metavar="OUT", help="write openai-whisper's tensors as safetensors")
    options = parser.parse_args()
    if options.ctranslate2:
        to_ctranslate2(options.folder, options.ctranslate2, quantization=options.quantization)
    if options.openai:
        from safetensors.torch import save_file

        save_file(_openai_state(_load_tensors(options.folder)), options.openai)


if __name__ == "__main__":
    main()
