"""A real database and a real local market for every test of the pipeline; the clock is fixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import pytest

from fks_backfill_dagster.domain.timeframe import to_micros
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.providers.http.limiter import ProcessLimiter
from fks_backfill_dagster.providers.http.pool import RequestPool
from fks_backfill_dagster.providers.registry import build, resolve_options
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.postgres import database, database_url, server_url, template

__all__ = ["database", "database_url", "server_url", "template"]

NOW = to_micros(datetime(2024, 6, 15, 12, 34, 56, tzinfo=UTC))

MakeContext = Callable[..., Context]


@pytest.fixture(scope="module")
def running() -> Iterator[LocalMarket]:
    with LocalMarket(MarketConfig(limits=False, now=NOW)) as market:
        yield market


@pytest.fixture
def market(running: LocalMarket) -> LocalMarket:
    running.clear_faults()
    running.clear_outages()
    running.set_clock(NOW)
    running.reset_requests()
    return running


def make_context(
    database: Database,
    binance_url: str,
    *,
    archive_url: str | None = None,
    polygon_url: str | None = None,
    key: str | None = "any",
    now: int = NOW,
    budget: float = 1.0,
    batch_size_days: int = 30,
) -> Context:
    """Binance at `binance_url` (its archives only if given) and Polygon; the clock is fixed at `now`."""
    pool = RequestPool(5)
    limiter = ProcessLimiter({})
    options = {
        "binance": resolve_options(
            "binance",
            base_url=binance_url,
            archive_url=archive_url,
            retry_budget_seconds=budget,
            timeout_seconds=5,
        ),
        "polygon": resolve_options(
            "polygon",
            base_url=polygon_url or binance_url.replace("/binance", "/polygon"),
            key=key,
            retry_budget_seconds=budget,
            timeout_seconds=5,
        ),
    }
    providers = {name: build(name, one, pool, limiter, lambda: now) for name, one in options.items()}
    return Context(database, providers, lambda: now, batch_size_days=batch_size_days)


@pytest.fixture
def context(database: Database, market: LocalMarket) -> Context:
    return make_context(database, market.binance_url, archive_url=market.archive_url)
