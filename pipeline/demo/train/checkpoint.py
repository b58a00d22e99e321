"""A training checkpoint: `NAME.safetensors` with the weights, `NAME.json` with all that is needed to read them.

An exported Hugging Face folder can be read back as well. No pickle. Knows nothing about how the weights came to be.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pipeline.demo.train.data import N_CHARACTER_CLASSES
from pipeline.demo.train.net import Net, NetConfig
from pipeline.demo.train.vocabulary import N_VOCAB, Vocabulary, demo_vocabulary, make_vocabulary

_TABLE = "decoder.embed_tokens.weight"


def save_checkpoint(path: Path, net: Net, vocabulary: Vocabulary, progress: dict[str, float]) -> None:
    """Weights first, then the description: a description without weights never lies about."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    _replace(path.with_suffix(".safetensors"), lambda temporary: save_file(tensors, temporary))
    described = {"net": asdict(net.config), "text_ids": vocabulary.text_ids, "progress": progress}
    _replace(path.with_suffix(".json"), lambda temporary: temporary.write_text(json.dumps(described)))


def load_checkpoint(path: Path) -> tuple[Net, Vocabulary]:
    """The network on the CPU and the vocabulary it speaks."""
    described = json.loads(path.with_suffix(".json").read_text())
    net = Net(NetConfig(**described["net"]))
    net.load_state_dict(load_file(path.with_suffix(".safetensors")))
    return net, make_vocabulary(described["text_ids"])


def from_folder(folder: Path) -> tuple[Net, Vocabulary]:
    """The network of a folder that `export` wrote, on the reduced vocabulary of the demo sentences.

    The folder has no training heads: theirs are fresh. ValueError when it is no such folder.
    """
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    vocabulary = demo_vocabulary()
    if described["vocab_size"] != N_VOCAB:
        raise ValueError(f"{folder}: a vocabulary of {described['vocab_size']} tokens, not {N_VOCAB}")
    tensors = load_file(folder / "model.safetensors")
    state = {name.removeprefix("model."): tensor.float() for name, tensor in tensors.items()}
    state[_TABLE] = _reduced(state[_TABLE], vocabulary, folder)
    net = Net(
        NetConfig(
            n_rows=vocabulary.n_rows,
            n_unused=vocabulary.n_unused,
            d_model=described["d_model"],
            heads=described["encoder_attention_heads"],
            encoder_layers=described["encoder_layers"],
            decoder_layers=described["decoder_layers"],
            n_mels=described["num_mel_bins"],
            n_positions=described["max_source_positions"],
            n_slots=described["max_target_positions"],
            n_character_classes=N_CHARACTER_CLASSES,
        )
    )
    missing, unexpected = net.load_state_dict(state, strict=False)
    wrong = [*unexpected, *(name for name in missing if name.startswith(("encoder.", "decoder.")))]
    if wrong:
        raise ValueError(f"{folder}: tensors missing or unknown: {', '.join(wrong[:5])}")
    return net, vocabulary


def _reduced(table: torch.Tensor, vocabulary: Vocabulary, folder: Path) -> torch.Tensor:
    """[rows, width]: the kept tokens' rows, then the one that all unused tokens share."""
    unused = table[torch.from_numpy(vocabulary.row_of == vocabulary.dummy_row)]
    n_other = int((unused != unused[0]).any(1).sum())
    if n_other:
        raise ValueError(f"{folder}: {n_other} rows of unused tokens differ from the first: it speaks other words")
    return torch.cat([table[torch.from_numpy(vocabulary.ids)], unused[:1]])


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """A reader sees the old file or the new one, never a part."""
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    temporary.replace(path)
