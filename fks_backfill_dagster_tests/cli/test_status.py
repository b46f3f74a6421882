"""`status` and `status --check`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator

import pytest

from fks_backfill_dagster import app
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.simulator.local import LocalMarket
from fks_backfill_dagster_tests.cli.conftest import Command
from fks_backfill_dagster_tests.cli.test_backfill import JANUARY

ONLY = ("--provider", "binance")


@pytest.fixture
def synced(fks: Command, world: LocalMarket) -> LocalMarket:
    """January 2024 of BTC/USDT 1h, with four hours that no provider has."""
    window = TimeRange(instant("2024-01-10T05:00"), instant("2024-01-10T09:00"))
    world.plant_outage("binance", window)
    fks("backfill", "BTC/USDT", "1h", *JANUARY, *ONLY)
    return world


# Status


def test_status_of_one_series(fks: Command, synced: LocalMarket) -> None:
    result = fks("status", "BTC/USDT", "1h", "--json")
    status, hours = result.json, (int(time.time()) - instant("2024-02-01") // 1_000_000) // 3600
    assert result.exit_code == 0
    assert list(status) == [
        "symbol",
        "timeframe",
        "status",
        "oldest_data",
        "newest_data",
        "total_candles",
        "last_sync",
        "expected",
        "stored",
        "coverage",
        "open_gaps",
        "lag",
        "next_attempt",
        "error",
        "open_findings",
    ]
    assert abs(time.time() - instant(status.pop("last_sync")) / 1e6) < 60
    assert status.pop("lag") in (hours - 1, hours, hours + 1)  # grace, and the hour may turn
    assert instant(status.pop("next_attempt")) / 1e6 < time.time() + 86_400
    assert status == {
        "symbol": "BTC/USDT",
        "timeframe": "1h",
        "status": "completed",
        "oldest_data": "2024-01-01T00:00:00+00:00",
        "newest_data": "2024-01-31T23:00:00+00:00",
        "total_candles": 740,
        "expected": 744,
        "stored": 740,
        "coverage": 0.994624,
        "open_gaps": 1,
        "error": None,
        "open_findings": 0,
    }


def test_status_of_a_series_that_has_not_started(fks: Command, world: LocalMarket) -> None:
    result = fks("status", "BTC/USDT", "1d", "--json")
    assert result.exit_code == 0
    assert result.json == {"symbol": "BTC/USDT", "timeframe": "1d", "status": "not_started"}
    assert fks("status", "BTC/USDT", "1d").stdout.splitlines()[1].split()[-1] == "not_started"


@pytest.mark.parametrize(
    ("symbol", "timeframe", "hint"),
    [
        ("DOGE/USDT", "5m", "see `fks-backfill series list`"),
        ("BTC/USD", "1h", "did you mean BTC/USDT?"),
        ("BTC/USDT", "5m", "BTC/USDT is configured with 1h 1d"),
    ],
)
def test_a_report_of_a_series_that_is_neither_configured_nor_stored(
    fks: Command, world: LocalMarket, symbol: str, timeframe: str, hint: str
) -> None:
    for command, document in (
        ("status", {"symbol": symbol, "timeframe": timeframe, "status": "not_started"}),
        ("gaps", []),
    ):
        result = fks(command, symbol, timeframe, "--json")
        assert (result.exit_code, result.json) == (2, document)
        shown = fks(command, symbol, timeframe)
        assert (shown.exit_code, shown.stdout) == (2, "")
        assert shown.stderr.startswith(f"Error: {symbol} {timeframe} is neither configured nor stored")
        assert hint in shown.stderr
        assert shown.stderr.count("\n") == 1


def test_status_of_a_series_that_is_stored_and_not_configured(fks: Command, world: LocalMarket) -> None:
    fks("backfill", "DOGE/USDT", "1h", *JANUARY, *ONLY)
    assert fks("status", "DOGE/USDT", "1h", "--json").exit_code == 0
    assert fks("gaps", "DOGE/USDT", "1h", "--json").exit_code == 0
    # Not kept fresh, so not stale: nothing else is wrong with it.
    assert fks("status", "DOGE/USDT", "1h", "--check").exit_code == 0


def test_status_of_all(fks: Command, synced: LocalMarket) -> None:
    fks("backfill", "DOGE/USDT", "1h", *JANUARY, *ONLY)  # stored, not configured
    found = {(s["symbol"], s["timeframe"]): s["status"] for s in fks("status", "--json").json}
    assert found == {
        ("BTC/USDT", "1h"): "completed",
        ("BTC/USDT", "1d"): "not_started",
        ("ETH/USDT", "1h"): "not_started",
        ("SOL/BTC", "1h"): "not_started",
        ("DOGE/USDT", "1h"): "completed",
    }
    header, *lines, used = fks("status").stdout.splitlines()
    assert used == f"Settings: {os.environ['FKS_CONFIG']}"
    assert re.split(r"\s{2,}", header) == [
        "series",
        "expected",
        "stored",
        "coverage",
        "open gaps",
        "newest (UTC)",
        "lag",
        "next attempt (UTC)",
        "status",
    ]
    assert [re.split(r"\s{2,}", line)[:5] for line in (lines[0], lines[-1])] == [
        ["BTC/USDT 1h", "744", "740", "99.46 %", "1"],
        ["total of 5", "1,488", "1,480", "99.46 %", "2"],
    ]
    assert "not_started" in lines[1]


# Status --check: with a fixed clock, because candles close while a test runs


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, world: LocalMarket) -> Iterator[Callable[[str], None]]:
    """Sets the current time of the command and the market."""

    def at(moment: str) -> None:
        monkeypatch.setattr(app, "now", lambda: instant(moment))
        world.set_clock(instant(moment))

    at("2024-02-01T00:30")
    yield at
    world.set_clock(None)


def backfill_all(fks: Command) -> None:
    for line in ("BTC/USDT 1h", "BTC/USDT 1d", "ETH/USDT 1h", "SOL/BTC 1h"):
        result = fks("backfill", *line.split(), "--start", "2024-01-01", "--end", "2024-02-01", *ONLY)
        assert result.exit_code == 0, result.stderr


def test_a_check_without_problems_prints_nothing(fks: Command, clock: Callable[[str], None]) -> None:
    never = fks("status", "--check")
    assert never.exit_code == 1
    assert "ETH/USDT 1h: pending: never synced: no candle is stored" in never.stderr
    backfill_all(fks)
    well = fks("status", "--check")
    assert (well.exit_code, well.stderr) == (0, "")
    assert fks("status", "--check", "--json").json == fks("status", "--json").json


def test_a_check_finds_stale_series(fks: Command, clock: Callable[[str], None]) -> None:
    backfill_all(fks)
    clock("2024-02-01T04:30")  # four hours: one allowed, three of margin
    assert fks("status", "--check").exit_code == 0
    clock("2024-02-01T05:30")
    late = fks("status", "--check")
    assert late.exit_code == 1
    assert late.stderr.splitlines() == [
        f"{symbol} 1h: late: 5 closed candles behind, 1 allowed: the newest candle opens at 2024-01-31 23:00"
        for symbol in ("BTC/USDT", "ETH/USDT", "SOL/BTC")
    ]
    assert fks("status", "BTC/USDT", "1d", "--check").exit_code == 0, "no day has closed since"
    assert fks("status").exit_code == 0, "a report exits with 0"
    clock("2024-02-20T00:30")
    assert "BTC/USDT 1d: stale: 19 closed candles behind" in fks("status", "--check").stderr


def test_a_check_takes_its_margin_from_the_settings(
    fks: Command, clock: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    backfill_all(fks)
    clock("2024-02-01T12:30")
    assert "late: 12 closed" in fks("status", "BTC/USDT", "1h", "--check").stderr.replace("stale", "late")
    monkeypatch.setenv("FKS_FRESHNESS__WARN_CANDLES", "11")
    monkeypatch.setenv("FKS_FRESHNESS__ERROR_CANDLES", "20")
    assert fks("status", "BTC/USDT", "1h", "--check").exit_code == 0


def test_a_check_finds_open_gaps_and_errors(
    fks: Command, clock: Callable[[str], None], world: LocalMarket
) -> None:
    backfill_all(fks)
    world.plant_fault("binance", "status", count=None, status=503, seconds=0)
    world.plant_fault("archive", "status", count=None, status=503, seconds=0)
    clock("2024-02-01T02:30")
    assert fks("backfill", "ETH/USDT", "1h", "--start", "2024-02-01", *ONLY).exit_code == 1
    result = fks("status", "--check", "--json")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()[-1:]
    assert line.startswith("ETH/USDT 1h: error: binance: ")
    assert "1 open gap (2 candles missing)" in line
    eth = next(one for one in result.json if one["symbol"] == "ETH/USDT")
    assert (eth["status"], eth["lag"], eth["open_gaps"]) == ("error", 2, 1)
    assert "ETH/USDT 1h: error: binance: " in fks("status", "ETH/USDT", "1h").stderr
    world.clear_faults()
    assert fks("backfill", "ETH/USDT", "1h", "--start", "2024-02-01", *ONLY).exit_code == 0
    assert fks("status", "--check").exit_code == 0


def test_a_range_of_which_no_provider_has_a_candle_is_an_error(
    fks: Command, clock: Callable[[str], None], world: LocalMarket
) -> None:
    world.plant_outage("binance", TimeRange(instant("2024-01-10"), instant("2024-01-12")))
    line = ("backfill", "BTC/USDT", "1h", "--start", "2024-01-10", "--end", "2024-01-12", *ONLY)
    assert fks(*line).exit_code == 1
    status = fks("status", "BTC/USDT", "1h", "--json").json
    assert (status["status"], status["error"]) == ("error", "no provider has any of 48 candles")
    assert (status["expected"], status["stored"], status["coverage"]) == (48, 0, 0.0)
