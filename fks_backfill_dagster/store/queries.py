"""Read queries: candles, status, gaps, lineage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.delivery import Transport
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, Timeframe, to_datetime, to_micros
from fks_backfill_dagster.ledger.records import Known, LedgerGap
from fks_backfill_dagster.store import copy_format, schema
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.driver import cursor_of
from fks_backfill_dagster.store.errors import repeated
from fks_backfill_dagster.store.ledger import known, series_id
from fks_backfill_dagster.store.sql import as_series, micros, named, table_of

_COLUMNS = "ts, open, high, low, close, coalesce(volume, 'NaN')"

# Adjusted prices can be unknown too.
_ADJUSTED = (
    "SELECT ts, coalesce(open, 'NaN'), coalesce(high, 'NaN'), coalesce(low, 'NaN'), coalesce(close, 'NaN'),"
    " coalesce(volume, 'NaN') FROM fks.ohlcv_adjusted(%(symbol)s, %(timeframe)s, %(start)s, %(end)s, 'splits')"
    " ORDER BY ts"
)

# COPY of a hypertable returns no rows; COPY of a query does.
_STORED = (
    "SELECT {columns} FROM {table} WHERE series_id = %(id)s AND ts >= %(start)s AND ts < %(end)s ORDER BY ts"
)

# About one month of 1m candles: the number of rows held in memory at a time.
_ROWS_AT_ONCE = 45_000


@dataclass(frozen=True, slots=True)
class SyncStatus:
    """The sync state of one series, as in the view fks.sync_status."""

    symbol: str
    timeframe: str
    status: str
    oldest_data_time: datetime | None
    newest_data_time: datetime | None
    total_candles: int
    last_sync_time: datetime | None
    error_message: str | None
    open_gaps: int


@dataclass(frozen=True, slots=True)
class BatchInfo:
    """One row of lineage. `host` is empty and `instrument` None for batches from before they were recorded."""

    id: int
    symbol: str
    timeframe: str
    provider: str
    transport: str
    source: str
    sha256: str | None
    range_start: datetime
    range_end: datetime
    run_id: str | None
    fetched_at: datetime
    committed_at: datetime
    inserted: int
    updated: int
    undoes: int | None
    host: str
    instrument: str | None
    published_at: datetime | None
    author: str | None
    reason: str | None
    undone_by: int | None

    @property
    def kind(self) -> str:
        """What the batch did: `delivery`, `correction`, `withdrawal` or `undo`."""
        kinds = (Transport.CORRECTION.value, schema.WITHDRAWAL, schema.UNDO)
        return self.transport if self.transport in kinds else "delivery"


@dataclass(frozen=True, slots=True)
class Origin:
    """The number of a window's candles that a provider delivered by a transport."""

    provider: str
    transport: str
    candles: int


@dataclass(frozen=True, slots=True, eq=False)
class StoredOrigins:
    """The origin of each stored candle of a window: columns of one length, ascending by `ts`.

    `provider`: str. `instrument`: str, or None where the lineage does not name it. `as_of`: the instant of
    its values, in microseconds: when its archive was published, else when it was requested.
    """

    ts: Instants
    provider: NDArray[np.object_]
    instrument: NDArray[np.object_]
    as_of: Instants

    def __len__(self) -> int:
        return len(self.ts)


@repeated
def read_candles(
    database: Database, series: Series, window: TimeRange, as_of: datetime | None = None
) -> Candles:
    """The stored candles that open in `window`, ascending; with `as_of`, those stored at that moment.

    Raises StoreError for an `as_of` in the future and for any `as_of` on a standby, ValueError for one without a zone.
    """
    return Candles.concat(list(_blocks(database, series, [window], as_of)))


@repeated
def read_adjusted(database: Database, series: Series, window: TimeRange) -> Candles:
    """As `read_candles`, adjusted by splits; prices that cannot be adjusted are NaN. See fks.ohlcv_adjusted."""
    named_window = {"start": to_datetime(window.start), "end": to_datetime(window.end)}
    with (
        database.begin() as connection,
        cursor_of(connection) as cursor,
        cursor.copy(f"COPY ({_ADJUSTED}) TO STDOUT (FORMAT BINARY)", named(series) | named_window) as copy,
    ):
        return copy_format.decode(copy)


