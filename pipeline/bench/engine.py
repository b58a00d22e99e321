"""`murmur bench engine`: our engine beside the other Whisper runtimes, same weights, same windows, in one run.

Everybody turns the same int16 windows of 30 s into T tokens each, log-mel included. They take turns, round by round,
so that whatever else the machine does meets them all alike; the figure is the median of the rounds, and ratios are
taken within a round. Batches are tried first and each runtime is measured with its best. What our own time goes to
is measured after that, with the others gone. The seats (`seats.py`) do the work; no torch here.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING

from pipeline.bench.ours import measure_ours
from pipeline.bench.rounds import Figures, middle, per_window, quotient
from pipeline.bench.seats import PAUSE_S, WINDOW_S, Seat
from pipeline.errors import EngineError, UsageError
from pipeline.machine import machine, usable_cores

if TYPE_CHECKING:
    from pipeline.engine.contestants import Setting, Spec

Say = Callable[[str], None]

# What each runtime can compute in and is worth measuring in; ours is asked for by `Plan.dtypes`.
DTYPES: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {
        "faster-whisper": ("int8", "float32"),  # CTranslate2 has no bfloat16 on CPUs
        "openai-whisper": ("float32",),
        "transformers": ("float32", "bfloat16"),
    },
    "cuda": {
        "faster-whisper": ("float16", "int8_float16"),
        "openai-whisper": ("float16",),
        "transformers": ("float16", "bfloat16"),
    },
}
LIBRARIES = ("ours", *DTYPES["cpu"])
PARTS = ("race", "stages", "floors", "words", "vad", "spread", "sequential", "peaks")
FEW_WINDOWS = 4  # of a runtime that takes them one by one: each takes as long as the next
NEARLY = 1.15  # a batch that is slower by less in one try may still be the better one
MOST_TOKENS = 224  # half the text context: what any of them may sample for one window


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured. Raises `UsageError` for what cannot be."""

    size: str = "base"
    model: str | None = None  # a checkpoint instead of random weights of `size`
    windows: int = 16
    tokens: int = 100
    rounds: int = 3
    lanes: int | None = None
    threads: int | None = None  # None: all cores
    device: str = "cpu"
    contestants: tuple[str, ...] = LIBRARIES  # a library, or one dtype of it: faster-whisper:int8
    dtypes: tuple[str, ...] = ("auto", "float32")  # ours; the first is the one that the others are compared with
    batches: tuple[int, ...] = (1, 4, 8, 16)
    parts: tuple[str, ...] = PARTS
    recordings: int = 32
    processes: int = 1  # of ours on the one device at once, measured beside one alone

    def __post_init__(self) -> None:
        from pipeline.engine.random_checkpoint import SIZES

        _check("parts", self.parts, PARTS)
        _check("device", [self.device.partition(":")[0]], list(DTYPES))
        for contestant in self.contestants:
            library, _, dtype = contestant.partition(":")
            _check("contestants", [library], LIBRARIES)
            if dtype:
                _check("contestants", [dtype], self.theirs[library] if library != "ours" else ())
        if self.model is None:
            _check("size", [self.size], list(SIZES))
        if "ours" not in self.libraries or not self.dtypes:
            raise UsageError("--contestants: ours must be among them, in at least one --dtype")
        if not 1 <= self.tokens <= MOST_TOKENS:
            raise UsageError(f"--tokens {self.tokens} is not within 1 ... {MOST_TOKENS}")
        most = (self.lanes or 1, self.threads or 1, *self.batches)
        counts = (self.windows, self.rounds, self.recordings, self.processes, *most)
        if min(counts) < 1 or not self.batches:
            names = "--windows, --rounds, --recordings, --processes, --lanes, --threads"
            raise UsageError(f"{names} and --batches begin at 1")

    @property
    def n_threads(self) -> int:
        return self.threads or usable_cores()

    @property
    def theirs(self) -> Mapping[str, tuple[str, ...]]:
        return DTYPES[self.device.partition(":")[0]]

    @property
    def libraries(self) -> list[str]:
        return list(dict.fromkeys(contestant.partition(":")[0] for contestant in self.contestants))

    def dtypes_of(self, library: str) -> list[str]:
        if library == "ours":
            return list(self.dtypes)
        asked = [contestant.partition(":")[2] for contestant in self.contestants if contestant.startswith(library)]
        return [dtype for dtype in self.theirs[library] if "" in asked or dtype in asked]


