"""Counts of many windows or many series in one or two queries: the numbers of Dagster's partitions and checks.

Belongs here: expected, stored, missing and no-trade counts. Does not belong here: which counts pass a check (the
callers), whether the stored candles are sound (`sanity`), how far a series reaches (`reaches`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy as sa

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.partitions import Grain
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import Timeframe, to_datetime, to_micros
from fks_backfill_dagster.ledger.gaps import MISSING, GapStatus
from fks_backfill_dagster.ledger.records import LedgerGap
from fks_backfill_dagster.store import ledger
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.sql import micros, series_of, table_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Candles: expected = stored + missing + no_trade.

    `missing`: not stored and not known to be without trades, explained or not. `no_trade`: no-trade intervals.
    """

    expected: int = 0
    missing: int = 0
    no_trade: int = 0

    @property
    def stored(self) -> int:
        return self.expected - self.missing - self.no_trade

    @property
    def coverage(self) -> float:
        """The share of the expected candles that is not missing; 1 where none is expected."""
        return (self.expected - self.missing) / self.expected if self.expected else 1.0

    @property
    def rounded_coverage(self) -> float:
        """To six decimals, and below 1 if a candle is missing."""
        rounded = round(self.coverage, 6)
        return min(rounded, 0.999999) if self.missing else rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class PartState(Counts):
    """The ledger's state of one window.

    `unexplained` is the part of `missing` that no gap explains. `providers` counts the stored candles by provider,
    the largest share first. `first` and `last` are open times (microseconds) of stored candles, `close_last` is the
    close of the last one; `volume_sum` is in base units, None where no candle has a volume. `next_attempt` is the
    earliest next attempt of the window's gaps; None where none is scheduled.
    """

    unexplained: int = 0
    providers: Mapping[str, int] = field(default_factory=dict)
    first: int | None = None
    last: int | None = None
    close_last: float | None = None
    volume_sum: float | None = None
    next_attempt: int | None = None

    def from_fallback(self, provider: str | None) -> int:
        """The stored candles of other providers than `provider`, the first of the priority."""
        return sum(count for name, count in self.providers.items() if name != provider)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completeness(Counts):
    """The counts within the coverage of a series; history that was never synced is pending and does not count.

    `open_missing` is the part of `missing` that lies in open gaps.
    """

    open_gaps: int = 0
    open_missing: int = 0


def part_states(database: Database, series: Series, windows: Mapping[str, TimeRange]) -> dict[str, PartState]:
    """The state of every window by its key. Windows end no later than the last closed candle.

    The number of statements does not depend on the number of windows. Candles are read only where the lineage is
    not enough: their volumes where a candle was corrected or a batch extends beyond the window, and their providers
    where it names more than one.
    """
    hull = TimeRange(min(w.start for w in windows.values()), max(w.end for w in windows.values()))
    grid = grid_of(series)
    with database.begin() as connection:
        identity = ledger.series_id(connection, series)
        known = ledger.known(connection, identity, hull)
        found = {
            key: PartState(
                expected=grid.count(window),
                missing=sum(grid.count(part) for part in known.lacking(window)),
                unexplained=sum(grid.count(part) for part in known.missing(window)),
                no_trade=sum(grid.count(part) for part in known.no_trade(window)),
                next_attempt=_next_attempt(known.gaps, window),
            )
            for key, window in windows.items()
        }
        full = {key: windows[key] for key, state in found.items() if state.stored}
        edges = _edges(connection, series.timeframe, identity, full) if full else {}
        lineage = _lineage(connection, identity, full) if full else {}
        only = {key: one.provider for key, one in lineage.items() if one.provider is not None}
        summed = {key: one.volume for key, one in lineage.items() if one.inserted == found[key].stored}
        volumes = {key: volume for key, volume in summed.items() if volume is not None}
        unsummed = {key: window for key, window in full.items() if key not in volumes}
        volumes |= _volumes(connection, series.timeframe, identity, unsummed) if unsummed else {}
        mixed = {key: window for key, window in full.items() if key not in only}
        shares = _shares(connection, series.timeframe, identity, mixed) if mixed else {}
    shares |= {key: {provider: found[key].stored} for key, provider in only.items()}
    return {
        key: replace(state, providers=shares.get(key, {}), volume_sum=volumes.get(key), **edges.get(key, {}))
        for key, state in found.items()
    }


_WINDOWS = (
    "unnest(CAST(:keys AS text[]), CAST(:starts AS timestamptz[]), CAST(:ends AS timestamptz[]))"
    " AS w(key, low, high)"
)


