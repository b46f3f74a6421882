"""Asking the providers in order for what is missing, candle by candle, and verifying what they say."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import PRICES, Candles
from fks_backfill_dagster.domain.grid import Grid, grid_of
from fks_backfill_dagster.domain.quality import Reason, Verdict, verify
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.ledger.gaps import missing_of
from fks_backfill_dagster.ledger.records import Evidence
from fks_backfill_dagster.ledger.settle import LONGEST_PAUSE
from fks_backfill_dagster.pipeline.plan import GRACE, Batch, Plan, Scope
from fks_backfill_dagster.providers.base import (
    Cancelled,
    Circuit,
    Delivery,
    Estimate,
    NotEntitled,
    Provider,
    ProviderError,
    TooOld,
    TransientError,
    UnknownSymbol,
)
from fks_backfill_dagster.store.commit import Brought, Refused

# A provider that failed this often in a row, each time after its own retries, is left alone for the
# rest of the sync: an hour of retries for every month of a decade helps nobody.
PATIENCE = 2

# A first provider that differs by more than this in every price of a stored candle serves another market:
# a correction changes a price or two, a split changes none of what was traded before it.
FAR = 0.05


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
    may answer another time; a symbol that nobody knows leaves nothing to record, if it never did. `quiet`: the
    missing opens that a provider which omits quiet intervals left out between two bars.
    """

    brought: list[Brought] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    evidence: tuple[Evidence, ...] = ()
    quiet: Instants = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    requests: int = 0
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    failed: bool = False
    recordable: bool = False

    def keep(self, name: str, delivery: Delivery, candles: Candles, fetched_at: int) -> None:
        """Candles to be stored, with their origin."""
        origin = (delivery.transport.value, delivery.source, delivery.sha256)
        self.brought.append(Brought(name, *origin, fetched_at, candles))

    def refuse(self, name: str, delivery: Delivery, reason: Reason, candles: Candles) -> None:
        """Rows for the quarantine, with their reason."""
        self.refused.append(Refused(name, delivery.source, reason.value, candles.sorted()))


