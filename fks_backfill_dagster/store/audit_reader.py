"""The queries of an audit: every candle of a series and its records, in one snapshot.

One pass over the candles, in blocks of bounded memory, reads their opens and whether any candle of the block
breaks a rule or has no lineage; only then a second query finds which ones. The opens of a block are one array,
the fastest form measured (docs/adr/0014-an-audit-of-its-own.md).

Does not belong here: the comparison (`ledger.reconcile`), the repair (`writer.repair`). Apart from the grid,
nothing that the writer computes with is used here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa

from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import to_datetime, to_micros
from fks_backfill_dagster.ledger.reconcile import Flaw, Kind, Recorded, Seen, SeriesAudit, reconcile
from fks_backfill_dagster.ledger.reconcile_days import ByDay, with_days
from fks_backfill_dagster.store.copy_format import decode_array
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.driver import cursor_of
from fks_backfill_dagster.store.ledger import from_multirange, gap_of, series_id
from fks_backfill_dagster.store.sanity import GOOD
from fks_backfill_dagster.store.sql import table_of

# Candles per block of a market that never closes: some MB here and in the server. Doubling or halving it
# makes no measurable difference.
_BLOCK = 200_000

Clock = Callable[[], int]

_NONE = np.empty(0, dtype=np.int64)


def examine(database: Database, series: Series, grid: Grid, clock: Clock) -> SeriesAudit | None:
    """Reads one series and changes nothing; None where it is not stored.

    All of it in one snapshot: a concurrent commit is either fully visible or not at all.
    """
    with database.snapshot() as connection:
        return examine_within(connection, series, grid, clock)


def examine_within(connection: sa.Connection, series: Series, grid: Grid, clock: Clock) -> SeriesAudit | None:
    """Like `examine`, in the caller's transaction, during which the series must not change.

    `clock` is read after the transaction's snapshot is taken, so that every candle stored as closed is closed.
    """
    _plan_for_scans(connection)
    identity = series_id(connection, series)
    if identity is None:
        return None
    recorded, by_day = _recorded(connection, identity)
    closed_end = grid.closed_end(clock())
    seen = _seen(connection, series, identity, grid, closed_end)
    return with_days(reconcile(series, grid, recorded, seen, closed_end), recorded.gaps, by_day, grid)


def _plan_for_scans(connection: sa.Connection) -> None:
    # Parallel workers and compiled queries cost more than they save for blocks of this size. A generic plan
    # would search the list of batches once per candle; a custom plan hashes it.
    connection.execute(
        sa.text(
            "SET LOCAL max_parallel_workers_per_gather = 0; SET LOCAL jit = off;"
            " SET LOCAL plan_cache_mode = force_custom_plan"
        )
    )


# Records ------------------------------------------------------------------------------------------------


def _recorded(connection: sa.Connection, identity: int) -> tuple[Recorded, ByDay]:
    """The records of a series, and the missing candles of its gaps by day."""
    named = {"id": identity}
    state = connection.execute(
        sa.text("SELECT * FROM fks.sync_state WHERE series_id = :id"), named
    ).one_or_none()
    gaps = connection.execute(
        sa.text("SELECT * FROM fks.gap WHERE series_id = :id AND status <> 'filled' ORDER BY gap_start"),
        named,
    ).all()
    # now() is the start of the transaction: a lease renewed while the candles are read counts as live.
    leases = connection.scalar(
        sa.text("SELECT count(*) FROM fks.lease WHERE series_id = :id AND expires_at < now()"), named
    )
    recorded = Recorded(
        exists=state is not None,
        synced=from_multirange(state.synced) if state else RangeSet(),
        total=state.total_candles if state else 0,
        oldest=_micros(state.oldest) if state else None,
        newest=_micros(state.newest) if state else None,
        gaps=tuple(gap_of(row) for row in gaps),
        expired_leases=leases or 0,
    )
    return recorded, {gap.start: row.by_day for gap, row in zip(recorded.gaps, gaps, strict=True)}


def _micros(moment: Any) -> int | None:
    return None if moment is None else to_micros(moment)


# Candles ------------------------------------------------------------------------------------------------

_SUSPECT = f"NOT ({GOOD}) OR batch_id <> ALL(%(batches)s::int[])"

_OPENS = (
    f"SELECT array_send(array_agg(ts)), count(*) FILTER (WHERE {_SUSPECT}) FROM {{table}}"
    " WHERE series_id = %(id)s AND ts >= %(start)s AND ts < %(end)s"
)

# The batches that can have delivered candles of the block. A candle of any other batch is suspect, and its
# lineage is looked up.
_BATCHES = """
SELECT coalesce(array_agg(id), '{}') FROM fks.batch
WHERE series_id = :id AND committed_at < 'infinity' AND range_start < :end AND range_end > :start
"""

_FLAWS = f"""
SELECT f.kind, f.batch_id, b.provider, f.candles, f.first, f.last FROM (
    SELECT k.kind, c.batch_id, count(*) AS candles, min(c.ts) AS first, max(c.ts) AS last
    FROM {{table}} c
    CROSS JOIN LATERAL (VALUES
        ('{Kind.BROKEN_RULE}', NOT ({GOOD})),
        ('{Kind.NO_LINEAGE}', NOT EXISTS (SELECT FROM fks.batch l
            WHERE l.id = c.batch_id AND l.series_id = :id AND l.committed_at < 'infinity')),
        ('{Kind.OFF_GRID}', ts = ANY(CAST(:astray AS timestamptz[]))),
        ('{Kind.UNCLOSED}', ts >= :closed_end)) k(kind, is_so)
    WHERE c.series_id = :id AND c.ts >= :start AND c.ts < :end AND k.is_so
    GROUP BY 1, 2) f
