"""How good an output is, against references: error rates, their intervals, where the errors are; two outputs compared.

    references ─┐
    tables ─────┴▶ counts of each recording ─▶ rates by language and length, their intervals, confusions
                                            └▶ texts of the worst, read again: alignments

- Rates are total errors over total reference words (characters), after Whisper's normalisation (`pipeline.scoring`):
  English rules for English references and for translations, the basic ones for all other languages.
- A failed recording has no text to score. `failed` counts those with a reference, and a second word error rate takes
  all of their words for deleted.
- Intervals are percentile bootstraps: recordings are drawn with replacement, as many as there are, `RESAMPLES` times,
  and the rate of each draw is taken; 95 % of them lie within. Recordings are what is drawn because the errors of one
  depend on each other. Drawn with a fixed seed from recordings in the order of their ids: the same output gives the
  same interval. For a difference both outputs are drawn alike, which takes out how hard the recordings are.
- Word times are compared for words that both have in order; how many that is, is counted.

Of each recording twelve numbers stay in memory, of references what they hold; texts stream by. Knows no terminal and
no page: those are `pipeline.evaluation_report`'s.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import references, scoring
from pipeline.errors import MurmurError, UsageError
from pipeline.finalize import table_paths
from pipeline.output import Output
from pipeline.references import Reference
from pipeline.schema import shard_of
from pipeline.scoring import Edit, Score

Row = dict[str, Any]
Counts = NDArray[np.float64]

RESAMPLES = 1000
SEED = 0
LEVEL = 0.95
LENGTHS = (0, 5, 15, 30, 60, 300, 1800, math.inf)  # seconds: the edges of the groups by length
N_WORST = 10
N_CONFUSIONS = 10
N_NAMED = 10  # of recordings that are only counted
NO_LANGUAGE = "none"
_ROWS = 2_000  # of a table at once: their texts may be long
_MOST_CONFUSIONS = 400_000  # different ones that are counted; the rarest half goes where there are more

Interval = tuple[float, float]


# ---- what is found


@dataclass(frozen=True, slots=True)
class Rates:
    """The errors of a group of recordings. Intervals are None for fewer than two."""

    name: str
    recordings: int
    audio_s: float
    words: Score
    chars: Score
    wer_interval: Interval | None
    cer_interval: Interval | None

    def to_json(self) -> Row:
        return {
            "name": self.name,
            "recordings": self.recordings,
            "audio_s": round(self.audio_s, 3),
            "words": self.words.n_reference,
            "wer": self.words.rate,
            "wer_interval": self.wer_interval,
            "substitutions": self.words.substitutions,
            "insertions": self.words.insertions,
            "deletions": self.words.deletions,
            "characters": self.chars.n_reference,
            "cer": self.chars.rate,
            "cer_interval": self.cer_interval,
        }


@dataclass(frozen=True, slots=True)
class Example:
    """One recording's text beside its reference."""

    recording_id: str
    language: str
    score: Score
    edits: Sequence[Edit]

    def to_json(self) -> Row:
        return {
            "recording_id": self.recording_id,
            "language": self.language,
            "wer": self.score.rate,
            "words": self.score.n_reference,
            "substitutions": self.score.substitutions,
            "insertions": self.score.insertions,
            "deletions": self.score.deletions,
            "alignment": [
                {"kind": edit.kind, "reference": " ".join(edit.reference), "text": " ".join(edit.text)}
                for edit in self.edits
            ],
        }


@dataclass(frozen=True, slots=True)
class WordTimes:
    """How far word times are from the references' times: seconds, the absolute error of words that both have."""

    reference_words: int
    matched: int
    start_median_s: float | None
    start_p95_s: float | None
    end_median_s: float | None
    end_p95_s: float | None