class Chain:
    """The providers of one sync in order of priority, and how they have behaved so far.

    Left out from the start: who cannot serve the series, and, with a sentence in `warnings`, who
    lacks a key. Dropped on the way, with a sentence in `dropped`: who does not know the symbol. Left
    alone for the rest of the sync: who failed PATIENCE times in a row; another error may concern
    one range only (a plan without today's data). Who says from when on its key covers data is not
    asked for older ones again. `fetch` is called from several threads.

    `stored` gives the stored candles of some opens; `tolerance` is the largest relative difference
    of a price between two quotes of one market. `circuit` is told of every success and failure, and
    decides who is left alone by all processes; unless `heed_circuit` is off, for a person who asks
    wants an answer now.
    """

    def __init__(
        self,
        providers: Mapping[str, Provider],
        series: Series,
        priority: Sequence[str],
        clock: Callable[[], int],
        stored: Callable[[Instants], Candles],
        tolerance: float,
        circuit: Circuit | None = None,
        *,
        heed_circuit: bool = True,
    ) -> None:
        self.series, self.clock = series, clock
        self._stored, self._tolerance = stored, tolerance
        self._circuit, self._heed_circuit = circuit, heed_circuit
        self.warnings: list[str] = []
        self._providers: dict[str, Provider] = {}
        self._lock = threading.Lock()
        self._dropped: dict[str, str] = {}
        self._failures: dict[str, int] = {}
        self._since: dict[str, int] = {}
        self._rests: dict[str, str] = {}
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
    def unfit(self) -> tuple[str, ...]:
        """Who does not know the symbol."""
        return tuple(self._dropped)

    @property
    def dropped(self) -> tuple[str, ...]:
        """Why providers were dropped, a sentence each."""
        return tuple(self._dropped.values())

    @property
    def page_size(self) -> int:
        """Of the provider that is asked first."""
        first = next(iter(self.names), None)
        return self._providers[first].capabilities.page(self.series.timeframe) if first else 1

    def tallies(self) -> dict[str, Tally]:
        return dict(self._tallies)

    def drop(self, name: str, error: UnknownSymbol) -> None:
        with self._lock:
            self._dropped[name] = str(error)

    def remember_failure(self, name: str, error: ProviderError) -> list[str]:
        """It did not answer, its own retries included, or refused to. Returns warnings about it."""
        with self._lock:
            self._failures[name] = self._failures.get(name, 0) + 1
        if self._circuit is None or not isinstance(error, TransientError):
            return []
        rest = self._circuit.failed(name, str(error))
        if rest is None:
            return []
        return [f"{name}: from now on left alone for {rest.seconds:.0f} s: {rest.reason}"]

    def _remember_success(self, name: str) -> list[str]:
        """It answered. Returns warnings about it."""
        with self._lock:
            self._failures[name] = 0
        if self._circuit is None or not self._circuit.succeeded(name):
            return []
        return [f"{name}: it answers again, and is no longer left alone"]

    def _left_alone(self, name: str) -> str | None:
        """Why the provider is not asked now, if so."""
        if self._failures.get(name, 0) >= PATIENCE:
            return f"left alone after {PATIENCE} failures in a row"
        rest = self._circuit.closed_for(name) if self._circuit and self._heed_circuit else None
        with self._lock:
            if rest is None:
                self._rests.pop(name, None)
                return None
            # The same words until it is over, so that they are told once and not with every span.
            return self._rests.setdefault(name, f"left alone for another {rest.seconds:.0f} s: {rest.reason}")

    def stop(self) -> None:
        """Spans that have not begun are not fetched any more."""
        self._stopped.set()

    def estimate(self, name: str, plan: Plan) -> Estimate:
        """What it would cost if this provider alone answered the whole plan."""
        provider = self._providers[name]
        parts = [
            provider.estimate(self.series, window)
            for batches in plan.spans(provider.capabilities.page(self.series.timeframe))
            for window in self._windows(batches, provider)
        ]
        return Estimate(sum(p.requests for p in parts), sum(p.seconds for p in parts))

    def fetch(self, batches: Sequence[Batch], plan: Plan) -> Fetched:
        """Asks for one span. Errors of providers are in the answer; nothing is raised for them."""
        grid = grid_of(self.series)
        found = Fetched()
        wanted = np.concatenate([grid.opens(part) for batch in batches for part in batch.wanted])
        evidence: list[Evidence] = []
        dropped = dict(self._dropped)  # another thread may drop one any time
        unfit = tuple(Evidence(name, self.clock(), "refused", why) for name, why in dropped.items())
        first, refetch = True, plan.scope is Scope.EVERYTHING
        for name in (name for name in self._providers if name not in dropped):
            if not len(wanted) or self._stopped.is_set():
                break
            question = self._question(name, wanted, first=first)
            if not len(question.wanted):  # heard without a request: it will never have them
                evidence.append(question.word("refused", "all of it lies beyond its depth"))
                continue
            word, wanted = self._ask(question, wanted, plan, grid, found)
            evidence.append(word)
            first = False
            if refetch:  # stored candles are compared with the first provider only
                wanted = wanted[plan.missing_ranges.contains(wanted)]
        answered = any(word.answered for word in evidence)
        found.evidence = (*unfit, *evidence)
        found.failed = not answered and (refetch or len(wanted) > 0)
        if found.failed and not found.errors:
            found.errors = [f"{word.provider}: {word.detail}" for word in evidence]
        found.recordable = answered or any(word.provider not in self._dropped for word in evidence)
        return found

    def _ask(
        self, question: _Question, wanted: Instants, plan: Plan, grid: Grid, found: Fetched
    ) -> tuple[Evidence, Instants]:
        """Asks one provider; returns its word and what is still wanted."""
        name, asked = question.name, len(question.wanted)
        message = self._left_alone(name)
        if message is not None:
            self._count(name, Tally(asked=asked, failed=asked))
            found.errors.append(f"{name}: {message}")
            return question.word("error", message), wanted
        before, refused = len(wanted), len(found.refused)
        closed_end = min(plan.window.end, grid.closed_end(question.asked_at - GRACE))
        try:
            for hull in question.hulls(self.series.timeframe):
                window = question.window(hull, self._beside(hull, plan, grid), grid)
                answer = question.provider.fetch(self.series, window)
                found.requests += answer.requests
                found.warnings += [f"{name}: {message}" for message in answer.warnings]
                verdicts = [(d, verify(d.candles, window, grid, closed_end)) for d in answer.deliveries]
                wanted = self._accept(question, verdicts, hull, wanted, found)
        except Cancelled:
            raise
        except ProviderError as error:
            left = before - len(wanted)
            if isinstance(error, TooOld) and int(question.wanted[0]) < error.since:
                return self._ask_newer(question, error, left, wanted, plan, grid, found)
            self._count(name, Tally(asked=asked, delivered=left, failed=asked - left))
            if isinstance(error, UnknownSymbol):
                self.drop(name, error)
            else:
                found.warnings += self.remember_failure(name, error)
            found.errors.append(str(error))
            # A wrong key, an address that has moved: what a person mends is no word about the candles.
            final = isinstance(error, UnknownSymbol | NotEntitled)
            return question.word("refused" if final else "error", str(error)), wanted
        found.warnings += self._remember_success(name)
        rejected = sum(len(r.candles) for r in found.refused[refused:])
        self._count(name, Tally(asked=asked, delivered=before - len(wanted), rejected=rejected))
        if found.refused[refused:] and any(r.reason != Reason.SPLICE for r in found.refused[refused:]):
            return question.word("rejected", f"{rejected} rows quarantined"), wanted
        return question.word("absent", "it quotes another market" if rejected else ""), wanted

    def _ask_newer(
        self,
        question: _Question,
        error: TooOld,
        delivered: int,
        wanted: Instants,
        plan: Plan,
        grid: Grid,
        found: Fetched,
    ) -> tuple[Evidence, Instants]:
        """As `_ask`, for what the key covers, of one that refused because of the older part."""
        name = question.name
        with self._lock:
            self._since[name] = max(error.since, self._since.get(name, error.since))
        newer = self._question(name, wanted, first=question.first)
        older = len(question.wanted) - delivered - len(newer.wanted)
        self._count(name, Tally(asked=delivered + older, delivered=delivered, failed=older))
        if not len(newer.wanted):
            found.errors.append(str(error))
            return question.word("refused", str(error)), wanted
        found.warnings.append(str(error))
        word, wanted = self._ask(newer, wanted, plan, grid, found)
        return replace(word, detail=word.detail or str(error)), wanted

    def _question(self, name: str, wanted: Instants, *, first: bool) -> _Question:
        provider, now = self._providers[name], self.clock()
        reach = provider.capabilities.reach(self.series.timeframe, now)
        since = max((edge for edge in (reach, self._since.get(name)) if edge is not None), default=None)
        within = wanted if since is None else wanted[wanted >= since]
        return _Question(name, provider, within, now, first, since)

    def _accept(
        self,
        question: _Question,
        verdicts: Sequence[tuple[Delivery, Verdict]],
        hull: TimeRange,
        wanted: Instants,
        found: Fetched,
    ) -> Instants:
        """Keeps of a verified answer what is wanted; returns what still is."""
        spliced = self._spliced(question, verdicts, hull, found)
        for delivery, verdict in verdicts:
            for part in verdict.rejected:
                found.refuse(question.name, delivery, part.reason, part.candles)
            good = _only(verdict.good, wanted)
            if spliced:
                found.refuse(question.name, delivery, Reason.SPLICE, good)
            else:
                wanted = missing_of(wanted, good.ts)
                found.keep(question.name, delivery, good, question.asked_at)
        if question.provider.capabilities.omits_quiet and not spliced:
            bars = np.concatenate([np.empty(0, np.int64), *(v.good.ts for _, v in verdicts)])
            if len(bars):
                between = wanted[(wanted > bars.min()) & (wanted < bars.max())]
                told = [part.candles.ts for _, v in verdicts for part in v.rejected]
                found.quiet = np.union1d(found.quiet, between[~_covering(between, told, self.series)])
        return wanted

    def _spliced(
        self,
        question: _Question,
        verdicts: Sequence[tuple[Delivery, Verdict]],
        hull: TimeRange,
        found: Fetched,
    ) -> bool:
        """Whether the provider disagrees beyond the tolerance about a candle beside the hull.

        Then it quotes another market, and its candles would be a step in the series. Compared are
        the prices of the neighbours on either side, as far as both have them. The first provider
        may correct what it said, so of it only what cannot be the same market is refused.
        """
        theirs = Candles.concat([v.good for _, v in verdicts]).sorted()
        theirs = theirs.take((theirs.ts < hull.start) | (theirs.ts >= hull.end))
        fresh = Candles.concat([_only(b.candles, theirs.ts) for b in found.brought]).sorted()
        ours = Candles.concat([fresh, self._stored(missing_of(theirs.ts, fresh.ts))]).sorted()
        theirs = _only(theirs, ours.ts)
        if not len(ours):
            return False
        differences = [np.abs(getattr(ours, p) - getattr(theirs, p)) / getattr(theirs, p) for p in PRICES]
        difference = float(np.min(differences) if question.first else np.max(differences))
        spliced = difference > (FAR if question.first else self._tolerance)
        if spliced:
            found.warnings.append(
                f"{question.name}: its candles of {hull} are quarantined as a splice: beside them it differs by"
                f" {difference:.2%} from what is stored, so it quotes another market"
            )
        return spliced

    def _beside(self, hull: TimeRange, plan: Plan, grid: Grid) -> TimeRange:
        """The hull with its neighbours, as far as they were stored before this sync; a refetch changes them."""
        if plan.scope is Scope.EVERYTHING:
            return hull
        before, after = _neighbours(hull, grid)
        opens = np.concatenate([before, after])
        stored = self._stored(opens[~plan.missing_ranges.contains(opens)]).ts
        return TimeRange(
            int(before[0]) if np.isin(before, stored).any() else hull.start,
            int(grid.closes(after)[0]) if np.isin(after, stored).any() else hull.end,
        )

    def _windows(self, batches: Sequence[Batch], provider: Provider) -> list[TimeRange]:
        wanted = RangeSet([part for batch in batches for part in batch.wanted])
        timeframe = self.series.timeframe
        return list(wanted.merge_closer_than(provider.capabilities.page(timeframe) * timeframe.micros))

    def _count(self, name: str, tally: Tally) -> None:
        with self._lock:
            self._tallies[name] = self._tallies.get(name, Tally()) + tally


