"""The README's query and the option select the same segments, also at the edge of every threshold."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from commits import begin, failed, ok, put, segment

from pipeline.export import read_rows
from pipeline.finalize import finalize
from pipeline.output import Output, write_inputs
from pipeline.selection import ANY, TRAINING, Selection, single
from pipeline.store import Store
from pipeline.tables import open_tables
from pipeline.types import SAMPLE_RATE, Segment, Transcript

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def around(value: float) -> list[float]:
    """The float32 next to `value`, and its neighbours, as they are read back."""
    here = np.float32(value)
    return [single(near) for near in (np.nextafter(here, np.float32(-9)), here, np.nextafter(here, np.float32(9)))]


def edges() -> list[Segment]:
    found = [segment(" fine")]
    for column, value in (("avg_logprob", -0.7), ("compression_ratio", 2.4), ("no_speech_prob", 0.6)):
        found += [segment(f" {column}", **{column: near}) for near in around(value)]
    found += [segment(f" length {length}", end=length) for length in (0.0, 0.499, 0.5, 30.0, 30.001)]
    found += [segment(" flagged", flags=flags) for flags in (("repetition",), ("a", "invented_on_silence"), ("b",))]
    return found


@pytest.fixture
def output(tmp_path: Path) -> Output:
    output = begin(Store.at(str(tmp_path / "out")))
    results = [
        ok("edges", segments=tuple(edges())),
        ok("no vad", speech=None, uncovered_speech=None),
        ok("covered", speech=10 * SAMPLE_RATE, uncovered_speech=SAMPLE_RATE),
        ok("uncovered", speech=10 * SAMPLE_RATE, uncovered_speech=SAMPLE_RATE + 1),
        ok("mismatch", flags=("x", "language_mismatch")),
        ok("flagged", flags=("truncated_audio",)),
        ok("half", 0, last=False), failed("half", 1),
        ok("silence", segments=()),
    ]  # fmt: skip
    put(output.store, *results)
    write_inputs(output.store, [result.recording for result in results if result.is_last])
    finalize(output, use_ray=False)
    return output


def chosen(output: Output, selection: Selection) -> set[tuple[str, int]]:
    every = open_tables(output).transcripts(words=False, tokens=False)
    return {
        (one.recording.id, number) for one in every if one.status == "ok" for number in selection.keep(one, Counter())
    }


def test_the_query_and_the_option_select_the_same(
    output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (query,) = re.findall(r"```sql\n-- training\n(.*?)```", README, re.DOTALL)
    duckdb.sql(query)
    by_query = {(row["recording_id"], row["segment_id"]) for row in pq.read_table("keep.parquet").to_pylist()}
    by_option = chosen(output, TRAINING)
    assert by_query == by_option
    assert {name for name, _ in by_option} == {"edges", "no vad", "covered", "flagged"}
    assert len(by_option) == 1 + 3 * 2 + 2 + 1 + 3  # both sides of every edge were tried
    assert chosen(output, Selection(rows=read_rows("keep.parquet"))) == by_query


def test_each_criterion_alone() -> None:
    every = Transcript(ok("a").recording, "ok", tuple(edges()), flags=("x",))

    def n(**criteria: object) -> int:
        return len(Selection(**criteria).keep(every, Counter()))  # type: ignore[arg-type]

    total = len(every.segments)
    assert n() == total
    assert n(min_avg_logprob=-0.7) == n(max_compression_ratio=2.4) == n(max_no_speech_prob=0.6) == total - 1
    assert (n(min_duration_s=0.5), n(max_duration_s=30)) == (total - 2, total - 1)
    assert (n(languages=("en",)), n(languages=("de", "en")), n(languages=("de",))) == (total, total, 0)
    assert (n(exclude_flags=("repetition",)), n(exclude_flags=(ANY,)), n(exclude_flags=("c",))) == (
        total - 1, total - 3, total,
    )  # fmt: skip
    assert (n(exclude_recording_flags=("x",)), n(exclude_recording_flags=("y",))) == (0, total)
    assert n(rows={"a": np.array([0, 5])}) == 2
    assert (n(rows={"a": None}), n(rows={"b": None})) == (total, 0)


def test_what_is_left_out_is_counted() -> None:
    left_out: Counter[str] = Counter()
    TRAINING.keep(Transcript(ok("a").recording, "ok", tuple(edges())), left_out)
    assert left_out == {
        "min_avg_logprob": 1, "max_compression_ratio": 1, "max_no_speech_prob": 1, "min_duration_s": 2,
        "max_duration_s": 1, "exclude_flags": 2,
    }  # fmt: skip


def test_single() -> None:
    assert [single(value) for value in (0.1, -0.7, 2.4, 1 / 3)] == [0.1, -0.7, 2.4, 0.33333334]
