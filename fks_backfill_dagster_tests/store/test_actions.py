"""Corporate actions in the database: the rows, whose report is used, and candles adjusted by splits.

The reference adjusts candle by candle, from the definitions in docs/how-it-works.md; it shares no code with the SQL.
"""

from __future__ import annotations

import math
import uuid
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from fks_backfill_dagster import read_candles
from fks_backfill_dagster.domain.actions import FILE, ReportedActions, disputes, split_of
from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe, to_datetime
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.actions import stored_actions
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import StoreError
from fks_backfill_dagster.store.writer.actions import WrittenActions, write_actions
from fks_backfill_dagster_tests.domain.builders import at, read_csv, window
from fks_backfill_dagster_tests.examples import examples
from fks_backfill_dagster_tests.store.builders import MIDNIGHT, Shelf, brought, execute, fetch

SHARED = Path(__file__).resolve().parents[2] / "../shared"
# Summer time begins in it, on 2024-03-10; 2024-01-15 and 2024-02-19 are Mondays without a session.
QUARTER = window("2024-01-01T00:00Z", "2024-04-01T00:00Z")
NEW_YORK = ZoneInfo("America/New_York")
PRIORITY = ("polygon", "yfinance")


def stock(timeframe: str, symbol: str = "", calendar: str = "XNYS") -> Series:
    name = symbol or f"S{uuid.uuid4().hex[:10].upper()}"
    return Series(name, Timeframe(timeframe), AssetClass.STOCKS, calendar)


def prices(opens: np.ndarray, seed: int = 1) -> Candles:
    random = np.random.default_rng(seed)
    low = random.integers(100, 900, len(opens)).astype(np.float64)
    volume = random.integers(1, 10_000, len(opens)).astype(np.float64)
    volume[random.random(len(opens)) < 0.05] = np.nan
    ups = random.random((2, len(opens))) * 50
    return Candles(opens, low + ups[0], low + 60, low, low + ups[1], volume)


def filled(database: Database, series: Series, candles: Candles | None = None) -> Shelf:
    shelf = Shelf.of(database, series)
    mine = prices(grid_of(series).opens(QUARTER)) if candles is None else candles
    shelf.commit(QUARTER, brought(mine, "polygon"))
    return shelf


def weeks_of(days: Candles, series: Series) -> Candles:
    """The weeks that these days make."""
    opens = grid_of(series).opens(QUARTER)
    first = np.searchsorted(days.ts, opens)
    return Candles(
        opens,
        days.open[first],
        np.maximum.reduceat(days.high, first),
        np.minimum.reduceat(days.low, first),
        days.close[np.append(first[1:], len(days)) - 1],
        np.add.reduceat(days.volume, first),
    )


def report(
    database: Database,
    series: Series,
    *splits: tuple[str, float],
    provider: str = "polygon",
    priority: Sequence[str] = PRIORITY,
    fetched_at: int = MIDNIGHT,
) -> WrittenActions:
    actions = tuple(split_of(series.symbol, day, ratio) for day, ratio in splits)
    with database.begin() as connection:
        return write_actions(
            connection, series.instrument, ReportedActions(provider, fetched_at, actions), priority
        )


def adjusted(
    database: Database, series: Series, start: str = "2000-01-01Z", mode: str = "splits"
) -> list[Any]:
    return fetch(
        database,
        "SELECT * FROM fks.ohlcv_adjusted(:symbol, :timeframe, CAST(:first AS timestamptz), '2030-01-01Z', :mode)",
        symbol=series.symbol,
        timeframe=series.timeframe.value,
        first=start,
        mode=mode,
    )


# --- rows


def test_writing_twice_changes_nothing(shared: Database) -> None:
    series = stock("1d")
    assert report(shared, series, ("2024-02-05", 4), ("2014-06-09", 7)) == WrittenActions(2, 0)
    before = fetch(
        shared, "SELECT a::text, xmin::text FROM fks.action a WHERE symbol = :symbol", symbol=series.symbol
    )
    assert report(
        shared, series, ("2024-02-05", 4), ("2014-06-09", 7), fetched_at=MIDNIGHT + 1
    ) == WrittenActions(0, 0)
    assert (
        fetch(
            shared,
            "SELECT a::text, xmin::text FROM fks.action a WHERE symbol = :symbol",
            symbol=series.symbol,
        )
        == before
    )
    assert report(shared, series, ("2024-02-05", 5), fetched_at=MIDNIGHT + 1) == WrittenActions(0, 1)
    first, second = stored_actions(shared, [series.symbol])
    assert (first.action.ratio, second.action.ratio) == (7, 5)
    assert (first.fetched_at, second.fetched_at) == (to_datetime(MIDNIGHT), to_datetime(MIDNIGHT + 1))