@dataclass(frozen=True, slots=True)
class _Question:
    """What one provider is asked for: opens from `since` on, beyond which it has nothing.

    `first`: nobody was asked before it.
    """

    name: str
    provider: Provider
    wanted: Instants
    asked_at: int
    first: bool
    since: int | None = None

    def hulls(self, timeframe: Timeframe) -> list[TimeRange]:
        """The ranges to ask for: scattered candles share a request where one page reaches both."""
        ranges = RangeSet.from_arrays(self.wanted, self.wanted + timeframe.micros)
        return list(ranges.merge_closer_than(self.provider.capabilities.page(timeframe) * timeframe.micros))

    def window(self, hull: TimeRange, beside: TimeRange, grid: Grid) -> TimeRange:
        """With a neighbour on either side where that can tell something.

        Beside a fallback's candles it tells whether it quotes the same market; beside a quiet
        interval, that the provider was there. Of a first provider's whole months only those neighbours
        are asked for that are stored (`beside`): archives and pages are cut to months.
        """
        if self.first and not self.provider.capabilities.omits_quiet:
            return beside if self.since is None else TimeRange(max(beside.start, self.since), beside.end)
        before, after = _neighbours(hull, grid, self.since)
        end = int(grid.closes(after)[0]) if len(after) else hull.end
        return TimeRange(int(before[0]) if len(before) else hull.start, end)

    def word(self, outcome: str, detail: str = "") -> Evidence:
        return Evidence(self.name, self.asked_at, outcome, detail)


