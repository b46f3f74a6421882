"""One range from one provider: fetch, verify, request missing candles again, derive.

    fetch ─> verify ─> reject foreign responses ─> fetch missing candles again ─> (derive) ─> ProviderAnswer

The second request removes glitches and confirms absences: a candle is absent if two complete responses lack it.
A derived series is requested as its parts, and these steps apply to the parts.

Belongs here: the steps for one provider that need no stored candle. Does not belong here: which provider is
requested next (`fallback`), comparison with stored candles (`splice`), storing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.continuity import contradict, doubtful, foreign
from fks_backfill_dagster.domain.delivery import Delivery, RejectedRows, Transport, holding_rejected
from fks_backfill_dagster.domain.derive import Derived, derive, owners, parts_span
from fks_backfill_dagster.domain.grid import Grid, grid_of
from fks_backfill_dagster.domain.quality import Reason, verify
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_MINUTE
from fks_backfill_dagster.ledger.gaps import missing_of
from fks_backfill_dagster.ledger.no_trade import NEIGHBOURS, Absent, no_trade
from fks_backfill_dagster.pipeline.plan import GRACE
from fks_backfill_dagster.providers.base import (
    Answer,
    Cancelled,
    Clocks,
    ClocksDiffer,
    Contradiction,
    Provider,
    ProviderError,
)

_NONE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class RangeRequest:
    """A request to one provider.

    wanted: expected opens of the series, ascending. window: the requested range, `wanted` with a neighbour on
    either side where that is useful. now: candles that are closed then are requested. since: the earliest open that
    the provider can have, None: no limit. closed: where the market was closed, as candles of the requested timeframe;
    declared: the part of it that the settings close.
    absent_elsewhere: the ranges of time that complete responses of other providers lack.
    tolerance: the largest relative difference between two responses about one candle.
    """

    series: Series
    wanted: Instants
    window: TimeRange
    now: int
    since: int | None = None
    closed: RangeSet = RangeSet()  # noqa: RUF009 - immutable
    declared: RangeSet = RangeSet()  # noqa: RUF009 - immutable
    absent_elsewhere: RangeSet = RangeSet()  # noqa: RUF009 - immutable
    tolerance: float = 0.01


@dataclass(frozen=True, slots=True, eq=False)
class ProviderAnswer:
    """The verified result of a request.

    kept: verified candles of the window, neighbours included; ascending. rejected: rows that broke a rule.
    lacking: the wanted candles that the provider did not give; of these `confirmed` are absent in two complete
    responses with candles on both sides (or when the market was closed), `partial` are derived candles with
    missing parts, with a detail each, and `pending` are not closed yet by the provider's clock. absent: the confirmed
    absences as ranges of time, parts included.
    error: why the second request failed, if it did: then nothing is confirmed.
    """

    kept: tuple[Delivery, ...]
    rejected: tuple[RejectedRows, ...]
    lacking: Instants
    confirmed: Instants
    partial: tuple[tuple[str, Instants], ...] = ()
    absent: RangeSet = RangeSet()  # noqa: RUF009 - immutable
    requests: int = 0
    warnings: tuple[str, ...] = ()
    error: str | None = None
    pending: Instants = field(default_factory=lambda: _NONE)
    clocks: Clocks | None = None

    @property
    def candles(self) -> Candles:
        return Candles.concat([delivery.candles for delivery in self.kept]).sorted()


def request_range(provider: Provider, request: RangeRequest) -> ProviderAnswer:
    """Requests the wanted candles from one provider.

    Raises ProviderError if the first request fails, and Contradiction if its responses still contradict one another
    after everything was requested again: which of them are correct is unknown. Raises ClocksDiffer if its clock and
    ours differ by more than MOST_APART, and wanted candles are closed by only one of them.
    """
    try:
        return _request(provider, request)
    except Contradiction as contradiction:
        spent = contradiction.requests
    try:
        answer = _request(provider, request)
    except ProviderError as error:
        error.requests += spent
        raise
    return replace(answer, requests=answer.requests + spent)


def _request(provider: Provider, request: RangeRequest) -> ProviderAnswer:
    parts = provider.capabilities.parts(request.series)
    if parts is request.series.timeframe:
        answer = _request_native(provider, request, widen=False).answer
    else:
        answer = _request_derived(provider, request, replace(request.series, timeframe=parts))
    lacking = missing_of(request.wanted, answer.candles.ts)
    if answer.clocks is None:
        return replace(answer, lacking=lacking)
    grid = grid_of(request.series)
    closed_end = grid.closed_end(_seen(request, answer.clocks))
    pending = lacking[int(np.searchsorted(lacking, closed_end)) :]
    return replace(answer, lacking=lacking, pending=pending)


# Clocks -------------------------------------------------------------------------------------------------


# The largest clock difference that is waited for.
MOST_APART = 3 * MICROS_PER_MINUTE


def _seen(request: RangeRequest, clocks: Clocks | None) -> int:
    """The instant before which a candle of a response must have closed: by our clock and by the provider's."""
    ours = request.now - GRACE
    return ours if clocks is None else min(ours, clocks.theirs)


