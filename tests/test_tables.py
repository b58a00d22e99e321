"""The tables read back are the transcripts that they were made of."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from commits import begin, failed, ok, put, segment, unreadable

from pipeline.errors import OutputError, StoreError
from pipeline.finalize import finalize
from pipeline.output import SUCCESS, Output, write_inputs
from pipeline.stitch import stitch
from pipeline.store import Store
from pipeline.tables import open_tables
from pipeline.types import Recording, Transcript, UnitResult

SEGMENTS = (
    segment(" Hello there.", 0.0, words=True, avg_logprob=-0.3, flags=("low_confidence",)),
    segment("你好", 2.0, words=True, language="zh"),
    segment("吗？", 4.0, words=True, language="zh", channel=1),
    segment("  two  blanks", 6.0, words=True),
)
RESULTS = [
    ok("talk", segments=SEGMENTS, flags=("channels_changed",)),
    ok("slice", recording=Recording("slice", "s3://b/x.wav", offset=32_001, reference="r", metadata='{"k": 1}')),
    ok("silence", segments=(), speech=None, uncovered_speech=None, language=None, language_probability=None),
    failed("broken"),
    unreadable("nothing"),
    ok("Größe/日本語 🎧\n\t\"'\x00", text=" x"),
]


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return begin(Store.at(str(tmp_path / "out")), settings={"chunk_level": "word"})


def finished(output: Output, *results: UnitResult) -> Output:
    put(output.store, *results)
    write_inputs(output.store, [result.recording for result in results])
    finalize(output, use_ray=False)
    return output


def kept(transcript: Transcript) -> Transcript:
    """What of a transcript the tables hold: no raw first blank, no counts of the engine."""
    recording = transcript.recording
    own = Recording(
        recording.id, recording.uri, offset=recording.offset or 0, reference=recording.reference,
        metadata=recording.metadata,
    )  # fmt: skip
    segments = [
        dataclasses.replace(one, words=tuple(dataclasses.replace(word, word=word.word.strip()) for word in one.words))
        for one in transcript.segments
    ]
    attempts = transcript.failure.attempts if transcript.failure else transcript.attempts
    if segments:
        segments[0] = dataclasses.replace(segments[0], text=segments[0].text.lstrip())
    return dataclasses.replace(
        transcript, recording=own, segments=tuple(segments), skipped=(), n_windows=0, attempts=attempts
    )


def test_every_recording_comes_back(output: Output) -> None:
    tables = open_tables(finished(output, *RESULTS))
    found = {one.recording.id: one for one in tables.transcripts(words=True, tokens=True)}
    assert found == {result.recording.id: kept(stitch([result])) for result in RESULTS}
    assert sorted(tables.column("recording_id")) == sorted(found)
    assert found["talk"].text == "Hello there.你好吗？  two  blanks"


def test_what_is_not_asked_for_is_not_read(output: Output) -> None:
    tables = open_tables(finished(output, *RESULTS))
    (talk,) = [one for one in tables.transcripts(words=False, tokens=False) if one.recording.id == "talk"]
    assert all(one.words == one.tokens == () for one in talk.segments)


def test_more_rows_than_a_batch(output: Output) -> None:
    many = tuple(segment(f" s{n}", n * 1.0) for n in range(2500))
    tables = open_tables(finished(output, ok("a", segments=many), ok("b"), ok("c", segments=many[:1])))
    assert {one.recording.id: len(one.segments) for one in tables.transcripts(words=True, tokens=False)} == {
        "a": 2500, "b": 1, "c": 1,
    }  # fmt: skip


def test_what_is_not_finished_is_refused(output: Output) -> None:
    with pytest.raises(OutputError, match="has no tables yet: run `murmur finalize"):
        open_tables(output)
    put(output.store, ok("a"))
    write_inputs(output.store, [Recording(name, name) for name in "abc"])
    finalize(output, use_ray=False)
    with pytest.raises(OutputError, match=r"is not complete, 2 recordings are missing.*--partial"):
        open_tables(output)
    partial = open_tables(output, partial=True)
    assert [one.recording.id for one in partial.transcripts(words=True, tokens=False)] == ["a"]


def test_a_finalize_that_was_killed_is_named(output: Output) -> None:
    finished(output, *RESULTS)
    raw = (output.store.get(SUCCESS) or b"").replace(b'"rewriting": []', b'"rewriting": [1]')
    output.store.put(SUCCESS, raw)
    for partial in (False, True):
        with pytest.raises(OutputError, match="being rewritten; run `murmur finalize"):
            open_tables(output, partial=partial)


def test_damaged_tables_are_named(output: Output) -> None:
    tables = open_tables(finished(output, *RESULTS))
    path = next(path for path in tables.success.files if path.startswith("segments/"))
    whole = output.store.get(path) or b""
    output.store.put(path, whole[: len(whole) // 2])
    with pytest.raises(StoreError, match=f"{path} is damaged .*murmur verify"):
        list(tables.transcripts(words=False, tokens=False))


def test_tables_that_do_not_fit_together_are_named(tmp_path: Path) -> None:
    """A file of another output in the place of ours."""
    ours = finished(begin(Store.at(str(tmp_path / "ours")), n_shards=1), ok("a"), ok("b"))
    for name, result in (("fewer", ok("a")), ("others", ok("b", segments=(segment(" x"), segment(" y"))))):
        other = finished(begin(Store.at(str(tmp_path / name)), n_shards=1), result)
        ours.store.put("segments/part-00000-of-00001.parquet", other.store.get("segments/part-00000-of-00001.parquet"))
        with pytest.raises(StoreError, match=r"'a' has 0 segments of 1|'b' has 0 segments of 1"):
            list(open_tables(ours).transcripts(words=False, tokens=False))


def test_tables_that_are_replaced_while_they_are_read(output: Output) -> None:
    reading = open_tables(finished(output, *RESULTS)).transcripts(words=False, tokens=False)
    next(reading)
    finished(output, ok("new"))
    with pytest.raises(StoreError, match="were replaced while they were read"):
        list(reading)