@repeated
def read_opens(database: Database, series: Series, opens: Instants) -> Candles:
    """The stored candles at a few opens, ascending."""
    windows = [TimeRange(ts, ts + 1) for ts in opens.tolist()]
    return Candles.concat(list(_blocks(database, series, windows, None))) if windows else Candles.empty()


@repeated
def pinned_opens(database: Database, series: Series, window: TimeRange) -> Instants:
    """The opens of the pinned candles in `window`, ascending: those that a person corrected."""
    query = (
        f"SELECT {micros('p.ts')} FROM fks.pin p JOIN fks.series s ON s.id = p.series_id"
        f" JOIN {table_of(series.timeframe)} c"
        "   ON c.series_id = p.series_id AND c.ts = p.ts AND c.batch_id = p.batch_id"
        " WHERE s.symbol = :symbol AND s.timeframe = :timeframe AND p.released_at IS NULL"
        "   AND p.ts >= :start AND p.ts < :end ORDER BY 1"
    )
    named_window = {"start": to_datetime(window.start), "end": to_datetime(window.end)}
    with database.begin() as connection:
        return np.array(
            connection.scalars(sa.text(query), named(series) | named_window).all(), dtype=np.int64
        )


def iterate_candles(
    database: Database, series: Series, window: TimeRange, as_of: datetime | None = None
) -> Iterator[Candles]:
    """Like `read_candles`, in ascending blocks of bounded size."""
    yield from _blocks(database, series, parts_of(series, window), as_of)


def parts_of(series: Series, window: TimeRange) -> list[TimeRange]:
    """The window, cut into parts of a bounded number of candles."""
    step = max(_ROWS_AT_ONCE * series.timeframe.micros, MICROS_PER_DAY)
    starts = range(window.start, window.end, step)
    return [TimeRange(start, min(start + step, window.end)) for start in starts]


def _blocks(
    database: Database, series: Series, windows: Sequence[TimeRange], as_of: datetime | None
) -> Iterator[Candles]:
    moment = None if as_of is None else to_datetime(to_micros(as_of))
    with database.begin() as connection:
        identity = series_id(connection, series)
        if identity is None:
            return
        if as_of is None:
            query = _STORED.format(columns=_COLUMNS, table=table_of(series.timeframe))
        else:
            query = (
                f"SELECT {_COLUMNS} FROM fks.ohlcv_as_of"
                "(%(symbol)s, %(timeframe)s, %(start)s, %(end)s, %(as_of)s) ORDER BY ts"
            )
        for window in windows:
            parameters = {
                "id": identity,
                **named(series),
                "start": to_datetime(window.start),
                "end": to_datetime(window.end),
                "as_of": moment,
            }
            block = _copied(connection, query, parameters)
            if len(block):
                yield block


def _copied(connection: sa.Connection, query: str, parameters: dict[str, Any]) -> Candles:
    with (
        cursor_of(connection) as cursor,
        cursor.copy(f"COPY ({query}) TO STDOUT (FORMAT BINARY)", parameters) as copy,
    ):
        return copy_format.decode(copy)


def candles_within(connection: sa.Connection, series: Series, identity: int, window: TimeRange) -> Candles:
    """As `read_candles`, in the caller's transaction."""
    query = _STORED.format(columns=_COLUMNS, table=table_of(series.timeframe))
    start, end = to_datetime(window.start), to_datetime(window.end)
    return _copied(connection, query, {"id": identity, "start": start, "end": end})


@repeated
def sync_status(database: Database, series: Series | None = None) -> list[SyncStatus]:
    """The status of one series, or of all: by symbol, then by timeframe, shortest first."""
    where = " WHERE symbol = :symbol AND timeframe = :timeframe" if series else ""
    parameters = named(series) if series else {}
    with database.begin() as connection:
        rows = connection.execute(sa.text(f"SELECT * FROM fks.sync_status{where}"), parameters)
        found = [SyncStatus(**row._mapping) for row in rows]
    order = [t.value for t in Timeframe]
    return sorted(found, key=lambda s: (s.symbol, order.index(s.timeframe)))


