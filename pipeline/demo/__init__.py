"""The bundled demo model and its clips: where they lie on disk, nothing more.

Knows nothing about audio, models or Ray, and imports none of them, so a command line may ask for a path freely.
"""

from __future__ import annotations

import json
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def model_path() -> Path:
    """The folder of the demo model, in Hugging Face layout."""
    return _HERE / "model"


def clips_path() -> Path:
    """The folder of the demo clips: audio files, `manifest.jsonl` and `references.json`."""
    return _HERE / "clips"


def sound_clips() -> dict[Path, float]:
    """The short clips in which somebody speaks and nothing is damaged, and their seconds."""
    rows = map(json.loads, (clips_path() / "manifest.jsonl").read_text(encoding="utf-8").splitlines())
    return {clips_path() / row["audio_filepath"]: row["duration"] for row in rows if row["kind"] == "clean"}
