"""An evaluation for a person: tables at a terminal, and a section of the report's page.

Says only what `pipeline.evaluation` found. In an alignment a word that is not as in the reference stands in brackets:
`[said → heard]`, `[-left out]`, `[+put in]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import evaluation, report_page
from pipeline.evaluation import Comparison, Evaluation, Example, Interval, Languages, Rates, WordTimes
from pipeline.logs import one_line
from pipeline.report_page import Head, Section, Tile
from pipeline.scoring import Edit

PAGE_RECORDINGS = 10_000  # more are not scored for the page, which is to be there in seconds
_AROUND = 4  # words shown on each side of an error
_LONGEST = 600  # characters of an alignment
_STYLES = {"equal": "", "substitute": "yellow", "delete": "red", "insert": "green"}

Piece = tuple[str, str]  # an edit's kind, its words as they are shown


# ---- a terminal


def show(found: Evaluation, console: Console) -> None:
    """All of `found`, the corpus's own rates first."""
    for line in lines(found):
        console.print(line, markup=False, highlight=False)
    if found.total.recordings:
        named = [(f"language {one.name}", one) for one in found.languages]
        named += [(one.name, one) for one in found.lengths]
        console.print()
        console.print(_rates_table([*named, ("all", found.total)]))
    if found.found_languages is not None and found.found_languages.matrix:
        console.print()
        console.print(_table(*_matrix(found.found_languages)))
    rows = list(_confusions(found.confusions, most=5))
    if rows:
        console.print()
        console.print(_table(["most frequent errors", "", "", "times"], rows))
    if found.worst:
        console.print("\nThe worst recordings:")
        for one in found.worst:
            _show_example(one, console)
    if found.against is not None and found.against.changed:
        console.print("\nRecordings that changed most, here and there:")
        for pair in found.against.changed:
            for one in pair:
                _show_example(one, console)


def lines(found: Evaluation) -> Iterator[str]:
    """The corpus in sentences."""
    total = found.total
    n = report_page.counted(total.recordings, "recording")
    if total.recordings:
        yield (
            f"WER {percent(total.words.rate)}{between(total.wer_interval)},"
            f" CER {percent(total.chars.rate)}{between(total.cer_interval)}:"
            f" {n}, {total.words.n_reference:,} words, {report_page.length(total.audio_s)} of audio"
        )
        yield (
            f"{report_page.counted(total.words.substitutions, 'substitution')},"
            f" {report_page.counted(total.words.deletions, 'deletion')},"
            f" {report_page.counted(total.words.insertions, 'insertion')}"
        )
    else:
        yield "No recording has both a reference and a text."
    if found.sampled > 1:
        yield f"A sample: one recording in {found.sampled:,} was looked at, chosen by its id."
    if found.failed:
        yield (
            f"{report_page.counted(found.failed, 'recording')} with a reference failed"
            f" ({report_page.counted(found.failed_words, 'word')}), not in these figures: WER"
            f" {percent(found.rate_with_failed)} if all of that counts as deleted."
            f" {_some(found.failed_ids, found.failed)}"
        )
    if found.without_reference:
        yield f"{report_page.counted(found.without_reference, 'recording')} without a reference: in no figure."
    if found.n_unmatched:
        yield (
            f"{report_page.counted(found.n_unmatched, 'reference')} of no recording here:"
            f" {_some(found.unmatched, found.n_unmatched)}"
        )
    if found.word_times is not None:
        yield word_times_line(found.word_times)
    if found.found_languages is not None:
        yield languages_line(found.found_languages)
    if found.against is not None:
        yield from _against_lines(found.against)
    yield interval_line(found)


def interval_line(found: Evaluation) -> str:
    return (
        f"Intervals: {100 * evaluation.LEVEL:g} %, bootstrap over recordings, {found.resamples:,} resamples,"
        f" seed {evaluation.SEED}."
    )


def word_times_line(times: WordTimes) -> str:
    said = f"Word times: {times.matched:,} of {times.reference_words:,} reference words are in the text"
    if times.matched == 0:
        return f"{said} with a time (a run with --set chunk_level=word has word times)."
    return (
        f"{said}; off by {times.start_median_s:.3f} s at the start and {times.end_median_s:.3f} s at the end (median),"
        f" {times.start_p95_s:.3f} s and {times.end_p95_s:.3f} s (95 % are within)."
    )


def languages_line(found: Languages) -> str:
    told = f" {report_page.counted(found.told, 'recording')} had been told theirs." if found.told else ""
    if found.right is None:
        return f"Language: none was to be found.{told}"
    return f"Language: right in {percent(found.right)} of {report_page.counted(found.recordings, 'recording')}.{told}"


def _against_lines(other: Comparison) -> Iterator[str]:
    yield (
        f"Against {one_line(other.output)} ({one_line(other.model)}), over"
        f" {report_page.counted(other.recordings, 'recording')} with a text in both: WER"
        f" {percent(other.here.words.rate)} here, {percent(other.there.words.rate)} there; difference"
        f" {100 * other.difference:+.2f} points{between(other.interval, signed=True)}"
        + (", which may be chance." if _may_be_chance(other.interval) else ".")
    )
    if other.only_here or other.only_there:
        yield f"{other.only_here:,} more have a text only here, {other.only_there:,} only there."


def _may_be_chance(interval: Interval | None) -> bool:
    return interval is None or interval[0] <= 0 <= interval[1]