@repeated
def stored_series(database: Database) -> list[Series]:
    """Every series that was ever synced."""
    with database.begin() as connection:
        rows = connection.execute(sa.select(schema.series).order_by("symbol", "id"))
        return [as_series(row) for row in rows]


def ledger_gaps(database: Database, series: Series, window: TimeRange) -> tuple[LedgerGap, ...]:
    """The unfilled gaps that overlap `window`, ascending, not clipped to it."""
    with database.begin() as connection:
        return known(connection, series_id(connection, series), window).gaps


def batches(database: Database, series: Series | None = None, limit: int | None = None) -> list[BatchInfo]:
    """Lineage, newest first."""
    b, s = schema.batch, schema.series
    names = [f for f in BatchInfo.__dataclass_fields__ if f not in ("symbol", "timeframe")]
    query = (
        sa.select(s.c.symbol, s.c.timeframe, *(b.c[name] for name in names))
        .join(s, s.c.id == b.c.series_id)
        .order_by(b.c.id.desc())
        .limit(limit)
    )
    if series is not None:
        query = query.where(s.c.symbol == series.symbol, s.c.timeframe == series.timeframe.value)
    with database.begin() as connection:
        return [BatchInfo(**row._mapping) for row in connection.execute(query)]


def series_of_batch(database: Database, batch_id: int) -> Series | None:
    """The series that a batch belongs to; None where there is no such batch."""
    b, s = schema.batch, schema.series
    query = sa.select(s).join(b, b.c.series_id == s.c.id).where(b.c.id == batch_id)
    with database.begin() as connection:
        row = connection.execute(query).one_or_none()
    return None if row is None else as_series(row)


def origins(database: Database, series: Series, window: TimeRange) -> list[Origin]:
    """The origins of the stored candles of `window`, the largest share first."""
    with database.begin() as connection:
        identity = series_id(connection, series)
        rows = connection.execute(
            sa.text(
                "SELECT b.provider, b.transport, sum(n.candles)::bigint AS candles FROM ("
                f"   SELECT batch_id, count(*) AS candles FROM {table_of(series.timeframe)}"
                "   WHERE series_id = :id AND ts >= :start AND ts < :end GROUP BY batch_id) n"
                " JOIN fks.batch b ON b.id = n.batch_id GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2"
            ),
            {"id": identity, "start": to_datetime(window.start), "end": to_datetime(window.end)},
        )
        return [Origin(row.provider, row.transport, row.candles) for row in rows]


def stored_origins(connection: sa.Connection, series: Series, window: TimeRange) -> StoredOrigins:
    """The origin of every stored candle that opens in `window`, in one query."""
    with cursor_of(connection) as cursor:
        rows = cursor.execute(
            "SELECT b.provider, b.instrument, o.opens,"
            f"   {micros('coalesce(b.published_at, b.fetched_at)')}"
            " FROM (SELECT c.batch_id, array_send(array_agg(c.ts)) AS opens"
            f"   FROM {table_of(series.timeframe)} c JOIN fks.series s ON s.id = c.series_id"
            "   WHERE s.symbol = %(symbol)s AND s.timeframe = %(timeframe)s"
            "     AND c.ts >= %(start)s AND c.ts < %(end)s GROUP BY c.batch_id) o"
            " JOIN fks.batch b ON b.id = o.batch_id",
            {
                **named(series),
                "start": to_datetime(window.start),
                "end": to_datetime(window.end),
            },
            binary=True,
        ).fetchall()
    opens = [copy_format.decode_array(row[2]) for row in rows]
    lengths = [len(one) for one in opens]
    ts = np.concatenate([np.empty(0, dtype=np.int64), *opens])
    order = np.argsort(ts)

    def column(position: int, kind: type) -> NDArray[Any]:
        return np.repeat(np.array([row[position] for row in rows], dtype=kind), lengths)[order]

    return StoredOrigins(ts[order], column(0, object), column(1, object), column(3, np.int64))


@repeated
def what_is_known(database: Database, series: Series, window: TimeRange) -> Known:
    """Coverage (clipped to `window`) and unfilled gaps (not clipped); both empty for a series that was never synced."""
    with database.begin() as connection:
        return known(connection, series_id(connection, series), window)
