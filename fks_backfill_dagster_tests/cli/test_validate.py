"""`validate` end to end: real PostgreSQL, the local market over HTTP, verdicts and exit codes."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fks_backfill_dagster import app
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.pipeline import validate
from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.simulator.local import LocalMarket
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.cli.conftest import CONFIG, Command
from fks_backfill_dagster_tests.store.builders import execute, fetch

BTC = ("BTC/USDT", "1h")
JANUARY = ("--start", "2024-01-01", "--end", "2024-02-01")
QUARTER = ("--start", "2024-01-01", "--end", "2024-04-01")
CONTRACT = [
    "valid",
    "reason",
    "compared",
    "total_records",
    "discrepancy_count",
    "discrepancies",
    "compared_at",
    "providers",
]


@pytest.fixture
def stored(fks: Command, world: LocalMarket) -> LocalMarket:
    """January of BTC/USDT at 1h, delivered by Binance."""
    assert fks("backfill", *BTC, *JANUARY, "--provider", "binance").exit_code == 0
    world.reset_requests()
    return world


def verdicts(database: Database) -> list[tuple[object, ...]]:
    return fetch(
        database,
        "SELECT symbol, timeframe, compared, discrepancies, providers FROM fks.validations ORDER BY 1",
    )


def test_agreeing_providers(fks: Command, stored: LocalMarket, database: Database) -> None:
    result = fks("validate", *BTC, *JANUARY, "--full", "--json")
    found = result.json
    assert result.exit_code == 0
    assert list(found)[: len(CONTRACT)] == CONTRACT
    assert (found["valid"], found["reason"]) == (True, None)
    assert (found["compared"], found["total_records"]) == (744, 744)
    assert (found["discrepancy_count"], found["discrepancies"]) == (0, [])
    assert (found["compared_at"], found["providers"]) == ("1h", ["polygon"])
    # Polygon's prices are 100 ppm above Binance's.
    assert found["sources"]["polygon"]["fields"]["close"]["max"] == pytest.approx(1e-4, rel=0.05)
    assert found["sample"]["complete"] is True
    assert stored.requests("binance") + stored.requests("archive") == 0  # it delivered these candles
    assert "744 candles of 1h (all of the range) to compare with polygon" in result.stderr
    assert verdicts(database) == [("BTC/USDT", "1h", 744, 0, ["polygon"])]


def test_a_missing_key_is_one_warning(fks: Command, stored: LocalMarket) -> None:
    result = fks("validate", *BTC, *JANUARY)
    assert result.exit_code == 0
    assert result.stderr.count("coingecko is skipped: COINGECKO_API_KEY is not set") == 1
    assert result.stdout.startswith(
        "BTC/USDT 1h: valid (744 candles of 1h compared, 744 stored, 0 discrepancies)"
    )


def test_a_tighter_tolerance(fks: Command, stored: LocalMarket) -> None:
    result = fks("validate", *BTC, *JANUARY, "--tolerance", "0.00001", "--json")
    found = result.json
    assert (result.exit_code, found["valid"], found["tolerance"]) == (1, False, 0.00001)
    assert found["discrepancy_count"] > len(found["discrepancies"]) == 100
    worst = found["discrepancies"][0]
    assert set(worst) == {"timestamp", "field", "stored", "validation", "difference_pct", "provider"}
    expected = abs(worst["stored"] - worst["validation"]) / worst["validation"]
    assert worst["difference_pct"] == pytest.approx(expected)


def test_a_factor_of_100(fks: Command, stored: LocalMarket, database: Database) -> None:
    execute(
        database,
        "UPDATE fks.candles_1h SET open = open * 100, high = high * 100, low = low * 100, close = close * 100"
        " WHERE ts >= '2024-01-20Z'",
    )
    result = fks("validate", *BTC, *JANUARY, "--full", "--json")
    found = result.json
    assert (result.exit_code, found["valid"], found["discrepancy_count"]) == (1, False, 12 * 24 * 4)
    assert found["classification"]["polygon"]["pattern"] == "constant_factor"
    assert "288 of 744 candles differ (stored prices are 100 times the others)" in found["reason"]
    assert verdicts(database) == [("BTC/USDT", "1h", 744, 1152, ["polygon"])]
    text = fks("validate", *BTC, *JANUARY, "--full")
    assert "INVALID: polygon: 288 of 744 candles differ" in text.stdout
    row = r"2024-01-\d\d \d\d:00 +\w+ +3\d{6}[.\d]* +3\d{4}[.\d]* +98\d\d\.\d\d% +polygon"
    assert len(re.findall(row, text.stdout)) == 10


def test_another_symbol(fks: Command, stored: LocalMarket) -> None:
    stored.plant_fault("polygon", "other_symbol", count=None, other="ETH/USDT")
    result = fks("validate", *BTC, *JANUARY, "--full", "--json")
    assert (result.exit_code, result.json["valid"]) == (1, False)
    assert result.json["classification"]["polygon"]["pattern"] == "other_symbol"


def test_a_wick(fks: Command, stored: LocalMarket, database: Database) -> None:
    """A single one, found by the sample of a longer range: it is one of the largest moves."""
    assert fks("backfill", *BTC, *QUARTER, "--provider", "binance").exit_code == 0
    execute(database, "UPDATE fks.candles_1h SET low = low / 2 WHERE ts = '2024-02-13 05:00Z'")
    result = fks("validate", *BTC, *QUARTER, "--json")
    found = result.json
    assert (result.exit_code, found["valid"], found["discrepancy_count"]) == (1, False, 1)
    assert found["discrepancies"][0]["timestamp"] == "2024-02-13T05:00:00+00:00"
    assert found["discrepancies"][0]["field"] == "low"
    assert found["classification"]["polygon"]["pattern"] == "wick"
    assert 0 < found["compared"] < found["total_records"] == 2184
    assert found["sample"]["complete"] is False


def test_a_sample_is_repeatable_and_cheaper(fks: Command, stored: LocalMarket) -> None:
    assert fks("backfill", *BTC, *QUARTER, "--provider", "binance").exit_code == 0
    first, second = (fks("validate", *BTC, *QUARTER, "--sample", "0.1", "--json").json for _ in range(2))
    assert first["valid"] is True
    assert first == second
    assert 0 < first["compared"] < 1000


def test_a_dry_run_requests_nothing(fks: Command, stored: LocalMarket, database: Database) -> None:
    result = fks("validate", *BTC, *JANUARY, "--full", "--dry-run", "--json")
    assert result.exit_code == 0
    cost = result.json["providers"]["polygon"]
    assert (cost["candles"], cost["requests"]) == (744, 1)
    assert stored.requests() == 0
    assert verdicts(database) == []
    table = fks("validate", *BTC, *JANUARY, "--dry-run").stdout
    assert "polygon" in table
    fks("validate", *BTC, *JANUARY, "--full")
    assert stored.requests("polygon") == cost["requests"]


def test_the_second_provider_is_down(fks: Command, stored: LocalMarket, database: Database) -> None:
    stored.plant_fault("polygon", "status", count=None, status=404)
    result = fks("validate", *BTC, *JANUARY, "--json")
    found = result.json
    assert (result.exit_code, found["valid"], found["compared"]) == (1, None, 0)
    assert found["providers"] == []
    assert "404" in found["reason"]
    assert found["sources"]["polygon"]["not_comparable"] == {"request_failed": 744}
    assert verdicts(database) == []  # zero discrepancies could be read as agreement


def test_a_provider_in_a_cool_down(fks: Command, stored: LocalMarket) -> None:
    """It is not requested, unless by name."""
    settings = load_settings()
    with app.open_database(settings) as opened:
        circuit = app.circuit_for(app.enabled_options(settings), opened)
        for _ in range(5):
            circuit.failed("polygon", "polygon: answered 503")
        result = fks("validate", *BTC, *JANUARY, "--json")
        assert (result.exit_code, result.json["valid"]) == (1, None)
        assert "polygon: not requested for another" in result.json["reason"]
        assert stored.requests() == 0
        assert fks("validate", *BTC, *JANUARY, "--provider", "polygon").exit_code == 0
    assert stored.requests("polygon") == 1


def test_no_provider_has_a_key(
    fks: Command, stored: LocalMarket, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POLYGON_API_KEY")
    result = fks("validate", *BTC, *JANUARY, "--json")
    found = result.json
    assert (result.exit_code, found["valid"]) == (1, None)
    assert "polygon needs a key: POLYGON_API_KEY is not set" in found["reason"]
    assert "binance delivered these candles itself" in found["reason"]
    assert stored.requests() == 0
    assert verdicts(database) == []


def test_others_of_the_priority(fks: Command, world: LocalMarket) -> None:
    """Polygon delivered the candles, CoinGecko has no key: Binance, no validation provider, is the next."""
    assert fks("backfill", *BTC, *JANUARY, "--provider", "polygon").exit_code == 0
    world.reset_requests()
    found = fks("validate", *BTC, *JANUARY, "--json").json
    assert (found["valid"], found["providers"], found["compared"]) == (True, ["binance"], 744)
    assert world.requests("polygon") == 0


def test_each_candle_is_compared_with_providers_that_did_not_deliver_it(
    fks: Command, world: LocalMarket
) -> None:
    outage = TimeRange(instant("2024-01-10"), instant("2024-01-12"))
    world.plant_outage("binance", outage)
    assert fks("backfill", *BTC, *JANUARY).exit_code == 0
    world.clear_outages()
    found = fks("validate", *BTC, *JANUARY, "--json").json
    assert (found["valid"], found["compared"]) == (True, 744 - 48)
    assert found["sources"]["polygon"]["not_comparable"] == {"delivered_by_it": 48}
    assert found["reason"] == "48 of 744 candles could not be compared"
    named = fks("validate", *BTC, *JANUARY, "--provider", "binance", "--json").json
    assert (named["compared"], named["providers"]) == (48, ["binance"])


def test_a_timeframe_that_no_other_provider_has(
    fks: Command, world: LocalMarket, settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CoinGecko has no 1m, and of last week 4h at the finest: candles of 1m are aggregated."""
    monkeypatch.setenv("COINGECKO_API_KEY", "any")
    monkeypatch.setenv("FKS_PROVIDERS__COINGECKO__BASE_URL", world.coingecko_url)
    monkeypatch.delenv("POLYGON_API_KEY")
    end = datetime.now(UTC).replace(hour=2, minute=0, second=0, microsecond=0) - timedelta(days=4)
    window = ("--start", (end - timedelta(days=1)).isoformat(), "--end", end.isoformat())
    assert fks("backfill", "BTC/USDT", "1m", *window, "--provider", "binance").exit_code == 0
    result = fks("validate", "BTC/USDT", "1m", *window, "--tolerance", "0.05", "--json")
    found = result.json
    assert (found["valid"], found["compared_at"], found["providers"]) == (True, "4h", ["coingecko"])
    assert (found["total_records"], found["compared"]) == (1440, 5)
    assert found["sample"]["incomplete"] == 1  # at the end of the range
    assert found["sources"]["coingecko"]["fields"]["volume"] == {"max": None, "p99": None}