@dataclass(frozen=True, slots=True)
class Languages:
    """The language that was found against the one that the reference says is spoken."""

    matrix: dict[str, dict[str, int]]  # spoken → found → recordings
    told: int  # recordings that the model was told the language of: not in the matrix

    @property
    def recordings(self) -> int:
        return sum(sum(row.values()) for row in self.matrix.values())

    @property
    def right(self) -> float | None:
        same = sum(row.get(spoken, 0) for spoken, row in self.matrix.items())
        return same / self.recordings if self.recordings else None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Another output beside this one, over the recordings that both have a text of."""

    output: str
    model: str
    recordings: int
    here: Rates
    there: Rates
    difference: float  # WER there minus WER here: below 0 the other one is better
    interval: Interval | None
    only_here: int  # recordings that only one has a text of
    only_there: int
    changed: Sequence[tuple[Example, Example]]  # (here, there), the largest change in errors first

    def to_json(self) -> Row:
        return {
            "output": self.output,
            "model": self.model,
            "recordings": self.recordings,
            "wer_here": self.here.words.rate,
            "wer": self.there.words.rate,
            "wer_difference": self.difference,
            "wer_difference_interval": self.interval,
            "cer_here": self.here.chars.rate,
            "cer": self.there.chars.rate,
            "only_here": self.only_here,
            "only_there": self.only_there,
            "changed": [{"here": here.to_json(), "there": there.to_json()} for here, there in self.changed],
        }


@dataclass(slots=True)
class Evaluation:
    """Everything that an evaluation shows; `to_json` is `murmur evaluate --json`."""

    output: str
    model: str
    total: Rates
    languages: list[Rates]
    lengths: list[Rates]
    failed: int  # with a reference
    failed_words: int  # in those references
    without_reference: int
    unmatched: list[str]  # ids of references that no recording has, some of them
    n_unmatched: int
    sampled: int  # one recording in so many was looked at
    worst: list[Example]
    confusions: dict[str, list[tuple[str, str, int]]]  # kind → (reference, text, how often)
    word_times: WordTimes | None
    found_languages: Languages | None
    resamples: int
    against: Comparison | None = None
    failed_ids: list[str] = field(default_factory=list)

    @property
    def rate_with_failed(self) -> float:
        """The word error rate if all words of failed recordings are deleted ones."""
        return (self.total.words + Score(self.failed_words, deletions=self.failed_words)).rate

    def to_json(self) -> Row:
        total = self.total.to_json()
        del total["name"], total["recordings"]
        scored = self.total.recordings
        spoken = self.found_languages
        return {
            **(total if scored else total | {"wer": None, "cer": None}),
            "by_language": {one.name: one.words.rate for one in self.languages},
            "scored": scored,
            "failed": self.failed,
            "failed_ids": self.failed_ids,
            "wer_with_failed": self.rate_with_failed if scored or self.failed else None,
            "without_reference": self.without_reference,
            "unmatched": self.n_unmatched,
            "unmatched_ids": self.unmatched,
            "one_in": self.sampled,
            "languages": [one.to_json() for one in self.languages],
            "lengths": [one.to_json() for one in self.lengths],
            "confusions": {
                kind: [{"reference": a, "text": b, "count": n} for a, b, n in rows]
                for kind, rows in self.confusions.items()
            },
            "word_times": None
            if self.word_times is None
            else {name: getattr(self.word_times, name) for name in WordTimes.__slots__},
            "language": None
            if spoken is None
            else {"right": spoken.right, "recordings": spoken.recordings, "told": spoken.told, "matrix": spoken.matrix},
            "worst": [one.to_json() for one in self.worst],
            "bootstrap": {"resamples": self.resamples, "seed": SEED, "level": LEVEL, "unit": "recording"},
            "against": None if self.against is None else self.against.to_json(),
        }


# ---- the evaluation


def evaluate(
    output: Output,
    given: Mapping[str, Reference] | None = None,
    *,
    against: Output | None = None,
    n_worst: int = N_WORST,
    resamples: int = RESAMPLES,
    most: int | None = None,
) -> Evaluation:
    """Score the tables of `output` against `given`, or against the references that came with its manifest.

    Of more than `most` recordings with a reference one in so many is looked at, the same ones each time. Raises
    `UsageError` where nothing has a reference, `MurmurError` where there are no tables.
    """
    if against is not None and given is None:
        given = _own_references(output)  # the other output's may differ, or be none
    one_in = 1 if most is None else max(1, math.ceil(_n_references(output, given) / most))
    here = _Scored(output, given, one_in)
    if not len(here) and not here.failed:
        raise UsageError(_nothing(output, given, here))
    named = {} if given is None else given
    unmatched = sorted(set(named) - here.seen) if given is not None and one_in == 1 else []
    found = Evaluation(
        output=str(output.store),
        model=output.run.model,
        total=here.rates("all", slice(None), resamples),
        languages=here.groups(here.languages, resamples),
        lengths=here.groups([length_of(s) for s in here.audio_s], resamples, [*map(length_of, LENGTHS[:-1])]),
        failed=len(here.failed),
        failed_words=sum(here.failed.values()),
        failed_ids=sorted(here.failed)[:N_NAMED],
        without_reference=here.without_reference,
        unmatched=unmatched[:N_NAMED],
        n_unmatched=len(unmatched),
        sampled=one_in,
        worst=_examples(output, given, here.worst(n_worst)),
        confusions=here.confusions(),
        word_times=_word_times(output, here.timed) if here.timed else None,
        found_languages=here.found_languages() if here.matrix or here.told else None,
        resamples=resamples,
    )
    if against is not None:
        found.against = _compare(output, here, against, given or {}, n_worst, resamples)
    return found


def has_references(output: Output) -> bool:
    """Whether any recording in the tables came with a reference."""
    return any(pc.count(rows["reference"]).as_py() for rows in _tables(output, "recordings", ["reference"]))


def length_of(audio_s: float) -> str:
    """The group by length that `audio_s` belongs to."""
    i = int(np.searchsorted(LENGTHS, audio_s, side="right")) - 1
    low, high = LENGTHS[i], LENGTHS[i + 1]
    return f"{low:g} s and more" if high == math.inf else f"{low:g} to {high:g} s"


def _nothing(output: Output, given: Mapping[str, Reference] | None, here: _Scored) -> str:
    if not given:
        return (
            f"{output.store}: none of {here.n_seen} recordings has a reference: give --reference FILE with id and text"
            " (.jsonl, .csv, .parquet), or transcribe from a manifest with `text`"
        )
    first = next(iter(given), "")
    there = next((row for rows in _tables(output, "recordings", ["recording_id"]) for row in rows["recording_id"]), "")
    return (
        f"{output.store}: none of the {len(given)} references is of one of its recordings: no {first!r}, say; its"
        f" recordings are named like {str(there)!r}"
    )


def _n_references(output: Output, given: Mapping[str, Reference] | None) -> int:
    if given is not None:
        return len(given)
    return sum(pc.count(rows["reference"]).as_py() for rows in _tables(output, "recordings", ["reference"]))


def _own_references(output: Output) -> dict[str, Reference]:
    columns = ["recording_id", "reference", "metadata"]
    rows = (row for batch in _tables(output, "recordings", columns) for row in batch.to_pylist())
    return {row["recording_id"]: one for row in rows if (one := references.from_row(row)) is not None}


class _Scored:
    """What stays of each recording with a reference and a text: numbers, in the order of the ids."""

    def __init__(
        self,
        output: Output,
        given: Mapping[str, Reference] | None,
        one_in: int = 1,
        heard: Mapping[str, str] | None = None,
    ) -> None:
        """`heard`: the language of recordings as another output has it, for references that do not say theirs."""
        self.failed: dict[str, int] = {}  # id → words of its reference
        self.without_reference = self.n_seen = self.told = 0
        self.seen: set[str] = set()  # with a reference of `given`
        self.timed: dict[str, Reference] = {}
        self.matrix: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._edits: dict[str, Counter[tuple[str, str]]] = {
            kind: Counter() for kind in ("substitute", "delete", "insert")
        }
        self._rules = _Rules(output, heard)
        found: list[tuple[str, str, float, Score, Score]] = []
        for row, reference in _pairs(output, given):
            self.n_seen += 1
            if reference is None:
                self.without_reference += 1
                continue
            if given is not None:
                self.seen.add(row["recording_id"])
            if crc32(row["recording_id"].encode("utf-8", "surrogatepass")) % one_in == 0:
                found += self._score(row, reference)
        found.sort(key=lambda one: one[0])
        self.ids = [one[0] for one in found]
        self.languages = [one[1] for one in found]
        self.audio_s = [one[2] for one in found]
        self.words = _counts(one[3] for one in found)
        self.chars = _counts(one[4] for one in found)

    def __len__(self) -> int:
        return len(self.ids)

    def _score(self, row: Row, reference: Reference) -> Iterator[tuple[str, str, float, Score, Score]]:
        rules = self._rules(row, reference)
        said = scoring.normalise(reference.text, rules)
        if row["status"] != "ok":
            self.failed[row["recording_id"]] = len(said.split())
            return
        heard = scoring.normalise(row["text"], rules)
        score, edits = scoring.words_apart(said, heard)
        for edit in edits:
            self._count(edit)
        if reference.words:
            self.timed[row["recording_id"]] = reference
        if reference.language is not None and row["language_probability"] is None and row["language"] is not None:
            self.told += 1
        elif reference.language is not None:
            self.matrix[reference.language][row["language"] or NO_LANGUAGE] += 1
        language = reference.language or row["language"] or NO_LANGUAGE
        yield row["recording_id"], language, row["duration_s"], score, scoring.chars_apart(said, heard)

    def _count(self, edit: Edit) -> None:
        if edit.kind == "equal":
            return
        counter = self._edits[edit.kind]
        width = max(len(edit.reference), len(edit.text))
        a, b = (words or ("",) * width for words in (edit.reference, edit.text))
        counter.update(zip(a, b, strict=True))
        if len(counter) > _MOST_CONFUSIONS:
            self._edits[edit.kind] = Counter(dict(counter.most_common(_MOST_CONFUSIONS // 2)))

    def rates(self, name: str, rows: slice | NDArray[np.intp], resamples: int) -> Rates:
        words, chars = self.words[rows], self.chars[rows]
        intervals: list[Interval | None] = [None, None]
        if len(words) > 1:
            sums = resampled(np.hstack([_errors(words), _errors(chars)]), resamples)
            intervals = [interval(_rate(sums[:, :2])), interval(_rate(sums[:, 2:]))]
        audio_s = math.fsum(np.asarray(self.audio_s)[rows].tolist())
        return Rates(name, len(words), audio_s, _score(words), _score(chars), *intervals)

    def groups(self, names: Sequence[str], resamples: int, order: Sequence[str] = ()) -> list[Rates]:
        """The rates of recordings by the name of their group; in `order`, else the most recordings first."""
        rows: defaultdict[str, list[int]] = defaultdict(list)
        for i, name in enumerate(names):
            rows[name].append(i)
        wanted = [name for name in order if name in rows] or sorted(rows, key=lambda name: (-len(rows[name]), name))
        return [self.rates(name, np.array(rows[name], np.intp), resamples) for name in wanted]

    def worst(self, n: int) -> list[str]:
        """Ids by rate, then by errors; only those with errors."""
        errors, said = self.words[:, 1:].sum(axis=1), np.maximum(1, self.words[:, 0])
        order = np.lexsort((-errors, -errors / said))[:n]
        return [self.ids[i] for i in order if errors[i]]

    def confusions(self) -> dict[str, list[tuple[str, str, int]]]:
        return {
            kind: [
                (*pair, n) for pair, n in sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:N_CONFUSIONS]
            ]
            for kind, counter in self._edits.items()
        }

    def found_languages(self) -> Languages:
        matrix = {spoken: dict(sorted(row.items())) for spoken, row in sorted(self.matrix.items())}
        return Languages(matrix, self.told)


class _Rules:
    """The language whose rules normalise both texts: the reference's, else the one that was found, of two outputs in
    the first, so that both are normalised alike. A translation is English."""

    def __init__(self, output: Output, heard: Mapping[str, str] | None) -> None:
        self._translated = output.run.settings.get("task") == "translate"
        self._heard = heard or {}

    def __call__(self, row: Row, reference: Reference) -> str | None:
        if self._translated:
            return "en"
        return reference.language or self._heard.get(row["recording_id"], row["language"])


def _pairs(output: Output, given: Mapping[str, Reference] | None) -> Iterator[tuple[Row, Reference | None]]:
    columns = ["recording_id", "status", "language", "language_probability", "duration_s", "text"]
    columns += ["reference", "metadata"] if given is None else []
    for batch in _tables(output, "recordings", columns):
        for row in batch.to_pylist():
            yield row, references.from_row(row) if given is None else given.get(row["recording_id"])


# ---- resampling


def resampled(counts: Counts, resamples: int, seed: int = SEED) -> Counts:
    """[resamples, k] the column sums of `counts` [n, k] over n rows drawn with replacement, once a resample."""
    random, n = np.random.default_rng(seed), len(counts)
    sums = np.empty((resamples, counts.shape[1]))
    for i in range(resamples):
        drawn = np.bincount(random.integers(0, n, n), minlength=n)  # how often each was drawn
        sums[i] = drawn @ counts
    return sums


def interval(values: NDArray[np.float64], level: float = LEVEL) -> Interval:
    """Where the middle `level` of the values lie."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _rate(sums: Counts) -> NDArray[np.float64]:
    """Errors over totals, [n, 2] → [n]; as in `Score.rate`."""
    rates: NDArray[np.float64] = sums[:, 0] / np.maximum(1, sums[:, 1])
    return rates


