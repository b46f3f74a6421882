"""`series`: what is configured and stored, removal, providers and their waits; `batches`: lineage and undo."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fks_backfill_dagster import app
from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.simulator.local import LocalMarket
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.ledger import hold_lease, register
from fks_backfill_dagster_tests.cli.conftest import Command, start
from fks_backfill_dagster_tests.cli.test_backfill import BTC, JANUARY
from fks_backfill_dagster_tests.cli.test_status import ONLY
from fks_backfill_dagster_tests.cli.test_status import synced as synced


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


def test_the_depth_of_a_provider_is_listed(fks: Command, world: LocalMarket) -> None:
    rows = [row for row in fks("series", "providers", "--json").json if row["provider"] == "yfinance"]
    depths = {timeframe: row["depth_days"] for row in rows for timeframe in row["timeframes"]}
    assert len(depths) == sum(len(row["timeframes"]) for row in rows), "each timeframe is listed once"
    assert depths["1m"] < depths["5m"] < 100
    assert depths["1d"] is None
