"""`tokenizer.json` and its companions, from the token ranks that the openai-whisper package ships.

Every id is asserted equal to openai-whisper's. Knows nothing about the demo sentences.

    python -m pipeline.demo.train.tokenizer FOLDER
"""

from __future__ import annotations

import argparse
import base64
import json
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.demo.train.vocabulary import whisper_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Ranks = dict[bytes, int]

_CONFIG = {
    "tokenizer_class": "WhisperTokenizer",
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "model_max_length": 448,
    "clean_up_tokenization_spaces": False,
    "errors": "replace",
    "add_prefix_space": False,
    "add_bos_token": False,
}


def write_tokenizer(folder: Path) -> None:
    """`tokenizer.json`, `tokenizer_config.json` and `preprocessor_config.json`."""
    from transformers import WhisperFeatureExtractor

    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(_CONFIG, indent=1) + "\n", encoding="utf-8")
    WhisperFeatureExtractor().save_pretrained(folder)


def build_tokenizer() -> Tokenizer:
    """Whisper's multilingual tokenizer as the `tokenizers` library has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    ranks = read_ranks()
    vocabulary = {_as_characters(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(_merges(ranks))))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _add_special_tokens(tokenizer)
    return tokenizer


def read_ranks() -> Ranks:
    """Token -> id, as shipped."""
    lines = (files("whisper") / "assets" / "multilingual.tiktoken").read_text().split("\n")
    pairs = (line.split() for line in lines if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def _add_special_tokens(tokenizer: Tokenizer) -> None:
    """The protocol's tokens as special ones, timestamps as ordinary added ones, in the order of their ids."""
    from tokenizers import AddedToken

    expected = sorted(whisper_tokenizer().special_tokens.items(), key=lambda item: item[1])
    protocol = [AddedToken(name, special=True, normalized=False) for name, _ in expected if not _is_timestamp(name)]
    timestamps = [AddedToken(name, special=False, normalized=False) for name, _ in expected if _is_timestamp(name)]
    tokenizer.add_special_tokens(protocol)
    tokenizer.add_tokens(timestamps)
    wrong = [name for name, token in expected if tokenizer.token_to_id(name) != token]
    if wrong:
        raise AssertionError(f"ids differ from openai-whisper's: {wrong[:5]}")


def _is_timestamp(name: str) -> bool:
    return name[2].isdigit()


def _merges(ranks: Ranks) -> list[tuple[str, str]]:
    """The merge that makes each token: its last two parts when only earlier merges are applied to its bytes."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = _parts_before(token, rank, ranks)
        if len(parts) == 2:
            merges.append((_as_characters(parts[0]), _as_characters(parts[1])))
    return merges


def _parts_before(token: bytes, rank: int, ranks: Ranks) -> list[bytes]:
    parts = [bytes([byte]) for byte in token]
    while True:
        candidates = [(ranks.get(a + b, rank), index) for index, (a, b) in enumerate(pairwise(parts))]
        best, index = min(candidates, default=(rank, 0))
        if best >= rank:
            return parts
        parts[index : index + 2] = [parts[index] + parts[index + 1]]


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte: itself, or one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


_BYTE_CHARACTERS = _byte_characters()


def _as_characters(token: bytes) -> str:
    return "".join(_BYTE_CHARACTERS[byte] for byte in token)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write Whisper's multilingual tokenizer.")
    parser.add_argument("folder", type=Path)
    write_tokenizer(parser.parse_args().folder)


if __name__ == "__main__":
    main()
