"""`gaps`: its JSON, its windows, series without gaps."""

from __future__ import annotations

import time

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.simulator.local import LocalMarket
from fks_backfill_dagster_tests.cli.conftest import Command
from fks_backfill_dagster_tests.cli.test_backfill import JANUARY
from fks_backfill_dagster_tests.cli.test_status import ONLY
from fks_backfill_dagster_tests.cli.test_status import synced as synced


def test_a_gap_has_the_keys_of_the_contract(fks: Command, synced: LocalMarket) -> None:
    result = fks("gaps", "BTC/USDT", "1h", *JANUARY, "--json")
    assert result.exit_code == 0
    [gap] = result.json
    evidence = gap.pop("evidence")
    assert gap == {
        "start": "2024-01-10T05:00:00+00:00",
        "end": "2024-01-10T09:00:00+00:00",
        "duration_minutes": 240,
        "missing_candles": 4,
        "status": "open",
    }
    assert [(one["provider"], one["outcome"]) for one in evidence] == [("binance", "absent")]


def test_a_gap_is_clipped_to_the_window_and_recounted(fks: Command, synced: LocalMarket) -> None:
    window = ("--start", "2024-01-10T06:30", "--end", "2024-01-10T08:00")
    [gap] = fks("gaps", "BTC_USDT", "1h", *window, "--json").json
    assert (gap["start"][11:16], gap["end"][11:16], gap["missing_candles"]) == ("07:00", "08:00", 1)
    assert gap["duration_minutes"] == 60


def test_candles_closed_since_the_last_sync_are_an_open_gap(fks: Command, synced: LocalMarket) -> None:
    hours = (int(time.time()) - instant("2024-02-01") // 1_000_000) // 3600
    known, tail = fks("gaps", "BTC/USDT", "1h", "--json").json
    assert known["missing_candles"] == 4
    assert (tail["start"], tail["status"]) == ("2024-02-01T00:00:00+00:00", "open")
    assert tail["missing_candles"] in (hours - 1, hours, hours + 1)  # grace, and the hour may turn
    assert tail["evidence"] == [
        {"outcome": "not_asked", "detail": "after the end of the synced range, not requested yet"}
    ]
    [week] = fks("gaps", "BTC/USDT", "1h", "--start", "2024-02-05", "--end", "2024-02-12", "--json").json
    assert week["missing_candles"] == 168


def test_never_synced_history_is_not_a_gap(fks: Command, synced: LocalMarket) -> None:
    assert fks("gaps", "BTC/USDT", "1h", "--start", "2020-01-01", "--end", "2024-01-05", "--json").json == []
    never = fks("gaps", "ETH/USDT", "1h", "--json")
    assert (never.exit_code, never.json) == (0, [])
    assert "No gaps." in fks("gaps", "ETH/USDT", "1h").stderr


def test_gaps_of_many_series_name_their_series(fks: Command, synced: LocalMarket) -> None:
    fks("backfill", "ETH/USDT", "1h", *JANUARY, *ONLY)
    found = fks("gaps", "--all", "1h", *JANUARY, "--json").json
    assert [(gap["symbol"], gap["timeframe"]) for gap in found] == [("BTC/USDT", "1h"), ("ETH/USDT", "1h")]
    table = fks("gaps", "BTC/USDT", "1h", *JANUARY).stdout.splitlines()
    assert table[1].split() == (
        [
            "BTC/USDT",
            "1h",
            "2024-01-10",
            "05:00",
            "2024-01-10",
            "09:00",
            "4",
            "open",
            "binance:",
            "absent",
        ]
    )


def test_an_outage_of_the_venue_is_reported_once(fks: Command, world: LocalMarket) -> None:
    world.plant_outage("binance", TimeRange(instant("2024-01-10T05:00"), instant("2024-01-10T11:00")))
    for symbol in ("BTC/USDT", "ETH/USDT", "SOL/BTC"):
        fks("backfill", symbol, "1h", *JANUARY, *ONLY)
    result = fks("gaps", "--all", "1h", *JANUARY, "--json")
    assert len(result.json) == 3
    line = "crypto: 2024-01-10 05:00 .. 11:00: 3 of 3 symbols miss 6 h; requested: binance\n"
    assert result.stderr == line
    assert fks("gaps", "*", "1h", *JANUARY).stderr == line
    assert fks("gaps", "BTC/USDT", "1h", *JANUARY).stderr == ""


def test_gaps_of_a_series_that_was_never_synced(fks: Command, world: LocalMarket) -> None:
    result = fks("gaps", "ETH/USDT", "1h", "--json")
    assert (result.exit_code, result.json) == (0, [])
    assert result.stderr == (
        "ETH/USDT 1h: never synced, so it has no known gaps; run `fks-backfill backfill ETH/USDT 1h` first.\n"
    )
