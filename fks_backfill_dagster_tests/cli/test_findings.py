"""`findings`: check, list, show, accept, reopen: JSON, text and exit codes."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Any

import pytest

from fks_backfill_dagster.simulator.local import LocalMarket
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.cli.conftest import Command
from fks_backfill_dagster_tests.cli.test_backfill import JANUARY
from fks_backfill_dagster_tests.cli.test_status import ONLY
from fks_backfill_dagster_tests.cli.test_status import synced as synced
from fks_backfill_dagster_tests.store.builders import execute

STRAYS = ("2024-01-05T12:00Z", "2024-01-20T12:00Z")
SPOIL = "UPDATE fks.\"candles_1h\" SET close = close * 3, high = high * 4 WHERE ts = '{}'"


@pytest.fixture
def spoiled(fks: Command, synced: LocalMarket, database: Database) -> LocalMarket:
    """Two stored candles that close at three times the price, and a check that has found them."""
    execute(database, *(SPOIL.format(moment) for moment in STRAYS))
    assert fks("findings", "check").exit_code == 1
    return synced


def listed(fks: Command, *arguments: str) -> list[dict[str, Any]]:
    result = fks("findings", "list", *arguments, "--json")
    assert result.exit_code == 0
    found: list[dict[str, Any]] = result.json
    return found


def numbers(fks: Command) -> list[str]:
    return [str(one["id"]) for one in listed(fks)]


def test_a_check_without_findings(fks: Command, synced: LocalMarket) -> None:
    result = fks("findings", "check", "--json")
    assert result.exit_code == 0
    assert result.json == [
        {
            "symbol": "BTC/USDT",
            "timeframe": "1h",
            "start": "2024-01-01T00:00:00+00:00",
            "end": "2024-02-01T00:00:00+00:00",
            "candles": 740,
            "evaluated": 736,
            "new": 0,
            "reopened": 0,
            "corrected": 0,
            "resolved": 0,
            "open": 0,
        }
    ]
    text = fks("findings", "check", "BTC/USDT", "1h").stdout
    assert text == "BTC/USDT 1h: 736 of 740 candles evaluated: no change; 0 open\n"


def test_a_check_with_findings(fks: Command, synced: LocalMarket, database: Database) -> None:
    execute(database, *(SPOIL.format(moment) for moment in STRAYS))
    part = fks("findings", "check", "BTC_USDT", "1h", "--end", "2024-01-06", "--json")
    assert (part.exit_code, part.json[0]["new"], part.json[0]["open"]) == (1, 1, 1)
    rest = fks("findings", "check")
    assert rest.exit_code == 1
    assert rest.stdout == "BTC/USDT 1h: 736 of 740 candles evaluated: 1 finding new; 2 open\n"
    assert fks("findings", "check").stdout.endswith("no change; 2 open\n")
    assert [one["start"] for one in listed(fks)] == [
        "2024-01-05T12:00:00+00:00",
        "2024-01-20T12:00:00+00:00",
    ]


def test_a_refetch_corrects_a_finding(fks: Command, spoiled: LocalMarket) -> None:
    fetched = fks("backfill", "BTC/USDT", "1h", *JANUARY, "--refetch", *ONLY, "--json")
    assert fetched.json["total_candles"] == 2
    assert listed(fks) == []
    assert [one["status"] for one in listed(fks, "--status", "corrected")] == ["corrected"] * 2
    result = fks("findings", "check", "--json")
    assert (result.exit_code, result.json[0]["open"]) == (0, 0)


def test_the_list(fks: Command, spoiled: LocalMarket) -> None:
    one, _ = listed(fks)
    assert list(one) == [
        "id",
        "symbol",
        "timeframe",
        "start",
        "end",
        "candles",
        "rule",
        "severity",
        "status",
        "first_seen_at",
        "last_seen_at",
        "evidence",
        "verdict",
    ]
    assert (one["rule"], one["severity"], one["status"], one["verdict"]) == ("spike", "warning", "open", None)
    assert one["evidence"]["leg_pct"] > 100
    header, first, _ = fks("findings", "list").stdout.splitlines()
    assert header.split()[:2] == ["id", "series"]
    assert "BTC/USDT 1h  2024-01-05 12:00" in first
    assert "times the usual" in first
    assert len(listed(fks, "BTC/USDT", "--rule", "spike")) == 2
    assert listed(fks, "--rule", "stuck") == []
    assert listed(fks, "ETH/USDT", "1h") == []


def test_a_finding_with_the_candles_around(fks: Command, spoiled: LocalMarket) -> None:
    number = numbers(fks)[0]
    document = fks("findings", "show", number, "--around", "2", "--json").json
    around = document.pop("around")
    assert document == listed(fks)[0]
    assert [one["ts"][11:13] for one in around] == ["10", "11", "12", "13", "14"]
    assert around[2]["close"] > 2 * around[1]["close"]
    text = fks("findings", "show", number)
    assert text.exit_code == 0
    lines = text.stdout.splitlines()
    assert lines[0] == (
        f"Finding {number}: spike in BTC/USDT 1h, 2024-01-05 12:00 .. 2024-01-05 13:00 UTC, 1 candle"
    )
    assert [line for line in lines if line.startswith("*")] == [lines[-6]]


def test_a_missing_volume_is_shown_as_missing(fks: Command, spoiled: LocalMarket, database: Database) -> None:
    execute(database, f"UPDATE fks.\"candles_1h\" SET volume = NULL WHERE ts = '{STRAYS[0]}'")
    number = numbers(fks)[0]
    (own,) = fks("findings", "show", number, "--around", "0", "--json").json["around"]
    assert own["volume"] is None
    assert fks("findings", "show", number, "--around", "0").stdout.splitlines()[-1].split()[-1] == "-"


def test_an_acceptance(fks: Command, spoiled: LocalMarket) -> None:
    one, other = numbers(fks)
    result = fks("findings", "accept", one, "--reason", " a real crash ", "--json")
    assert result.exit_code == 0
    (document,) = result.json
    verdict = document["verdict"]
    assert (verdict["by"], verdict["reason"]) == (getpass.getuser(), "a real crash")
    assert fks("findings", "check").stdout.endswith("no change; 1 open\n")
    assert [found["status"] for found in listed(fks)] == ["accepted", "open"]
    assert fks("findings", "accept", other, "--reason", "as well", "--by", "ana").stdout == (
        f"Finding {other} of BTC/USDT 1h: accepted.\n"
    )
    assert listed(fks)[1]["verdict"]["by"] == "ana"
    assert "ana: as well" in fks("findings", "list").stdout
    assert "accepted by ana at" in fks("findings", "show", other).stdout
    assert fks("findings", "check").exit_code == 0
    assert fks("findings", "reopen", one, other).exit_code == 0
    assert {(found["status"], found["verdict"]) for found in listed(fks)} == {("open", None)}
    assert listed(fks)[0]["evidence"]["former_verdict"]["reason"] == "a real crash"


def test_decisions_are_made_for_all_or_none(fks: Command, spoiled: LocalMarket) -> None:
    one, _ = numbers(fks)
    result = fks("findings", "accept", one, "999", "--reason", "why")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "Error: there is no finding 999; see `fks-backfill findings list`"
        " (see `fks-backfill findings accept --help`).\n"
    )
    assert [found["status"] for found in listed(fks)] == ["open", "open"]


USAGE_ERRORS = [
    "findings show 999",
    "findings reopen 999",
    "findings accept 1",
    "findings accept 1 --reason ",
    "findings accept --reason x",
    "findings list --status closed",
    "findings list --rule unknown",
    "findings list DOGE/USDT 1h",
    "findings check DOGE/USDT 1h",
    "findings check --start 2024-02 --end 2024-01",
    "findings check --start 2024-02 --end 2024-02",
]


def test_usage_errors(fks: Command, synced: LocalMarket) -> None:
    for line in USAGE_ERRORS:
        result = fks(*line.split(" "))
        assert (result.exit_code, result.stdout) == (2, ""), line
        assert "Error: " in result.stderr, line


def test_history_is_not_accepted(fks: Command, spoiled: LocalMarket) -> None:
    number = numbers(fks)[0]
    fks("backfill", "BTC/USDT", "1h", *JANUARY, "--refetch", *ONLY)
    result = fks("findings", "accept", number, "--reason", "why")
    assert result.exit_code == 2
    assert f"finding {number} is corrected: only an open, confirmed or accepted one" in result.stderr


@pytest.mark.parametrize("command", ["check", "list"])
def test_a_series_that_was_never_synced(fks: Command, synced: LocalMarket, command: str) -> None:
    """The list is a report; a check that evaluated nothing is not green."""
    result = fks("findings", command, "ETH/USDT", "1h")
    assert result.exit_code == (1 if command == "check" else 0)
    assert "ETH/USDT 1h: never synced, so there is no candle to evaluate" in result.stderr


def test_a_check_of_a_range_without_candles(fks: Command, synced: LocalMarket) -> None:
    result = fks("findings", "check", "BTC/USDT", "1h", "--start", "2025-01", "--json")
    assert (result.exit_code, result.json[0]["start"], result.json[0]["evaluated"]) == (1, None, 0)
    assert "No candle could be evaluated" in result.stderr


def test_a_series_with_too_few_candles_is_not_green(
    fks: Command, synced: LocalMarket, database: Database
) -> None:
    fks("backfill", "BTC/USDT", "1d", "--start", "2024-01-01", "--end", "2024-01-09", *ONLY)
    result = fks("findings", "check")
    assert result.exit_code == 1
    assert "BTC/USDT 1d: 0 of 8 candles evaluated: no change; 0 open\n" in result.stdout
    assert result.stderr == (
        "BTC/USDT 1d: no candle could be evaluated: too few are stored beside one another.\n"
    )


def test_an_unknown_calendar_stops_no_other_series(
    fks: Command, synced: LocalMarket, database: Database
) -> None:
    execute(
        database,
        "INSERT INTO fks.series (symbol, timeframe, asset_class, calendar) VALUES ('X', '1d', 'stocks', 'XXXX')",
        "INSERT INTO fks.sync_state (series_id, oldest, newest) SELECT id, '2024-01-02', '2024-01-03'"
        " FROM fks.series WHERE symbol = 'X'",
    )
    result = fks("findings", "check")
    assert result.exit_code == 1
    assert "Error: X 1d: there is no exchange calendar 'XXXX'" in result.stderr
    assert result.stdout == "BTC/USDT 1h: 736 of 740 candles evaluated: no change; 0 open\n"


def test_the_status_names_open_findings(fks: Command, spoiled: LocalMarket) -> None:
    assert fks("status", "BTC/USDT", "1h", "--json").json["open_findings"] == 2
    result = fks("status", "BTC/USDT", "1h")
    assert (
        "BTC/USDT 1h: 2 open findings; see `fks-backfill findings list BTC/USDT 1h`"
        in result.stderr.splitlines()
    )


def test_an_account_without_a_name(
    fks: Command, spoiled: LocalMarket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown() -> str:
        raise KeyError("getpwuid(): uid not found: 4242")

    monkeypatch.setattr(getpass, "getuser", unknown)
    number = numbers(fks)[0]
    result = fks("findings", "accept", number, "--reason", "why")
    assert (result.exit_code, result.stderr) == (
        1,
        "Error: This account has no name: state who accepts with --by NAME.\n",
    )
    assert fks("findings", "accept", number, "--reason", "why", "--by", "ana").exit_code == 0


def test_the_choices_are_those_of_the_ledger(settings: Path) -> None:
    from fks_backfill_dagster.cli import findings as command
    from fks_backfill_dagster.ledger.findings import ACTIVE, FindingStatus, Rule

    assert set(command._STATUSES) == {one.value for one in FindingStatus}
    assert set(command._RULES) == {one.value for one in Rule}
    assert set(command._ACTIVE) == {one.value for one in ACTIVE}
