"""The audit against the fastest exact gap search: the opens as one array per series, differences in numpy.

`BENCH_AUDIT_CANDLES` sets the number of candles (5 million); 50 million take 8 GB of disk and ten minutes.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from statistics import median

import numpy as np
import psycopg

from bench.result import Result
from bench.size import Size
from bench.world import World, stopwatch
from fks_backfill_dagster.app import now
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_MINUTE, Timeframe
from fks_backfill_dagster.pipeline.audit import audit
from fks_backfill_dagster.store import ledger
from fks_backfill_dagster.store.copy_format import decode_array
from fks_backfill_dagster.store.database import Database

SERIES = 10

_FIRST = datetime(2015, 1, 1, tzinfo=UTC)

_BATCH = """
INSERT INTO fks.batch (series_id, provider, transport, source, range_start, range_end, fetched_at,
    committed_at, inserted, updated)
SELECT %(id)s, 'binance', 'rest', 'bench', m, m + interval '1 month', now(), now(), 0, 0
FROM generate_series(%(first)s, %(past)s, interval '1 month') m
RETURNING id, range_start
"""

_CANDLES = """
INSERT INTO fks."candles_1m" (series_id, ts, batch_id, open, high, low, close, volume)
SELECT %(id)s, ts, b.id, 2, 3, 1, 2, 1 FROM fks.batch b
CROSS JOIN LATERAL generate_series(b.range_start,
    least(b.range_end, %(past)s) - interval '1 minute', interval '1 minute') ts
WHERE b.series_id = %(id)s ORDER BY ts
"""

_STATE = """
UPDATE fks.sync_state SET synced = tstzmultirange(tstzrange(%(first)s, %(past)s)), total_candles = %(candles)s,
    oldest = %(first)s, newest = %(past)s - interval '1 minute' WHERE series_id = %(id)s
"""


def auditing(place: World, runs: int, size: Size) -> list[Result]:
    """(l) the audit of all series against the reference, one connection each, alternately."""
    database = Database(place.database_url)
    place.clear()
    series = [Series(f"C{n}/USDT", Timeframe.M1, AssetClass.CRYPTO) for n in range(SERIES)]
    identities = [_fill(place, database, one, size.audited // SERIES) for one in series]
    ratios, seconds = [], []
    with place.connect() as connection:
        connection.execute('VACUUM ANALYZE fks."candles_1m"')
        for _ in range(runs):
            with stopwatch() as reference:
                counted = sum(_reference(connection, identity) for identity in identities)
            with stopwatch() as ours:
                report = audit(database, series, now)
            if not counted == report.candles == size.audited or report.differences:
                raise SystemExit(f"the measured work differs from the expected one: {counted}, {report}")
            ratios.append(ours[0] / reference[0])
            seconds.append(ours[0])
    database.dispose()
    detail = f"{report.candles:,} candles in {median(seconds):.1f} s"
    return [Result("(l) audit / array_agg and numpy.diff", ratios, 2.0, False, detail)]


def _fill(place: World, database: Database, series: Series, candles: int) -> int:
    with database.begin() as connection:
        identity = ledger.register(connection, series)
    past = _FIRST + timedelta(minutes=candles)
    parameters = {"id": identity, "first": _FIRST, "past": past, "candles": candles}
    with place.connect() as connection:
        for statement in (_BATCH, _CANDLES, _STATE):
            connection.execute(statement, parameters)
    return identity


def _reference(connection: psycopg.Connection, identity: int) -> int:
    """Searches for gaps in the minute grid from the first to the last candle; returns the number of candles."""
    query = 'SELECT array_send(array_agg(ts)) FROM fks."candles_1m" WHERE series_id = %s'
    with connection.cursor(binary=True) as cursor:
        row = cursor.execute(query, (identity,)).fetchone()
    assert row is not None
    opens = np.sort(decode_array(row[0]))
    if bool((np.diff(opens) != MICROS_PER_MINUTE).any()):
        raise SystemExit("the candles of the bench have a gap")
    return len(opens)
