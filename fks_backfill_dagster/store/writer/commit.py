"""One transaction per batch: candles and everything that must change together with them.

Under the advisory lock of its series: candles, lineage, revisions, gap ledger, coverage, totals, quarantine and
corporate actions. A killed process leaves the state of the last commit; two processes on one series wait for each
other, and the second one finds nothing to change.
"""

from __future__ import annotations

import logging

import numpy as np

from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import RangeSet
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.ledger.settle import (
    settle,
    surroundings,
)
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import repeated
from fks_backfill_dagster.store.ledger import known_around
from fks_backfill_dagster.store.writer.actions import write_actions
from fks_backfill_dagster.store.writer.candles import (
    Dated,
    merge_deliveries,
    refuse_misplaced,
    withdraw,
    write_candles,
)
from fks_backfill_dagster.store.writer.findings import mark_corrected
from fks_backfill_dagster.store.writer.ledger import (
    cover,
    recount,
    still_missing,
    with_known_rejections,
    write_gaps,
    write_rejected,
)
from fks_backfill_dagster.store.writer.lineage import drop_idle, lock, open_batch, stamp, volumes
from fks_backfill_dagster.store.writer.records import BatchWrite, Committed

_log = logging.getLogger(__name__)


@repeated
def commit_batch(
    database: Database, series: Series, identity: int, write: BatchWrite, grid: Grid
) -> Committed:
    """Writes one batch atomically. Committing the same batch twice changes nothing.

    A batch whose connection is lost is therefore committed again. If it was lost between the commit and its
    confirmation, the result is that of the second commit, which found nothing to change.

    Raises ValueError for candles that the batch may not hold: the ledger would stay wrong permanently.
    """
    deliveries = tuple(d for d in write.deliveries if len(d.candles))
    withdrawals = tuple(w for w in write.withdrawn if len(w.opens))
    with database.begin() as connection:
        lock(connection, identity)
        before = known_around(connection, identity, surroundings(write.window, grid))
        batch_ids = [open_batch(connection, identity, d, write.run_id, grid) for d in deliveries]
        rows, row_batches = merge_deliveries(deliveries, batch_ids)
        refuse_misplaced(rows.ts, write.window, grid)
        dated = Dated.of(deliveries, batch_ids)
        written = write_candles(connection, series, identity, rows, row_batches, dated)
        inserted = written.inserted
        gone, gone_by = withdraw(connection, series, identity, withdrawals, rows.ts, write, grid)
        missing = np.union1d(still_missing(before, write.window, rows.ts, grid), gone)
        responses = with_known_rejections(connection, identity, write, grid)
        settlement = settle(
            before.gaps, write.window, missing, rows.ts, responses, grid, before.synced, write.rules
        )
        write_gaps(connection, identity, settlement, grid)
        write_rejected(connection, identity, write.rejected)
        cover(connection, identity, RangeSet([write.window]), sum(inserted.values()), rows.ts)
        for reported in write.actions:
            write_actions(connection, series.instrument, reported, write.priority)
        if len(gone):
            recount(connection, identity, series, -len(gone))
        changed = written.updated | gone_by
        opened = [*batch_ids, *gone_by]
        mark_corrected(connection, identity, list(changed))
        useful = [batch for batch in opened if inserted.get(batch) or changed.get(batch)]
        drop_idle(connection, [batch for batch in opened if batch not in useful])
        stamp(connection, useful, inserted, changed, volumes(rows, row_batches, inserted))
    done = written.committed(len(missing), withdrawn=len(gone))
    _log.debug(
        "%s %s: %d candles inserted, %d updated, %d missing",
        *(series, write.window, done.inserted, done.updated, done.missing),
    )
    return done
