"""A request for one range to one provider, and its verified result."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fks_backfill_dagster.domain.actions import ReportedActions
from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.delivery import Delivery, RejectedRows
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.providers.base import Clocks

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
    lacking: the wanted candles that the provider did not return; of these `confirmed` are absent in two complete
    responses with candles on both sides (or when the market was closed), `partial` are derived candles with
    missing parts, with a detail each, and `pending` are not closed yet by the provider's clock. absent: the confirmed
    absences as ranges of time, parts included.
    error: why the second request failed, if it did: then nothing is confirmed.
    actions: the corporate actions in the responses.
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
    actions: tuple[ReportedActions, ...] = ()

    @property
    def candles(self) -> Candles:
        return Candles.concat([delivery.candles for delivery in self.kept]).sorted()
