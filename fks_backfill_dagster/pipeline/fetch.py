"""Asking the providers in order for what is missing, candle by candle, and verifying what they say."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.gaps import missing_of
from fks_backfill_dagster.domain.grid import Grid, grid_of
from fks_backfill_dagster.domain.quality import Rejected, verify
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.pipeline.plan import GRACE, Batch, Plan
from fks_backfill_dagster.providers.base import (
    Cancelled,
    Delivery,
    Estimate,
    Provider,
    ProviderError,
    UnknownSymbol,
)
from fks_backfill_dagster.store.commit import Brought, Refused
from fks_backfill_dagster.store.ledger import Evidence

# A provider that failed this often in a row, each time after its own retries, is left alone for the
# rest of the sync: an hour of retries for every month of a decade helps nobody.
PATIENCE = 2


@dataclass(frozen=True, slots=True)
class Tally:
    """Candles that a provider was asked for, delivered (good ones), had rejected, failed to answer."""

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


@dataclass(slots=True)
class Fetched:
    """What the providers together gave for one span, verified.

    `failed`: candles are missing that nobody has answered for. `recordable`: somebody answered, or
    may answer another time; a symbol that nobody knows leaves nothing to record.
    """

    brought: list[Brought] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    evidence: tuple[Evidence, ...] = ()
    requests: int = 0
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    failed: bool = False
    recordable: bool = False

    def take(
        self,
        name: str,
        delivery: Delivery,
        good: Candles,
        rejected: Sequence[Rejected],
        fetched_at: int,
    ) -> Tally:
        """Keeps the good rows with their origin, and the others with their reason."""
        origin = (delivery.transport.value, delivery.source, delivery.sha256)
        self.brought.append(Brought(name, *origin, fetched_at, good))
        self.refused += [Refused(name, delivery.source, r.reason.value, r.candles.sorted()) for r in rejected]
        return Tally(delivered=len(good), rejected=sum(len(r.candles) for r in rejected))


class Chain:
    """The providers of one sync in order of priority, and how they have behaved so far.

    Left out from the start: who cannot serve the series, and, with a sentence in `warnings`, who
    lacks a key. Dropped on the way, with a sentence in `dropped`: who does not know the symbol. Left
    alone for the rest of the sync: who failed PATIENCE times in a row; another error may concern
    one range only (a plan without today's data). `fetch` is called from several threads.
    """

    def __init__(
        self,
        providers: Mapping[str, Provider],
        series: Series,
        priority: Sequence[str],
        clock: Callable[[], int],
    ) -> None:
        self.series, self.clock = series, clock
        self.warnings: list[str] = []
        self._providers: dict[str, Provider] = {}
        self._lock = threading.Lock()
        self._dropped: dict[str, str] = {}
        self._failures: dict[str, int] = {}
        self._tallies: dict[str, Tally] = {}
        self._stopped = threading.Event()
        for name in dict.fromkeys(priority):
            provider = providers.get(name)
            if provider is None or not provider.capabilities.serve(series):
                continue
            key = provider.missing_key()
            if key is not None:
                self.warnings.append(f"{name} is skipped: {key} is not set")
                continue
            self._providers[name] = provider

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self._providers if name not in self._dropped)

    @property
    def dropped(self) -> tuple[str, ...]:
        """Why providers were dropped, a sentence each."""
        return tuple(self._dropped.values())

    @property
    def page_size(self) -> int:
        """Of the provider that is asked first."""
        first = next(iter(self.names), None)
        return self._providers[first].capabilities.page_size if first else 1

    def tallies(self) -> dict[str, Tally]:
        return dict(self._tallies)

    def drop(self, name: str, error: UnknownSymbol) -> None:
        with self._lock:
            self._dropped[name] = str(error)

    def remember_failure(self, name: str) -> None:
        """It did not answer, its own retries included."""
        with self._lock:
            self._failures[name] = self._failures.get(name, 0) + 1

    def stop(self) -> None:
        """Spans that have not begun are not fetched any more."""
        self._stopped.set()

    def estimate(self, name: str, plan: Plan) -> Estimate:
        """What it would cost if this provider alone answered the whole plan."""
        provider = self._providers[name]
        parts = [
            provider.estimate(self.series, window)
            for batches in plan.spans(provider.capabilities.page_size)
            for window in self._windows(batches, provider)
        ]
        return Estimate(sum(p.requests for p in parts), sum(p.seconds for p in parts))

    def fetch(self, batches: Sequence[Batch], plan: Plan) -> Fetched:
        """Asks for one span. Errors of providers are in the answer; nothing is raised for them."""
        grid = grid_of(self.series)
        found = Fetched()
        wanted = np.concatenate([grid.opens(part) for batch in batches for part in batch.wanted])
        evidence: list[Evidence] = []
        for name in self.names:
            if not len(wanted) or self._stopped.is_set():
                break
            word, wanted = self._ask(name, wanted, plan, grid, found)
            evidence.append(word)
            if plan.refetch:  # stored candles are compared with the first provider only
                wanted = wanted[plan.missing_ranges.contains(wanted)]
        answered = any(word.outcome == "absent" for word in evidence)
        found.evidence = tuple(evidence)
        found.failed = not answered and (plan.refetch or len(wanted) > 0)
        found.recordable = answered or any(word.provider not in self._dropped for word in evidence)
        return found

    def _ask(
        self, name: str, wanted: Instants, plan: Plan, grid: Grid, found: Fetched
    ) -> tuple[Evidence, Instants]:
        """Asks one provider; returns its word and what is still wanted."""
        provider, asked_at = self._providers[name], self.clock()
        tally, left = Tally(asked=len(wanted)), wanted
        if self._failures.get(name, 0) >= PATIENCE:
            self._count(name, tally + Tally(failed=len(wanted)))
            message = f"left alone after {PATIENCE} failures in a row"
            found.errors.append(f"{name}: {message}")
            return Evidence(name, asked_at, "error", message), wanted
        closed_end = min(plan.window.end, grid.closed_end(asked_at - GRACE))
        try:
            for window in self._hulls(wanted, provider):
                answer = provider.fetch(self.series, window)
                found.requests += answer.requests
                found.warnings += [f"{name}: {message}" for message in answer.warnings]
                for delivery in answer.deliveries:
                    verdict = verify(delivery.candles, window, grid, closed_end)
                    good = _only(verdict.good, left)
                    left = missing_of(left, good.ts)
                    tally += found.take(name, delivery, good, verdict.rejected, asked_at)
        except Cancelled:
            raise
        except ProviderError as error:
            self._count(name, tally + Tally(failed=len(left)))
            if isinstance(error, UnknownSymbol):
                self.drop(name, error)
            else:
                self.remember_failure(name)
            found.errors.append(str(error))
            return Evidence(name, asked_at, "error", str(error)), left
        self._failures[name] = 0
        self._count(name, tally)
        return Evidence(name, asked_at, "absent"), left

    def _windows(self, batches: Sequence[Batch], provider: Provider) -> list[TimeRange]:
        wanted = RangeSet([part for batch in batches for part in batch.wanted])
        return list(wanted.merge_closer_than(provider.capabilities.page_size * self.series.timeframe.micros))

    def _hulls(self, wanted: Instants, provider: Provider) -> list[TimeRange]:
        """The ranges to ask for: scattered candles share a request where one page reaches both."""
        step = self.series.timeframe.micros
        ranges = RangeSet.from_arrays(wanted, wanted + step)
        return list(ranges.merge_closer_than(provider.capabilities.page_size * step))

    def _count(self, name: str, tally: Tally) -> None:
        with self._lock:
            self._tallies[name] = self._tallies.get(name, Tally()) + tally


def _only(candles: Candles, wanted: Instants) -> Candles:
    """The candles whose open is wanted; `wanted` ascending. All of them is the usual case."""
    if len(candles) == 0 or len(wanted) == 0:
        return candles.take(slice(0, 0))
    index = np.minimum(np.searchsorted(wanted, candles.ts), len(wanted) - 1)
    mask = wanted[index] == candles.ts
    return candles if bool(mask.all()) else candles.take(mask)
