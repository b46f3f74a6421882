"""Freshness of series: their tails from the database, measured by the grid. Read-only.

Belongs here: which candles of a tail are quiet, whether an outage of the venue is the cause, the sentence
about it. Does not belong here: the arithmetic (`domain.freshness`), the reports (the user interfaces).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fks_backfill_dagster.domain.closures import market_closures
from fks_backfill_dagster.domain.freshness import (
    Freshness,
    Thresholds,
    Verdict,
    assess,
    polling_interval,
    recent_start,
)
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, to_datetime
from fks_backfill_dagster.ledger.no_trade import NEIGHBOURS, Absent, quiet_tail
from fks_backfill_dagster.pipeline.eligible import eligible
from fks_backfill_dagster.pipeline.outages import Outage, find_outages
from fks_backfill_dagster.pipeline.plan import GRACE
from fks_backfill_dagster.providers.base import Provider
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.reaches import Tail, tails

Closed = Callable[[Series, TimeRange], RangeSet]

_NONE = np.empty(0, dtype=np.int64)

# The largest ratio of the time between opens to the length of the candles in a market that closes at night and at
# weekends, and the time that holidays add.
_OPEN = {
    AssetClass.CRYPTO: (1, 0),
    AssetClass.FOREX: (2, 4 * MICROS_PER_DAY),
    AssetClass.STOCKS: (7, 7 * MICROS_PER_DAY),
}

# An ongoing outage is visible in its last week, however long it is.
_OUTAGE_HORIZON = 7 * MICROS_PER_DAY


@dataclass(frozen=True, slots=True)
class Rule:
    """The freshness settings: the thresholds, the publication delay of a series, its end (None: open-ended), where
    its market was closed within a window although candles are expected, and the series among which an outage of a
    venue is recognised."""

    thresholds: Thresholds = Thresholds()  # noqa: RUF009 - frozen
    publication_delay: Callable[[Series], int] = lambda series: 0
    end_of: Callable[[Series], int | None] = lambda series: None
    closed: Closed = lambda series, window: market_closures(series, (), window)
    venue_members: Sequence[Series] = ()


@dataclass(frozen=True, slots=True)
class Assessment:
    """The freshness of a series, and the outage of its venue in its tail, if there is one."""

    freshness: Freshness
    outage: Outage | None = None

    def __str__(self) -> str:
        """One sentence, without the series."""
        found = self.freshness
        if found.verdict is Verdict.PENDING:
            return "never synced: no candle is stored"
        lag = found.lag or 0
        newest = "no candle is stored"
        if found.newest is not None:
            newest = f"the newest candle opens at {to_datetime(found.newest):%Y-%m-%d %H:%M}"
        if found.ended:
            text = f"no further candle is expected: {newest}"
        elif not lag:
            text = f"up to date: {newest}"
        else:
            text = f"{lag:,} closed {'candle' if lag == 1 else 'candles'} behind, {found.allowed:,} allowed: {newest}"
        if self.outage is not None:
            symbols = f"{len(self.outage.symbols):,} of {self.outage.synced:,} symbols"
            text += f"; outage of {self.outage.venue}: {symbols} miss candles"
        return text


def freshness(database: Database, series: Sequence[Series], now: int, rule: Rule) -> dict[Series, Assessment]:
    """The freshness of every series at `now`, in one query.

    If candles of a series are overdue, four more queries look for an outage of its venue: an affected series is
    late from its first overdue candle on.
    """
    ends = read_tails(database, series)
    closed_end = {one: _closed_end(one, now, rule) for one in series}
    quiet = quiet_tails(ends, closed_end, rule.closed)
    found = {
        one: assess(
            grid_of(one),
            ends[one].newest,
            ends[one].synced,
            now - GRACE,
            delay=polling_interval(one.timeframe) + rule.publication_delay(one),
            quiet_tail=quiet[one],
            end=rule.end_of(one),
            thresholds=rule.thresholds,
        )
        for one in series
    }
    outages = _outages(database, found, now, rule)
    return {one: _assessment(one, state, outages, now) for one, state in found.items()}


def read_tails(database: Database, series: Sequence[Series]) -> dict[Series, Tail]:
    """The tail of every series, with the candles before its newest one that decide what is quiet; one query."""
    return tails(database, {one: _neighbourhood(one) for one in series})


def quiet_tails(
    ends: Mapping[Series, Tail], until: Mapping[Series, int], closed: Closed
) -> dict[Series, int]:
    """How many candles after the newest one of each series, and before `until`, are quiet, that is, no lag.

    They are no-trade by the ledger, the market was closed, or so few are absent that they fit the density of trades
    before them (`ledger.no_trade`), so that no candle is known to be missing.
    """
    return {one: _quiet_tail(one, tail, until[one], closed) for one, tail in ends.items()}


def _quiet_tail(series: Series, tail: Tail, until: int, closed: Closed) -> int:
    after, grid = _after_newest(tail, until), grid_of(series)
    if not grid.count(after):
        return 0
    # One candle more than the neighbourhood: a run that begins before it must not look like one that begins in it.
    first = grid.rank(np.array([after.start])) - NEIGHBOURS - 1
    before = TimeRange(min(after.start, int(grid.at(np.maximum(first, 0))[0])), after.start)
    shut = closed(series, TimeRange(before.start, until)) | (tail.no_trade & RangeSet([after]))
    opens = np.concatenate([_NONE, *(grid.opens(part) for part in tail.absent & RangeSet([before]))])
    decided = tail.no_trade.contains(opens)
    absent = Absent(opens, np.zeros_like(decided), np.zeros_like(decided), decided)
    return quiet_tail(absent, tail.covered & RangeSet([before]), grid, shut, after)


def _after_newest(tail: Tail, until: int) -> TimeRange:
    """The range after the newest candle; from the start of the coverage if there is none."""
    synced_from = until if tail.synced is None else tail.synced.start
    first = synced_from if tail.newest is None else tail.newest + 1
    return TimeRange(min(first, until), until)


def _closed_end(series: Series, now: int, rule: Rule) -> int:
    """The end of the expected candles at `now`."""
    closed, end = grid_of(series).closed_end(now - GRACE), rule.end_of(series)
    return closed if end is None else min(closed, end)


def _neighbourhood(series: Series) -> int:
    """The microseconds in which a market has at least NEIGHBOURS candles of the series."""
    share, away = _OPEN[series.asset_class]
    return NEIGHBOURS * series.timeframe.micros * share + away


def publication_delay(providers: Mapping[str, Provider], priority: Sequence[str], series: Series) -> int:
    """The delay, in microseconds, of the fastest eligible provider of the series; 0 without any."""
    found = eligible(providers, series, priority).providers.values()
    return min((one.capabilities.publication_delay for one in found), default=0)


def behind(database: Database, series: Series, until: int, closed: Closed) -> int | None:
    """How many expected candles that open before `until` follow the newest stored one, without the quiet ones.

    None if the series was never synced.
    """
    ends = read_tails(database, [series])
    if ends[series].newest is None and ends[series].synced is None:
        return None
    count = grid_of(series).count(_after_newest(ends[series], until))
    return count - quiet_tails(ends, {series: until}, closed)[series]


def is_quiet_end(database: Database, series: Series, window: TimeRange, closed: Closed) -> bool:
    """Whether a window lies after the newest candle, and all candles that are absent up to its end are quiet."""
    tail = read_tails(database, [series])[series]
    if tail.newest is None or tail.newest >= window.start:
        return False
    count = grid_of(series).count(_after_newest(tail, window.end))
    return quiet_tails({series: tail}, {series: window.end}, closed)[series] == count


def recent_windows(
    database: Database, series: Sequence[Series], now: int, rule: Rule
) -> dict[Series, TimeRange]:
    """The range of each series in which an absent candle is recent at `now`, without a tail that is no lag."""
    ends = read_tails(database, series)
    until = {one: _closed_end(one, now, rule) for one in series}
    quiet = quiet_tails(ends, until, rule.closed)
    found = {}
    for one in series:
        after, grid = _after_newest(ends[one], until[one]), grid_of(one)
        end = after.start if quiet[one] == grid.count(after) else after.end
        found[one] = TimeRange(min(recent_start(grid, now - GRACE), end), end)
    return found


def _outages(database: Database, found: Mapping[Series, Freshness], now: int, rule: Rule) -> Sequence[Outage]:
    venues = {one.instrument.venue for one, state in found.items() if state.overdue and not state.ended}
    members = [one for one in rule.venue_members if one.instrument.venue in venues]
    if not members:
        return ()
    return find_outages(database, members, TimeRange(max(0, now - _OUTAGE_HORIZON), now), rule.end_of)


def _assessment(series: Series, found: Freshness, outages: Sequence[Outage], now: int) -> Assessment:
    if not found.overdue or found.ended:
        return Assessment(found)
    tail = TimeRange(min(now, 0 if found.newest is None else found.newest + 1), now)
    for outage in outages:
        if outage.venue == series.instrument.venue and series.symbol in outage.symbols:
            common = tail.intersect(outage.window)
            if grid_of(series).count(common):
                late = replace(found, verdict=Verdict.LATE) if found.fresh else found
                return Assessment(late, outage)
    return Assessment(found)
