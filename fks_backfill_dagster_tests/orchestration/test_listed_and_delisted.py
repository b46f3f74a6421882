"""Series that are added, removed, changed, ended or delisted, in Dagster."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_HOUR, Timeframe, to_datetime
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.orchestration.assets import Task, materialize_series
from fks_backfill_dagster.orchestration.build import build_defs
from fks_backfill_dagster.orchestration.groups import groups_of
from fks_backfill_dagster.orchestration.run_config import SyncMode, SyncOptions
from fks_backfill_dagster.orchestration.run_log import Lines, SyncLogger
from fks_backfill_dagster.orchestration.schedules import check_requests, refresh_requests
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.model import Settings
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.store.coverage import PartState
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.queries import ledger_gaps, read_candles
from fks_backfill_dagster.store.reaches import reaches
from fks_backfill_dagster_tests.orchestration.conftest import MakeProject, settings_of
from fks_backfill_dagster_tests.orchestration.test_assets import metadata_of, statuses
from fks_backfill_dagster_tests.orchestration.test_schedules import pretend_synced, requests_at
from fks_backfill_dagster_tests.pipeline.conftest import make_context
from fks_backfill_dagster_tests.store.builders import execute


def test_only_a_series_of_another_class_than_stored_fails(
    project: MakeProject, market: LocalMarket, database: Database
) -> None:
    mine = project("BTC/USDT", "ETH/USDT")
    pretend_synced(database, "BTC/USDT", "1h", "2024-01-01", "2024-01-02")
    execute(database, "UPDATE fks.series SET asset_class = 'forex'")
    done = mine.materialize("1h", "2024-01-01")
    assert not done.success
    assert statuses(mine, mine.key("ETH/USDT", "1h"), "2024-01-01") == {"2024-01-01": "MATERIALIZED"}
    assert statuses(mine, mine.key("BTC/USDT", "1h"), "2024-01-01") == {"2024-01-01": "FAILED"}
    logged = " ".join(str(entry) for entry in mine.instance.all_logs(done.run_id))
    assert "BTC/USDT 1h is stored as forex, and is now requested as crypto" in logged


# Added, removed, ended


def refreshed(settings: Settings, database: Database, at: str) -> set[str]:
    """The symbols that an hourly tick refreshes."""
    found = requests_at(settings, database, "1h", at)
    return {key.path[1] for request in found for key in request.asset_selection or ()}


def test_a_tick_refreshes_added_series_and_skips_removed_ones(database: Database) -> None:
    for symbol in ("BTC/USDT", "ETH/USDT"):
        pretend_synced(database, symbol, "1h", "2024-01-01", "2024-03-10T11:00")
    for at in ("2024-03-10T12:05", "2024-03-11T00:05"):
        assert refreshed(settings_of("BTC/USDT", "ETH/USDT"), database, at) == {"BTC_USDT", "ETH_USDT"}
        assert refreshed(settings_of("BTC/USDT", "DOGE/USDT"), database, at) == {"BTC_USDT", "DOGE_USDT"}


def test_the_checks_skip_removed_series(database: Database) -> None:
    for symbol in ("BTC/USDT", "ETH/USDT"):
        pretend_synced(database, symbol, "1h", "2024-01-01", "2024-03-10T11:00")
    (request,) = check_requests(groups_of(Catalog(settings_of("ETH/USDT"))), database)
    assert {key.asset_key.path[1] for key in request.asset_check_keys or ()} == {"ETH_USDT"}


def ended(symbol: str, end: str) -> Settings:
    """Settings with BTC/USDT, and `symbol`, which ends."""
    settings = settings_of("BTC/USDT", symbol)
    last = settings.symbols[1].model_copy(update={"end": instant(end)})
    return settings.model_copy(update={"symbols": (settings.symbols[0], last)})


def test_an_ended_symbol_is_requested_up_to_its_end_only(database: Database) -> None:
    settings = ended("LUNA/USDT", "2024-03-10T12:00")
    for symbol in ("BTC/USDT", "LUNA/USDT"):
        pretend_synced(database, symbol, "1h", "2024-01-01", "2024-03-10T11:00")
    assert refreshed(settings, database, "2024-03-10T13:05") == {"BTC_USDT", "LUNA_USDT"}, "its last candle"
    execute(database, "UPDATE fks.sync_state SET synced = '{[2024-01-01Z, 2024-03-10 12:00Z)}'")
    for at in ("2024-03-10T13:05", "2024-03-11T00:05"):
        assert refreshed(settings, database, at) == {"BTC_USDT"}


def test_a_never_synced_symbol_that_has_ended_is_not_refreshed(database: Database) -> None:
    assert refreshed(ended("LUNA/USDT", "2022-05-13"), database, "2024-03-11T00:05") == {"BTC_USDT"}


def test_an_ended_symbol_has_no_freshness_policy() -> None:
    settings = ended("LUNA/USDT", "2024-03-10T12:00")
    specs = build_defs(settings=settings).resolve_all_asset_specs()
    fresh = {spec.key.path[1] for spec in specs if spec.freshness_policy is not None}
    assert fresh == {"BTC_USDT"}


def test_a_partition_expects_nothing_after_the_end(
    project: MakeProject, resources: dict[str, Any], market: LocalMarket
) -> None:
    symbols = ended("LUNA/USDT", "2024-02-10").symbols
    mine = project("BTC/USDT").with_symbols(symbols, resources)
    assert mine.materialize("15m", "2024-01-01", "2024-03-01", "LUNA/USDT").success
    found = metadata_of(mine.instance, mine.key("LUNA/USDT", "15m"))
    assert {key: numbers["expected"] for key, numbers in found.items()} == {
        "2024-01-01": 31 * 96,
        "2024-02-01": 9 * 96,
        "2024-03-01": 0,
    }


# Delisting: a year of ticks with a simulated clock ---------------------------------------------------------

DELISTED, BACK = instant("2023-01-11"), instant("2024-01-20T09:00")
LUNA = Catalog(settings_of("LUNA/USDT", start="2023-01-01", frames=[Timeframe.H1]))


class Year:
    """Ticks and the runs that they request, with a simulated clock."""

    def __init__(self, market: LocalMarket, database: Database) -> None:
        self.market, self.database, self.now = market, database, instant("2023-01-10T00:05")
        self.context = replace(
            make_context(database, market.binance_url),
            clock=lambda: self.now,
            priority=LUNA.priority,
        )
        self.series = LUNA.find_series("LUNA/USDT", "1h")
        self.states: dict[str, PartState] = {}

    def tick(self) -> int:
        """One tick and its runs. Returns the number of requests to the market."""
        (group,) = groups_of(LUNA)
        at = to_datetime(self.now)
        requests = list(refresh_requests(Timeframe.H1, group.series, LUNA, self.database, at))
        if not requests:
            return 0
        before = self.market.requests()
        for request in requests:
            keys = [request.tags[f"dagster/asset_partition_range_{edge}"] for edge in ("start", "end")]
            windows = {key: year_of(key) for key in dict.fromkeys(keys)}
            known = reaches(self.database, [self.series]).get(self.series)
            self.market.set_clock(self.now)
            outcome = materialize_series(
                self.context,
                Task(self.series, windows, LUNA, "run", SyncOptions(SyncMode.REFRESH), known),
                SyncLogger(Lines(), False),
            )
            assert not outcome.failed
            self.states.update(outcome.parts)
        return self.market.requests() - before

    def until(self, end: str) -> dict[int, int]:
        """A tick every six hours. Returns the number of requests by days since the delisting."""
        requested: dict[int, int] = {}
        while self.now < instant(end):
            if found := self.tick():
                day = (self.now - DELISTED) // MICROS_PER_DAY
                requested[day] = requested.get(day, 0) + found
            self.now += 6 * MICROS_PER_HOUR
        return requested


def year_of(key: str) -> TimeRange:
    return TimeRange(instant(key), instant(f"{int(key[:4]) + 1}-01-01"))


def test_a_delisted_symbol_is_requested_less_and_less_until_it_returns(
    database: Database,
) -> None:
    with LocalMarket(MarketConfig(limits=False, now=DELISTED)) as market:
        market.plant_outage("binance", TimeRange(DELISTED, BACK), "LUNAUSDT")
        year = Year(market, database)
        week = year.until("2023-01-18T12:00")
        # Binance is requested twice for missing candles.
        assert [week[day] for day in range(1, 7)] == [4 * 2] * 6, "at every tick for a week"
        requested = year.until("2024-01-18")
        assert set(requested.values()) == {2}
        days = list(requested)
        assert [days[0] in (14, 15), days[1] in (29, 30), days[2] in (58, 59, 60)] == [True] * 3
        assert all(29 <= later - earlier <= 31 for earlier, later in pairwise(days[2:]))
        assert len(requested) <= 14
        # It stays visible. Each tick adds a part; the gap sensor, which does not run here, would merge them.
        gaps = ledger_gaps(database, year.series, TimeRange(DELISTED, year.now))
        assert (gaps[0].start, {gap.status for gap in gaps}) == (DELISTED, {GapStatus.UNAVAILABLE})
        assert all(one.end == other.start for one, other in pairwise(gaps))
        assert len(gaps) <= 14
        running = year.states["2024-01-01"]
        assert (running.stored, running.expected) == (0, 16 * 24), "a daily tick updates the counts"
        back = year.until("2024-02-20")
        stored = read_candles(database, year.series, TimeRange(DELISTED, year.now))
        assert stored.ts[0] == BACK
        assert len(stored) == (year.now - 6 * MICROS_PER_HOUR - BACK) // MICROS_PER_HOUR
        assert back[max(back)] == 4, "requested at every tick again"