def test_three_sources(
    fks: Command, stored: LocalMarket, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored candles that are wrong contradict both others."""
    monkeypatch.setenv("FKS_PROVIDERS__COINGECKO__BASE_URL", stored.coingecko_url)
    monkeypatch.setenv("COINGECKO_API_KEY", "any")
    end = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=2)
    window = ("--start", (end - timedelta(days=5)).isoformat(), "--end", end.isoformat())
    assert fks("backfill", "BTC/USDT", "4h", *window, "--provider", "binance").exit_code == 0
    execute(database, "UPDATE fks.candles_4h SET close = high, high = high * 1.3, open = high")
    found = fks("validate", "BTC/USDT", "4h", *window, "--tolerance", "0.02", "--json").json
    assert found["valid"] is False
    assert found["providers"] == ["coingecko", "polygon"]
    assert found["odd_one_out"] == "stored"
    assert "the odd one out: the stored candles" in found["reason"]


def test_a_series_without_candles(fks: Command, world: LocalMarket) -> None:
    result = fks("validate", "ETH/USDT", "1h", *JANUARY, "--json")
    assert (result.exit_code, result.json["valid"], result.json["total_records"]) == (1, None, 0)
    assert "no candle of ETH/USDT 1h is stored" in result.json["reason"]


def test_disabled_by_the_settings(fks: Command, stored: LocalMarket, settings: Path) -> None:
    settings.write_text(f"{CONFIG}\nvalidation: {{enabled: false}}\n")
    result = fks("validate", *BTC, *JANUARY, "--json")
    assert (result.exit_code, result.json["valid"]) == (1, None)
    assert "set validation.enabled to true" in result.json["reason"]
    assert stored.requests() == 0


def test_a_calendar_that_ends(fks: Command, stored: LocalMarket, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose_validators(context: object, series: Series, *_: object) -> None:
        raise ValueError(f"the calendar of {series} ends before")

    monkeypatch.setattr(validate, "choose_validators", choose_validators)
    result = fks("validate", *BTC, *JANUARY, "--json")
    assert (result.exit_code, result.json["valid"]) == (1, None)
    assert result.json["reason"] == "the calendar of BTC/USDT 1h ends before"


def test_several_series_give_a_list(fks: Command, stored: LocalMarket) -> None:
    result = fks("validate", "--all", "1h", *JANUARY, "--json")
    assert result.exit_code == 1  # two of them were never synced
    assert [(one["symbol"], one["valid"]) for one in result.json] == [
        ("BTC/USDT", True),
        ("ETH/USDT", None),
        ("SOL/BTC", None),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("NOPE/USDT", "1h"), "NOPE/USDT 1h is neither configured nor stored"),
        ((*BTC, "--full", "--sample", "0.5"), "give it or --sample, not both"),
        ((*BTC, "--sample", "0"), "--sample"),
        ((*BTC, "--sample", "1.5"), "--sample"),
        ((*BTC, "--tolerance", "-1"), "--tolerance"),
        ((*BTC, "--provider", "nasdaq"), "nasdaq"),
        ((*BTC, "--start", "2024-02-01", "--end", "2024-01-01"), "lies after --end"),
    ],
)
def test_usage(fks: Command, world: LocalMarket, arguments: tuple[str, ...], message: str) -> None:
    result = fks("validate", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
