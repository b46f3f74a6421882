"""Several series in one command, and failing providers: little is printed, once each, and everything with `-v`."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fks_backfill_dagster.cli import progress
from fks_backfill_dagster.cli.messages import short
from fks_backfill_dagster.cli.output import verbose_option
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.pipeline.events import BatchDone
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.simulator.local import LocalMarket
from fks_backfill_dagster_tests.cli.conftest import Command, start
from fks_backfill_dagster_tests.cli.test_backfill import JANUARY

BTC = Series("BTC/USDT", Timeframe.H1, AssetClass.CRYPTO)
HALF_YEAR = ("--start", "2024-01", "--end", "2024-07")
BINANCE = ("--provider", "binance")
LINE = re.compile(
    r"\w+/\w+ 1h: 4,368 of 4,368 candles stored, 4,368 of them by this call \(6 batches, \d+ requests?, [\d.]+ s\)"
)


def test_many_series_give_a_list(fks: Command, world: LocalMarket) -> None:
    every = fks("backfill", "--all", "1h", *JANUARY, "--json")
    assert every.exit_code == 0
    assert [(r["symbol"], r["total_candles"]) for r in every.json] == [
        ("BTC/USDT", 744),
        ("ETH/USDT", 744),
        ("SOL/BTC", 744),
    ]
    assert [r["symbol"] for r in fks("backfill", "*/USDT", "1h", *JANUARY, "--json").json] == [
        "BTC/USDT",
        "ETH/USDT",
    ]
    one = fks("backfill", "SOL*", "1h", *JANUARY, "--json").json
    assert isinstance(one, list)
    timeframes = [r["timeframe"] for r in fks("backfill", "--all", *JANUARY, "--json").json]
    assert timeframes == ["1h", "1d", "1h", "1h"]


def test_a_series_that_fails_does_not_stop_the_others(fks: Command, world: LocalMarket) -> None:
    world.plant_fault("polygon", "status", symbol="X:BTCUSD", count=None, status=403)
    result = fks("backfill", "*/USDT", "1h", *JANUARY, "--provider", "polygon", "--json")
    assert result.exit_code == 1
    assert [(r["symbol"], r["total_candles"], r["missing"]) for r in result.json] == [
        ("BTC/USDT", 0, 744),
        ("ETH/USDT", 744, 0),
    ]
    assert [len(r["errors"]) for r in result.json] == [1, 0]


def test_a_warning_about_all_series_is_logged_once(
    fks: Command, world: LocalMarket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POLYGON_API_KEY")
    line = ("--all", "1h", "--start", "2024-01-01", "--end", "2024-01-02", "--json")
    for options in (["--dry-run"], []):
        result = fks("backfill", *line, *options)
        assert len(result.json) == 3
        assert result.stderr.count("POLYGON_API_KEY is not set") == 1


def test_many_series_have_a_line_each_and_a_summary(fks: Command, world: LocalMarket) -> None:
    done = fks("backfill", "--all", "1h", *HALF_YEAR, *BINANCE)
    assert (done.exit_code, done.stderr) == (0, "")
    *lines, summary = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["BTC/USDT", "ETH/USDT", "SOL/BTC"]
    assert all(LINE.fullmatch(line) for line in lines)
    assert summary.startswith(
        "3 series: 3 complete, 0 incomplete; 13,104 of 13,104 candles stored, 13,104 of them by this call ("
    )
    again = fks("backfill", "--all", "1h", *HALF_YEAR, *BINANCE, "--json")
    assert len(again.json) == 3
    assert len(again.stderr.splitlines()) == 4, "the same lines, as progress"
    details = fks("backfill", "--all", "1h", *HALF_YEAR, *BINANCE, "--refetch", "-v")
    assert details.stderr.count("candles written from binance") == 18
    assert details.stdout.count("delivered") == 3


def test_a_provider_that_fails_for_every_series_is_reported_once_and_short(
    fks: Command, world: LocalMarket
) -> None:
    world.plant_fault("polygon", "status", count=None, status=403)
    line = ("backfill", "--all", "1h", *HALF_YEAR, "--provider", "polygon")
    done = fks(*line)
    assert done.exit_code == 1
    assert done.stderr.count("returned 403") == 1
    assert "http://" not in done.stderr + done.stdout
    assert len(done.stderr.splitlines()) == 2
    assert "Incomplete: BTC/USDT 1h, ETH/USDT 1h, SOL/BTC 1h. `fks-backfill gaps`" in done.stderr
    *lines, summary = done.stdout.splitlines()
    assert all(line.endswith("batches failed, 4,368 candles still missing") for line in lines)
    assert "0 complete, 3 incomplete" in summary
    details = fks(*line, "-v").stderr
    assert details.count("returned 403") > 6
    assert f"{world.url}/polygon/v2/aggs/ticker/" in details


def test_one_series_with_many_failed_batches_reports_the_error_once(fks: Command, world: LocalMarket) -> None:
    world.plant_fault("polygon", "status", count=None, status=403)
    done = fks("backfill", "BTC/USDT", "1h", *HALF_YEAR, "--provider", "polygon")
    assert done.exit_code == 1
    plan, error, left = done.stderr.splitlines()
    assert "candles to fetch in 6 batches" in plan
    assert "returned 403" in error
    assert left.startswith(
        "Error: BTC/USDT 1h: 6 of 6 batches failed, 4,368 candles still missing; see `fks-"
    )


def test_the_incomplete_series_are_named(fks: Command, world: LocalMarket) -> None:
    hole = TimeRange(instant("2024-01-10T05:00"), instant("2024-01-10T09:00"))
    world.plant_outage("binance", hole, "ETHUSDT")
    done = fks("backfill", "*/USDT", "1h", *HALF_YEAR, *BINANCE)
    assert done.exit_code == 1
    assert re.search(r"^ETH/USDT 1h: 4,364 of .*\): 4 candles still missing$", done.stdout, re.MULTILINE)
    assert "2 series: 1 complete, 1 incomplete; 8,732 of 8,736 candles stored" in done.stdout
    assert done.stderr == (
        "Incomplete: ETH/USDT 1h. `fks-backfill gaps` lists their gaps; run the same command again to fetch only"
        " what is missing.\n"
    )


def test_series_outside_of_the_range_are_named_once(fks: Command, world: LocalMarket, settings: Path) -> None:
    late = ", start: 2024-03-01, timeframes: [1h]}"
    settings.write_text(settings.read_text().replace(", timeframes: [1h]}", late))
    done = fks("backfill", "--all", "1h", "--end", "2024-02", *BINANCE)
    assert done.exit_code == 0
    assert done.stderr == (
        "2 series start after this range or end before it, by the settings, so none of their candles is expected:"
        " ETH/USDT 1h, SOL/BTC 1h\n"
    )
    assert "3 series: 3 complete, 0 incomplete; 744 of 744 candles stored" in done.stdout
    refused = fks("backfill", "ETH/USDT", "1h", "--end", "2024-02")
    assert refused.exit_code == 2
    assert "ETH/USDT 1h starts at 2024-03-01T00:00:00+00:00, and the range ends before" in refused.stderr


def test_earlier_gaps_of_several_series_are_one_line(fks: Command, world: LocalMarket) -> None:
    hole = TimeRange(instant("2024-01-01"), instant("2024-01-03"))
    world.plant_outage("binance", hole)
    fks("backfill", "--all", "1h", "--start", "2024-01", "--end", "2024-02", *BINANCE)
    assert fks("gaps", "--all", "1h").stderr.splitlines()[0] == (
        "3 series: 144 candles missing before the oldest stored one (BTC/USDT 1h, ETH/USDT 1h, SOL/BTC 1h);"
        " list them with --start 1970."
    )
    assert len(fks("gaps", "BTC/USDT", "1h", "--start", "1970").stdout.splitlines()) == 3


@pytest.mark.parametrize(
    ("option", "shown"), [((), []), (("-v",), ["info: i"]), (("-vv",), ["info: i", "debug: d"])]
)
def test_v_sets_the_level_of_our_loggers_for_the_command(option: tuple[str, ...], shown: list[str]) -> None:
    logger = logging.getLogger("fks_backfill_dagster.store.sessions")

    @click.command()
    @verbose_option
    def command() -> None:
        logger.info("i")
        logger.debug("d")

    assert CliRunner().invoke(command, list(option)).stderr.splitlines() == shown
    assert not logger.isEnabledFor(logging.INFO)


def test_a_symbol_alone_has_all_of_its_timeframes(fks: Command, world: LocalMarket) -> None:
    done = fks("backfill", "btc_usdt", *HALF_YEAR, *BINANCE, "--json")
    assert [(one["symbol"], one["timeframe"]) for one in done.json] == [
        ("BTC/USDT", "1h"),
        ("BTC/USDT", "1d"),
    ]
    assert [one["timeframe"] for one in fks("status", "BTC/USDT", "--json").json] == ["1h", "1d"]
    assert [one["symbol"] for one in fks("status", "--all", "1d", "--json").json] == ["BTC/USDT"]
    listed = fks("batches", "list", "BTC/USDT", "--json").json
    assert {one["timeframe"] for one in listed} == {"1h", "1d"}
    assert [one["id"] for one in listed] == sorted((one["id"] for one in listed), reverse=True)
    assert fks("batches", "list", "BTC/USDT", "--limit", "2", "--json").json == listed[:2]
    assert len(fks("series", "list", "BTC/USDT").stdout.splitlines()) == 3
    assert fks("gaps", "--json").json == fks("gaps", "--all", "--json").json != []
    assert fks("gaps").stderr.count("never synced") == 1, "ETH/USDT and SOL/BTC, in one line"


def test_several_symbols_are_taken_in_the_order_of_the_settings(fks: Command, world: LocalMarket) -> None:
    line = ("SOL/BTC", "BTC/*", "btc_usdt")
    assert [(one["symbol"], one["timeframe"]) for one in fks("status", *line, "--json").json] == [
        ("BTC/USDT", "1h"),
        ("BTC/USDT", "1d"),
        ("SOL/BTC", "1h"),
    ]
    assert [one["symbol"] for one in fks("status", *line, "1h", "--json").json] == ["BTC/USDT", "SOL/BTC"]
    assert isinstance(fks("status", "BTC/USDT", "1h", "--json").json, dict)


def test_the_terminal_shows_the_position_of_a_series(world: LocalMarket) -> None:
    ours, theirs = os.openpty()
    with start("backfill", "--all", "1h", *HALF_YEAR, *BINANCE, "--json", stderr=theirs) as running:
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # Linux reports the closed end as an error
            while more := os.read(ours, 65_536):
                shown += more
        assert running.stdout is not None
        assert len(json.loads(running.stdout.read())) == 3
    os.close(ours)
    for number, symbol in enumerate(("BTC/USDT", "ETH/USDT", "SOL/BTC"), start=1):
        assert f"{number} of 3  {symbol} 1h" in shown.decode()


def test_a_long_sync_logs_its_batches_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    lines = progress.Lines("2 of 300")
    lines._total = 100
    for _ in range(100):
        clock[0] += 1
        lines(BatchDone(BTC, TimeRange(0, 1), 744, 0, ("binance",)))
    logged = capsys.readouterr().err.splitlines()
    assert len(logged) == 9
    assert logged[0] == "BTC/USDT 1h (2 of 300 series): 10 of 100 batches done, 7,440 candles written"


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (
            'binance: https://api.binance.com/api/v3/klines returned 400: {"code":-1121,"msg":"Invalid symbol."}',
            "binance: api.binance.com returned 400: Invalid symbol.",
        ),
        (
            'polygon: https://api.massive.com/v2/aggs/x returned 401: {"status":"ERROR","request_id":"x","error":'
            '"Unknown API Key"} (check its key)',
            "polygon: api.massive.com returned 401: Unknown API Key (check its key)",
        ),
        (
            'yfinance: https://q.com/v8 returned 404: {"chart":{"result":null,"error":{"code":"Not Found",'
            '"description":"No data found"}}}',
            "yfinance: q.com returned 404: No data found",
        ),
        (
            'coingecko: https://api.coingecko.com/api returned 429: {"status":{"error_code":429,"error_message":"You',
            "coingecko: api.coingecko.com returned 429: You",
        ),
        (
            "binance: http://127.0.0.1:1/api/v3/klines: no connection (refused): start the server, or correct x",
            "binance: 127.0.0.1:1: no connection (refused): start the server, or correct x",
        ),
        ("12 stored candles {are} kept", "12 stored candles {are} kept"),
    ],
)
def test_a_short_message_has_the_host_and_the_text_of_the_body(message: str, shown: str) -> None:
    assert short(message) == shown


def test_every_recorded_error_has_a_short_form(shared_data: Callable[[str], Path]) -> None:
    file = shared_data("binance/BTCUSDT-1h.csv.gz").parents[2] / "wire" / "errors.jsonl"
    bodies = [one["body"] for one in map(json.loads, file.read_text().splitlines()) if "body" in one]
    texts = [f"x: https://h.com/path?a=b returned 400: {json.dumps(body)[:200]}" for body in bodies]
    assert len(texts) > 15
    for text in map(short, texts):
        assert text.startswith("x: h.com returned 400: ")
        assert "https://" not in text
    assert sum("{" not in short(text) for text in texts) > len(texts) / 2


# Warnings about one series


def test_withdrawn_candles_are_reported_for_each_of_several_series(fks: Command, world: LocalMarket) -> None:
    fks("backfill", "*/USDT", "1h", *JANUARY, "--provider", "polygon")
    gone = TimeRange(instant("2024-01-10T03:00"), instant("2024-01-10T05:00"))
    for provider in ("polygon", "binance"):
        world.plant_fault(provider, "empty", count=None, only=gone)
    whole = ("--provider", "polygon", "--provider", "binance", "--refetch")
    done = fks("backfill", "*/USDT", "1h", *JANUARY, *whole)
    removed = "warning: 2 stored candles are no longer returned by any provider, and were removed"
    assert [line for line in done.stderr.splitlines() if "removed" in line] == [
        f"BTC/USDT 1h: {removed}",
        f"ETH/USDT 1h: {removed}",
    ]


def test_the_beginning_of_a_history_is_reported_of_a_single_series_only(
    fks: Command, world: LocalMarket
) -> None:
    window = ("--start", "2016-12", "--end", "2017-02")
    assert "history begins at 2017-01-01" in fks("backfill", "BTC/USDT", "1d", *window, *BINANCE).stderr
    many = fks("backfill", "BTC/USDT", "ETH/USDT", "1h", *window, *BINANCE)
    assert "history begins" not in many.stderr
    assert "history begins at 2017-01-01" in fks("backfill", "BTC/*", *window, *BINANCE, "-v").stderr


def test_a_dry_run_names_complete_series_in_one_line(fks: Command, world: LocalMarket) -> None:
    fks("backfill", "--all", "1h", *JANUARY, *BINANCE)
    done = fks("backfill", "--all", "1h", *JANUARY, *BINANCE, "--dry-run")
    assert done.stdout == "BTC/USDT 1h, ETH/USDT 1h, SOL/BTC 1h: nothing to fetch\n"
