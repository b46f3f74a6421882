"""SQL fragments shared by several modules."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import Timeframe


def table_of(timeframe: Timeframe) -> str:
    """The candle table of this timeframe."""
    return f'fks."candles_{timeframe}"'


def micros(expression: str) -> str:
    """An instant as an integer of microseconds, to avoid a datetime per row."""
    return f"CAST(extract(epoch FROM {expression}) * 1000000 AS bigint)"


def series_of(connection: sa.Connection, series: Sequence[Series]) -> dict[int, Series]:
    """The stored ones of `series`, by id."""
    wanted = {(one.symbol, one.timeframe.value): one for one in series}
    rows = connection.execute(
        sa.text(
            "SELECT s.id, s.symbol, s.timeframe FROM fks.series s"
            " JOIN unnest(CAST(:symbols AS text[]), CAST(:timeframes AS text[])) AS w(symbol, timeframe)"
            "   ON w.symbol = s.symbol AND w.timeframe = s.timeframe"
        ),
        {"symbols": [symbol for symbol, _ in wanted], "timeframes": [frame for _, frame in wanted]},
    )
    return {row.id: wanted[row.symbol, row.timeframe] for row in rows}
