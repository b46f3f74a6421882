"""TimescaleDB: hypertables and compression. This DDL is the only difference from plain PostgreSQL.

Chunks are longer for longer timeframes: daily candles took 77 bytes per row in 30-day chunks, 36 in 5-year
chunks, and read three times faster. Compression segments by series, so that the rows of one series in a chunk
can be read, changed and kept in order separately.
"""

from __future__ import annotations

import logging

import sqlalchemy as sa

from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.store.sql import table_of

_log = logging.getLogger(__name__)

# About 45,000 candles per series and chunk for 1m, some thousands from 1h up.
CHUNK_DAYS = {
    Timeframe.M1: 30,
    Timeframe.M5: 90,
    Timeframe.M15: 180,
    Timeframe.M30: 365,
    Timeframe.H1: 730,
    Timeframe.H4: 1825,
    Timeframe.D1: 3650,
    Timeframe.W1: 18250,
}


def install(connection: sa.Connection) -> bool:
    """Creates the extension if the server has it and this role may. Returns whether it is installed.

    Logs a warning if the server has it and it cannot be created.
    """
    installed = "SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb')"
    # This setting exists if the library is preloaded. If it is not, CREATE EXTENSION ends the session
    # instead of failing.
    preloaded = "SELECT current_setting('timescaledb.disable_load', true) IS NOT NULL"
    if connection.scalar(sa.text(installed)):
        return True
    if not connection.scalar(sa.text(preloaded)):
        return False
    try:
        with connection.begin_nested():
            connection.execute(sa.text("CREATE EXTENSION timescaledb"))
    except sa.exc.DBAPIError as error:  # not permitted: plain tables serve as well
        reason = " ".join(str(error.orig).split())
        _log.warning(
            "TimescaleDB is loaded, but its extension could not be created (%s): the tables stay plain ones. Let an"
            " administrator run CREATE EXTENSION timescaledb in this database, then run `fks-backfill db upgrade`.",
            reason,
        )
        return False
    return True


def make_hypertables(connection: sa.Connection) -> None:
    """Turns every candle table into a hypertable with a compression policy. Idempotent.

    The Apache-licensed build has no compression: there the hypertables have no policy. The functions are qualified
    with the schema of the extension, which may be outside the search_path.
    """
    where = connection.scalar(
        sa.text("SELECT extnamespace::regnamespace::text FROM pg_extension WHERE extname = 'timescaledb'")
    )
    for timeframe, days in CHUNK_DAYS.items():
        table = table_of(timeframe)
        connection.execute(
            sa.text(
                f"SELECT {where}.create_hypertable('{table}', {where}.by_range('ts', INTERVAL '{days} days'),"
                " if_not_exists => true, migrate_data => true, create_default_indexes => false)"
            )
        )
        if connection.scalar(sa.text("SELECT current_setting('timescaledb.license', true)")) == "apache":
            continue
        connection.execute(
            sa.text(
                f"ALTER TABLE {table} SET (timescaledb.compress,"
                " timescaledb.compress_segmentby = 'series_id', timescaledb.compress_orderby = 'ts')"
            )
        )
        # Late enough that corrections of recent candles change uncompressed rows.
        connection.execute(
            sa.text(
                f"SELECT {where}.add_compression_policy('{table}', INTERVAL '{2 * days} days', if_not_exists => true)"
            )
        )
