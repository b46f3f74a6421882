"""The result of a sync, and the plan of one that is not carried out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.pipeline.fetch.fetched import Tally
from fks_backfill_dagster.pipeline.plan import Plan
from fks_backfill_dagster.providers.base import Estimate


@dataclass(frozen=True, slots=True)
class SyncReport:
    """The result of one sync.

    `missing` counts the candles that are still missing, explained or not; `no_trade` the no-trade intervals.
    `total_candles` were inserted or changed by this call. `outdated`: stored candles that differ in an older
    publication, unchanged. `withdrawn`: stored candles that their provider no longer returns, removed.
    `listing`: the listing that cuts off the beginning of the range. `pinned`: candles that differ from what a person
    corrected, not written.
    """

    series: Series
    window: TimeRange
    total_batches: int = 0
    successful_batches: int = 0
    failed_batches: int = 0
    total_candles: int = 0
    expected: int = 0
    missing: int = 0
    no_trade: int = 0
    requests: int = 0
    seconds: float = 0.0
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    providers: Mapping[str, Tally] = field(default_factory=dict)
    outdated: int = 0
    withdrawn: int = 0
    listing: str | None = None
    pinned: int = 0

    @property
    def stored(self) -> int:
        """The number of candles that the range contains now."""
        return self.expected - self.missing - self.no_trade

    @property
    def complete(self) -> bool:
        """Whether nothing failed and no candle of the range is missing."""
        return not self.errors and self.missing == 0


@dataclass(frozen=True, slots=True)
class DryRun:
    """The plan of a sync and its cost per provider, in the order of requests."""

    plan: Plan
    estimates: tuple[tuple[str, Estimate], ...]
    warnings: tuple[str, ...]
