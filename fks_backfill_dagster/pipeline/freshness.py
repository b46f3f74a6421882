"""How fresh series are: their tails from the database, measured by the grid. Reads, changes nothing.

Belongs here: which candles of a tail are quiet, whether an outage of the venue is the reason, the sentence
about it. Does not belong here: the arithmetic (`domain.freshness`), where a result is reported (the faces).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fks_backfill_dagster.domain.freshness import Freshness, Thresholds, Verdict, assess, polling_interval
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.outages import venue_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, to_datetime
from fks_backfill_dagster.pipeline.outages import Outage, find_outages
from fks_backfill_dagster.pipeline.plan import GRACE
from fks_backfill_dagster.providers.base import Provider
from fks_backfill_dagster.store.checking import Tail, tails
from fks_backfill_dagster.store.database import Database

# An outage that goes on is seen in its last week, however long it is.
_OUTAGE_HORIZON = 7 * MICROS_PER_DAY


@dataclass(frozen=True, slots=True)
class Rule:
    """What is lag by the settings: the thresholds, the publication delay of a series, its end (None: it goes
    on), and the series among which an outage of a venue is recognised."""

    thresholds: Thresholds = Thresholds()  # noqa: RUF009 - frozen
    publication_delay: Callable[[Series], int] = lambda series: 0
    end_of: Callable[[Series], int | None] = lambda series: None
    venue_members: Sequence[Series] = ()


@dataclass(frozen=True, slots=True)
class Assessment:
    """The freshness of a series, and the outage of its venue that is in its tail, if there is one."""

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
            text = f"nothing is expected any more: {newest}"
        elif not lag:
            text = f"up to date: {newest}"
        else:
            text = f"{lag:,} closed {'candle' if lag == 1 else 'candles'} behind, {found.allowed:,} allowed: {newest}"
        if self.outage is not None:
            symbols = f"{len(self.outage.symbols):,} of {self.outage.synced:,} symbols"
            text += f"; outage of {self.outage.venue}: {symbols} lack candles"
        return text


def freshness(database: Database, series: Sequence[Series], now: int, rule: Rule) -> dict[Series, Assessment]:
    """The freshness of every series at `now`, in one query.

    Where one of them lacks candles that are overdue, four more look for an outage of its venue: a series in
    it is late from its first overdue candle on.
    """
    ends = tails(database, series)
    quiet = quiet_tails(ends)
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


def quiet_tails(ends: Mapping[Series, Tail]) -> dict[Series, int]:
    """How many candles after the newest one are quiet, by the ledger: they are no lag."""
    return {one: tail.quiet for one, tail in ends.items()}


def publication_delay(providers: Mapping[str, Provider], priority: Sequence[str], series: Series) -> int:
    """The delay, in microseconds, of the quickest provider that can be requested for the series; 0 without any."""
    able = (providers[name] for name in priority if name in providers)
    delays = [
        one.capabilities.publication_delay
        for one in able
        if one.capabilities.serve(series) and one.missing_key() is None
    ]
    return min(delays, default=0)


def behind(database: Database, series: Series, until: int) -> int | None:
    """How many expected candles that open before `until` follow the newest stored one, quiet ones taken out.

    None where nothing was ever synced.
    """
    tail = tails(database, [series])[series]
    if tail.newest is None and tail.synced is None:
        return None
    start = tail.newest + 1 if tail.newest is not None else tail.synced.start if tail.synced else until
    missing = grid_of(series).count(TimeRange(start, until)) if start < until else 0
    return max(0, missing - quiet_tails({series: tail})[series])


def _outages(database: Database, found: Mapping[Series, Freshness], now: int, rule: Rule) -> Sequence[Outage]:
    venues = {venue_of(one) for one, state in found.items() if state.overdue and not state.ended}
    members = [one for one in rule.venue_members if venue_of(one) in venues]
    if not members:
        return ()
    return find_outages(database, members, TimeRange(max(0, now - _OUTAGE_HORIZON), now), rule.end_of)


def _assessment(series: Series, found: Freshness, outages: Sequence[Outage], now: int) -> Assessment:
    if not found.overdue or found.ended:
        return Assessment(found)
    tail = TimeRange(min(now, 0 if found.newest is None else found.newest + 1), now)
    for outage in outages:
        if outage.venue == venue_of(series) and series.symbol in outage.symbols:
            common = tail.intersect(outage.window)
            if grid_of(series).count(common):
                late = replace(found, verdict=Verdict.LATE) if found.fresh else found
                return Assessment(late, outage)
    return Assessment(found)
