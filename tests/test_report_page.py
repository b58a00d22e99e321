"""The report's page: whole by itself, nothing in it runs or is fetched, and whatever a file is called is only text."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from commands import murmur
from commits import begin, failed, ok, put, segment

from pipeline import charts, report_page
from pipeline.figures import Figures, figures
from pipeline.finalize import finalize
from pipeline.journal import Driver, Journal
from pipeline.output import write_inputs
from pipeline.report_page import Head, Section, Table, page
from pipeline.store import Store
from pipeline.types import Failure, Recording, Spent

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style><svg onload=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)",
    "&lt;b&gt;",
)
VOID = {"meta", "link", "br", "img", "input"}


class Reader(HTMLParser):
    """The page as a browser sees it: its elements, in order, and its text. Fails on what is not well nested."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.style = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            self.style += data
        else:
            self.text += data

    def all(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.elements if name == tag)


@pytest.fixture
def found(tmp_path: Path) -> Figures:
    """Of an output in which everything that a user or a server can name is hostile."""
    output = begin(Store.at(str(tmp_path / "out")), settings={"model": "demo", "initial_prompt": HOSTILE[0]})
    kinds = ("source", "forbidden", "not_found", "memory", "non_finite", "engine")  # each has its own examples
    for i, (name, kind) in enumerate(zip(HOSTILE, kinds, strict=True)):
        message = Failure(kind=kind, message=f"{name} said no", stage="decode", attempts=3)
        put(
            output.store,
            ok(name, flags=(name,), language=name[:8], speech=80_000, uncovered_speech=40_000, spent=Spent(engine_s=i)),
            failed(f"{name}/failed", failure=message),
            ok(f"{i}", segments=(segment(name),)),
        )
    write_inputs(output.store, [Recording(id=name, uri=name) for name in HOSTILE])
    finalize(output, use_ray=False)
    with Journal(output.store, command=HOSTILE[0], to_do=12):
        pass
    return figures(output)


@pytest.fixture
def read(found: Figures) -> Reader:
    hostile = Section("more", HOSTILE[0], notes=[HOSTILE[1]], parts=[Table([Head(HOSTILE[2])], [[HOSTILE[3]]])])
    return Reader(page(found, [hostile]))


def test_what_is_hostile_is_shown_as_text(read: Reader) -> None:
    for name in HOSTILE:
        assert f"{name}/failed" in read.text
        assert f"{name} said no" in read.text
    tags = {tag for tag, _ in read.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "link", "base", "form"}
    assert not [name for _, attributes in read.elements for name in attributes if name.startswith("on")]


def test_a_transcript_is_not_on_the_page(found: Figures) -> None:
    assert " unit 0." not in page(found)  # what the Units of these tests say; only ids and messages are shown


