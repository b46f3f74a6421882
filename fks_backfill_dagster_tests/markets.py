"""A local market that the tests of a module share; each test gets it without faults and outages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fks_backfill_dagster.simulator import LocalMarket, MarketConfig


@pytest.fixture(scope="module")
def running() -> Iterator[LocalMarket]:
    with LocalMarket(MarketConfig(limits=False)) as market:
        yield market


@pytest.fixture
def market(running: LocalMarket) -> LocalMarket:
    running.clear_faults()
    running.clear_outages()
    running.reset_requests()
    return running
