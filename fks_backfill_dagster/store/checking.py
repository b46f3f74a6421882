"""The numbers behind Dagster's partitions and checks: many windows or many series in a query or two.

Belongs here: counts by what the ledger and the candles say. Does not belong here: what counts as
passed, and the repair of what is found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.outages import Spans
from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import Timeframe, to_datetime, to_micros
from fks_backfill_dagster.ledger.gaps import GIVEN_UP, GapStatus
from fks_backfill_dagster.ledger.records import LedgerGap
from fks_backfill_dagster.store import ledger
from fks_backfill_dagster.store.database import Database

# The rules of domain/quality.py in SQL. In PostgreSQL NaN is greater than every number.
_RULES = {
    "not_finite": "greatest(open, high, low, close) >= 'Infinity' OR least(open, high, low, close) = '-Infinity'",
    "not_positive": "least(open, high, low, close) <= 0",
    "high_low": "high < greatest(open, close, low) OR low > least(open, close, high)",
    "bad_volume": "volume < 0 OR volume >= 'Infinity'",
}

# What all of them together demand, in the fewest comparisons: every candle of a series is looked at.
GOOD = (
    "low > 0 AND high < 'Infinity' AND open BETWEEN low AND high AND close BETWEEN low AND high"
    " AND (volume IS NULL OR (volume >= 0 AND volume < 'Infinity'))"
)

# The states of gaps in which candles are missing: they did trade, as far as is known.
_MISSING = (GapStatus.OPEN, *GIVEN_UP)

# An instant of ours: whole numbers need no datetime a row.
_MICROS = "CAST(extract(epoch FROM {}) * 1000000 AS bigint)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Candles: expected = stored + missing + quiet.

    `missing` did trade, as far as anybody knows, and is not stored, explained or not. `quiet` are
    intervals in which nothing traded.
    """

    expected: int = 0
    missing: int = 0
    quiet: int = 0

    @property
    def stored(self) -> int:
        return self.expected - self.missing - self.quiet

    @property
    def coverage(self) -> float:
        """The share of what is expected that is not missing; 1 where nothing is expected."""
        return (self.expected - self.missing) / self.expected if self.expected else 1.0

    @property
    def rounded_coverage(self) -> float:
        """To six digits, and never up to 1 where something is missing."""
        rounded = round(self.coverage, 6)
        return min(rounded, 0.999999) if self.missing else rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class PartState(Counts):
    """What the ledger says of one window; `unexplained` is the part of `missing` that nobody answered for.

    `providers` are the stored candles by who brought them, the largest share first. `first` and `last` are
    open times (microseconds) of stored candles, `close_last` is the close of the last one; `volume_sum` is in
    base units, None where no candle has a volume. `next_attempt` is when the first of the window's gaps is
    requested again, as the ledger has it; None: none of them is.
    """

    unexplained: int = 0
    providers: Mapping[str, int] = field(default_factory=dict)
    first: int | None = None
    last: int | None = None
    close_last: float | None = None
    volume_sum: float | None = None
    next_attempt: int | None = None

    def from_fallback(self, provider: str | None) -> int:
        """The stored candles that come from others than `provider`, the first of the priority."""
        return sum(count for name, count in self.providers.items() if name != provider)


@dataclass(frozen=True, slots=True)
class Sanity:
    """How many stored candles there are, how many break each rule, how many any, and the first that does."""

    candles: int
    bad: int
    violations: Mapping[str, int]
    first: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completeness(Counts):
    """Of all that was ever synced of a series; history that never was is pending, and no gap.

    `open_missing` is the part of `missing` that lies in open gaps.
    """

    open_gaps: int = 0
    open_missing: int = 0


