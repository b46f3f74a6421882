"""`gaps`, `status`, `series`, `batches`: output, removal of a series, undo of a batch."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fks_backfill_dagster import app
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.simulator.local import LocalMarket
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.ledger import hold_lease, register
from fks_backfill_dagster_tests.cli.conftest import Command, start
from fks_backfill_dagster_tests.cli.test_backfill import BTC, JANUARY

ONLY = ("--provider", "binance")


@pytest.fixture
def synced(fks: Command, world: LocalMarket) -> LocalMarket:
    """January 2024 of BTC/USDT 1h, with four hours that no provider has."""
    window = TimeRange(instant("2024-01-10T05:00"), instant("2024-01-10T09:00"))
    world.plant_outage("binance", window)
    fks("backfill", "BTC/USDT", "1h", *JANUARY, *ONLY)
    return world


# Gaps


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


# Series


def test_series_list_has_configured_and_stored_ones(fks: Command, synced: LocalMarket) -> None:
    fks("backfill", "DOGE/USDT", "1h", *JANUARY, *ONLY)
    found = {(s["symbol"], s["timeframe"]): s for s in fks("series", "list", "--json").json}
    assert found["BTC/USDT", "1h"] == {
        "symbol": "BTC/USDT",
        "timeframe": "1h",
        "asset_class": "crypto",
        "configured": True,
        "total_candles": 740,
        "oldest_data": "2024-01-01T00:00:00+00:00",
        "newest_data": "2024-01-31T23:00:00+00:00",
        "provider_priority": ["binance", "coingecko", "polygon"],
    }
    assert found["DOGE/USDT", "1h"]["configured"] is False
    assert found["SOL/BTC", "1h"]["total_candles"] == 0
    assert len(found) == 5
    assert "binance, coingecko, polygon" in fks("series", "list").stdout


def test_a_series_is_removed_only_with_yes(fks: Command, synced: LocalMarket) -> None:
    line = ("series", "remove", "BTC/USDT", "1h")
    refused = fks(*line)
    assert refused.exit_code == 2
    assert "740 candles" in refused.stderr
    assert "--yes" in refused.stderr
    assert fks("status", "BTC/USDT", "1h", "--json").json["total_candles"] == 740
    done = fks(*line, "--yes", "--json")
    assert (done.exit_code, done.json["candles_removed"]) == (0, 740)
    assert fks("status", "BTC/USDT", "1h", "--json").json["status"] == "not_started"
    assert fks("batches", "list", "--json").json == []
    again = fks(*line, "--yes")
    assert (again.exit_code, again.stdout) == (1, "")
    refilled = fks("backfill", "BTC/USDT", "1h", *JANUARY, *ONLY, "--json")
    assert refilled.json["total_candles"] == 740


def test_a_series_that_is_being_synced_is_not_removed(
    fks: Command, synced: LocalMarket, database: Database
) -> None:
    with database.begin() as connection:
        hold_lease(connection, register(connection, BTC), "another-process", 60)
    result = fks("series", "remove", "BTC/USDT", "1h", "--yes")
    assert result.exit_code == 1
    assert "being synced" in result.stderr
    assert fks("status", "BTC/USDT", "1h", "--json").json["total_candles"] == 740


def test_providers_with_their_timeframes_and_keys(
    fks: Command, world: LocalMarket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POLYGON_API_KEY")
    monkeypatch.setenv("FKS_PROVIDERS__OANDA__ENABLED", "false")
    found = fks("series", "providers", "--json").json
    states = {row["provider"]: row["state"] for row in found}
    assert list(states) == ["binance", "coingecko", "polygon", "yfinance", "alphavantage", "oanda"]
    assert states["binance"] == "ready"
    assert states["polygon"] == "POLYGON_API_KEY is not set"
    assert states["oanda"] == "disabled"
    [binance] = [row for row in found if row["provider"] == "binance"]
    assert binance["timeframes"] == ["1m", "5m", "15m", "30m", "1h", "4h", "1d", "1w"]
    assert binance["asset_class"] == "crypto"
    assert "POLYGON_API_KEY is not set" in fks("series", "providers").stdout


def test_providers_at_a_custom_address(fks: Command, world: LocalMarket) -> None:
    found = {row["provider"]: row["custom_address"] for row in fks("series", "providers", "--json").json}
    assert found == {
        "binance": f"{world.binance_url} (archives: {world.archive_url})",
        "coingecko": None,
        "polygon": world.polygon_url,
        "yfinance": None,
        "alphavantage": None,
        "oanda": None,
    }
    shown = fks("series", "providers").stdout.splitlines()
    assert shown[0].endswith("  address")
    assert next(line for line in shown if line.startswith("polygon")).endswith(f"  {world.polygon_url}")
    assert next(line for line in shown if line.startswith("yfinance")).endswith("  default")


def test_providers_in_a_cool_down_or_a_requested_wait(
    fks: Command, world: LocalMarket, database_url: str
) -> None:
    """Of the account of the settings only: another key of the same provider does not count."""
    settings = load_settings()
    options = app.enabled_options(settings)
    other = options | {"polygon": replace(options["polygon"], key="another")}
    with app.open_database(settings) as database:
        app.limiter_for(other, database).cool_down("polygon", 90)
        for _ in range(5):
            app.circuit_for(options, database).failed("binance", "binance: answered 503")
        states = {row["provider"]: row["state"] for row in fks("series", "providers", "--json").json}
        assert states["polygon"] == "ready"
        app.limiter_for(options, database).cool_down("polygon", 90)
        states = {row["provider"]: row["state"] for row in fks("series", "providers", "--json").json}
    assert re.fullmatch(r"requested a wait of another (8\d|90) s", states["polygon"])
    assert re.fullmatch(
        r"cool-down for another (5\d|60) s: failed 5 times in a row, last error: binance: answered 503",
        states["binance"],
    )
    lines = r"binance: cool-down for another \d+ s: failed 5 times .*\npolygon: requested a wait of another \d+ s\n"
    for names in (["BTC/USDT", "1h"], []):
        result = fks("status", *names, "--json")
        assert re.fullmatch(lines, result.stderr)
        assert result.json == fks("status", *names, "--json").json, "stdout holds only the document"
    assert re.fullmatch(lines, fks("status").stderr)


def test_a_wait_is_ended_by_a_reset(
    fks: Command, world: LocalMarket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait of a century counts as a day; a reset ends it, for other processes, too."""
    monkeypatch.setenv("FKS_PROVIDERS__BINANCE__ARCHIVE_URL", "null")
    world.plant_fault("binance", "status", count=1, status=429, seconds=3.2e9)
    line = ("backfill", "BTC/USDT", "1h", *JANUARY, *ONLY, "--json")
    assert fks(*line).exit_code == 1
    requests = world.requests()
    assert fks(*line).exit_code == 1
    assert world.requests() == requests, "no request is sent"
    assert re.search(r"binance: requested a wait of another 86\d{3} s\n", fks("status").stderr)
    result = fks("series", "providers", "--reset", "binance")
    assert result.exit_code == 0
    assert re.match(r"binance: ended the wait of another 86,\d{3} s that it requested", result.stdout)
    assert fks(*line).exit_code == 0


