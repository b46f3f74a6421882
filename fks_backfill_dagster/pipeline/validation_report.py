"""What a validation finds: counts per provider, and the verdict.

Belongs here: the values and how they follow from one another. Does not belong here: requests and comparisons
(`validate`).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.comparison import STORED, Compared, Discrepancy, Spread, odd_one_out
from fks_backfill_dagster.domain.patterns import Classification, classify
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series

MOST_DISCREPANCIES = 100
"""The worst ones are reported, and the number of all."""

_KEPT = 20_000
"""Candles of blocks with discrepancies that are kept, by provider, to find their pattern."""


class NotComparable(StrEnum):
    """Why a sampled candle was not compared with a provider; the value is its name in JSON."""

    OWN = "delivered_by_it"
    BEYOND = "beyond_its_data"
    """Older than its depth, its key or its listing of the symbol."""
    ABSENT = "not_returned"
    FAILED = "request_failed"


@dataclass(slots=True)
class SourceTally:
    """The counts of one provider.

    compared: candles; differing: of these with a discrepancy; discrepancies: prices. worst: the largest ones.
    """

    name: str
    requests: int = 0
    compared: int = 0
    differing: int = 0
    discrepancies: int = 0
    spread: Spread = field(default_factory=Spread)
    not_comparable: Counter[NotComparable] = field(default_factory=Counter)
    errors: dict[str, None] = field(default_factory=dict)
    warnings: dict[str, None] = field(default_factory=dict)
    worst: list[Discrepancy] = field(default_factory=list)
    _differing_blocks: list[tuple[Candles, Candles]] = field(default_factory=list)

    def add(self, compared: Compared, other: Candles) -> None:
        """Counts a block; `other`: the provider's candles of it."""
        self.compared += len(compared)
        self.spread += compared
        count = int(compared.exceeded.sum())
        if not count:
            return
        self.discrepancies += count
        self.differing += int(compared.exceeded.any(axis=0).sum())
        worst = [*self.worst, *compared.worst(MOST_DISCREPANCIES)]
        self.worst = heapq.nlargest(MOST_DISCREPANCIES, worst, key=lambda one: one.excess)
        if sum(len(mine) for mine, _ in self._differing_blocks) < _KEPT:
            self._differing_blocks.append((compared.stored, other))

    def fail(self, error: str, candles: int) -> None:
        self.errors[error] = None
        self.miss(NotComparable.FAILED, candles)

    def miss(self, why: NotComparable, candles: int) -> None:
        if candles:
            self.not_comparable[why] += candles

    def classified(self, tolerance: float, step: int) -> Classification | None:
        """The pattern of its discrepancies; None without one."""
        if not self._differing_blocks:
            return None
        mine, its = zip(*self._differing_blocks, strict=True)
        return classify(Candles.concat(mine).sorted(), Candles.concat(its).sorted(), tolerance, step)


@dataclass(frozen=True, slots=True)
class ValidationEstimate:
    """The estimated cost of a validation at one provider; `seconds` at its rate limit."""

    requests: int
    candles: int
    seconds: float

    def __add__(self, other: ValidationEstimate) -> ValidationEstimate:
        return ValidationEstimate(
            self.requests + other.requests, self.candles + other.candles, self.seconds + other.seconds
        )


@dataclass(frozen=True, slots=True)
class ValidationReport:
    """The result of a validation.

    compared_series: the series at the compared timeframe. stored: candles of the window. sampled: candles to compare,
    at the compared timeframe; compared: of these compared with at least one provider; unverified: with none, since a
    request failed. incomplete: candles that could not be aggregated. complete: whether all stored candles were to be
    compared. ranges: of the sample. odd: by source, in how many candles it alone contradicts the others; empty for
    fewer than three sources. obstacle: why there is no provider or no candle to compare.
    """

    series: Series
    window: TimeRange
    compared_series: Series
    tolerance: float
    validated_at: int
    stored: int = 0
    sampled: int = 0
    compared: int = 0
    unverified: int = 0
    incomplete: int = 0
    complete: bool = False
    ranges: int = 0
    sources: Mapping[str, SourceTally] = field(default_factory=dict)
    odd: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    obstacle: str | None = None

    @property
    def valid(self) -> bool | None:
        """True if something was compared, everything that was agrees, and no candle is unverified because a request
        failed. None if there is no verdict."""
        if not self.compared:
            return None
        if self.discrepancies:
            return False
        return None if self.unverified else True

    @property
    def discrepancies(self) -> int:
        return sum(one.discrepancies for one in self.sources.values())

    @property
    def providers(self) -> tuple[str, ...]:
        """The providers whose candles were compared."""
        return tuple(name for name, one in self.sources.items() if one.compared)

    @property
    def errors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(error for one in self.sources.values() for error in one.errors))

    @property
    def worst(self) -> list[tuple[str, Discrepancy]]:
        """The largest discrepancies of all providers, each with its provider, the largest first."""
        found = [(name, each) for name, one in self.sources.items() for each in one.worst]
        return heapq.nlargest(MOST_DISCREPANCIES, found, key=lambda pair: pair[1].excess)

    @property
    def odd_one_out(self) -> str | None:
        """The source that contradicts the others: a provider, or STORED; None if there is none."""
        return odd_one_out(self.odd)

    def classified(self) -> dict[str, Classification]:
        """By provider, the pattern of its discrepancies; without those that have none."""
        step = self.compared_series.timeframe.micros
        found = {name: one.classified(self.tolerance, step) for name, one in self.sources.items()}
        return {name: one for name, one in found.items() if one is not None}

    @property
    def reason(self) -> str | None:
        """Why the verdict is not True; for True None, or what was not compared."""
        if self.valid is None:
            return self._no_verdict()
        if self.valid is False:
            return self._differences()
        left = self.sampled - self.compared
        return f"{left:,} of {self.sampled:,} candles could not be compared" if left else None

    def _no_verdict(self) -> str:
        if self.obstacle is not None:
            return self.obstacle
        causes = "; ".join(self.errors)
        if self.compared:
            return f"{self.unverified:,} of {self.sampled:,} candles were not compared, as requests failed: {causes}"
        if causes:
            return f"no candle could be compared: {causes}"
        return "no candle could be compared: " + "; ".join(
            f"{name}: {', '.join(f'{why} {count:,}' for why, count in one.not_comparable.items())}"
            for name, one in self.sources.items()
        )

    def _differences(self) -> str:
        patterns = self.classified()
        parts = [
            f"{name}: {one.differing:,} of {one.compared:,} candles differ ({patterns[name]})"
            for name, one in self.sources.items()
            if one.discrepancies
        ]
        if self.odd_one_out is not None:
            odd = "the stored candles" if self.odd_one_out == STORED else self.odd_one_out
            parts.append(f"the odd one out: {odd}")
        return "; ".join(parts)
