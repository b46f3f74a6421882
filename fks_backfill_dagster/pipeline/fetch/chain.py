"""The providers of one sync in order of priority, their state in this sync, and each one's part of a span.

Belongs here: which provider is requested for which candles, and what its answers so far mean for later requests.
Does not belong here: the fetch of a span from all of them (`fallback`), the request to one (`request`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.derive import parts_span
from fks_backfill_dagster.domain.grid import Grid, grid_of
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import iso
from fks_backfill_dagster.ledger.records import Evidence, Outcome
from fks_backfill_dagster.pipeline.eligible import Eligible
from fks_backfill_dagster.pipeline.fetch.fetched import Fetched, Tally
from fks_backfill_dagster.pipeline.fetch.range_request import ProviderAnswer, RangeRequest
from fks_backfill_dagster.pipeline.fetch.request import request_range
from fks_backfill_dagster.pipeline.fetch.suspicion import StoredRows
from fks_backfill_dagster.pipeline.plan import Batch, Plan
from fks_backfill_dagster.providers.base import (
    Circuit,
    Estimate,
    Provider,
    ProviderError,
    TransientError,
    UnknownSymbol,
)

_NONE = np.empty(0, dtype=np.int64)

# A provider that failed this often in a row, each time after its own retries, is not requested again in
# this sync: otherwise every month of a decade could take an hour of retries.
MOST_FAILURES = 2


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

    A provider that does not offer the symbol is dropped, with the reason in `dropped`. One that failed MOST_FAILURES
    times in a row is not requested again in this sync; any other error may concern one range only (a plan without
    today's data). One whose key covers newer data only is not requested for older ones again. It is
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
    def dropped(self) -> dict[str, str]:
        """The providers that do not offer the symbol, each with the reason; a copy, since any thread may drop one."""
        return dict(self._dropped)

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

    def available(self, without: Collection[str]) -> dict[str, Provider]:
        """The providers in order, except those of `without`."""
        return {name: one for name, one in self._providers.items() if name not in without}

    def task(self, name: str, provider: Provider, wanted: Instants, *, first: bool) -> ProviderTask:
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
        return ProviderTask(name, provider, within, now, first, since, tuple(excluded))

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
class ProviderTask:
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
        if self.first and not self.provider.capabilities.omits_no_trade:
            return beside if self.since is None else TimeRange(max(beside.start, self.since), beside.end)
        before, after = neighbours(hull, grid, self.since)
        end = int(grid.closes(after)[0]) if len(after) else hull.end
        return TimeRange(int(before[0]) if len(before) else hull.start, end)

    def evidence(self, outcome: Outcome, detail: str = "", *, confirmed: bool = False) -> Evidence:
        return Evidence(self.name, self.requested_at, outcome, detail, confirmed)

    def request(self, request: RangeRequest, found: Fetched) -> ProviderAnswer:
        """Sends a request to the provider; `found` counts it and receives its warnings. Raises ProviderError."""
        answer = request_range(self.provider, request)
        found.requests += answer.requests
        found.warnings += [f"{self.name}: {message}" for message in answer.warnings]
        return answer


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