def test_a_date_begins_at_midnight_of_the_exchange(shared: Database) -> None:
    tokyo = stock("1d", calendar="XTKS")
    report(shared, tokyo, ("2024-02-05", 2))
    (found,) = stored_actions(shared, [tokyo.symbol])
    assert found.begins_at == datetime(2024, 2, 4, 15, tzinfo=UTC)


def test_every_provider_keeps_its_row_and_one_is_used(shared: Database) -> None:
    series = stock("1d")
    report(shared, series, ("2024-02-05", 4), provider="yfinance")
    report(shared, series, ("2024-02-06", 4.1), provider="polygon")
    report(shared, series, ("2020-02-06", 2), provider="yfinance")
    found = stored_actions(shared, [series.symbol])
    assert [(one.provider, one.action.ratio, one.used) for one in found] == [
        ("yfinance", 2, True),
        ("yfinance", 4, False),
        ("polygon", 4.1, True),
    ]
    (dispute,) = disputes(found)
    assert dispute == (
        f"{series.symbol}: yfinance reports a split of 4:1 on 2024-02-05, polygon a split of 4.1:1 on 2024-02-06,"
        " which is used; import the correct one from a file to decide"
    )
    report(shared, series, ("2024-02-05", 4), provider=FILE)
    found = stored_actions(shared, [series.symbol])
    assert [one.provider for one in found if one.used] == ["yfinance", FILE]
    assert disputes(found) == ()


def test_another_priority_holds_for_the_rows_that_are_stored(shared: Database) -> None:
    series = stock("1d")
    report(shared, series, ("2024-02-05", 4), provider="yfinance")
    report(shared, series, ("2024-02-05", 5), provider="polygon")
    assert [one.provider for one in stored_actions(shared, [series.symbol]) if one.used] == ["polygon"]
    report(shared, series, ("2024-02-05", 4), provider="yfinance", priority=("yfinance", "polygon"))
    assert [one.provider for one in stored_actions(shared, [series.symbol]) if one.used] == ["yfinance"]


def test_a_split_of_the_future_is_listed_and_not_used(shared: Database) -> None:
    series = stock("1d")
    report(shared, series, ("2090-02-06", 4))
    (found,) = stored_actions(shared, [series.symbol])
    assert not found.used
    assert disputes([found]) == ()


@pytest.mark.parametrize("ratio", ["0", "-1", "'NaN'", "'Infinity'", "NULL"])
def test_the_database_refuses_an_impossible_ratio(shared: Database, ratio: str) -> None:
    with pytest.raises((sa.exc.IntegrityError, StoreError), match="action_values"):
        execute(
            shared,
            "INSERT INTO fks.action VALUES"
            f" ('X', 'split', '2024-01-01', 'polygon', {ratio}, NULL, NULL, now(), now(), 1)",
        )


def test_actions_of_another_symbol_are_a_mistake_of_the_caller(shared: Database) -> None:
    reported = ReportedActions("polygon", MIDNIGHT, (split_of("OTHER", "2024-02-05", 4),))
    with shared.begin() as connection, pytest.raises(ValueError, match="of another symbol than S"):
        write_actions(connection, stock("1d").instrument, reported, PRIORITY)


# --- adjusted candles


@dataclass(frozen=True)
class Reported:
    provider: str
    day: date
    ratio: float


def reference_used(rows: list[Reported]) -> list[Reported]:
    """By the rule of the documents: of reports a week apart at most, those of the first provider."""
    order = [FILE, *PRIORITY]
    groups: list[list[Reported]] = []
    for row in sorted(rows, key=lambda one: one.day):
        if groups and (row.day - groups[-1][-1].day).days <= 7:
            groups[-1].append(row)
        else:
            groups.append([row])
    chosen = []
    for group in groups:
        first = min((one.provider for one in group), key=order.index)
        chosen += [one for one in group if one.provider == first]
    return chosen


def reference_factor(day: date, splits: list[Reported]) -> float:
    factor = 1.0
    for split in sorted(splits, key=lambda one: one.day, reverse=True):
        if day < split.day:
            factor *= split.ratio
    return factor


