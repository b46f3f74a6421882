"""`actions`: import, list and refresh of splits."""

from __future__ import annotations

import io
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest
from click.testing import CliRunner

from fks_backfill_dagster.cli import main
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig, Split
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.cli.conftest import Command
from fks_backfill_dagster_tests.store.builders import execute, fetch

CONFIG = """
history_start: 2024-01-01
symbols:
  - {symbol: BTC/USDT, asset_class: crypto, timeframes: [1h]}
  - {symbol: AAPL, asset_class: stocks, timeframes: [1h, 1d]}
  - {symbol: MSFT, asset_class: stocks, timeframes: [1d]}
"""
SPLITS = (
    "symbol,kind,ex_date,ratio\nAAPL,split,2020-08-31,4\nAAPL,split,2014-06-09,7\nMSFT,split,2003-02-18,2\n"
)


@pytest.fixture
def stocks(database: Database, database_url: str, settings: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings with stocks, on a fresh database; the folder is the current one."""
    settings.write_text(CONFIG)
    monkeypatch.setenv("FKS_DATABASE_URL", database_url)
    (settings.parent / "splits.csv").write_text(SPLITS)
    return settings


def test_imported_twice_and_listed(stocks: Path, fks: Command, database: Database) -> None:
    first = fks("actions", "import", "splits.csv", "--json")
    assert (first.exit_code, first.stderr) == (0, "")
    assert first.json == {"file": "splits.csv", "inserted": 3, "updated": 0, "unchanged": 0, "refused": []}
    before = fetch(database, "SELECT a::text, xmin::text FROM fks.action a")
    again = fks("actions", "import", "splits.csv")
    assert again.stdout == "splits.csv: 3 actions of 2 symbols: 0 new, 0 changed, 3 unchanged.\n"
    assert fetch(database, "SELECT a::text, xmin::text FROM fks.action a") == before
    listed = fks("actions", "list", "--json").json
    assert [
        (one["symbol"], one["ex_date"], one["ratio"], one["provider"], one["used"]) for one in listed
    ] == [
        ("AAPL", "2014-06-09", 7, "file", True),
        ("AAPL", "2020-08-31", 4, "file", True),
        ("MSFT", "2003-02-18", 2, "file", True),
    ]
    assert list(listed[0]) == [
        *("symbol", "kind", "ex_date", "ratio", "amount", "currency", "provider", "fetched_at"),
        *("begins_at", "used"),
    ]
    header, row = fks("actions", "list", "msft").stdout.splitlines()
    assert header.split()[:6] == ["symbol", "kind", "ex_date", "ratio", "provider", "used"]
    assert row.split()[:6] == ["MSFT", "split", "2003-02-18", "2", "file", "yes"]


def test_a_changed_file_changes_its_rows(stocks: Path, fks: Command) -> None:
    fks("actions", "import", "splits.csv")
    Path("splits.csv").write_text(SPLITS.replace("2020-08-31,4", "2020-08-31,5"))
    assert fks("actions", "import", "splits.csv", "--json").json["updated"] == 1


def test_one_bad_line_changes_nothing(stocks: Path, fks: Command, database: Database) -> None:
    Path("splits.csv").write_text(SPLITS + "MSFT,split,yesterday,2\nAPPL,split,2020-08-31,4\n")
    result = fks("actions", "import", "splits.csv")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        "Error: splits.csv: line 5: ex_date 'yesterday' is not a date such as 2020-08-31",
        "Error: splits.csv: line 6: symbol APPL is neither configured nor stored; the nearest: AAPL, MSFT, BTC/USDT;"
        " `fks-backfill series list` shows all",
        "Nothing of splits.csv was stored: correct these lines and import it again.",
    ]
    assert fetch(database, "SELECT * FROM fks.action") == []
    document = fks("actions", "import", "splits.csv", "--json").json
    assert (document["inserted"], [one["line"] for one in document["refused"]]) == (0, [5, 6])


def test_a_file_from_stdin_for_one_symbol(stocks: Path, fks: Command) -> None:
    content = io.BytesIO(b"kind,ex_date,ratio\nsplit,2020-08-31,4\n")
    result = CliRunner().invoke(main, ["actions", "import", "-", "aapl", "--json"], input=content)
    assert result.exit_code == 0
    assert fks("actions", "list", "AAPL", "--json").json[0]["ratio"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("import", "none.csv"), "'none.csv'"),
        (("import", "splits.csv", "APPL"), "symbol APPL is neither configured nor stored; the nearest: AAPL"),
        (("list", "APPL"), "APPL is neither configured nor stored; the nearest: AAPL"),
        (
            ("list", "AAPL", "1d"),
            "1d is a timeframe, and actions belong to a symbol as a whole: leave it out",
        ),
        (("list", "X*"), "'X*' matches no symbol"),
    ],
)
def test_usage_errors(stocks: Path, fks: Command, arguments: tuple[str, ...], message: str) -> None:
    result = fks("actions", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_an_empty_list(stocks: Path, fks: Command) -> None:
    assert fks("actions", "list", "--json").json == []
    result = fks("actions", "list", "A*", "BTC_USDT")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "No actions are stored" in result.stderr


# --- refresh


@pytest.fixture(scope="module")
def one_exchange() -> Iterator[LocalMarket]:
    splits = (Split("AAPL", date(2020, 8, 31), 4), Split("AAPL", date(2014, 6, 9), 7))
    with LocalMarket(MarketConfig(limits=False, splits=splits)) as running:
        yield running


@pytest.fixture
def exchange(one_exchange: LocalMarket, stocks: Path, monkeypatch: pytest.MonkeyPatch) -> LocalMarket:
    monkeypatch.setenv("FKS_PROVIDERS__POLYGON__BASE_URL", one_exchange.polygon_url)
    monkeypatch.setenv("FKS_PROVIDERS__YFINANCE__BASE_URL", one_exchange.yahoo_url)
    monkeypatch.setenv("FKS_PROVIDERS__POLYGON__REQUESTS_PER_MINUTE", "100000")
    monkeypatch.setenv("FKS_PROVIDERS__YFINANCE__REQUESTS_PER_MINUTE", "100000")
    monkeypatch.setenv("FKS_ALLOW_MIXED_SOURCES", "true")
    monkeypatch.setenv("POLYGON_API_KEY", "any")
    one_exchange.reset_requests()
    return one_exchange


def test_all_stocks_from_all_providers(exchange: LocalMarket, fks: Command) -> None:
    result = fks("actions", "refresh", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert [(one["symbol"], one["provider"], one["listed"], one["inserted"]) for one in result.json] == [
        ("AAPL", "polygon", 2, 2),
        ("AAPL", "yfinance", 2, 2),
        ("MSFT", "polygon", 0, 0),
        ("MSFT", "yfinance", 0, 0),
    ]
    assert list(result.json[0])[-3:] == ["refused", "gone", "error"]
    again = fks("actions", "refresh", "aapl", "--provider", "yfinance")
    assert (again.exit_code, again.stderr) == (0, "")
    header, row = again.stdout.splitlines()
    assert header.split() == ["symbol", "provider", "listed", "new", "changed", "refused", "result"]
    assert row.split() == ["AAPL", "yfinance", "2", "0", "0", "0", "done"]


def test_without_a_key_one_warning(
    exchange: LocalMarket, fks: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POLYGON_API_KEY")
    result = fks("actions", "refresh")
    assert (result.exit_code, result.stderr) == (
        0,
        "warning: polygon is skipped: POLYGON_API_KEY is not set\n",
    )
    assert [line.split()[1] for line in result.stdout.splitlines()[1:]] == ["yfinance", "yfinance"]
    alone = fks("actions", "refresh", "AAPL", "--provider", "polygon", "--json")
    assert (alone.exit_code, alone.json) == (1, [])
    assert alone.stderr.splitlines() == [
        "warning: polygon is skipped: POLYGON_API_KEY is not set",
        "Error: no provider reported the splits of AAPL.",
    ]
    assert exchange.requests("polygon") == 0


def test_a_contradiction_is_reported_until_a_person_decides(
    exchange: LocalMarket, fks: Command, database: Database
) -> None:
    assert fks("actions", "refresh", "AAPL").exit_code == 0
    execute(database, "UPDATE fks.action SET ratio = 5 WHERE provider = 'yfinance' AND ratio = 4")
    message = (
        "warning: AAPL: yfinance reports a split of 5:1 on 2020-08-31, polygon a split of 4:1 on 2020-08-31, which is"
        " used; import the correct one from a file to decide\n"
    )
    listed = fks("actions", "list")
    assert (listed.exit_code, listed.stderr) == (0, message)
    refreshed = fks("actions", "refresh", "AAPL", "--provider", "polygon")
    assert (refreshed.exit_code, refreshed.stderr) == (1, message)
    fks("actions", "import", "splits.csv")
    assert fks("actions", "list").stderr == ""
    decided = fks("actions", "refresh", "AAPL", "--provider", "polygon")
    assert (decided.exit_code, decided.stderr) == (0, "")


def test_coins_have_no_splits(exchange: LocalMarket, fks: Command) -> None:
    both = fks("actions", "refresh", "BTC/USDT", "AAPL")
    assert (both.exit_code, both.stderr) == (0, "BTC/USDT is crypto, and only stocks have splits.\n")
    coin = fks("actions", "refresh", "BTC_USDT")
    assert (coin.exit_code, coin.stdout) == (1, "")
    assert "No stock is among these symbols, so nothing was requested" in coin.stderr
    unable = fks("actions", "refresh", "--provider", "binance")
    assert unable.exit_code == 2
    assert "binance lists no splits: polygon and yfinance do" in unable.stderr


def test_a_provider_that_does_not_respond(
    exchange: LocalMarket, fks: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYGON_API_KEY", "bad-key")
    result = fks("actions", "refresh", "AAPL", "--json")
    assert result.exit_code == 0
    assert [(one["provider"], one["listed"], one["error"] is None) for one in result.json] == [
        ("polygon", None, False),
        ("yfinance", 2, True),
    ]
    assert "Unknown API Key" in result.stderr
    assert "bad-key" not in result.stderr + result.stdout
    alone = fks("actions", "refresh", "AAPL", "--provider", "polygon")
    assert alone.exit_code == 1
    assert alone.stderr.endswith("Error: no provider reported the splits of AAPL.\n")