def test_a_waiting_process_continues_after_a_reset(
    fks: Command, world: LocalMarket, database: Database
) -> None:
    options = app.enabled_options(load_settings())
    app.limiter_for(options, database).cool_down("binance", 250)
    with start("backfill", "BTC/USDT", "1h", *JANUARY, *ONLY) as running:
        assert running.stderr is not None
        assert any("demanded by the provider" in line for line in running.stderr)
        began = time.monotonic()
        assert fks("series", "providers", "--reset", "binance").exit_code == 0
        running.communicate(timeout=120)
    assert running.returncode == 0
    assert time.monotonic() - began < 100


def test_a_cool_down_is_ended_by_a_reset(fks: Command, world: LocalMarket, database_url: str) -> None:
    settings = load_settings()
    options = app.enabled_options(settings)
    reset = ("series", "providers", "--reset", "binance")
    with app.open_database(settings) as database:
        for _ in range(5):
            app.circuit_for(options, database).failed("binance", "binance: answered 503")
        app.limiter_for(options, database).cool_down("binance-archive", 1e9)
        document = fks(*reset, "--json").json
        for _ in range(2):
            app.circuit_for(options, database).failed("binance", "binance: answered 502")
        shown = fks(*reset).stdout
    assert document["provider"] == "binance"
    rest, archive = document["ended"]
    assert (rest["provider"], rest["told_to_wait_seconds"], rest["failures"]) == ("binance", None, 5)
    assert 0 < rest["cool_down_seconds"] <= 60
    assert rest["reason"] == "binance: answered 503"
    assert (archive["provider"], archive["cool_down_seconds"], archive["failures"]) == (
        "binance-archive",
        None,
        0,
    )
    assert 86_000 < archive["told_to_wait_seconds"] <= 86_400
    assert shown == "binance: ended the failure count (2, the last failure: binance: answered 502).\n"
    assert fks(*reset).stdout == "binance: nothing to reset: it is requested as usual.\n"
    assert fks(*reset, "--json").json == {"provider": "binance", "ended": []}


