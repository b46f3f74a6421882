"""Series, ranges and comparisons for the tests of the pipeline."""

from __future__ import annotations

from datetime import UTC, datetime

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database

MINUTES = Series("BTC/USDT", Timeframe.M1, AssetClass.CRYPTO)
HOURS = Series("BTC/USDT", Timeframe.H1, AssetClass.CRYPTO)
BOTH = ["binance", "polygon"]


def days(start: str, end: str) -> TimeRange:
    return TimeRange.of(
        datetime.fromisoformat(start).replace(tzinfo=UTC), datetime.fromisoformat(end).replace(tzinfo=UTC)
    )


def holds_the_truth(database: Database, market: LocalMarket, series: Series, window: TimeRange) -> None:
    """The stored candles of `window` are the market's, bit for bit."""
    truth = market.truth("binance", series.symbol, series.timeframe, window)
    assert len(truth) > 0
    assert queries.read_candles(database, series, window).equals(truth)


def status_of(database: Database, series: Series) -> queries.SyncStatus:
    (status,) = queries.sync_status(database, series)
    return status