def _check(name: str, asked: Sequence[str], known: Sequence[str]) -> None:
    unknown = next((item for item in asked if item not in known), None)
    if unknown is not None:
        raise UsageError(f"--{name}: {unknown!r} is none of {', '.join(known)}")


@dataclass(slots=True, eq=False)
class Entry:
    """One contestant in one dtype, and what came of it."""

    library: str
    dtype: str
    seat: Seat
    setting: Setting | None = None
    sweep: list[Figures] = field(default_factory=list)
    turns: list[Figures] = field(default_factory=list)
    error: str | None = None

    @property
    def name(self) -> str:
        return f"{self.library} {self.dtype}"

    @property
    def raced(self) -> bool:
        return self.error is None and bool(self.turns)


def bench_engine(plan: Plan, say: Say = lambda line: None) -> Figures:
    """All that the plan asks for, as plain JSON. Raises `EngineError` if ours fails; another's failure is a figure."""
    began, load = time.monotonic(), os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="murmur-bench-") as folder, ExitStack() as stack:
        missing = _missing(plan)
        with Seat(plan.n_threads) as seat:
            say("writing the models")
            convert = "faster-whisper" in plan.libraries and "faster-whisper" not in missing
            checkpoint, converted = seat.ask("write_models", plan.size, plan.model, folder, convert)
            peaks = seat.ask("machine_peaks", plan.device) if "peaks" in plan.parts else None
        entries = _seated(_specs(plan, missing, checkpoint, converted), stack, say)
        ours = _ours(entries)
        if "race" in plan.parts:
            _race(plan, entries, say)
        figures = [_entry_figures(plan, entry, entries) for entry in entries]
        for entry in entries:
            if entry is not ours:
                entry.seat.close()
        details = measure_ours(plan, ours.seat, say)
        if plan.processes > 1:
            say(f"measuring {plan.processes} processes")
            details["processes"] = _side_by_side(plan, ours, _specs(plan, missing, checkpoint, converted))
    return {
        "benchmark": "engine",
        "plan": {**asdict(plan), "threads": plan.n_threads, "model": plan.model or f"{plan.size}, random weights"},
        "contestants": figures,
        "missing": missing,
        "ratios": _ratios(entries),
        **details,
        "peaks": peaks,
        "machine": {**machine(), "load_before": load[0], "took_s": round(time.monotonic() - began)},
    }