@pytest.mark.parametrize(("name", "hint"), [("binanse", "did you mean binance?"), ("?", "known: binance ")])
def test_an_unknown_provider_is_not_reset(fks: Command, settings: Path, name: str, hint: str) -> None:
    result = fks("series", "providers", "--reset", name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{name!r} is not a provider" in result.stderr
    assert hint in result.stderr


# Batches


def test_batches_name_the_origin_of_candles(fks: Command, synced: LocalMarket) -> None:
    fks("backfill", "ETH/USDT", "1h", *JANUARY, *ONLY)
    newest, oldest = fks("batches", "list", "--json").json
    assert (newest["symbol"], oldest["symbol"]) == ("ETH/USDT", "BTC/USDT")
    assert (oldest["provider"], oldest["inserted"], oldest["updated"]) == ("binance", 740, 0)
    assert oldest["range_start"] == "2024-01-01T00:00:00+00:00"
    assert [b["id"] for b in fks("batches", "list", "BTC_USDT", "1h", "--json").json] == [oldest["id"]]
    assert len(fks("batches", "list", "--limit", "1", "--json").json) == 1
    assert oldest["source"] in fks("batches", "list").stdout


def test_undo_of_a_batch(fks: Command, synced: LocalMarket) -> None:
    [batch] = fks("batches", "list", "--json").json
    done = fks("batches", "undo", str(batch["id"]), "--json")
    assert (done.exit_code, done.json["candles_taken_back"], done.json["missing"]) == (0, 740, 744)
    assert fks("status", "BTC/USDT", "1h", "--json").json["total_candles"] == 0
    [gap] = fks("gaps", "BTC/USDT", "1h", *JANUARY, "--json").json
    assert (gap["missing_candles"], gap["status"]) == (744, "open")
    twice = fks("batches", "undo", str(batch["id"]))
    assert (twice.exit_code, twice.stdout) == (1, "")
    unknown = fks("batches", "undo", "999999")
    assert (unknown.exit_code, unknown.stdout) == (2, "")
    assert "batches list" in unknown.stderr


@pytest.mark.parametrize("number", ["0", "-1", "99999999999999999999"])
def test_an_invalid_batch_id_is_a_usage_error(fks: Command, number: str) -> None:
    result = fks("batches", "undo", "--", number)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "is not in the range" in result.stderr


def test_gaps_of_a_series_that_was_never_synced(fks: Command, world: LocalMarket) -> None:
    result = fks("gaps", "ETH/USDT", "1h", "--json")
    assert (result.exit_code, result.json) == (0, [])
    assert result.stderr == (
        "ETH/USDT 1h: never synced, so it has no known gaps; run `fks-backfill backfill ETH/USDT 1h` first.\n"
    )


def test_the_depth_of_a_provider_is_listed(fks: Command, world: LocalMarket) -> None:
    rows = [row for row in fks("series", "providers", "--json").json if row["provider"] == "yfinance"]
    depths = {timeframe: row["depth_days"] for row in rows for timeframe in row["timeframes"]}
    assert len(depths) == sum(len(row["timeframes"]) for row in rows), "each timeframe is listed once"
    assert depths["1m"] < depths["5m"] < 100
    assert depths["1d"] is None
