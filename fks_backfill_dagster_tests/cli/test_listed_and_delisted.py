"""Symbols that are added to the settings, removed from them, changed in them, and delisted."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from fks_backfill_dagster import read_candles
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.orchestration.build import build_defs
from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.simulator.local import LocalMarket
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.cli.conftest import CONFIG, Command
from fks_backfill_dagster_tests.store.builders import fetch

JANUARY = ("--start", "2024-01-01", "--end", "2024-02-01")
FEBRUARY = ("--start", "2024-02-01", "--end", "2024-03-01")
ONLY = ("--provider", "binance")
BTC_LINE = "  - {symbol: BTC/USDT, asset_class: crypto, timeframes: [1h, 1d]}\n"


def configure(file: Path, *lines: str) -> None:
    """Settings with these symbols."""
    file.write_text(
        "\n".join(["history_start: 2024-01-01", "symbols:", *(f"  - {{{line}}}" for line in lines)])
    )


def assets() -> set[str]:
    """The series that are assets of Dagster."""
    specs = build_defs(settings=load_settings()).resolve_all_asset_specs()
    return {" ".join(spec.key.path[1:]) for spec in specs}


@pytest.fixture
def removed(settings: Path, fks: Command, world: LocalMarket) -> LocalMarket:
    """BTC/USDT 1h with January, less four hours that no provider has; then removed from the settings."""
    world.plant_outage("binance", TimeRange(instant("2024-01-10T05:00"), instant("2024-01-10T09:00")))
    fks("backfill", "BTC/USDT", "1h", *JANUARY, *ONLY)
    settings.write_text(CONFIG.replace(BTC_LINE, ""))
    return world


# Removed


def test_stored_candles_of_a_removed_symbol_stay_readable(
    fks: Command, removed: LocalMarket, database: Database, database_url: str, tmp_path: Path
) -> None:
    assert fks("status", "BTC/USDT", "1h", "--json").json["total_candles"] == 740
    assert "BTC/USDT 1h" in fks("status").stdout
    (gap,) = fks("gaps", "BTC/USDT", "1h", *JANUARY, "--json").json
    assert gap["missing_candles"] == 4
    assert [g["symbol"] for g in fks("gaps", "--all", *JANUARY, "--json").json] == ["BTC/USDT"]
    assert fks("export", "BTC/USDT", "1h", "-o", "out.csv").exit_code == 0
    with (tmp_path / "out.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 740
    assert len(read_candles("BTC/USDT", "1h")) == 740
    assert fetch(database, "SELECT count(*) FROM fks.ohlcv WHERE symbol = 'BTC/USDT'") == [(740,)]
    assert len(fks("batches", "list", "BTC/USDT", "1h", "--json").json) == 1


def test_a_removed_symbol_is_listed_as_not_configured(fks: Command, removed: LocalMarket) -> None:
    found = {(s["symbol"], s["timeframe"]): s for s in fks("series", "list", "--json").json}
    assert found["BTC/USDT", "1h"]["configured"] is False
    assert found["BTC/USDT", "1h"]["total_candles"] == 740
    assert ("BTC/USDT", "1d") not in found, "neither stored nor configured"


def test_a_removed_symbol_is_not_requested(fks: Command, removed: LocalMarket) -> None:
    done = fks("backfill", "--all", *FEBRUARY, *ONLY, "--json").json
    assert {d["symbol"] for d in done} == {"ETH/USDT", "SOL/BTC"}
    assert assets() == {"ETH_USDT 1h", "SOL_BTC 1h"}


def test_the_last_symbol_may_be_removed(settings: Path, fks: Command, removed: LocalMarket) -> None:
    settings.write_text("symbols: []\n")
    assert fks("status", "--json").json[0]["total_candles"] == 740
    assert fks("series", "list", "--json").json[0]["configured"] is False
    assert assets() == set()


def test_a_symbol_added_again_continues_where_it_ended(
    settings: Path, fks: Command, removed: LocalMarket
) -> None:
    settings.write_text(CONFIG)
    assert "BTC_USDT 1h" in assets()
    removed.reset_requests()
    again = fks(
        "backfill", "BTC/USDT", "1h", "--start", "2024-01-01", "--end", "2024-03-01", *ONLY, "--json"
    ).json
    assert again["total_candles"] == 29 * 24, "February only"
    assert fks("status", "BTC/USDT", "1h", "--json").json["total_candles"] == 740 + 29 * 24


# Added


def test_an_added_symbol_has_not_started_and_is_an_asset(
    settings: Path, fks: Command, world: LocalMarket
) -> None:
    settings.write_text(CONFIG + "  - {symbol: DOGE/USDT, asset_class: crypto, timeframes: [1h]}\n")
    result = fks("status", "DOGE/USDT", "1h", "--json").json
    assert result == {"symbol": "DOGE/USDT", "timeframe": "1h", "status": "not_started"}
    found = {s["symbol"]: s for s in fks("series", "list", "--json").json}
    assert (found["DOGE/USDT"]["configured"], found["DOGE/USDT"]["total_candles"]) == (True, 0)
    assert "DOGE_USDT 1h" in assets()
    fks("backfill", "--all", "1h", "--start", "2024-01-01", "--end", "2024-01-02", *ONLY)
    assert fks("status", "DOGE/USDT", "1h", "--json").json["status"] == "completed"


# Changed


TOKYO = "symbol: '7203', asset_class: stocks, timeframes: [1d], calendar: XTKS"


def test_another_calendar_for_a_stored_series_is_refused_before_any_request(
    settings: Path, fks: Command, world: LocalMarket
) -> None:
    configure(settings, TOKYO, "symbol: ETH/USDT, asset_class: crypto, timeframes: [1d]")
    polygon = ("--provider", "polygon", "--json")
    first = fks("backfill", "7203", "1d", "--start", "2024-01-01", "--end", "2024-01-20", *polygon)
    assert first.json["expected"] == 11, first.stderr  # XTKS: closed on the 1st, 2nd, 3rd and 8th
    configure(
        settings,
        TOKYO.replace("XTKS", "XLON"),
        "symbol: ETH/USDT, asset_class: crypto, timeframes: [1d]",
    )
    world.reset_requests()
    result = fks("backfill", "7203", "1d", *FEBRUARY, *polygon)
    assert result.exit_code == 1
    assert "7203 1d is stored as stocks with the calendar XTKS" in result.stderr
    assert "series remove 7203 1d --yes" in result.stderr
    assert result.json["errors"][0] in result.stderr
    assert world.requests() == 0
    dry = fks("backfill", "7203", "1d", *FEBRUARY, "--dry-run")
    assert (dry.exit_code, world.requests()) == (1, 0)
    both = fks("backfill", "--all", "1d", *FEBRUARY, "--json")
    assert [d["total_candles"] for d in both.json] == [0, 29], "the other series is synced"
    assert both.exit_code == 1


def test_restoring_the_calendar_or_removing_the_series_resolves_it(
    settings: Path, fks: Command, world: LocalMarket
) -> None:
    polygon = ("--start", "2024-01-01", "--end", "2024-01-20", "--provider", "polygon", "--json")
    configure(settings, TOKYO)
    fks("backfill", "7203", "1d", *polygon)
    configure(settings, TOKYO.replace("XTKS", "XLON"))
    assert "put asset_class: stocks and calendar: XTKS" in fks("backfill", "7203", "1d", *polygon).stderr
    fks("series", "remove", "7203", "1d", "--yes")
    assert fks("backfill", "7203", "1d", *polygon).json["expected"] == 14  # XLON: closed on the 1st


def test_a_removed_stock_keeps_its_calendar(settings: Path, fks: Command, world: LocalMarket) -> None:
    """By its name alone it would be inferred as a stock of New York."""
    window = ("--start", "2024-01-01", "--end", "2024-01-20")
    configure(settings, TOKYO)
    fks("backfill", "7203", "1d", *window, "--provider", "polygon")
    configure(settings, "symbol: ETH/USDT, asset_class: crypto, timeframes: [1d]")
    tail = fks("gaps", "7203", "1d", "--start", "2024-01-01", "--end", "2024-03-01", "--json").json
    assert [gap["missing_candles"] for gap in tail][-1] == 8 + 19  # Tokyo's sessions since; New York's are 28
    further = fks("backfill", "7203", "1d", *FEBRUARY, "--provider", "polygon")
    assert further.exit_code == 1
    assert "calendar: XTKS" in further.stderr


def test_a_stored_name_precedes_the_inferred_symbol(settings: Path, fks: Command, world: LocalMarket) -> None:
    """Without the stored series BRK_B would be inferred as a crypto pair."""
    window = ("--start", "2024-01-01", "--end", "2024-01-20")
    configure(
        settings, "symbol: BRK_B, asset_class: stocks, timeframes: [1d], provider_symbols: {polygon: BRK.B}"
    )
    assert (
        fks("backfill", "BRK_B", "1d", *window, "--provider", "polygon", "--json").json["total_candles"] == 13
    )
    configure(settings, "symbol: ETH/USDT, asset_class: crypto, timeframes: [1d]")
    assert fks("status", "BRK_B", "1d", "--json").json["total_candles"] == 13
    assert fks("export", "BRK_B", "1d", "-o", "out.csv").exit_code == 0
    assert len(read_candles("BRK_B", "1d")) == 13
    assert len(fks("batches", "list", "BRK_B", "1d", "--json").json) == 1
    assert fks("series", "remove", "BRK_B", "1d", "--yes", "--json").json["candles_removed"] == 13


# Ended


def test_nothing_is_expected_after_the_end(settings: Path, fks: Command, world: LocalMarket) -> None:
    ended = "symbol: LUNA/USDT, asset_class: crypto, timeframes: [1h], end: 2024-01-20T05:00"
    configure(settings, ended, "symbol: ETH/USDT, asset_class: crypto, timeframes: [1h]")
    # As if trading had ended there: the market has no candle from then on.
    gone = TimeRange(instant("2024-01-20T05:00"), instant("2030-01-01"))
    world.plant_outage("binance", gone, "LUNAUSDT")
    done = fks("backfill", "LUNA/USDT", "1h", *ONLY, "--json")
    assert (done.exit_code, done.json["expected"], done.json["missing"]) == (0, 19 * 24 + 5, 0)
    assert fks("gaps", "LUNA/USDT", "1h", "--json").json == []
    world.reset_requests()
    late = fks("backfill", "--all", "1h", *FEBRUARY, *ONLY, "--json")
    assert (late.exit_code, [d["total_candles"] for d in late.json]) == (0, [0, 29 * 24])
    assert "LUNA/USDT 1h: no candle is expected from 2024-01-20T05:00:00+00:00 on" in late.stderr
    assert "LUNA" not in str(world.journal()["last"])


def test_an_end_that_is_set_later_removes_the_gap_after_it(
    settings: Path, fks: Command, world: LocalMarket
) -> None:
    line = "symbol: LUNA/USDT, asset_class: crypto, timeframes: [1h]"
    configure(settings, line)
    world.plant_outage("binance", TimeRange(instant("2024-01-20"), instant("2030-01-01")), "LUNAUSDT")
    fks("backfill", "LUNA/USDT", "1h", "--start", "2024-01-01", "--end", "2024-03-01", *ONLY)
    assert fks("gaps", "LUNA/USDT", "1h", "--json").json[0]["missing_candles"] == (12 + 29) * 24
    configure(settings, line + ", end: 2024-01-20")
    assert fks("gaps", "LUNA/USDT", "1h", "--json").json == []


def test_the_status_reports_silent_series(
    settings: Path, fks: Command, world: LocalMarket, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "symbol: LUNA/USDT, asset_class: crypto, timeframes: [1h], provider_priority: [binance]"
    configure(settings, line)
    world.plant_outage("binance", TimeRange(instant("2024-01-20T05:00"), instant("2030-01-01")), "LUNAUSDT")
    fks("backfill", "LUNA/USDT", "1h", "--start", "2024-01-01", "--end", "2024-02-01")
    result = fks("status", "LUNA/USDT", "1h")
    assert "LUNA/USDT 1h: silent since 2024-01-20 05:00: no provider has a newer candle." in result.stderr
    assert (
        "The next refresh is after 2024-02-12 19:00;" in result.stderr
    )  # twelve days short of five hours later
    assert fks("status", "LUNA/USDT", "1h", "--json").stderr == ""
    configure(settings, line + ", end: 2024-01-20T05:00")
    assert fks("status").stderr == ""
