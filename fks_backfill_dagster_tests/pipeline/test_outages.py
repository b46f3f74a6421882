"""An outage of a whole venue, from the market to its report."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe, iso
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.pipeline.outages import Outage, find_outages
from fks_backfill_dagster.pipeline.sync import sync
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.pipeline.test_real_candles import days, replay
from fks_backfill_dagster_tests.store.builders import execute

FRAMES = (Timeframe.M15, Timeframe.H1)
SERIES = [
    Series(f"{name}/USDT", frame, AssetClass.CRYPTO) for name in ("BTC", "ETH", "SOL") for frame in FRAMES
]
SYNCED = TimeRange(instant("2024-01-01"), instant("2024-02-01"))
DOWN = TimeRange(instant("2024-01-10T10:45"), instant("2024-01-10T17:15"))


@pytest.fixture
def synced(context: Context, market: LocalMarket) -> Context:
    """January of three symbols; the exchange was down in DOWN, and ETH misses two more hours."""
    market.plant_halt(DOWN, provider="binance")
    market.plant_outage("binance", TimeRange(instant("2024-01-20"), instant("2024-01-20T02:00")), "ETHUSDT")
    for series in SERIES:
        sync(context, series, SYNCED, ["binance"])
    return context


def test_an_outage_is_reported_once(synced: Context) -> None:
    (outage,) = find_outages(synced.database, SERIES, SYNCED)
    assert outage == Outage(
        venue="crypto",
        window=DOWN,
        symbols=("BTC/USDT", "ETH/USDT", "SOL/USDT"),
        synced=3,
        missing=3 * (26 + 6),  # quarters of an hour, and hours without any of them
        statuses=(GapStatus.UNAVAILABLE,),
        providers=("binance",),
    )


def test_an_outage_is_cut_to_the_window(synced: Context) -> None:
    window = TimeRange(instant("2024-01-10T12:00"), instant("2024-01-10T13:00"))
    (outage,) = find_outages(synced.database, SERIES, window)
    assert (outage.window, outage.missing) == (window, 3 * (4 + 1))
    assert (
        find_outages(synced.database, SERIES, TimeRange(instant("2024-01-11"), instant("2024-02-01"))) == ()
    )


def test_history_that_was_never_synced_is_no_outage(database: Database) -> None:
    assert find_outages(database, SERIES, SYNCED) == ()


def test_no_candle_is_missing_after_the_end_of_a_symbol(synced: Context) -> None:
    ends = {series: DOWN.start for series in SERIES if series.symbol == "SOL/USDT"}
    assert find_outages(synced.database, SERIES, SYNCED, ends.get) == ()
    ends = {series: instant("2024-01-10T12:00") for series in ends}
    (outage,) = find_outages(synced.database, SERIES, SYNCED, ends.get)
    assert outage.window == TimeRange(DOWN.start, instant("2024-01-10T12:00"))
    assert outage.missing == 3 * (5 + 1)


def test_a_no_trade_interval_is_no_outage(synced: Context) -> None:
    execute(synced.database, "UPDATE fks.gap SET status = 'no_trade'")
    assert find_outages(synced.database, SERIES, SYNCED) == ()


def test_the_outages_of_binance(
    database: Database, shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    """The real hours that its BTC/USDT misses, and two symbols that miss the same, as in reality."""
    file = shared_data("binance/BTCUSDT-1h.csv.gz")
    (tmp_path / "binance").mkdir()
    for name in ("BTC", "ETH", "SOL"):
        (tmp_path / "binance" / f"{name}USDT-1h.csv.gz").write_bytes(file.read_bytes())
    hourly = [series for series in SERIES if series.timeframe is Timeframe.H1]
    window = days("2020-11-17", "2021-05-16")
    with replay(database, tmp_path) as context:
        for series in hourly:
            sync(context, series, window, ["binance"])
    found = find_outages(database, hourly, window)
    assert [(iso(o.window.start)[:13], o.missing // 3, len(o.symbols), o.synced) for o in found] == [
        ("2020-11-30T06", 1, 3, 3),
        ("2020-12-21T15", 3, 3, 3),
        ("2020-12-25T02", 1, 3, 3),
        ("2021-02-11T04", 1, 3, 3),
        ("2021-03-06T02", 1, 3, 3),
        ("2021-04-20T02", 2, 3, 3),
        ("2021-04-25T05", 3, 3, 3),
    ]


def test_a_ledger_of_a_hundred_thousand_gaps_is_read_in_seconds(database: Database) -> None:
    """4,000 series with 25 gaps each, one of them common to all."""
    series = [Series(f"S{n}/USDT", frame, AssetClass.CRYPTO) for n in range(500) for frame in Timeframe]
    rows = ", ".join(f"('{one.symbol}', '{one.timeframe}', 'crypto', 'XNYS')" for one in series)
    execute(
        database,
        f"INSERT INTO fks.series (symbol, timeframe, asset_class, calendar) VALUES {rows}",
        "INSERT INTO fks.sync_state (series_id, synced)"
        " SELECT id, '{[2020-01-01Z, 2021-01-01Z)}' FROM fks.series",
        "INSERT INTO fks.gap (series_id, gap_start, gap_end, missing_candles, status, attempts, evidence)"
        " SELECT id, t, t + interval '1 hour', 1, 'unavailable', 1, '[{\"provider\": \"binance\"}]'"
        " FROM fks.series, generate_series(0, 24) n, LATERAL (SELECT timestamptz '2020-01-01Z'"
        "   + n * interval '14 days' + CASE WHEN n = 7 THEN 0 ELSE mod(id, 300) END * interval '1 hour') AS at(t)",
        "ANALYZE fks.gap",
    )
    begun = time.perf_counter()
    found = find_outages(database, series, TimeRange(instant("2020-01-01"), instant("2021-01-01")))
    seconds = time.perf_counter() - begun
    assert [(iso(o.window.start)[:10], len(o.symbols), o.providers) for o in found] == [
        ("2020-04-08", 500, ("binance",))
    ]
    assert seconds < 8  # 0.7 s on a busy machine
