"""Writes a correction by a person: scattered candles, in one transaction, each of them pinned.

    under the lock of the series: stored candles of the rows ─> merge and check (domain.corrections) ─> revisions,
    candles, pins, ledger, coverage, totals

The merge happens under the lock, so that two corrections of one candle are applied one after the other. A fixed number
of statements, whatever the number of candles; look-ups by the key, since the candles of a correction are scattered over
a table that is far too large to be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import sqlalchemy as sa

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.corrections import Changes, CorrectionRows, resolve
from fks_backfill_dagster.domain.delivery import Origin
from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange, inside
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import to_datetime
from fks_backfill_dagster.ledger.settle import settle
from fks_backfill_dagster.store import copy_format
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.driver import cursor_of
from fks_backfill_dagster.store.ledger import from_multirange, known_around, register, series_id
from fks_backfill_dagster.store.sql import table_of
from fks_backfill_dagster.store.writer.candles import Dated, refuse_misplaced, stage, write_staged
from fks_backfill_dagster.store.writer.findings import mark_corrected
from fks_backfill_dagster.store.writer.ledger import cover, still_missing, write_gaps
from fks_backfill_dagster.store.writer.lineage import lock, open_lineage, stamp, volumes
from fks_backfill_dagster.store.writer.quarantine import decide_released


@dataclass(frozen=True, slots=True, eq=False)
class Correction:
    """The input of a correction: checked rows, their origin (author, reason, file), and the end of closed candles.

    closed: the closed dates by which the ledger of a new series is settled. released: the quarantined rows that it
    releases, by id.
    """

    rows: CorrectionRows
    origin: Origin
    closed_end: int
    closed: str = ""
    released: Sequence[int] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Corrected:
    """What a correction changes or has changed. batch: its lineage; None where it has changed nothing."""

    changes: Changes
    batch: int | None


def preview_correction(database: Database, series: Series, given: Correction, grid: Grid) -> Corrected:
    """What `commit_correction` would change now. Raises like it; writes nothing."""
    with database.begin() as connection:
        identity = series_id(connection, series)
        stored = Candles.empty()
        if identity is not None:
            _plan_for_lookups(connection)
            stored = _stored_at(connection, series, identity, given.rows)
        return Corrected(resolve(given.rows, stored, grid, given.closed_end), None)


def commit_correction(database: Database, series: Series, given: Correction, grid: Grid) -> Corrected:
    """Writes a correction completely or not at all; registers the series on first use. One that changes nothing leaves
    no lineage row.

    Raises CorrectionError if a row is invalid, SeriesChanged like a sync.
    """
    with database.begin() as connection:
        identity = register(connection, series, given.closed)
        lock(connection, identity)
        _plan_for_lookups(connection)
        changes = resolve(
            given.rows, _stored_at(connection, series, identity, given.rows), grid, given.closed_end
        )
        batch = None
        if len(changes.after):
            batch = _write(connection, series, identity, changes, given, grid)
        decide_released(connection, given.released, given.origin, batch)
        return Corrected(changes, batch)


def _plan_for_lookups(connection: sa.Connection) -> None:
    """Undoes what `lock` sets for batches of neighbouring candles."""
    connection.execute(sa.text("SET LOCAL enable_nestloop = on; SET LOCAL jit = off"))


def _stored_at(connection: sa.Connection, series: Series, identity: int, rows: CorrectionRows) -> Candles:
    """The stored candles at the opens of the valid rows, ascending."""
    table = table_of(series.timeframe)
    wanted = rows.candles.take(rows.valid).sorted()
    if not len(wanted):
        return Candles.empty()
    stage(connection, table, identity, wanted, np.zeros(len(wanted), dtype=np.int32))
    with cursor_of(connection) as cursor:
        cursor.execute("ANALYZE staged_candles")  # without it the planner takes it for a small table
        query = (
            "SELECT c.ts, c.open, c.high, c.low, c.close, coalesce(c.volume, 'NaN')"
            f" FROM staged_candles s JOIN {table} c"
            " ON c.series_id = %(id)s AND c.ts = s.ts ORDER BY c.ts"
        )
        with cursor.copy(f"COPY ({query}) TO STDOUT (FORMAT BINARY)", {"id": identity}) as copy:
            found = copy_format.decode(copy)
        cursor.execute("TRUNCATE staged_candles")
    return found


def _write(
    connection: sa.Connection, series: Series, identity: int, changes: Changes, given: Correction, grid: Grid
) -> int:
    """Returns the id of the lineage row."""
    rows, table = changes.after, table_of(series.timeframe)
    whole = TimeRange(int(rows.ts[0]), int(rows.ts[-1]) + 1)
    refuse_misplaced(rows.ts, whole, grid)
    batch = open_lineage(
        connection, identity, given.origin, given.origin.transport.value, rows.ts, None, grid
    )
    origins = np.full(len(rows), batch, dtype=np.int32)
    stage(connection, table, identity, rows, origins)
    connection.execute(sa.text("ANALYZE staged_candles"))
    reach = {"id": identity, "first": to_datetime(whole.start), "last": to_datetime(whole.end)}
    reason = given.origin.reason or ""
    written = write_staged(connection, table, reach, Dated([], [], []), reason=reason, by_person=True)
    _pin(connection)
    mark_corrected(connection, identity, [batch])
    _settle(connection, identity, rows.ts[changes.is_new], grid)
    stamp(connection, [batch], written.inserted, written.updated, volumes(rows, origins, written.inserted))
    return batch


def _pin(connection: sa.Connection) -> None:
    connection.execute(
        sa.text(
            "INSERT INTO fks.pin (series_id, ts, batch_id) SELECT series_id, ts, batch_id FROM staged_candles"
        )
    )


def _settle(connection: sa.Connection, identity: int, inserted: Instants, grid: Grid) -> None:
    """Ledger, coverage and totals after these candles were inserted; updated ones change none of them.

    History that was never synced stays pending, on either side of an inserted candle; candles after the end of the
    coverage extend it, since a series is kept up to date from there on: those in between are an open gap.
    """
    if not len(inserted):
        return
    runs = _runs(inserted, grid)
    synced = _coverage(connection, identity)
    beyond = RangeSet()
    if synced and int(runs.ends[-1]) > synced.hull.end:
        beyond = RangeSet([TimeRange(synced.hull.end, int(runs.ends[-1]))])
    for part in (synced | beyond) & RangeSet([(runs | beyond).hull]):
        here = inside(inserted, part)
        if not len(here):
            continue
        before = known_around(connection, identity, part)
        missing = still_missing(before, part, here, grid)
        write_gaps(
            connection, identity, settle(before.gaps, part, missing, here, (), grid, before.synced), grid
        )
    cover(connection, identity, runs | beyond, len(inserted), inserted)


def _coverage(connection: sa.Connection, identity: int) -> RangeSet:
    query = "SELECT synced FROM fks.sync_state WHERE series_id = :id"
    return from_multirange(connection.scalar(sa.text(query), {"id": identity}))


def _runs(opens: Instants, grid: Grid) -> RangeSet:
    """The ranges of ascending expected opens: each run of neighbours in the grid is one."""
    ranks = grid.rank(opens)
    first = np.concatenate([[True], np.diff(ranks) != 1])
    last = np.concatenate([first[1:], [True]])
    return RangeSet.from_arrays(opens[first], grid.closes(opens[last]))


def release_pins(database: Database, series: Series, start: int | None = None, end: int | None = None) -> int:
    """Releases the pinned candles that open in `[start, end)`; returns their number. Their values stay until a source
    gives others."""
    with database.begin() as connection:
        identity = series_id(connection, series)
        if identity is None:
            return 0
        lock(connection, identity)
        _plan_for_lookups(connection)
        named = {
            "id": identity,
            "start": None if start is None else to_datetime(start),
            "end": None if end is None else to_datetime(end),
        }
        return connection.scalar(sa.text(_RELEASE.format(table=table_of(series.timeframe))), named) or 0


# Pins of former corrections of the same candle are released with it: an undo must not pin what was released.
_RELEASE = """
WITH released AS (
    UPDATE fks.pin SET released_at = clock_timestamp()
    WHERE series_id = :id AND released_at IS NULL
      AND ts >= coalesce(CAST(:start AS timestamptz), '-infinity')
      AND ts < coalesce(CAST(:end AS timestamptz), 'infinity')
    RETURNING ts, batch_id
)
SELECT count(*) FROM released p JOIN {table} c ON c.series_id = :id AND c.ts = p.ts AND c.batch_id = p.batch_id
"""
