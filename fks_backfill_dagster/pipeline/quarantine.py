"""The release of quarantined rows: they are stored as corrections of a person, if no hard rule refuses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fks_backfill_dagster.domain.candles import FIELDS, Candles
from fks_backfill_dagster.domain.corrections import CorrectionRows
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import to_micros
from fks_backfill_dagster.pipeline.corrections import Statement, correct
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.quarantine import QuarantinedRow
from fks_backfill_dagster.store.writer.correction import Corrected


@dataclass(frozen=True, slots=True)
class Released:
    """The release of the rows of one series."""

    series: Series
    ids: tuple[int, ...]
    done: Corrected


def release(
    database: Database, rows: Sequence[QuarantinedRow], author: str, reason: str, now: int
) -> list[Released]:
    """Releases undecided rows, each series in one transaction; all of them are checked before the first is written.

    Raises CorrectionError, whose lines are ids, for rows that break a rule which no person can lift: the grid, closed
    candles, the rules of OHLC. Raises StoreError if a row was decided since it was read.
    """
    groups: dict[Series, list[QuarantinedRow]] = {}
    for row in rows:
        groups.setdefault(row.series, []).append(row)
    for dry_run in (True, False):
        found = [
            _released(database, series, group, author, reason, now, dry_run)
            for series, group in groups.items()
        ]
    return found


def _released(
    database: Database,
    series: Series,
    rows: Sequence[QuarantinedRow],
    author: str,
    reason: str,
    now: int,
    dry_run: bool,
) -> Released:
    ids = tuple(row.id for row in rows)
    named = ", ".join(f"{one.id} ({one.provider}, {one.reason})" for one in rows)
    statement = Statement(author, reason, f"quarantine {named}")
    done = correct(database, series, _as_correction(rows), statement, now, released=ids, dry_run=dry_run)
    return Released(series, ids, done)


def _as_correction(rows: Sequence[QuarantinedRow]) -> CorrectionRows:
    ts = np.array([to_micros(row.ts) for row in rows], dtype=np.int64)
    columns = [np.array([getattr(row, name) for row in rows], dtype=np.float64) for name in FIELDS]
    lines = np.array([row.id for row in rows], dtype=np.int64)
    return CorrectionRows.of(Candles(ts, *columns), frozenset(FIELDS), lines)
