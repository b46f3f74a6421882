"""Writes the fixture; see README.md. Runs with the store of commit 324a536, not with that of this checkout."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import sqlalchemy as sa
from fks_backfill_dagster.store.commit import BatchWrite, Brought, Refused, commit_batch, undo_batch
from fks_backfill_dagster.store.settling import Findings

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe, to_micros
from fks_backfill_dagster.embedded import EmbeddedPostgres
from fks_backfill_dagster.embedded.binaries import binaries_for
from fks_backfill_dagster.store import ledger
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.ledger import Evidence

MONTHLY = "/data/spot/monthly/klines/BTCUSDT/1m/BTCUSDT-1m-2020-12.zip"
DAILY = "/data/spot/daily/klines/BTCUSDT/1m/BTCUSDT-1m-2020-12-21.zip"

# What is compared: name, columns in the order of the answer.
TABLES = {
    "ohlcv": "symbol, timeframe, ts, open, high, low, close, volume, provider",
    "sync_status": "symbol, timeframe, status, oldest_data_time, newest_data_time, total_candles, last_sync_time,"
    " error_message, open_gaps",
    "gaps": "symbol, timeframe, gap_start, gap_end, missing_candles, status, attempts, next_attempt_at, evidence",
    "corrections": "symbol, timeframe, ts, corrected_at, open_before, high_before, low_before, close_before,"
    " volume_before, open_after, high_after, low_after, close_after, volume_after, source, reason",
    "batch": "id, series_id, provider, transport, source, sha256, range_start, range_end, run_id, fetched_at,"
    " committed_at, inserted, updated, undoes",
    "gap": "id, series_id, gap_start, gap_end, missing_candles, status, found_at, changed_at, heard",
    "series": "id, symbol, timeframe, asset_class, calendar, created_at",
    "sync_state": "series_id, synced::text, total_candles, oldest, newest",
    "quarantine": "id, series_id, ts, open, high, low, close, volume, provider, source, reason, first_seen_at,"
    " last_seen_at, seen",
    "listing": "provider, symbol, listed_at, found_at",
}

# Moments of the database's clock. They are moved to WRITTEN_ON, so that the fixture lies in the past wherever it is
# restored; those of the tests' own making are older than that.
CLOCKS = {
    "series": ("created_at",),
    "batch": ("committed_at", "fetched_at"),
    "gap": ("found_at", "changed_at"),
    "sync_state": ("last_sync_time",),
    "quarantine": ("first_seen_at", "last_seen_at"),
    "listing": ("found_at",),
}
WRITTEN_ON = datetime.fromisoformat("2024-06-01T00:00:00+00:00")

AS_OF = "SELECT * FROM fks.ohlcv_as_of(:symbol, :timeframe, '2000-01-01Z', '2030-01-01Z', :moment)"


def at(text: str) -> int:
    return to_micros(datetime.fromisoformat(text))


def priced(opens: np.ndarray, version: int = 0) -> Candles:
    """Prices that tell their open and version; some candles have no volume."""
    step = (opens // 60_000_000) % 997
    low = 100.1 + step / 3 + version
    volume = np.where(step % 5 == 4, np.nan, low / 7)
    return Candles(opens, low + 0.25, low + 1.1, low, low + 0.7, volume)


class Shelf:
    def __init__(self, database: Database, series: Series) -> None:
        self.database, self.series, self.grid = database, series, grid_of(series)
        self.moments: list[datetime] = []
        with database.begin() as connection:
            self.identity = ledger.register(connection, series)

    def opens(self, start: str, end: str) -> np.ndarray:
        return self.grid.opens(TimeRange(at(start), at(end)))

    def commit(
        self,
        start: str,
        end: str,
        *brought: Brought,
        refused: tuple[Refused, ...] = (),
        evidence: tuple[Evidence, ...] = (),
        **found: object,
    ) -> None:
        window = TimeRange(at(start), at(end))
        write = BatchWrite(window, brought, refused, evidence, Findings(**found), "run-1")
        commit_batch(self.database, self.series, self.identity, write, self.grid)
        self.remember()

    def undo(self, position: int) -> None:
        """Takes back the batch at that place in the order of the commits."""
        with self.database.begin() as connection:
            query = sa.text("SELECT id FROM fks.batch WHERE series_id = :id ORDER BY id")
            batch = connection.scalars(query, {"id": self.identity}).all()[position]
        undo_batch(self.database, self.series, self.identity, batch, self.grid)
        self.remember()

    def ended(self, error: str | None = None) -> None:
        with self.database.begin() as connection:
            ledger.end_sync(connection, self.identity, "owner", error)

    def remember(self) -> None:
        with self.database.begin() as connection:
            self.moments.append(connection.scalar(sa.text("SELECT clock_timestamp()")))
        time.sleep(0.002)


def write(database: Database) -> list[Shelf]:
    return [minutes(database), forex(database), stocks(database), undone(database), failed(database)]


def minutes(database: Database) -> Shelf:
    shelf = Shelf(database, Series("BTC/USDT", Timeframe("1m"), AssetClass.CRYPTO))
    fetched = at("2021-02-01T00:00:00+00:00")
    day = shelf.opens("2020-12-21T12:00+00:00", "2020-12-21T16:00+00:00")
    monthly = Brought("binance", "archive", MONTHLY, "ab" * 32, fetched, priced(day[:120]))
    lacks = np.delete(day[120:], [10, 11, 12, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 100])
    rest = Brought("binance", "rest", "/api/v3/klines", None, fetched + 1, priced(lacks))
    absent = (
        Evidence("binance", fetched, "absent", "complete answer without them"),
        Evidence("polygon", fetched, "absent"),
    )
    shelf.commit(
        "2020-12-21T12:00+00:00",
        "2020-12-21T16:00+00:00",
        monthly,
        rest,
        refused=(Refused("binance", MONTHLY, "high_low", broken(day[130:133])),),
        evidence=absent,
        able=frozenset({"binance", "polygon"}),
        tolerated=5,
    )
    # Another publication of 50 minutes; and the same broken rows once more.
    daily = Brought("binance", "archive", DAILY, "cd" * 32, fetched + 2, priced(day[60:110], 3))
    shelf.commit(
        "2020-12-21T13:00+00:00",
        "2020-12-21T13:50+00:00",
        daily,
        refused=(Refused("binance", MONTHLY, "high_low", broken(day[130:133])),),
    )
    # Coverage with a hole; an outage that nobody has answered for.
    later = shelf.opens("2020-12-22T00:00+00:00", "2020-12-22T01:00+00:00")
    shelf.commit(
        "2020-12-22T00:00+00:00",
        "2020-12-22T02:00+00:00",
        Brought("polygon", "rest", "/v2/aggs/ticker/X:BTCUSD", None, fetched + 3, priced(later)),
        evidence=(Evidence("binance", fetched + 3, "error", "binance: HTTP 502"),),
        able=frozenset({"binance", "polygon"}),
    )
    # A correction that was taken back.
    wrong = Brought("polygon", "rest", "/v2/aggs/ticker/X:BTCUSD", None, fetched + 4, priced(day[100:120], 7))
    shelf.commit("2020-12-21T13:40+00:00", "2020-12-21T14:00+00:00", wrong)
    shelf.undo(-1)
    shelf.ended()
    with database.begin() as connection:
        ledger.remember_listing(connection, "binance", "BTC/USDT", at("2017-08-17T04:00:00+00:00"))
        ledger.remember_listing(connection, "polygon", "BTC/USDT", at("2016-01-01T00:00:00+00:00"))
    return shelf


def broken(opens: np.ndarray) -> Candles:
    one, worse = np.ones(len(opens)), np.full(len(opens), np.nan)
    return Candles(opens, one, one * 0.5, one, one, worse)


def forex(database: Database) -> Shelf:
    """A hole of 17 hours on a Wednesday, taken for an interval without trades after one response."""
    shelf = Shelf(database, Series("EUR/USD", Timeframe("1h"), AssetClass.FOREX))
    fetched = at("2024-02-01T00:00:00+00:00")
    week = shelf.opens("2024-01-15T00:00+00:00", "2024-01-20T00:00+00:00")
    hole = week[50:67]
    there = np.setdiff1d(week, np.concatenate([hole, week[90:96]]))
    shelf.commit(
        "2024-01-15T00:00+00:00",
        "2024-01-20T00:00+00:00",
        Brought("oanda", "rest", "/v3/instruments/EUR_USD/candles", None, fetched, priced(there)),
        evidence=(Evidence("oanda", fetched, "absent"),),
        quiet=hole,
        able=frozenset({"oanda", "polygon"}),
    )
    # Another six hours came from the second provider.
    derived = Brought(
        "polygon", "derived", "/v2/aggs/ticker/C:EURUSD", None, fetched + 9, priced(week[90:96])
    )
    shelf.commit("2024-01-18T00:00+00:00", "2024-01-19T12:00+00:00", derived)
    shelf.ended()
    return shelf


def stocks(database: Database) -> Shelf:
    shelf = Shelf(database, Series("AAPL", Timeframe("1d"), AssetClass.STOCKS))
    fetched = at("2024-02-01T00:00:00+00:00")
    month = shelf.opens("2024-01-01T00:00+00:00", "2024-02-01T00:00+00:00")
    derived = Brought("polygon", "derived", "/v2/aggs/ticker/AAPL", None, fetched, priced(month[:12]))
    rest = Brought("yfinance", "rest", "/v8/finance/chart/AAPL", None, fetched, priced(month[12:]))
    shelf.commit("2024-01-01T00:00+00:00", "2024-02-01T00:00+00:00", derived, rest)
    again = Brought("polygon", "derived", "/v2/aggs/ticker/AAPL", None, fetched + 5, priced(month[3:6], 2))
    shelf.commit("2024-01-01T00:00+00:00", "2024-02-01T00:00+00:00", again)
    shelf.ended()
    return shelf


def undone(database: Database) -> Shelf:
    """All that was imported is taken back: a gap is what is left."""
    shelf = Shelf(database, Series("ETH/USDT", Timeframe("1h"), AssetClass.CRYPTO))
    fetched = at("2024-02-01T00:00:00+00:00")
    opens = shelf.opens("2024-01-01T00:00+00:00", "2024-01-02T00:00+00:00")
    shelf.commit(
        "2024-01-01T00:00+00:00",
        "2024-01-02T00:00+00:00",
        Brought("binance", "rest", "/api/v3/klines", None, fetched, priced(opens)),
    )
    shelf.undo(0)
    shelf.ended()
    return shelf


def failed(database: Database) -> Shelf:
    shelf = Shelf(database, Series("SOL/USDT", Timeframe("4h"), AssetClass.CRYPTO))
    shelf.remember()
    shelf.ended("binance: HTTP 451")
    return shelf


def move(database: Database, shelves: list[Shelf]) -> None:
    """Moves what the database's clock gave to WRITTEN_ON."""
    with database.begin() as connection:
        began = connection.scalar(sa.text("SELECT min(created_at) FROM fks.series"))
        back = began - WRITTEN_ON
        for table, columns in CLOCKS.items():
            for column in columns:
                connection.execute(
                    sa.text(f"UPDATE fks.{table} SET {column} = {column} - :back WHERE {column} >= :began"),
                    {"back": back, "began": began},
                )
    for shelf in shelves:
        shelf.moments = [moment - back for moment in shelf.moments]


