"""What a run remembers of its processes: which Unit was in which engine when that died, which source refused.

Ray starts a dead process again and gives it the same work, for ever: a Unit that kills would kill until morning. So
every engine says what it takes and what it has done, and what was in it when it died is suspect: put off, until the
rest is done, and then run alone. A Unit that kills twice alone is failed; one that merely shared a process with it
is none the worse. A node that was lost with its engines accuses nobody.

A source that cannot be read is put off too and tried again last, before it is called failed: and where a store
refuses more than `IN_A_ROW` recordings on end with nothing read in between, the run stops and marks none of them.

One object, held by the driver, asked by all workers. It forgets with the run: what is committed is the ledger's. Knows
neither Ray nor audio.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice

from pipeline.errors import ForbiddenError, SourceError, SourceTimeoutError

UnitKey = tuple[str, int]  # recording id, index
DEFERRED = "deferred"  # the `kind` of a row that only says so: it is not committed

_SOURCE_ERRORS = (ForbiddenError, SourceError, SourceTimeoutError)
LATER = frozenset(error.kind for error in _SOURCE_ERRORS)  # what is tried again when the rest is done
STORE_WIDE = frozenset(error.kind for error in _SOURCE_ERRORS if error.store_wide)
IN_A_ROW = 50  # recordings that a store may refuse one after another
ALONE = 2  # kills, alone in its process, that make a Unit a failed one
BLOCK_DEATHS = 2  # decode processes dead over one recording that make it a failed one
CRASHES = 20  # engine processes dead in a row without one Unit done: it is not the Units


class Verdict(StrEnum):
    """What an engine is to do with a Unit."""

    RUN = "run"
    DEFER = "defer"  # suspect: when the rest is done
    FAIL = "fail"  # it has killed alone, twice


@dataclass(slots=True)
class _Process:
    """An engine, as it is now."""

    node: str
    units: dict[UnitKey, str] = field(default_factory=dict)  # in flight, with their recordings
    alone: bool = False


@dataclass(slots=True)
class _Block:
    """The work of one decode task, while a process is at it."""

    worker: str
    node: str
    recording: str | None = None  # the id that it is at, where it says so
    deaths: int = 0


@dataclass(slots=True)
class _Source:
    """A store, as its recordings have found it."""

    refusals: int = 0  # in a row, of one kind
    kind: str | None = None
    known_good: str | None = None  # a recording that could be read, as JSON


class Census:
    """See the head of this file. `alive` gives the ids of the nodes that are up."""

    def __init__(self, alive: Callable[[], Collection[str]]) -> None:
        self._alive = alive
        self._engines: dict[str, _Process] = {}
        self._suspects: dict[UnitKey, str] = {}
        self._kills: Counter[UnitKey] = Counter()  # alone
        self._crashes = 0  # in a row
        self._blocks: dict[str, _Block] = {}
        self._decode_deaths: Counter[str] = Counter()
        self._sources: dict[str, _Source] = {}
        self._refused: dict[str, None] = {}  # recordings as JSON, in order
        self._refusing: set[str] = set()  # their stores

    # ---- engines

    def born(self, engine: str, node: str) -> bool:
        """A process of this engine has started on `node`. What its predecessor had in flight is suspect, unless its
        node went down with it. Returns whether to go on: False when engines die whatever they are given."""
        before = self._engines.get(engine)
        self._engines[engine] = _Process(node)
        if before is None or before.node not in self._alive():
            return True
        self._crashes += 1
        self._suspects |= before.units
        if before.alone:
            self._kills.update(before.units.keys())
        return self._crashes <= CRASHES

    def take(self, engine: str, units: Sequence[tuple[UnitKey, str]], alone: bool) -> list[Verdict]:
        """What to do with each of these Units (its key and its recording as JSON), which are in flight from now on.

        `alone`: the engine runs one at a time now, so that a death says who was it.
        """
        process = self._engines.setdefault(engine, _Process(node=""))  # unknown, if this is a census started anew
        process.alone = alone
        verdicts = [self._verdict(key, alone) for key, _ in units]
        process.units |= {key: it for (key, it), verdict in zip(units, verdicts, strict=True) if verdict == Verdict.RUN}
        return verdicts

    def done(self, engine: str, units: Iterable[UnitKey]) -> None:
        """These Units have ended, well or not, and their engine lives."""
        self._crashes = 0
        for key in units:
            self._engines[engine].units.pop(key, None)
            if self._engines[engine].alone:
                self._suspects.pop(key, None)

    def _verdict(self, key: UnitKey, alone: bool) -> Verdict:
        if self._kills[key] >= ALONE:
            self._suspects.pop(key, None)
            return Verdict.FAIL
        return Verdict.DEFER if key in self._suspects and not alone else Verdict.RUN

    # ---- decoding

    def opened(self, block: str, worker: str, node: str) -> int:
        """A process begins (or begins again) with a block, named by its first recording; returns how many have died
        over it."""
        before = self._blocks.get(block)
        deaths = before.deaths if before else 0
        if before is not None and before.worker != worker and before.node in self._alive():
            deaths += 1
            if before.recording is not None:
                self._decode_deaths[before.recording] += 1
        self._blocks[block] = _Block(worker, node, deaths=deaths)
        return deaths

    def is_deadly(self, block: str, recording: str) -> bool:
        """Said before each recording (by its id) of a block over which a process has died: whether it is the one."""
        if self._decode_deaths[recording] >= BLOCK_DEATHS:
            return True
        self._blocks[block].recording = recording
        return False

    def closed(self, block: str, read: Iterable[tuple[str, str]]) -> None:
        """The block is done; `read`: one recording (as JSON) of each store from which one could be read."""
        self._blocks.pop(block, None)
        for store, recording in read:
            self.answered(store, recording)

    # ---- sources

    def answered(self, store: str, recording: str) -> None:
        """This recording (as JSON) could be read: whatever a store refused before, it does answer."""
        self._sources[store] = _Source(known_good=recording)

    def refused(self, store: str, recording: str, kind: str) -> bool:
        """This recording (as JSON) could not be read, and is put off. Returns whether to go on: False where the store
        has refused too many in a row, all with an error of this kind."""
        self._refused[recording] = None
        self._refusing.add(store)
        source = self._sources.setdefault(store, _Source())
        source.refusals = source.refusals + 1 if kind == source.kind else 1
        source.kind = kind
        return kind not in STORE_WIDE or source.refusals <= IN_A_ROW

    # ---- the driver

    def put_off(self, start: int, stop: int) -> list[str]:
        """Recordings, as JSON, whose source failed: a part of them, for they may be all of a large manifest."""
        return list(islice(self._refused, start, stop))

    def suspects(self) -> list[str]:
        """Recordings, as JSON, with Units that were in an engine when it died."""
        return list(dict.fromkeys(self._suspects.values()))

    def known_good(self) -> dict[str, str]:
        """By store that has refused some in this pass, a recording (as JSON) that it gave, if it gave any."""
        sources = ((name, self._sources[name].known_good) for name in self._refusing)
        return {name: recording for name, recording in sources if recording is not None}

    def next_pass(self) -> None:
        """What was put off because of its source comes up now."""
        self._refused.clear()
        self._refusing.clear()
        self._blocks.clear()
        for source in self._sources.values():
            source.refusals = 0
