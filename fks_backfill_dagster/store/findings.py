"""The ledger of findings, read: rows of `fks.finding` as records.

Belongs here: queries. Does not belong here: how findings change (`ledger.findings`), the statements that change them
(`store.writer.findings`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import iso, to_datetime, to_micros
from fks_backfill_dagster.ledger.findings import (
    ACTIVE,
    Finding,
    FindingStatus,
    Rule,
    Severity,
    Verdict,
)
from fks_backfill_dagster.store import schema
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.ledger import series_id
from fks_backfill_dagster.store.queries import read_candles
from fks_backfill_dagster.store.sql import as_series, listed, table_of


@dataclass(frozen=True, slots=True)
class StoredFinding:
    """A finding with its series."""

    series: Series
    finding: Finding


def findings(
    database: Database,
    series: Sequence[Series] | None = None,
    statuses: Collection[FindingStatus] = (),
    rules: Collection[Rule] = (),
) -> list[StoredFinding]:
    """The findings of these series (None: of all), of these states and rules (none given: of every one), by time."""
    f, s = schema.finding, schema.series
    query = _select().order_by(s.c.symbol, s.c.id, f.c.start_ts, f.c.id)
    if series is not None:
        keys = listed(series)
        query = query.where(
            sa.tuple_(s.c.symbol, s.c.timeframe).in_(zip(keys["symbols"], keys["timeframes"], strict=True))
        )
    if statuses:
        query = query.where(f.c.status.in_([one.value for one in statuses]))
    if rules:
        query = query.where(f.c.rule.in_([one.value for one in rules]))
    with database.begin() as connection:
        return [StoredFinding(as_series(row), finding_of(row)) for row in connection.execute(query)]


def findings_by_number(connection: sa.Connection, numbers: Collection[int]) -> dict[int, StoredFinding]:
    """The findings with these numbers; a number that does not exist is not in the result."""
    query = _select().where(schema.finding.c.id.in_(list(numbers)))
    return {row.number: StoredFinding(as_series(row), finding_of(row)) for row in connection.execute(query)}


def active_findings(connection: sa.Connection, identity: int, window: TimeRange) -> list[Finding]:
    """The active findings of a series that overlap or touch a window, ascending."""
    f = schema.finding
    query = (
        sa.select(f, f.c.id.label("number"))
        .where(
            f.c.series_id == identity,
            f.c.status.in_([one.value for one in ACTIVE]),
            f.c.start_ts <= to_datetime(window.end),
            f.c.end_ts >= to_datetime(window.start),
        )
        .order_by(f.c.start_ts)
    )
    return [finding_of(row) for row in connection.execute(query)]


def open_findings(database: Database) -> dict[tuple[str, str], int]:
    """The number of open findings by symbol and timeframe; series without one are left out."""
    query = sa.text(
        "SELECT symbol, timeframe, count(*) FROM fks.findings WHERE status = 'open' GROUP BY 1, 2"
    )
    with database.begin() as connection:
        return {(symbol, timeframe): count for symbol, timeframe, count in connection.execute(query)}


def candles_around(database: Database, series: Series, window: TimeRange, context: int) -> Candles:
    """The stored candles that open in `window`, with up to `context` stored candles before and after it."""
    with database.begin() as connection:
        identity = series_id(connection, series)
        wider = window if identity is None else with_context(connection, series, identity, window, context)
    return read_candles(database, series, wider)


# `nth` neighbours by the primary key: an index scan of so many entries, whatever lies between.
_CONTEXT = """
SELECT
    (SELECT min(ts) FROM (SELECT ts FROM {table} WHERE series_id = :id AND ts < :start
        ORDER BY ts DESC LIMIT :context) before),
    (SELECT max(ts) FROM (SELECT ts FROM {table} WHERE series_id = :id AND ts >= :end
        ORDER BY ts LIMIT :context) after)
"""


def with_context(
    connection: sa.Connection, series: Series, identity: int, window: TimeRange, context: int
) -> TimeRange:
    """The window, extended by up to `context` stored candles on either side."""
    first, last = connection.execute(
        sa.text(_CONTEXT.format(table=table_of(series.timeframe))),
        {
            "id": identity,
            "start": to_datetime(window.start),
            "end": to_datetime(window.end),
            "context": context,
        },
    ).one()
    start = window.start if first is None else to_micros(first)
    return TimeRange(start, window.end if last is None else to_micros(last) + 1)


def _select() -> sa.Select[Any]:
    f, s = schema.finding, schema.series
    return sa.select(
        *(column for column in f.c if column.name != "id"),
        f.c.id.label("number"),
        s.c.symbol,
        s.c.timeframe,
        s.c.asset_class,
        s.c.calendar,
    ).join(s, s.c.id == f.c.series_id)


def finding_of(row: sa.Row[Any]) -> Finding:
    """A row of fks.finding, its id as `number`."""
    return Finding(
        rule=Rule(row.rule),
        severity=Severity(row.severity),
        start=to_micros(row.start_ts),
        end=to_micros(row.end_ts),
        candles=row.candles,
        digest=row.digest,
        first_seen_at=to_micros(row.first_seen_at),
        last_seen_at=to_micros(row.last_seen_at),
        status=FindingStatus(row.status),
        evidence=row.evidence,
        verdict=None if row.verdict is None else verdict_of(row.verdict),
        number=row.number,
    )


def verdict_of(found: Mapping[str, str]) -> Verdict:
    return Verdict(found["by"], to_micros(datetime.fromisoformat(found["at"])), found["reason"])


def verdict_json(verdict: Verdict | None) -> dict[str, str] | None:
    """As the column `verdict` of fks.findings holds it."""
    if verdict is None:
        return None
    return {"by": verdict.by, "at": iso(verdict.at), "reason": verdict.reason}