def reference(
    series: Series, candles: Candles, days: Candles, splits: list[Reported]
) -> list[tuple[Any, ...]]:
    """One candle after the other. Days make the weeks, so a week is always known."""
    daily = [
        (
            to_datetime(ts).date(),
            *(value / reference_factor(to_datetime(ts).date(), splits) for value in ohlc),
            volume * reference_factor(to_datetime(ts).date(), splits),
        )
        for ts, *ohlc, volume in zip(*(c.tolist() for c in days.columns()), strict=True)
    ]
    by_week = defaultdict(list)
    for row in daily:
        by_week[row[0] - timedelta(days=row[0].weekday())].append(row)
    found = []
    for ts, *ohlc, volume in zip(*(c.tolist() for c in candles.columns()), strict=True):
        moment = to_datetime(ts)
        day = moment.astimezone(NEW_YORK).date() if series.timeframe.is_intraday else moment.date()
        is_week = series.timeframe is Timeframe.W1
        if is_week and any(day < split.day <= day + timedelta(days=6) for split in splits):
            rows = by_week[day]
            values = [rows[0][1], max(r[2] for r in rows), min(r[3] for r in rows), rows[-1][4]]
            found.append((ts, *values, math.fsum(r[5] for r in rows)))
            continue
        factor = reference_factor(day, splits)
        found.append((ts, *(value / factor for value in ohlc), volume * factor))
    return found


@dataclass(frozen=True)
class Stored:
    """One stock with the same quarter at three timeframes."""

    symbol: str
    hours: Shelf
    days: Shelf
    weeks: Shelf


@pytest.fixture(scope="module")
def quarter(shared: Database) -> Stored:
    days = stock("1d")
    daily = prices(grid_of(days).opens(QUARTER))
    weekly = stock("1w", days.symbol)
    return Stored(
        days.symbol,
        filled(shared, stock("1h", days.symbol)),
        filled(shared, days, daily),
        filled(shared, weekly, weeks_of(daily, weekly)),
    )


_DAYS = st.dates(date(2023, 12, 20), date(2024, 4, 10))
_RATIOS = st.sampled_from([2.0, 4.0, 7.0, 1.5, 0.1, 1 / 3, 20.0, 1.0, 101 / 28])
_REPORTS = st.builds(Reported, st.sampled_from([FILE, *PRIORITY]), _DAYS, _RATIOS)


@given(rows=st.lists(_REPORTS, max_size=6, unique_by=lambda one: (one.provider, one.day)))
@settings(max_examples=examples(60), deadline=None)
def test_random_splits(shared: Database, quarter: Stored, rows: list[Reported]) -> None:
    """The SQL function, the Python API's read and the reference agree for every timeframe."""
    execute(shared, f"DELETE FROM fks.action WHERE symbol = '{quarter.symbol}'")
    for provider in (FILE, *PRIORITY):
        mine = [(str(one.day), one.ratio) for one in rows if one.provider == provider]
        report(shared, quarter.days.series, *mine, provider=provider)
    used = reference_used(rows)
    days = quarter.days.read()
    for shelf in (quarter.hours, quarter.days, quarter.weeks):
        expected = reference(shelf.series, shelf.read(), days, used)
        from_sql = adjusted(shared, shelf.series)
        assert [row[0] for row in from_sql] == [to_datetime(row[0]) for row in expected]
        assert {row[6] for row in from_sql} == {"polygon"}
        read = queries.read_adjusted(shared, shelf.series, QUARTER)
        for column in range(1, 6):
            wanted = [row[column] for row in expected]
            given_sql = [math.nan if row[column] is None else row[column] for row in from_sql]
            # A week's volume is a sum, whose last digit depends on its order.
            assert given_sql == pytest.approx(wanted, rel=1e-12 if column == 5 else 0, abs=0, nan_ok=True)
            assert np.array_equal(read.columns()[column], given_sql, equal_nan=True)


def test_the_real_splits_of_apple(shared: Database) -> None:
    """28 shares of before 2014 and 4 of before 2020 are one of today; a missing volume stays missing."""
    series = stock("1d")
    opens = np.array(
        [at(f"{day}T00:00Z") for day in ("2014-06-06", "2014-06-09", "2020-08-28", "2020-08-31")]
    )
    closes = np.array([645.57, 93.70, 499.23, 129.04])
    volume = np.array([12_497_800.0, np.nan, 46_907_479.0, 223_505_733.0])
    whole = window("2014-06-01T00:00Z", "2020-09-01T00:00Z")
    Shelf.of(shared, series).commit(whole, brought(Candles(opens, closes, closes, closes, closes, volume)))
    report(shared, series, ("2014-06-09", 7), ("2020-08-31", 4))
    rows = adjusted(shared, series)
    assert [row[4] for row in rows] == [645.57 / 28, 93.70 / 4, 499.23 / 4, 129.04]
    assert [row[5] for row in rows] == [12_497_800 * 28, None, 46_907_479 * 4, 223_505_733]


