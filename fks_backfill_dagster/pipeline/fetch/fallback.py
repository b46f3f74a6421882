"""Fallback: one span of a sync, requested from the providers in order, each for the candles still missing.

Belongs here: fallback per candle, and what each answer means for the missing ones. Does not belong here: the state
of the providers during a sync (`chain`), the request to one provider (`request`), the comparison with stored candles
(`splice`, `refetch`), storing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.delivery import holding_rejected
from fks_backfill_dagster.domain.grid import Grid, grid_of
from fks_backfill_dagster.domain.quality import Reason
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange, common, inside
from fks_backfill_dagster.ledger.gaps import missing_of
from fks_backfill_dagster.ledger.records import Evidence, Outcome
from fks_backfill_dagster.ledger.settle import surroundings
from fks_backfill_dagster.pipeline.fetch.chain import ProviderChain, ProviderTask, neighbours
from fks_backfill_dagster.pipeline.fetch.fetched import Fetched, Tally
from fks_backfill_dagster.pipeline.fetch.range_request import ProviderAnswer, RangeRequest
from fks_backfill_dagster.pipeline.fetch.refetch import Refetch
from fks_backfill_dagster.pipeline.fetch.second_opinion import SecondOpinion
from fks_backfill_dagster.pipeline.fetch.splice import only, splice
from fks_backfill_dagster.pipeline.fetch.suspicion import SUSPICIOUS_CANDLES
from fks_backfill_dagster.pipeline.plan import Batch, Plan, Scope
from fks_backfill_dagster.providers.base import Cancelled, NotEntitled, ProviderError, TooOld, UnknownSymbol

_NONE = np.empty(0, dtype=np.int64)


def fetch_span(
    chain: ProviderChain, batches: Sequence[Batch], plan: Plan, *, without: frozenset[str] = frozenset()
) -> Fetched:
    """Requests one span from the chain's providers, except those of `without`. Errors of providers are part of the
    result and not raised. Thread-safe."""
    return _Span(chain, batches, plan).run(without)


class _Span:
    """The fetch of one span: the opens still wanted, and the candles found."""

    def __init__(self, chain: ProviderChain, batches: Sequence[Batch], plan: Plan) -> None:
        self.chain, self.plan = chain, plan
        self.series, self.options = chain.series, chain.options
        self.grid = grid_of(self.series)
        self.found = Fetched()
        self.wanted = np.concatenate(
            [_NONE, *(self.grid.opens(p) for batch in batches for p in batch.wanted)]
        )
        self.requested = self.found.requested = self.wanted
        self.refetch: Refetch | None = None
        if plan.scope is Scope.EVERYTHING:
            window = TimeRange(int(self.wanted[0]), int(self.wanted[-1]) + 1)
            self.refetch = Refetch(chain, self.options.stored_rows(window))
        stored = None if self.refetch is None else self.refetch.stored
        self.opinion = SecondOpinion(self.grid, self.options, self.found, stored)
        # What complete responses lack.
        self._absent = RangeSet()

    def run(self, without: frozenset[str]) -> Fetched:
        found, first = self.found, True
        dropped = self.chain.dropped
        providers = self.chain.available(without | dropped.keys())
        now = self.options.clock()
        for name, why in dropped.items():
            found.respond(Evidence(name, now, Outcome.REFUSED, why), self.requested)
        for name, provider in providers.items():
            if not len(self.wanted) or self.chain.stopped:
                break
            task = self.chain.task(name, provider, self.wanted, first=first)
            for opens, why in task.excluded:
                found.respond(task.evidence(Outcome.REFUSED, why), opens)
            if not len(task.wanted):  # known without a request: it cannot have them
                continue
            self._request_task(task)
            if first and self.refetch is not None:
                settled = self.refetch.compare(task, found, providers, self.opinion.held)
                self.wanted = missing_of(self.wanted, settled)
            first = False
        self.opinion.quarantine(self.wanted)
        if self.refetch is not None:
            self.refetch.withdraw(found, providers)
        return self._concluded(dropped.keys())

    def _concluded(self, dropped: Collection[str]) -> Fetched:
        """The result, with its flags."""
        found = self.found
        responses = [r for r in found.responses if r.evidence.provider not in dropped]
        any_seen = bool(found.seen)
        missing = missing_of(self.requested, found.delivered)
        found.failed = found.failed or (not any_seen and (self.refetch is not None or len(missing) > 0))
        if found.failed and not found.errors:
            found.errors = list(
                dict.fromkeys(f"{r.evidence.provider}: {r.evidence.detail}" for r in responses)
            )
        found.recordable = any_seen or bool(responses)
        if self.refetch is not None:
            self.refetch.warn_about_kept(found)
        return found

    # --- requests

    def _request_task(self, task: ProviderTask) -> None:
        """Requests the wanted opens from one provider."""
        name, found, count = task.name, self.found, len(task.wanted)
        message = self.chain.cool_down(name)
        if message is not None:
            self.chain.count(name, Tally(asked=count, failed=count))
            found.errors.append(f"{name}: {message}")
            self.found.respond(task.evidence(Outcome.ERROR, message), task.wanted)
            return
        before, rejected = len(self.wanted), sum(len(r.candles) for r in found.rejected)
        done = _NONE
        try:
            for hull in task.hulls(self.series):
                self._request_hull(task, hull)
                done = np.concatenate([done, inside(task.wanted, hull)])
        except Cancelled:
            raise
        except ProviderError as error:
            found.requests += error.requests
            delivered = before - len(self.wanted)
            left = missing_of(task.wanted, done)
            if isinstance(error, TooOld) and len(left) and int(left[0]) < error.since:
                self._request_newer(task, error, left, delivered)
                return
            self.chain.count(name, Tally(asked=count, delivered=delivered, failed=count - delivered))
            if isinstance(error, UnknownSymbol):
                self.chain.drop(name, error)
            else:
                found.warnings += self.chain.remember_failure(name, error)
            found.errors.append(str(error))
            # A wrong key or a changed address is corrected by the operator and is no evidence about the candles.
            final = isinstance(error, UnknownSymbol | NotEntitled)
            self.found.respond(task.evidence(Outcome.REFUSED if final else Outcome.ERROR, str(error)), left)
            return
        found.warnings += self.chain.remember_success(name)
        rejected = sum(len(r.candles) for r in found.rejected) - rejected
        self.chain.count(name, Tally(asked=count, delivered=before - len(self.wanted), rejected=rejected))

    def _request_newer(self, task: ProviderTask, error: TooOld, left: Instants, delivered: int) -> None:
        """Like `_request_task`, for the part that the key covers, after a refusal of the older part."""
        name = task.name
        self.chain.remember_depth(name, error.since)
        older = left[left < error.since]
        self.chain.count(name, Tally(asked=delivered + len(older), delivered=delivered, failed=len(older)))
        self.found.respond(task.evidence(Outcome.REFUSED, str(error)), older)
        newer = self.chain.task(name, task.provider, common(self.wanted, left), first=task.first)
        if not len(newer.wanted):
            self.found.errors.append(str(error))
            return
        self.found.warnings.append(str(error))
        self._request_task(newer)

    def _request_hull(self, task: ProviderTask, hull: TimeRange) -> None:
        beside = self._stored_beside(hull)
        window = task.window(hull, _joined(hull, beside.ts, self.grid), self.grid)
        parts = replace(self.series, timeframe=task.provider.capabilities.parts(self.series))
        request = RangeRequest(
            series=self.series,
            wanted=inside(task.wanted, hull),
            window=window,
            now=task.requested_at,
            since=task.since,
            closed=self.options.closed(parts, surroundings(window, grid_of(parts))),
            declared=self.options.declared(parts),
            absent_elsewhere=self._absent,
            tolerance=self.options.tolerance,
        )
        answer = task.request(request, self.found)
        found = self._splice(task, answer.candles, hull, beside)
        if found is not None and task.first:
            # A second request distinguishes one wrong response from another market.
            answer = task.request(request, self.found)
            found = self._splice(task, answer.candles, hull, beside)
        strange = self.opinion.implausible(task, request, answer.candles)
        self._accept(task, answer, hull, found, strange)

    # --- answers

    def _accept(
        self,
        task: ProviderTask,
        answer: ProviderAnswer,
        hull: TimeRange,
        spliced: float | None,
        strange: Instants,
    ) -> None:
        """Keeps the wanted candles of an answer, and records the responses about the others.

        `spliced`: the difference beside the hull, if it is a splice. `strange`: the opens of implausible candles.
        """
        found, theirs = self.found, answer.candles
        found.rejected += answer.rejected
        found.see(task.name, theirs)
        requested = inside(task.wanted, hull)
        if spliced is not None and self.refetch is not None and task.first:
            self.refetch.spliced = True  # its guard decides
        elif spliced is not None:
            found.warnings.append(
                f"{task.name}: its candles of {hull} are quarantined as a splice: beside them it differs by"
                f" {spliced:.2%} from what is stored, so it quotes another market"
            )
            for delivery in answer.kept:
                found.reject(delivery, only(delivery.candles, self.wanted), Reason.SPLICE)
            self.found.respond(task.evidence(Outcome.ABSENT, "it quotes another market"), requested)
            return
        found.actions += answer.actions
        for delivery in self.opinion.confirmed_by(theirs, self.wanted):
            found.deliveries.append(delivery)
            self.wanted = missing_of(self.wanted, delivery.candles.ts)
        protected = _NONE if self.refetch is None else self.refetch.protected
        for delivery in answer.kept:
            good = only(delivery.candles, missing_of(self.wanted, protected))
            odd = np.isin(good.ts, strange)
            if odd.any():
                self.opinion.hold(task, delivery.with_candles(good.take(odd)))
                good = good.take(~odd)
            if len(good):
                found.deliveries.append(delivery.with_candles(good))
                self.wanted = missing_of(self.wanted, good.ts)
        self._respond_missing(task, answer)
        if self.refetch is not None and task.first:
            self.refetch.note_absent(answer)
        if task.provider.capabilities.omits_no_trade:
            self._absent |= answer.absent

    def _respond_missing(self, task: ProviderTask, answer: ProviderAnswer) -> None:
        """Records the provider's response about each candle that it did not return."""
        lacking = missing_of(answer.lacking, answer.pending)
        if len(answer.pending):
            count, why = len(answer.pending), f"{answer.clocks}: not closed there yet"
            self.found.respond(task.evidence(Outcome.ERROR, why), answer.pending)
            self.found.warnings.append(
                f"{task.name}: {count:,} candle{'s are' if count > 1 else ' is'} requested again later: {why}"
            )
        if answer.error is not None:
            why = f"its second request failed: {answer.error}"
            self.found.respond(task.evidence(Outcome.ERROR, why), lacking)
            return
        bad = lacking[holding_rejected(lacking, answer.rejected, self.grid)]
        if len(bad):
            rows = sum(len(part.candles) for part in answer.rejected)
            self.found.respond(task.evidence(Outcome.REJECTED, f"{rows} rows quarantined"), bad)
        lacking = missing_of(lacking, bad)
        for detail, opens in answer.partial:
            mine = common(opens, lacking)
            self.found.respond(task.evidence(Outcome.ABSENT, detail), mine)
            lacking = missing_of(lacking, mine)
        sure = common(answer.confirmed, lacking) if task.provider.capabilities.omits_no_trade else _NONE
        self.found.respond(task.evidence(Outcome.ABSENT, confirmed=True), sure)
        self.found.respond(task.evidence(Outcome.ABSENT), missing_of(lacking, sure))

    # --- neighbours

    def _splice(self, task: ProviderTask, theirs: Candles, hull: TimeRange, stored: Candles) -> float | None:
        """The difference of the provider's candles beside the hull, if it quotes another market; else None.

        `stored`: the neighbours of the hull that were stored before this sync.
        """
        beside = theirs.take((theirs.ts < hull.start) | (theirs.ts >= hull.end))
        fresh = Candles.concat([only(d.candles, beside.ts) for d in self.found.deliveries]).sorted()
        compared = missing_of(beside.ts, fresh.ts)
        since = missing_of(compared, stored.ts)  # stored by an earlier span of this sync
        kept = self.options.stored(since) if len(since) else Candles.empty()
        ours = Candles.concat([fresh, only(stored, compared), kept]).sorted()
        return splice(ours, beside, self.options.tolerance, first=task.first)

    def _stored_beside(self, hull: TimeRange) -> Candles:
        """The neighbours of the hull that were stored before this sync. A refetch needs them only if it compares
        too few candles for its guard."""
        if self.refetch is not None and len(self.requested) >= SUSPICIOUS_CANDLES:
            return Candles.empty()
        opens = np.concatenate(neighbours(hull, self.grid))
        return self.options.stored(opens[~self.plan.missing_ranges.contains(opens)])


def _joined(hull: TimeRange, opens: Instants, grid: Grid) -> TimeRange:
    """The hull with its neighbours that open at `opens`."""
    if not len(opens):
        return hull
    return TimeRange(min(hull.start, int(opens[0])), max(hull.end, int(grid.closes(opens[-1:])[0])))
