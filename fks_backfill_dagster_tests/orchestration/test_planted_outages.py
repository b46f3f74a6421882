"""A planted outage of every provider, for every asset class and timeframe from 5m up: every check and `status` fail
in time while it lasts, and recover without intervention.

The clocks are simulated (pipeline/weeks.py). After every step all checks are evaluated as in Dagster's ops, and the
coverage as in `status --check`. Stored candles and ledger are compared with the market. 1m in real time, with a running
`up`: host/test_outage_of_minutes.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from dagster import AssetCheckKey

from fks_backfill_dagster import app
from fks_backfill_dagster.cli import main
from fks_backfill_dagster.domain.freshness import RECENT, RECENT_CANDLES, polling_interval
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_HOUR, MICROS_PER_MINUTE, iso
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.orchestration.checks import CHECK_NAMES, evaluate
from fks_backfill_dagster.orchestration.groups import groups_of
from fks_backfill_dagster.pipeline.coverage import coverage
from fks_backfill_dagster.pipeline.plan import GRACE
from fks_backfill_dagster.pipeline.refresh import SILENT_AFTER
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.settings.model import KEY_VARIABLES, Settings
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.pipeline.weeks import Down, Outage, World

QUARTER = 15 * MICROS_PER_MINUTE
OFFSET = 2 * MICROS_PER_MINUTE
"""Ticks follow shortly after candles have closed."""

PROVIDERS = {
    "BTC/USDT": ("binance", "polygon"),
    "AAPL": ("polygon", "yfinance"),
    "EUR/USD": ("oanda", "polygon"),
}
CLASSES = {"BTC/USDT": "crypto", "AAPL": "stocks", "EUR/USD": "forex"}


@dataclass(frozen=True)
class Scenario:
    """An outage of every provider of a symbol. `down`: they do not respond; otherwise they respond without the candles
    of the window, during the outage and later."""

    symbol: str
    frames: tuple[str, ...]
    window: TimeRange
    down: bool
    step: int

    def __str__(self) -> str:
        return f"{CLASSES[self.symbol]}-{'+'.join(self.frames)}-{'down' if self.down else 'lacking'}"

    @property
    def config(self) -> str:
        return (
            "history_start: 2024-01-01\n"
            f"provider_priority: {{{CLASSES[self.symbol]}: [{', '.join(PROVIDERS[self.symbol])}]}}\n"
            f"symbols:\n  - {{symbol: {self.symbol}, asset_class: {CLASSES[self.symbol]},"
            f" timeframes: [{', '.join(self.frames)}]}}\n"
        )


def scenario(symbol: str, frames: str, start: str, end: str, kind: str, step: int = QUARTER) -> Scenario:
    return Scenario(
        symbol, tuple(frames.split()), TimeRange(instant(start), instant(end)), kind == "down", step
    )


# The outages do not start and end on candle boundaries, so that derived candles lose only some of their parts. If two
# providers derive a candle from the same parts and the same ones are missing from both, they agree on no trade and the
# candle exists. These outages therefore start in the second quarter of a half hour, where Yahoo has the first quarter
# and Polygon has no part.
MINUTES = "5m 15m 30m 1h"
BITCOIN = ("BTC/USDT", MINUTES, "2024-03-12T04:50", "2024-03-12T12:20")
APPLE = ("AAPL", MINUTES, "2024-03-12T14:50", "2024-03-13T16:10")
EURO = ("EUR/USD", MINUTES, "2024-03-12T08:20", "2024-03-12T18:40")
DAYS = [
    (symbol, "4h 1d", start, end)
    for symbol, start, end in (
        ("BTC/USDT", "2024-03-09T05:30", "2024-03-14T18:10"),
        ("AAPL", "2024-03-06T16:20", "2024-03-12T18:10"),
        ("EUR/USD", "2024-03-06T05:30", "2024-03-12T18:10"),
    )
]
WEEKS = [(symbol, "1w", "2024-03-06T16:10", "2024-04-10T16:10") for symbol in PROVIDERS]

SHORT = [
    scenario("BTC/USDT", "5m 1h", *BITCOIN[2:], "down"),
    scenario("AAPL", "30m 1h", *APPLE[2:], "lacking"),
    scenario("EUR/USD", "15m 1h", *EURO[2:], "lacking"),
]
LONG = [
    *(scenario(*one, kind) for one in (BITCOIN, APPLE, EURO) for kind in ("down", "lacking")),
    *(scenario(*one, kind, MICROS_PER_HOUR) for one in DAYS for kind in ("down", "lacking")),
    *(scenario(*one, "down", MICROS_PER_HOUR) for one in WEEKS),
]


@pytest.fixture(scope="module")
def running() -> Iterator[LocalMarket]:
    with LocalMarket(MarketConfig(limits=False, now=instant("2024-03-01")), process=True) as market:
        yield market


@dataclass
class Indicators:
    """The results of all indicators (the checks and `status`) after every step.

    `red`: by series and indicator the times at which it failed; `seen`: all times.
    """

    database: Database
    settings: Settings
    environment: Mapping[str, str]
    monkeypatch: pytest.MonkeyPatch
    seen: list[int] = field(default_factory=list)
    red: dict[tuple[Series, str], list[int]] = field(default_factory=dict)

    def evaluate(self, now: int) -> None:
        self.monkeypatch.setattr(app, "now", lambda: now)
        self.seen.append(now)
        for group in groups_of(Catalog(self.settings)):
            wanted = {AssetCheckKey(key, name) for key in group.series for name in CHECK_NAMES}
            for result in evaluate(self.database, group, self.settings, wanted):
                assert result.asset_key is not None
                if not result.passed:
                    self._note(group.series[result.asset_key], str(result.check_name), now)
        rule = app.freshness_rule(self.settings)
        for one in coverage(self.database, Catalog(self.settings).series, now, rule):
            if one.problem() is not None:
                self._note(one.series, "status", now)

    def _note(self, series: Series, indicator: str, now: int) -> None:
        self.red.setdefault((series, indicator), []).append(now)

    def of(self, series: Series, indicator: str) -> list[int]:
        return self.red.get((series, indicator), [])

    def status_check(self) -> int:
        """The current exit code of `fks-backfill status --check`."""
        with self.monkeypatch.context() as patch:
            for name in [n for n in os.environ if n.startswith("FKS_") or n in KEY_VARIABLES.values()]:
                patch.delenv(name)
            for name, value in self.environment.items():
                patch.setenv(name, value)
            return CliRunner().invoke(main, ["status", "--check"], catch_exceptions=False).exit_code


def affected(scenario: Scenario, series: Series, closed_end: int) -> Instants:
    """The candles before `closed_end` that are missing during the outage."""
    grid, window = grid_of(series), scenario.window
    opens = grid.opens(TimeRange(window.start - 2 * series.timeframe.micros - 4 * MICROS_PER_DAY, closed_end))
    if not scenario.down:  # candles that overlap the window
        return opens[(opens < window.end) & (grid.closes(opens) > window.start)]
    # Candles that had not closed at the last tick before the outage.
    every = polling_interval(series.timeframe)
    tick = (window.start - OFFSET) // every * every + OFFSET
    return opens[opens >= grid.closed_end(tick - GRACE)]


@pytest.mark.parametrize(
    "scenario", [*SHORT, *(pytest.param(one, marks=pytest.mark.slow) for one in LONG)], ids=str
)
def test_every_indicator_shows_an_outage(
    scenario: Scenario,
    database: Database,
    database_url: str,
    market: LocalMarket,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "backfill.yaml").write_text(scenario.config)
    environment = {
        "FKS_CONFIG": str(tmp_path / "backfill.yaml"),
        "FKS_HOME": str(tmp_path / "home"),
        "FKS_DATABASE_URL": database_url,
    }
    settings = load_settings(environment, tmp_path)
    names, window, step = PROVIDERS[scenario.symbol], scenario.window, scenario.step
    series = dict.fromkeys(Catalog(settings).series, names)
    longest = max(one.timeframe.micros for one in series)
    begin = (window.start - 2 * MICROS_PER_HOUR) // MICROS_PER_HOUR * MICROS_PER_HOUR + OFFSET
    since = begin - begin % MICROS_PER_DAY - max(3 * MICROS_PER_DAY, 8 * longest)
    market.set_clock(begin)
    keys = dict.fromkeys((name for name in names if name in ("polygon", "oanda")), begin)
    lacking = [Outage(one, window, names) for one in list(series)[:1]]
    down = [Down(name, window) for name in names]
    world = World(
        database,
        market,
        series,
        since,
        begin,
        keys,
        outages=() if scenario.down else lacking,
        downs=down if scenario.down else (),
    )
    indicators = Indicators(database, settings, environment, monkeypatch)
    world.look = lambda: indicators.evaluate(world.now)
    with closing(world):
        world.refresh(MICROS_PER_HOUR)
        world.run(window.start, step)
        assert indicators.red == {}, "no indicator fails before the outage"
        assert indicators.status_check() == 0

        world.run(window.end, step)
        assert indicators.status_check() == 1
        for one in series:
            grid = grid_of(one)
            absent = affected(scenario, one, grid.closed_end(world.now - GRACE))
            assert np.array_equal(absent_of(world, one), absent), "exactly the candles of the outage"
            assert len(absent) > RECENT_CANDLES
            soon = int(grid.closes(absent[RECENT_CANDLES : RECENT_CANDLES + 1])[0])
            soon += 2 * polling_interval(one.timeframe)
            for indicator in ("data_freshness", "status", "completeness"):
                red = indicators.of(one, indicator)
                assert red, f"{one}: {indicator} never failed"
                assert int(grid.closes(absent[:1])[0]) <= red[0] <= soon + OFFSET, (
                    f"{one}: {indicator} at {iso(red[0])}"
                )
                late = [at for at in indicators.seen if at >= soon + OFFSET]
                assert set(late) <= set(red), f"{one}: {indicator} must keep failing"

        # The time limit, by timeframe, after which all indicators pass and keep passing.
        green = {one: green_by(scenario, one) for one in series}
        world.run(max(green.values()) + 2 * step + MICROS_PER_HOUR, step)
        assert indicators.status_check() == 0
        for one in series:
            for indicator in ("data_freshness", "status", "completeness"):
                assert max(indicators.of(one, indicator)) <= green[one], (
                    f"{one}: {indicator} until {iso(max(indicators.of(one, indicator)))}"
                )
            assert indicators.of(one, "ohlc_sanity") == []
            gaps = world.gaps(one)
            absent = affected(scenario, one, window.end) if not scenario.down else np.empty(0, np.int64)
            assert np.array_equal(absent_of(world, one), absent)
            assert {gap.status for gap in gaps} <= {
                GapStatus.UNAVAILABLE,
                GapStatus.NO_TRADE,
                GapStatus.TOLERATED,
            }
            world.compare(one, step)
            assert len(world.lacking(one)) == 0


def absent_of(world: World, series: Series) -> Instants:
    """The candles in gaps of the ledger."""
    grid = grid_of(series)
    return np.concatenate(
        [np.empty(0, np.int64), *(grid.opens(TimeRange(gap.start, gap.end)) for gap in world.gaps(series))]
    )


def green_by(scenario: Scenario, series: Series) -> int:
    """The latest time at which an indicator may fail: the next candle (after failures: the next attempt) plus two
    polling intervals; if candles stay missing, plus the time for which they are recent."""
    grid, end = grid_of(series), scenario.window.end
    after = grid.opens(TimeRange(end, end + 4 * series.timeframe.micros + 5 * MICROS_PER_DAY))
    polls = 2 * polling_interval(series.timeframe) + OFFSET
    if scenario.down:
        if (
            scenario.window.duration > SILENT_AFTER
        ):  # longer than a refresh covers: attempts are at most a day apart
            return end + MICROS_PER_DAY + polls
        return min(int(grid.closes(after[:1])[0]), end + MICROS_PER_DAY) + polls
    recent = int(grid.closes(after[RECENT_CANDLES : RECENT_CANDLES + 1])[0])
    return max(recent, int(grid.closes(after[:1])[0]) + RECENT) + polls


def test_every_class_and_timeframe_has_an_outage() -> None:
    found = {(CLASSES[one.symbol], frame) for one in LONG for frame in one.frames}
    assert found == {
        (kind.value, frame) for kind in AssetClass for frame in ["5m", "15m", "30m", "1h", "4h", "1d", "1w"]
    }
