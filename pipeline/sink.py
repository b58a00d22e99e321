"""The end of the dataflow: what reaches it is committed inside `write()`, in the worker that holds it.

Not at the end of the dataset, as Ray's own sinks do: what was written when a driver is killed stays written. What a
commit is, the ledger says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from ray.data.block import BlockAccessor
from ray.data.datasource import Datasink

from pipeline.census import DEFERRED
from pipeline.ledger import Committed, commit
from pipeline.schema import UNITS, conform
from pipeline.store import Store


class LedgerSink(Datasink[Committed]):  # type: ignore[misc]  # ray's types are not followed
    """Commits what reaches it, every write on its own. `write_returns` holds one `Committed` a write.

    `rows_per_write` is how many Units Ray gathers for one write: 1 loses least to a kill, more make fewer objects.
    `count` is told after each write how many Units it committed and the seconds that took.
    """

    def __init__(
        self,
        store: Store,
        n_shards: int,
        *,
        round: int = 0,
        rows_per_write: int | None = None,
        between: Callable[[pa.Table], None] | None = None,
        count: Callable[[int, float], None] | None = None,
    ) -> None:
        self._store, self._n_shards, self._round = store, n_shards, round
        self._rows_per_write, self._between, self._count = rows_per_write, between, count

    def write(self, blocks: Iterable[Any], ctx: Any) -> Committed:
        """Commit all rows of `blocks` as one data object."""
        accessors = (BlockAccessor.for_block(block) for block in blocks)
        tables = [conform(one.to_arrow(), UNITS) for one in accessors if one.num_rows()]
        table = _ended(pa.concat_tables([UNITS.empty_table(), *tables]))
        began = time.monotonic()
        done = commit(self._store, table, self._n_shards, round=self._round, between=self._between)
        if self._count is not None:
            self._count(done.units, time.monotonic() - began)
        return done

    @property
    def min_rows_per_write(self) -> int | None:
        return self._rows_per_write


def _ended(units: pa.Table) -> pa.Table:
    """Those of `units` that have ended: what is only put off stays to do."""
    deferred = pc.equal(pc.struct_field(units["failure"], "kind"), DEFERRED)
    return units.filter(pc.invert(pc.fill_null(deferred, False)))