def test_all_splits_of_apple_against_recorded_factors(shared: Database) -> None:
    """23 years of real days; the reference is the split factor that another data provider publishes for each date."""
    factors = SHARED / "wire/recordings/corporate-actions/lean-factor_files-aapl.csv"
    if not factors.exists():
        pytest.skip("real candles are not here")
    traded = read_csv(SHARED / "data/equity/AAPL-1d.csv.gz")
    series = stock("1d")
    sessions = grid_of(series).opens(window("1998-01-01T00:00Z", "2021-04-01T00:00Z"))
    candles = traded.take(np.isin(traded.ts, sessions))
    shelf = Shelf.of(shared, series)
    shelf.commit(window("1998-01-01T00:00Z", "2021-04-01T00:00Z"), brought(candles))
    rows = [line.split(",") for line in factors.read_text().splitlines()]
    last_days = np.array([at(f"{row[0][:4]}-{row[0][4:6]}-{row[0][6:]}T00:00Z") for row in rows])
    by_row = np.array([float(row[2]) for row in rows])
    # A row holds up to its date: the split begins in the session after it.
    changes = np.flatnonzero(by_row[1:] != by_row[:-1])
    found = [
        (
            str(to_datetime(int(sessions[sessions > last_days[row]][0])).date()),
            round(by_row[row + 1] / by_row[row]),
        )
        for row in changes
    ]
    assert found == [("2000-06-21", 2), ("2005-02-28", 2), ("2014-06-09", 7), ("2020-08-31", 4)]
    report(shared, series, *found)
    whole = queries.read_adjusted(shared, series, window("1998-01-01T00:00Z", "2021-04-01T00:00Z"))
    reference_factors = by_row[np.searchsorted(last_days, candles.ts)]
    assert len(whole) > 5_800
    assert whole.close == pytest.approx(candles.close * reference_factors, rel=1e-5)
    assert whole.volume == pytest.approx(candles.volume / reference_factors, rel=1e-5)
    assert np.abs(np.diff(np.log(whole.close))).max() < 0.8 < np.abs(np.diff(np.log(candles.close))).max()


def test_an_evening_in_utc_belongs_to_the_session(shared: Database) -> None:
    """In Tokyo the session of a date begins in the evening before, by UTC only."""
    series = stock("1h", calendar="XTKS")
    shelf = filled(shared, series)
    report(shared, series, ("2024-02-06", 2))
    rows = {row[0]: row for row in adjusted(shared, series)}
    raw = {
        to_datetime(ts): close for ts, close in zip(shelf.read().ts.tolist(), shelf.read().close, strict=True)
    }
    before, after = datetime(2024, 2, 5, 5, tzinfo=UTC), datetime(2024, 2, 6, 0, tzinfo=UTC)
    assert rows[before][4] == raw[before] / 2
    assert rows[after][4] == raw[after]


def test_a_week_without_its_days_is_unknown_and_still_there(shared: Database) -> None:
    weekly = stock("1w")
    days = stock("1d", weekly.symbol)
    shelf = filled(shared, weekly)
    report(shared, weekly, ("2024-02-07", 2))
    rows = {row[0].date(): row[1:6] for row in adjusted(shared, weekly)}
    assert len(rows) == len(shelf.read())
    assert rows[date(2024, 2, 5)] == (None,) * 5
    assert all(None not in row[:4] for day, row in rows.items() if day != date(2024, 2, 5))
    # Other days than those of the week make no week either.
    filled(shared, days)
    assert {row[0].date(): row[1:6] for row in adjusted(shared, weekly)}[date(2024, 2, 5)] == (None,) * 5
    at_monday = at("2024-02-05T00:00Z")
    read = queries.read_adjusted(shared, weekly, QUARTER)
    assert np.isnan(read.close[read.ts == at_monday]).all()
    assert not np.isnan(read.close[read.ts != at_monday]).any()


