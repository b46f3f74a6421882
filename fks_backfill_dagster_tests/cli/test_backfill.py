"""`backfill`: stored candles, output and exit codes."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.simulator.config import MarketConfig, instant
from fks_backfill_dagster.simulator.local import LocalMarket
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.cli.conftest import Command, start

KEYS = {
    "symbol",
    "timeframe",
    "total_batches",
    "successful_batches",
    "failed_batches",
    "total_candles",
    "errors",
    "expected",
    "missing",
    "providers",
    "seconds",
    "no_trade",
    "outdated",
    "withdrawn",
    "listing",
    "warnings",
    "pinned",
}
BTC = Series("BTC/USDT", Timeframe.H1, AssetClass.CRYPTO)
JANUARY = ("--start", "2024-01-01", "--end", "2024-02-01")


def span(start: str, end: str) -> TimeRange:
    return TimeRange(instant(start), instant(end))


def test_one_series_gives_one_object(fks: Command, world: LocalMarket, database: Database) -> None:
    result = fks("backfill", "BTC_USDT", "1h", *JANUARY, "--json")
    assert result.exit_code == 0
    report = result.json
    assert set(report) == KEYS
    assert report["symbol"] == "BTC/USDT"
    assert (report["total_candles"], report["expected"], report["missing"]) == (744, 744, 0)
    assert (report["total_batches"], report["failed_batches"], report["errors"]) == (1, 0, [])
    assert report["providers"]["binance"] == {"asked": 744, "delivered": 744, "rejected": 0, "failed": 0}
    window = span("2024-01-01", "2024-02-01")
    truth = world.truth("binance", "BTC/USDT", Timeframe.H1, window)
    assert queries.read_candles(database, BTC, window).equals(truth)


def test_a_second_run_requests_nothing(fks: Command, world: LocalMarket) -> None:
    fks("backfill", "BTC/USDT", "1h", *JANUARY)
    before = world.requests()
    again = fks("backfill", "BTC/USDT", "1h", *JANUARY, "--json")
    assert again.exit_code == 0
    assert (again.json["total_batches"], again.json["total_candles"]) == (0, 0)
    assert (again.json["expected"], again.json["missing"]) == (744, 0)
    assert world.requests() == before


def test_times_have_zones_and_the_end_is_exclusive(fks: Command, world: LocalMarket) -> None:
    window = ("--start", "2024-01-01T02:00+02:00", "--end", "2024-01-01T03:00:00Z")
    assert fks("backfill", "BTC/USDT", "1h", *window, "--json").json["total_candles"] == 3


def test_without_times_from_the_configured_start_to_now(fks: Command, world: LocalMarket) -> None:
    result = fks("backfill", "BTC/USDT", "1d", "--json")
    days = (int(time.time()) - instant("2024-01-01") // 1_000_000) // 86_400
    assert result.exit_code == 0
    assert result.json["expected"] in (days, days + 1)  # midnight may pass meanwhile


def test_the_next_provider_fills_what_the_first_is_missing(fks: Command, world: LocalMarket) -> None:
    world.plant_outage("binance", span("2024-01-10T05:00", "2024-01-10T09:00"))
    result = fks("backfill", "BTC/USDT", "1h", *JANUARY, "--json")
    assert result.exit_code == 0
    assert {name: tally["delivered"] for name, tally in result.json["providers"].items()} == {
        "binance": 740,
        "polygon": 4,
    }


def test_missing_candles_exit_1_with_a_hint(fks: Command, world: LocalMarket) -> None:
    world.plant_outage("binance", span("2024-01-10T05:00", "2024-01-10T09:00"))
    result = fks("backfill", "BTC/USDT", "1h", *JANUARY, "--provider", "binance")
    assert result.exit_code == 1
    assert "740 of 744 candles stored" in result.stdout
    assert "4 candles still missing; see `fks-backfill gaps BTC/USDT 1h`" in result.stderr


def test_progress_is_plain_lines_on_stderr_and_every_batch_with_v(fks: Command, world: LocalMarket) -> None:
    line = ("backfill", "BTC/USDT", "1h", "--start", "2024-01", "--end", "2024-03")
    plan = [
        "BTC/USDT 1h: warning: coingecko is skipped: COINGECKO_API_KEY is not set",
        "BTC/USDT 1h: 1,440 candles to fetch in 2 batches from binance, polygon",
    ]
    assert fks(*line).stderr.splitlines() == plan
    assert fks(*line, "--refetch", "-v").stderr.splitlines() == [
        *plan,
        "BTC/USDT 1h: 2024-01-01 .. 2024-02-01: 0 candles written from binance",
        "BTC/USDT 1h: 2024-02-01 .. 2024-03-01: 0 candles written from binance",
    ]


def test_refetch_corrects(fks: Command, world: LocalMarket, database: Database) -> None:
    fks("backfill", "BTC/USDT", "1h", *JANUARY, "--provider", "polygon")
    result = fks("backfill", "BTC/USDT", "1h", *JANUARY, "--provider", "binance", "--refetch", "--json")
    assert result.exit_code == 0
    assert (result.json["total_batches"], result.json["total_candles"]) == (1, 744)
    window = span("2024-01-01", "2024-02-01")
    truth = world.truth("binance", "BTC/USDT", Timeframe.H1, window)
    assert queries.read_candles(database, BTC, window).equals(truth)


def test_a_refetch_from_another_symbol_names_the_option_that_forces_it(
    fks: Command, world: LocalMarket, database: Database
) -> None:
    month = ("BTC/USDT", "1h", *JANUARY, "--provider", "binance")
    fks("backfill", *month)
    window = span("2024-01-01", "2024-02-01")
    held = queries.read_candles(database, BTC, window)
    world.plant_fault("binance", "other_symbol", count=None, path="interval=1h", other="ETH/USDT")
    refused = fks("backfill", *month, "--refetch", "--json")
    assert refused.exit_code == 1
    assert "--force" in refused.json["errors"][0]
    assert "--force" in refused.stderr
    assert queries.read_candles(database, BTC, window).equals(held)
    forced = fks("backfill", *month, "--refetch", "--force", "--json")
    assert (forced.exit_code, forced.json["total_candles"]) == (0, 744)
    ether = world.truth("binance", "ETH/USDT", Timeframe.H1, window)
    assert queries.read_candles(database, BTC, window).equals(ether)


def test_force_needs_a_refetch(fks: Command) -> None:
    refused = fks("backfill", "BTC/USDT", "1h", *JANUARY, "--force")
    assert refused.exit_code == 2
    assert "--refetch" in refused.stderr


def test_the_report_counts_withdrawn_candles(fks: Command, world: LocalMarket) -> None:
    month = ("BTC/USDT", "1h", *JANUARY, "--provider", "polygon", "--json")
    report = fks("backfill", *month).json
    assert (report["no_trade"], report["outdated"], report["withdrawn"]) == (0, 0, 0)
    assert (report["listing"], report["warnings"]) == (None, [])
    gone = span("2024-01-10T03:00", "2024-01-10T05:00")
    world.plant_fault("polygon", "empty", count=None, only=gone)
    world.plant_fault("binance", "empty", count=None, only=gone)
    whole = ("BTC/USDT", "1h", *JANUARY, "--provider", "polygon", "--provider", "binance", "--json")
    result = fks("backfill", *whole, "--refetch")
    assert (result.exit_code, result.json["withdrawn"]) == (1, 2)
    assert any("were removed" in warning for warning in result.json["warnings"])
    assert "were removed" in result.stderr


def test_a_dry_run_fetches_nothing(fks: Command, world: LocalMarket, database: Database) -> None:
    result = fks("backfill", "BTC/USDT", "1h", *JANUARY, "--dry-run", "--json")
    assert result.exit_code == 0
    plan = result.json
    assert (plan["expected"], plan["missing"], plan["total_batches"]) == (744, 744, 1)
    assert list(plan["providers"]) == ["binance", "polygon"]
    for estimate in plan["providers"].values():
        assert estimate["candles"] == 744
        assert estimate["requests"] >= 1
        assert estimate["seconds"] > 0
    assert queries.sync_status(database) == []
    assert "744" in fks("backfill", "--all", "1h", *JANUARY, "--dry-run").stdout


def test_an_unknown_symbol_is_an_error_of_the_report(fks: Command, world: LocalMarket) -> None:
    result = fks("backfill", "NOSUCH/COIN", "1h", *JANUARY, "--provider", "binance", "--json")
    assert result.exit_code == 1
    assert "NOSUCH" in " ".join(result.json["errors"])
    assert result.json["total_candles"] == 0
    assert "Error: NOSUCH/COIN 1h:" in result.stderr


def test_before_the_listing_nothing_is_expected(fks: Command, world: LocalMarket) -> None:
    window = ("--start", "2010-01-01", "--end", "2010-02-01")
    result = fks("backfill", "BTC/USDT", "1h", *window, "--provider", "binance", "--json")
    assert (result.exit_code, result.json["expected"]) == (0, 0)
    assert "listed at" in result.stderr


def test_a_provider_without_its_key_is_reported(
    fks: Command, world: LocalMarket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POLYGON_API_KEY")
    result = fks("backfill", "BTC/USDT", "1h", *JANUARY, "--provider", "polygon", "--json")
    assert result.exit_code == 1
    assert "POLYGON_API_KEY is not set" in result.stderr
    assert result.json["errors"]


def test_an_absent_database_gives_a_report_too(fks: Command) -> None:
    result = fks("backfill", "*/USDT", "1h", *JANUARY, "--json")
    assert result.exit_code == 1
    assert [set(report) for report in result.json] == [KEYS, KEYS]
    assert all(report["expected"] is None and report["errors"] for report in result.json)
    assert "secret" not in result.stdout + result.stderr


def test_a_database_failure_is_reported_with_the_committed_counts(
    fks: Command, world: LocalMarket, database: Database
) -> None:
    """The first month is committed, then the disk is full: the other series are not attempted."""
    with database.begin() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION fks.refuse() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN IF NEW.ts >= '2024-02-01' THEN RAISE EXCEPTION 'no space left' USING ERRCODE = '53100';"
            " END IF; RETURN NEW; END $$"
        )
        connection.exec_driver_sql(
            'CREATE TRIGGER refuse BEFORE INSERT ON fks."candles_1h" FOR EACH ROW EXECUTE FUNCTION fks.refuse()'
        )
    result = fks("backfill", "*/USDT", "1h", "--start", "2024-01-01", "--end", "2024-03-01", "--json")
    assert result.exit_code == 1
    broken, not_started = result.json
    assert (broken["total_batches"], broken["successful_batches"], broken["total_candles"]) == (2, 1, 744)
    assert (not_started["total_batches"], not_started["total_candles"]) == (0, 0)
    for report in result.json:
        assert set(report) == KEYS
        assert (report["expected"], report["missing"]) == (None, None)
        assert "no room left" in report["errors"][0]
    assert result.stderr.count("Error: ") == 1
    status = fks("status", "BTC/USDT", "1h", "--json").json
    assert (status["total_candles"], status["status"]) == (744, "error")


def test_real_candles_and_their_outages(
    fks: Command, world: LocalMarket, shared_data: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seven outages of Binance that are in these six months, exact to the hour."""
    replayed = shared_data("binance/BTCUSDT-1h.csv.gz").parents[1]
    with LocalMarket(MarketConfig(replay=replayed)) as market:
        monkeypatch.setenv("FKS_PROVIDERS__BINANCE__BASE_URL", market.binance_url)
        monkeypatch.setenv("FKS_PROVIDERS__BINANCE__ARCHIVE_URL", market.archive_url)
        window = ("--start", "2020-11-17", "--end", "2021-05-16")
        result = fks("backfill", "BTC/USDT", "1h", *window, "--provider", "binance", "--json")
    assert (result.exit_code, result.json["total_candles"], result.json["missing"]) == (1, 4308, 12)
    gaps = fks("gaps", "BTC/USDT", "1h", *window, "--json").json
    assert [(gap["start"][:13], gap["missing_candles"]) for gap in gaps] == [
        ("2020-11-30T06", 1),
        ("2020-12-21T15", 3),
        ("2020-12-25T02", 1),
        ("2021-02-11T04", 1),
        ("2021-03-06T02", 1),
        ("2021-04-20T02", 2),
        ("2021-04-25T05", 3),
    ]
    status = fks("status", "BTC/USDT", "1h", "--json").json
    assert (status["total_candles"], status["open_gaps"]) == (4308, 7)
    assert status["newest_data"] == "2021-05-15T23:00:00+00:00"