def _errors(counts: Counts) -> Counts:
    """[n, 4] → [n, 2]: errors and reference length."""
    return np.stack([counts[:, 1:].sum(axis=1), counts[:, 0]], axis=1)


def _counts(scores: Iterable[Score]) -> Counts:
    """[n, 4]: reference length, substitutions, insertions, deletions."""
    rows = [(one.n_reference, one.substitutions, one.insertions, one.deletions) for one in scores]
    return np.array(rows, np.float64).reshape(-1, 4)


def _score(counts: Counts) -> Score:
    return Score(*(int(n) for n in counts.sum(axis=0)))


# ---- texts, read again for the few that are shown


def _examples(
    output: Output,
    given: Mapping[str, Reference] | None,
    ids: Sequence[str],
    heard: Mapping[str, str] | None = None,
) -> list[Example]:
    """The recordings `ids` with their alignments, in that order."""
    rules_of, found = _Rules(output, heard), {}
    for row in _find(output, ids, given is None):
        reference = references.from_row(row) if given is None else given[row["recording_id"]]
        if reference is None:
            continue
        rules = rules_of(row, reference)
        score, edits = scoring.words_apart(
            scoring.normalise(reference.text, rules), scoring.normalise(row["text"], rules)
        )
        language = reference.language or row["language"] or NO_LANGUAGE
        found[row["recording_id"]] = Example(row["recording_id"], language, score, edits)
    return [found[name] for name in ids if name in found]


