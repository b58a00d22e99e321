"""Inputs whose bytes were replaced since they were read: seen by size and etag, never by reading them.

What a listing says of a file (folders, globs) is always compared with what the ledger noted when it was read. A
manifest's own lines say nothing of the kind: their sources are asked, several at a time, where a recording is only
half done, and of what is done if that is wished.

What is half done and was replaced is begun again, or Units of two different recordings would be put together. What is
done stays, and is named, unless it is wished that it be read again: then none of its Units counts any more, and it is
transcribed as if it were new, once, under the same id. Its row is missing from the tables until then.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.ledger import Ledger
from pipeline.manifest import identity
from pipeline.todo import Listing

log = logging.getLogger(__name__)

_ASKED_AT_ONCE = 32
_NAMED = 5


@dataclass(frozen=True, slots=True)
class Replaced:
    """The recordings, by id, whose bytes are other ones now."""

    begun: tuple[str, ...] = ()
    done: tuple[str, ...] = ()


def find(listed: Listing, ledger: Ledger, *, ask: bool) -> Replaced:
    """Those of `listed` that were replaced; `ask` also the sources of which no listing told, and that are done."""
    known = ledger.recordings()
    begun: list[str] = []
    done: list[str] = []
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        for table in listed.tables():
            was = known.take(pc.index_in(table["id"], known["recording_id"]))
            for recording_id, status in chain(_as_listed(table, was), _as_asked(table, was, ask, pool)):
                (begun if status == "partial" else done).append(recording_id)
    return Replaced(tuple(begun), tuple(done))


def settle(listed: Listing, ledger: Ledger, *, check: bool, dry_run: bool = False) -> None:
    """Find them, say so, and take back what must not count: of what is begun always, of what is done with `check`."""
    found = find(listed, ledger, ask=check)
    if found.begun:
        log.warning("%s, half done: begun again", _named(found.begun))
    if found.done:
        hint = "done again" if check else "what was done stays; --check-inputs does it again"
        log.warning("%s: %s", _named(found.done), hint)
    again = [*found.begun, *(found.done if check else ())]
    if again:
        ledger.read_again(again, dry_run=dry_run)


def _as_listed(table: pa.Table, was: pa.Table) -> Iterator[tuple[str, str]]:
    """(id, status) of those whose listing says other than the ledger; where either says nothing, nothing differs."""
    differs = pc.or_(*(pc.fill_null(pc.not_equal(table[name], was[name]), False) for name in ("size", "etag")))
    return zip(table["id"].filter(differs).to_pylist(), was["status"].filter(differs).to_pylist(), strict=True)


def _as_asked(table: pa.Table, was: pa.Table, ask: bool, pool: ThreadPoolExecutor) -> Iterator[tuple[str, str]]:
    """The same for those of which no listing told."""
    untold = pc.and_(pc.is_null(table["size"]), pc.is_null(table["etag"]))
    noted = pc.or_(pc.is_valid(was["size"]), pc.is_valid(was["etag"]))
    wanted = pc.is_valid(was["status"]) if ask else pc.fill_null(pc.equal(was["status"], "partial"), False)
    rows = pc.and_(pc.and_(untold, noted), wanted)
    now = pool.map(identity, table["uri"].filter(rows).to_pylist())
    columns = (table["id"].filter(rows), *(was[name].filter(rows) for name in ("status", "size", "etag")))
    before_now = (column.to_pylist() for column in columns)
    for (recording_id, status, *before), after in zip(zip(*before_now, strict=True), now, strict=True):
        if any(a is not None and b is not None and a != b for a, b in zip(before, after, strict=True)):
            yield recording_id, status


def _named(ids: tuple[str, ...]) -> str:
    names = ", ".join(ids[:_NAMED]) + (", ..." if len(ids) > _NAMED else "")
    if len(ids) == 1:
        return f"1 recording has other bytes now than when it was read ({names})"
    return f"{len(ids)} recordings have other bytes now than when they were read ({names})"
