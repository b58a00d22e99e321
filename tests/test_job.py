"""The job on a real Ray, with the fake engine: complete tables, exact, resumable, and refusals before any work."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from audio_files import tone, write_audio, write_wav
from commands import FAKE, last_json, murmur
from rich.console import Console

from pipeline import job, report
from pipeline.config import Config
from pipeline.engine import engine_config, load_engine
from pipeline.errors import (
    EXIT_FAILED,
    EXIT_OK,
    ConfigError,
    ManifestError,
    ModelError,
    OutputError,
    OutputHeldError,
    OutputMismatchError,
    StoreError,
)
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.manifest import identity, read_inputs
from pipeline.output import read_output
from pipeline.pieces import read_object
from pipeline.schema import recording_row, segment_rows, unit_from_row, word_rows
from pipeline.stitch import stitch
from pipeline.store import Store
from pipeline.transcribe import transcribe
from pipeline.types import Transcript


def rows(output: str | Path, table: str) -> list[dict[str, Any]]:
    found = pa.concat_tables(map(pq.read_table, sorted((Path(output) / table).glob("*.parquet"))))
    keys = [name for name in ("recording_id", "segment_id", "word_id") if name in found.column_names]
    return found.sort_by([(name, "ascending") for name in keys]).to_pylist()


def committed(output: str) -> dict[str, Transcript]:
    """The Transcripts that the ledger holds, by recording id."""
    out = read_output(output)
    names = Ledger.read(out.store, out.run.n_shards).winners["object"].unique().to_pylist()
    units = [unit_from_row(row) for name in names for row in read_object(out.store, name).to_pylist()]
    by_id: dict[str, list[Any]] = {}
    for unit in units:
        by_id.setdefault(unit.recording.id, []).append(unit)
    return {recording_id: stitch(of_recording) for recording_id, of_recording in by_id.items()}


def identified(transcript: Transcript) -> Transcript:
    """With the size and etag of its file, which the job notes where it reads it."""
    size, etag = identity(transcript.recording.uri)
    return replace(transcript, recording=replace(transcript.recording, size=size, etag=etag))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., report.Summary]:
    """`job.run` into one output, quietly."""
    output = str(tmp_path / "out")

    def start(inputs: Sequence[str | Path], config: Config, **more: Any) -> report.Summary:
        with open(tmp_path / "said.txt", "a") as said:
            return job.run([str(path) for path in inputs], output, config, console=Console(file=said), **more)

    return start


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "out")


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A manifest: five clips, one of them of 100 s, a slice of that, one missing file, one that is no audio."""
    folder = tmp_path / "mixed"
    write_wav(folder / "long.wav", tone(300, 100.0))
    for i in range(3):
        write_wav(folder / f"short-{i}.wav", tone(200 + 50 * i, 1.5 + i))
    (folder / "junk.wav").write_bytes(b"not audio at all" * 100)
    lines: list[dict[str, Any]] = [
        {"audio_filepath": "long.wav", "id": "long", "text": "whatever it says", "speaker": "x"},
        {"audio_filepath": "long.wav", "id": "slice", "offset": 10.5, "duration": 31.0, "language": "de"},
        *({"audio_filepath": f"short-{i}.wav", "duration": 1.5 + i} for i in range(3)),
        {"audio_filepath": "no-such-file.wav", "id": "gone"},
        {"audio_filepath": "junk.wav", "id": "junk"},
    ]
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return manifest