def part_states(database: Database, series: Series, windows: Mapping[str, TimeRange]) -> dict[str, PartState]:
    """The state of every window by its key. Windows reach no further than candles can exist.

    Few statements, whatever the number of windows. Candles are read only where the lineage does not tell: their
    volumes where something was corrected or batches reach beyond the window, and whose they are where it names more
    than one provider.
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
                quiet=sum(grid.count(part) for part in known.quiet(window)),
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
    """The first and the last stored candle of every window, as fields of PartState; found by index."""
    candles = f'FROM fks."candles_{timeframe}" WHERE series_id = :id AND ts >= w.low AND ts < w.high'
    rows = connection.execute(
        sa.text(
            f"SELECT w.key, {_MICROS.format('f.ts')} AS first, {_MICROS.format('l.ts')} AS last, l.close"
            f" FROM {_WINDOWS}"
            f" CROSS JOIN LATERAL (SELECT ts {candles} ORDER BY ts LIMIT 1) f"
            f" CROSS JOIN LATERAL (SELECT ts, close {candles} ORDER BY ts DESC LIMIT 1) l"
        ),
        _named(identity, windows),
    )
    return {row.key: {"first": row.first, "last": row.last, "close_last": row.close} for row in rows}


@dataclass(frozen=True, slots=True)
class _Lineage:
    """What the batches of a window tell of its candles: how many they have inserted, the provider where there is
    one, their volume where they hold nothing else and nothing of them was changed since."""

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
    """The volume of the stored candles of every window; of them nothing else is read."""
    rows = connection.execute(
        sa.text(
            f"SELECT w.key, c.volume FROM {_WINDOWS} CROSS JOIN LATERAL ("
            f'   SELECT sum(volume) AS volume FROM fks."candles_{timeframe}"'
            "   WHERE series_id = :id AND ts >= w.low AND ts < w.high) c"
        ),
        _named(identity, windows),
    )
    return {row.key: row.volume for row in rows}


def _shares(
    connection: sa.Connection, timeframe: Timeframe, identity: int | None, windows: Mapping[str, TimeRange]
) -> dict[str, dict[str, int]]:
    """The stored candles of every window by provider.

    They are grouped by batch first: there are few, and only they are joined with their provider.
    """
    rows = connection.execute(
        sa.text(
            f"SELECT w.key, b.provider, sum(n.candles)::bigint AS candles FROM {_WINDOWS}"
            " CROSS JOIN LATERAL ("
            f'   SELECT batch_id, count(*) AS candles FROM fks."candles_{timeframe}"'
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
    """When the first of the gaps that reach into the window is requested again, in microseconds."""
    moments = (
        gap.next_attempt_at
        for gap in gaps
        if gap.status is not GapStatus.FILLED and gap.start < window.end and gap.end > window.start
    )
    return min((moment for moment in moments if moment is not None), default=None)


def sanity(database: Database, series: Sequence[Series]) -> dict[Series, Sanity]:
    """How many stored candles break the OHLC rules: one pass per timeframe, whatever the number of series.

    Which rules, and where first, is counted for those series alone that have any.
    """
    with database.begin() as connection:
        owners = _owners(connection, series)
        totals = connection.execute(
            sa.text("SELECT series_id, total_candles FROM fks.sync_state WHERE series_id = ANY(:ids)"),
            {"ids": list(owners)},
        )
        stored = {owners[row.series_id]: row.total_candles for row in totals}
        found = {one: Sanity(stored.get(one, 0), 0, dict.fromkeys(_RULES, 0), None) for one in series}
        for timeframe in dict.fromkeys(one.timeframe for one in series):
            ids = [identity for identity, one in owners.items() if one.timeframe is timeframe]
            for row in _broken(connection, timeframe, ids):
                one = owners[row.series_id]
                rules = {name: row._mapping[name] for name in _RULES}
                found[one] = Sanity(found[one].candles, row.bad, rules, to_micros(row.first))
    return found


def _broken(connection: sa.Connection, timeframe: Timeframe, ids: Sequence[int]) -> Sequence[sa.Row[Any]]:
    counts = ", ".join(f"count(*) FILTER (WHERE {rule}) AS {name}" for name, rule in _RULES.items())
    return connection.execute(
        sa.text(
            f"SELECT series_id, count(*) AS bad, {counts}, min(ts) AS first"
            f' FROM fks."candles_{timeframe}" WHERE series_id = ANY(:ids) AND NOT ({GOOD}) GROUP BY series_id'
        ),
        {"ids": list(ids)},
    ).all()


def completeness(database: Database, series: Sequence[Series]) -> dict[Series, Completeness]:
    """What is expected and missing within what was synced, from the ledger: no candle is read."""
    found = {one: Completeness() for one in series}
    with database.begin() as connection:
        owners = _owners(connection, series)
        rows = connection.execute(
            sa.text(
                "SELECT s.series_id, s.synced,"
                "   coalesce(sum(g.missing_candles) FILTER (WHERE g.status <> :quiet), 0)::bigint AS missing,"
                "   coalesce(sum(g.missing_candles) FILTER (WHERE g.status = :quiet), 0)::bigint AS quiet,"
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
            quiet=row.quiet,
            open_gaps=row.open_gaps,
            open_missing=row.open_missing,
        )
    return found


def bad_parts(database: Database, series: Sequence[Series], part: str) -> dict[Series, dict[str, int]]:
    """How many candles break a rule, by the day on which their `part` ("month" or "year") begins."""
    found: dict[Series, dict[str, int]] = {one: {} for one in series}
    with database.begin() as connection:
        owners = _owners(connection, series)
        for timeframe in dict.fromkeys(one.timeframe for one in series):
            rows = connection.execute(
                sa.text(
                    "SELECT series_id, to_char(date_trunc(:part, ts AT TIME ZONE 'UTC'), 'YYYY-MM-DD') AS key,"
                    f' count(*) AS bad FROM fks."candles_{timeframe}"'
                    f" WHERE series_id = ANY(:ids) AND NOT ({GOOD}) GROUP BY 1, 2 ORDER BY 1, 2"
                ),
                {"part": part, "ids": [i for i, one in owners.items() if one.timeframe is timeframe]},
            )
            for row in rows:
                found[owners[row.series_id]][row.key] = row.bad
    return found


def open_parts(database: Database, series: Sequence[Series], part: str) -> dict[Series, list[str]]:
    """The parts ("month" or "year") that an open gap reaches into, by the day on which they begin."""
    found: dict[Series, list[str]] = {one: [] for one in series}
    with database.begin() as connection:
        owners = _owners(connection, series)
        rows = connection.execute(
            sa.text(
                "SELECT DISTINCT g.series_id, to_char(p, 'YYYY-MM-DD') AS key FROM fks.gap g"
                " CROSS JOIN LATERAL generate_series("
                "   date_trunc(:part, g.gap_start AT TIME ZONE 'UTC'),"
                "   (g.gap_end - interval '1 microsecond') AT TIME ZONE 'UTC', CAST('1 ' || :part AS interval)) p"
                " WHERE g.series_id = ANY(:ids) AND g.status = :open ORDER BY 1, 2"
            ),
            {"part": part, "ids": list(owners), "open": GapStatus.OPEN.value},
        )
        for row in rows:
            found[owners[row.series_id]].append(row.key)
    return found


def synced_ends(database: Database, series: Sequence[Series]) -> dict[Series, int]:
    """Up to where each series was ever synced; those that never were are left out."""
    with database.begin() as connection:
        owners = _owners(connection, series)
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
    """How far a series was synced, and what is missing up to there after its newest candle.

    `lacking_since` is where that begins, `absent_since` where it begins as far as nobody can fill it: a
    part that somebody has not answered for breaks it off, as that may come. None: nothing of that kind.
    """

    synced_end: int
    lacking_since: int | None = None
    absent_since: int | None = None


def reaches(database: Database, series: Sequence[Series]) -> dict[Series, Reach]:
    """The reach of each series in one query; those that were never synced are left out."""
    with database.begin() as connection:
        owners = _owners(connection, series)
        rows = connection.execute(
            sa.text(
                f"SELECT s.series_id, {_MICROS.format('upper(s.synced)')} AS synced_end,"
                f"   {_MICROS.format('g.lacking_since')} AS lacking_since,"
                f"   {_MICROS.format('g.absent_since')} AS absent_since"
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
    """The end of a series: its newest open (None: it has no candle), the hull of what was ever synced (None:
    nothing was), and what the ledger has there: what was synced, where candles are absent for whatever reason,
    and where nothing traded. These reach back as far as `tails` was requested to, and to the end."""

    newest: int | None = None
    synced: TimeRange | None = None
    covered: RangeSet = field(default_factory=RangeSet)
    absent: RangeSet = field(default_factory=RangeSet)
    no_trade: RangeSet = field(default_factory=RangeSet)


MOST_TAIL_GAPS = 1000
"""So many gaps of a series belong to its tail: the newest ones."""

# The gap that reaches from before into what is wanted is found by a look-up of its own, as in store/ledger.py.
_TAILS = f"""
SELECT s.symbol, s.timeframe, {_MICROS.format("st.newest")} AS newest,
    {_MICROS.format("lower(st.synced)")} AS first, {_MICROS.format("upper(st.synced)")} AS last,
    st.synced * tstzmultirange(tstzrange(st.newest - w.before, NULL)) AS covered, g.starts, g.ends, g.no_trade
