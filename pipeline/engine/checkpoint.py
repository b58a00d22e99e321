"""A model's name → a local folder in Hugging Face layout, checked as far as that goes without torch.

It knows files and their names; what is in the tensors is `model.py`'s business.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError

_WANTED = ["*.json", "*.safetensors", "*.txt"]
_HASH_SAMPLE = 1 << 16  # bytes read at each of 16 places of a weights file


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The folder of `model`: `demo`, a folder, an fsspec URI, or a hub id (fetched if it is not cached).

    Raises `ModelError`, one line, if it cannot be had or is not a Whisper checkpoint in safetensors.
    """
    if model == "demo":
        from pipeline.demo import model_path

        folder = model_path()
    elif "://" in model:
        folder = _fetch_uri(model)
    elif Path(model).is_dir():
        folder = Path(model)
    elif model.startswith((".", "/", "~")):
        raise ModelError(f"model {model!r}: no such folder")
    else:
        folder = _fetch_hub(model, revision)
    _check_folder(folder, model)
    return folder


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of the checkpoint; {} where there is none."""
    path = folder / name
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model file {path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(f"model file {path}: expected a JSON object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files, as its index lists them."""
    index = read_json(folder, "model.safetensors.index.json")
    if index:
        names = sorted(set(index.get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(f"model {folder}: {missing[0]} is named in the index and missing")
        return [folder / name for name in names]
    path = folder / "model.safetensors"
    return [path] if path.is_file() else []


def revision_of(folder: Path, asked: str | None) -> str | None:
    """The revision of a resolved model: the hub's cache names a snapshot's folder by its commit."""
    return folder.name if folder.parent.name == "snapshots" else asked


def model_fingerprint(folder: Path) -> str:
    """A name of what the weights are: 16 hex digits over the configuration, each file's size, header and samples.

    Samples, not all bytes: a 3 GB file would take seconds in every process that compares it.
    """
    digest = hashlib.sha256()
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for i in range(16):
                file.seek(size * i // 16)
                digest.update(file.read(_HASH_SAMPLE))
    return digest.hexdigest()[:16]


def _fetch_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_WANTED))
    except HFValidationError:
        raise ModelError(f"model {model!r} is neither a folder nor a hub id such as openai/whisper-base") from None
    except RevisionNotFoundError:
        raise ModelError(f"model {model!r} has no revision {revision!r} on the hub") from None
    except RepositoryNotFoundError:
        raise ModelError(f"model {model!r}: the hub knows no such model, or it needs a token (HF_TOKEN)") from None
    except Exception as error:  # every transport has its own errors; to the user they are one
        raise ModelError(
            f"model {model!r} is not in the local cache and the hub cannot be reached ({type(error).__name__}); "
            "pass a folder with --model /path/to/checkpoint, or try the bundled one with --model demo"
        ) from None


def _fetch_uri(uri: str) -> Path:
    """Copies a checkpoint folder from any fsspec store into the user's cache, once."""
    import fsspec

    target = Path.home() / ".cache" / "murmuration" / "models" / hashlib.sha256(uri.encode()).hexdigest()[:16]
    done = target / ".complete"
    if done.exists():
        return target
    try:
        fs, root = fsspec.core.url_to_fs(uri)
        names = [p for p in fs.ls(root, detail=False) if Path(p).suffix in (".json", ".safetensors", ".txt")]
        if not names:
            raise FileNotFoundError(uri)
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            fs.get_file(name, str(target / Path(name).name))
        done.touch()
    except Exception as error:  # every store has its own errors; to the user they are one
        raise ModelError(f"model {uri!r} cannot be fetched: {type(error).__name__}: {error}") from None
    return target


def _check_folder(folder: Path, model: str) -> None:
    config = read_json(folder, "config.json")
    if config.get("model_type") != "whisper":
        found = config.get("model_type", "no config.json")
        raise ModelError(f"model {model!r}: not a Whisper checkpoint in Hugging Face layout ({found}) in {folder}")
    files = weight_files(folder)
    if not files:
        pickled = next(folder.glob("*.bin"), None) or next(folder.glob("*.pt"), None)
        hint = f"; {pickled.name} is pickled and refused, convert it to safetensors" if pickled else ""
        raise ModelError(f"model {model!r}: no model.safetensors in {folder}{hint}")
    for path in files:
        _check_safetensors(path)


def _check_safetensors(path: Path) -> None:
    """A cut or overwritten weights file is found here, before anything is started."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise ModelError(f"weights {path}: damaged (its header is cut or not safetensors)")
        try:
            entries = json.loads(file.read(length))
            end = max((e["data_offsets"][1] for k, e in entries.items() if k != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(f"weights {path}: damaged (its header is not safetensors)") from None
    if 8 + length + end != size:
        raise ModelError(f"weights {path}: damaged ({size} bytes, {8 + length + end} expected)")