def _side_by_side(plan: Plan, ours: Entry, specs: Iterator[Spec]) -> Figures:
    """Several engines on the one device, all the windows in each, beside the one that has it alone."""
    spec = next(spec for spec in specs if spec.library == "ours")
    share = max(1, plan.n_threads // plan.processes)
    with ExitStack() as stack:
        seats = [stack.enter_context(Seat(share)) for _ in range(plan.processes)]
        for seat in seats:
            seat.ask("load", replace(spec, threads=share))
            seat.ask("run", plan.windows, plan.tokens, ours.setting)
        rounds = [
            (_ask(ours, plan.processes * plan.windows, plan.tokens, ours.setting), _all_at_once(plan, ours, seats))
            for _ in range(plan.rounds)
        ]
    alone, together = zip(*rounds, strict=True)
    windows = plan.processes * plan.windows
    return {
        "processes": plan.processes,
        "windows_per_s": middle([windows / turn["wall_s"] for turn in together]),
        "times_one": quotient(alone, together),
    }


def _all_at_once(plan: Plan, ours: Entry, seats: Sequence[Seat]) -> Figures:
    time.sleep(PAUSE_S)
    start = time.perf_counter()
    for seat in seats:
        seat.begin("run", plan.windows, plan.tokens, ours.setting)
    turns = [seat.answer() for seat in seats]
    return {"wall_s": time.perf_counter() - start, "cpu_s": sum(turn["cpu_s"] for turn in turns)}


def _missing(plan: Plan) -> dict[str, str]:
    from pipeline.engine.contestants import is_installed

    return {library: "not installed" for library in plan.libraries if not is_installed(library)}


def _specs(plan: Plan, missing: Mapping[str, str], checkpoint: str, converted: str | None) -> Iterator[Spec]:
    from pipeline.engine.contestants import Spec

    for library in plan.libraries:
        if library not in missing:
            for dtype in plan.dtypes_of(library):
                yield Spec(library, dtype, checkpoint, converted, plan.device, plan.n_threads, plan.lanes)


def _seated(specs: Iterator[Spec], stack: ExitStack, say: Say) -> list[Entry]:
    """Loads them all, each in its process. Of ours, a dtype that comes to the same as an earlier one is dropped."""
    waiting = []
    for spec in specs:
        seat = stack.enter_context(Seat(spec.threads))
        seat.begin("load", spec)
        waiting.append((spec, seat))
    entries: list[Entry] = []
    for spec, seat in waiting:
        say(f"loading {spec.library} {spec.dtype}")
        entry = Entry(spec.library, spec.dtype, seat)
        try:
            entry.dtype = seat.answer()
        except EngineError as error:
            _note_failure(entry, error)
        if all(entry.name != earlier.name for earlier in entries):
            entries.append(entry)
        else:
            seat.close()
    return entries


# -- the race ------------------------------------------------------------------------------------------------


def _race(plan: Plan, entries: list[Entry], say: Say) -> None:
    for entry in list(entries):
        say(f"{entry.name}: finding its best batch")
        _try(entry, lambda entry=entry: entries.extend(_find_settings(plan, entry)))  # type: ignore[misc]
    entries.sort(key=lambda entry: LIBRARIES.index(entry.library))  # stable: the first of ours stays the first
    for i in range(plan.rounds):
        for entry in entries:
            _try(entry, lambda entry=entry: entry.turns.append(_turn(plan, entry)))  # type: ignore[misc]
        seconds = ", ".join(f"{e.name} {e.turns[-1]['wall_s'] / plan.windows:.3f}" for e in entries if e.raced)
        say(f"round {i + 1} of {plan.rounds}, s a window: {seconds}")


def _try(entry: Entry, work: Callable[[], None]) -> None:
    """What fails drops out with its reason; without ours there is nothing to compare."""
    if entry.error is None:
        try:
            work()
        except EngineError as error:
            _note_failure(entry, error)


def _note_failure(entry: Entry, error: EngineError) -> None:
    if entry.library == "ours":
        raise error
    entry.error = str(error)


def _find_settings(plan: Plan, entry: Entry) -> list[Entry]:
    """Warms it up and tries its batches on as many windows as each takes; keeps the fastest.

    Returns more entries of the same contestant: its second best batch where one try cannot tell which is better, and
    its own call for recordings.
    """
    batches = sorted({min(batch, plan.windows) for batch in plan.batches})
    every: list[Setting] = entry.seat.ask("settings", batches, plan.windows)
    settings = [setting for setting in every if not setting.long_form]
    more = [setting for setting in every if setting.long_form]
    if len(settings) == 1:
        entry.setting = settings[0]
        entry.seat.ask("run", min(plan.windows, entry.setting.batch), min(plan.tokens, 8), entry.setting)
        return [Entry(entry.library, entry.dtype, entry.seat, setting) for setting in more]
    seconds = {setting: _try_setting(plan, entry, setting) for setting in settings}
    entry.sweep = [{"setting": str(setting), "s_per_window": value} for setting, value in seconds.items()]
    entry.setting, second, *_ = sorted(settings, key=lambda setting: seconds[setting])
    more += [second] if seconds[second] < NEARLY * seconds[entry.setting] else []
    return [Entry(entry.library, entry.dtype, entry.seat, setting) for setting in more]


def _try_setting(plan: Plan, entry: Entry, setting: Setting) -> float:
    """Seconds a window, of one try."""
    windows = min(plan.windows, max(4, setting.batch * setting.side_by_side))
    entry.seat.ask("run", windows, 2, setting)
    return float(_ask(entry, windows, plan.tokens, setting)["wall_s"]) / windows


def _turn(plan: Plan, entry: Entry) -> Figures:
    assert entry.setting is not None
    windows = min(plan.windows, FEW_WINDOWS) if entry.setting.long_form else plan.windows
    turn = _ask(entry, windows, plan.tokens, entry.setting)
    factor = to_as_many_tokens(turn, plan.tokens) * plan.windows / windows
    return {**turn, "wall_s": turn["wall_s"] * factor, "cpu_s": turn["cpu_s"] * factor}


def _ask(entry: Entry, windows: int, n_tokens: int, setting: Setting | None) -> Figures:
    time.sleep(PAUSE_S)
    turn: Figures = entry.seat.ask("run", windows, n_tokens, setting)
    return turn


def to_as_many_tokens(turn: Figures, n_tokens: int) -> float:
    """What its time must be multiplied with where it gave another number of tokens: only the decoder's share of it."""
    counts = [len(tokens) for tokens in turn["tokens"]]
    if sum(counts) in (0, n_tokens * len(counts)):
        return 1.0
    stages = turn["stages"]
    share = stages["decoder"] / sum(stages.values()) if stages else 1.0
    return float(1 - share + share * n_tokens * len(counts) / sum(counts))


# -- figures -------------------------------------------------------------------------------------------------


def _entry_figures(plan: Plan, entry: Entry, entries: Sequence[Entry]) -> Figures:
    figures: Figures = {"library": entry.library, "dtype": entry.dtype, "error": entry.error}
    if not entry.raced:
        return figures
    counts = [len(tokens) for turn in entry.turns for tokens in turn["tokens"]]
    seconds = per_window(entry.turns, plan.windows)
    last = entry.turns[-1]
    return {
        **figures,
        "setting": str(entry.setting),
        "s_per_window": seconds,
        "windows_per_s": 1 / seconds["median"],
        "rtfx": WINDOW_S / seconds["median"],
        "cpu_s_per_window": middle([turn["cpu_s"] / plan.windows for turn in entry.turns]),
        "tokens_per_window": {"min": min(counts), "max": max(counts)},
        "same_tokens": _same_tokens(entry, entries),
        "stages_s_per_window": {name: s / plan.windows for name, s in last["stages"].items()},
        "sweep": entry.sweep,
        "rounds_s_per_window": [turn["wall_s"] / plan.windows for turn in entry.turns],
        "peak_rss_mb": round(entry.seat.ask("peak_rss_mb")),
    }


def _same_tokens(entry: Entry, entries: Sequence[Entry]) -> float | None:
    """The share of windows with the tokens of ours in float32, or in our first dtype; None under other rules."""
    ours = [other for other in entries if other.library == "ours"]
    reference = next((other for other in ours if other.dtype == "float32"), ours[0])
    if entry.library == "transformers":
        return None
    theirs = entry.turns[-1]["tokens"]
    pairs = list(zip(theirs, reference.turns[-1]["tokens"][: len(theirs)], strict=True))
    return sum(list(its) == list(mine) for its, mine in pairs) / len(pairs)


def _ratios(entries: Sequence[Entry]) -> dict[str, Figures]:
    """How many times as fast the first of ours is as each library's fastest entry, and as its own call."""
    ratios = {}
    for library in LIBRARIES[1:]:
        raced = [entry for entry in entries if entry.library == library and entry.raced]
        alone = [entry for entry in raced if entry.setting is not None and entry.setting.long_form]
        batched = [entry for entry in raced if entry not in alone]
        if batched:
            best = min(batched, key=lambda entry: median(turn["wall_s"] for turn in entry.turns))
            ratios[library] = _ratio(best, _ours(entries))
        for entry in alone:
            ratios[f"{library}, its own call"] = _ratio(entry, _ours(entries))
    return ratios


def _ratio(theirs: Entry, ours: Entry) -> Figures:
    return {
        "best": f"{theirs.name}, {'one at a time' if str(theirs.setting) == 'alone' else f'batch {theirs.setting}'}",
        "ours_is_faster": quotient(theirs.turns, ours.turns),
    }


def _ours(entries: Sequence[Entry]) -> Entry:
    return next(entry for entry in entries if entry.library == "ours")
