"""What every operation of the pipeline needs, built once by a user interface (`app.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fks_backfill_dagster.domain.closures import Dates, closed_ranges, market_closures
from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.series import Instrument, Series
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.pipeline.calendars import CalendarWatch
from fks_backfill_dagster.pipeline.eligible import eligible, strict
from fks_backfill_dagster.providers.base import Circuit, Provider
from fks_backfill_dagster.store.database import Database


@dataclass(frozen=True, slots=True)
class Context:
    """The dependencies and settings of a sync; a user interface builds it once and passes it to every operation.

    `providers` by name; `clock` returns the present in microseconds; `priority` returns the configured providers of a
    series, independent of a call's own choice; `closed_dates` the dates on which the market of a series was closed
    although candles are expected; `calendars` compares each exchange calendar once.
    """

    database: Database
    providers: Mapping[str, Provider]
    clock: Callable[[], int]
    batch_size_days: int = 30
    max_concurrent_requests: int = 5
    tolerance: float = 0.01
    max_gap_minutes: int = 5
    circuit: Circuit | None = None
    priority: Callable[[Series], Sequence[str]] = lambda series: ()
    closed_dates: Callable[[Series], Dates] = lambda series: ()
    calendars: CalendarWatch = field(default_factory=CalendarWatch)

    def closed(self, series: Series, window: TimeRange) -> RangeSet:
        """Where the market of a series was closed within a window although candles are expected."""
        return market_closures(series, self.closed_dates(series), window)

    def action_priority(self, instrument: Instrument) -> Sequence[str]:
        """The order of the providers whose actions of an instrument are used: that of its days."""
        return self.priority(instrument.at(Timeframe.D1))

    @property
    def strict(self) -> frozenset[str]:
        """The providers that return every interval, with or without trades."""
        return strict(self.providers)

    def declared(self, series: Series) -> RangeSet:
        """Where the market of a series was closed by the settings."""
        return closed_ranges(series, self.closed_dates(series))

    def eligible(self, series: Series) -> frozenset[str]:
        """The names of the eligible providers of a series by the settings."""
        return eligible(self.providers, series, self.priority(series)).names
