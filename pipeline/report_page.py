"""A run's figures as one HTML page that needs nothing else: no script, no font, no picture from anywhere.

Ids, messages and settings come from manifests, servers and damaged files: the template escapes all of them, and the
page's own policy lets a browser load and run nothing but its one style sheet. Sections are data; `page` takes more of
them from who has more to show (an evaluation, say).
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import jinja2
from markupsafe import Markup

from pipeline import charts
from pipeline.figures import STAGES, Figures, Histogram
from pipeline.journal import Driver
from pipeline.logs import one_line

Kind = Literal["text", "word", "number", "bar"]
SILENT_S = 180.0  # a driver writes its record every minute


@dataclass(frozen=True, slots=True)
class Head:
    """A table's column. A `word` is never broken; a `bar` draws a share, 0 ... 1, beside the number it is of."""

    name: str
    kind: Kind = "text"


@dataclass(frozen=True, slots=True)
class Table:
    """The first column names the row. Values are shown as they are, escaped."""

    columns: Sequence[Head]
    rows: Sequence[Sequence[Any]]
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture and the figures in it; `svg` is markup of `charts`, which escaped its labels."""

    name: str
    svg: Markup
    table: Table


@dataclass(frozen=True, slots=True)
class Tile:
    name: str
    value: str
    is_bad: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """A heading of the page and what stands under it."""

    id: str  # letters and hyphens: the address within the page
    title: str
    tiles: Sequence[Tile] = ()
    notes: Sequence[str] = ()
    parts: Sequence[Table | Chart] = ()


def page(found: Figures, more: Iterable[Section] = ()) -> str:
    """The whole page; the sections `more` stand before the settings."""
    style = _file("report.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_file("report.html")).render(
        title=f"Transcription of {one_line(found.output)}",
        subtitle=f"Model {one_line(found.model)}, as of {moment(found.made)}. {_state(found)}",
        sections=[*_sections(found), *more, *_about(found)],
        footer="Made by murmur report. Times are UTC. RTFx: seconds of audio for each second of wall clock.",
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        style=Markup(style),  # our own file, and what the policy's hash is of
        bar=lambda share: Markup(charts.bar(share)),
    )


def _file(name: str) -> str:
    return (resources.files("pipeline") / "page" / name).read_text(encoding="utf-8")


def _state(found: Figures) -> str:
    left = found.counts["waiting"] + found.counts["partial"]
    if left:
        return f"Not complete: {counted(left, 'recording')} to do."
    return (
        "Complete." if found.tables == "complete" else "All is committed; murmur finalize brings the tables up to it."
    )


def _sections(found: Figures) -> Iterator[Section]:
    yield _summary(found)
    yield _throughput(found)
    yield _stages(found)
    yield _languages(found)
    yield _durations(found)
    yield _failures(found)
    yield _confidence(found)
    yield _flags(found)
    yield _coverage(found)
    yield _slowest(found)


def _about(found: Figures) -> Iterator[Section]:
    yield _drivers(found)
    yield _settings(found)


# ---- the sections, one by one


def _summary(found: Figures) -> Section:
    counts, audio = found.counts, found.audio
    done = counts["ok"] + counts["failed"]
    tiles = [
        Tile("Recordings", f"{counts['inputs']:,}"),
        Tile("Ok", f"{counts['ok']:,}"),
        Tile("Failed", f"{counts['failed']:,}", is_bad=counts["failed"] > 0),
        Tile("To do", f"{counts['waiting'] + counts['partial']:,}"),
        Tile("Audio committed", length(audio["committed_s"])),
        Tile("Speech without text", length(audio["uncovered_speech_s"])),
    ]
    notes = [
        f"{done:,} of {counts['inputs']:,} recordings have ended, {counts['partial']:,} are begun and"
        f" {counts['waiting']:,} wait."
        + (f" {counts['unlisted']:,} more are done and no longer listed." if counts["unlisted"] else ""),
        coverage_line(audio, found.unaccounted),
    ]
    return Section("summary", "Summary", tiles, notes)


def coverage_line(audio: Mapping[str, float | None], unaccounted: int) -> str:
    """The law of coverage in words: every second is decoded or skipped for a reason."""
    law = (
        f"Of {length(audio['duration_s'])} of audio in recordings that ended, {length(audio['decoded_s'])} were decoded"
        f" and {length(audio['skipped_s'])} skipped"
    )
    kept = (
        "; together that is every second of it."
        if not unaccounted
        else f"; in {counted(unaccounted, 'recording')} that does not add up to the length: run murmur verify."
    )
    if audio["speech_s"] is None:
        return law + kept + " No voice detector was run, so speech without text is not known."
    spoken, uncovered = audio["speech_s"], audio["uncovered_speech_s"] or 0.0
    share = f" ({100 * uncovered / spoken:.2f} %)" if spoken else ""
    return law + kept + f" {length(uncovered)} of {length(spoken)} of speech{share} have no text over them."


def _throughput(found: Figures) -> Section:
    bins = found.throughput
    if not bins:
        return Section("throughput", "Throughput over time", notes=["Nothing was committed yet."])
    width = bins[0]["width_s"]
    pauses = {i for i, (a, b) in enumerate(itertools.pairwise(bins), 1) if b["start"] - a["start"] > 1.5 * width}
    rates = [one["audio_s"] / width for one in bins]
    data = [
        charts.Column(rate, clock(one["start"], width), f"{moment(one['start'])}: {rate:,.1f} h/h")
        for one, rate in zip(bins, rates, strict=True)
    ]
    name = f"Audio hours committed per hour, in steps of {span(width)}"
    svg = charts.columns(name, data, at_edges=True, pauses=pauses, id="chart-throughput")
    rows = [
        [moment(one["start"]), f"{one['audio_s']:,.1f}", f"{rate:,.2f}"] for one, rate in zip(bins, rates, strict=True)
    ]
    table = Table([Head("From"), Head("Audio, s", "number"), Head("h per h", "number")], rows)
    notes = ["By the time of commit, over all drivers and devices; the first and the last step are not whole ones."]
    if pauses:
        notes.append("A dashed line stands where a pause is left out.")
    return Section("throughput", "Throughput over time", notes=notes, parts=[Chart(name, Markup(svg), table)])


def _stages(found: Figures) -> Section:
    total = sum(found.stages.values())
    rows = [
        [
            STAGES[name].capitalize(),
            f"{s:,.1f}",
            f"{100 * s / total:.1f} %" if total else "-",
            s / total if total else 0,
        ]
        for name, s in found.stages.items()
    ]
    columns = [Head("Stage"), Head("Seconds", "number"), Head("Share", "number"), Head("", "bar")]
    notes = [
        "Seconds of all workers together; stages run side by side, and many Units are in an engine at once, so this is"
        " more than the run took. A Unit's seconds in the engine count from being let in to its end, beside the others."
    ]
    return Section("stages", "Time by stage", notes=notes, parts=[Table(columns, rows)])


def _languages(found: Figures) -> Section:
    most = max((row["audio_s"] for row in found.languages), default=0.0) or 1.0
    rows = [
        [row["language"], f"{row['recordings']:,}", length(row["audio_s"]), probability(row["probability"]),
         row["audio_s"] / most]
        for row in found.languages
    ]  # fmt: skip
    columns = [
        Head("Language"), Head("Recordings", "number"), Head("Audio", "number"), Head("Mean probability", "number"),
        Head("", "bar"),
    ]  # fmt: skip
    return _or_nothing("languages", "Languages", [Table(columns, rows)], rows, "No recording is transcribed yet.")


def _durations(found: Figures) -> Section:
    labels = [span(edge) if edge else "0" for edge in found.durations.edges]
    chart = _histogram("Recordings by length", found.durations, labels, id="chart-durations")
    return _or_nothing("durations", "Durations", [chart], found.durations.counts, "No recording has ended yet.")


def _failures(found: Figures) -> Section:
    rows = [[row["kind"], row["stage"], f"{row['recordings']:,}"] for row in found.failures]
    kinds = Table([Head("Kind"), Head("Stage"), Head("Recordings", "number")], rows)
    examples = [
        [
            one_line(one["recording_id"]),
            row["kind"],
            one_line(reason(one["recording_id"], one["error_message"])),
            one["attempts"],
        ]
        for row in found.failures
        for one in row["examples"]
    ]
    heads = [Head("Recording"), Head("Kind", "word"), Head("Message"), Head("Attempts", "number")]
    notes = ["murmur retry does these again, and only these. All are in the table recordings."] if rows else []
    parts = [kinds, Table(heads, examples, "Examples of each kind")]
    return _or_nothing("failures", "Failures", parts, rows, "No recording has failed.", notes)


def _confidence(found: Figures) -> Section:
    names = {
        "avg_logprob": "Mean log probability of a segment's tokens (below -1 it is tried again, hotter)",
        "no_speech_prob": "Probability that a segment's window holds no speech",
        "compression_ratio": "Compression ratio of a segment's text (above 2.4: it repeats itself)",
    }
    parts: list[Table | Chart] = [
        _histogram(
            title, found.confidence[name], [f"{edge:g}" for edge in found.confidence[name].edges], f"chart-{name}"
        )
        for name, title in names.items()
    ]
    decoding = found.decoding
    n = sum(decoding["segments_by_temperature"].values())
    rows = [
        [temperature, f"{count:,}", f"{100 * count / n:.2f} %", count / n]
        for temperature, count in decoding["segments_by_temperature"].items()
    ]
    heads = [Head("Temperature"), Head("Segments", "number"), Head("Share", "number"), Head("", "bar")]
    parts.append(Table(heads, rows, "Segments by the temperature they were decoded at"))
    notes = [fallback_line(found)]
    return _or_nothing("confidence", "Confidence", parts, rows, "There are no segments yet.", notes)


def fallback_line(found: Figures) -> str:
    """How often a window was decoded again."""
    windows, fallbacks = found.decoding["windows"], found.decoding["fallbacks"]
    share = f", {100 * fallbacks / windows:.2f} for every hundred" if windows else ""
    return f"{counted(windows, 'window')} were looked at and {counted(fallbacks, 'decode')} repeated{share}."


def _flags(found: Figures) -> Section:
    rows = [
        [row["flag"], f"{row['recordings']:,}", f"{row['segments']:,}", ", ".join(map(one_line, row["examples"]))]
        for row in found.flags
    ]
    heads = [Head("Flag"), Head("Recordings", "number"), Head("Segments", "number"), Head("Some of them")]
    return _or_nothing("flags", "Flags", [Table(heads, rows)], rows, "Nothing was flagged.")


def _coverage(found: Figures) -> Section:
    rows = [
        [one_line(row["recording_id"]), length(row["uncovered_speech_s"]), length(row["speech_s"]),
         f"{time_in(row['start'])} - {time_in(row['end'])}", length(row["end"] - row["start"])]
        for row in found.coverage
    ]  # fmt: skip
    heads = [
        Head("Recording"), Head("Speech without text", "number"), Head("Of speech", "number"),
        Head("Longest stretch without text", "number"), Head("Length", "number"),
    ]  # fmt: skip
    table = Table(heads, rows, "The recordings with the most speech that no segment covers")
    notes = [coverage_line(found.audio, found.unaccounted)]
    return _or_nothing("coverage", "Coverage", [table], rows, "No recording has speech without text.", notes)


def _slowest(found: Figures) -> Section:
    rows = [
        [one_line(row["recording_id"]), length(row["audio_s"]), f"{row['total_s']:,.1f}",
         *(f"{row[stage]:,.1f}" for stage in STAGES)]
        for row in found.slowest
    ]  # fmt: skip
    heads = [Head("Recording"), Head("Audio", "number"), Head("All, s", "number")]
    heads += [Head(f"{name}, s", "number") for name in ("Store", "Decoding", "VAD", "Engine", "Commit")]
    return _or_nothing("slowest", "Slowest recordings", [Table(heads, rows)], rows, "Nothing was committed yet.")


def _drivers(found: Figures) -> Section:
    rows = [
        [moment(one.started), one.host, moment(one.ended) if one.ended else "-",
         outcome(one, found.made, is_last=one is found.drivers[-1]), _plain(one.said.get("to_do")),
         _plain(one.said.get("recordings")), length(one.said.get("audio_s")), _number(one.said.get("rtfx"), 1)]
        for one in found.drivers
    ]  # fmt: skip
    heads = [
        Head("Began", "word"), Head("Host"), Head("Ended", "word"), Head("Outcome"),
        Head("To do", "number"), Head("Done", "number"), Head("Audio", "number"), Head("RTFx", "number"),
    ]  # fmt: skip
    notes = ["RTFx is that run's own wall clock, from its first task to its last commit, over all of its devices."]
    return _or_nothing("runs", "Runs", [Table(heads, rows)], rows, "No driver has left a record.", notes)


def outcome(driver: Driver, now: float, is_last: bool = True) -> str:
    """How a driver ended, as far as can be told: one that was killed says nothing any more. Where another came after
    it, it had ended: there is one at a time."""
    if driver.outcome is not None:
        return driver.outcome
    is_alive = is_last and now - driver.seen < SILENT_S
    return "running" if is_alive else f"no word since {moment(driver.seen)}: killed?"


def _settings(found: Figures) -> Section:
    about = {
        "model": found.model,
        "revision": found.model_revision or "-",
        "weights": found.keys.get("weights", "-"),
        "dtype": found.keys.get("dtype", "-"),
        "fingerprint of all that a result depends on": found.fingerprint,
        **{f"version of {name}": v for name, v in _versions(found.drivers).items()},
    }
    settings = [[key, one_line(_plain(value))] for key, value in _flat(found.settings)]
    return Section(
        "settings",
        "Settings and model",
        parts=[
            Table(
                [Head("What"), Head("Value")], [[key, one_line(str(value))] for key, value in about.items()], "Model"
            ),
            Table([Head("Setting"), Head("Value")], settings, "Settings of the first run"),
        ],
    )


# ---- what they share


def _or_nothing(
    id: str,
    title: str,
    parts: Sequence[Table | Chart],
    evidence: Sequence[Any],
    otherwise: str,
    notes: Sequence[str] = (),
) -> Section:
    """The section, or the words `otherwise` where there is nothing in `evidence` to show."""
    if not any(evidence):
        return Section(id, title, notes=[otherwise])
    return Section(id, title, notes=notes, parts=parts)


def _histogram(name: str, bins: Histogram, labels: Sequence[str], id: str) -> Chart:
    ranges = [f"{a} to {b}" for a, b in itertools.pairwise(labels)]
    data = [
        charts.Column(count, label, f"{range_}: {count:,}")
        for count, label, range_ in zip(bins.counts, labels, ranges, strict=False)
    ]
    rows = [[range_, f"{count:,}"] for range_, count in zip(ranges, bins.counts, strict=True) if count]
    table = Table([Head("Range"), Head("Number", "number")], rows)
    return Chart(name, Markup(charts.columns(name, data, at_edges=True, id=id)), table)


def _versions(drivers: Sequence[Driver]) -> dict[str, Any]:
    newest = drivers[-1].said if drivers else {}
    python = {"python": newest["python"]} if "python" in newest else {}
    return {**python, **newest.get("versions", {})}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _plain(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def reason(recording_id: str, message: str | None) -> str:
    """Why a recording failed, for a place that has its id already: messages begin with the file's name."""
    return (message or "").removeprefix(f"{recording_id}: ")