def _named(identity: int | None, windows: Mapping[str, TimeRange]) -> dict[str, Any]:
    return {
        "id": identity,
        "keys": list(windows),
        "starts": [to_datetime(w.start) for w in windows.values()],
        "ends": [to_datetime(w.end) for w in windows.values()],
    }


def _edges(
    connection: sa.Connection, timeframe: Timeframe, identity: int | None, windows: Mapping[str, TimeRange]
) -> dict[str, dict[str, Any]]:
    """The first and the last stored candle of every window, as fields of PartState; index look-ups."""
    candles = f"FROM {table_of(timeframe)} WHERE series_id = :id AND ts >= w.low AND ts < w.high"
    rows = connection.execute(
        sa.text(
            f"SELECT w.key, {micros('f.ts')} AS first, {micros('l.ts')} AS last, l.close"
            f" FROM {_WINDOWS}"
            f" CROSS JOIN LATERAL (SELECT ts {candles} ORDER BY ts LIMIT 1) f"
            f" CROSS JOIN LATERAL (SELECT ts, close {candles} ORDER BY ts DESC LIMIT 1) l"
        ),
        _named(identity, windows),
    )
    return {row.key: {"first": row.first, "last": row.last, "close_last": row.close} for row in rows}


@dataclass(frozen=True, slots=True)
class _Lineage:
    """A window's candles by the lineage of its batches: the number inserted, the provider where there is only one,
    their volume where the batches lie inside the window and none of their candles was changed since."""

    inserted: int
    provider: str | None
    volume: float | None


def _lineage(
    connection: sa.Connection, identity: int | None, windows: Mapping[str, TimeRange]
) -> dict[str, _Lineage]:
    rows = connection.execute(
        sa.text(
            "SELECT w.key, sum(b.inserted)::bigint AS inserted,"
            " CASE WHEN count(DISTINCT b.provider) = 1 THEN min(b.provider) END AS provider,"
            " CASE WHEN bool_and(b.range_start >= w.low AND b.range_end <= w.high AND b.updated = 0"
            "   AND b.undoes IS NULL AND b.volume_sum IS NOT NULL) THEN sum(b.volume_sum) END AS volume"
            f" FROM {_WINDOWS}"
            " JOIN fks.batch b ON b.series_id = :id AND b.range_start < w.high AND b.range_end > w.low"
            "   AND b.inserted + b.updated > 0"
            " GROUP BY 1"
        ),
        _named(identity, windows),
    )
    return {row.key: _Lineage(row.inserted, row.provider, row.volume) for row in rows}


def _volumes(
    connection: sa.Connection, timeframe: Timeframe, identity: int | None, windows: Mapping[str, TimeRange]
) -> dict[str, float]:
    """The volume of the stored candles of every window."""
    rows = connection.execute(
        sa.text(
            f"SELECT w.key, c.volume FROM {_WINDOWS} CROSS JOIN LATERAL ("
            f"   SELECT sum(volume) AS volume FROM {table_of(timeframe)}"
            "   WHERE series_id = :id AND ts >= w.low AND ts < w.high) c"
        ),
        _named(identity, windows),
    )
    return {row.key: row.volume for row in rows}


def _shares(
    connection: sa.Connection, timeframe: Timeframe, identity: int | None, windows: Mapping[str, TimeRange]
) -> dict[str, dict[str, int]]:
    """The stored candles of every window by provider.

    They are grouped by batch first: batches are few, and only those are joined with their provider.
    """
    rows = connection.execute(
        sa.text(
            f"SELECT w.key, b.provider, sum(n.candles)::bigint AS candles FROM {_WINDOWS}"
            " CROSS JOIN LATERAL ("
            f"   SELECT batch_id, count(*) AS candles FROM {table_of(timeframe)}"
            "   WHERE series_id = :id AND ts >= w.low AND ts < w.high GROUP BY batch_id) n"
            " JOIN fks.batch b ON b.id = n.batch_id GROUP BY 1, 2 ORDER BY 3 DESC, 2"
        ),
        _named(identity, windows),
    )
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        found.setdefault(row.key, {})[row.provider] = row.candles
    return found


def _next_attempt(gaps: Sequence[LedgerGap], window: TimeRange) -> int | None:
    """The earliest next attempt of the gaps that overlap the window, in microseconds."""
    moments = (
        gap.next_attempt_at
        for gap in gaps
        if gap.status is not GapStatus.FILLED and gap.start < window.end and gap.end > window.start
    )
    return min((moment for moment in moments if moment is not None), default=None)


