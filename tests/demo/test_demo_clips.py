"""The bundled clips as they lie on disk."""

import json
from itertools import pairwise
from typing import Any

import av
import numpy as np
import pytest

from pipeline.demo import clips_path
from pipeline.demo.train.clips import SPECS, Spec, decode

CLIPS = clips_path()


@pytest.fixture(scope="module")
def manifest() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (CLIPS / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    return dict(json.loads((CLIPS / "references.json").read_text(encoding="utf-8")))


def test_every_file_is_listed_once(manifest: list[dict[str, Any]]) -> None:
    listed = [row["audio_filepath"] for row in manifest]
    on_disk = {path.name for path in CLIPS.iterdir()} - {"manifest.jsonl", "references.json"}
    assert len(listed) == len(set(listed))
    assert set(listed) == on_disk
    assert len({row["id"] for row in manifest}) == len(manifest)


def test_they_are_small() -> None:
    assert sum(path.stat().st_size for path in CLIPS.iterdir()) <= 5_000_000


def test_they_differ_in_format() -> None:
    assert {spec.file_name.rsplit(".", 1)[1] for spec in SPECS} == {
        "wav", "flac", "mp3", "m4a", "ogg", "opus", "webm",
    }  # fmt: skip
    assert {spec.language for spec in SPECS} == {"en", "de", "es"}
    rates = [spec.format.rate for spec in SPECS]
    assert (min(rates), max(rates)) == (8_000, 48_000)
    assert {spec.format.layout for spec in SPECS} == {"mono", "stereo"}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.clip_id)
def test_manifest_and_references_agree_with_the_audio(
    spec: Spec, manifest: list[dict[str, Any]], references: dict[str, Any]
) -> None:
    row = next(row for row in manifest if row["id"] == spec.clip_id)
    entry = references[spec.clip_id]
    assert "language" not in row
    assert row["spoken_language"] == entry["language"] == spec.language
    assert row["text"] == " ".join(sentence["text"] for sentence in entry["sentences"])
    pcm = decode(CLIPS / spec.file_name)
    assert abs(len(pcm) / 16_000 - row["duration"]) < 0.05  # lossy codecs pad
    for sentence in entry["sentences"]:
        assert sentence["text"] == " ".join(word["word"] for word in sentence["words"])
        bounds = [time for word in sentence["words"] for time in (word["start"], word["end"])]
        assert bounds == sorted(bounds)
        assert bounds[0] == sentence["start"]
        assert bounds[-1] == sentence["end"] <= row["duration"]
        assert _loudness(pcm, sentence["start"], sentence["end"]) > 10 * _loudness(pcm, 0, 0.15)


def test_the_long_one_has_a_long_pause(references: dict[str, Any]) -> None:
    sentences = references["en-long"]["sentences"]
    pauses = [after["start"] - before["end"] for before, after in pairwise(sentences)]
    assert 120 < sentences[-1]["end"] < 180
    assert 4 <= max(pauses) <= 5


def test_the_silent_one_is_quiet_but_not_zero(manifest: list[dict[str, Any]]) -> None:
    pcm = decode(CLIPS / "silence.wav")
    assert 0 < np.abs(pcm).max() < 50
    assert next(row for row in manifest if row["id"] == "silence")["text"] == ""


def test_the_damaged_one_cannot_be_opened(manifest: list[dict[str, Any]]) -> None:
    with pytest.raises(av.error.InvalidDataError):
        av.open(str(CLIPS / "damaged.m4a"))
    row = next(row for row in manifest if row["id"] == "damaged")
    assert row["expected"] == "failed"
    assert "text" not in row


def _loudness(pcm: np.ndarray, start: float, end: float) -> float:
    piece = pcm[round(start * 16_000) : round(end * 16_000)].astype(float)
    return float(np.sqrt(np.mean(piece**2)))
