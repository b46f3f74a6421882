"""SQL fragments shared by several modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe


def table_of(timeframe: Timeframe) -> str:
    """The candle table of this timeframe."""
    return f'fks."candles_{timeframe}"'


def micros(expression: str) -> str:
    """An instant as an integer of microseconds, to avoid a datetime per row."""
    return f"CAST(extract(epoch FROM {expression}) * 1000000 AS bigint)"


def named(series: Series) -> dict[str, str]:
    """The parameters `symbol` and `timeframe` of a statement about one series."""
    symbol, timeframe = series.key
    return {"symbol": symbol, "timeframe": timeframe}


def listed(series: Iterable[Series]) -> dict[str, list[str]]:
    """The parameters `symbols` and `timeframes` of a statement about many series, in their order."""
    keys = [one.key for one in series]
    return {"symbols": [symbol for symbol, _ in keys], "timeframes": [timeframe for _, timeframe in keys]}


def as_series(row: sa.Row[Any]) -> Series:
    """The series of a row with the columns of `fks.series`."""
    return Series(row.symbol, Timeframe(row.timeframe), AssetClass(row.asset_class), row.calendar)


def series_of(connection: sa.Connection, series: Sequence[Series]) -> dict[int, Series]:
    """The stored ones of `series`, by id."""
    wanted = {one.key: one for one in series}
    rows = connection.execute(
        sa.text(
            "SELECT s.id, s.symbol, s.timeframe FROM fks.series s"
            " JOIN unnest(CAST(:symbols AS text[]), CAST(:timeframes AS text[])) AS w(symbol, timeframe)"
            "   ON w.symbol = s.symbol AND w.timeframe = s.timeframe"
        ),
        listed(wanted.values()),
    )
    return {row.id: wanted[row.symbol, row.timeframe] for row in rows}