def answers(database: Database, shelves: list[Shelf]) -> dict[str, object]:
    found: dict[str, object] = {}
    with database.begin() as connection:
        for name, columns in TABLES.items():
            rows = connection.execute(sa.text(f"SELECT {columns} FROM fks.{name}"))
            found[name] = {"columns": columns, "rows": sorted((plain(row) for row in rows), key=str)}
        found["as_of"] = [
            {
                "symbol": shelf.series.symbol,
                "timeframe": shelf.series.timeframe.value,
                "moment": moment.isoformat(),
                "rows": [
                    plain(row)
                    for row in connection.execute(
                        sa.text(AS_OF),
                        {
                            "symbol": shelf.series.symbol,
                            "timeframe": shelf.series.timeframe.value,
                            "moment": moment,
                        },
                    )
                ],
            }
            for shelf in shelves
            for moment in shelf.moments
        ]
    return found


def plain(row: sa.Row) -> list[object]:
    return [value.isoformat() if isinstance(value, datetime) else value for value in row]


def main(target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="fks-fixture-") as home:
        server = EmbeddedPostgres(Path(home))
        url = server.start()
        database = Database(url)
        database.upgrade()
        shelves = write(database)
        move(database, shelves)
        found = answers(database, shelves)
        database.dispose()
        dump = subprocess.run(
            [
                str(binaries_for(None) / "pg_dump"),
                "--schema=fks",
                "--inserts",
                "--rows-per-insert=200",
                "--no-owner",
                "--no-privileges",
                "--no-comments",
                url,
            ],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        server.release()
        server.remove()
    # Commands of psql, which the test does without.
    text = "".join(line for line in dump.splitlines(keepends=True) if not line.startswith("\\"))
    (target / "database.sql.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    (target / "answers.json.gz").write_bytes(gzip.compress(json.dumps(found, indent=1).encode(), mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
