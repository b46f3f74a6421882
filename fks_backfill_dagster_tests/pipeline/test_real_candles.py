"""Real candles of every asset class, through the local market's replay, into the table."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv as arrow_csv

from fks_backfill_dagster.domain.candles import PRICES, Candles
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe, to_datetime
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.pipeline.sync import sync
from fks_backfill_dagster.providers.http.limiter import ProcessLimiter, system_micros
from fks_backfill_dagster.providers.http.pool import RequestPool
from fks_backfill_dagster.providers.registry import build, resolve_options
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig, Split
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.actions import stored_actions
from fks_backfill_dagster.store.database import Database

SharedData = Callable[[str], Path]


def days(start: str, end: str) -> TimeRange:
    return TimeRange.of(
        datetime.fromisoformat(start).replace(tzinfo=UTC), datetime.fromisoformat(end).replace(tzinfo=UTC)
    )


# The dates on which the file's prices change; the number of new shares for one old share.
APPLES_SPLITS = (
    Split("AAPL", date(2000, 6, 21), 2),
    Split("AAPL", date(2005, 2, 28), 2),
    Split("AAPL", date(2014, 6, 9), 7),
    Split("AAPL", date(2020, 8, 31), 4),
)


@contextmanager
def replay(database: Database, folder: Path, splits: Sequence[Split] = ()) -> Iterator[Context]:
    """A context whose providers all use the replayed market."""
    config = MarketConfig(limits=False, replay=folder, splits=tuple(splits), single_precision=True)
    with LocalMarket(config) as market:
        pool = RequestPool(5)
        urls = {
            "binance": market.binance_url,
            "polygon": market.polygon_url,
            "oanda": market.oanda_url,
            "yfinance": market.yahoo_url,
            "alphavantage": market.alphavantage_url,
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


def invented(opens: Instants) -> Candles:
    """Prices with two decimals that depend only on the open."""
    low = 100 + opens // Timeframe.H1.micros % 97 / 100
    volume = (1000 + opens // Timeframe.H1.micros % 89).astype(np.float64)
    return Candles(opens, low + 1, low + 3.25, low, low + 2.5, volume)


def write_csv(file: Path, candles: Candles) -> None:
    file.parent.mkdir()
    with file.open("w") as out:
        out.write("ts,open,high,low,close,volume\n")
        for ts, *numbers in zip(*(column.tolist() for column in candles.columns()), strict=True):
            out.write(f"{to_datetime(ts):%Y-%m-%dT%H:%M:%SZ},{','.join(f'{n:.2f}' for n in numbers)}\n")


def test_outage_hours_of_binance_filled_from_the_second_provider(
    database: Database, shared_data: SharedData, tmp_path: Path
) -> None:
    """The second market is derived from the first: its prices during the outages repeat the last close."""
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
        if [o.provider for o in queries.origins(database, series, TimeRange(ts, ts + 1))] == ["polygon"]
    ]
    assert from_polygon == outages, "the lineage identifies the candles"


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
        stored = queries.read_candles(database, series, window)
        assert stored.equals(inside)
        absent += [(gap.start, gap.missing) for gap in queries.ledger_gaps(database, series, window)]
    hours = [("2002-09-11T13:00", 1), ("2013-08-22T17:00", 2)]
    assert absent == [(days(at, at).start, missing) for at, missing in hours]


@pytest.mark.parametrize("provider", ["yfinance", "alphavantage"])
def test_aapl_days_are_the_files_rows_inside_the_calendar(
    database: Database, shared_data: SharedData, provider: str
) -> None:
    """All 23 years, with four splits: prices that Yahoo adjusts are stored as traded.

    Polygon's days are derived from half hours of regular sessions only, which differ from the file on 23 half-days
    before 2009.
    """
    file = shared_data("equity/AAPL-1d.csv.gz")
    series, window = Series("AAPL", Timeframe.D1, AssetClass.STOCKS), days("1998-01-02", "2021-04-01")
    with replay(database, file.parents[1], APPLES_SPLITS) as context:
        report = sync(context, series, window, [provider])
    rows = rows_of(file, window)
    inside = rows.take(grid_of(series).contains(rows.ts))
    assert (len(rows), len(inside)) == (5849, 5849)
    assert queries.read_candles(database, series, window).equals(inside)
    assert (report.complete, report.expected, report.stored) == (True, 5849, 5849)
    assert queries.ledger_gaps(database, series, window) == ()
    listed = [(one.action.ex_date, one.action.ratio) for one in stored_actions(database)]
    assert listed == [(one.day, one.new) for one in APPLES_SPLITS if provider == "yfinance"]


def test_hours_of_an_invented_stock_miss_the_candles_missing_in_its_file(
    database: Database, tmp_path: Path
) -> None:
    """As above without the real file: Thanksgiving, a half-day with a row after its close, absent hours."""
    series, window = Series("AAPL", Timeframe.H1, AssetClass.STOCKS), days("2013-11-25", "2013-12-03")
    opens = grid_of(series).opens(window)
    lacking = opens[[10, 17, 18]]
    late = days("2013-11-29T18:00", "2013-11-29T18:00").start
    assert (opens == late - Timeframe.H1.micros).any()
    assert not (opens == late).any()
    in_file = np.sort(np.append(np.setdiff1d(opens, lacking), late))
    write_csv(tmp_path / "equity" / "AAPL-1h.csv", invented(in_file))
    with replay(database, tmp_path) as context:
        report = sync(context, series, window, ["polygon"])
    assert queries.read_candles(database, series, window).equals(invented(np.setdiff1d(opens, lacking)))
    gaps = queries.ledger_gaps(database, series, window)
    assert [(gap.start, gap.missing) for gap in gaps] == [(lacking[0], 1), (lacking[1], 2)]
    # Polygon omits half hours without trades, but a stock that trades in all the others has none.
    assert {gap.status for gap in gaps} == {GapStatus.UNAVAILABLE}
    assert (report.expected, report.stored, report.no_trade, report.missing) == (32, 29, 0, 3)


@pytest.mark.parametrize("provider", ["yfinance", "alphavantage"])
def test_days_of_an_invented_stock_miss_the_candles_missing_in_its_file(
    database: Database, tmp_path: Path, provider: str
) -> None:
    """Across a split 7:1, with a holiday and one absent day."""
    series, window = Series("AAPL", Timeframe.D1, AssetClass.STOCKS), days("2014-05-19", "2014-06-21")
    opens = grid_of(series).opens(window)
    memorial_day = days("2014-05-26", "2014-05-26").start
    assert not (opens == memorial_day).any()
    inside = invented(np.delete(opens, 12))
    write_csv(tmp_path / "equity" / "AAPL-1d.csv", inside)
    with replay(database, tmp_path, [Split("AAPL", date(2014, 6, 9), 7)]) as context:
        report = sync(context, series, window, [provider])
    assert queries.read_candles(database, series, window).equals(inside)
    assert not report.complete
    (gap,) = queries.ledger_gaps(database, series, window)
    assert (gap.start, gap.missing, report.missing) == (opens[12], 1, 1)
    assert [(item.provider, item.outcome) for item in gap.evidence] == [(provider, "absent")]


def test_euro_hours_are_the_files_rows_and_its_holes_are_explained(
    database: Database, shared_data: SharedData
) -> None:
    file = shared_data("forex/EURUSD-1h.csv.gz")
    series, window = Series("EUR/USD", Timeframe.H1, AssetClass.FOREX), days("2016-01-01", "2018-01-01")
    with replay(database, file.parents[1]) as context:
        report = sync(context, series, window, ["oanda"])
    assert (report.failed_batches, report.errors) == (0, ())
    stored = queries.read_candles(database, series, window)
    rows = rows_of(file, window)
    assert np.array_equal(stored.ts, rows.ts)
    for name in PRICES:
        assert np.array_equal(getattr(stored, name), getattr(rows, name))
    assert np.isnan(stored.volume).all()
    gaps = queries.ledger_gaps(database, series, window)
    assert {gap.status for gap in gaps} <= {GapStatus.NO_TRADE, GapStatus.UNAVAILABLE, GapStatus.TOLERATED}
    assert sum(gap.missing for gap in gaps) == report.expected - len(stored)
    hole = days("2016-12-12", "2016-12-12").start  # the provider had nothing for a week
    assert any(gap.start <= hole < gap.end and gap.missing > 24 for gap in gaps)
    # Its holidays are no-trade by one provider alone; the absent week and night are missing.
    assert (report.no_trade, report.missing) == (100, 140)
    counted = {state: sum(gap.missing for gap in gaps if gap.status is state) for state in GapStatus}
    assert (counted[GapStatus.NO_TRADE], counted[GapStatus.UNAVAILABLE]) == (100, 140)
