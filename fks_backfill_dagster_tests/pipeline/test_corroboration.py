"""Corroboration: absences at one provider corroborate those of another, unless its own candles refute them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.pipeline.sync import sync
from fks_backfill_dagster.providers.http.limiter import ProcessLimiter
from fks_backfill_dagster.providers.http.pool import RequestPool
from fks_backfill_dagster.providers.registry import build, resolve_options
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.pipeline.builders import days
from fks_backfill_dagster_tests.pipeline.conftest import NOW


@pytest.fixture
def both(database: Database, market: LocalMarket) -> Iterator[Context]:
    """Every provider of stocks and currencies at the local market."""
    pool = RequestPool(5)
    urls = {
        "polygon": market.polygon_url,
        "yfinance": market.yahoo_url,
        "alphavantage": market.alphavantage_url,
        "oanda": market.oanda_url,
    }
    providers = {
        name: build(
            name, resolve_options(name, base_url=url, key="any"), pool, ProcessLimiter({}), lambda: NOW
        )
        for name, url in urls.items()
    }
    yield Context(database, providers, lambda: NOW)
    pool.close()


WINDOW = days("2024-06-02", "2024-06-14")


@pytest.mark.parametrize(
    ("symbol", "timeframe", "providers", "hole"),
    [
        ("AAPL", "30m", ("polygon", "yfinance"), ("2024-06-12T15:00", "2024-06-12T16:10")),
        ("AAPL", "30m", ("polygon", "yfinance"), ("2024-06-12T15:20", "2024-06-12T16:30")),
        ("AAPL", "4h", ("yfinance", "polygon"), ("2024-06-12T15:20", "2024-06-12T17:10")),
        ("EUR/USD", "4h", ("oanda", "polygon"), ("2024-06-12T03:20", "2024-06-12T13:10")),
        ("EUR/USD", "1d", ("oanda", "polygon"), ("2024-06-11T03:20", "2024-06-12T13:10")),
        ("EUR/USD", "1w", ("oanda", "polygon"), ("2024-06-11T03:20", "2024-06-12T13:10")),
    ],
)
def test_a_candle_is_not_derived_from_incomplete_parts(
    both: Context,
    market: LocalMarket,
    symbol: str,
    timeframe: str,
    providers: tuple[str, ...],
    hole: tuple[str, str],
) -> None:
    """All providers had the same outage, which begins or ends inside a candle. One of them has the candle natively and
    lacks it: that does not corroborate the other one's missing parts, since the other one has the remaining parts."""
    series = Series(symbol, Timeframe(timeframe), AssetClass.STOCKS if symbol == "AAPL" else AssetClass.FOREX)
    missing = days(*hole)
    for name in providers:
        market.plant_outage(name, missing, symbol)
    sync(both, series, WINDOW, providers)
    stored = queries.read_candles(both.database, series, WINDOW).ts
    grid = grid_of(series)
    opens = grid.opens(WINDOW)
    hit = (opens < missing.end) & (grid.closes(opens) > missing.start)
    assert hit.any()
    assert np.isin(opens[~hit], stored).all()
    assert not np.isin(opens[hit], stored).any()
    gaps = queries.ledger_gaps(both.database, series, TimeRange(WINDOW.start, WINDOW.end))
    assert sum(gap.missing for gap in gaps) == int(hit.sum())
