"""The reach of each series in one or two queries: the input of a refresh and of freshness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import sqlalchemy as sa

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import to_datetime, to_micros
from fks_backfill_dagster.ledger.gaps import GIVEN_UP, MISSING
from fks_backfill_dagster.store import ledger
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.sql import listed, micros, series_of


def synced_ends(database: Database, series: Sequence[Series]) -> dict[Series, int]:
    """The end of each series' coverage; series that were never synced are omitted."""
    with database.begin() as connection:
        owners = series_of(connection, series)
        rows = connection.execute(
            sa.text(
                "SELECT series_id, upper(synced) AS synced_end FROM fks.sync_state"
                " WHERE series_id = ANY(:ids) AND NOT isempty(synced)"
            ),
            {"ids": list(owners)},
        )
        return {owners[row.series_id]: to_micros(row.synced_end) for row in rows}


@dataclass(frozen=True, slots=True)
class Reach:
    """The end of a series' coverage, and the gaps between its newest candle and that end.

    `lacking_since`: the start of the first gap with missing candles. `absent_since`: the start of the trailing gaps
    that no eligible provider can fill; an undecided gap breaks them off, because it may still be filled. None: no
    such gap.
    """

    synced_end: int
    lacking_since: int | None = None
    absent_since: int | None = None


def reaches(database: Database, series: Sequence[Series]) -> dict[Series, Reach]:
    """The reach of each series in one query; series that were never synced are omitted."""
    with database.begin() as connection:
        owners = series_of(connection, series)
        rows = connection.execute(
            sa.text(
                f"SELECT s.series_id, {micros('upper(s.synced)')} AS synced_end,"
                f"   {micros('g.lacking_since')} AS lacking_since,"
                f"   {micros('g.absent_since')} AS absent_since"
                " FROM fks.sync_state s LEFT JOIN LATERAL ("
                "   SELECT max(gap_start) FILTER (WHERE NOT status = ANY(:exhausted)) AS broken_off FROM fks.gap"
                "   WHERE series_id = s.series_id AND status <> 'filled'"
                "     AND gap_start > coalesce(s.newest, '-infinity')) b ON true"
                " LEFT JOIN LATERAL ("
                "   SELECT min(gap_start) FILTER (WHERE status <> 'no_trade') AS lacking_since,"
                "     min(gap_start) FILTER (WHERE gap_start > coalesce(b.broken_off, '-infinity')) AS absent_since"
                "   FROM fks.gap WHERE series_id = s.series_id AND status <> 'filled'"
                "     AND gap_start > coalesce(s.newest, '-infinity')) g ON true"
                " WHERE s.series_id = ANY(:ids) AND NOT isempty(s.synced)"
            ),
            {"ids": list(owners), "exhausted": [status.value for status in GIVEN_UP]},
        )
        return {
            owners[row.series_id]: Reach(row.synced_end, row.lacking_since, row.absent_since) for row in rows
        }


@dataclass(frozen=True, slots=True)
class Tail:
    """The end of a series, from the start that `tails` was given on.

    `newest`: the open of its newest candle. `synced`: the hull of its whole coverage. `covered`, `absent` (gaps of any
    state) and `no_trade` are the ledger's ranges in the tail.
    """

    newest: int | None = None
    synced: TimeRange | None = None
    covered: RangeSet = field(default_factory=RangeSet)
    absent: RangeSet = field(default_factory=RangeSet)
    no_trade: RangeSet = field(default_factory=RangeSet)


MOST_TAIL_GAPS = 1000
"""The number of gaps in a tail: the newest ones."""

