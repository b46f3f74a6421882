"""Fallback: the providers of one sync in order of priority; each is requested for the candles still missing.

Belongs here: fallback per candle, the state of a provider during a sync, the second opinion about implausible
candles. Does not belong here: the request to one provider (`request`), the comparison with stored candles
(`splice`), storing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.continuity import difference
from fks_backfill_dagster.domain.delivery import Delivery, Origin, RejectedRows, holding_rejected
from fks_backfill_dagster.domain.derive import parts_span
from fks_backfill_dagster.domain.grid import Grid, grid_of
from fks_backfill_dagster.domain.plausibility import AROUND, implausible
from fks_backfill_dagster.domain.quality import Reason
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange, among
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import iso
from fks_backfill_dagster.ledger.gaps import missing_of
from fks_backfill_dagster.ledger.records import Evidence, Outcome
from fks_backfill_dagster.ledger.settle import Response, surroundings
from fks_backfill_dagster.pipeline.eligible import Eligible
from fks_backfill_dagster.pipeline.plan import GRACE, Batch, Plan, Scope
from fks_backfill_dagster.pipeline.refetch import (
    SUSPICIOUS_CANDLES,
    StoredRows,
    Suspicion,
    confirmed,
    suspicion,
)
from fks_backfill_dagster.pipeline.request import ProviderAnswer, RangeRequest, request_range
from fks_backfill_dagster.pipeline.splice import only, splice
from fks_backfill_dagster.providers.base import (
    Cancelled,
    Circuit,
    Estimate,
    NotEntitled,
    Provider,
    ProviderError,
    TooOld,
    TransientError,
    UnknownSymbol,
)

Mask = NDArray[np.bool_]

_NONE = np.empty(0, dtype=np.int64)

# A provider that failed this often in a row, each time after its own retries, is not requested again in
# this sync: otherwise every month of a decade could take an hour of retries.
MOST_FAILURES = 2


@dataclass(frozen=True, slots=True)
class Tally:
    """Numbers of candles: requested from a provider, delivered (valid ones), rejected, failed (no response)."""

    asked: int = 0
    delivered: int = 0
    rejected: int = 0
    failed: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.asked + other.asked,
            self.delivered + other.delivered,
            self.rejected + other.rejected,
            self.failed + other.failed,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Withdrawn:
    """Stored candles that neither their own provider nor any other one has any more."""

    origin: Origin
    opens: Instants


@dataclass(slots=True)
class Fetched:
    """The verified result of all providers for one span.

    failed: candles are missing about which no provider responded, or a refetch was refused. recordable: a
    provider responded, or may respond later; False for a symbol that no provider knows. requested: the opens of the
    span. seen: by provider, all its verified candles, neighbours of the span included. distrusted: providers whose
    candles contradict those of the span before.
    """

    deliveries: list[Delivery] = field(default_factory=list)
    rejected: list[RejectedRows] = field(default_factory=list)
    responses: list[Response] = field(default_factory=list)
    withdrawn: list[Withdrawn] = field(default_factory=list)
    requests: int = 0
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    failed: bool = False
    recordable: bool = False
    requested: Instants = field(default_factory=lambda: _NONE)
    seen: dict[str, Candles] = field(default_factory=dict)
    distrusted: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class ChainOptions:
    """The inputs of the requests of a sync besides the providers.

    clock: the present. stored: the stored candles of given opens. stored_within: those of a window.
    stored_rows: the same with their lineage. tolerance: the largest relative difference of a price between two
    quotes of one market. closed: where the market of a series was closed within a window; declared: the part of
    it that the settings close. force: a refetch is not guarded. eligible: the eligible providers of the series by
    the settings, requested in this sync or not.
    """

    clock: Callable[[], int]
    stored: Callable[[Instants], Candles]
    stored_within: Callable[[TimeRange], Candles]
    stored_rows: Callable[[TimeRange], StoredRows]
    tolerance: float
    closed: Callable[[Series, TimeRange], RangeSet] = lambda series, window: RangeSet()
    declared: Callable[[Series], RangeSet] = lambda series: RangeSet()
    force: bool = False
    eligible: frozenset[str] = frozenset()


class ProviderChain:
    """The eligible providers of one sync in order of priority, and their state in this sync.

    A provider that does not know the symbol is dropped, with the reason in `dropped`. One that failed MOST_FAILURES
    times in a row is not requested again in this sync; any other error may concern one range only (a plan without
    today's data). One whose key covers newer data only is not requested for older ones again. `fetch` is
    thread-safe.

    `circuit` receives every success and failure and opens for providers that no process shall request for a while.
    It is ignored if `heed_circuit` is off, for a manual request.
    """

    def __init__(
        self,
        series: Series,
        chosen: Eligible,
        options: ChainOptions,
        circuit: Circuit | None = None,
        *,
        heed_circuit: bool = True,
    ) -> None:
        self.series, self.options = series, options
        self._circuit, self._heed_circuit = circuit, heed_circuit
        self.warnings: list[str] = list(chosen.warnings)
        self._providers = dict(chosen.providers)
        self.listed: dict[str, int] = {}
        self._lock = threading.Lock()
        self._dropped: dict[str, str] = {}
        self._failures: dict[str, int] = {}
        self._since: dict[str, int] = {}
        self._cool_downs: dict[str, str] = {}
        self._tallies: dict[str, Tally] = {}
        self._stopped = threading.Event()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self._providers if name not in self._dropped)

    @property
    def unfit(self) -> frozenset[str]:
        """The providers that do not know the symbol."""
        return frozenset(self._dropped)

    @property
    def dropped(self) -> tuple[str, ...]:
        """Why providers were dropped, one reason each."""
        return tuple(self._dropped.values())

    @property
    def page_size(self) -> int:
        """The page size of the provider that is requested first."""
        first = next(iter(self.names), None)
        return self._providers[first].capabilities.candles_a_request(self.series) if first else 1

    def tallies(self) -> dict[str, Tally]:
        return dict(self._tallies)

    def drop(self, name: str, error: UnknownSymbol) -> None:
        with self._lock:
            self._dropped[name] = str(error)

    def remember_failure(self, name: str, error: ProviderError) -> list[str]:
        """Records that the provider did not respond, its own retries included, or refused to. Returns warnings."""
        with self._lock:
            self._failures[name] = self._failures.get(name, 0) + 1
        if self._circuit is None or not isinstance(error, TransientError):
            return []
        opened = self._circuit.failed(name, str(error))
        if opened is None:
            return []
        return [f"{name}: not requested for {opened.seconds:.0f} s: {opened.reason}"]

    def remember_success(self, name: str) -> list[str]:
        """Records that the provider responded. Returns warnings."""
        with self._lock:
            self._failures[name] = 0
        if self._circuit is None or not self._circuit.succeeded(name):
            return []
        return [f"{name}: it responds again; its cool-down has ended"]

    def remember_depth(self, name: str, since: int) -> None:
        """Records that the provider's key covers no candle that opens before `since`."""
        with self._lock:
            self._since[name] = max(since, self._since.get(name, since))

    def cool_down(self, name: str) -> str | None:
        """Why the provider is not requested now; None if it is."""
        if self._failures.get(name, 0) >= MOST_FAILURES:
            return f"not requested after {MOST_FAILURES} failures in a row"
        found = self._circuit.closed_for(name) if self._circuit and self._heed_circuit else None
        with self._lock:
            if found is None:
                self._cool_downs.pop(name, None)
                return None
            # The same text for the whole cool-down, so that it is reported once and not with every span.
            text = f"not requested for another {found.seconds:.0f} s: {found.reason}"
            return self._cool_downs.setdefault(name, text)

    def start(self) -> None:
        """Enables fetching, also after a `stop`."""
        self._stopped.clear()

    def stop(self) -> None:
        """Stops fetching spans that have not begun."""
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def estimate(self, name: str, plan: Plan) -> Estimate:
        """The cost of the plan if this provider alone were requested for it."""
        provider, series = self._providers[name], self.series
        native = replace(series, timeframe=provider.capabilities.parts(series))
        parts = [
            provider.estimate(native, window if native == series else parts_span(grid_of(series), window))
            for batches in plan.spans(provider.capabilities.candles_a_request(series))
            for window in self._windows(batches, provider)
        ]
        return Estimate(sum(p.requests for p in parts), sum(p.seconds for p in parts))

    def fetch(
        self, batches: Sequence[Batch], plan: Plan, *, without: frozenset[str] = frozenset()
    ) -> Fetched:
        """Requests one span. Errors of providers are part of the result and not raised."""
        dropped = dict(self._dropped)  # another thread may drop one at any time
        providers = {n: p for n, p in self._providers.items() if n not in dropped and n not in without}
        return _Span(self, batches, plan).run(providers, dropped)

    def task(self, name: str, provider: Provider, wanted: Instants, *, first: bool) -> _Task:
        now, timeframe = self.options.clock(), self.series.timeframe
        reach, listed = provider.capabilities.reach(timeframe, now), self.listed.get(name)
        limits = [
            (edge, why)
            for edge, why in (
                (reach, "it lies beyond its depth"),
                (self._since.get(name), "it lies beyond what its key covers"),
                (listed, f"it has the symbol only since {iso(listed or 0)}"),
            )
            if edge is not None
        ]
        since = max((edge for edge, _ in limits), default=None)
        within = wanted if since is None else wanted[wanted >= since]
        excluded, left = [], wanted
        for edge, why in limits:
            excluded.append((left[left < edge], why))
            left = left[left >= edge]
        return _Task(name, provider, within, now, first, since, tuple(excluded))

    def reaches(self, name: str, instant: int | None) -> bool:
        """Whether the provider's depth extends before an instant; True for None."""
        reach = self._providers[name].capabilities.reach(self.series.timeframe, self.options.clock())
        return instant is None or reach is None or reach < instant

    def listed_at(self, name: str) -> int | None:
        """The provider's claim of its first candle; see `Provider.listed_at`."""
        return self._providers[name].listed_at(self.series)

    def count(self, name: str, tally: Tally) -> None:
        with self._lock:
            self._tallies[name] = self._tallies.get(name, Tally()) + tally

    def _windows(self, batches: Sequence[Batch], provider: Provider) -> list[TimeRange]:
        wanted = RangeSet([part for batch in batches for part in batch.wanted])
        page = provider.capabilities.candles_a_request(self.series)
        return list(wanted.merge_closer_than(page * self.series.timeframe.micros))


@dataclass(frozen=True, slots=True)
class _Task:
    """One provider's part of a span: the opens to request, from `since` on, before which it has no candles.

    `first`: no provider was requested before it. `excluded`: the opens that are not requested, with the reason.
    """

    name: str
    provider: Provider
    wanted: Instants
    requested_at: int
    first: bool
    since: int | None
    excluded: tuple[tuple[Instants, str], ...]

    def hulls(self, series: Series) -> list[TimeRange]:
        """The ranges to request: scattered candles share a request if one page covers them."""
        step, page = series.timeframe.micros, self.provider.capabilities.candles_a_request(series)
        return list(RangeSet.from_arrays(self.wanted, self.wanted + step).merge_closer_than(page * step))

    def window(self, hull: TimeRange, beside: TimeRange, grid: Grid) -> TimeRange:
        """The hull with a neighbour on either side where that is useful.

        Beside a fallback's candles it shows whether the fallback quotes the same market; beside an absent candle,
        that the provider had no outage. For whole months of a first provider only stored neighbours (`beside`) are
        requested: archives and pages are cut to months.
        """
        if self.first and not self.provider.capabilities.omits_quiet:
            return beside if self.since is None else TimeRange(max(beside.start, self.since), beside.end)
        before, after = neighbours(hull, grid, self.since)
        end = int(grid.closes(after)[0]) if len(after) else hull.end
        return TimeRange(int(before[0]) if len(before) else hull.start, end)

    def evidence(self, outcome: Outcome, detail: str = "", *, confirmed: bool = False) -> Evidence:
        return Evidence(self.name, self.requested_at, outcome, detail, confirmed)


class _Span:
    """The fetch of one span from the providers: the opens still wanted, and the candles found."""

    def __init__(self, chain: ProviderChain, batches: Sequence[Batch], plan: Plan) -> None:
        self.chain, self.plan = chain, plan
        self.series, self.options = chain.series, chain.options
        self.grid = grid_of(self.series)
        self.found = Fetched()
        self.wanted = np.concatenate(
            [_NONE, *(self.grid.opens(p) for batch in batches for p in batch.wanted)]
        )
        self.requested = self.found.requested = self.wanted
        self.refetch = plan.scope is Scope.EVERYTHING
        self.stored = self._stored_rows() if self.refetch else None
        self._held: list[tuple[_Task, Delivery]] = []
        self._absent = RangeSet()
        # For the first provider of a refetch: the opens that two complete responses lack, and their origin.
        self._gone = _NONE
        self._gone_origin: Origin | None = None
        self._spliced = False
        # Stored candles of the first provider of a refetch that it does not return now.
        self._unreturned = _NONE
        # Stored candles whose new values are implausible: they are replaced only if a second provider confirms them.
        self._protected = _NONE

    def _stored_rows(self) -> StoredRows:
        window = TimeRange(int(self.wanted[0]), int(self.wanted[-1]) + 1)
        return self.options.stored_rows(window)

    def run(self, providers: dict[str, Provider], dropped: dict[str, str]) -> Fetched:
        found, first = self.found, True
        now = self.options.clock()
        for name, why in dropped.items():
            found.responses.append(Response(Evidence(name, now, Outcome.REFUSED, why), self.requested))
        for name, provider in providers.items():
            if not len(self.wanted) or self.chain.stopped:
                break
            task = self.chain.task(name, provider, self.wanted, first=first)
            for opens, why in task.excluded:
                self._respond(task, opens, Outcome.REFUSED, why)
            if not len(task.wanted):  # known without a request: it cannot have them
                continue
            self._request_task(task)
            if first and self.stored is not None:
                # Stored candles are compared with the first provider only.
                self._guard_refetch(task, providers)
                delivered = self.stored.delivered_by(name, provider.instrument(self.series))
                self._gone = _common(self._gone, delivered)
                self._unreturned = missing_of(
                    _common(delivered, self.requested), self.found.seen.get(name, Candles.empty()).ts
                )
                kept = missing_of(self.stored.candles.ts, self._gone)
                # Of the stored candles only those with implausible new values need a second opinion.
                held = np.concatenate([_NONE, *(delivery.candles.ts for _, delivery in self._held)])
                self._protected = np.intersect1d(kept, held)
                self.wanted = missing_of(self.wanted, missing_of(kept, held))
            first = False
        self._settle_held()
        self._settle_withdrawn(providers)
        return self._closed(dropped)

    def _closed(self, dropped: dict[str, str]) -> Fetched:
        found = self.found
        responses = [r for r in found.responses if r.evidence.provider not in dropped]
        any_seen = bool(found.seen)
        # Deliveries have no common candle, and each ascends.
        given = np.sort(np.concatenate([_NONE, *(d.candles.ts for d in found.deliveries)]), kind="stable")
        missing = missing_of(self.requested, given)
        found.failed = found.failed or (not any_seen and (self.refetch or len(missing) > 0))
        if found.failed and not found.errors:
            found.errors = list(
                dict.fromkeys(f"{r.evidence.provider}: {r.evidence.detail}" for r in responses)
            )
        found.recordable = any_seen or bool(responses)
        kept = missing_of(
            self._unreturned, np.unique(np.concatenate([_NONE, *(one.opens for one in found.withdrawn)]))
        )
        if len(kept) and not found.failed:
            found.warnings.append(
                f"{len(kept):,} stored candles were not returned by their provider, and are kept"
            )
        return found

    def _request_task(self, task: _Task) -> None:
        """Requests the wanted opens from one provider."""
        name, found, count = task.name, self.found, len(task.wanted)
        message = self.chain.cool_down(name)
        if message is not None:
            self.chain.count(name, Tally(asked=count, failed=count))
            found.errors.append(f"{name}: {message}")
            self._respond(task, task.wanted, Outcome.ERROR, message)
            return
        before, rejected = len(self.wanted), sum(len(r.candles) for r in found.rejected)
        done = _NONE
        try:
            for hull in task.hulls(self.series):
                self._request_hull(task, hull)
                done = np.concatenate([done, _inside(task.wanted, hull)])
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
            self._respond(task, left, Outcome.REFUSED if final else Outcome.ERROR, str(error))
            return
        found.warnings += self.chain.remember_success(name)
        rejected = sum(len(r.candles) for r in found.rejected) - rejected
        self.chain.count(name, Tally(asked=count, delivered=before - len(self.wanted), rejected=rejected))

    def _request_newer(self, task: _Task, error: TooOld, left: Instants, delivered: int) -> None:
        """Like `_request_task`, for the part that the key covers, after a refusal of the older part."""
        name = task.name
        self.chain.remember_depth(name, error.since)
        older = left[left < error.since]
        self.chain.count(name, Tally(asked=delivered + len(older), delivered=delivered, failed=len(older)))
        self._respond(task, older, Outcome.REFUSED, str(error))
        newer = self.chain.task(name, task.provider, _common(self.wanted, left), first=task.first)
        if not len(newer.wanted):
            self.found.errors.append(str(error))
            return
        self.found.warnings.append(str(error))
        self._request_task(newer)

    def _request_hull(self, task: _Task, hull: TimeRange) -> None:
        beside = self._stored_beside(hull)
        window = task.window(hull, _joined(hull, beside.ts, self.grid), self.grid)
        parts = replace(self.series, timeframe=task.provider.capabilities.parts(self.series))
        request = RangeRequest(
            series=self.series,
            wanted=_inside(task.wanted, hull),
            window=window,
            now=task.requested_at,
            since=task.since,
            closed=self.options.closed(parts, surroundings(window, grid_of(parts))),
            declared=self.options.declared(parts),
            absent_elsewhere=self._absent,
            tolerance=self.options.tolerance,
        )
        answer = self._requested(task, request)
        found = self._splice(task, answer.candles, hull, beside)
        if (
            found is not None and task.first
        ):  # a second request distinguishes one wrong response from another market
            answer = self._requested(task, request)
            found = self._splice(task, answer.candles, hull, beside)
        strange = self._strange(task, request, answer.candles)
        self._accept(task, answer, hull, found, strange)

    def _requested(self, task: _Task, request: RangeRequest) -> ProviderAnswer:
        answer = request_range(task.provider, request)
        self.found.requests += answer.requests
        self.found.warnings += [f"{task.name}: {message}" for message in answer.warnings]
        return answer

    def _accept(
        self,
        task: _Task,
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
        known = found.seen.get(task.name, Candles.empty())
        found.seen[task.name] = Candles.concat([known, theirs.take(~among(theirs.ts, known.ts))]).sorted()
        requested = _inside(task.wanted, hull)
        if spliced is not None and self.refetch and task.first:
            self._spliced = True  # the guard of a refetch decides
        elif spliced is not None:
            self.found.warnings.append(
                f"{task.name}: its candles of {hull} are quarantined as a splice: beside them it differs by"
                f" {spliced:.2%} from what is stored, so it quotes another market"
            )
            for delivery in answer.kept:
                self._reject(delivery, only(delivery.candles, self.wanted), Reason.SPLICE)
            self._respond(task, requested, Outcome.ABSENT, "it quotes another market")
            return
        self._second_opinion(theirs)
        for delivery in answer.kept:
            good = only(delivery.candles, missing_of(self.wanted, self._protected))
            odd = np.isin(good.ts, strange)
            if odd.any():
                self._held.append((task, delivery.with_candles(good.take(odd))))
                good = good.take(~odd)
            if len(good):
                found.deliveries.append(delivery.with_candles(good))
                self.wanted = missing_of(self.wanted, good.ts)
        self._respond_missing(task, answer)
        if self.refetch and task.first and answer.kept:
            between = answer.confirmed[(answer.confirmed > theirs.ts[0]) & (answer.confirmed < theirs.ts[-1])]
            self._gone, self._gone_origin = np.union1d(self._gone, between), answer.kept[0].origin
        if task.provider.capabilities.omits_quiet:
            self._absent |= answer.absent

    def _respond_missing(self, task: _Task, answer: ProviderAnswer) -> None:
        """Records the provider's response about each candle that it did not give."""
        lacking = missing_of(answer.lacking, answer.pending)
        if len(answer.pending):
            count, why = len(answer.pending), f"{answer.clocks}: not closed there yet"
            self._respond(task, answer.pending, Outcome.ERROR, why)
            self.found.warnings.append(
                f"{task.name}: {count:,} candle{'s are' if count > 1 else ' is'} requested again later: {why}"
            )
        if answer.error is not None:
            self._respond(task, lacking, Outcome.ERROR, f"its second request failed: {answer.error}")
            return
        bad = lacking[holding_rejected(lacking, answer.rejected, self.grid)]
        if len(bad):
            rows = sum(len(part.candles) for part in answer.rejected)
            self._respond(task, bad, Outcome.REJECTED, f"{rows} rows quarantined")
        lacking = missing_of(lacking, bad)
        for detail, opens in answer.partial:
            mine = _common(opens, lacking)
            self._respond(task, mine, Outcome.ABSENT, detail)
            lacking = missing_of(lacking, mine)
        sure = _common(answer.confirmed, lacking) if task.provider.capabilities.omits_quiet else _NONE
        self._respond(task, sure, Outcome.ABSENT, confirmed=True)
        self._respond(task, missing_of(lacking, sure), Outcome.ABSENT)

    def _respond(
        self,
        task: _Task,
        opens: Instants,
        outcome: Outcome,
        detail: str = "",
        *,
        confirmed: bool = False,
    ) -> None:
        if len(opens):
            evidence = task.evidence(outcome, detail, confirmed=confirmed)
            self.found.responses.append(Response(evidence, opens))

    def _reject(self, delivery: Delivery, candles: Candles, reason: Reason) -> None:
        if len(candles):
            self.found.rejected.append(RejectedRows.of(delivery.origin, reason, candles.sorted()))

    # --- neighbours

    def _splice(self, task: _Task, theirs: Candles, hull: TimeRange, stored: Candles) -> float | None:
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
        if self.refetch and len(self.requested) >= SUSPICIOUS_CANDLES:
            return Candles.empty()
        opens = np.concatenate(neighbours(hull, self.grid))
        return self.options.stored(opens[~self.plan.missing_ranges.contains(opens)])

    # --- implausible candles

    def _strange(self, task: _Task, request: RangeRequest, theirs: Candles) -> Instants:
        """The opens of the wanted candles that are implausible among those around them, stored ones included.

        A price level may begin or end just outside the requested range. So a candle at the edge that is implausible
        among the known ones is compared with its outer neighbour, which is requested if it is not stored.
        """
        wanted = _inside(task.wanted, request.window)
        known = theirs if len(theirs) > 2 * AROUND else self._with_neighbours(theirs)
        strange = _common(known.ts[implausible(known)], wanted)
        if not len(strange) or len(unknown := self._beside_these(strange, request)) == 0:
            return self._not_as_stored(theirs, strange)
        known = self._with_neighbours(theirs)
        for ts in missing_of(unknown, known.ts).tolist():
            window = TimeRange(ts, int(self.grid.closes(np.array([ts]))[0]))
            try:
                one = self._requested(task, replace(request, wanted=_NONE, window=window)).candles
            except Cancelled:
                raise
            except ProviderError as error:  # the candle stays implausible until it is requested again
                self.found.requests += error.requests
                self.found.warnings.append(str(error))
                continue
            known = Candles.concat([known, one]).sorted()
        return self._not_as_stored(theirs, _common(known.ts[implausible(known)], strange))

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

    def _beside_these(self, strange: Instants, request: RangeRequest) -> Instants:
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
        mine, its = only(mine, its.ts), only(its, mine.ts)
        same = mine.ts[difference(mine, its).max(axis=0) <= self.options.tolerance] if len(mine) else _NONE
        return missing_of(strange, same)

    def _second_opinion(self, theirs: Candles) -> None:
        """Accepts the held candles that these candles confirm, unchanged."""
        held = []
        for task, delivery in self._held:
            mine, its = only(delivery.candles, theirs.ts), only(theirs, delivery.candles.ts)
            agrees = (
                mine.ts[difference(mine, its).max(axis=0) <= self.options.tolerance] if len(mine) else _NONE
            )
            good = only(delivery.candles, _common(agrees, self.wanted))
            if len(good):
                self.found.deliveries.append(delivery.with_candles(good))
                self.wanted = missing_of(self.wanted, good.ts)
            rest = delivery.candles.take(~np.isin(delivery.candles.ts, good.ts))
            if len(rest):
                held.append((task, delivery.with_candles(rest)))
        self._held = held

    def _settle_held(self) -> None:
        for task, delivery in self._held:
            self._reject(delivery, delivery.candles, Reason.IMPLAUSIBLE)
            count = len(delivery.candles)
            self.found.warnings.append(
                f"{task.name}: {count} candle{'s' * (count != 1)} quarantined as implausible: a price is a"
                " factor of 50 or more from those around it, and no second provider agrees"
            )
            self._respond(
                task,
                _common(delivery.candles.ts, self.wanted),
                Outcome.REJECTED,
                "quarantined as implausible",
            )

    # --- refetch

    def _guard_refetch(self, task: _Task, providers: dict[str, Provider]) -> None:
        """Refuses deliveries that differ from the stored candles like those of another symbol, unless a second
        provider agrees; see `refetch.suspicion`."""
        if self.options.force or self.stored is None:
            return
        for delivery in list(self.found.deliveries):
            suspected = suspicion(self.stored, delivery, self.options.tolerance, certain=self._spliced)
            if suspected is None or self._confirmed_elsewhere(suspected, task, providers):
                continue
            self.found.deliveries = [d for d in self.found.deliveries if d is not delivery]
            self.found.failed = True
            self.found.errors.append(
                f"{task.name}: {suspected.differ:,} of {suspected.compared:,} compared candles of"
                f" {self.series} differ by more than {self.options.tolerance:.2%} from the stored ones, and no"
                " other provider confirms them: nothing of them was written; --force writes them"
            )

    def _confirmed_elsewhere(self, suspected: Suspicion, task: _Task, providers: dict[str, Provider]) -> bool:
        for name, provider in providers.items():
            if name == task.name or self.chain.cool_down(name) is not None:
                continue
            sample = self.chain.task(name, provider, suspected.given.ts, first=False)
            if not len(sample.wanted):
                continue
            window = TimeRange(int(sample.wanted[0]), int(self.grid.closes(sample.wanted[-1:])[0]))
            try:
                request = RangeRequest(self.series, sample.wanted, window, sample.requested_at, sample.since)
                answer = self._requested(sample, request)
            except Cancelled:
                raise
            except ProviderError as error:
                self.found.requests += error.requests
                self.found.errors.append(str(error))
                continue
            verdict = confirmed(suspected, answer.candles, self.options.tolerance)
            if verdict is not None:
                return verdict
        return False

    def _settle_withdrawn(self, providers: dict[str, Provider]) -> None:
        """Withdraws stored candles that no provider has any more: all other eligible ones responded without them."""
        if not len(self._gone) or self._gone_origin is None:
            return
        gone, kept = self._gone, []
        for delivery in self.found.deliveries:
            # Another provider has it: the stored candle stays.
            kept.append(
                delivery.with_candles(delivery.candles.take(~np.isin(delivery.candles.ts, self._gone)))
            )
            gone = missing_of(gone, delivery.candles.ts)
        for name in {*providers, *(self.options.eligible - self.chain.unfit)}:
            about = [
                r.opens for r in self.found.responses if r.evidence.provider == name and r.evidence.final
            ]
            gone = _common(gone, np.unique(np.concatenate([_NONE, *about])))
        self.found.deliveries = [d for d in kept if len(d.candles)]
        if len(gone) and not self.found.failed:
            self.found.withdrawn.append(Withdrawn(self._gone_origin, gone))


def neighbours(hull: TimeRange, grid: Grid, since: int | None = None) -> tuple[Instants, Instants]:
    """The open before a hull, not before `since`, and the open after it; empty if there is none."""
    before, after = grid.previous_open(hull.start), grid.next_open(hull.end)
    if before is not None and since is not None and before < since:
        before = None
    return _one(before), _one(after)


def _joined(hull: TimeRange, opens: Instants, grid: Grid) -> TimeRange:
    """The hull with its neighbours that open at `opens`."""
    if not len(opens):
        return hull
    return TimeRange(min(hull.start, int(opens[0])), max(hull.end, int(grid.closes(opens[-1:])[0])))


def _one(instant: int | None) -> Instants:
    return _NONE if instant is None else np.array([instant], dtype=np.int64)


def _inside(opens: Instants, hull: TimeRange) -> Instants:
    first, last = np.searchsorted(opens, [hull.start, hull.end])
    return opens[first:last]


def _common(one: Instants, other: Instants) -> Instants:
    return np.intersect1d(one, other, assume_unique=True)