@pytest.mark.ray
def test_the_whole_path(
    ray_cluster: None, mixed: Path, run: Callable[..., report.Summary], output: str, fake_config: Callable[..., Config]
) -> None:
    config = fake_config(vad="none", unit_length_s=30, chunk_level="word")
    summary = run([mixed], config)
    assert summary.counts == {"inputs": 7, "ok": 5, "failed": 2, "skipped": 0, "missing": 0, "unlisted": 0}
    assert summary.exit_code == EXIT_FAILED
    assert summary.work is not None
    assert summary.work.audio_s == pytest.approx(100 + 31 + 1.5 + 2.5 + 3.5)

    found = {row["recording_id"]: row for row in rows(output, "recordings")}
    assert {key: row["error_kind"] for key, row in found.items() if row["status"] == "failed"} == {
        "gone": "not_found",
        "junk": "damaged_audio",
    }
    assert found["slice"]["language"] == "de"
    assert json.loads(found["long"]["metadata"]) == {"speaker": "x"}
    for row in found.values():
        assert row["decoded_s"] + row["skipped_s"] == row["duration_s"]
    success = json.loads((Path(output) / "_SUCCESS").read_text())
    assert success["complete"]

    # The job and the path without Ray: the same Transcripts, and so the same rows.
    run_of = read_output(output).run
    about = {"model": "demo", "model_revision": None, "options_fingerprint": run_of.fingerprint}
    engine = load_engine(engine_config(config))
    transcripts = [transcribe(r, engine, config.decode_options(), config) for r in read_inputs([str(mixed)])]
    assert committed(output) == {t.recording.id: identified(t) for t in transcripts}
    assert found == {t.recording.id: recording_row(t, **about) for t in transcripts}  # type: ignore[arg-type]
    transcripts.sort(key=lambda t: t.recording.id)
    assert len(rows(output, "segments")) == sum(len(list(segment_rows(t))) for t in transcripts)
    assert rows(output, "words")[-1]["word"] == list(word_rows(transcripts[-1]))[-1]["word"]
    assert len(rows(output, "words")) == sum(t.n_words for t in transcripts)

    # The same again: nothing to do, failed rows wait for a retry.
    again = run([mixed], config)
    assert again.work is None
    assert again.counts == summary.counts
    assert rows(output, "recordings") == sorted(found.values(), key=lambda row: row["recording_id"])

    # One failed file appears: a retry redoes the failed ones and nothing else.
    write_wav(mixed.parent / "no-such-file.wav", tone(440, 2.0))
    retried = run([], config, retry=True)
    assert retried.work is not None
    assert (retried.work.recordings, retried.work.audio_s) == (2, 2.0)
    assert (retried.counts["ok"], retried.counts["failed"]) == (6, 1)
    assert {row["recording_id"]: row for row in rows(output, "recordings")}["gone"]["status"] == "ok"

    # The list shrinks and grows.
    extra = write_wav(mixed.parent / "extra" / "new.wav", tone(500, 1.0))
    grown = run(
        [extra.parent, mixed.parent / "short-0.wav"],
        fake_config(vad="none", unit_length_s=30, chunk_level="word", max_failed_fraction=1.0),
    )
    assert grown.work is not None
    assert grown.work.recordings == 1
    assert grown.counts == {"inputs": 2, "ok": 2, "failed": 0, "skipped": 0, "missing": 0, "unlisted": 6}
    assert grown.exit_code == EXIT_OK


