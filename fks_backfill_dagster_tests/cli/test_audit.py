"""`audit`: what it says, in JSON and in lines, and when it ends with 1."""

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


def test_nothing_is_wrong(fks: Command, synced: LocalMarket) -> None:
    told = fks("audit", "--json")
    assert told.exit_code == 0
    assert told.json.pop("seconds") > 0
    report = told.json
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


def test_what_was_repaired_is_told_and_no_failure(
    fks: Command, synced: LocalMarket, database: Database
) -> None:
    execute(database, DELETE)
    looked = fks("audit", "BTC/USDT", "1h", "--no-repair", "--json")
    assert looked.exit_code == 1
    told = fks("audit", "BTC_USDT", "1h", "--json")
    assert told.exit_code == 0
    total, gap = told.json["series"][0]["differences"]
    assert gap == {
        "kind": "unrecorded_gap",
        "start": "2024-01-20T12:00:00+00:00",
        "end": "2024-01-20T13:00:00+00:00",
        "recorded": 0,
        "actual": 1,
        "message": "1 candle absent, and in no gap of the ledger",
        "repaired": True,
    }
    assert (total["kind"], total["recorded"], total["actual"]) == ("total_candles", 740, 739)
    assert (told.json["differences"], told.json["repaired"]) == (2, 2)
    assert [d["repaired"] for d in looked.json["series"][0]["differences"]] == [False, False]
    assert fks("audit", "--json").json["differences"] == 0
    assert [g["missing_candles"] for g in fks("gaps", "BTC/USDT", "1h", *JANUARY, "--json").json] == [4, 1]


def test_what_is_left_ends_with_1(fks: Command, synced: LocalMarket, database: Database) -> None:
    execute(database, DELETE, BREAK)
    told = fks("audit")
    assert told.exit_code == 1
    total, gap, rule, sums = told.stdout.splitlines()
    assert total.endswith("the status says 740 candles, and there are 739 (repaired)")
    assert gap == (
        "BTC/USDT 1h: 2024-01-20 12:00 .. 2024-01-20 13:00: 1 candle absent, and in no gap of the ledger (repaired)"
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


def test_times_are_times(fks: Command, synced: LocalMarket, database: Database) -> None:
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
    ("line", "says"),
    [
        ("audit ETH/USDT 1h", "ETH/USDT 1h: never synced, so there is nothing to audit.\n"),
        ("audit --all 1d", ""),
    ],
)
def test_what_was_never_synced_has_nothing_to_audit(
    fks: Command, synced: LocalMarket, line: str, says: str
) -> None:
    told = fks(*line.split())
    assert (told.exit_code, told.stderr) == (0, says)
    assert told.stdout.startswith("0 series, 0 candles: 0 differences")


def test_a_calendar_that_nobody_has_is_told(fks: Command, synced: LocalMarket, database: Database) -> None:
    execute(
        database,
        "INSERT INTO fks.series (symbol, timeframe, asset_class, calendar) VALUES ('X', '1d', 'stocks', 'XXXX')",
    )
    told = fks("audit")
    assert told.exit_code == 1
    assert "X 1d: there is no exchange calendar 'XXXX'" in told.stdout
    assert "2 series, 740 candles: 1 difference, 0 repaired" in told.stdout