def probability(value: float | None) -> str:
    return _number(value, 3)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def length(audio_s: float | None) -> str:
    """Seconds as a person says them: 7.2 s, 12.5 min, 31.40 h; "-" where they are not known."""
    if audio_s is None:
        return "-"
    if audio_s < 60:
        return f"{audio_s:.1f} s"
    return f"{audio_s / 60:.1f} min" if audio_s < 3600 else f"{audio_s / 3600:,.2f} h"


def span(seconds: float) -> str:
    """A round length: 30 s, 5 min, 2 h."""
    unit, name = (1, "s") if seconds < 60 else (60, "min") if seconds < 3600 else (3600, "h")
    return f"{seconds / unit:g} {name}"


def time_in(seconds: float) -> str:
    """A place in a recording: 1:02:03.4."""
    minutes, rest = divmod(round(seconds, 1), 60)
    return f"{int(minutes // 60)}:{int(minutes % 60):02}:{rest:04.1f}"


def moment(at: float) -> str:
    """A time of day, UTC, to the second."""
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def clock(at: float, width_s: float) -> str:
    """The same for an axis with steps of `width_s`: no more of it than tells two steps apart."""
    form = "%H:%M:%S" if width_s < 60 else "%H:%M" if width_s < 3600 else "%m-%d %Hh"
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime(form)