def _rates_table(named: Iterable[tuple[str, Rates]]) -> Table:
    return _table(
        ["", "recordings", "words", "WER", "interval", "CER", "sub", "del", "ins"],
        (
            [
                name, f"{one.recordings:,}", f"{one.words.n_reference:,}", percent(one.words.rate),
                between(one.wer_interval).strip(" ()") or "-", percent(one.chars.rate), f"{one.words.substitutions:,}",
                f"{one.words.deletions:,}", f"{one.words.insertions:,}",
            ]
            for name, one in named
        ),
    )  # fmt: skip


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(*heads, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    for row in rows:
        table.add_row(*(Text(one_line(cell)) for cell in row))
    return table


def _show_example(one: Example, console: Console) -> None:
    score = one.score
    counts = f"{report_page.counted(score.errors, 'error')} in {report_page.counted(score.n_reference, 'word')}"
    console.print(Text(f"{one_line(one.recording_id)}: WER {percent(score.rate)}, {counts}"), highlight=False)
    text = Text("  ")
    for kind, words in pieces(one.edits):
        text.append(f"{words} ", style=_STYLES[kind])
    console.print(text, highlight=False)


# ---- the page


def section(found: Evaluation) -> Section:
    """The report's section of word errors."""
    total = found.total
    tiles = [
        Tile("WER", percent(total.words.rate) if total.recordings else "-"),
        Tile("CER", percent(total.chars.rate) if total.recordings else "-"),
        Tile("Recordings scored", f"{total.recordings:,}"),
        Tile("Failed", f"{found.failed:,}", is_bad=found.failed > 0),
    ]
    heads = [
        Head("Group", "word"), Head("Recordings", "number"), Head("Words", "number"), Head("WER", "number"),
        Head("95 % interval", "number"), Head("CER", "number"), Head("Substituted", "number"),
        Head("Deleted", "number"), Head("Inserted", "number"), Head("", "bar"),
    ]  # fmt: skip
    named = [*found.languages, *found.lengths]
    most = max((one.words.rate for one in named), default=0.0) or 1.0
    rows = [
        [
            one.name, f"{one.recordings:,}", f"{one.words.n_reference:,}", percent(one.words.rate),
            between(one.wer_interval).strip(" ()") or "-", percent(one.chars.rate), f"{one.words.substitutions:,}",
            f"{one.words.deletions:,}", f"{one.words.insertions:,}", one.words.rate / most,
        ]
        for one in named
    ]  # fmt: skip
    parts = [report_page.Table(heads, rows, "By language, and by length of the recording")]
    spoken = found.found_languages
    if spoken is not None and spoken.matrix:
        names, matrix = _matrix(spoken)
        parts.append(
            report_page.Table(
                [Head(names[0]), *(Head(name, "number") for name in names[1:])], matrix, "The language that was found"
            )
        )
    errors = list(_confusions(found.confusions, most=5))
    if errors:
        heads = [Head("Error"), Head("Reference"), Head("Text"), Head("Times", "number")]
        parts.append(report_page.Table(heads, errors, "The most frequent errors"))
    if found.worst:
        heads = [Head("Recording"), Head("WER", "number"), Head("Aligned: [said → heard] [-left out] [+put in]")]
        worst = [
            [one_line(one.recording_id), percent(one.score.rate), one_line(" ".join(w for _, w in pieces(one.edits)))]
            for one in found.worst
        ]
        parts.append(report_page.Table(heads, worst, "The worst recordings"))
    return Section("errors", "Word errors", tiles, list(lines(found)), parts)


# ---- what they share


def pieces(edits: Sequence[Edit]) -> Iterator[Piece]:
    """The edits as they are shown: what is the same only near an error, and not more than one can read."""
    length = 0
    for i, edit in enumerate(edits):
        if length > _LONGEST:
            yield "equal", "..."
            return
        words = _shown(edit, is_first=i == 0, is_last=i == len(edits) - 1)
        length += len(words)
        yield edit.kind, words


def _shown(edit: Edit, is_first: bool, is_last: bool) -> str:
    said, heard = " ".join(edit.reference), " ".join(edit.text)
    if edit.kind == "substitute":
        return f"[{said} → {heard}]"
    if edit.kind != "equal":
        return f"[-{said}]" if edit.kind == "delete" else f"[+{heard}]"
    words = list(edit.reference)
    before, after = [] if is_first else words[:_AROUND], [] if is_last else words[-_AROUND:]
    if len(words) <= len(before) + len(after) or (is_first and is_last):
        return said
    return " ".join([*before, "...", *after])


def _matrix(found: Languages) -> tuple[list[str], list[list[str]]]:
    columns = sorted({name for row in found.matrix.values() for name in row})
    rows = [[spoken, *(f"{row.get(name, 0):,}" for name in columns)] for spoken, row in found.matrix.items()]
    return ["spoken, and found as", *columns], rows


def _confusions(found: Mapping[str, Sequence[tuple[str, str, int]]], most: int) -> Iterator[list[str]]:
    names = {"substitute": "substituted", "delete": "deleted", "insert": "inserted"}
    for kind, rows in found.items():
        for said, heard, n in rows[:most]:
            yield [names[kind], said or "-", heard or "-", f"{n:,}"]


def _some(ids: Sequence[str], n: int) -> str:
    more = f" and {n - len(ids):,} more" if n > len(ids) else ""
    return ", ".join(map(one_line, ids)) + more


def percent(rate: float) -> str:
    return f"{100 * rate:.2f} %"


def between(interval: Interval | None, signed: bool = False) -> str:
    """` (1.20 to 3.40)`, in percent; nothing where there is none."""
    if interval is None:
        return ""
    sign = "+" if signed else ""
    low, high = (f"{100 * edge:{sign}.2f}" for edge in interval)
    return f" ({low} to {high})"
