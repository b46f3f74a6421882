"""Fixtures of the provider tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from fks_backfill_dagster.providers.base import Provider
from fks_backfill_dagster.providers.http.pool import RequestPool
from fks_backfill_dagster.providers.registry import build, limiter_for, resolve_options

Make = Callable[..., Provider]


@pytest.fixture
def pool() -> Iterator[RequestPool]:
    made = RequestPool(4)
    yield made
    made.close()


@pytest.fixture
def make(pool: RequestPool) -> Make:
    """A provider on a loopback address: `make("binance", url, archive_url=..., clock=..., ...)`."""

    def of(name: str, url: str, **given: object) -> Provider:
        clock = {"clock": given.pop("clock")} if "clock" in given else {}
        given = {"retry_budget_seconds": 1.5, "longest_wait_seconds": 1.5, "timeout_seconds": 5.0, **given}
        options = resolve_options(name, base_url=url, **given)  # type: ignore[arg-type]
        return build(name, options, pool, limiter_for({name: options}), **clock)  # type: ignore[arg-type]

    return of
