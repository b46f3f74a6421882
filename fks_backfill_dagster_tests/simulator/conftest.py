"""A local market per module, with its clock fixed at 2025-03-20T12:34:56Z."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.simulator.config import instant

NOW = instant("2025-03-20T12:34:56")
LIMITS = ("binance", "polygon", "yahoo", "alphavantage", "alphavantage_burst", "oanda", "coingecko")


@pytest.fixture(scope="module")
def running() -> Iterator[LocalMarket]:
    with LocalMarket(MarketConfig(limits=False, now=NOW)) as market:
        yield market


@pytest.fixture
def market(running: LocalMarket) -> LocalMarket:
    """The module's server, reset to its initial state."""
    running.clear_faults()
    running.clear_outages()
    running.set_clock(NOW)
    running.post("/sim/limits", **dict.fromkeys(LIMITS))
    running.reset_requests()
    return running