def test_two_splits_in_one_week_count_its_days_once(shared: Database, quarter: Stored) -> None:
    """Found by the test of random splits: the volume of the week was doubled."""
    weekly = quarter.weeks.series
    execute(shared, f"DELETE FROM fks.action WHERE symbol = '{quarter.symbol}'")
    report(shared, weekly, ("2024-01-10", 1.0), ("2024-01-11", 1.0))
    raw, found = quarter.weeks.read(), queries.read_adjusted(shared, weekly, QUARTER)
    assert found.volume == pytest.approx(raw.volume, nan_ok=True)


def test_a_split_on_monday_mixes_no_week(shared: Database) -> None:
    weekly = stock("1w")
    shelf = filled(shared, weekly)
    report(shared, weekly, ("2024-02-05", 2))
    raw, found = shelf.read(), queries.read_adjusted(shared, weekly, QUARTER)
    factors = np.where(raw.ts < at("2024-02-05T00:00Z"), 2.0, 1.0)
    assert found.close.tolist() == (raw.close / factors).tolist()


def test_series_without_splits_and_unknown_ones(shared: Database) -> None:
    shelf = filled(shared, stock("1d"))
    assert queries.read_adjusted(shared, shelf.series, QUARTER).equals(shelf.read())
    assert adjusted(shared, stock("1d")) == []
    assert adjusted(shared, shelf.series, start="2024-03-31Z") == []


@pytest.mark.parametrize(
    ("mode", "timeframe", "message"),
    [
        ("all", "1d", "has no mode all yet: dividends are not stored; use the mode splits"),
        ("split", "1d", "has no mode 'split': use splits"),
        (None, "1d", "has no mode NULL: use splits"),
        ("splits", "1D", "has no timeframe '1D': use one of 1m"),
        ("splits", None, "has no timeframe NULL: use one of 1m"),
    ],
)
def test_another_mode_or_timeframe_is_refused(
    shared: Database, mode: str | None, timeframe: str | None, message: str
) -> None:
    query = (
        "SELECT * FROM fks.ohlcv_adjusted("
        "'A', CAST(:frame AS text), '2024-01-01Z', '2024-02-01Z', CAST(:mode AS text))"
    )
    with pytest.raises(Exception, match=message), shared.begin() as connection:
        connection.execute(sa.text(query), {"mode": mode, "frame": timeframe})


def scans_of(connection: sa.Connection) -> dict[str, int]:
    """The scans of each candle table by this session, which counts them before it reports them."""
    query = "SELECT relname, seq_scan + idx_scan AS scans FROM pg_stat_xact_user_tables WHERE relname LIKE 'candles%'"
    return {row.relname: row.scans for row in connection.execute(sa.text(query))}


def test_only_the_table_of_the_timeframe_is_read(shared: Database, quarter: Stored) -> None:
    """In one pass: every candle table but one, and that one once."""
    report(shared, quarter.days.series, ("2024-02-05", 4), ("2024-03-05", 4))
    query = "SELECT count(*) FROM fks.ohlcv_adjusted(:symbol, '1h', '2024-01-01Z', '2024-04-01Z', 'splits')"
    with shared.begin() as connection:
        before = scans_of(connection)
        assert connection.scalar(sa.text(query), {"symbol": quarter.symbol}) == len(quarter.hours.read())
        after = scans_of(connection)
    scans = {name: after[name] - before.get(name, 0) for name in after}
    if "candles_1h" in scans:  # chunks of a hypertable have other names
        assert {name: count for name, count in scans.items() if count} == {"candles_1h": 1}


def test_the_python_api(
    database: Database, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FKS_CONFIG", str(tmp_path / "backfill.yaml"))
    (tmp_path / "backfill.yaml").write_text("batch_size_days: 30\n")
    shelf = filled(database, stock("1d"))
    report(database, shelf.series, ("2024-02-05", 4))
    symbol, ever = shelf.series.symbol, QUARTER
    frame = read_candles(symbol, "1d", adjust="splits", url=database_url)
    direct = queries.read_adjusted(database, shelf.series, ever)
    assert np.array_equal(frame.to_numpy(), np.stack(direct.columns()[1:], axis=1), equal_nan=True)
    traded = read_candles(symbol, "1d", url=database_url)
    assert (frame["close"] == traded["close"] / np.where(frame.index < "2024-02-05", 4, 1)).all()
    for adjust, as_of, message in (
        ("all", None, "needs dividends"),
        ("split", None, "adjust='split' is unknown: use adjust='splits'"),
        ("splits", "2024-01-01", "adjust and as_of exclude each other"),
    ):
        with pytest.raises(ValueError, match=message):
            read_candles(symbol, "1d", adjust=adjust, as_of=as_of, url=database_url)