def _check_clocks(provider: Provider, request: RangeRequest, answer: Answer, grid: Grid) -> None:
    """Raises ClocksDiffer; see `request_range`.

    If the provider's clock is behind, it may not have candles that are closed by ours; if it is ahead, our clock may
    prevent a request for newer ones. A range that ends before both clocks does not depend on them.
    """
    clocks = answer.clocks
    if clocks is None or clocks.apart <= MOST_APART or not len(request.wanted):
        return
    newest = int(request.wanted[-1])
    following = grid.next_open(newest + 1)
    if clocks.theirs < clocks.ours:
        is_uncertain = newest >= grid.closed_end(clocks.theirs)
    elif following is None or following < grid.closed_end(request.now - GRACE):
        is_uncertain = False
    else:
        is_uncertain = int(grid.closes(np.array([following]))[0]) <= clocks.theirs
    if is_uncertain:
        error = ClocksDiffer(
            provider.name,
            f"{clocks}: which candles of {request.series} are closed is uncertain, so its response is refused: correct"
            " the clock of this machine, or request a range that ends before both",
        )
        error.requests = answer.requests
        raise error


# Native candles -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Native:
    """A result in native candles; `covered` are the requested ranges."""

    answer: ProviderAnswer
    covered: RangeSet


def _request_native(provider: Provider, request: RangeRequest, *, widen: bool) -> _Native:
    grid = grid_of(request.series)
    first = _fetch(provider, request, request.window, grid)
    closed_end = grid.closed_end(_seen(request, first.clocks))
    lacking = missing_of(_before(request.wanted, closed_end), first.candles.ts)
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


def _fetch(provider: Provider, request: RangeRequest, window: TimeRange, grid: Grid) -> _Fetched:
    answer = provider.fetch(request.series, window)
    _check_clocks(provider, request, answer, grid)
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
) -> _Native:
    """The first result, completed by the candles that only the second one has."""
    kept, have = list(first.kept), first.candles.ts
    for more in again:
        for delivery in more.kept:
            fresh = delivery.candles.take(~np.isin(delivery.candles.ts, have))
            if len(fresh):
                kept.append(replace(delivery.with_candles(fresh), seams=_NONE))
                have = np.union1d(have, fresh.ts)
    rejected = [*first.rejected, *(part for more in again for part in more.rejected)]
    lacking = missing_of(_before(request.wanted, closed_end), have)
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
    )
    return _Native(answer, RangeSet([first.window, *(more.window for more in again)]))


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


def _before(opens: Instants, end: int) -> Instants:
    return opens[: int(np.searchsorted(opens, end))]


# Derived candles ----------------------------------------------------------------------------------------


