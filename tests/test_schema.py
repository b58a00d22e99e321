"""Rows are typed whatever is in them, and give back what they were made of."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commits import failed, ok, segment, table, unreadable

from pipeline import schema
from pipeline.schema import (
    UNITS,
    conform,
    recording_row,
    segment_rows,
    shard_of,
    to_table,
    unit_from_row,
    unit_row,
    word_rows,
)
from pipeline.stitch import stitch
from pipeline.types import SAMPLE_RATE, Failure, Recording, Skip, Transcript, UnitResult

RESULTS = [
    ok("plain"),
    ok("no segments", segments=(), skipped=(), language=None, language_probability=None),
    ok("no vad", speech=None, uncovered_speech=None, flags=("truncated_audio", "sequential_restart")),
    failed("failed", index=3, last=False),
    unreadable("nothing decodable"),
    ok("Größe/日本語 🎧\n\t\"'\x00", text=" ¿Qué? — „ja“ 漢字 🎧\x00 <b>&amp;"),
    ok("words", segments=(segment(" eins zwei", words=True, flags=("low_confidence",), channel=1), segment(""))),
    UnitResult(Recording("bare", "bare.wav"), index=0, is_last=True, start=0, n_samples=2**40),  # past int32
    ok(
        "full",
        recording=Recording(
            id="full",
            uri="s3://b/full.flac",
            source="m.jsonl:7",
            size=2**40,
            etag='"abc"',
            duration_s=1.1,
            offset=3,
            length=2**33,
            reference=" a  reference ",
            language="de",
            task="translate",
            initial_prompt="p",
            metadata='{"k": 1}',
        ),
    ),
]


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: result.recording.id[:12])
def test_a_unit_row_gives_back_its_result(result: UnitResult) -> None:
    assert unit_from_row(unit_row(result)) == result
    written = io.BytesIO()
    pq.write_table(table([result]), written)
    (row,) = pq.read_table(written).to_pylist()
    assert unit_from_row(row) == result


def test_every_field_has_its_column() -> None:
    """A field added to a type must be added to the schema, else it would be lost on the way."""
    assert {f.name for f in dataclasses.fields(UnitResult)} | {"recording_id"} == set(UNITS.names)
    structs = {Recording: "recording", Failure: "failure", Skip: "skipped"}
    for kind, column in structs.items():
        of = UNITS.field(column).type
        of = of.value_type if pa.types.is_list(of) else of
        assert [f.name for f in dataclasses.fields(kind)] == [field.name for field in of]


def test_secrets_of_a_uri_are_not_committed() -> None:
    signed = Recording("a", "https://user:pw@host/a.wav?X-Amz-Signature=abc&part=2")
    row = unit_row(ok("a", recording=signed))
    assert "pw" not in str(row)
    assert "Signature" not in str(row)
    assert unit_row(unit_from_row(row)) == row  # what is public stays as it is


def test_a_block_of_nulls_and_empty_lists_is_typed() -> None:
    nulls = table([ok("a", segments=(), skipped=(), language=None, language_probability=None, speech=None)])
    assert nulls.schema.equals(UNITS)
    both = pa.concat_tables([nulls, table([ok("b")])])  # would fail on a `null` or `list<null>` column
    assert both.num_rows == 2
    assert to_table([], UNITS).schema.equals(UNITS)


def test_none_stays_null_and_never_becomes_nan() -> None:
    (row,) = table([ok("a", language=None, language_probability=None)]).to_pylist()
    assert row["language_probability"] is None


def test_a_guessed_table_is_brought_to_the_schema() -> None:
    """Rows that lost their types on the way (int64 for int32, null for float64) are what they were."""
    results = [failed("a"), ok("b")]
    guessed = pa.Table.from_pylist([unit_row(result) for result in results])
    assert not guessed.schema.equals(UNITS)
    assert conform(guessed, UNITS).equals(table(results))


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        (lambda t: t.drop_columns(["speech"]), "speech"),  # a column too few
        (lambda t: t.append_column("pcm", pa.array([b"x"])), "pcm"),  # one too many
        (lambda t: t.set_column(1, "index", pa.array(["one"])), "index: string"),  # another type
        (lambda t: t.set_column(1, "index", pa.array([2**40])), "index: int64"),  # too large for it
        (lambda t: t.set_column(1, "index", pa.array([None], pa.int32())), "index"),  # a null in a key
    ],
    ids=["missing", "extra", "type", "range", "null"],
)
def test_another_schema_is_refused_with_both(wrong: object, names: str) -> None:
    with pytest.raises(TypeError, match="schema mismatch") as caught:
        conform(wrong(table([ok("a")])), UNITS)
    expected, found = str(caught.value).split("found:")
    assert "uncovered_speech: int64" in expected
    assert names in found


def test_rows_with_other_keys_are_refused() -> None:
    with pytest.raises(TypeError, match=r"found:\ncolumns .*surprise"):
        to_table([unit_row(ok("a")) | {"surprise": 1}], UNITS)


def test_text_that_is_no_unicode_costs_nobody_else() -> None:
    """A file name in Latin-1, as the system hands it over, in one row of two."""
    rows = table([ok("good"), ok("bad", text=" caf\udce9", flags=("x\udc80",))]).to_pylist()
    assert rows[0]["segments"][0]["text"] == " good unit 0."
    assert rows[1]["segments"][0]["text"] == r" caf\udce9"
    assert rows[1]["flags"] == [r"x\udc80"]


def public(transcript: Transcript) -> dict[str, object]:
    return recording_row(transcript, model="m", model_revision="r", options_fingerprint="f")


def test_public_rows() -> None:
    first = ok("r", 0, last=False, segments=(segment(" Hello, you.", words=True), segment(" two", 3.0, words=True)))
    last = ok("r", 1, text=" 日本")
    transcript = stitch([last, first])
    row = public(transcript)
    assert row["text"] == "Hello, you. two 日本"  # raw texts joined, then stripped
    assert (row["duration_s"], row["decoded_s"], row["skipped_s"]) == (20.0, 16.0, 4.0)
    assert row["skipped"] == [
        {"start": 8.0, "end": 10.0, "reason": "silence"},
        {"start": 18.0, "end": 20.0, "reason": "silence"},
    ]
    assert (row["n_segments"], row["n_words"], row["n_windows"], row["attempts"]) == (3, 3, 2, 1)
    segments = list(segment_rows(transcript))
    assert [(s["segment_id"], s["text"]) for s in segments] == [(0, "Hello, you."), (1, "two"), (2, "日本")]
    words = list(word_rows(transcript))
    assert [(w["segment_id"], w["word_id"], w["word"]) for w in words] == [
        (0, 0, "Hello,"),
        (0, 1, "you."),
        (1, 2, "two"),
    ]
    assert to_table([row], schema.RECORDINGS).schema.equals(schema.RECORDINGS)
    assert to_table(segments, schema.SEGMENTS).num_rows == 3
    assert to_table(words, schema.WORDS).num_rows == 3


def test_public_row_of_a_failed_recording() -> None:
    row = public(stitch([unreadable("r")]))
    assert (row["status"], row["error_kind"], row["error_stage"], row["attempts"]) == (
        "failed",
        "damaged_audio",
        "decode",
        2,
    )
    assert (row["duration_s"], row["text"], row["speech_s"]) == (0.0, "", None)
    to_table([row], schema.RECORDINGS)


def test_decoded_and_skipped_are_the_duration_to_the_sample() -> None:
    odd = ok("r", skipped=(Skip(1, 77_778, "silence"),), n_samples=160_001)
    row = public(stitch([odd]))
    assert row["decoded_s"] + row["skipped_s"] == pytest.approx(row["duration_s"], abs=0.5 / SAMPLE_RATE)
    assert round(row["duration_s"] * SAMPLE_RATE) == 160_001


def test_columns_of_the_public_tables() -> None:
    """The names and types that users rely on."""
    assert [f"{f.name} {f.type}" for f in schema.SEGMENTS] == [
        "recording_id string", "segment_id int32", "channel int8", "start double", "end double", "text string",
        "language string", "language_probability float", "avg_logprob float", "compression_ratio float",
        "no_speech_prob float", "temperature float", "tokens list<element: int32 not null>",
        "flags list<element: string not null>",
    ]  # fmt: skip
    assert [f"{f.name} {f.type}" for f in schema.WORDS] == [
        "recording_id string", "segment_id int32", "word_id int32", "channel int8", "start double", "end double",
        "word string", "probability float",
    ]  # fmt: skip
    assert schema.RECORDINGS.names == [
        "recording_id", "uri", "status", "language", "language_probability", "duration_s", "decoded_s", "skipped_s",
        "speech_s", "uncovered_speech_s", "skipped", "text", "n_segments", "n_words", "n_windows", "n_fallbacks",
        "flags", "error_kind", "error_message", "error_stage", "attempts", "reference", "model", "model_revision",
        "options_fingerprint", "metadata", "offset_s",
    ]  # fmt: skip
    assert [f.name for f in schema.RECORDINGS.field("skipped").type.value_type] == ["start", "end", "reason"]


def test_shards_are_fixed_and_even() -> None:
    assert [shard_of(name, 16) for name in ("a", "b", "日本", "")] == SHARDS
    counts = Counter(shard_of(f"s3://bucket/{i}.wav", 8) for i in range(8000))
    assert min(counts.values()) > 850  # 1000 each, standard deviation 30
    assert shard_of("caf\udce9", 3) in range(3)


# Files that exist were named by these: a change would publish recordings twice.
SHARDS = [15, 5, 10, 4]
