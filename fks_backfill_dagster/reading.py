"""Stored candles for programs: `from fks_backfill_dagster import read_candles`.

Belongs here: the one function that notebooks and models call. Does not belong here: fetching; candles that
are not stored are absent from the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from fks_backfill_dagster.app import connect, database_url
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import to_datetime, to_micros
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.store import queries as store
from fks_backfill_dagster.store.database import Database

if TYPE_CHECKING:
    import pandas as pd

    from fks_backfill_dagster.domain.candles import Candles

Moment = str | datetime

# The range that both PostgreSQL's timestamptz and Python's datetime can represent.
_EVER = TimeRange(0, to_micros(datetime(9999, 1, 1, tzinfo=UTC)))


class UnknownSeries(LookupError):
    """The requested series was never synced."""


def read_candles(
    symbol: str,
    timeframe: str,
    start: Moment | None = None,
    end: Moment | None = None,
    as_of: Moment | None = None,
    *,
    adjust: str | None = None,
    url: str | None = None,
) -> pd.DataFrame:
    """The stored candles of a series that open in `[start, end)`, ascending.

    A frame with the float columns open, high, low, close, volume (NaN: the source has none) and a
    DatetimeIndex `ts` in UTC, the candles' opens. Without `start` or `end` there is no bound.
    Moments are datetimes or ISO 8601 text, UTC where no zone is given. With `as_of`: the contents of this
    database at that moment; the same `as_of` always returns the same frame. A standby refuses `as_of`: it
    receives commits later than the primary server, so the frame could change.

    Prices are as traded. With `adjust="splits"` they and the volumes are in today's shares, as from the function
    `fks.ohlcv_adjusted`; it needs no `as_of`, because splits have no history here. The prices of a week that cannot be
    adjusted are NaN.

    `url` is a PostgreSQL URL; without it the settings decide (FKS_DATABASE_URL, else the embedded
    database, which then runs as long as this process).

    >>> read_candles("BTC/USDT", "1h", "2024-01-01", "2024-02-01")["close"].resample("1D").last()

    Raises UnknownSeries (a LookupError) if the series was never synced, ValueError for an invalid moment
    or timeframe, SettingsError, StoreError and EmbeddedError with their remedy.
    """
    settings = load_settings()
    catalog = Catalog(settings)
    catalog.find_series(symbol, timeframe)  # reports invalid arguments before anything is opened
    window = TimeRange(
        _EVER.start if start is None else _micros(start), _EVER.end if end is None else _micros(end)
    )
    moment = None if as_of is None else to_datetime(_micros(as_of))
    _check_adjust(adjust, moment)
    database = Database(url, pool_size=1) if url else connect(settings, database_url(settings), pool_size=1)
    try:
        database.check()
        series = catalog.find_series(symbol, timeframe, _stored(database))
        if adjust is None:
            candles = store.read_candles(database, series, window, moment)
        else:
            candles = store.read_adjusted(database, series, window)
        _check_synced(database, series, candles)
    finally:
        database.dispose()
    return _frame(candles)


def _check_synced(database: Database, series: Series, found: Candles) -> None:
    """Raises UnknownSeries if nothing was found because the series was never synced."""
    if len(found) == 0 and not store.sync_status(database, series):
        raise UnknownSeries(
            f"Nothing is stored of {series} in {database.where}: run"
            f" `fks-backfill backfill {series}`, or see `fks-backfill status` for the stored series."
        )


def _check_adjust(adjust: str | None, as_of: datetime | None) -> None:
    """Raises ValueError for an adjustment that does not exist."""
    if adjust == "all":
        raise ValueError("adjust='all' needs dividends, which are not stored yet: use adjust='splits'")
    if adjust not in (None, "splits"):
        raise ValueError(f"adjust={adjust!r} is unknown: use adjust='splits', or none for prices as traded")
    if adjust is not None and as_of is not None:
        raise ValueError("adjust and as_of exclude each other: the database keeps no history of splits")


def _stored(database: Database) -> Iterator[Series]:
    """The stored series; a generator, so that the query runs only if needed."""
    yield from store.stored_series(database)


def _micros(moment: Moment) -> int:
    parsed = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
    return to_micros(parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC))


def _frame(candles: Candles) -> pd.DataFrame:
    import pandas as pd

    names = ("open", "high", "low", "close", "volume")
    index = pd.DatetimeIndex(candles.ts.view("datetime64[us]"), name="ts").tz_localize("UTC")
    return pd.DataFrame({name: getattr(candles, name) for name in names}, index=index)