def _request_derived(provider: Provider, request: RangeRequest, parts: Series) -> ProviderAnswer:
    """Requests the parts and derives the candles. A missing part leaves its candle absent; rejected parts are
    quarantined unchanged."""
    coarse, fine = grid_of(request.series), grid_of(parts)
    span = parts_span(coarse, request.window)
    if request.since is not None:
        span = TimeRange(max(span.start, min(request.since, span.end)), span.end)
    closed_end = fine.closed_end(request.now - GRACE)
    wanted = _before(fine.opens(span), closed_end)
    if not len(wanted):
        return ProviderAnswer((), (), request.wanted, _NONE)
    native = _request_native(provider, replace(request, series=parts, wanted=wanted, window=span), widen=True)
    answer = native.answer
    candles = answer.candles
    lost = missing_of(wanted, candles.ts)
    sure = ~holding_rejected(lost, answer.rejected, fine)
    quiet = lost[sure & request.declared.contains(lost)]
    if provider.capabilities.omits_quiet:
        quiet_end = max(span.start, fine.closed_end(_seen(request, answer.clocks)))
        found = _quiet_parts(
            native, candles, request, fine, TimeRange(span.start, min(closed_end, quiet_end))
        )
        quiet = np.union1d(quiet, found)
    made = derive(candles, fine, coarse, request.window, quiet)
    closed = coarse.closed_end(_seen(request, answer.clocks))
    kept = _derived_delivery(answer.kept, made.candles.within(TimeRange(0, max(closed, 0))))
    lacking = missing_of(_before(request.wanted, closed), kept[0].candles.ts if kept else _NONE)
    return replace(
        answer,
        kept=kept,
        rejected=tuple(
            replace(mine, owners=owners(made.opens, coarse, mine.candles.ts))
            for part in answer.rejected
            # Rows of the neighbourhood belong to none of the candles.
            if len((mine := part.within(span)).candles)
        ),
        lacking=lacking,
        confirmed=_wholly_absent(made, lacking, answer.confirmed, coarse),
        partial=tuple(_partial(made, lacking)),
    )


def _quiet_parts(
    native: _Native, candles: Candles, request: RangeRequest, fine: Grid, wanted: TimeRange
) -> Instants:
    """The absent parts that are no-trade intervals, by the rule of `no_trade`.

    Around the wanted parts one response without a part counts as a confirmation: a separate request would confirm it,
    and the decision must not depend on the size of the request.
    """
    covered = native.covered & RangeSet([TimeRange(native.covered.hull.start, wanted.end)])
    expected = np.concatenate([_NONE, *(fine.opens(part) for part in covered)])
    absent = missing_of(expected, candles.ts)
    around = absent[(absent < wanted.start) | (absent >= wanted.end)]
    witnesses = around[~holding_rejected(around, native.answer.rejected, fine)]
    closes = fine.closes(absent)
    elsewhere = _absent_elsewhere(request, candles)
    twice = absent[elsewhere.contains(absent) & elsewhere.contains(np.maximum(closes - 1, absent))]
    confirmed = np.union1d(native.answer.confirmed, witnesses)
    mask = no_trade(Absent.of(absent, confirmed, twice), covered, fine, request.closed)
    return absent[mask]


def _absent_elsewhere(request: RangeRequest, given: Candles) -> RangeSet:
    """The absences at other providers, without the candles of which this provider has a part that they lack.

    Such a part refutes them: a provider without the whole candle had an outage, and does not corroborate that parts
    of it are no-trade.
    """
    coarse = grid_of(request.series)
    opens = coarse.opens(request.window)
    closes, span = coarse.closes(opens), parts_span(coarse, request.window)
    refuting = given.within(span).ts
    index = np.searchsorted(closes, refuting[request.absent_elsewhere.contains(refuting)], side="right")
    starts = np.concatenate([[span.start], closes[:-1]])
    return request.absent_elsewhere - RangeSet.from_arrays(starts[index], closes[index])


def _derived_delivery(parts: Sequence[Delivery], candles: Candles) -> tuple[Delivery, ...]:
    """One delivery, with the request of the parts as its source."""
    if not len(candles) or not parts:
        return ()
    return (Delivery(candles, replace(parts[0].origin, transport=Transport.DERIVED)),)


def _wholly_absent(made: Derived, lacking: Instants, confirmed: Instants, coarse: Grid) -> Instants:
    """The missing candles whose parts are all confirmed to be absent."""
    if not len(made.opens):
        return _NONE
    index = np.searchsorted(coarse.closes(made.opens), confirmed, side="right")
    counted = np.bincount(index[index < len(made.opens)], minlength=len(made.opens))
    return np.intersect1d(lacking, made.opens[(counted == made.expected) & (made.expected > 0)])


def _partial(made: Derived, lacking: Instants) -> list[tuple[str, Instants]]:
    """The candles with some parts present and others missing, grouped by their numbers."""
    mask = made.partial & np.isin(made.opens, lacking)
    kinds = sorted(set(zip(made.present[mask].tolist(), made.expected[mask].tolist(), strict=True)))
    return [
        (
            f"derived from {present} of {expected} parts",
            made.opens[mask & (made.present == present) & (made.expected == expected)],
        )
        for present, expected in kinds
    ]
