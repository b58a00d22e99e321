"""Real checkpoints on public test sets, on a machine with network: our WER and RTFx beside the published ones.

    pip install -e '.[dev]' -c configs/constraints.txt
    python -m tests.benchmarks.acceptance --work FOLDER --out FILE                  [--config FILE] [--set KEY=VALUE]
    python -m tests.benchmarks.acceptance --work FOLDER --out FILE --against OLD    # and not worse than that run was
    python -m tests.benchmarks.acceptance --work FOLDER --sets fleurs-de --models openai/whisper-large-v3-turbo

For each model and set: fetch the set once (`FOLDER/sets/`, Parquet with the audio in it, which is an INPUT of ours),
`murmur transcribe`, `murmur evaluate --json`. Stopped, it goes on where it was. 10 GB of disk; large-v3-turbo wants a
GPU. Ends with 1, and says what and by how much, where

- a recording failed, or is missing;
- a WER is more than `ALLOWED` points above the published figure (normalisers and cuts differ a little from one
  evaluation to the next), or, with `--against`, more than `NOISE` points above that run's;
- with `--against` on the same processor, a RTFx is below `SLOWER` of that run's.

Published figures: the model card of openai/whisper-base for LibriSpeech; the Open ASR leaderboard for large-v3-turbo
(short-form, long-form and multilingual tables; its RTFx are of an H200, without reading and decoding audio, ours are of
the whole job on the machine at hand). None means that we know of no published figure that can be checked.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks.machine import machine

ALLOWED, NOISE, SLOWER = 0.5, 0.2, 0.9
BASE, TURBO = "openai/whisper-base", "openai/whisper-large-v3-turbo"
MODELS = (BASE, TURBO)
_ROWS = 64  # of a set in memory at once: talks of 20 minutes are 40 MB each


@dataclass(frozen=True, slots=True)
class Published:
    """Percent, and seconds of audio a second, where they are known."""

    wer: float | None = None
    rtfx: float | None = None


@dataclass(frozen=True, slots=True)
class Corpus:
    """A set of recordings with references: Parquet files, one recording a row."""

    name: str
    files: str  # any that fsspec opens
    text: str  # the column of the reference
    language: str
    published: dict[str, Published]
    settings: tuple[str, ...] = ()  # KEY=VALUE


_FLEURS = "hf://datasets/google/fleurs@refs/convert/parquet/{}/test/*.parquet"
_TEDLIUM = "hf://datasets/distil-whisper/tedlium-long-form/data/test-*.parquet"
SETS = (
    Corpus(
        "librispeech-test-clean", "hf://datasets/openslr/librispeech_asr/all/test.clean/*.parquet", "text", "en",
        {BASE: Published(5.01), TURBO: Published(2.10, 200.2)},
    ),
    Corpus("tedlium-long-form", _TEDLIUM, "text", "en", {TURBO: Published(3.23, 148.3)}),
    Corpus(
        "tedlium-long-form-sequential", _TEDLIUM, "text", "en", {TURBO: Published(3.23, 148.3)},
        settings=("algorithm=sequential",),
    ),
    Corpus("fleurs-de", _FLEURS.format("de_de"), "raw_transcription", "de", {TURBO: Published(3.78, 176.2)}),
    Corpus("fleurs-es", _FLEURS.format("es_419"), "raw_transcription", "es", {TURBO: Published(2.70, 176.2)}),
    Corpus("fleurs-fr", _FLEURS.format("fr_fr"), "raw_transcription", "fr", {TURBO: Published(5.04, 176.2)}),
)  # fmt: skip

_COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("audio", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("text", pa.string()),
        ("language", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Result:
    """What one model did on one set, beside what is published."""

    model: str
    test_set: str
    recordings: int
    failed: int
    missing: int
    audio_s: float
    wer: float  # percent
    interval: tuple[float, float] | None
    rtfx: float | None  # None where an earlier run did all of it
    published: Published

    @property
    def key(self) -> tuple[str, str]:
        return self.model, self.test_set

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Result:
        interval = row["interval"] and (row["interval"][0], row["interval"][1])
        return cls(**{**row, "interval": interval, "published": Published(**row["published"])})


def fetch(test_set: Corpus, folder: Path) -> Path:
    """The set as Parquet of ours; fetched once, whole or not at all.

    Raises `FileNotFoundError` where nothing is at its address, `KeyError` where a column is not.
    """
    file = folder / f"{test_set.name}.parquet"
    if file.exists():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    begun = file.with_suffix(".begun")
    with pq.ParquetWriter(begun, _COLUMNS) as writer:
        for table in _rows(test_set):
            writer.write_table(table)
    begun.rename(file)
    return file


def _rows(test_set: Corpus) -> Iterator[pa.Table]:
    files = fsspec.open_files(test_set.files, "rb")
    if not files:
        raise FileNotFoundError(f"{test_set.name}: nothing at {test_set.files}")
    n = 0
    for file in files:
        with file as source:
            parquet = pq.ParquetFile(source)
            missing = {"audio", test_set.text}.difference(parquet.schema_arrow.names)
            if missing:
                raise KeyError(f"{test_set.name}: {file.path} has no column {', '.join(sorted(missing))}")
            for batch in parquet.iter_batches(_ROWS, columns=["audio", test_set.text]):
                rows = [
                    {"id": f"{test_set.name}-{n + i:06}", "audio": row["audio"], "text": row[test_set.text],
                     "language": test_set.language}
                    for i, row in enumerate(batch.to_pylist())
                ]  # fmt: skip
                n += len(rows)
                yield pa.Table.from_pylist(rows, schema=_COLUMNS)


def measure(model: str, test_set: Corpus, work: Path, options: Sequence[str] = ()) -> Result:
    """Transcribe and evaluate; an output that is there goes on. Raises `CalledProcessError` with what was said."""
    output = work / "outputs" / f"{test_set.name}--{model.replace('/', '--')}"
    settings = [part for one in test_set.settings for part in ("--set", one)]
    inputs = fetch(test_set, work / "sets")
    done = _murmur("transcribe", inputs, "--output", output, "--model", model, *settings, *options, codes=(0, 3))
    found = _murmur("evaluate", output, "--worst", "0")
    run = done["this_run"] or {}
    return Result(
        model=model,
        test_set=test_set.name,
        recordings=done["inputs"],
        failed=done["failed"],
        missing=done["missing"],
        audio_s=done["audio_s"],
        wer=round(100 * found["wer"], 3),
        interval=found["wer_interval"] and tuple(round(100 * edge, 3) for edge in found["wer_interval"]),
        rtfx=run.get("rtfx"),
        published=test_set.published.get(model, Published()),
    )


def _murmur(*arguments: str | Path, codes: Sequence[int] = (0,)) -> dict[str, Any]:
    command = [sys.executable, "-m", "pipeline.cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in codes:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def complaints(results: Sequence[Result], earlier: Sequence[Result] = (), same_machine: bool = False) -> list[str]:
    """What is worse than it may be, a line each."""
    before = {one.key: one for one in earlier}
    found = []
    for one in results:
        name = f"{one.model} on {one.test_set}"
        if one.failed or one.missing:
            found.append(f"{name}: {one.failed} failed and {one.missing} missing of {one.recordings} recordings")
        published, old = one.published.wer, before.get(one.key)
        if published is not None and one.wer > published + ALLOWED:
            found.append(f"{name}: WER {one.wer:.2f} %, published {published:.2f} %, allowed {ALLOWED} points more")
        if old is not None and one.wer > old.wer + NOISE:
            found.append(f"{name}: WER {one.wer:.2f} %, before {old.wer:.2f} %, allowed {NOISE} points more")
        if old is not None and same_machine and one.rtfx and old.rtfx and one.rtfx < SLOWER * old.rtfx:
            found.append(f"{name}: RTFx {one.rtfx:.1f}, before {old.rtfx:.1f}, allowed {SLOWER} of it")
    return found


def table(results: Sequence[Result]) -> str:
    lines = ["| model | set | hours | WER, 95 % interval | published | RTFx | published, on an H200 |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for one in results:
        interval = f" ({one.interval[0]:.2f} to {one.interval[1]:.2f})" if one.interval else ""
        wer = "" if one.published.wer is None else f"{one.published.wer:.2f} %"
        rtfx, their_rtfx = (f"{value:.1f}" if value else "" for value in (one.rtfx, one.published.rtfx))
        lines.append(
            f"| {one.model} | {one.test_set} | {one.audio_s / 3600:.2f} | {one.wer:.2f} %{interval} | {wer} | {rtfx}"
            f" | {their_rtfx} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, sets: Sequence[Corpus] = SETS) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for sets and outputs")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--sets", default=",".join(one.name for one in sets))
    parser.add_argument("--config", help="a settings file for murmur transcribe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--against", type=Path, metavar="FILE", help="an earlier result")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    known = {one.name: one for one in sets}
    if unknown := set(given.sets.split(",")) - known.keys():
        parser.error(f"--sets: no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    options = [*(("--config", given.config) if given.config else ()), *(f"--set={one}" for one in given.set)]
    here, results = machine(), []
    for name in given.sets.split(","):
        for model in given.models.split(","):
            results.append(measure(model, known[name], given.work, options))
            print(table(results[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    old = json.loads(given.against.read_text()) if given.against else {"results": [], "machine": {}}
    same_machine = old["machine"].get("processor") == here["processor"]
    found = complaints(results, [Result.from_json(row) for row in old["results"]], same_machine)
    report = {"benchmark": "acceptance", "results": [one.to_json() for one in results], "complaints": found}
    report["machine"] = here
    if given.out is not None:
        given.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(results), *found, sep="\n", file=sys.stderr)
    print(json.dumps(report))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
