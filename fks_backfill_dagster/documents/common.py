"""What several documents share."""

from __future__ import annotations

from datetime import UTC, datetime

from fks_backfill_dagster.domain.series import Series

Document = dict[str, object]


def moment(when: datetime | None) -> str | None:
    """To the second: candles have no finer times, and a sync time needs none."""
    return None if when is None else when.astimezone(UTC).isoformat(timespec="seconds")


def names(series: Series) -> Document:
    return {"symbol": series.symbol, "timeframe": series.timeframe.value}