def _find(output: Output, ids: Sequence[str], with_reference: bool) -> Iterator[Row]:
    columns = ["recording_id", "language", "text", *(["reference", "metadata"] if with_reference else [])]
    by_shard: defaultdict[int, list[str]] = defaultdict(list)
    for name in ids:
        by_shard[shard_of(name, output.run.n_shards)].append(name)
    for shard, some in by_shard.items():
        with output.store.open(table_paths(output, shard)["recordings"]) as file:
            yield from pq.read_table(file, columns=columns, filters=[("recording_id", "in", some)]).to_pylist()


def _tables(output: Output, table: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """A public table as far as it was finalised, some rows at a time."""
    names = sorted(output.store.sizes(table))
    if not names:
        raise MurmurError(f"output {output.store} has no tables yet: run `murmur finalize {output.store}`")
    for name in names:
        with output.store.open(f"{table}/{name}") as file:
            for batch in pq.ParquetFile(file).iter_batches(_ROWS, columns=list(columns)):
                yield pa.Table.from_batches([batch])


# ---- word times


def _word_times(output: Output, timed: Mapping[str, Reference]) -> WordTimes:
    """`timed`: the recordings whose references have times. Without a table of words nothing matches."""
    errors: list[NDArray[np.float64]] = []
    for recording_id, words in _words(output, timed):
        reference = timed[recording_id].words
        pairs = scoring.pairs_in_order([one.word for one in reference], [row["word"] for row in words])
        ours = np.array([(words[j]["start"], words[j]["end"]) for _, j in pairs]).reshape(-1, 2)
        theirs = np.array([reference[i][1:] for i, _ in pairs]).reshape(-1, 2)
        errors.append(np.abs(ours - theirs))
    all_errors = np.concatenate([*errors, np.empty((0, 2))])
    n = sum(len(reference.words) for reference in timed.values())
    if not len(all_errors):
        return WordTimes(n, 0, None, None, None, None)
    (start, end), (start_95, end_95) = np.quantile(all_errors, [0.5, 0.95], axis=0).tolist()
    return WordTimes(n, len(all_errors), start, start_95, end, end_95)


def _words(output: Output, wanted: Collection[str]) -> Iterator[tuple[str, list[Row]]]:
    """The words of each of the recordings, which lie together in the table."""
    ids = pa.array(sorted(wanted), pa.string())
    current, words = "", list[Row]()
    for batch in _tables(output, "words", ["recording_id", "start", "end", "word"]):
        for row in batch.filter(pc.is_in(batch["recording_id"], ids)).to_pylist():
            if row["recording_id"] != current and words:
                yield current, words
                words = []
            current = row["recording_id"]
            words.append(row)
    if words:
        yield current, words


# ---- two outputs


def _compare(
    output: Output,
    here: _Scored,
    other: Output,
    given: Mapping[str, Reference],
    n_changed: int,
    resamples: int,
) -> Comparison:
    heard = dict(zip(here.ids, here.languages, strict=True))
    there = _Scored(other, given, heard=heard)
    places = {name: i for i, name in enumerate(there.ids)}
    both = [(i, places[name]) for i, name in enumerate(here.ids) if name in places]
    if not both:
        raise UsageError(f"{other.store} has no text of any recording with a reference in {output.store}")
    mine, theirs = (np.array(side, np.intp) for side in zip(*both, strict=True))
    pairs = np.hstack([_errors(here.words[mine]), _errors(there.words[theirs])])
    change = pairs[:, 2] - pairs[:, 0]
    largest = [here.ids[mine[i]] for i in np.argsort(-np.abs(change), kind="stable")[:n_changed] if change[i]]
    examples = _examples(output, given, largest), _examples(other, given, largest, heard)
    return Comparison(
        output=str(other.store),
        model=other.run.model,
        recordings=len(both),
        here=here.rates("here", mine, resamples),
        there=there.rates("there", theirs, resamples),
        difference=float(_difference(pairs.sum(axis=0, keepdims=True))[0]),
        interval=interval(_difference(resampled(pairs, resamples))) if len(both) > 1 else None,
        only_here=len(here) - len(both),
        only_there=len(there) - len(both),
        changed=list(zip(*examples, strict=True)),
    )


def _difference(sums: Counts) -> NDArray[np.float64]:
    """[n, 4] errors and words here, errors and words there → [n]: the second rate minus the first."""
    return _rate(sums[:, 2:]) - _rate(sums[:, :2])
