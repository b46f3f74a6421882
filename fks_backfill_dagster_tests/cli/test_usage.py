"""An invalid command line is reported in one sentence, with the remedy, before anything is done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from fks_backfill_dagster.cli import main
from fks_backfill_dagster_tests.cli.conftest import Command


def all_commands(group: click.Group = main, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from all_commands(command, (*path, name))
        else:
            yield (*path, name)


@pytest.mark.parametrize("path", list(all_commands()), ids=" ".join)
def test_every_command_has_help_with_an_example(fks: Command, path: tuple[str, ...]) -> None:
    result = fks(*path, "--help")
    assert result.exit_code == 0
    assert f"fks-backfill {' '.join(path)}" in result.stdout.partition("Example")[2]


def test_the_commands_of_the_contract_exist(fks: Command) -> None:
    result = fks("--help").stdout
    for name in [
        "demo",
        "up",
        "down",
        "backfill",
        "gaps",
        "audit",
        "status",
        "series",
        "batches",
        "simulate",
        "export",
        "db",
    ]:
        assert f"\n  {name} " in result


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("backfill BTC/USDT 7h", ["'7h'", "1m 5m 15m 30m 1h 4h 1d 1w"]),
        ("backfill BTC/USDT 1H", ["'1H'", "did you mean 1h?"]),
        ("backfill BTC/USDT 60min", ["'60min'", "did you mean 1h?"]),
        ("backfill", ["SYMBOL and a TIMEFRAME", "--all"]),
        ("backfill 1h", ["SYMBOL and a TIMEFRAME", "--all"]),
        ("backfill DOGE/USDT", ["DOGE/USDT", "needs a TIMEFRAME", "ETH/USDT, BTC/USDT, SOL/BTC"]),
        ("backfill --all BTC/USDT", ["no SYMBOL"]),
        ("backfill BTC/USDT 1h ETH/USDT", ["1h must follow the symbols"]),
        ("backfill BTC/USDT DOGE/USDT", ["DOGE/USDT is not configured", "needs a TIMEFRAME"]),
        ("backfill --all BTC/USDT 1h", ["no SYMBOL"]),
        (
            "backfill DOGE/* 1h",
            ["'DOGE/*' matches no symbol", "ETH/USDT", "BTC/USDT", "SOL/BTC", "series list"],
        ),
        ("backfill */USDT 4h", ["4h", "1d 1h"]),
        ("backfill BTCUSDT 1h", ["BTC/USDT"]),
        ("backfill BTC/USDT 1h --provider bitstamp", ["bitstamp", "binance", "polygon"]),
        ("backfill BTC/USDT 1h --start 2024-02-01 --end 2024-01-01", ["2024-02-01", "after --end"]),
        ("backfill BTC/USDT 1h --start 2024-02-01 --end 2024-02-01", ["exclusive"]),
        ("backfill BTC/USDT 1h --start 2999-01-01", ["2999-01-01", "future"]),
        ("backfill BTC/USDT 1h --start yesterday", ["'yesterday'", "2024-01-31", "-7d"]),
        ("backfill BTC/USDT 1h --start -7y", ["'-7y'", "-7d (units m h d w)"]),
        ("backfill BTC/USDT 1h --start -99999999w", ["'-99999999w'", "1970"]),
        ("backfill BTC/USDT 1h --start 2024-13", ["'2024-13'", "2024-01"]),
        ("backfill BTC/USDT 1h --start 2024 --end 2024-01", ["exclusive"]),
        ("backfill BTC/USDT 1h --start 1812-01-01", ["1970"]),
        ("backfill BTC/USDT 1h --strat 2024-01-01", ["--strat"]),
        ("gaps BTC/USDT 1h --start 2024-02-01 --end 2024-01-01", ["starts", "after"]),
        ("export BTC/USDT 1h -o out.xlsx", ["out.xlsx", ".csv.gz", ".parquet"]),
        ("export BTC/USDT 1h -o out.csv --as-of 2999-01-01", ["future"]),
        ("export BTC/USDT 1h", ["--output"]),
        ("launch BTC/USDT 1H", ["'1H'", "did you mean 1h?"]),
        ("simulate --outage nobody", ["PROVIDER[@SYMBOL]=START/END"]),
        ("simulate --halt everybody", ["halt 'everybody'", "PROVIDER[@SYMBOL]=START/END"]),
        ("simulate --env --port 0", ["--env needs the port"]),
        ("simulate --replay nowhere", ["nowhere"]),
        ("simulate --port 70000", ["70000"]),
        ("refill", ["refill"]),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(fks: Command, line: str, names: list[str]) -> None:
    result = fks(*line.split(" "))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    for name in names:
        assert name in result.stderr


def test_a_disabled_provider_cannot_be_named(fks: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FKS_PROVIDERS__BINANCE__ENABLED", "false")
    result = fks("backfill", "BTC/USDT", "1h", "--provider", "binance")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "providers.binance.enabled" in result.stderr


def test_all_errors_of_the_settings_are_reported_at_once(
    fks: Command, settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.write_text(
        "batch_size_days: 0\nsymbols:\n  - {symbol: BTC-USDT, asset_class: crypto, timeframes: [1h]}\n"
    )
    monkeypatch.setenv("FKS_BATCHSIZE", "3")
    result = fks("status", "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert [line.startswith("Error: ") for line in result.stderr.splitlines()] == [True] * 3
    for place in ("batch_size_days", "symbols[0].symbol", "FKS_BATCHSIZE"):
        assert place in result.stderr


@pytest.mark.parametrize("url", ["mysql://root:hush@localhost/x", "nonsense", "postgresql://u:hush@h:port/x"])
def test_a_malformed_database_url_is_a_settings_error(
    fks: Command, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("FKS_DATABASE_URL", url)
    result = fks("status")
    assert result.exit_code == 2
    assert "FKS_DATABASE_URL" in result.stderr
    assert "hush" not in result.stderr


@pytest.mark.parametrize(
    "line", ["status", "gaps BTC/USDT 1h", "audit", "batches list", "series list", "db init"]
)
def test_an_absent_database_is_one_sentence_without_the_password(fks: Command, line: str) -> None:
    result = fks(*line.split(), "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert "FKS_DATABASE_URL" in result.stderr
    assert "secret" not in result.stderr


def test_without_a_command_the_help_is_shown(fks: Command) -> None:
    result = fks()
    assert (result.exit_code, result.stdout) == (2, "")
    assert "backfill" in result.stderr
