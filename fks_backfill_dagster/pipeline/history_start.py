"""The first candle of a series as a sync finds it: nothing is expected before it.

A sync commits in ascending order, so that the first candle of any provider is known when its batch is committed. What
it shows about the providers' claims of listing times is recorded at the end.

Belongs here: what the candles of one sync show about the beginning. Does not belong here: claims, and what they mean
for the requests (`listing`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import iso, to_micros
from fks_backfill_dagster.ledger.records import Outcome
from fks_backfill_dagster.pipeline.fetch.fetched import Fetched
from fks_backfill_dagster.pipeline.listing import Listings
from fks_backfill_dagster.pipeline.plan import Plan
from fks_backfill_dagster.store import ledger, queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.ledger import ListingKind


class HistoryStart:
    """The beginning of the history of a series, found by one sync. `warn` receives a sentence for each claim that the
    candles refute."""

    def __init__(self, database: Database, series: Series, warn: Callable[[str], None]) -> None:
        self.database, self.series, self.grid, self.warn = database, series, grid_of(series), warn
        # The open before which absent candles are not expected until one is found; None: there is no usable claim.
        self._claimed: int | None = None
        # The start of the expected candles, in the range of this plan and in all ranges of this sync.
        self._found: int | None = None
        self._earliest: int | None = None
        # Per provider the first candle, the first absent open, and the first open without a response.
        self._first_given: dict[str, int] = {}
        self._lacking: dict[str, int] = {}
        self._unknown: dict[str, int] = {}

    @cached_property
    def oldest(self) -> int | None:
        """The oldest stored candle before this sync."""
        states = queries.sync_status(self.database, self.series)
        return next((to_micros(s.oldest_data_time) for s in states if s.oldest_data_time), None)

    def begin(self, plan: Plan, listings: Listings) -> None:
        """Begins a plan. A claim is not used if the plan begins after it, or the series has candles from before the
        plan."""
        claimed = listings.beginning(self.grid)
        if claimed is not None and (
            plan.window.start >= claimed or (self.oldest is not None and self.oldest < plan.window.start)
        ):
            claimed = None
        self._claimed, self._found = claimed, None

    def note(self, fetched: Fetched) -> None:
        """Records for each provider the first candle of a span, the first absent one, and the first one without a
        response."""
        for name, candles in fetched.seen.items():
            if len(candles):
                first = int(candles.ts[0])
                self._first_given[name] = min(first, self._first_given.get(name, first))
        for response in fetched.responses:
            if not len(response.opens):
                continue
            name, first = response.evidence.provider, int(response.opens[0])
            known = self._lacking if response.evidence.outcome is Outcome.ABSENT else self._unknown
            known[name] = min(first, known.get(name, first))

    def cut(self, window: TimeRange, first: int | None) -> TimeRange:
        """The part of a batch in which candles are expected; `first` is the first candle that a provider gave."""
        if self._claimed is None or self._found is not None:
            return window
        if first is None and window.end <= self._claimed:
            return TimeRange(window.end, window.end)
        self._found = max(window.start, self._claimed if first is None else min(first, self._claimed))
        self._earliest = min(self._found, self._earliest or self._found)
        return TimeRange(min(self._found, window.end), window.end)

    def expected(self, window: TimeRange) -> TimeRange:
        """The window from the first candle of the symbol on."""
        begin = self._claimed if self._earliest is None else self._earliest
        if begin is not None and self.oldest is not None:
            begin = min(begin, self.oldest)
        if begin is None or window.start >= begin:
            return window
        return TimeRange(min(begin, window.end), window.end)

    def refuted(self, listings: Listings) -> set[str]:
        """The providers with candles that closed before their own claim."""
        step = self.series.timeframe.micros
        return {
            name
            for name, claim in listings.claims.items()
            if self._first_given.get(name, claim.listed_at) + step <= claim.listed_at
        }

    def remember(self, plan: Plan, listings: Listings) -> Listings:
        """Stores an observation for each provider without a valid claim whose candles begin after an absence. Returns
        the updated listings."""
        if not plan.batches:
            return listings
        refuted = self.refuted(listings)
        for name in sorted(refuted):
            self.warn(
                f"{name} lists {self.series.symbol} since {iso(listings.claims[name].listed_at)}, but has candles"
                f" from {iso(self._first_given[name])} on: its claim is ignored"
            )
        listings = listings.without(refuted)
        beginnings = {}
        for name in listings.silent:
            # Without any candle: it has none before another provider's claim, if everything up to it was requested.
            otherwise = listings.earliest if (listings.earliest or 0) < plan.window.end else None
            first = self._first_given.get(name, otherwise)
            if first is None or (listings.earliest is None and name not in listings.refuted):
                continue
            if self._lacking.get(name, first) < first <= self._unknown.get(name, first):
                beginnings[name] = first
        with self.database.begin() as connection:
            for name, first in sorted(beginnings.items()):
                ledger.remember_listing(connection, name, self.series.symbol, first, ListingKind.OBSERVATION)
        return listings.shown(beginnings)
