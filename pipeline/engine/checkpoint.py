"""A model's name → a local folder in Hugging Face layout, checked as far as that goes without torch.

It knows files and their names; what is in the tensors is `model.py`'s business.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import struct
import tempfile
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError

# By name, since openai/whisper-large-v3 has its weights a second time: 6 GB of "model.fp32-00001-of-00002.safetensors".
_WANTED = ["*.json", "*.txt", "model.safetensors", "model-*-of-*.safetensors"]
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_INDEX = "model.safetensors.index.json"
_CONVERT = "convert it to safetensors"
# Keys of config.json that would change what the network computes.
_EXPECTED = {"quantization_config": None, "scale_embedding": False, "activation_function": "gelu"}
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
    places = read_json(folder, _INDEX).get("weight_map", {})
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ModelError(f"model file {folder / _INDEX}: its weight_map is no list of files")
    holds = {name: tensor for tensor, name in places.items()}
    for name in sorted(holds):
        if name.endswith(_PICKLED):
            raise ModelError(f"model {folder}: {name}, which its index names, is pickled and refused; {_CONVERT}")
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"model {folder}: {name!r}, which its index names, is no safetensors file beside it")
        if not (folder / name).is_file():
            raise ModelError(f"model {folder}: {name}, which holds tensor {holds[name]}, is in the index and missing")
    whole = folder / "model.safetensors"
    return [folder / name for name in sorted(holds)] or ([whole] if whole.is_file() else [])


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
    if target.exists():
        return target
    try:
        fs, root = fsspec.core.url_to_fs(uri)
        paths = [path for path in fs.ls(root, detail=False) if _is_wanted(Path(path).name)]
        if not paths:
            raise FileNotFoundError(uri)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as partial:
            folder = Path(partial) / "model"
            folder.mkdir()
            for path in paths:
                fs.get_file(path, str(folder / Path(path).name))
            _move(folder, target)
    except Exception as error:  # every store has its own errors; to the user they are one
        raise ModelError(f"model {uri!r} cannot be fetched: {type(error).__name__}: {error}") from None
    return target


def _move(folder: Path, target: Path) -> None:
    try:
        folder.replace(target)
    except OSError:
        if not target.is_dir():  # else another process was faster
            raise


def _is_wanted(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _WANTED)


def _check_folder(folder: Path, model: str) -> None:
    config = read_json(folder, "config.json")
    if (folder / "adapter_config.json").is_file() and not config:
        raise ModelError(f"model {model!r}: an adapter (LoRA) without its model; merge them and save the result")
    if config.get("model_type") != "whisper":
        found = config.get("model_type", "no config.json")
        raise ModelError(f"model {model!r}: not a Whisper checkpoint in Hugging Face layout ({found}) in {folder}")
    for key, expected in _EXPECTED.items():
        if config.get(key, expected) != expected:
            raise ModelError(f"model {model!r}: {key} {str(config[key])[:60]} in config.json is not supported")
    files = weight_files(folder)
    if not files:
        pickled = next((path for path in sorted(folder.iterdir()) if path.suffix in _PICKLED), None)
        hint = f"{pickled.name} is pickled and refused" if pickled else "pickled weights are refused"
        raise ModelError(f"model {model!r}: no model.safetensors in {folder}; {hint}, {_CONVERT}")
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
