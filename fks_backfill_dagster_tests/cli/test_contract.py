"""The contract as seen by another program: the command, the views, and an independent market.

Nothing of the project is called here but the command itself, in separate processes. The market is a
Binance of forty lines with its own values, so that stored candles are compared with an independent
truth, bit for bit.
"""

from __future__ import annotations

import gzip
import json
import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psycopg
import pytest

from fks_backfill_dagster_tests.cli.conftest import Command, start

HOUR = 3_600_000
LISTED = int(datetime(2023, 12, 1, tzinfo=UTC).timestamp() * 1000)
JANUARY = ("BTC/USDT", "1h", "--start", "2024-01-01", "--end", "2024-02-01")
OPENS = range(int(datetime(2024, 1, 1, tzinfo=UTC).timestamp() * 1000), LISTED + 62 * 24 * HOUR, HOUR)
OUTAGE = frozenset(OPENS[99:103])  # 2024-01-05 03:00 to 07:00
KEY, PASSWORD = "k3y-that-stays-secret", "pa55word-that-stays-secret"

Row = list[Any]
Spoil = Callable[[list[Row]], list[Row]]

REPORT = {
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
VIEWS = {
    "ohlcv": "symbol timeframe ts open high low close volume provider",
    "sync_status": "symbol timeframe status oldest_data_time newest_data_time total_candles last_sync_time"
    " error_message open_gaps",
    "gaps": "symbol timeframe gap_start gap_end missing_candles status attempts next_attempt_at evidence",
    "validations": "symbol timeframe start_ts end_ts compared discrepancies providers validated_at stored compared_at"
    " tolerance",
}


def candle(opened: int) -> tuple[float, float, float, float, float]:
    """Values with many digits, different in every hour."""
    low = 20_000 + (opened // HOUR * 7919 % 100_003) / 7
    return low + 0.1, low + 0.7, low, low + 1 / 3, (opened // HOUR % 977) / 3


def unchanged(rows: list[Row]) -> list[Row]:
    return rows


class Market(BaseHTTPRequestHandler):
    """Klines as Binance documents them; faults are set on the class."""

    spoil: Spoil = staticmethod(unchanged)
    dated = True
    hangs = False
    garbage: list[bytes] = []  # noqa: RUF012 - the responses before the first valid one
    requests = 0
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        Market.requests += 1
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        if Market.hangs:
            time.sleep(20)
        if query["symbol"] != "BTCUSDT":
            return self.respond(400, {"code": -1121, "msg": "Invalid symbol."})
        step = {"1m": 60_000, "1h": HOUR}[query["interval"]]
        now = int(time.time() * 1000)
        first, last = max(int(query["startTime"]), LISTED), min(now, int(query.get("endTime", now)))
        opens = range(-(-first // step) * step, last + 1, step)
        rows = [self.row(t, step) for t in opens[: int(query["limit"])] if t not in OUTAGE]
        return self.respond(200, type(self).spoil(rows))

    def row(self, opened: int, step: int) -> Row:
        prices = [repr(value) for value in candle(opened)]
        return [opened, *prices, opened + step - 1, "1.0", 5, "1.0", "1.0", "0"]

    def respond(self, status: int, document: object) -> None:
        body = Market.garbage.pop() if Market.garbage else json.dumps(document).encode()
        self.send_response_only(status)
        if Market.dated:
            self.send_header("Date", self.date_time_string())
        body = gzip.compress(body)
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def market(monkeypatch: pytest.MonkeyPatch, settings: Path, database_url: str) -> Iterator[type[Market]]:
    """The market, and settings that point to it and to a fresh database."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Market)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("FKS_PROVIDERS__BINANCE__BASE_URL", address)
    monkeypatch.setenv("FKS_PROVIDER_PRIORITY__CRYPTO", '["binance"]')
    monkeypatch.setenv("FKS_DATABASE_URL", database_url)
    monkeypatch.setattr(Market, "requests", 0)
    yield Market
    server.shutdown()


def stored(url: str) -> dict[int, tuple[bytes, ...]]:
    """The bits of every candle of the view, by its open in milliseconds."""
    with psycopg.connect(url) as connection, connection.cursor(binary=True) as cursor:
        cursor.execute(
            "SELECT (extract(epoch FROM ts) * 1000)::bigint, open, high, low, close, volume FROM fks.ohlcv"
        )
        return {row[0]: tuple(struct.pack("d", value) for value in row[1:]) for row in cursor}


def truth() -> dict[int, tuple[bytes, ...]]:
    return {t: tuple(struct.pack("d", v) for v in candle(t)) for t in OPENS if t not in OUTAGE}


# Unusual and faulty markets -----------------------------------------------------------------------------


def test_a_month_from_first_to_last(
    market: type[Market], process: Command, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backfill, gaps, status, undo, refill: JSON keys, and values to the last bit."""
    monkeypatch.setenv("POLYGON_API_KEY", KEY)
    monkeypatch.setattr(market, "garbage", [b"<html>down</html>", b"\x00\xff\x1b" * 99, b'{"rows": []}', b""])
    monkeypatch.setattr(market, "dated", False)
    done = process("backfill", *JANUARY, "--json")
    assert done.exit_code == 1, "four candles are missing"
    assert set(done.json) == REPORT
    assert done.json["providers"] == {"binance": {"asked": 744, "delivered": 740, "rejected": 0, "failed": 0}}
    assert (done.json["expected"], done.json["total_candles"], done.json["missing"]) == (744, 740, 4)
    assert stored(database_url) == truth()

    (gap,) = process("gaps", *JANUARY, "--json").json
    assert set(gap) == {"start", "end", "duration_minutes", "missing_candles", "status", "evidence"}
    assert (gap["start"], gap["end"]) == ("2024-01-05T03:00:00+00:00", "2024-01-05T07:00:00+00:00")
    assert (gap["missing_candles"], gap["duration_minutes"]) == (4, 240)

    status = process("status", *JANUARY[:2], "--json").json
    assert status["total_candles"] == 740
    assert status["oldest_data"] == "2024-01-01T00:00:00+00:00"
    assert status["newest_data"] == "2024-01-31T23:00:00+00:00"

    newest = process("batches", "list", "--json").json[0]["id"]
    assert process("batches", "undo", str(newest)).exit_code == 0
    assert stored(database_url) == {}
    refilled = process("backfill", *JANUARY, "--json")
    assert refilled.json["total_candles"] == 740
    assert stored(database_url) == truth()
    assert KEY not in done.stderr + refilled.stderr

    with psycopg.connect(database_url) as connection:
        for view, columns in VIEWS.items():
            shown = connection.execute(f"SELECT * FROM fks.{view} LIMIT 0").description
            assert shown is not None
            assert " ".join(column.name for column in shown) == columns


@pytest.mark.parametrize(
    ("change", "rejected"),
    [
        (lambda row: [row[0] + 7000, *row[1:]], 31),
        (lambda row: [*row[:2], row[3], row[2], *row[4:]], 31),
    ],
    ids=["off the grid", "high below low"],
)
def test_invalid_rows_are_rejected_and_replaced_later(
    market: type[Market],
    process: Command,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Row], Row],
    rejected: int,
) -> None:
    midnight = 24 * HOUR
    with monkeypatch.context() as faulty:
        faulty.setattr(
            market,
            "spoil",
            staticmethod(lambda rows: [change(row) if row[0] % midnight == 0 else row for row in rows]),
        )
        done = process("backfill", *JANUARY, "--json")
    assert done.exit_code == 1
    assert done.json["providers"]["binance"]["rejected"] == rejected
    assert stored(database_url) == {t: bits for t, bits in truth().items() if t % midnight}
    assert "Traceback" not in done.stderr
    process("backfill", *JANUARY)
    assert stored(database_url) == truth()


# An unreachable market ----------------------------------------------------------------------------------


def test_an_unreachable_market(
    settings: Path, database_url: str, monkeypatch: pytest.MonkeyPatch, process: Command
) -> None:
    """Within seconds the user sees the error and its place, and within a minute the command ends."""
    monkeypatch.setenv("FKS_DATABASE_URL", database_url)
    monkeypatch.setenv("FKS_PROVIDERS__BINANCE__BASE_URL", "http://127.0.0.1:1")
    began = time.monotonic()
    with start("backfill", *JANUARY, "--provider", "binance", "--json") as running:
        assert running.stderr is not None
        first = running.stderr.readline()
        assert time.monotonic() - began < 10
        assert "127.0.0.1:1: no connection (refused)" in first
        assert "http://" not in first
        assert "correct providers.binance.base_url; retrying" in first
        stdout, _ = running.communicate(timeout=60)
    assert time.monotonic() - began < 40
    assert running.returncode == 1
    report = json.loads(stdout)
    assert (report["successful_batches"], report["failed_batches"], report["missing"]) == (0, 1, 744)
    assert "correct providers.binance.base_url" in report["errors"][0]


def test_ctrl_c_while_the_market_hangs(
    market: type[Market], database_url: str, monkeypatch: pytest.MonkeyPatch, process: Command
) -> None:
    monkeypatch.setattr(market, "hangs", True)
    with start("backfill", *JANUARY, "--json") as running:
        while market.requests == 0:
            time.sleep(0.05)
        began = time.monotonic()
        running.send_signal(signal.SIGINT)
        stdout, stderr = running.communicate(timeout=15)
    assert time.monotonic() - began < 5
    assert (running.returncode, stdout) == (130, "")
    assert "Interrupted: committed batches stay" in stderr
    assert "Traceback" not in stderr


# Local errors -------------------------------------------------------------------------------------------


@pytest.mark.server
@pytest.mark.parametrize(
    ("variables", "code", "phrases"),
    [
        ({"FKS_NOPE": "1", "FKS_BATCH_SIZE_DAYS": "x"}, 2, ["FKS_NOPE", "FKS_BATCH_SIZE_DAYS"]),
        ({"FKS_DATABASE_URL": f"postgresql://u:{PASSWORD}@127.0.0.1:1/x"}, 1, ["correct FKS_DATABASE_URL"]),
        ({"FKS_DATABASE_URL": f"postgresql://u:p@{PASSWORD}@127.0.0.1/x"}, 2, ["percent-encoded"]),
        ({"FKS_DATABASE_URL": f"mysql://u:{PASSWORD}@h/x"}, 2, ["FKS_DATABASE_URL", "postgresql://"]),
    ],
    ids=["settings", "no database", "a bare @", "another database"],
)
def test_local_errors_are_one_sentence_each(
    settings: Path,
    monkeypatch: pytest.MonkeyPatch,
    process: Command,
    variables: dict[str, str],
    code: int,
    phrases: list[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = process("status", "--json")
    assert (result.exit_code, result.stdout) == (code, "")
    lines = result.stderr.splitlines()
    assert len(lines) == len(variables)
    assert all(line.startswith("Error: ") for line in lines)
    assert all(phrase in result.stderr for phrase in phrases)
    assert PASSWORD not in result.stderr
    assert os.environ["FKS_HOME"] not in result.stderr
