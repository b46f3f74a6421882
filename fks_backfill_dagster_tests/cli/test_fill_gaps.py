"""`fill-gaps`: requests, output and exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.simulator.local import LocalMarket
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.cli.conftest import Command, start
from fks_backfill_dagster_tests.cli.test_backfill import JANUARY
from fks_backfill_dagster_tests.store.builders import execute

ONLY = ("--provider", "binance")
FIRST = TimeRange(instant("2024-01-10T05:00"), instant("2024-01-10T09:00"))
SECOND = TimeRange(instant("2024-01-20T00:00"), instant("2024-01-20T02:00"))


@pytest.fixture
def holed(fks: Command, world: LocalMarket) -> LocalMarket:
    """January 2024 of BTC/USDT 1h without four and without two hours, which were not requested from Polygon."""
    for window in (FIRST, SECOND):
        world.plant_outage("binance", window)
    fks("backfill", "BTC/USDT", "1h", *JANUARY, *ONLY)
    world.reset_requests()
    return world


def test_every_gap_is_filled_from_the_next_provider(fks: Command, holed: LocalMarket) -> None:
    done = fks("fill-gaps", "BTC/USDT", "1h", "--json")
    assert done.exit_code == 0, done.stderr
    assert done.json == [
        {
            "symbol": "BTC/USDT",
            "timeframe": "1h",
            "start": start,
            "end": end,
            "success": True,
            "provider": "polygon",
            "candles_filled": candles,
            "expected_candles": candles,
            "coverage": 1.0,
            "error": None,
        }
        for start, end, candles in (
            ("2024-01-10T05:00:00+00:00", "2024-01-10T09:00:00+00:00", 4),
            ("2024-01-20T00:00:00+00:00", "2024-01-20T02:00:00+00:00", 2),
        )
    ]
    assert fks("gaps", "BTC/USDT", "1h", *JANUARY, "--json").json == []
    again = fks("fill-gaps", "--json")
    assert (again.exit_code, again.json) == (0, [])
    assert "No gaps to fill." in fks("fill-gaps", "BTC/USDT", "1h").stdout


def test_only_the_gaps_are_requested(fks: Command, holed: LocalMarket) -> None:
    """Neither candles closed since the last sync nor history that was never synced."""
    assert fks("fill-gaps").exit_code == 0
    status = fks("status", "BTC/USDT", "1h", "--json").json
    assert status["total_candles"] == 31 * 24
    assert status["newest_data"] == "2024-01-31T23:00:00+00:00"


def test_a_gap_before_the_oldest_candle_is_reported_and_filled(fks: Command, world: LocalMarket) -> None:
    world.plant_outage("binance", TimeRange(instant("2024-01-01"), instant("2024-01-03")))
    fks("backfill", "BTC/USDT", "1h", *JANUARY, *ONLY)
    result = fks("gaps", "BTC/USDT", "1h", "--end", "2024-02-01")
    assert "48 candles missing before the oldest stored one" in result.stderr
    done = fks("fill-gaps", "BTC/USDT", "1h", "--json")
    assert done.exit_code == 0
    assert [(gap["start"][:10], gap["candles_filled"]) for gap in done.json] == [("2024-01-01", 48)]
    assert "before the oldest" not in fks("gaps", "BTC/USDT", "1h").stderr


def test_without_a_name_the_configured_series_are_requested(
    fks: Command, holed: LocalMarket, settings: Path
) -> None:
    settings.write_text(settings.read_text().replace("BTC/USDT", "LTC/USDT"))
    assert fks("fill-gaps", "--json").json == []
    assert len(fks("fill-gaps", "BTC/USDT", "1h", "--json").json) == 2


def test_a_window_selects_gaps(fks: Command, holed: LocalMarket) -> None:
    window = ("--start", "2024-01-10T06:00", "--end", "2024-01-15")
    [gap] = fks("fill-gaps", "BTC/USDT", "1h", *window, "--json").json
    assert (gap["start"][11:16], gap["candles_filled"]) == ("06:00", 3)
    left = fks("gaps", "BTC/USDT", "1h", *JANUARY, "--json").json
    assert [(gap["start"][:13], gap["missing_candles"]) for gap in left] == [
        ("2024-01-10T05", 1),
        ("2024-01-20T00", 2),
    ]


def test_a_partly_filled_gap_is_reported_as_such(fks: Command, holed: LocalMarket) -> None:
    holed.plant_outage("polygon", TimeRange(FIRST.start, FIRST.start + 3600_000_000))
    done = fks("fill-gaps", "BTC/USDT", "1h", "--json")
    assert done.exit_code == 1
    partly, wholly = done.json
    assert (partly["success"], partly["candles_filled"], partly["coverage"]) == (False, 3, 0.75)
    assert partly["error"] == "binance: absent; polygon: absent"
    assert wholly["success"]
    [left] = fks("gaps", "BTC/USDT", "1h", *JANUARY, "--json").json
    assert (left["missing_candles"], left["status"]) == (1, "unavailable")
    table = fks("fill-gaps", "BTC/USDT", "1h")
    assert table.exit_code == 1
    assert "0 of 1 gap filled" in table.stdout
    assert "binance: absent; polygon: absent" in table.stdout


def test_the_command_ignores_the_back_off(fks: Command, holed: LocalMarket) -> None:
    holed.plant_outage("polygon", FIRST)
    assert fks("fill-gaps").exit_code == 1
    holed.clear_outages()
    done = fks("fill-gaps")
    assert done.exit_code == 0, done.stderr
    assert fks("gaps", "BTC/USDT", "1h", *JANUARY, "--json").json == []


def test_a_failing_provider_is_reported(
    fks: Command, holed: LocalMarket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FKS_PROVIDERS__POLYGON__BASE_URL", "http://127.0.0.1:1")
    done = fks("fill-gaps", "BTC/USDT", "1h", "--start", "2024-01-20", "--json")
    assert done.exit_code == 1
    [gap] = done.json
    assert not gap["success"]
    assert gap["error"].startswith("binance: absent; polygon: ")
    assert (
        fks("gaps", "BTC/USDT", "1h", "--start", "2024-01-20", "--end", "2024-02-01", "--json").json[0][
            "status"
        ]
        == "open"
    )


def test_a_symbol_alone_has_all_of_its_timeframes(fks: Command, holed: LocalMarket) -> None:
    done = fks("fill-gaps", "BTC/USDT", "--json")
    assert (done.exit_code, [gap["candles_filled"] for gap in done.json]) == (0, [4, 2])
    assert "BTC/USDT 1d: never synced" in done.stderr
    assert "written from" not in done.stderr


def test_wrong_arguments_are_usage_errors(fks: Command, holed: LocalMarket) -> None:
    wrong = fks("fill-gaps", "BTC/USDT", "1h", "--start", "2024-02-01", "--end", "2024-01-01")
    assert wrong.exit_code == 2


def test_a_series_with_a_changed_definition_does_not_stop_the_others(
    fks: Command, holed: LocalMarket, database: Database
) -> None:
    fks("backfill", "ETH/USDT", "1h", *JANUARY, *ONLY)
    execute(database, "UPDATE fks.series SET asset_class = 'forex' WHERE symbol = 'BTC/USDT'")
    done = fks("fill-gaps", "--all", "1h", "--json")
    assert done.exit_code == 1
    assert "BTC/USDT 1h" in done.stderr
    assert [(gap["symbol"], gap["success"]) for gap in done.json] == [("ETH/USDT", True)] * 2


def test_never_synced_series(fks: Command, world: LocalMarket) -> None:
    done = fks("fill-gaps", "--json")
    assert (done.exit_code, done.json) == (0, [])
    named = fks("fill-gaps", "BTC/USDT", "1h")
    assert "BTC/USDT 1h: never synced" in named.stderr


def test_two_at_once_fill_a_gap_once(fks: Command, holed: LocalMarket) -> None:
    both = [start("fill-gaps", "BTC/USDT", "1h", "--json") for _ in range(2)]
    for one in both:
        one.communicate(timeout=120)
    assert [one.returncode for one in both] == [0, 0]
    assert fks("gaps", "BTC/USDT", "1h", *JANUARY, "--json").json == []
    assert fks("status", "BTC/USDT", "1h", "--json").json["total_candles"] == 31 * 24
