"""Real candles of every asset class, through the local market's replay, into the table."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv

from fks_backfill_dagster.domain.candles import PRICES, Candles
from fks_backfill_dagster.domain.gaps import GapStatus
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.pipeline.sync import Context, sync
from fks_backfill_dagster.providers.http import ProcessLimiter, RequestPool, system_micros
from fks_backfill_dagster.providers.registry import build, resolve_options
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.store import reading
from fks_backfill_dagster.store.database import Database

SharedData = Callable[[str], Path]


def days(start: str, end: str) -> TimeRange:
    return TimeRange.of(
        datetime.fromisoformat(start).replace(tzinfo=UTC), datetime.fromisoformat(end).replace(tzinfo=UTC)
    )


@contextmanager
def replay(database: Database, folder: Path) -> Iterator[Context]:
    """A context whose providers all ask the replayed market."""
    with LocalMarket(MarketConfig(limits=False, replay=folder)) as market:
        pool = RequestPool(5)
        urls = {
            "binance": market.binance_url,
            "polygon": market.polygon_url,
            "oanda": market.oanda_url,
        }
        options = {name: resolve_options(name, base_url=url, key="any") for name, url in urls.items()}
        limiter = ProcessLimiter({})
        providers = {name: build(name, one, pool, limiter) for name, one in options.items()}
        yield Context(database, providers, system_micros)
        pool.close()


def rows_of(file: Path, window: TimeRange) -> Candles:
    """The file's rows of `window`, an empty volume as NaN."""
    table = arrow_csv.read_csv(file)
    ts = table["ts"].cast(pa.timestamp("us", "UTC")).cast("int64").to_numpy()
    numbers = [table[name].to_numpy().astype(float) for name in (*PRICES, "volume")]
    return Candles(ts, *numbers).within(window)


def test_outage_hours_of_binance_filled_from_the_second_provider(
    database: Database, shared_data: SharedData, tmp_path: Path
) -> None:
    """The second market is made from the first: its hours of the outages lie between their neighbours."""
    file = shared_data("binance/BTCUSDT-1h.csv.gz")
    (tmp_path / "binance").mkdir()
    (tmp_path / "binance" / file.name).write_bytes(file.read_bytes())
    with gzip.open(file, "rt") as text:
        rows = list(csv.DictReader(text))
    known = {datetime.fromisoformat(row["ts"]): row for row in rows}
    (tmp_path / "coinbase").mkdir()
    outages = []
    with (tmp_path / "coinbase" / "BTCUSD-1h.csv").open("w") as out:
        writer = csv.DictWriter(out, ["ts", *PRICES, "volume"])
        writer.writeheader()
        last = rows[0]
        start = datetime.fromisoformat(rows[0]["ts"])
        for hour in range(4320):
            at = datetime.fromtimestamp(start.timestamp() + 3600 * hour, UTC)
            if at in known:
                last = known[at]
            else:
                outages.append(int(at.timestamp()) * 1_000_000)
                last = {"ts": at.isoformat(), **dict.fromkeys(PRICES, last["close"]), "volume": "1"}
            writer.writerow(
                {"ts": at.strftime("%Y-%m-%dT%H:%M:%SZ")} | {k: last[k] for k in (*PRICES, "volume")}
            )
    assert len(outages) == 12
    series, window = Series("BTC/USDT", Timeframe.H1, AssetClass.CRYPTO), days("2020-11-17", "2021-05-16")
    with replay(database, tmp_path) as context:
        report = sync(context, series, window, ["binance", "polygon"])
    assert report.complete
    assert (report.expected, report.total_candles) == (4320, 4320)
    assert (report.providers["binance"].delivered, report.providers["polygon"].delivered) == (4308, 12)
    from_polygon = [
        ts
        for ts in outages
        if [o.provider for o in reading.origins(database, series, TimeRange(ts, ts + 1))] == ["polygon"]
    ]
    assert from_polygon == outages, "lineage says which candles"


def test_aapl_hours_are_the_files_rows_inside_the_calendar(
    database: Database, shared_data: SharedData
) -> None:
    file = shared_data("equity/AAPL-1h.csv.gz")
    series = Series("AAPL", Timeframe.H1, AssetClass.STOCKS)
    absent = []
    for window in (days("2002-07-01", "2002-10-01"), days("2013-07-01", "2014-01-01")):
        with replay(database, file.parents[1]) as context:
            report = sync(context, series, window, ["polygon"])
        assert report.failed_batches == 0, report.errors
        rows = rows_of(file, window)
        inside = rows.take(grid_of(series).contains(rows.ts))
        assert len(inside) > 400
        stored = reading.read_candles(database, series, window)
        assert stored.equals(inside)
        absent += [(gap.start, gap.missing) for gap in reading.ledger_gaps(database, series, window)]
    hours = [("2002-09-11T13:00", 1), ("2013-08-22T17:00", 2)]
    assert absent == [(days(at, at).start, missing) for at, missing in hours]


def test_euro_hours_are_the_files_rows_and_its_holes_are_explained(
    database: Database, shared_data: SharedData
) -> None:
    file = shared_data("forex/EURUSD-1h.csv.gz")
    series, window = Series("EUR/USD", Timeframe.H1, AssetClass.FOREX), days("2016-01-01", "2018-01-01")
    with replay(database, file.parents[1]) as context:
        report = sync(context, series, window, ["oanda"])
    assert (report.failed_batches, report.errors) == (0, ())
    stored = reading.read_candles(database, series, window)
    rows = rows_of(file, window)
    assert np.array_equal(stored.ts, rows.ts)
    for name in PRICES:
        assert np.array_equal(getattr(stored, name), getattr(rows, name))
    assert np.isnan(stored.volume).all()
    gaps = reading.ledger_gaps(database, series, window)
    assert {gap.status for gap in gaps} <= {GapStatus.NO_TRADE, GapStatus.UNAVAILABLE, GapStatus.TOLERATED}
    assert sum(gap.missing for gap in gaps) == report.expected - len(stored)
    hole = days("2016-12-12", "2016-12-12").start  # the provider had nothing for a week
    assert any(gap.start <= hole < gap.end and gap.missing > 24 for gap in gaps)
