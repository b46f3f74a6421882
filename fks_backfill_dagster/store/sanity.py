"""Checks stored candles against the rules of `domain.quality`, in SQL: one pass per timeframe.

Does not belong here: the repair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from fks_backfill_dagster.domain.partitions import Grain
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import Timeframe, to_micros
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.sql import series_of, table_of

# The rules of domain/quality.py in SQL. In PostgreSQL NaN is greater than every number.
_RULES = {
    "not_finite": "greatest(open, high, low, close) >= 'Infinity' OR least(open, high, low, close) = '-Infinity'",
    "not_positive": "least(open, high, low, close) <= 0",
    "high_low": "high < greatest(open, close, low) OR low > least(open, close, high)",
    "bad_volume": "volume < 0 OR volume >= 'Infinity'",
}

# All rules together, in the fewest comparisons: every candle of a series is checked.
GOOD = (
    "low > 0 AND high < 'Infinity' AND open BETWEEN low AND high AND close BETWEEN low AND high"
    " AND (volume IS NULL OR (volume >= 0 AND volume < 'Infinity'))"
)


@dataclass(frozen=True, slots=True)
class Sanity:
    """The number of stored candles, of those that break any rule and each rule, and the open of the first of them."""

    candles: int
    bad: int
    violations: Mapping[str, int]
    first: int | None


def sanity(database: Database, series: Sequence[Series]) -> dict[Series, Sanity]:
    """Counts the stored candles that break the OHLC rules: one pass per timeframe, whatever the number of series."""
    with database.begin() as connection:
        owners = series_of(connection, series)
        totals = connection.execute(
            sa.text("SELECT series_id, total_candles FROM fks.sync_state WHERE series_id = ANY(:ids)"),
            {"ids": list(owners)},
        )
        stored = {owners[row.series_id]: row.total_candles for row in totals}
        found = {one: Sanity(stored.get(one, 0), 0, dict.fromkeys(_RULES, 0), None) for one in series}
        for timeframe in dict.fromkeys(one.timeframe for one in series):
            ids = [identity for identity, one in owners.items() if one.timeframe is timeframe]
            for row in _broken(connection, timeframe, ids):
                one = owners[row.series_id]
                rules = {name: row._mapping[name] for name in _RULES}
                found[one] = Sanity(found[one].candles, row.bad, rules, to_micros(row.first))
    return found


def _broken(connection: sa.Connection, timeframe: Timeframe, ids: Sequence[int]) -> Sequence[sa.Row[Any]]:
    counts = ", ".join(f"count(*) FILTER (WHERE {rule}) AS {name}" for name, rule in _RULES.items())
    return connection.execute(
        sa.text(
            f"SELECT series_id, count(*) AS bad, {counts}, min(ts) AS first"
            f" FROM {table_of(timeframe)} WHERE series_id = ANY(:ids) AND NOT ({GOOD}) GROUP BY series_id"
        ),
        {"ids": list(ids)},
    ).all()


def bad_partitions(
    database: Database, series: Sequence[Series], grain: Grain
) -> dict[Series, dict[str, int]]:
    """The number of candles that break a rule, by the key of their partition."""
    found: dict[Series, dict[str, int]] = {one: {} for one in series}
    with database.begin() as connection:
        owners = series_of(connection, series)
        for timeframe in dict.fromkeys(one.timeframe for one in series):
            rows = connection.execute(
                sa.text(
                    "SELECT series_id, to_char(date_trunc(:grain, ts AT TIME ZONE 'UTC'), 'YYYY-MM-DD') AS key,"
                    f" count(*) AS bad FROM {table_of(timeframe)}"
                    f" WHERE series_id = ANY(:ids) AND NOT ({GOOD}) GROUP BY 1, 2 ORDER BY 1, 2"
                ),
                {"grain": grain.value, "ids": [i for i, one in owners.items() if one.timeframe is timeframe]},
            )
            for row in rows:
                found[owners[row.series_id]][row.key] = row.bad
    return found
