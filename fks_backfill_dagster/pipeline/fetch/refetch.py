"""A refetch: the first provider's candles are compared with the stored ones before they replace them.

Belongs here: what a refetch does besides fetching: the guard against another symbol's candles, and stored candles
that their provider no longer returns. Does not belong here: the evaluation of a difference (`suspicion`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.delivery import Origin
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import Instants, TimeRange, common
from fks_backfill_dagster.ledger.gaps import missing_of
from fks_backfill_dagster.pipeline.fetch.chain import ProviderChain, ProviderTask
from fks_backfill_dagster.pipeline.fetch.fetched import Fetched, Withdrawn
from fks_backfill_dagster.pipeline.fetch.range_request import ProviderAnswer, RangeRequest
from fks_backfill_dagster.pipeline.fetch.suspicion import StoredRows, Suspicion, confirmed, suspicion
from fks_backfill_dagster.providers.base import Cancelled, Provider, ProviderError

_NONE = np.empty(0, dtype=np.int64)


class Refetch:
    """The state of a refetch of one span. Stored candles are compared with the first provider only.

    spliced: the first provider's candles contradict the stored ones beside the range. protected: stored candles whose
    new values are implausible, replaced only if a second provider confirms them.
    """

    def __init__(self, chain: ProviderChain, stored: StoredRows) -> None:
        self.chain, self.stored = chain, stored
        self.spliced = False
        self.protected = _NONE
        # The opens that two complete responses of the first provider lack, and its origin.
        self._gone = _NONE
        self._gone_origin: Origin | None = None
        # Stored candles of the first provider that it does not return now.
        self._unreturned = _NONE

    def note_absent(self, answer: ProviderAnswer) -> None:
        """Records the confirmed absences of the first provider that lie between its candles."""
        if not answer.kept:
            return
        theirs = answer.candles.ts
        between = answer.confirmed[(answer.confirmed > theirs[0]) & (answer.confirmed < theirs[-1])]
        self._gone, self._gone_origin = np.union1d(self._gone, between), answer.kept[0].origin

    def compare(
        self,
        task: ProviderTask,
        found: Fetched,
        providers: Mapping[str, Provider],
        held: Instants,
    ) -> Instants:
        """Compares the first provider's candles with the stored ones; `held`: its implausible ones.

        Returns the opens that need no other provider: of the stored candles only those with implausible new values
        need a second opinion.
        """
        self._guard(task, found, providers)
        delivered = self.stored.delivered_by(task.name, task.provider.instrument(self.chain.series))
        self._gone = common(self._gone, delivered)
        self._unreturned = missing_of(
            common(delivered, found.requested), found.seen.get(task.name, Candles.empty()).ts
        )
        kept = missing_of(self.stored.candles.ts, self._gone)
        self.protected = np.intersect1d(kept, held)
        return missing_of(kept, held)

    def withdraw(self, found: Fetched, providers: Iterable[str]) -> None:
        """Withdraws stored candles that no provider has any more: all other eligible ones responded without them."""
        if not len(self._gone) or self._gone_origin is None:
            return
        gone, kept = self._gone, []
        for delivery in found.deliveries:
            # Another provider has it: the stored candle stays.
            kept.append(
                delivery.with_candles(delivery.candles.take(~np.isin(delivery.candles.ts, self._gone)))
            )
            gone = missing_of(gone, delivery.candles.ts)
        for name in {*providers, *(self.chain.options.eligible - self.chain.dropped.keys())}:
            about = [r.opens for r in found.responses if r.evidence.provider == name and r.evidence.final]
            gone = common(gone, np.unique(np.concatenate([_NONE, *about])))
        found.deliveries = [d for d in kept if len(d.candles)]
        if len(gone) and not found.failed:
            found.withdrawn.append(Withdrawn(self._gone_origin, gone))

    def warn_about_kept(self, found: Fetched) -> None:
        """Adds the warning about stored candles that were not returned and are kept."""
        withdrawn = np.unique(np.concatenate([_NONE, *(one.opens for one in found.withdrawn)]))
        kept = missing_of(self._unreturned, withdrawn)
        if len(kept) and not found.failed:
            found.warnings.append(
                f"{len(kept):,} stored candles were not returned by their provider, and are kept"
            )

    def _guard(self, task: ProviderTask, found: Fetched, providers: Mapping[str, Provider]) -> None:
        """Refuses deliveries that differ from the stored candles like those of another symbol, unless a second
        provider agrees; see `suspicion`."""
        options = self.chain.options
        if options.force:
            return
        for delivery in list(found.deliveries):
            suspected = suspicion(self.stored, delivery, options.tolerance, certain=self.spliced)
            if suspected is None or self._confirmed_elsewhere(suspected, task, found, providers):
                continue
            found.deliveries = [d for d in found.deliveries if d is not delivery]
            found.failed = True
            found.errors.append(
                f"{task.name}: {suspected.differ:,} of {suspected.compared:,} compared candles of"
                f" {self.chain.series} differ by more than {options.tolerance:.2%} from the stored ones, and no"
                " other provider confirms them: nothing of them was written; --force writes them"
            )

    def _confirmed_elsewhere(
        self, suspected: Suspicion, task: ProviderTask, found: Fetched, providers: Mapping[str, Provider]
    ) -> bool:
        grid = grid_of(self.chain.series)
        for name, provider in providers.items():
            if name == task.name or self.chain.cool_down(name) is not None:
                continue
            sample = self.chain.task(name, provider, suspected.given.ts, first=False)
            if not len(sample.wanted):
                continue
            window = TimeRange(int(sample.wanted[0]), int(grid.closes(sample.wanted[-1:])[0]))
            try:
                request = RangeRequest(
                    self.chain.series, sample.wanted, window, sample.requested_at, sample.since
                )
                answer = sample.request(request, found)
            except Cancelled:
                raise
            except ProviderError as error:
                found.requests += error.requests
                found.errors.append(str(error))
                continue
            verdict = confirmed(suspected, answer.candles, self.chain.options.tolerance)
            if verdict is not None:
                return verdict
        return False