LEFT JOIN fks.batch b ON b.id = f.batch_id
ORDER BY f.first, f.kind
"""


@dataclass(frozen=True, slots=True)
class _Block:
    """The opens of one block, ascending, and whether any of its candles breaks a rule or has no lineage."""

    window: TimeRange
    opens: Instants
    suspect: bool


def _seen(connection: sa.Connection, series: Series, identity: int, grid: Grid, closed_end: int) -> Seen:
    table = table_of(series.timeframe)
    candles, oldest, newest = 0, None, None
    runs: list[RangeSet] = []
    flaws: dict[tuple[Kind, int], Flaw] = {}
    for block in _blocks(connection, series, identity, table):
        opens = block.opens
        if not len(opens):
            continue
        candles += len(opens)
        oldest, newest = int(opens[0]) if oldest is None else oldest, int(opens[-1])
        fits = grid.contains(opens)
        closed = opens < closed_end
        runs.append(_runs(grid.rank(opens[fits & closed])))
        if block.suspect or not fits.all() or not closed[-1]:
            for flaw in _flaws(connection, identity, table, block, opens[~fits], closed_end):
                known = flaws.get((flaw.kind, flaw.batch))
                flaws[flaw.kind, flaw.batch] = flaw if known is None else _sum(known, flaw)
    stored = RangeSet.from_arrays(
        np.concatenate([_NONE, *(r.starts for r in runs)]), np.concatenate([_NONE, *(r.ends for r in runs)])
    )
    return Seen(candles, oldest, newest, stored, tuple(flaws.values()))


def _blocks(connection: sa.Connection, series: Series, identity: int, table: str) -> Iterator[_Block]:
    ends = connection.execute(
        sa.text(f"SELECT min(ts) AS first, max(ts) AS last FROM {table} WHERE series_id = :id"),
        {"id": identity},
    ).one()
    if ends.first is None:
        return
    first, past = to_micros(ends.first), to_micros(ends.last) + 1
    step = _BLOCK * series.timeframe.micros
    for start in range(first, past, step):
        window = TimeRange(start, min(start + step, past))
        named = _named(identity, window)
        batches = connection.scalar(sa.text(_BATCHES), named) or []
        with cursor_of(connection) as cursor:
            query = _OPENS.format(table=table)
            row = cursor.execute(query, named | {"batches": batches}, binary=True).fetchone()
        assert row is not None
        yield _Block(window, _ascending(decode_array(row[0])), row[1] > 0)


def _named(identity: int, window: TimeRange) -> dict[str, Any]:
    return {"id": identity, "start": to_datetime(window.start), "end": to_datetime(window.end)}


def _ascending(opens: Instants) -> Instants:
    """Sorted. An index scan returns them sorted; checking that is cheaper than an ORDER BY on the server."""
    return opens if bool((opens[1:] > opens[:-1]).all()) else np.sort(opens)


def _runs(ranks: Instants) -> RangeSet:
    """Ascending integers as runs of consecutive ones."""
    jumps = np.flatnonzero(np.diff(ranks) != 1)
    return RangeSet.from_arrays(
        np.concatenate([ranks[:1], ranks[jumps + 1]]), np.concatenate([ranks[jumps] + 1, ranks[-1:] + 1])
    )


def _flaws(
    connection: sa.Connection, identity: int, table: str, block: _Block, astray: Instants, closed_end: int
) -> Iterator[Flaw]:
    rows = connection.execute(
        sa.text(_FLAWS.format(table=table)),
        _named(identity, block.window)
        | {
            "astray": [to_datetime(ts) for ts in astray.tolist()],
            "closed_end": to_datetime(closed_end),
        },
    )
    for row in rows:
        first, last = to_micros(row.first), to_micros(row.last)
        yield Flaw(Kind(row.kind), row.batch_id, row.provider, row.candles, first, last)


def _sum(one: Flaw, later: Flaw) -> Flaw:
    return Flaw(
        one.kind, one.batch, one.provider, one.candles + later.candles, one.first, max(one.last, later.last)
    )
