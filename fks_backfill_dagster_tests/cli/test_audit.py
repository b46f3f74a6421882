"""`audit`: JSON, text output and exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fks_backfill_dagster.simulator.local import LocalMarket
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.cli.conftest import Command
from fks_backfill_dagster_tests.cli.test_backfill import JANUARY
from fks_backfill_dagster_tests.cli.test_status import ONLY
from fks_backfill_dagster_tests.cli.test_status import synced as synced
from fks_backfill_dagster_tests.store.builders import execute

DELETE = "DELETE FROM fks.\"candles_1h\" WHERE ts = '2024-01-20T12:00Z'"
BREAK = "UPDATE fks.\"candles_1h\" SET high = low - 1 WHERE ts = '2024-01-21T12:00Z'"


def test_no_differences(fks: Command, synced: LocalMarket) -> None:
    result = fks("audit", "--json")
    assert result.exit_code == 0
    assert result.json.pop("seconds") > 0
    report = result.json
    report.pop("seconds")
    assert report == {
        "series": [
            {
                "symbol": "BTC/USDT",
                "timeframe": "1h",
                "candles": 740,
                "expected": 744,
                "missing": 4,
                "explained": 0,
                "differences": [],
            }
        ],
        "candles": 740,
        "differences": 0,
        "repaired": 0,
    }
    lines = fks("audit").stdout.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("1 series, 740 candles: 0 differences, 0 repaired, in ")


def test_repaired_differences_are_reported_and_exit_0(
    fks: Command, synced: LocalMarket, database: Database
) -> None:
    execute(database, DELETE)
    dry = fks("audit", "BTC/USDT", "1h", "--no-repair", "--json")
    assert dry.exit_code == 1
    result = fks("audit", "BTC_USDT", "1h", "--json")
    assert result.exit_code == 0
    total, gap = result.json["series"][0]["differences"]
    assert gap == {
        "kind": "unrecorded_gap",
        "start": "2024-01-20T12:00:00+00:00",
        "end": "2024-01-20T13:00:00+00:00",
        "recorded": 0,
        "actual": 1,
        "message": "1 candle absent without a gap in the ledger",
        "repaired": True,
    }
    assert (total["kind"], total["recorded"], total["actual"]) == ("total_candles", 740, 739)
    assert (result.json["differences"], result.json["repaired"]) == (2, 2)
    assert [d["repaired"] for d in dry.json["series"][0]["differences"]] == [False, False]
    assert fks("audit", "--json").json["differences"] == 0
    assert [g["missing_candles"] for g in fks("gaps", "BTC/USDT", "1h", *JANUARY, "--json").json] == [4, 1]


def test_unrepaired_differences_exit_1(fks: Command, synced: LocalMarket, database: Database) -> None:
    execute(database, DELETE, BREAK)
    result = fks("audit")
    assert result.exit_code == 1
    total, gap, rule, sums = result.stdout.splitlines()
    assert total.endswith("the status records 740 candles instead of 739 (repaired)")
    assert gap == (
        "BTC/USDT 1h: 2024-01-20 12:00 .. 2024-01-20 13:00: 1 candle absent without a gap in the ledger (repaired)"
    )
    assert rule.startswith(
        "BTC/USDT 1h: 2024-01-21 12:00 .. 2024-01-21 13:00: 1 candle of batch 1 of binance"
    )
    assert "backfill BTC/USDT 1h --start 2024-01-21T12:00 --end 2024-01-21T13:00 --refetch" in rule
    assert "3 differences, 2 repaired" in sums
    # The remedy works.
    window = ("--start", "2024-01-21T12:00", "--end", "2024-01-21T13:00", "--refetch")
    assert fks("backfill", "BTC/USDT", "1h", *window, *ONLY).exit_code == 0
    assert fks("audit").exit_code == 0


def test_times_are_iso_8601(fks: Command, synced: LocalMarket, database: Database) -> None:
    execute(database, "UPDATE fks.sync_state SET oldest = NULL")
    (found,) = fks("audit", "--json").json["series"][0]["differences"]
    assert (found["kind"], found["recorded"], found["actual"]) == (
        "oldest",
        None,
        "2024-01-01T00:00:00+00:00",
    )


def test_series_that_are_no_longer_configured_are_audited_too(
    fks: Command, synced: LocalMarket, settings: Path, database: Database
) -> None:
    settings.write_text("symbols:\n  - {symbol: ETH/USDT, asset_class: crypto, timeframes: [1h]}\n")
    execute(database, DELETE)
    assert [s["symbol"] for s in fks("audit", "--json").json["series"]] == ["BTC/USDT"]
    assert fks("audit", "--all", "1h", "--json").json["candles"] == 739
    assert fks("audit", "BTC/USDT", "1h", "--json").json["candles"] == 739


@pytest.mark.parametrize(
    ("line", "stderr"),
    [
        ("audit ETH/USDT 1h", "ETH/USDT 1h: never synced, so there is nothing to audit.\n"),
        ("audit --all 1d", ""),
    ],
)
def test_a_series_that_was_never_synced_is_not_audited(
    fks: Command, synced: LocalMarket, line: str, stderr: str
) -> None:
    result = fks(*line.split())
    assert (result.exit_code, result.stderr) == (0, stderr)
    assert result.stdout.startswith("0 series, 0 candles: 0 differences")


def test_an_unknown_calendar_is_reported(fks: Command, synced: LocalMarket, database: Database) -> None:
    execute(
        database,
        "INSERT INTO fks.series (symbol, timeframe, asset_class, calendar) VALUES ('X', '1d', 'stocks', 'XXXX')",
    )
    result = fks("audit")
    assert result.exit_code == 1
    assert "X 1d: there is no exchange calendar 'XXXX'" in result.stdout
    assert "2 series, 740 candles: 1 difference, 0 repaired" in result.stdout
