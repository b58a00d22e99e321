"""What is shown of a run: an unfinished output, tables for a person."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from commits import begin, failed, ok, put, unreadable
from rich.console import Console

from pipeline import report
from pipeline.config import load_config
from pipeline.errors import MurmurError
from pipeline.figures import figures
from pipeline.finalize import finalize
from pipeline.output import Output, write_inputs
from pipeline.store import Store
from pipeline.types import Recording


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return begin(Store.at(str(tmp_path / "out")))


def said(show: Callable[[Console], None]) -> str:
    console = Console(file=io.StringIO(), width=120)
    show(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("failed", "missing", "fraction", "code"),
    [(0, 0, 0.0, 0), (1, 0, 0.0, 3), (1, 0, 0.1, 0), (2, 0, 0.1, 3), (0, 1, 1.0, 3), (10, 0, 1.0, 0)],
)
def test_exit_codes(failed: int, missing: int, fraction: float, code: int) -> None:
    config = load_config(overrides={"max_failed_fraction": fraction}, env={})
    assert report.exit_code({"inputs": 10, "failed": failed, "missing": missing}, config) == code


def test_exit_code_3_is_explained() -> None:
    config = load_config(overrides={"max_failed_fraction": 0.05}, env={})
    said = report.why_failed({"inputs": 43, "failed": 4, "missing": 0}, config)
    assert said == "exit code 3: 4 of 43 recordings failed, more than max_failed_fraction (0.05) allows"
    assert report.why_failed({"inputs": 43, "failed": 4, "missing": 1}, config) == "exit code 3: 1 recording missing"


def test_a_failed_file_is_named_once(output: Output) -> None:
    put(output.store, unreadable("/talks/a.wav", "/talks/a.wav: the file is empty"))
    finalize(output, use_ray=False)
    for shown in (
        said(lambda console: report.show_failures(output, console)),
        said(lambda console: report.show_figures(figures(output), console)),
    ):
        (line,) = (line for line in shown.splitlines() if "empty" in line)
        assert line.strip() == "/talks/a.wav: damaged_audio: the file is empty"


def test_a_look_before_in_and_after_a_run(output: Output) -> None:
    def shown() -> str:
        return said(lambda console: report.show_figures(figures(output), console))

    write_inputs(output.store, [Recording(id=name, uri=name) for name in ("a", "b", "c")])
    assert "3 recordings listed: 0 ok, 0 failed, 0 begun, 3 waiting" in shown()
    assert "tables: none; `murmur finalize` brings them up to date" in shown()
    put(output.store, ok("a"), failed("b", kind="non_finite"), ok("c", 0, last=False))
    finalize(output, use_ray=False)
    assert "3 recordings listed: 1 ok, 1 failed, 1 begun, 0 waiting" in shown()
    assert "30.0 s of audio committed" in shown()
    assert "b: non_finite: non_finite said no" in shown()
    assert "tables: behind" in shown()
    put(output.store, ok("c", 1))
    finalize(output, use_ray=False)
    assert shown().splitlines()[-1] == "tables: complete"


def test_an_id_cannot_move_the_cursor_or_begin_a_line(output: Output) -> None:
    put(output.store, unreadable("one\nFATAL two\x1b[2J"))
    finalize(output, use_ray=False)
    for show in (report.show_failures, report.show_recordings):
        shown = said(lambda console, show=show: show(output, console))  # type: ignore[misc]
        assert r"one\nFATAL two\x1b[2J" in shown
    assert r"one\nFATAL two\x1b[2J" in said(lambda console: report.show_figures(figures(output), console))


def spoken(name: str, text: str, reference: str | None, language: str = "en") -> dict[str, object]:
    return {"recording": Recording(id=name, uri=name, reference=reference), "text": text, "language": language}


@pytest.fixture
def scored(output: Output) -> Output:
    recordings = [
        ok("fine", **spoken("fine", " It is a fine day.", "it is a fine day")),
        ok("worse", **spoken("worse", " Guten Morgen", "Guten Tag zusammen", "de")),
        ok("without", **spoken("without", " No matter", None)),
        failed("lost", recording=Recording(id="lost", uri="lost", reference="never heard")),
        unreadable("damaged"),
    ]
    put(output.store, *recordings)
    write_inputs(output.store, [result.recording for result in recordings])
    finalize(output, use_ray=False)
    return output


def test_a_table_of_recordings_and_one_of_failures(scored: Output) -> None:
    shown = said(lambda console: report.show_recordings(scored, console))
    (fine,) = (line for line in shown.splitlines() if line.startswith("fine"))
    assert fine.split() == ["fine", "en", "10.0", "It", "is", "a", "fine", "day.", "0.0", "%", "ok"]
    assert "failed: damaged_audio" in shown
    assert "... and 3 more" in said(lambda console: report.show_recordings(scored, console, limit=2))
    assert report.failed_ids(scored) == {"lost", "damaged"}
    assert "damaged: damaged_audio: no frames" in said(lambda console: report.show_failures(scored, console))


def test_markup_in_a_transcript_is_text(output: Output) -> None:
    put(output.store, ok("[red]x", text=" [bold]loud[/bold] [/]"))
    finalize(output, use_ray=False)
    shown = said(lambda console: report.show_recordings(output, console))
    assert "[red]x" in shown
    assert "[bold]loud[/bold] [/]" in shown


def test_tables_that_are_not_there(output: Output) -> None:
    with pytest.raises(MurmurError, match="murmur finalize"):
        report.show_recordings(output, Console())


@pytest.mark.parametrize(("seconds", "text"), [(3.14159, "3.1 s"), (599.9, "10.0 min"), (5400, "1.50 h")])
def test_lengths(seconds: float, text: str) -> None:
    assert report.length(seconds) == text
