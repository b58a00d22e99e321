"""What does not count any more: put once, never taken back, never removed. The ledger says when that is needed.

    _run/void/NAME.json    {"data": [data objects], "recordings": {id: the first round that counts}, "why": ...}

Removed or damaged data objects count for nothing even if a ledger object that names them turns up later, from a
writer that slept. A recording whose audio was replaced is done again in a later round.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.store import Store

log = logging.getLogger(__name__)

VOID = "_run/void"


@dataclass(frozen=True)
class Void:
    """All that the voids of an output say. Never changed: `read` gives another one where there are new ones."""

    data: frozenset[str] = frozenset()  # data objects
    recordings: Mapping[str, int] = field(default_factory=dict)  # id → first round that counts
    names: frozenset[str] = frozenset()  # of the objects that say so

    def read(self, store: Store) -> Void:
        new = [name for name in sorted(store.sizes(VOID)) if name not in self.names]
        data, recordings, names = set(self.data), dict(self.recordings), set(self.names)
        for path, raw in store.get_all(f"{VOID}/{name}" for name in new):
            try:
                said = json.loads(raw or b"")
                data.update(said["data"])
                for recording_id, first in said["recordings"].items():
                    recordings[recording_id] = max(int(first), recordings.get(recording_id, 0))
                names.add(path.rsplit("/", 1)[1])
            except (
                ValueError,
                KeyError,
                TypeError,
                AttributeError,
            ):  # its writer was killed before anything hung on it
                log.warning("%s does not parse: it voids nothing", path)
        return self if names == self.names else Void(frozenset(data), recordings, frozenset(names))

    def without(self, entries: pa.Table) -> pa.Table:
        """Those of `entries` that still count."""
        if self.data:
            entries = entries.filter(pc.invert(pc.is_in(entries["data"], pa.array(list(self.data), pa.string()))))
        if self.recordings:
            entries = entries.combine_chunks()
            rounds = pa.array(list(self.recordings.values()), pa.int32())
            which = pc.index_in(entries["recording_id"], pa.array(list(self.recordings), pa.string()))
            first = pc.fill_null(pc.take(rounds, which), 0)
            entries = entries.filter(pc.greater_equal(entries["round"], first))
        return entries


def void(store: Store, why: str, *, data: Iterable[str] = (), recordings: Mapping[str, int] | None = None) -> None:
    """From now on these data objects count for nothing, and Units of `recordings` only from the given round on."""
    said = {"format": 1, "why": why, "data": sorted(data), "recordings": dict(recordings or {})}
    if said["data"] or said["recordings"]:
        store.put(f"{VOID}/{uuid.uuid4().hex}.json", json.dumps(said, ensure_ascii=False).encode())