@pytest.mark.ray
def test_shards_parquet_and_a_shuffled_list_that_grew_and_shrank(
    ray_cluster: None, run: Callable[..., report.Summary], output: str, fake_config: Callable[..., Config],
    tmp_path: Path,
) -> None:  # fmt: skip
    clips = [write_wav(tmp_path / f"{i:02}.wav", tone(200 + 20 * i, 0.5)) for i in range(25)]
    for name, mode in (("a.tar", "w"), ("b.tar.gz", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as tar:
            for clip in clips[:3]:
                tar.add(clip, clip.name)
    cells = [{"bytes": clip.read_bytes(), "path": clip.stem} for clip in clips[:3]]
    pq.write_table(pa.table({"audio": cells, "text": ["a", "b", "c"]}), tmp_path / "c.parquet")
    manifest = tmp_path / "list.jsonl"

    def transcribe_all(files: Sequence[Path]) -> report.Summary:
        manifest.write_text("".join(json.dumps({"uri": str(file)}) + "\n" for file in files))
        return run([manifest, tmp_path / "a.tar", tmp_path / "b.tar.gz", tmp_path / "c.parquet"], config)

    config = fake_config(vad="none")
    first = transcribe_all(clips[:15])
    assert (first.counts["ok"], first.counts["inputs"]) == (24, 24)
    found = {row["recording_id"]: row for row in rows(output, "recordings")}
    ids = {f"{tmp_path}/{shard}/{clip.name}" for shard in ("a.tar", "b.tar.gz") for clip in clips[:3]}
    assert found.keys() == ids | {"00", "01", "02"} | set(map(str, clips[:15]))
    assert {row["duration_s"] for row in found.values()} == {0.5}
    assert (found["01"]["uri"], found["01"]["reference"]) == (f"parquet://2/audio::{tmp_path}/c.parquet", "b")

    again = transcribe_all(clips[24:9:-1] + clips[5:10])  # shuffled, ten more, five fewer
    assert again.work is not None
    assert again.work.recordings == 10
    assert again.counts == {"inputs": 29, "ok": 29, "failed": 0, "skipped": 0, "missing": 0, "unlisted": 5}
    assert len(rows(output, "recordings")) == 34


@pytest.mark.ray
def test_channels_apart_are_what_they_are_without_ray(
    ray_cluster: None, run: Callable[..., report.Summary], output: str, fake_config: Callable[..., Config],
    tmp_path: Path,
) -> None:  # fmt: skip
    folder = tmp_path / "in"
    write_wav(folder / "two.wav", np.stack([tone(300, 70.0), tone(400, 70.0)]))
    write_wav(folder / "one.wav", tone(300, 3.0))
    write_audio(folder / "six.wav", np.stack([tone(200 + 50 * i, 2.0) for i in range(6)]), layout="5.1")
    write_audio(folder / "many.wav", np.zeros((16, 16_000), np.int16), layout="hexadecagonal")
    config = fake_config(vad="none", unit_length_s=30, channels="split", chunk_level="word")
    summary = run([folder], config)
    assert (summary.counts["ok"], summary.counts["failed"], summary.audio_s) == (3, 1, 75.0)
    engine = load_engine(engine_config(config))
    transcripts = [transcribe(r, engine, config.decode_options(), config) for r in read_inputs([str(folder)])]
    assert committed(output) == {t.recording.id: identified(t) for t in transcripts}
    channels: dict[str, set[int]] = {}
    for row in rows(output, "segments"):
        channels.setdefault(Path(row["recording_id"]).stem, set()).add(row["channel"])
    assert channels == {"one": {0}, "two": {0, 1}, "six": set(range(6))}
    assert {row["channel"] for row in rows(output, "words")} == set(range(6))
    failed = [row["error_kind"] for row in rows(output, "recordings") if row["status"] == "failed"]
    assert failed == ["too_many_channels"]


@pytest.mark.ray
def test_faults_cost_what_they_hit(
    ray_cluster: None, corpus: Callable[[int], Path], run: Callable[..., report.Summary], output: str,
    fake_config: Callable[..., Config],
) -> None:  # fmt: skip
    folder = corpus(8)
    faults = [
        {"match": "*clip-000*", "stage": "engine", "kind": "oom"},
        {"match": "*clip-001*", "stage": "engine", "kind": "nan"},
        {"match": "*clip-002*", "stage": "decode", "kind": "empty", "times": 1},
        {"match": "*clip-003*", "stage": "engine", "kind": "exit", "times": 1},  # ends its process: done again
        {"match": "*clip-004*", "stage": "decode", "kind": "exit", "times": 1},
        {"match": "*clip-005*", "stage": "engine", "kind": "text", "text": "as told"},
        {"match": "*clip-006*", "stage": "engine", "kind": "hang", "text": "0.5"},
    ]
    config = fake_config(vad="none", fake__faults=faults)
    summary = run([folder], config)
    assert (summary.counts["ok"], summary.counts["failed"], summary.counts["missing"]) == (5, 3, 0)
    found = {Path(row["recording_id"]).stem: row for row in rows(output, "recordings")}
    kinds = {name: row["error_kind"] for name, row in found.items()}
    assert kinds == dict.fromkeys(found) | {
        "clip-000": "engine_memory",
        "clip-001": "non_finite",
        "clip-002": "empty_audio",
    }
    assert found["clip-005"]["text"] == "as told"
    assert found["clip-000"]["skipped_s"] == found["clip-000"]["duration_s"] == 1.0

    retried = run([], config, retry=True)  # one of the three was to fail once only
    assert (retried.counts["ok"], retried.counts["failed"]) == (6, 2)


@pytest.mark.ray
def test_a_store_that_refuses_ends_the_run_and_marks_nothing(
    ray_cluster: None, corpus: Callable[[int], Path], run: Callable[..., report.Summary], output: str,
    fake_config: Callable[..., Config],
) -> None:  # fmt: skip
    folder = corpus(3)
    config = fake_config(
        vad="none", fake__faults=[{"match": "*clip-001*", "stage": "sink", "kind": "raise", "times": 1}]
    )
    with pytest.raises(StoreError, match="injected raise"):
        run([folder], config)
    out = read_output(output)
    assert "failed" not in Ledger.read(out.store, out.run.n_shards).recordings()["status"].to_pylist()
    assert run([folder], config).counts["ok"] == 3  # resumable


@pytest.mark.ray
def test_an_engine_that_cannot_be_loaded_ends_the_run_in_one_line(
    ray_cluster: None, corpus: Callable[[int], Path], run: Callable[..., report.Summary],
    fake_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    config = fake_config(engine="local", vad="none", device="cpu")
    broken = tmp_path / "model"
    monkeypatch.setattr(job, "identify", lambda config, cluster: ("whatever", None))  # seen nothing wrong
    with pytest.raises(ModelError, match="no such folder") as caught:
        run([corpus(1)], config.model_copy(update={"model": str(broken)}))
    assert "\n" not in str(caught.value)


def test_refused_before_anything_is_started(
    run: Callable[..., report.Summary], output: str, fake_config: Callable[..., Config], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def no_ray(self: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(job.Cluster, "_connect", no_ray)
    clip = write_wav(tmp_path / "a.wav", tone(300, 1.0))
    twice = tmp_path / "twice.jsonl"
    twice.write_text('{"audio_filepath": "a.wav"}\n\n{"audio_filepath": "a.wav"}\n')
    config = fake_config()
    with pytest.raises(ManifestError, match=r"twice\.jsonl:1 and .*twice\.jsonl:3"):
        run([twice], config)
    with pytest.raises(ManifestError):
        run([tmp_path / "missing.jsonl"], config)
    with pytest.raises(ModelError, match="no such folder"):
        run([clip], fake_config(engine="local", model="/no/such/model"))
    with pytest.raises(ConfigError, match=r"'xx' is not one of the model's: .* en "):
        run([clip], fake_config(engine="local", language="xx", device="cpu"))
    assert not Path(output).exists()  # nothing was written until here
    with pytest.raises(OutputError):
        job.run([str(clip)], str(clip / "out"), config)


def test_an_empty_manifest_makes_complete_tables_of_nothing(
    run: Callable[..., report.Summary], output: str, fake_config: Callable[..., Config], tmp_path: Path
) -> None:
    manifest = tmp_path / "empty.jsonl"
    manifest.write_text("")
    summary = run([manifest], fake_config())
    assert (summary.exit_code, summary.work, summary.counts["inputs"]) == (EXIT_OK, None, 0)
    assert [rows(output, table) for table in ("recordings", "segments", "words")] == [[], [], []]
    assert json.loads((Path(output) / "_SUCCESS").read_text())["complete"]


def test_another_configuration_and_another_driver_are_refused(
    run: Callable[..., report.Summary], output: str, fake_config: Callable[..., Config], tmp_path: Path
) -> None:
    manifest = tmp_path / "empty.jsonl"
    manifest.write_text("")
    run([manifest], fake_config())
    with pytest.raises(OutputMismatchError, match=r"temperature: 0\.0 there, 0\.5 here"):
        run([manifest], fake_config(temperature=0.5))
    run([manifest], fake_config(pool__engines=2, max_failed_fraction=0.5))  # these change no result
    with Lease.acquire(Store.at(output)), pytest.raises(OutputHeldError):
        run([manifest], fake_config())


def test_a_dry_run_writes_nothing(
    output: str, fake_config: Callable[..., Config], tmp_path: Path, corpus: Callable[[int], Path]
) -> None:
    found = job.estimate([str(corpus(3))], output, fake_config())
    assert (found.inputs, found.missing, found.unknown) == (3, 3, 0)
    assert found.guessed_s == pytest.approx(1.0 + 1.1 + 1.2, abs=0.02)
    assert not Path(output).exists()


@pytest.mark.ray
def test_manifest_audio_and_output_on_s3(s3: str, tmp_path: Path) -> None:
    """A process of its own: the workers of a cluster inherit the address of the store with the environment."""
    import fsspec

    fs = fsspec.filesystem("s3")
    lines = []
    for i in range(3):
        clip = write_wav(tmp_path / f"clip-{i}.wav", tone(300 + 40 * i, 2.0))
        fs.put_file(str(clip), f"{s3}/audio/clip-{i}.wav")
        lines.append(json.dumps({"audio_filepath": f"../audio/clip-{i}.wav", "id": f"clip-{i}"}))
    fs.pipe_file(f"{s3}/lists/manifest.jsonl", "\n".join(lines).encode())
    done = murmur("transcribe", f"{s3}/lists/manifest.jsonl", "--output", f"{s3}/out", *FAKE, "--json")
    assert done.returncode == EXIT_OK, done.stderr
    assert (last_json(done)["ok"], last_json(done)["audio_s"]) == (3, 6.0)
    with fs.open(fs.glob(f"{s3}/out/recordings/*.parquet")[0]) as file:
        assert [row["recording_id"] for row in pq.read_table(file).sort_by("recording_id").to_pylist()] == [
            "clip-0",
            "clip-1",
            "clip-2",
        ]
