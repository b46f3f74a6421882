"""One range from one provider in derived candles: requests the parts, then derives the candles.

A missing part leaves its candle absent, unless it is a no-trade interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.delivery import Delivery, Transport, holding_rejected
from fks_backfill_dagster.domain.derive import Derived, derive, owners, parts_span
from fks_backfill_dagster.domain.grid import Grid, grid_of
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange, before
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.ledger.gaps import missing_of
from fks_backfill_dagster.ledger.no_trade import Absent, no_trade
from fks_backfill_dagster.pipeline.fetch.clocks import closed_by_both
from fks_backfill_dagster.pipeline.fetch.native import NativeAnswer, request_native
from fks_backfill_dagster.pipeline.fetch.range_request import ProviderAnswer, RangeRequest
from fks_backfill_dagster.pipeline.plan import GRACE
from fks_backfill_dagster.providers.base import Provider

_NONE = np.empty(0, dtype=np.int64)


def request_derived(provider: Provider, request: RangeRequest, parts: Series) -> ProviderAnswer:
    """Requests the parts and derives the candles. A missing part leaves its candle absent; rejected parts are
    quarantined unchanged."""
    coarse, fine = grid_of(request.series), grid_of(parts)
    span = parts_span(coarse, request.window)
    if request.since is not None:
        span = TimeRange(max(span.start, min(request.since, span.end)), span.end)
    closed_end = fine.closed_end(request.now - GRACE)
    wanted = before(fine.opens(span), closed_end)
    if not len(wanted):
        return ProviderAnswer((), (), request.wanted, _NONE)
    native = request_native(provider, replace(request, series=parts, wanted=wanted, window=span), widen=True)
    answer = native.answer
    candles = answer.candles
    lost = missing_of(wanted, candles.ts)
    sure = ~holding_rejected(lost, answer.rejected, fine)
    quiet = lost[sure & request.declared.contains(lost)]
    if provider.capabilities.omits_no_trade:
        quiet_end = max(span.start, fine.closed_end(closed_by_both(request, answer.clocks)))
        found = _quiet_parts(
            native, candles, request, fine, TimeRange(span.start, min(closed_end, quiet_end))
        )
        quiet = np.union1d(quiet, found)
    made = derive(candles, fine, coarse, request.window, quiet)
    closed = coarse.closed_end(closed_by_both(request, answer.clocks))
    kept = _derived_delivery(answer.kept, made.candles.within(TimeRange(0, max(closed, 0))))
    lacking = missing_of(before(request.wanted, closed), kept[0].candles.ts if kept else _NONE)
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
    native: NativeAnswer, candles: Candles, request: RangeRequest, fine: Grid, wanted: TimeRange
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
    """The absences at other providers, except candles of which this provider has a part inside such an absence.

    That part was traded, so the other provider had an outage: it does not corroborate that other parts of the candle
    are no-trade.
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
    """The candles with some parts present and others missing, grouped by the numbers of both."""
    mask = made.partial & np.isin(made.opens, lacking)
    kinds = sorted(set(zip(made.present[mask].tolist(), made.expected[mask].tolist(), strict=True)))
    return [
        (
            f"derived from {present} of {expected} parts",
            made.opens[mask & (made.present == present) & (made.expected == expected)],
        )
        for present, expected in kinds
    ]
