"""The second opinion about implausible candles: they are held until another provider confirms them.

Belongs here: which candles of an answer are implausible beside those around them, and what becomes of them. Does not
belong here: the rule (`domain.plausibility`), the order of the providers (`fallback`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.continuity import difference
from fks_backfill_dagster.domain.delivery import Delivery
from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.plausibility import AROUND, implausible
from fks_backfill_dagster.domain.quality import Reason
from fks_backfill_dagster.domain.ranges import Instants, TimeRange, common, inside
from fks_backfill_dagster.ledger.gaps import missing_of
from fks_backfill_dagster.ledger.records import Outcome
from fks_backfill_dagster.pipeline.fetch.chain import ChainOptions, ProviderTask
from fks_backfill_dagster.pipeline.fetch.fetched import Fetched
from fks_backfill_dagster.pipeline.fetch.range_request import RangeRequest
from fks_backfill_dagster.pipeline.fetch.splice import only
from fks_backfill_dagster.pipeline.fetch.suspicion import StoredRows
from fks_backfill_dagster.pipeline.plan import GRACE
from fks_backfill_dagster.providers.base import Cancelled, ProviderError

_NONE = np.empty(0, dtype=np.int64)


class SecondOpinion:
    """The implausible candles of one span. `stored`: the rows that a refetch compares, None for other syncs."""

    def __init__(self, grid: Grid, options: ChainOptions, found: Fetched, stored: StoredRows | None) -> None:
        self.grid, self.options, self.found, self.stored = grid, options, found, stored
        self._held: list[tuple[ProviderTask, Delivery]] = []

    @property
    def held(self) -> Instants:
        """The opens of the candles that wait for another provider."""
        return np.concatenate([_NONE, *(delivery.candles.ts for _, delivery in self._held)])

    def hold(self, task: ProviderTask, delivery: Delivery) -> None:
        self._held.append((task, delivery))

    def implausible(self, task: ProviderTask, request: RangeRequest, theirs: Candles) -> Instants:
        """The opens of the wanted candles that are implausible among those around them, stored ones included.

        A price level may begin or end just outside the requested range. So a candle at the edge that is implausible
        among the known ones is compared with its outer neighbour, which is requested if it is not stored.
        """
        wanted = inside(task.wanted, request.window)
        known = theirs if len(theirs) > 2 * AROUND else self._with_neighbours(theirs)
        strange = common(known.ts[implausible(known)], wanted)
        if not len(strange) or len(unknown := self._beside(strange, request)) == 0:
            return self._not_as_stored(theirs, strange)
        known = self._with_neighbours(theirs)
        for ts in missing_of(unknown, known.ts).tolist():
            window = TimeRange(ts, int(self.grid.closes(np.array([ts]))[0]))
            try:
                one = task.request(replace(request, wanted=_NONE, window=window), self.found).candles
            except Cancelled:
                raise
            except ProviderError as error:  # the candle stays implausible until it is requested again
                self.found.requests += error.requests
                self.found.warnings.append(str(error))
                continue
            known = Candles.concat([known, one]).sorted()
        return self._not_as_stored(theirs, common(known.ts[implausible(known)], strange))

    def confirmed_by(self, theirs: Candles, wanted: Instants) -> list[Delivery]:
        """The wanted candles among the held ones that these candles confirm, unchanged; they are held no longer."""
        held, found = [], []
        for task, delivery in self._held:
            mine, its = only(delivery.candles, theirs.ts), only(theirs, delivery.candles.ts)
            good = only(delivery.candles, common(self._agreeing(mine, its), wanted))
            if len(good):
                found.append(delivery.with_candles(good))
                wanted = missing_of(wanted, good.ts)
            rest = delivery.candles.take(~np.isin(delivery.candles.ts, good.ts))
            if len(rest):
                held.append((task, delivery.with_candles(rest)))
        self._held = held
        return found

    def quarantine(self, wanted: Instants) -> None:
        """Quarantines the candles that no provider has confirmed; they are responses about the wanted ones."""
        for task, delivery in self._held:
            self.found.reject(delivery, delivery.candles, Reason.IMPLAUSIBLE)
            count = len(delivery.candles)
            self.found.warnings.append(
                f"{task.name}: {count} candle{'s' * (count != 1)} quarantined as implausible: a price is a"
                " factor of 50 or more from those around it, and no second provider agrees"
            )
            self.found.respond(
                task.evidence(Outcome.REJECTED, "quarantined as implausible"),
                common(delivery.candles.ts, wanted),
            )

    def _with_neighbours(self, theirs: Candles) -> Candles:
        """With the AROUND candles on either side that are stored or were found for this span."""
        if not len(theirs):
            return theirs
        low, high = self.grid.rank(theirs.ts[[0, -1]]).tolist()
        first, last = self.grid.at(np.array([max(low - AROUND, 0), high + AROUND])).tolist()
        window = TimeRange(first, last + 1)
        found = [self.options.stored_within(window)]
        found += [only(d.candles, self.grid.opens(window)) for d in self.found.deliveries]
        known = theirs
        for candles in reversed(found):  # new values take precedence over stored ones
            known = Candles.concat([known, candles.take(~np.isin(candles.ts, known.ts))]).sorted()
        return known

    def _beside(self, strange: Instants, request: RangeRequest) -> Instants:
        """The expected opens beside these candles that lie outside the requested window."""
        ranks = self.grid.rank(strange)
        beside = self.grid.at(np.union1d(np.maximum(ranks - 1, 0), ranks + 1))
        beside = beside[(beside < request.window.start) | (beside >= request.window.end)]
        return beside[(beside >= (request.since or 0)) & (beside < self.grid.closed_end(request.now - GRACE))]

    def _not_as_stored(self, theirs: Candles, strange: Instants) -> Instants:
        """The candles that are not stored with the same values: stored ones were confirmed by a second provider."""
        if self.stored is None or not len(strange):
            return strange
        mine, its = only(self.stored.candles, strange), only(theirs, strange)
        return missing_of(strange, self._agreeing(only(mine, its.ts), only(its, mine.ts)))

    def _agreeing(self, mine: Candles, its: Candles) -> Instants:
        """The opens of the candles that are the same within the tolerance; both have the same opens."""
        if not len(mine):
            return _NONE
        agrees: Instants = mine.ts[difference(mine, its).max(axis=0) <= self.options.tolerance]
        return agrees
