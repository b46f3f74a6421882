"""A planted outage of every provider, for every asset class and timeframe from 5m up: all that shows data is red
while it lasts, soon enough, and green again by itself.

The clocks are moved (pipeline/weeks.py); after every step all checks are evaluated as Dagster's ops do, and the
coverage as `status --check` does. What is stored and what the ledger has is compared with the market. 1m in real time,
through a running `up`: test_outage_of_minutes.py.
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
from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.settings.model import KEY_VARIABLES, Settings
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.pipeline.weeks import Down, Outage, World

QUARTER = 15 * MICROS_PER_MINUTE
OFFSET = 2 * MICROS_PER_MINUTE
"""Ticks come a little after candles have closed."""

PROVIDERS = {
    "BTC/USDT": ("binance", "polygon"),
    "AAPL": ("polygon", "yfinance"),
    "EUR/USD": ("oanda", "polygon"),
}
CLASSES = {"BTC/USDT": "crypto", "AAPL": "stocks", "EUR/USD": "forex"}


@dataclass(frozen=True)
class Scenario:
    """An outage of every provider of a symbol. `down`: they respond to no request; else they respond without the
    candles of the window, then and later."""

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


# The outages begin and end beside the clock, so that derived candles lose some of their parts only. Providers that make
# a candle of the same parts and lack the same ones agree that nothing was traded in these, and the candle exists: so
# these outages begin in the second quarter of a half hour, where Yahoo has the first one and Polygon has no part.
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
class Faces:
    """What everything that shows data showed, after every step.

    `red`: by series and face (a check, or `status`) the moments at which it was; `seen`: all moments.
    """

    database: Database
    settings: Settings
    environment: Mapping[str, str]
    monkeypatch: pytest.MonkeyPatch
    seen: list[int] = field(default_factory=list)
    red: dict[tuple[Series, str], list[int]] = field(default_factory=dict)

    def look(self, now: int) -> None:
        self.monkeypatch.setattr(app, "now", lambda: now)
        self.seen.append(now)
        for group in groups_of(self.settings):
            wanted = {AssetCheckKey(key, name) for key in group.series for name in CHECK_NAMES}
            for result in evaluate(self.database, group, self.settings, wanted):
                assert result.asset_key is not None
                if not result.passed:
                    self._note(group.series[result.asset_key], str(result.check_name), now)
        rule = app.freshness_rule(self.settings)
        for one in coverage(self.database, self.settings.series(), now, rule):
            if one.problem() is not None:
                self._note(one.series, "status", now)

    def _note(self, series: Series, face: str, now: int) -> None:
        self.red.setdefault((series, face), []).append(now)

    def of(self, series: Series, face: str) -> list[int]:
        return self.red.get((series, face), [])

    def status_check(self) -> int:
        """The exit code of `fks-backfill status --check`, now."""
        with self.monkeypatch.context() as patch:
            for name in [n for n in os.environ if n.startswith("FKS_") or n in KEY_VARIABLES.values()]:
                patch.delenv(name)
            for name, value in self.environment.items():
                patch.setenv(name, value)
            return CliRunner().invoke(main, ["status", "--check"], catch_exceptions=False).exit_code


def hit(scenario: Scenario, series: Series, closed_end: int) -> Instants:
    """The candles that the outage leaves absent as long as it lasts, of those before `closed_end`."""
    grid, window = grid_of(series), scenario.window
    opens = grid.opens(TimeRange(window.start - 2 * series.timeframe.micros - 4 * MICROS_PER_DAY, closed_end))
    if not scenario.down:  # those of which a part lies in the window
        return opens[(opens < window.end) & (grid.closes(opens) > window.start)]
    # What had not closed at the last tick before it, by which a series was looked at.
    every = polling_interval(series.timeframe)
    tick = (window.start - OFFSET) // every * every + OFFSET
    return opens[opens >= grid.closed_end(tick - GRACE)]


@pytest.mark.parametrize(
    "scenario", [*SHORT, *(pytest.param(one, marks=pytest.mark.slow) for one in LONG)], ids=str
)
def test_an_outage_is_seen_by_every_face(
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
    series = dict.fromkeys(settings.series(), names)
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
    faces = Faces(database, settings, environment, monkeypatch)
    world.look = lambda: faces.look(world.now)
    with closing(world):
        world.refresh(MICROS_PER_HOUR)
        world.run(window.start, step)
        assert faces.red == {}, "all is well before"
        assert faces.status_check() == 0

        world.run(window.end, step)
        assert faces.status_check() == 1
        for one in series:
            grid = grid_of(one)
            absent = hit(scenario, one, grid.closed_end(world.now - GRACE))
            assert np.array_equal(absent_of(world, one), absent), "exactly what nobody gave"
            assert len(absent) > RECENT_CANDLES
            soon = int(grid.closes(absent[RECENT_CANDLES : RECENT_CANDLES + 1])[0])
            soon += 2 * polling_interval(one.timeframe)
            for face in ("data_freshness", "status", "completeness"):
                red = faces.of(one, face)
                assert red, f"{one}: {face} never"
                assert int(grid.closes(absent[:1])[0]) <= red[0] <= soon + OFFSET, (
                    f"{one}: {face} at {iso(red[0])}"
                )
                late = [at for at in faces.seen if at >= soon + OFFSET]
                assert set(late) <= set(red), f"{one}: {face} stays red"

        # How long it takes at most, by its timeframe, until all is green again, and stays so.
        green = {one: green_by(scenario, one) for one in series}
        world.run(max(green.values()) + 2 * step + MICROS_PER_HOUR, step)
        assert faces.status_check() == 0
        for one in series:
            for face in ("data_freshness", "status", "completeness"):
                assert max(faces.of(one, face)) <= green[one], (
                    f"{one}: {face} until {iso(max(faces.of(one, face)))}"
                )
            assert faces.of(one, "ohlc_sanity") == []
            gaps = world.gaps(one)
            absent = hit(scenario, one, window.end) if not scenario.down else np.empty(0, np.int64)
            assert np.array_equal(absent_of(world, one), absent)
            assert {gap.status for gap in gaps} <= {
                GapStatus.UNAVAILABLE,
                GapStatus.NO_TRADE,
                GapStatus.TOLERATED,
            }
            world.compare(one, step)
            assert len(world.lacking(one)) == 0


def absent_of(world: World, series: Series) -> Instants:
    """What the ledger says is absent."""
    grid = grid_of(series)
    return np.concatenate(
        [np.empty(0, np.int64), *(grid.opens(TimeRange(gap.start, gap.end)) for gap in world.gaps(series))]
    )


def green_by(scenario: Scenario, series: Series) -> int:
    """When a face may be red for the last time: until the next candle (or, of what failed, the next attempt) and two
    polling intervals more; where candles stay absent, for as long again as they are recent."""
    grid, end = grid_of(series), scenario.window.end
    after = grid.opens(TimeRange(end, end + 4 * series.timeframe.micros + 5 * MICROS_PER_DAY))
    polls = 2 * polling_interval(series.timeframe) + OFFSET
    if scenario.down:
        if (
            scenario.window.duration > SILENT_AFTER
        ):  # more than a refresh takes in: its attempts are a day apart at most
            return end + MICROS_PER_DAY + polls
        return min(int(grid.closes(after[:1])[0]), end + MICROS_PER_DAY) + polls
    recent = int(grid.closes(after[RECENT_CANDLES : RECENT_CANDLES + 1])[0])
    return max(recent, int(grid.closes(after[:1])[0]) + RECENT) + polls


def test_every_class_and_timeframe_has_its_outage() -> None:
    found = {(CLASSES[one.symbol], frame) for one in LONG for frame in one.frames}
    assert found == {
        (kind.value, frame) for kind in AssetClass for frame in ["5m", "15m", "30m", "1h", "4h", "1d", "1w"]
    }
