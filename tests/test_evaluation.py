"""An evaluation: counts that add up, intervals that are what they say, what is left out is counted, two outputs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import last_json, murmur
from commits import begin, failed, ok, put, segment, unreadable
from rich.console import Console

from pipeline import evaluation_report
from pipeline.errors import MurmurError, UsageError
from pipeline.evaluation import evaluate, has_references, interval, length_of, resampled
from pipeline.figures import figures
from pipeline.finalize import finalize
from pipeline.output import Output, write_inputs
from pipeline.references import Reference
from pipeline.report_page import page
from pipeline.scoring import Edit, Score, pairs_in_order, words_apart
from pipeline.store import Store
from pipeline.types import Recording, UnitResult


def spoken(name: str, text: str, reference: str | None, language: str = "en", **metadata: Any) -> UnitResult:
    about = json.dumps(metadata) if metadata else None
    recording = Recording(id=name, uri=name, reference=reference, metadata=about)
    return ok(name, recording=recording, text=text, language=language)


def made(folder: Path, *results: UnitResult, **changes: Any) -> Output:
    output = begin(Store.at(str(folder)), **changes)
    put(output.store, *results)
    write_inputs(output.store, [result.recording for result in results])
    finalize(output, use_ray=False)
    return output


SCORED = [
    spoken("fine", " It is a fine day.", "it's a fine day"),
    spoken("worse", " Guten Morgen", "Guten Tag zusammen", "de"),
    spoken("more", " uno dos tres cuatro", "uno dos tres", "es", spoken_language="pt"),
    spoken("without", " No matter", None),
    failed("lost", recording=Recording(id="lost", uri="lost", reference="never heard")),
    unreadable("damaged"),
]


@pytest.fixture
def scored(tmp_path: Path) -> Output:
    return made(tmp_path / "out", *SCORED)


def shown(output: Output, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=120)
    evaluation_report.show(evaluate(output, **options), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_figures(scored: Output) -> None:
    found = evaluate(scored)
    said = found.to_json()
    assert (said["wer"], said["words"], said["scored"]) == (3 / 11, 11, 3)
    assert (said["substitutions"], said["insertions"], said["deletions"]) == (1, 1, 1)
    assert said["by_language"] == {"en": 0.0, "de": 2 / 3, "pt": 1 / 3}
    assert (said["failed"], said["failed_ids"], said["without_reference"]) == (1, ["lost"], 2)
    assert said["wer_with_failed"] == (3 + 2) / (11 + 2)
    assert said["characters"] == len("it is a fine day" + "guten tag zusammen" + "uno dos tres")
    assert sum(one.words.n_reference for one in found.lengths) == 11
    assert [one.recording_id for one in found.worst] == ["worse", "more"]  # the worst first, only those with errors
    assert said["language"] == {"right": 0.0, "recordings": 1, "told": 0, "matrix": {"pt": {"es": 1}}}
    assert said["confusions"]["substitute"] == [{"reference": "tag", "text": "morgen", "count": 1}]
    json.dumps(said)


def test_what_is_shown(scored: Output) -> None:
    text = shown(scored)
    assert "WER 27.27 %" in text
    assert "1 recording with a reference failed (2 words)" in text
    assert "2 recordings without a reference" in text
    assert "guten [tag → morgen] [-zusammen]" in text
    assert "uno dos tres [+cuatro]" in text


def test_hostile_texts_stay_text(tmp_path: Path) -> None:
    name = "[red]x\n\x1b[2J<script>"
    output = made(tmp_path / "out", spoken(name, " [bold] other [/]", "said <b>this</b>"))
    assert "\x1b[2J" not in shown(output)
    text = page(figures(output), [evaluation_report.section(evaluate(output))])
    assert "Word errors" in text
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_references_of_a_file(scored: Output) -> None:
    given = {"fine": Reference("it is a day"), "without": Reference("no matter"), "nobody": Reference("x")}
    found = evaluate(scored, given)
    assert (found.total.recordings, found.total.words) == (2, Score(6, insertions=1))
    assert (found.n_unmatched, found.unmatched, found.without_reference) == (1, ["nobody"], 4)
    assert "1 reference of no recording here: nobody" in shown(scored, given=given)


def test_nothing_to_compare_with_is_said(tmp_path: Path, scored: Output) -> None:
    none = made(tmp_path / "none", spoken("a", " x", None))
    assert not has_references(none)
    assert has_references(scored)
    with pytest.raises(UsageError, match="none of 1 recordings has a reference: give --reference FILE"):
        evaluate(none)
    with pytest.raises(UsageError, match="no 'other', say; its recordings are named like 'a'"):
        evaluate(none, {"other": Reference("x")})
    with pytest.raises(UsageError, match="has no text of any recording with a reference"):
        evaluate(scored, against=none)
    with pytest.raises(MurmurError, match="murmur finalize"):
        evaluate(begin(Store.at(str(tmp_path / "begun"))))


def test_only_failed_ones_have_a_reference(tmp_path: Path) -> None:
    output = made(tmp_path / "out", SCORED[4])
    assert evaluate(output).to_json()["wer"] is None
    assert evaluate(output).to_json()["wer_with_failed"] == 1.0
    assert "No recording has both" in shown(output)
    assert evaluation_report.section(evaluate(output)).tiles[0].value == "-"


def test_a_translation_is_normalised_as_english(tmp_path: Path) -> None:
    settings = {"model": "demo", "chunk_level": "segment", "task": "translate"}
    one = spoken("a", " It's twenty-one cats", "it is 21 cats", "de")
    assert evaluate(made(tmp_path / "t", one, settings=settings)).total.words.errors == 0
    assert evaluate(made(tmp_path / "o", one)).total.words.errors > 0


def test_word_times(tmp_path: Path) -> None:
    words = [{"word": w, "start": i * 0.5 + 0.1, "end": i * 0.5 + 0.5} for i, w in enumerate(("Guten", "Tag,", "Otto"))]
    recording = Recording(id="a", uri="a", reference="Guten Tag Otto", metadata=json.dumps({"words": words}))
    heard = ok("a", recording=recording, language="de", segments=(segment(" guten abend otto", words=True),))
    settings = {"model": "demo", "chunk_level": "word"}
    times = evaluate(made(tmp_path / "out", heard, settings=settings)).word_times
    assert times is not None
    assert (times.reference_words, times.matched) == (3, 2)
    assert times.start_median_s == pytest.approx(0.1)
    assert times.end_p95_s == pytest.approx(0.1)
    without = evaluate(made(tmp_path / "none", heard)).word_times
    assert without is not None
    assert (without.matched, without.start_median_s) == (0, None)


def test_words_that_are_the_same_but_for_marks() -> None:
    assert pairs_in_order(["Seven", "o'clock,", "-", "then"], ["seven", "o’clock", "than", "then."]) == [
        (0, 0), (1, 1), (3, 3),
    ]  # fmt: skip
    assert pairs_in_order([], ["x"]) == []


def test_an_alignment() -> None:
    score, edits = words_apart("a b c d", "a x c d e")
    assert score == Score(4, substitutions=1, insertions=1)
    assert [edit.kind for edit in edits] == ["equal", "substitute", "equal", "insert"]
    assert words_apart("a", "") == (Score(1, deletions=1), [Edit("delete", ("a",), ())])
    assert words_apart("", "") == (Score(), [])


def test_a_long_alignment_shows_its_errors() -> None:
    said = " ".join(f"w{i}" for i in range(100))
    _, edits = words_apart(said, said.replace("w50", "x"))
    text = " ".join(words for _, words in evaluation_report.pieces(edits))
    assert text == "... w46 w47 w48 w49 [w50 → x] w51 w52 w53 w54 ..."


# ---- intervals


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """200 corpora of 60 recordings with a true rate of 0.1: about 95 % of their intervals hold it."""
    random = np.random.default_rng(5)
    covered = 0
    for _ in range(200):
        words = random.integers(5, 60, 60).astype(float)
        errors = random.binomial(words.astype(int), random.beta(1, 9, 60)).astype(float)
        sums = resampled(np.stack([errors, words], axis=1), 300)
        low, high = interval(sums[:, 0] / sums[:, 1])
        covered += low <= 0.1 <= high
    assert 0.86 <= covered / 200 <= 0.99


def test_resamples_are_of_whole_recordings_and_repeat() -> None:
    counts = np.array([[1.0, 10.0], [0.0, 10.0], [5.0, 10.0]])
    sums = resampled(counts, 50)
    assert (sums[:, 1] == 30).all()  # as many as there are, each with its own words
    assert set(sums[:, 0]) <= {float(a + 5 * b) for a in range(4) for b in range(4)}
    assert (sums == resampled(counts, 50)).all()
    assert len(set(sums[:, 0])) > 3


def test_lengths() -> None:
    assert [length_of(s) for s in (0, 4.9, 5, 1800, 1e6)] == [
        "0 to 5 s", "0 to 5 s", "5 to 15 s", "1800 s and more", "1800 s and more",
    ]  # fmt: skip


# ---- two outputs


def test_two_outputs(tmp_path: Path, scored: Output) -> None:
    other = made(
        tmp_path / "other",
        spoken("fine", " it is a bad day", "another reference", "en"),
        spoken("worse", " Guten Tag zusammen", None, "de"),
        spoken("elsewhere", " x", "x"),
    )
    found = evaluate(scored, against=other).against
    assert found is not None
    assert found.recordings == 2  # by this output's references; `more` has a text only here
    assert (found.only_here, found.only_there) == (1, 0)
    assert (found.here.words.errors, found.there.words.errors) == (2, 1)
    assert found.difference == pytest.approx(1 / 8 - 2 / 8)
    assert found.interval is not None
    assert found.interval[0] < found.difference < found.interval[1]
    assert [(here.recording_id, here.score.errors, there.score.errors) for here, there in found.changed] == [
        ("worse", 2, 0), ("fine", 0, 1),
    ]  # fmt: skip
    assert "difference -12.50 points" in shown(scored, against=other)
    assert "which may be chance" in shown(scored, against=other)


def test_an_output_beside_itself_differs_by_nothing(scored: Output) -> None:
    found = evaluate(scored, against=scored).against
    assert found is not None
    assert (found.difference, found.interval, found.changed) == (0.0, (0.0, 0.0), [])


def test_a_real_difference_is_told_from_chance(tmp_path: Path) -> None:
    """One word too many in every recording, against none: paired, the difference is sure."""
    said = [f"{'w ' * (20 + i)}end" for i in range(40)]
    here = made(tmp_path / "a", *(spoken(f"r{i}", f" {text}", text) for i, text in enumerate(said)))
    there = made(tmp_path / "b", *(spoken(f"r{i}", f" {text} x", text) for i, text in enumerate(said)))
    found = evaluate(here, against=there).against
    assert found is not None
    assert found.interval is not None
    assert 0 < found.interval[0] < found.interval[1] < 0.06


# ---- many


def test_a_sample_is_the_same_each_time(tmp_path: Path) -> None:
    output = made(tmp_path / "out", *(spoken(f"r{i}", " a b", "a c") for i in range(60)))
    whole, some = evaluate(output), evaluate(output, most=20)
    assert (whole.total.recordings, whole.sampled, some.sampled) == (60, 1, 3)
    assert 5 <= some.total.recordings <= 40
    assert some.total == evaluate(output, most=20).total
    assert "one recording in 3" in shown(output, most=20)


# ---- the command


def test_the_command(scored: Output, tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text('{"id": "fine", "text": "it is a day", "language": "en"}\n')
    done = murmur("evaluate", scored.store.uri, "--reference", file, "--against", scored.store.uri, "--json")
    assert done.returncode == 0, done.stderr
    assert last_json(done)["wer"] == 1 / 4
    assert last_json(done)["against"]["wer_difference"] == 0
    file.write_text('{"id": "fine", "text": "it is a day"}\n' * 2)
    done = murmur("evaluate", scored.store.uri, "--reference", file)
    assert (done.returncode, done.stdout) == (2, "")
    assert "given twice" in done.stderr
    done = murmur("report", scored.store.uri, "--html", tmp_path / "r.html")
    assert done.returncode == 0, done.stderr
    assert 'id="errors"' in (tmp_path / "r.html").read_text()