# A separate look-up finds the gap that extends into the tail from before, as in store/ledger.py.
_TAILS = f"""
SELECT s.symbol, s.timeframe, {micros("st.newest")} AS newest,
    {micros("lower(st.synced)")} AS first, {micros("upper(st.synced)")} AS last,
    st.synced * tstzmultirange(tstzrange(st.newest - w.before, NULL)) AS covered, g.starts, g.ends, g.no_trade
FROM unnest(CAST(:symbols AS text[]), CAST(:timeframes AS text[]), CAST(:befores AS interval[]))
    AS w(symbol, timeframe, before)
JOIN fks.series s ON s.symbol = w.symbol AND s.timeframe = w.timeframe
JOIN fks.sync_state st ON st.series_id = s.id
LEFT JOIN LATERAL (
    SELECT array_agg({micros("gap_start")}) AS starts, array_agg({micros("gap_end")}) AS ends,
        array_agg(status = 'no_trade') AS no_trade
    FROM (
        SELECT gap_start, gap_end, status FROM fks.gap
        WHERE series_id = s.id AND status <> 'filled' AND gap_start >= coalesce(
            (SELECT max(gap_start) FROM fks.gap
             WHERE series_id = s.id AND status <> 'filled' AND gap_start < st.newest - w.before),
            st.newest - w.before, '-infinity')
        ORDER BY gap_start DESC LIMIT {MOST_TAIL_GAPS}) n) g ON true
"""


def tails(database: Database, before: Mapping[Series, int]) -> dict[Series, Tail]:
    """The tail of every series in one query; `Tail()` for series that were never synced.

    `before`: how far before the newest candle the tail begins, in microseconds.
    """
    wanted = {one.key: one for one in before}
    with database.begin() as connection:
        rows = connection.execute(
            sa.text(_TAILS),
            {
                **listed(wanted.values()),
                "befores": [timedelta(microseconds=before[one]) for one in wanted.values()],
            },
        ).all()
    return dict.fromkeys(before, Tail()) | {wanted[row.symbol, row.timeframe]: _tail(row) for row in rows}


def _tail(row: sa.Row[Any]) -> Tail:
    starts, ends = np.array(row.starts or (), dtype=np.int64), np.array(row.ends or (), dtype=np.int64)
    no_trade = np.array(row.no_trade or (), dtype=bool)
    return Tail(
        newest=row.newest,
        synced=None if row.first is None else TimeRange(row.first, row.last),
        covered=ledger.from_multirange(row.covered),
        absent=RangeSet.from_arrays(starts, ends),
        no_trade=RangeSet.from_arrays(starts[no_trade], ends[no_trade]),
    )


def recent_missing(database: Database, windows: Mapping[Series, TimeRange]) -> dict[Series, int]:
    """The number of missing candles of each series that open in its window, within the coverage.

    Explained ones count too, no-trade intervals do not. One query for all series.
    """
    found = dict.fromkeys(windows, 0)
    with database.begin() as connection:
        owners = series_of(connection, list(windows))
        rows = connection.execute(
            sa.text(
                f"SELECT g.series_id, {micros('greatest(g.gap_start, w.low)')} AS first,"
                f"   {micros('least(g.gap_end, w.high)')} AS last"
                " FROM unnest(CAST(:ids AS int[]), CAST(:lows AS timestamptz[]), CAST(:highs AS timestamptz[]))"
                "   AS w(id, low, high)"
                " JOIN fks.gap g ON g.series_id = w.id AND g.gap_end > w.low AND g.gap_start < w.high"
                "   AND g.status = ANY(:missing)"
            ),
            {
                "ids": list(owners),
                "lows": [to_datetime(windows[one].start) for one in owners.values()],
                "highs": [to_datetime(windows[one].end) for one in owners.values()],
                "missing": [status.value for status in MISSING],
            },
        ).all()
    table = np.array([tuple(row) for row in rows], dtype=np.int64).reshape(-1, 3)
    for identity in np.unique(table[:, 0]).tolist():
        _, starts, ends = table[table[:, 0] == identity].T
        rank = grid_of(owners[identity]).rank
        found[owners[identity]] = int((rank(ends) - rank(starts)).sum())
    return found