FROM unnest(CAST(:symbols AS text[]), CAST(:timeframes AS text[]), CAST(:befores AS interval[]))
    AS w(symbol, timeframe, before)
JOIN fks.series s ON s.symbol = w.symbol AND s.timeframe = w.timeframe
JOIN fks.sync_state st ON st.series_id = s.id
LEFT JOIN LATERAL (
    SELECT array_agg({_MICROS.format("gap_start")}) AS starts, array_agg({_MICROS.format("gap_end")}) AS ends,
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
    """The tail of every series in one query, however many they are; `Tail()` for those never synced.

    `before`: how far before its newest candle it begins, in microseconds.
    """
    wanted = {(one.symbol, one.timeframe.value): one for one in before}
    with database.begin() as connection:
        rows = connection.execute(
            sa.text(_TAILS),
            {
                "symbols": [symbol for symbol, _ in wanted],
                "timeframes": [timeframe for _, timeframe in wanted],
                "befores": [timedelta(microseconds=before[one]) for one in wanted.values()],
            },
        ).all()
    return dict.fromkeys(before, Tail()) | {wanted[row.symbol, row.timeframe]: _tail(row) for row in rows}


def _tail(row: sa.Row[Any]) -> Tail:
    starts, ends = np.array(row.starts or (), dtype=np.int64), np.array(row.ends or (), dtype=np.int64)
    quiet = np.array(row.no_trade or (), dtype=bool)
    return Tail(
        newest=row.newest,
        synced=None if row.first is None else TimeRange(row.first, row.last),
        covered=ledger.from_multirange(row.covered),
        absent=RangeSet.from_arrays(starts, ends),
        no_trade=RangeSet.from_arrays(starts[quiet], ends[quiet]),
    )


def recent_missing(database: Database, windows: Mapping[Series, TimeRange]) -> dict[Series, int]:
    """How many candles of each series that open in its window are missing within what was synced.

    Explained ones count too, those in which nothing traded do not. One query for all series.
    """
    found = dict.fromkeys(windows, 0)
    with database.begin() as connection:
        owners = _owners(connection, list(windows))
        rows = connection.execute(
            sa.text(
                f"SELECT g.series_id, {_MICROS.format('greatest(g.gap_start, w.low)')} AS first,"
                f"   {_MICROS.format('least(g.gap_end, w.high)')} AS last"
                " FROM unnest(CAST(:ids AS int[]), CAST(:lows AS timestamptz[]), CAST(:highs AS timestamptz[]))"
                "   AS w(id, low, high)"
                " JOIN fks.gap g ON g.series_id = w.id AND g.gap_end > w.low AND g.gap_start < w.high"
                "   AND g.status = ANY(:missing)"
            ),
            {
                "ids": list(owners),
                "lows": [to_datetime(windows[one].start) for one in owners.values()],
                "highs": [to_datetime(windows[one].end) for one in owners.values()],
                "missing": [status.value for status in _MISSING],
            },
        ).all()
    table = np.array([tuple(row) for row in rows], dtype=np.int64).reshape(-1, 3)
    for identity in np.unique(table[:, 0]).tolist():
        _, starts, ends = table[table[:, 0] == identity].T
        rank = grid_of(owners[identity]).rank
        found[owners[identity]] = int((rank(ends) - rank(starts)).sum())
    return found


def next_attempts(database: Database, series: Sequence[Series]) -> dict[Series, int]:
    """When the next gap of each series is requested again; series without such a gap are left out.

    An open gap that was never put off is due since it was found.
    """
    with database.begin() as connection:
        owners = _owners(connection, series)
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
    """The gaps in which something is missing, at most `most` of each series: open ones first, then the newest."""
    found: dict[Series, list[LedgerGap]] = {one: [] for one in series}
    with database.begin() as connection:
        owners = _owners(connection, series)
        rows = connection.execute(
            sa.text(
                "SELECT g.* FROM unnest(CAST(:ids AS int[])) AS w(id) CROSS JOIN LATERAL ("
                "   SELECT * FROM fks.gap WHERE series_id = w.id AND status = ANY(:missing)"
                "   ORDER BY status = :open DESC, gap_start DESC LIMIT :most) g"
                " ORDER BY g.series_id, g.status = :open DESC, g.gap_start DESC"
            ),
            {
                "ids": list(owners),
                "missing": [status.value for status in _MISSING],
                "open": GapStatus.OPEN.value,
                "most": most,
            },
        )
        for row in rows:
            found[owners[row.series_id]].append(ledger.gap_of(row))
    return {one: tuple(gaps) for one, gaps in found.items()}


@dataclass(frozen=True, slots=True)
class Absences:
    """What is missing of many series, `no_trade` left out, and what was synced of them.

    `gaps`: their ids, one per range of `missing`. Owners are indices into the series that were asked for.
    """

    synced: Spans
    missing: Spans
    gaps: NDArray[np.int64]


def absences(database: Database, series: Sequence[Series], window: TimeRange) -> Absences:
    """The absences of all `series` within `window`, cut to it, in two queries."""
    index = {one: position for position, one in enumerate(series)}
    with database.begin() as connection:
        owners = {identity: index[one] for identity, one in _owners(connection, series).items()}
        named = {"ids": list(owners), "from": to_datetime(window.start), "to": to_datetime(window.end)}
        synced = connection.execute(
            sa.text(
                f"SELECT s.series_id, {_MICROS.format('lower(r)')}, {_MICROS.format('upper(r)')}"
                " FROM fks.sync_state s, unnest(s.synced * tstzmultirange(tstzrange(:from, :to))) AS r"
                " WHERE s.series_id = ANY(:ids)"
            ),
            named,
        ).all()
        missing = connection.execute(
            sa.text(
                f"SELECT series_id, {_MICROS.format('greatest(gap_start, :from)')},"
                f"   {_MICROS.format('least(gap_end, :to)')}, id FROM fks.gap"
                " WHERE series_id = ANY(:ids) AND status <> 'filled' AND status <> 'no_trade'"
                "   AND gap_start < :to AND gap_end > :from"
            ),
            named,
        ).all()
    return Absences(
        _spans([*map(tuple, synced)], owners),
        _spans([*map(tuple, missing)], owners),
        np.array([row.id for row in missing], dtype=np.int64),
    )


def _spans(rows: Sequence[Sequence[int]], owners: Mapping[int, int]) -> Spans:
    """Rows of (series_id, start, end, ...) as columns."""
    table = np.array([(owners[row[0]], row[1], row[2]) for row in rows], dtype=np.int64).reshape(-1, 3)
    return Spans(table[:, 0], table[:, 1], table[:, 2])


@dataclass(frozen=True, slots=True)
class Told:
    """The state of a gap, and who was asked about it."""

    status: GapStatus
    providers: tuple[str, ...]


def told(database: Database, gaps: Sequence[int]) -> dict[int, Told]:
    """What the ledger says of gaps, by id."""
    with database.begin() as connection:
        rows = connection.execute(
            sa.text(
                "SELECT id, status, ARRAY(SELECT jsonb_array_elements(evidence)->>'provider') AS providers"
                " FROM fks.gap WHERE id = ANY(:ids)"
            ),
            {"ids": list(gaps)},
        )
        return {row.id: Told(GapStatus(row.status), tuple(row.providers)) for row in rows}


def listed_at(database: Database, series: Series, providers: Sequence[str]) -> int | None:
    """Since when one of `providers` has the symbol, as far as that was found out."""
    with database.begin() as connection:
        found = ledger.listings(connection, series.symbol)
    return min((found[name].listed_at for name in providers if name in found), default=None)


def _owners(connection: sa.Connection, series: Sequence[Series]) -> dict[int, Series]:
    """The series that were ever synced, by id."""
    wanted = {(one.symbol, one.timeframe.value): one for one in series}
    rows = connection.execute(
        sa.text(
            "SELECT s.id, s.symbol, s.timeframe FROM fks.series s"
            " JOIN unnest(CAST(:symbols AS text[]), CAST(:timeframes AS text[])) AS w(symbol, timeframe)"
            "   ON w.symbol = s.symbol AND w.timeframe = s.timeframe"
        ),
        {"symbols": [symbol for symbol, _ in wanted], "timeframes": [frame for _, frame in wanted]},
    )
    return {row.id: wanted[row.symbol, row.timeframe] for row in rows}
