"""A run in figures: the same from data objects as from tables, exact, and no larger for more recordings."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commits import UNIT, begin, failed, many, ok, put, segment, unreadable

from pipeline import schema
from pipeline.entries import ENTRIES
from pipeline.figures import MOST_BINS, Figures, figures, longest_gap, throughput
from pipeline.finalize import finalize
from pipeline.journal import Journal
from pipeline.output import Output, write_inputs
from pipeline.store import Store
from pipeline.types import SAMPLE_RATE, Recording, Skip, Spent


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return begin(Store.at(str(tmp_path / "out")))


def spoken(name: str, uncovered_s: float = 0.0, **fields: Any) -> Any:
    """A recording of 10 s: speech from 0 to 6 s, skipped from 8 s on, text from 1 to 3 s."""
    plain: dict[str, Any] = {
        "segments": (segment(f" {name}", start=1.0),),
        "skipped": (Skip(8 * SAMPLE_RATE, UNIT, "silence"),),
        "speech": 6 * SAMPLE_RATE,
        "uncovered_speech": int(uncovered_s * SAMPLE_RATE),
    }
    return ok(name, **{**plain, **fields})


@pytest.fixture
def mixed(output: Output) -> Output:
    """Six recordings in the list, five of them ended; one more that is in the list no longer."""
    put(
        output.store,
        spoken("fine", spent=Spent(source_s=1.0, decode_s=2.0, vad_s=0.5, engine_s=4.0)),
        spoken("deaf", uncovered_s=3.0, flags=("uncovered_speech",), language="de", language_probability=0.25),
        ok("long", 0, last=False, segments=(segment(" a", temperature=0.4, flags=("low_confidence",)),)),
        ok("long", 1, n_windows=3, n_fallbacks=2, spent=Spent(engine_s=50.0)),
    )
    put(output.store, unreadable("junk"), failed("nan", kind="non_finite"), ok("begun", 0, last=False), ok("old"))
    write_inputs(
        output.store, [Recording(id=n, uri=n) for n in ("fine", "deaf", "long", "junk", "nan", "begun", "new")]
    )
    return output


def told(found: Figures) -> dict[str, Any]:
    """All but what differs from one look to the next."""
    return {name: value for name, value in dataclasses.asdict(found).items() if name not in ("made", "tables")}


def test_every_recording_is_counted_once(mixed: Output) -> None:
    found = figures(mixed)
    assert found.counts == {"inputs": 7, "ok": 3, "failed": 2, "partial": 1, "waiting": 1, "unlisted": 1}
    assert found.tables == "none"
    # Six ended: fine, deaf, long (20 s), nan, old, and junk, of which nothing was decoded.
    assert found.audio == {
        "duration_s": 60.0,
        "decoded_s": 60.0 - 5 * 2.0 - 10.0,  # 2 s of silence in each Unit that is ok; all of the failed one
        "skipped_s": 20.0,
        "speech_s": 2 * 6.0 + 4 * 5.0,
        "uncovered_speech_s": 3.0,
        "committed_s": 70.0,  # with what is begun
    }
    assert found.unaccounted == 0
    assert sum(found.durations.counts) == 6
    languages = {row["language"]: (row["recordings"], row["audio_s"], row["probability"]) for row in found.languages}
    assert languages == {"en": (3, 40.0, 0.75), "de": (1, 10.0, 0.25)}
    assert found.decoding == {"windows": 8, "fallbacks": 2, "segments_by_temperature": {"0": 4, "0.4": 1}}
    assert {name: sum(bins.counts) for name, bins in found.confidence.items()} == {
        "avg_logprob": 5, "no_speech_prob": 5, "compression_ratio": 5,
    }  # fmt: skip


def test_failures_flags_and_lists_name_recordings(mixed: Output) -> None:
    found = figures(mixed)
    kinds = {(row["kind"], row["stage"]): row for row in found.failures}
    assert kinds.keys() == {("damaged_audio", "decode"), ("non_finite", "engine")}
    assert kinds["damaged_audio", "decode"]["examples"] == [
        {"recording_id": "junk", "error_message": "no frames", "attempts": 2}
    ]
    assert {row["flag"]: (row["recordings"], row["segments"], row["examples"]) for row in found.flags} == {
        "uncovered_speech": (1, 0, ["deaf"]),
        "low_confidence": (1, 1, ["long"]),
    }
    (least,) = found.coverage
    assert (least["recording_id"], least["uncovered_speech_s"]) == ("deaf", 3.0)
    assert (least["start"], least["end"]) == (3.0, 8.0)  # between its text and what was skipped
    assert [row["recording_id"] for row in found.slowest[:2]] == ["long", "fine"]
    assert found.slowest[1]["total_s"] == pytest.approx(7.5, abs=0.1)
    assert found.stages["engine_s"] == 54.0
    assert found.stages["source_s"] == 1.0


def test_tables_and_data_objects_tell_the_same(mixed: Output) -> None:
    before = figures(mixed)
    finalize(mixed, use_ray=False)
    after = figures(mixed)
    assert told(after) == told(before)
    assert after.tables == "behind"  # one is begun and one waits


def test_what_was_committed_since_the_tables_counts_in_their_place(mixed: Output) -> None:
    finalize(mixed, use_ray=False)
    put(mixed.store, ok("nan"), ok("new"), unreadable("begun"), round=1)
    put(mixed.store, ok("begun", 1))
    mid = figures(mixed)
    assert mid.counts == {"inputs": 7, "ok": 6, "failed": 1, "partial": 0, "waiting": 0, "unlisted": 1}
    assert mid.tables == "behind"
    finalize(mixed, use_ray=False)
    end = figures(mixed)
    assert told(mid) == told(end)
    assert end.tables == "complete"


def test_an_output_in_which_nothing_happened_yet(output: Output) -> None:
    found = figures(output)
    assert found.counts == dict.fromkeys(("inputs", "ok", "failed", "partial", "waiting", "unlisted"), 0)
    assert (found.throughput, found.languages, found.failures, found.slowest) == ([], [], [], [])
    assert found.audio["speech_s"] is None


def test_a_length_that_does_not_add_up_is_counted(mixed: Output) -> None:
    finalize(mixed, use_ray=False)
    (path, *_) = sorted(Path(mixed.store.uri, "recordings").glob("*.parquet"))
    rows = pq.read_table(path).to_pylist()
    rows[0]["decoded_s"] += 1.0
    pq.write_table(schema.to_table(rows, schema.RECORDINGS), path)
    assert figures(mixed).unaccounted == 1


def test_drivers_are_named_in_order(output: Output) -> None:
    with Journal(output.store, command="transcribe"):
        pass
    assert [(one.outcome, one.said["command"]) for one in figures(output).drivers] == [("done", "transcribe")]


@pytest.mark.parametrize(
    ("taken", "gap"),
    [
        ([], (0.0, 10.0)),
        ([(0.0, 10.0)], (0.0, 0.0)),
        ([(2.0, 4.0), (5.0, 6.0)], (6.0, 10.0)),
        ([(0.0, 9.0), (1.0, 2.0)], (9.0, 10.0)),  # one within another
        ([(5.0, 6.0), (0.0, 1.0)], (1.0, 5.0)),  # in any order
    ],
)
def test_the_longest_stretch_that_nothing_covers(taken: list[tuple[float, float]], gap: tuple[float, float]) -> None:
    found = longest_gap(taken, 10.0)
    assert (found["start"], found["end"]) == gap


def committed_at(*times: float | None) -> pa.Table:
    """Winners, each 10 s of audio, committed at these times."""
    plain = {"shard": 0, "is_last": True, "ok": True, "object": "x", "round": 0, "pinned": False}
    plain |= {"data": "x", "start": 0, "stop": 1, "sha256": bytes(32)}
    rows = [{**plain, "recording_id": str(i), "index": 0, "n_samples": UNIT, "at": at} for i, at in enumerate(times)]
    return pa.Table.from_pylist(rows, schema=ENTRIES)


def test_throughput_adds_up_and_leaves_long_pauses_out() -> None:
    monday, friday = 1_000_000.0, 1_000_000.0 + 4 * 86_400
    bins = throughput(committed_at(monday, monday + 0.5, monday + 3, friday, None))
    assert [(one["start"] - monday, one["audio_s"]) for one in bins] == [
        (0, 20.0), (1, 0.0), (2, 0.0), (3, 10.0), (friday - monday, 10.0),
    ]  # fmt: skip
    assert {one["width_s"] for one in bins} == {1.0}


def test_throughput_of_a_long_run_has_wider_bins() -> None:
    bins = throughput(committed_at(*np.linspace(0, 36_000, 5_000).tolist()))
    assert len(bins) <= MOST_BINS
    assert sum(one["audio_s"] for one in bins) == 50_000.0
    assert bins[0]["width_s"] == 600.0


# ---- many


N_MANY = 50_000


def test_many_recordings_are_summed_up_not_held(tmp_path: Path) -> None:
    few, most = (many(begin(Store.at(str(tmp_path / str(n))), n_shards=1), n) for n in (400, N_MANY))

    def peak(of: Output) -> tuple[Figures, int]:
        """Bytes of Python objects at most; Arrow's own memory is not among them."""
        tracemalloc.start()
        found = figures(of)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found, held

    peak(few)  # imports
    (_, base), (found, held) = peak(few), peak(most)
    assert found.counts["unlisted"] == N_MANY
    assert [row["recordings"] for row in found.failures] == [N_MANY // 4]
    assert [(row["flag"], row["recordings"]) for row in found.flags] == [("f", N_MANY // 4)]
    assert found.audio["uncovered_speech_s"] == N_MANY // 4
    assert len(found.coverage) == len(found.slowest) == 15
    assert held - base < 100 * N_MANY  # a few numbers a row, in numpy's arrays; a dict of it would be hundreds