def _neighbours(hull: TimeRange, grid: Grid, since: int | None = None) -> tuple[Instants, Instants]:
    """The open before a hull, not before `since`, and the one after it; none where there is none."""
    earliest = hull.start - LONGEST_PAUSE
    if since is not None:
        earliest = min(max(earliest, since), hull.start)
    return (
        grid.opens(TimeRange(earliest, hull.start))[-1:],
        grid.opens(TimeRange(hull.end, hull.end + LONGEST_PAUSE))[:1],
    )


def _covering(opens: Instants, rows: Sequence[Instants], series: Series) -> NDArray[np.bool_]:
    """In which of these intervals rows lie, on the grid or off it; `opens` ascending."""
    ts = np.sort(np.concatenate([np.empty(0, np.int64), *rows]))
    closes = grid_of(series).closes(opens)
    return np.searchsorted(ts, opens) < np.searchsorted(ts, closes)


def _only(candles: Candles, wanted: Instants) -> Candles:
    """The candles whose open is wanted; `wanted` ascending. All of them is the usual case."""
    if len(candles) == 0 or len(wanted) == 0:
        return candles.take(slice(0, 0))
    index = np.minimum(np.searchsorted(wanted, candles.ts), len(wanted) - 1)
    mask = wanted[index] == candles.ts
    return candles if bool(mask.all()) else candles.take(mask)
