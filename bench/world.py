"""The environment of the cases: a scratch PostgreSQL, the local market in a separate process, clean tables.

`FKS_DATABASE_URL` (a server with the right to create databases) replaces the embedded PostgreSQL.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psycopg
import sqlalchemy as sa

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe, to_micros
from fks_backfill_dagster.embedded import EmbeddedPostgres
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.pipeline.report import SyncReport
from fks_backfill_dagster.pipeline.sync import sync
from fks_backfill_dagster.providers.base import Cancelled
from fks_backfill_dagster.providers.http.limiter import system_micros
from fks_backfill_dagster.providers.http.pool import RequestPool
from fks_backfill_dagster.providers.registry import build, limiter_for, rate_limits, resolve_options
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.rate_limits import SharedLimiter

SERIES = Series("BTC/USDT", Timeframe.M1, AssetClass.CRYPTO)
LISTED = datetime(2015, 1, 1, tzinfo=UTC)


def window(first_year: int, years: int) -> TimeRange:
    return TimeRange.of(
        datetime(first_year, 1, 1, tzinfo=UTC), datetime(first_year + years, 1, 1, tzinfo=UTC)
    )


def months(first: str, count: int) -> TimeRange:
    """`count` months from YYYY-MM on."""
    start = np.datetime64(first, "M")
    return TimeRange.of(*(datetime.fromisoformat(f"{edge}-01T00:00Z") for edge in (start, start + count)))


@dataclass(frozen=True, slots=True)
class World:
    """The addresses of database and market."""

    database_url: str
    market_url: str

    def context(self, *, archives: bool) -> Context:
        """A new context, as in a new process."""
        pool = RequestPool(5)
        options = resolve_options(
            "binance",
            base_url=f"{self.market_url}/binance",
            archive_url=f"{self.market_url}/archive" if archives else None,
            requests_per_minute=1_000_000,  # no limit, like the market
        )
        limiter = limiter_for({"binance": options})
        providers = {"binance": build("binance", options, pool, limiter)}
        return Context(Database(self.database_url), providers, system_micros)

    def sync(self, requested: TimeRange, *, archives: bool) -> SyncReport:
        context = self.context(archives=archives)
        try:
            report = sync(context, SERIES, requested, ["binance"])
        finally:
            context.database.dispose()
        if report.missing or report.errors:
            raise SystemExit(f"a sync of the bench failed: {report}")
        return report

    def request_binance(self, base_url: str, requested: TimeRange, seconds: float) -> None:
        """Fetches the range repeatedly through the shared limiter for `seconds`, without storing it."""
        pool, database = RequestPool(5), Database(self.database_url)
        options = resolve_options("binance", base_url=base_url)
        limiter = SharedLimiter(database, rate_limits({"binance": options}))
        provider = build("binance", options, pool, limiter)
        timer = threading.Timer(seconds, pool.stop.set)
        timer.start()
        try:
            while not pool.stop.is_set():
                provider.fetch(SERIES, requested)
        except Cancelled:
            pass
        finally:
            timer.cancel()
            pool.close()
            database.dispose()

    def reset_rate_limits(self) -> None:
        """Deletes the state of the shared rate limits."""
        with self.connect() as connection:
            connection.execute("TRUNCATE fks.pacing, fks.pacing_request, fks.pacing_spent, fks.pacing_queue")

    def connect(self) -> psycopg.Connection:
        return psycopg.connect(self.database_url, autocommit=True)

    def clear(self) -> None:
        """Empties the tables and writes out pending pages of earlier runs."""
        with self.connect() as connection:
            connection.execute("TRUNCATE fks.series CASCADE")
            connection.execute('TRUNCATE fks."candles_1m"')
            connection.execute("CHECKPOINT")

    def require_transport(self, expected: str) -> None:
        """Raises SystemExit unless every batch arrived that way: `archive` or `rest`."""
        with self.connect() as connection:
            found = connection.execute("SELECT DISTINCT transport FROM fks.batch").fetchall()
        if found != [(expected,)]:
            raise SystemExit(f"the candles came by {found}, not by {expected}")

    def prepare(self, provider: str, requested: TimeRange, stride: int = 1000) -> None:
        prepare(self.market_url, provider, requested, stride)


def prepare(market_url: str, provider: str, requested: TimeRange, stride: int = 1000) -> None:
    """Builds the market's responses in advance, so that they are not part of the measurement."""
    document = {
        "provider": provider,
        "symbol": "BTC/USDT",
        "timeframe": "1m",
        "stride": stride,
        "start": datetime.fromtimestamp(requested.start / 1e6, UTC).isoformat(),
        "end": datetime.fromtimestamp(requested.end / 1e6, UTC).isoformat(),
    }
    request = urllib.request.Request(
        f"{market_url}/sim/prepare",
        json.dumps(document).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        response.read()


def limited_market() -> LocalMarket:
    """A market with Binance's limit, in a separate process."""
    return LocalMarket(MarketConfig(limits=True, listed=(("BTCUSDT", to_micros(LISTED)),)), process=True)


@contextmanager
def world() -> Iterator[World]:
    listed = (("BTCUSDT", to_micros(LISTED)),)
    with (
        tempfile.TemporaryDirectory(prefix="fks-bench-") as home,
        _server(Path(home)) as url,
        LocalMarket(MarketConfig(limits=False, listed=listed), process=True) as market,
    ):
        database = Database(url)
        database.ensure()
        database.dispose()
        yield World(url, market.url)


@contextmanager
def _server(home: Path) -> Iterator[str]:
    given = os.environ.get("FKS_DATABASE_URL")
    embedded = None if given else EmbeddedPostgres(home)
    server = given or (embedded.start() if embedded else "")
    name = f"fks_bench_{os.getpid()}"
    try:
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        yield sa.make_url(server).set(database=name).render_as_string(hide_password=False)
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    finally:
        if embedded:
            embedded.stop()
            embedded.remove()


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """A list that contains the seconds of the block after its end."""
    seconds: list[float] = []
    began = time.perf_counter()
    yield seconds
    seconds.append(time.perf_counter() - began)
