"""A training checkpoint: `NAME.safetensors` with the weights, `NAME.json` with all that is needed to read them.

No pickle. Knows nothing about how the weights came to be.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file, save_file

from pipeline.demo.train.net import Net, NetConfig
from pipeline.demo.train.vocabulary import Vocabulary, make_vocabulary


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


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """A reader sees the old file or the new one, never a part."""
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    temporary.replace(path)