def test_nothing_is_fetched_and_nothing_runs(read: Reader) -> None:
    (policy,) = (meta["content"] for meta in read.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'"
    digest = base64.b64encode(hashlib.sha256(read.style.encode()).digest()).decode()
    assert directives["style-src"] == f"'sha256-{digest}'"  # and so style attributes are refused as well
    assert not [attributes for _, attributes in read.elements if "style" in attributes or "src" in attributes]
    assert all((link["href"] or "").startswith("#") for link in read.all("a"))
    assert "url(" not in read.style
    assert "@import" not in read.style


def test_it_can_be_read_without_eyes_or_a_mouse(read: Reader) -> None:
    ids = Counter(attributes["id"] for _, attributes in read.elements if "id" in attributes)
    assert max(ids.values()) == 1
    targets = [(link["href"] or "")[1:] for link in read.all("a")]
    targets += [a["aria-labelledby"] or "" for _, a in read.elements if "aria-labelledby" in a]
    assert set(targets) <= set(ids)
    pictures = [svg for svg in read.all("svg") if svg.get("aria-hidden") != "true"]
    assert pictures
    assert all(svg["role"] == "img" and svg["aria-labelledby"] for svg in pictures)
    assert len(pictures) == len(list(read.all("details")))  # each with its figures as a table
    assert all(head["scope"] in ("col", "row") for head in read.all("th"))
    scrolling = [div for div in read.all("div") if "scroll" in (div.get("class") or "")]
    assert all(div["tabindex"] == "0" and div["aria-label"] for div in scrolling)
    assert next(read.all("html"))["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1


def test_all_sections_are_there_also_where_nothing_happened(read: Reader, tmp_path: Path) -> None:
    sections = "summary throughput stages languages durations failures confidence flags coverage slowest runs settings"
    empty = Reader(page(figures(begin(Store.at(str(tmp_path / "empty"))))))
    for one in (read, empty):
        assert set(sections.split()) <= {section["id"] for section in one.all("section")}
    assert "Nothing was committed yet." in empty.text
    assert "-inf" not in empty.text
    assert "nan" not in empty.text.lower()


def test_a_part_of_the_page_can_come_from_elsewhere(found: Figures) -> None:
    more = Section("wer", "Word errors", parts=[Table([Head("Language"), Head("WER", "number")], [["en", "3.1 %"]])])
    text = page(found, [more])
    assert text.index('id="slowest"') < text.index('id="wer"') < text.index('id="settings"')


@pytest.mark.parametrize(
    ("driver", "outcome"),
    [
        (Driver("r", "h", 0.0, 50.0, ended=50.0, outcome="done"), "done"),
        (Driver("r", "h", 0.0, 990.0), "running"),
        (Driver("r", "h", 0.0, 500.0), "no word since 1970-01-01 00:08:20: killed?"),
    ],
)
def test_how_a_driver_ended(driver: Driver, outcome: str) -> None:
    assert report_page.outcome(driver, now=1000.0) == outcome


def test_a_driver_that_another_followed_is_not_running() -> None:
    driver = Driver("r", "h", 0.0, 990.0)
    assert "killed?" in report_page.outcome(driver, now=1000.0, is_last=False)


def test_the_law_of_coverage_in_words(found: Figures) -> None:
    assert "together that is every second of it" in report_page.coverage_line(found.audio, found.unaccounted)
    assert "in 2 recordings that does not add up" in report_page.coverage_line(found.audio, 2)
    assert "not known" in report_page.coverage_line(found.audio | {"speech_s": None}, 0)


@pytest.mark.parametrize(
    ("values", "top"),
    [
        ([3], "4"),
        ([5, 9], "12"),
        ([100], "120"),
        ([0.3], "0.4"),
        ([0], "4"),
        ([], "4"),
        ([165.5], "200"),
        ([1e6], "1,200,000"),
    ],
)
def test_an_axis_ends_on_a_number_one_can_read(values: list[float], top: str) -> None:
    data = [charts.Column(value, "", "") for value in values]
    svg = Reader(charts.columns("name", data, id="x"))
    assert re.fullmatch(rf"name0.*{re.escape(top)}", svg.text)
    heights = [float(rect["height"] or 0) for rect in svg.all("rect")]
    assert all(0 <= height <= charts.HEIGHT for height in heights)


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    output = begin(Store.at(str(tmp_path / "out")))
    put(output.store, ok("a"))
    file = tmp_path / "report.html"
    done = murmur("report", output.store.uri, "--html", file)
    assert done.returncode == 0, done.stderr
    assert Reader(file.read_text()).text.count("Transcription of")
    refused = murmur("report", output.store.uri, "--html", tmp_path / "no" / "folder.html")
    assert (refused.returncode, "folder.html: No such file" in refused.stderr) == (2, True)


def test_labels_of_a_chart_are_text() -> None:
    one = charts.columns(HOSTILE[1], [charts.Column(1.0, HOSTILE[0], HOSTILE[2])], id='"><b>')
    read = Reader(one)
    assert {tag for tag, _ in read.elements} == {"svg", "title", "line", "text", "rect"}
    assert all(text in read.text for text in HOSTILE[:3])