def completeness(database: Database, series: Sequence[Series]) -> dict[Series, Completeness]:
    """Expected and missing candles within the coverage, from the ledger: no candle is read."""
    found = {one: Completeness() for one in series}
    with database.begin() as connection:
        owners = series_of(connection, series)
        rows = connection.execute(
            sa.text(
                "SELECT s.series_id, s.synced,"
                "   coalesce(sum(g.missing_candles) FILTER (WHERE g.status <> :quiet), 0)::bigint AS missing,"
                "   coalesce(sum(g.missing_candles) FILTER (WHERE g.status = :quiet), 0)::bigint AS no_trade,"
                "   count(g.id) FILTER (WHERE g.status = :open) AS open_gaps,"
                "   coalesce(sum(g.missing_candles) FILTER (WHERE g.status = :open), 0)::bigint AS open_missing"
                " FROM fks.sync_state s LEFT JOIN fks.gap g"
                "   ON g.series_id = s.series_id AND g.status <> :filled"
                " WHERE s.series_id = ANY(:ids) GROUP BY s.series_id, s.synced"
            ),
            {
                "ids": list(owners),
                "open": GapStatus.OPEN.value,
                "quiet": GapStatus.NO_TRADE.value,
                "filled": GapStatus.FILLED.value,
            },
        ).all()
    for row in rows:
        one = owners[row.series_id]
        expected = sum(grid_of(one).count(part) for part in ledger.from_multirange(row.synced))
        found[one] = Completeness(
            expected=expected,
            missing=row.missing,
            no_trade=row.no_trade,
            open_gaps=row.open_gaps,
            open_missing=row.open_missing,
        )
    return found


def open_partitions(database: Database, series: Sequence[Series], grain: Grain) -> dict[Series, list[str]]:
    """The keys of the partitions that an open gap overlaps."""
    found: dict[Series, list[str]] = {one: [] for one in series}
    with database.begin() as connection:
        owners = series_of(connection, series)
        rows = connection.execute(
            sa.text(
                "SELECT DISTINCT g.series_id, to_char(p, 'YYYY-MM-DD') AS key FROM fks.gap g"
                " CROSS JOIN LATERAL generate_series("
                "   date_trunc(:grain, g.gap_start AT TIME ZONE 'UTC'),"
                "   (g.gap_end - interval '1 microsecond') AT TIME ZONE 'UTC', CAST('1 ' || :grain AS interval)) p"
                " WHERE g.series_id = ANY(:ids) AND g.status = :open ORDER BY 1, 2"
            ),
            {"grain": grain.value, "ids": list(owners), "open": GapStatus.OPEN.value},
        )
        for row in rows:
            found[owners[row.series_id]].append(row.key)
    return found


def next_attempts(database: Database, series: Sequence[Series]) -> dict[Series, int]:
    """The next attempt of each series; series without a gap to attempt are omitted.

    An open gap without a scheduled attempt has been due since it was found.
    """
    with database.begin() as connection:
        owners = series_of(connection, series)
        rows = connection.execute(
            sa.text(
                "SELECT series_id, min(coalesce(next_attempt_at, found_at)) AS due FROM fks.gap"
                " WHERE series_id = ANY(:ids)"
                "   AND (status = :open OR (status = :unavailable AND next_attempt_at IS NOT NULL))"
                " GROUP BY series_id"
            ),
            {
                "ids": list(owners),
                "open": GapStatus.OPEN.value,
                "unavailable": GapStatus.UNAVAILABLE.value,
            },
        )
        return {owners[row.series_id]: to_micros(row.due) for row in rows}


def missing_gaps(
    database: Database, series: Sequence[Series], most: int
) -> dict[Series, tuple[LedgerGap, ...]]:
    """The gaps with missing candles, at most `most` per series: open ones first, then the newest."""
    found: dict[Series, list[LedgerGap]] = {one: [] for one in series}
    with database.begin() as connection:
        owners = series_of(connection, series)
        rows = connection.execute(
            sa.text(
                "SELECT g.* FROM unnest(CAST(:ids AS int[])) AS w(id) CROSS JOIN LATERAL ("
                "   SELECT * FROM fks.gap WHERE series_id = w.id AND status = ANY(:missing)"
                "   ORDER BY status = :open DESC, gap_start DESC LIMIT :most) g"
                " ORDER BY g.series_id, g.status = :open DESC, g.gap_start DESC"
            ),
            {
                "ids": list(owners),
                "missing": [status.value for status in MISSING],
                "open": GapStatus.OPEN.value,
                "most": most,
            },
        )
        for row in rows:
            found[owners[row.series_id]].append(ledger.gap_of(row))
    return {one: tuple(gaps) for one, gaps in found.items()}


def listed_at(database: Database, series: Series, providers: Sequence[str]) -> int | None:
    """The earliest known listing time of the symbol at one of `providers`."""
    with database.begin() as connection:
        found = ledger.listings(connection, series.symbol)
    return min((found[name].listed_at for name in providers if name in found), default=None)
