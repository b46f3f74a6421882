"""Corrections by a person: the rows of a file, or of the quarantine, as candles of the database.

    rows ─> check ─> merge with the stored candles, under the lock of the series ─> one commit

They take the same checks and the same kind of commit as candles of a provider (`ingest`), with an author and a reason
in their lineage. Belongs here: the sequence. Does not belong here: reading files (`files`), the rules
(`domain.corrections`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fks_backfill_dagster.domain.closures import Dates, format_dates
from fks_backfill_dagster.domain.corrections import CorrectionRows, check_rows
from fks_backfill_dagster.domain.delivery import MANUAL, Origin, Transport
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.pipeline.plan import GRACE
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.writer.correction import (
    Corrected,
    Correction,
    commit_correction,
    preview_correction,
)


@dataclass(frozen=True, slots=True)
class Statement:
    """Who corrects, why, and by what: the name of a file, or the quarantined rows."""

    author: str
    reason: str
    source: str


def correct(
    database: Database,
    series: Series,
    rows: CorrectionRows,
    statement: Statement,
    now: int,
    *,
    closed_dates: Dates = (),
    released: Sequence[int] = (),
    dry_run: bool = False,
) -> Corrected:
    """Applies a correction completely or not at all; with `dry_run` it only returns what would change.

    `closed_dates`: those of the settings, for a series that is not stored yet. `released`: the ids of the quarantined
    rows that are released. Raises CorrectionError if a row is invalid.
    """
    grid = grid_of(series)
    closed_end = grid.closed_end(now - GRACE)
    given = Correction(
        rows=check_rows(rows, grid, closed_end),
        origin=Origin(
            provider=MANUAL,
            transport=Transport.CORRECTION,
            source=statement.source,
            host="",
            instrument=series.symbol,
            requested_at=now,
            author=statement.author,
            reason=statement.reason,
        ),
        closed_end=closed_end,
        closed=format_dates(closed_dates),
        released=released,
    )
    write = preview_correction if dry_run else commit_correction
    return write(database, series, given, grid)
