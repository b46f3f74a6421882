"""Which providers validate a series, and at which timeframe.

Belongs here: the choice by capabilities, keys, depth and lineage. Does not belong here: their requests
(`validation_requests`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fks_backfill_dagster.domain.derive import divides
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, Timeframe, iso
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.pipeline.eligible import Eligible
from fks_backfill_dagster.providers.base import Provider, UnknownSymbol
from fks_backfill_dagster.store.validations import Delivered

_DIVIDED = 60 * MICROS_PER_DAY
"""The length of the range in which one grid is tested to divide another: its irregularities recur within it."""


@dataclass(frozen=True, slots=True)
class Validators:
    """The chosen providers, with a warning for each that is skipped because its key is missing, and the series at the
    compared timeframe. Without providers, `reason` says why."""

    series: Series
    chosen: Eligible
    reason: str | None = None


def choose_validators(
    context: Context, series: Series, stored: Sequence[Delivered], lists: Sequence[Sequence[str]]
) -> Validators:
    """The first of `lists` with a provider that can validate the series decides; if none has one, the finest coarser
    timeframe that one of them all can validate.

    `stored`: the candles to compare. A provider can validate a series if it serves it, has its key, reaches back to
    one of these candles, and did not deliver all of them.
    """
    choice = _Choice(context, series, stored)
    for names in lists:
        if found := choice.able(names, series):
            return choice.made(series, found)
    everyone = tuple(dict.fromkeys(name for names in lists for name in names))
    for timeframe in Timeframe:
        if timeframe.micros <= series.timeframe.micros:
            continue
        coarser = series.at(timeframe)
        if choice.aggregates(coarser) and (found := choice.able(everyone, coarser)):
            return choice.made(coarser, found)
    return Validators(series, Eligible({}, tuple(choice.warnings)), choice.reason(everyone))


@dataclass(slots=True)
class _Choice:
    """A choice under way: the warnings and the reasons so far, the first one of each provider."""

    context: Context
    series: Series
    stored: Sequence[Delivered]
    warnings: dict[str, None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def made(self, series: Series, found: dict[str, Provider]) -> Validators:
        return Validators(series, Eligible(found, tuple(self.warnings)))

    def able(self, names: Sequence[str], series: Series) -> dict[str, Provider]:
        found = {}
        for name in dict.fromkeys(names):
            why = self._obstacle(name, series)
            if why is None:
                found[name] = self.context.providers[name]
            else:
                self.reasons.setdefault(name, why)
        return found

    def aggregates(self, coarser: Series) -> bool:
        """Whether candles of the series can be aggregated to that timeframe."""
        first = min(one.first for one in self.stored)
        window = TimeRange(first, first + _DIVIDED)
        return divides(grid_of(self.series), grid_of(coarser), window)

    def reason(self, names: Sequence[str]) -> str:
        """Why no provider can validate the series."""
        if not names:
            return f"no provider other than its own is configured for {self.series}"
        return "; ".join(f"{name} {self.reasons[name]}" for name in names if name in self.reasons)

    def _obstacle(self, name: str, series: Series) -> str | None:
        """Why a provider cannot validate a series; None if it can."""
        provider = self.context.providers.get(name)
        if provider is None:
            return "is disabled"
        if not provider.capabilities.serve(series):
            return f"has no {self.series.timeframe} candles of {self.series.asset_class}"
        if (variable := provider.missing_key()) is not None:
            self.warnings[f"{name} is skipped: {variable} is not set"] = None
            return f"needs a key: {variable} is not set"
        try:
            is_own = delivered_for(provider, series)
        except UnknownSymbol as error:
            return f"has no such symbol ({error})"
        others = [one for one in self.stored if not is_own(one)]
        if not others:
            return "delivered these candles itself"
        reach = provider.capabilities.reach(series.timeframe, self.context.clock())
        if reach is not None and max(one.last for one in others) < reach:
            return f"has nothing before {iso(reach)}"
        return None


def delivered_for(provider: Provider, series: Series) -> Callable[[Delivered], bool]:
    """Whether candles are the provider's own: it delivered them for the instrument that it would be requested for
    now, or for an unrecorded one. Raises UnknownSymbol."""
    mine = (provider.instrument(series), None, "")
    return lambda one: one.provider == provider.name and one.instrument in mine
