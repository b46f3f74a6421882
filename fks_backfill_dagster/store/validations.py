"""Validations: who delivered the candles to compare, and the record of each comparison.

Belongs here: the rows of `fks.validation`, and the lineage that a validation needs. Does not belong here: the
comparison (`domain.comparison`), its conduct (`pipeline.validate`).
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import Timeframe, to_datetime, to_micros
from fks_backfill_dagster.store import schema
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import repeated
from fks_backfill_dagster.store.sql import named, table_of


@dataclass(frozen=True, slots=True)
class Delivered:
    """The candles of a window that a provider delivered for an instrument: their number, the first and the last open.

    instrument: None where the lineage does not name it.
    """

    provider: str
    instrument: str | None
    candles: int
    first: int
    last: int


@repeated
def delivered(database: Database, series: Series, window: TimeRange) -> tuple[Delivered, ...]:
    """The stored candles that open in `window` by provider and instrument, the largest share first; one statement."""
    query = sa.text(
        "SELECT b.provider, b.instrument, sum(n.candles)::bigint AS candles, min(n.first) AS first,"
        "   max(n.last) AS last"
        " FROM (SELECT c.batch_id, count(*) AS candles, min(c.ts) AS first, max(c.ts) AS last"
        f"   FROM {table_of(series.timeframe)} c JOIN fks.series s ON s.id = c.series_id"
        "   WHERE s.symbol = :symbol AND s.timeframe = :timeframe AND c.ts >= :start AND c.ts < :end"
        "   GROUP BY c.batch_id) n"
        " JOIN fks.batch b ON b.id = n.batch_id GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2"
    )
    bounds = {"start": to_datetime(window.start), "end": to_datetime(window.end)}
    with database.begin() as connection:
        rows = connection.execute(query, named(series) | bounds).all()
    return tuple(
        Delivered(row.provider, row.instrument, row.candles, to_micros(row.first), to_micros(row.last))
        for row in rows
    )


@dataclass(frozen=True, slots=True)
class ValidationRecord:
    """The verdict of a validation.

    compared: stored candles that were compared, at the timeframe `compared_at`, of `stored` in the window.
    discrepancies: prices beyond their tolerance. providers: those whose candles were compared. validated_at:
    microseconds.
    """

    window: TimeRange
    stored: int
    compared: int
    compared_at: Timeframe
    discrepancies: int
    providers: tuple[str, ...]
    tolerance: float
    validated_at: int

    def __post_init__(self) -> None:
        if not (self.compared and self.providers):
            raise ValueError("a validation that compared nothing has no verdict to record")


@repeated
def record(database: Database, series: Series, verdict: ValidationRecord) -> None:
    """Adds the record of a validation, once; none for a series that was removed meanwhile."""
    table = schema.validation
    with database.begin() as connection:
        identity = connection.execute(
            sa.select(schema.series.c.id)
            .where(
                schema.series.c.symbol == series.symbol, schema.series.c.timeframe == series.timeframe.value
            )
            .with_for_update(key_share=True)
        ).scalar()
        if identity is None:
            return
        connection.execute(
            insert(table)
            .values(
                series_id=identity,
                start_ts=to_datetime(verdict.window.start),
                end_ts=to_datetime(verdict.window.end),
                stored=verdict.stored,
                compared=verdict.compared,
                compared_at=verdict.compared_at.value,
                discrepancies=verdict.discrepancies,
                providers=list(verdict.providers),
                tolerance=verdict.tolerance,
                validated_at=to_datetime(verdict.validated_at),
            )
            .on_conflict_do_nothing()
        )
