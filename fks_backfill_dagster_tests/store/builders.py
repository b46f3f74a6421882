"""Small values for the tests of this layer, and a series together with its database."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import sqlalchemy as sa

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.delivery import Delivery, Origin, RejectedRows, Transport
from fks_backfill_dagster.domain.grid import Grid, grid_of
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_MINUTE
from fks_backfill_dagster.ledger.reconcile import SeriesAudit
from fks_backfill_dagster.ledger.records import Evidence, LedgerGap
from fks_backfill_dagster.ledger.settle import Response
from fks_backfill_dagster.store import ledger, queries
from fks_backfill_dagster.store.audit_reader import examine
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.writer.commit import commit_batch
from fks_backfill_dagster.store.writer.records import BatchWrite, Committed, Withdrawal
from fks_backfill_dagster.store.writer.repair import repair_series
from fks_backfill_dagster.store.writer.undo import undo_batch
from fks_backfill_dagster_tests.domain.builders import at

MIDNIGHT = at("2024-01-01T00:00Z")


def candles_at(opens: Instants | Sequence[int], version: int = 0) -> Candles:
    """Valid candles whose values depend on their open and version.

    From an even version to the next odd one only volumes change: other numbers, from missing to a
    number, and from a number to missing.
    """
    ts = np.asarray(opens, dtype=np.int64)
    minute = ts // MICROS_PER_MINUTE
    low = (100 + minute % 977 + version // 2).astype(np.float64)
    volume = np.where((minute + 3 * version) % 7 < 2, np.nan, low / 7 + version)
    return Candles(ts, low + 1, low + 3, low, low + 2, volume)


def origin_of(provider: str = "binance", source: str = "/api/v3/klines", **other: Any) -> Origin:
    """A response at MIDNIGHT by default."""
    given: dict[str, Any] = {
        "provider": provider,
        "transport": Transport.REST,
        "source": source,
        "host": "https://market.example",
        "instrument": "BTCUSDT",
        "requested_at": MIDNIGHT,
    }
    return Origin(**(given | other))


def brought(
    candles: Candles, provider: str = "binance", source: str = "/api/v3/klines", **other: Any
) -> Delivery:
    return Delivery(candles, origin_of(provider, source, **other))


def archive(candles: Candles, published_at: int, provider: str = "binance", **other: Any) -> Delivery:
    """A delivery from a file with that publication time."""
    given = {"transport": Transport.ARCHIVE, "published_at": published_at, "sha256": "ab" * 32}
    return brought(candles, provider, "/data/spot/daily/klines/x.zip", **(given | other))


@dataclass(frozen=True)
class Shelf:
    """One registered series of a database."""

    database: Database
    series: Series
    identity: int

    @classmethod
    def of(cls, database: Database, series: Series) -> Shelf:
        with database.begin() as connection:
            return cls(database, series, ledger.register(connection, series))

    def on(self, database: Database) -> Shelf:
        """The same series over other connections."""
        return Shelf(database, self.series, self.identity)

    @property
    def grid(self) -> Grid:
        return grid_of(self.series)

    @property
    def table(self) -> str:
        return f'fks."candles_{self.series.timeframe}"'

    def span(self, first: int, past: int) -> TimeRange:
        """From the first-th open after MIDNIGHT to the past-th."""
        step = self.series.timeframe.micros
        return TimeRange(MIDNIGHT + first * step, MIDNIGHT + past * step)

    def opens(self, first: int, past: int) -> Instants:
        return self.grid.opens(self.span(first, past))

    def commit(
        self,
        window: TimeRange,
        *deliveries: Delivery,
        refused: tuple[RejectedRows, ...] = (),
        evidence: tuple[Evidence, ...] = (),
        withdrawn: tuple[Withdrawal, ...] = (),
    ) -> Committed:
        responses = tuple(Response(item, self.grid.opens(window)) for item in evidence)
        write = BatchWrite(window, deliveries, refused, responses, run_id="run", withdrawn=withdrawn)
        return commit_batch(self.database, self.series, self.identity, write, self.grid)

    def put(self, first: int, past: int, version: int = 0, provider: str = "binance") -> Committed:
        """Commits a batch with all candles of its window."""
        candles = candles_at(self.opens(first, past), version)
        return self.commit(self.span(first, past), brought(candles, provider))

    def undo(self, batch: int) -> Committed:
        return undo_batch(self.database, self.series, self.identity, batch, self.grid)

    def audit(self, now: int | None = None) -> SeriesAudit:
        """The audit at `now`, by default in 2026."""
        found = examine(self.database, self.series, self.grid, lambda: EVER.end if now is None else now)
        assert found is not None
        return found

    def repair(self, now: int | None = None) -> SeriesAudit:
        clock = lambda: EVER.end if now is None else now  # noqa: E731
        found = repair_series(self.database, self.series, self.grid, clock)
        assert found is not None
        return found

    def read(self, as_of: datetime | None = None) -> Candles:
        return queries.read_candles(self.database, self.series, EVER, as_of)

    def status(self) -> queries.SyncStatus:
        (found,) = queries.sync_status(self.database, self.series)
        return found

    def gaps(self) -> tuple[LedgerGap, ...]:
        return queries.ledger_gaps(self.database, self.series, EVER)

    def batches(self) -> list[int]:
        """Ids of the lineage rows, in the order of the commits."""
        return [b.id for b in reversed(queries.batches(self.database, self.series))]

    def missing(self) -> Instants:
        """The opens that a sync of 2023 to 2025 would request."""
        with self.database.begin() as connection:
            known = ledger.known(connection, self.identity, EVER)
        return np.concatenate([np.empty(0, np.int64), *(self.grid.opens(r) for r in known.missing(EVER))])

    def rows(self, query: str) -> list[tuple[object, ...]]:
        """The rows of a query; `:id`, `:symbol` and `:timeframe` are those of the series."""
        return fetch(
            self.database,
            query,
            id=self.identity,
            symbol=self.series.symbol,
            timeframe=self.series.timeframe.value,
        )

    def now(self) -> datetime:
        ((moment,),) = self.rows("SELECT clock_timestamp()")
        assert isinstance(moment, datetime)
        return moment


EVER = TimeRange(at("2023-01-01T00:00Z"), at("2026-01-01T00:00Z"))


def fetch(database: Database, query: str, **named: object) -> list[tuple[Any, ...]]:
    with database.begin() as connection:
        wanted = {k: v for k, v in named.items() if f":{k}" in query}
        return [tuple(row) for row in connection.execute(sa.text(query), wanted)]


def execute(database: Database, *statements: str) -> None:
    with database.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