@pytest.mark.usefixtures("world")
def test_an_interrupted_backfill_keeps_what_was_committed(
    market: LocalMarket, fks: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FKS_PROVIDERS__BINANCE__ARCHIVE_URL", "null")
    monkeypatch.setenv("FKS_MAX_CONCURRENT_REQUESTS", "1")
    # The first months are fetched, a later page fails for longer than the test waits.
    hang: dict[str, Any] = {"start": "2024-06-01T00:00:00+00:00", "end": "2024-07-01T00:00:00+00:00"}
    market.plant_fault("binance", "status", count=None, status=503, **hang)
    line = (
        "backfill",
        "BTC/USDT",
        "1h",
        "--start",
        "2024-01-01",
        "--end",
        "2024-09-01",
        "--provider",
        "binance",
    )
    with start(*line, "--json", "-v") as running:
        assert running.stderr is not None
        for output in running.stderr:
            if "2024-03-01 .. 2024-04-01" in output:
                break
        began = time.monotonic()
        running.send_signal(signal.SIGINT)
        stdout, stderr = running.communicate(timeout=60)
    assert running.returncode == 130
    assert time.monotonic() - began < 20
    assert stdout == ""
    assert "committed batches stay" in stderr
    assert "Traceback" not in stderr
    market.clear_faults()
    status = fks("status", "BTC/USDT", "1h", "--json").json
    assert status["total_candles"] >= 744 + 696 + 743
    assert (status["status"], status["error"]) == ("pending", None)
    again = fks(*line, "--json")
    assert again.exit_code == 0
    assert again.json["total_candles"] == 5856 - status["total_candles"]


def test_a_symbol_that_looks_mistyped_is_warned_of_before_it_is_created(
    fks: Command, world: LocalMarket, database: Database
) -> None:
    line = (
        "backfill",
        "BTC/USD",
        "1d",
        "--start",
        "2024-01-01",
        "--end",
        "2024-01-03",
        "--provider",
        "polygon",
    )
    warning = "warning: BTC/USD is not configured, did you mean BTC/USDT?\n"
    dry = fks(*line, "--dry-run", "--json")
    assert (dry.exit_code, dry.stderr.count(warning)) == (0, 1)
    result = fks(*line, "--json")
    assert (result.exit_code, result.json["total_candles"]) == (0, 2), "the warning does not stop it"
    assert result.stderr.startswith(warning), "the warning comes first"
    assert warning not in fks(*line, "--json").stderr, "a stored symbol is no typo"
    for other in ("DOGE/USDT", "BTC/USDT"):
        assert "did you mean" not in fks("backfill", other, *line[2:], "--dry-run").stderr


# Exit codes ------------------------------------------------------------------------------------------------

BOTH = ("--provider", "binance", "--provider", "polygon")
DAY: dict[str, Any] = {"start": "2024-01-10", "end": "2024-01-11"}


def statuses(fks: Command) -> dict[str, int]:
    """Missing candles by the state of their gap."""
    found: dict[str, int] = {}
    for gap in fks("gaps", "BTC/USDT", "1h", *JANUARY, "--json").json:
        found[gap["status"]] = found.get(gap["status"], 0) + gap["missing_candles"]
    return found


@pytest.mark.parametrize("kind", ["reset", "truncated", "html", "duplicated", "unsorted", "missing"])
def test_a_fault_that_a_retry_heals_exits_0_without_an_error(
    fks: Command, world: LocalMarket, kind: str
) -> None:
    window = ("--start", "2024-01-01", "--end", "2024-01-02")
    fks("backfill", "BTC/USDT", "1h", *window)  # the listing time is known from here on
    world.plant_fault("binance", kind, count=1, path="/klines", **DAY)
    world.plant_fault("archive", "archive_404", count=None)
    result = fks("backfill", "BTC/USDT", "1h", *JANUARY, "--provider", "binance", "--json")
    assert next(one["hits"] for one in requests.get(f"{world.url}/sim/faults", timeout=5).json()) == 1
    assert (result.exit_code, result.json["missing"], result.json["failed_batches"]) == (0, 0, 0)
    assert result.json["errors"] == []
    assert result.json["providers"]["binance"]["delivered"] == 720
    assert statuses(fks) == {}


def test_a_range_that_a_fallback_filled_exits_0_with_a_warning(fks: Command, world: LocalMarket) -> None:
    world.plant_fault("binance", "status", count=None, status=403, path="/klines")
    world.plant_fault("archive", "archive_404", count=None)
    result = fks("backfill", "BTC/USDT", "1h", *JANUARY, *BOTH, "--json")
    assert (result.exit_code, result.json["missing"], result.json["errors"]) == (0, 0, [])
    providers = result.json["providers"]
    assert (providers["binance"]["failed"], providers["polygon"]["delivered"]) == (744, 744)
    assert "warning: binance: " in result.stderr
    assert "403" in result.stderr
    assert statuses(fks) == {}


def test_a_range_without_a_response_exits_1_and_stays_open(fks: Command, world: LocalMarket) -> None:
    """The provider requests a wait that is longer than the maximum."""
    world.plant_fault("binance", "status", count=None, status=418, seconds=4000, path="/klines")
    world.plant_fault("archive", "archive_404", count=None)
    result = fks("backfill", "BTC/USDT", "1h", *JANUARY, "--provider", "binance", "--json")
    assert result.exit_code == 1
    assert (result.json["missing"], result.json["failed_batches"], result.json["total_batches"]) == (
        744,
        1,
        1,
    )
    assert result.json["errors"]
    assert all("418" in error or "wait" in error for error in result.json["errors"])
    assert result.stderr.count("IP banned until") == 1
    assert "Error: BTC/USDT 1h: 1 of 1 batch failed, 744 candles still missing" in result.stderr
    again = fks("backfill", "BTC/USDT", "1h", *JANUARY, "--provider", "binance", "--json", "-v")
    assert f"Error: BTC/USDT 1h: {again.json['errors'][0]}" in again.stderr
    assert statuses(fks) == {"open": 744}
    assert fks("status", "BTC/USDT", "1h", "--json").json["status"] == "error"


def test_quarantined_candles_exit_1_and_stay_open(
    fks: Command, world: LocalMarket, database: Database
) -> None:
    world.plant_fault("binance", "nan", count=None, path="/klines", **DAY)
    world.plant_fault("archive", "archive_404", count=None)
    result = fks("backfill", "BTC/USDT", "1h", *JANUARY, "--provider", "binance", "--json")
    assert (result.exit_code, result.json["missing"], result.json["failed_batches"]) == (1, 24, 0)
    assert result.json["providers"]["binance"]["rejected"] == 24
    assert "24 candles still missing; see `fks-backfill gaps BTC/USDT 1h`" in result.stderr
    assert statuses(fks) == {"open": 24}
    with database.begin() as connection:
        rows = connection.exec_driver_sql("SELECT reason, count(*) FROM fks.quarantine GROUP BY 1").all()
    assert [tuple(row) for row in rows] == [("not_finite", 24)]


def test_candles_that_no_provider_has_exit_1_and_are_explained(fks: Command, world: LocalMarket) -> None:
    for provider in ("binance", "polygon"):
        world.plant_outage(provider, span("2024-01-10", "2024-01-11"))
    result = fks("backfill", "BTC/USDT", "1h", *JANUARY, *BOTH, "--json")
    assert (result.exit_code, result.json["missing"], result.json["errors"]) == (1, 24, [])
    assert result.json["failed_batches"] == 0


def test_no_trade_intervals_are_not_missing_and_exit_0(
    fks: Command, world: LocalMarket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the responses of Polygon, which omits intervals without trades: single scattered hours."""
    monkeypatch.setenv("FKS_PROVIDERS__BINANCE__ENABLED", "false")
    for day in range(5, 29):
        world.plant_outage("polygon", span(f"2024-01-{day:02d}T07:00", f"2024-01-{day:02d}T08:00"))
    result = fks("backfill", "BTC/USDT", "1h", *JANUARY, "--provider", "polygon", "--json")
    assert (result.exit_code, result.json["missing"], result.json["expected"]) == (0, 0, 744)
    assert statuses(fks) == {"no_trade": 24}
    stdout = fks("backfill", "BTC/USDT", "1h", *JANUARY, "--provider", "polygon").stdout
    assert "720 of 744 candles stored, 24 no-trade, 0 of them by this call" in stdout


def test_a_day_that_a_provider_omits_is_missing_and_exits_1(
    fks: Command, world: LocalMarket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A complete response is not enough: the hours around it traded."""
    monkeypatch.setenv("FKS_PROVIDERS__BINANCE__ENABLED", "false")
    world.plant_outage("polygon", span("2024-01-10", "2024-01-11"))
    result = fks("backfill", "BTC/USDT", "1h", *JANUARY, "--provider", "polygon", "--json")
    assert (result.exit_code, result.json["missing"], result.json["expected"]) == (1, 24, 744)
    assert statuses(fks) == {"unavailable": 24}
