"""One range from one provider in candles of its own: fetch, verify, request missing candles again.

    fetch ─> verify ─> reject foreign responses ─> fetch missing candles again

The second request removes glitches and confirms absences: a candle is absent if two complete responses lack it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fks_backfill_dagster.domain.actions import ReportedActions
from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.continuity import contradict, doubtful, foreign
from fks_backfill_dagster.domain.delivery import Delivery, RejectedRows, holding_rejected
from fks_backfill_dagster.domain.grid import Grid, grid_of
from fks_backfill_dagster.domain.quality import Reason, verify
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange, before
from fks_backfill_dagster.ledger.gaps import missing_of
from fks_backfill_dagster.ledger.no_trade import NEIGHBOURS
from fks_backfill_dagster.pipeline.fetch.clocks import check_clocks, closed_by_both
from fks_backfill_dagster.pipeline.fetch.range_request import ProviderAnswer, RangeRequest
from fks_backfill_dagster.pipeline.plan import GRACE
from fks_backfill_dagster.providers.base import Cancelled, Clocks, Contradiction, Provider, ProviderError

_NONE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class NativeAnswer:
    """A result in native candles; `covered` are the requested ranges."""

    answer: ProviderAnswer
    covered: RangeSet


def request_native(provider: Provider, request: RangeRequest, *, widen: bool) -> NativeAnswer:
    """Requests the wanted candles, then once more those that the first response lacks, unless `fetch` does that itself.
    `widen`: see `_windows_again`.

    Raises ProviderError if the first request fails, and Contradiction if the second response has other values for a
    candle. If the second request fails, the answer has its error, and confirms nothing.
    """
    grid = grid_of(request.series)
    first = _fetch(provider, request, request.window, grid)
    closed_end = grid.closed_end(closed_by_both(request, first.clocks))
    lacking = missing_of(before(request.wanted, closed_end), first.candles.ts)
    if provider.capabilities.confirms_absence and not first.has_foreign:
        lacking = _NONE
    again: list[_Fetched] = []
    error: str | None = None
    spent = first.requests
    try:
        for window in _windows_again(
            provider, request, np.union1d(lacking, first.doubtful), grid, closed_end, widen=widen
        ):
            again.append(_fetch(provider, request, window, grid))
            spent += again[-1].requests
            if contradict(first.candles, again[-1].candles, request.tolerance):
                raise Contradiction(
                    provider.name, f"it gives different values for the same candles of {request.series}"
                )
    except (Cancelled, Contradiction) as failure:
        failure.requests += spent
        raise
    except ProviderError as failure:
        spent += failure.requests
        error = str(failure)
    return _merged(first, again, request, closed_end, error, spent)


@dataclass(frozen=True, slots=True, eq=False)
class _Fetched:
    """One verified fetch. `candles`: all valid candles, ascending. `has_foreign`: it contained a response of another
    instrument. `doubtful`: opens beyond a jump at the edge of a response."""

    window: TimeRange
    kept: tuple[Delivery, ...]
    rejected: tuple[RejectedRows, ...]
    candles: Candles
    requests: int
    warnings: tuple[str, ...]
    has_foreign: bool
    doubtful: Instants
    clocks: Clocks | None
    actions: ReportedActions | None


def _fetch(provider: Provider, request: RangeRequest, window: TimeRange, grid: Grid) -> _Fetched:
    answer = provider.fetch(request.series, window)
    check_clocks(provider, request, answer, grid)
    closed_end = grid.closed_end(request.now - GRACE)
    kept: list[Delivery] = []
    rejected: list[RejectedRows] = []
    has_foreign, doubts = False, [_NONE]
    for delivery in answer.deliveries:
        verdict = verify(delivery.candles, window, grid, closed_end)
        rejected += [RejectedRows.of(delivery.origin, part.reason, part.candles) for part in verdict.rejected]
        good, strange = verdict.good, foreign(verdict.good, delivery.seams)
        if strange.any():
            has_foreign = True
            rejected.append(RejectedRows.of(delivery.origin, Reason.WRONG_SYMBOL, good.take(strange)))
            good = good.take(~strange)
        else:
            doubts.append(good.ts[doubtful(good, delivery.seams)])
        kept.append(delivery.with_candles(good))
    candles = Candles.concat([delivery.candles for delivery in kept]).sorted()
    return _Fetched(
        window,
        tuple(kept),
        tuple(rejected),
        candles,
        answer.requests,
        answer.warnings,
        has_foreign,
        np.unique(np.concatenate(doubts)),
        answer.clocks,
        answer.actions,
    )


def _windows_again(
    provider: Provider, request: RangeRequest, lacking: Instants, grid: Grid, closed_end: int, *, widen: bool
) -> list[TimeRange]:
    """The ranges of the second request: missing candles with a neighbour on either side; `widen`: with the
    neighbourhood that `no_trade` evaluates, if that extends beyond the window."""
    if not len(lacking):
        return []
    timeframe = request.series.timeframe
    ranges = RangeSet.from_arrays(lacking, grid.closes(lacking)).merge_closer_than(
        provider.capabilities.page(timeframe) * timeframe.micros
    )
    found = []
    for part in ranges:
        low, high = grid.previous_open(part.start), grid.next_open(part.end)
        start = part.start if low is None else low
        end = part.end if high is None else int(grid.closes(np.array([high]))[0])
        if widen:
            start, end = _widened(TimeRange(start, end), request.window, grid)
        if request.since is not None:
            start = max(start, min(request.since, part.start))
        found.append(TimeRange(start, max(start, min(end, max(closed_end, part.end)))))
    return found


def _widened(window: TimeRange, known: TimeRange, grid: Grid) -> tuple[int, int]:
    """The window with NEIGHBOURS candles on either side, except on a side where `known` holds them."""
    low, high = grid.rank(np.array([window.start, window.end])).tolist()
    edges = grid.at(np.array([max(low - NEIGHBOURS, 0), high + NEIGHBOURS])).tolist()
    start = window.start if edges[0] >= known.start else edges[0]
    end = window.end if edges[1] <= known.end else edges[1]
    return start, end


def _merged(
    first: _Fetched,
    again: Sequence[_Fetched],
    request: RangeRequest,
    closed_end: int,
    error: str | None,
    requests: int,
) -> NativeAnswer:
    """The first result, completed by the candles that only the second one has."""
    kept, have = list(first.kept), first.candles.ts
    for more in again:
        for delivery in more.kept:
            fresh = delivery.candles.take(~np.isin(delivery.candles.ts, have))
            if len(fresh):
                kept.append(replace(delivery.with_candles(fresh), seams=_NONE))
                have = np.union1d(have, fresh.ts)
    rejected = [*first.rejected, *(part for more in again for part in more.rejected)]
    lacking = missing_of(before(request.wanted, closed_end), have)
    # In a closed market no candles on both sides are required: a range may begin or end in a holiday.
    sure = request.closed.contains(lacking)
    if len(have):
        sure |= (lacking > have.min()) & (lacking < have.max())
    grid = grid_of(request.series)
    confirmed = _NONE if error else lacking[sure & ~holding_rejected(lacking, rejected, grid)]
    answer = ProviderAnswer(
        kept=tuple(delivery for delivery in kept if len(delivery.candles)),
        rejected=tuple(_still_rejected(rejected, have)),
        lacking=lacking,
        confirmed=confirmed,
        absent=RangeSet.from_arrays(confirmed, grid.closes(confirmed)),
        requests=requests,
        warnings=tuple(
            dict.fromkeys((*_doubts(first), *first.warnings, *(w for more in again for w in more.warnings)))
        ),
        error=error,
        clocks=first.clocks,
        actions=tuple(one.actions for one in (first, *again) if one.actions),
    )
    return NativeAnswer(answer, RangeSet([first.window, *(more.window for more in again)]))


def _doubts(first: _Fetched) -> tuple[str, ...]:
    """The warning about a jump at the edge of a response that the second response confirms: its candles are kept."""
    if not len(first.doubtful):
        return ()
    return (
        f"{len(first.doubtful):,} candles lie beyond a jump of 20 % or more at the edge of a response:"
        " a split, a crash, or another symbol",
    )


def _still_rejected(rejected: Sequence[RejectedRows], have: Instants) -> list[RejectedRows]:
    """The rejected rows, without a response of another instrument if the second request returned the correct rows."""
    found = []
    for part in rejected:
        if part.reason is Reason.WRONG_SYMBOL and np.isin(part.candles.ts, have).all():
            continue
        found.append(part)
    return found
