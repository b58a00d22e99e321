"""Remove what nobody needs: orphans of killed writers, what a snapshot stands for, what was superseded.

The reasons why nothing here can lose a row are at the head of `pipeline.ledger`. In this order, so that it may be
killed between any two steps and run again:

    void what no ledger object names  →  pin two snapshots  →  remove ledger objects  →  data objects  →  the rest

Nothing is decided by a clock. What looks like an orphan is looked at twice, `PATIENCE_S` apart, only to spare the work
of processes that outlive their driver by some seconds: voiding it is safe at any time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any

from pipeline.errors import StoreError
from pipeline.lease import FINALIZE_LEASE, PATIENCE_S, RUN_LEASE, Lease
from pipeline.ledger import SNAPSHOTS, Ledger, ledger_path, read_whole_snapshot, snapshot_path
from pipeline.output import INPUTS, LEDGER, PROBE, Output, newest_inputs, number
from pipeline.pieces import DATA, data_path
from pipeline.store import Store
from pipeline.todo import FOLDER as TODO
from pipeline.void import void


@dataclass(frozen=True, slots=True)
class Rubbish:
    """What can go, by why."""

    orphans: frozenset[str] = frozenset()  # names of data objects that no ledger object names
    half_written: frozenset[str] = frozenset()  # names of ledger objects that do not parse
    in_snapshot: frozenset[str] = frozenset()  # names of ledger objects that the snapshot stands for
    superseded: frozenset[str] = frozenset()  # names of data objects that were merged, or lost to other attempts
    snapshots: tuple[str, ...] = ()  # paths of all but the newest two
    inputs: tuple[str, ...] = ()  # paths of lists before the newest
    probes: tuple[str, ...] = ()  # paths
    todo: tuple[str, ...] = ()  # paths of what drivers that were killed had still to do

    @property
    def strangers(self) -> frozenset[str]:
        """What a writer that still lives may have put."""
        return self.orphans | self.half_written

    def to_json(self) -> dict[str, Any]:
        return {field.name: len(getattr(self, field.name)) for field in fields(self)}

    def words(self) -> Iterator[str]:
        """What a person is told: how many of what there is."""
        for name, count in self.to_json().items():
            if count:
                yield f"{count} {_WORDS[name]}"


_WORDS = {
    "orphans": "of data that no ledger names",
    "half_written": "half written",
    "in_snapshot": "of the ledger that its snapshot holds too",
    "superseded": "of superseded data",
    "snapshots": "old snapshots",
    "inputs": "old lists of inputs",
    "probes": "probes of writing",
    "todo": "lists of what was to do",
}


def clean(output: Output, *, dry_run: bool = False, sleep: Callable[[float], None] = time.sleep) -> Rubbish:
    """Remove it, or with `dry_run` only look, and return what that was.

    Raises `OutputHeldError` where a live driver or finalize holds the output, unless it only looks.
    """
    if dry_run:
        return look(Ledger.read(output.store, output.run.n_shards))
    with ExitStack() as stack:
        leases = [stack.enter_context(Lease.acquire(output.store, name)) for name in (RUN_LEASE, FINALIZE_LEASE)]
        ledger = Ledger.read(output.store, output.run.n_shards)
        found = look(ledger)
        strangers = found.strangers - ledger.void.data
        if strangers:
            sleep(PATIENCE_S)
            found = look(ledger)
            strangers &= found.strangers
            _check(leases)
            void(output.store, "removed", data=[name for name in strangers if _is_unnamed(ledger, name)])
        if found.in_snapshot or found.superseded:
            ledger.refresh()
            covered = _pin_twice(ledger)
            found = look(ledger)  # and what was committed since is in no snapshot yet
            found = replace(found, in_snapshot=found.in_snapshot & covered, superseded=found.superseded & covered)
        sure = ledger.void.read(output.store).data
        found = replace(found, orphans=found.orphans & sure, half_written=found.half_written & sure)
        _check(leases)
        _remove(output.store, found)
        return found


def look(ledger: Ledger) -> Rubbish:
    """All that could go, brought up to what is there now."""
    store = ledger.store
    data = _stems(store, DATA, ".arrow")
    ledger.refresh()  # after the listing: what was committed meanwhile is named by now
    named = _stems(store, LEDGER, ".json")
    needed = set(ledger.winners["data"].unique().to_pylist())
    newest = newest_inputs(store)
    return Rubbish(
        orphans=frozenset(data - named - needed),
        half_written=frozenset(ledger.half),
        in_snapshot=ledger.covered() & named,
        superseded=frozenset(data & named - needed - ledger.half),
        snapshots=tuple(_superseded_snapshots(store)),
        inputs=tuple(f"{INPUTS}/{n}" for n in sorted(store.sizes(INPUTS)) if newest and f"{INPUTS}/{n}" < newest),
        probes=tuple(f"_run/{name}" for name in sorted(store.sizes("_run")) if name.startswith(PROBE)),
        todo=tuple(f"{TODO}/{name}" for name in sorted(store.sizes(TODO))),
    )


def _is_unnamed(ledger: Ledger, name: str) -> bool:
    """Asked of the object itself: a listing may lag behind."""
    return name in ledger.half or ledger.store.get(ledger_path(name)) is None


def _pin_twice(ledger: Ledger) -> frozenset[str]:
    """Two snapshots that say the same, for one that is damaged later costs nothing; the ledger objects in them."""
    first = ledger.pin()
    second = ledger.pin(again=True)
    covered = ledger.covered()
    one, other = (read_whole_snapshot(ledger.store, number) for number in (first, second))
    if one is None or other is None or not one.equals(other):
        raise StoreError(f"{ledger.store}: snapshots {first} and {second} differ; nothing was removed, try again")
    return covered


def _superseded_snapshots(store: Store) -> Iterator[str]:
    """All before the newest two that can be read; half a one between them stays for now."""
    numbers = sorted((n for n in map(number, store.sizes(SNAPSHOTS)) if n > 0), reverse=True)
    whole = list(islice((n for n in numbers if read_whole_snapshot(store, n) is not None), 2))
    return (snapshot_path(n) for n in numbers if len(whole) == 2 and n < whole[1])


def _remove(store: Store, found: Rubbish) -> None:
    """Names before what they name: killed in between, this leaves orphans and nothing worse."""
    store.delete_all(map(ledger_path, sorted(found.half_written | found.in_snapshot)))
    store.delete_all(map(data_path, sorted(found.strangers | found.superseded)))
    store.delete_all([*found.snapshots, *found.inputs, *found.probes, *found.todo])


def _check(leases: list[Lease]) -> None:
    for lease in leases:
        lease.check()


def _stems(store: Store, folder: str, suffix: str) -> set[str]:
    return {name.removesuffix(suffix) for name in store.sizes(folder) if name.endswith(suffix)}
