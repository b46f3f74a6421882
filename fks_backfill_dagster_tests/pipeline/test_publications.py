"""Monthly archive, daily archive and REST disagree: the stored value does not depend on the range."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from email.utils import format_datetime

import numpy as np
import pytest

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, Timeframe, to_datetime
from fks_backfill_dagster.pipeline.plan import Scope
from fks_backfill_dagster.pipeline.report import SyncReport
from fks_backfill_dagster.pipeline.sync import sync
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.examples import thinned
from fks_backfill_dagster_tests.pipeline.builders import days
from fks_backfill_dagster_tests.pipeline.conftest import NOW, make_context
from fks_backfill_dagster_tests.providers.scripted import (
    Received,
    Scripted,
    Server,
    SmallBinance,
    candles_at,
    checksum_of,
    csv_of,
    serve,
    zipped_csv,
)

MINUTES = Series("BTC/USDT", Timeframe.M1, AssetClass.CRYPTO)
MARCH, DAY = days("2024-03-01", "2024-04-01"), days("2024-03-21", "2024-03-22")
WRONG = days("2024-03-21T13:00", "2024-03-21T13:10")  # ten minutes
LATER = NOW + 30 * MICROS_PER_DAY


@dataclass
class Publications:
    """A Binance whose files have other closes than REST for ten minutes: the monthly file is 5 cents too high, the
    daily one 3. `modified`: their `Last-Modified`; no entry: no header."""

    modified: dict[str, int] = field(default_factory=dict)
    wrong: dict[str, float] = field(default_factory=lambda: {"monthly": 0.05, "daily": 0.03})

    def __call__(self, asked: Received) -> Scripted:
        return SmallBinance(archive=self.archive)(asked)

    def archive(self, asked: Received, honest: Scripted) -> Scripted:
        kind = "monthly" if "/monthly/" in asked.path else "daily"
        stem = asked.path.rpartition("/")[2].removesuffix(".CHECKSUM").removesuffix(".zip")
        if kind not in self.wrong or honest.status != 200:
            return honest
        periods = {"BTCUSDT-1m-2024-03": MARCH, "BTCUSDT-1m-2024-03-21": DAY}
        if stem not in periods:
            return honest
        period = periods[stem]
        candles = candles_at(grid_of(MINUTES).opens(period), "BTCUSDT")
        inside = (candles.ts >= WRONG.start) & (candles.ts < WRONG.end)
        close = candles.close + np.where(inside, self.wrong[kind], 0)
        zipped = zipped_csv(csv_of(replace(candles, close=close), Timeframe.M1), stem)
        if asked.path.endswith(".CHECKSUM"):
            return checksum_of(zipped, f"{stem}.zip")
        made = self.modified.get(kind)
        headers = {} if made is None else {"Last-Modified": format_datetime(to_datetime(made), usegmt=True)}
        return Scripted(zipped, headers=headers)


@pytest.fixture
def market() -> Publications:
    return Publications()


@pytest.fixture
def server(market: Publications) -> Iterator[Server]:
    with serve(market) as running:
        yield running


@dataclass
class Syncer:
    """Syncs into one database, with or without the archives."""

    database: Database
    server: Server

    def run(
        self, window: TimeRange, *, archives: bool = True, refetch: bool = True, now: int = NOW
    ) -> SyncReport:
        url = self.server.url
        context = make_context(self.database, url, archive_url=url if archives else None, now=now)
        scope = Scope.EVERYTHING if refetch else Scope.MISSING
        report = sync(context, MINUTES, window, ["binance"], scope=scope, recheck=True)
        assert report.complete, report.errors
        return report

    def error(self) -> float:
        """The error of the stored closes of the ten minutes, the same for all of them."""
        stored = queries.read_candles(self.database, MINUTES, WRONG)
        difference = np.round(stored.close - candles_at(stored.ts, "BTCUSDT").close, 6)
        assert len(set(difference.tolist())) == 1
        return float(difference[0])


@pytest.fixture
def syncer(database: Database, server: Server) -> Syncer:
    return Syncer(database, server)


def test_each_source_has_its_own_value(syncer: Syncer) -> None:
    """Each of the three sources has its own value if nothing is stored yet."""
    assert (syncer.run(MARCH).total_candles, syncer.error()) == (44_640, 0.05)
    syncer.run(DAY, archives=False)
    assert syncer.error() == 0.0


@pytest.mark.parametrize(
    ("order", "dated"),
    thinned(list(itertools.permutations(["month", "day", "rest"])), [False, True], every=2),
)
def test_the_newest_publication_wins_in_every_order(
    syncer: Syncer, market: Publications, order: tuple[str, ...], dated: bool
) -> None:
    """REST is as new as its request: after a REST request an archive does not replace its value."""
    if dated:
        market.modified = {
            "monthly": days("2024-04-03", "2024-04-03").start,
            "daily": DAY.end + MICROS_PER_DAY,
        }
    windows = {"month": (MARCH, True), "day": (DAY, True), "rest": (DAY, False)}
    for name in order:
        window, archives = windows[name]
        syncer.run(window, archives=archives)
    assert syncer.error() == 0.0
    again = syncer.run(MARCH)
    assert (syncer.error(), again.total_candles) == (0.0, 0)
    assert again.outdated == 10
    assert any("older publication" in warning for warning in again.warnings)


def test_a_republished_archive_replaces_the_values_of_the_api(syncer: Syncer, market: Publications) -> None:
    syncer.run(DAY, archives=False)
    market.modified = {"monthly": NOW + 10 * MICROS_PER_DAY}
    report = syncer.run(MARCH, now=LATER)
    assert (syncer.error(), report.outdated) == (0.05, 0)
    # A later API request is newer again.
    syncer.run(DAY, archives=False, now=LATER + MICROS_PER_DAY)
    assert syncer.error() == 0.0
    assert syncer.run(MARCH, now=LATER + 2 * MICROS_PER_DAY).outdated == 10


def test_the_range_does_not_change_the_value(syncer: Syncer) -> None:
    """Also with other archives: the value of the newest publication stays."""
    syncer.run(DAY, archives=False)
    for window in (days("2024-03-20", "2024-03-25"), days("2024-02-01", "2024-05-01"), MARCH):
        report = syncer.run(window)
        assert syncer.error() == 0.0
        assert report.outdated in (0, 10)
    assert syncer.run(days("2024-02-01", "2024-05-01"), refetch=False).requests == 0


def test_disagreement_costs_no_request(syncer: Syncer, market: Publications) -> None:
    syncer.run(DAY, archives=False)
    with_it = syncer.run(MARCH).requests
    market.wrong = {}
    assert syncer.run(MARCH).requests == with_it


@pytest.mark.parametrize("dated", [False, True], ids=["without a header", "with a header"])
def test_files_alone_give_one_value_in_either_order(
    database: Database, server: Server, market: Publications, dated: bool
) -> None:
    """A few days come from daily files, the month from its own. Without a header the daily file takes precedence."""
    few = days("2024-03-20", "2024-03-24")
    if dated:
        market.modified = {
            "monthly": days("2024-05-01", "2024-05-01").start,
            "daily": DAY.end + MICROS_PER_DAY,
        }
    syncer = Syncer(database, server)
    syncer.run(few)
    assert syncer.error() == 0.03
    syncer.run(MARCH)
    assert syncer.error() == (0.05 if dated else 0.03)
    syncer.run(few)
    assert syncer.error() == (0.05 if dated else 0.03)
