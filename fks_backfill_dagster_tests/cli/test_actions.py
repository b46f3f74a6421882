"""`actions`: import, list and refresh of splits."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from click.testing import CliRunner

from fks_backfill_dagster.cli import main
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.cli.conftest import Command
from fks_backfill_dagster_tests.store.builders import fetch

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
