"""The contract of a provider, and its exceptions.

ProviderError                  something a provider said or failed to say
  PermanentError               asking again will not help: ask the next provider
    ClocksDiffer               its clock and ours disagree about which candles are closed
    UnknownSymbol              it does not know the symbol
    NotEntitled                key missing, wrong, or without the right to this data
      TooOld                   the key covers newer data only, or only that is certain: request again from `since` on
  TransientError               asking again may help: wait as told, retry within a budget
    RateLimited                too many requests; `retry_after` tells how long
    BadAnswer                  the answer is garbage: HTML, truncated JSON, another shape
      Contradiction            its responses contradict one another
  Cancelled                    we gave up ourselves: the run is being interrupted
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from fks_backfill_dagster.domain.delivery import Delivery, Origin, Transport
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.rate_limits import Rest, bounded_wait
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import (
    MICROS_PER_DAY,
    MICROS_PER_HOUR,
    MICROS_PER_MINUTE,
    MICROS_PER_SECOND,
    Timeframe,
    iso,
)


class ProviderError(Exception):
    """Base of all that can go wrong with a provider.

    The text never contains a key. What a provider said in it cannot steer a terminal, and a database
    takes it: characters that cannot be printed are shown as "?".
    `requests`: the HTTP requests of the fetch that failed, retries included.
    """

    def __init__(self, provider: str, message: str) -> None:
        super().__init__(f"{provider}: {''.join(c if c.isprintable() else '?' for c in message)}")
        self.provider = provider
        self.requests = 0


class PermanentError(ProviderError):
    """Asking again will not help."""


class UnknownSymbol(PermanentError):
    """The provider does not know the symbol."""


class ClocksDiffer(PermanentError):
    """Its clock and ours are too far apart to decide which of the requested candles are closed."""


class WrongKey(PermanentError):
    """The key is missing, or the provider does not know it."""


class NotEntitled(PermanentError):
    """The key does not cover this data, and without another one nobody gets it."""


class TooOld(NotEntitled):
    """Nothing that opens before `since` (microseconds) is given, what opens later is: the key does not reach back
    so far, or older prices are not certain (a split that may not have been applied)."""

    def __init__(self, provider: str, message: str, since: int) -> None:
        super().__init__(provider, message)
        self.since = since


class TransientError(ProviderError):
    """Asking again may help. `retry_after` is in seconds, None where the provider told nothing.

    Every time that a provider names passes through here, so here it is bounded: a day at most.
    """

    def __init__(self, provider: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(provider, message)
        self.retry_after = None if retry_after is None else bounded_wait(retry_after)


class RateLimited(TransientError):
    """Too many requests, or a ban."""


class BadAnswer(TransientError):
    """An answer that cannot be one: HTML with status 200, truncated JSON, a wrong shape or checksum."""


class Contradiction(BadAnswer):
    """Its responses give one candle different values: some of them belong to another instrument."""


class Cancelled(ProviderError):
    """The run is being interrupted: the request was given up, what it would have said is unknown."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a provider can give.

    timeframes: per asset class, those it can give on our grid, natively or derived from finer ones.
    derived: per asset class, which of them are derived, and from which native timeframe: where its own
        candle does not mean what ours means. The pipeline derives them; `fetch` gives native ones only.
    page_size: the most candles one request brings; `page_sizes` where a timeframe has its own.
    needs_key: the environment variable of the key, None for a keyless provider.
    has_volume: whether the volume is one of base units; without, it is NULL.
    omits_quiet: leaves out intervals without a trade, so that what a complete answer lacks between two
        rows may be a no-trade interval. One that gives every interval and lacks one had an outage.
    confirms_absence: `fetch` itself requests a second time what a response lacks.
    adjusted: its prices are adjusted at the source; it un-adjusts them by known splits or declines.
    depth: microseconds before now beyond which it has nothing, per timeframe; no entry: since listing.
    publication_delay: microseconds after its close within which a candle may not be published yet, by the
        provider's own documentation. It is no lag of a series that no quicker provider serves.
    """

    timeframes: Mapping[AssetClass, frozenset[Timeframe]]
    page_size: int
    needs_key: str | None = None
    has_volume: bool = True
    omits_quiet: bool = False
    confirms_absence: bool = False
    adjusted: bool = False
    depth: Mapping[Timeframe, int] = field(default_factory=dict)
    page_sizes: Mapping[Timeframe, int] = field(default_factory=dict)
    derived: Mapping[AssetClass, Mapping[Timeframe, Timeframe]] = field(default_factory=dict)
    publication_delay: int = 0

    def parts(self, series: Series) -> Timeframe:
        """The native timeframe that the series is made from: its own where it is native."""
        return self.derived.get(series.asset_class, {}).get(series.timeframe, series.timeframe)

    def page(self, timeframe: Timeframe) -> int:
        """The most candles of `timeframe` that one request brings."""
        return self.page_sizes.get(timeframe, self.page_size)

    def candles_a_request(self, series: Series) -> int:
        """The most candles of a series that one request brings; of a derived one by way of its parts."""
        parts = self.parts(series)
        return max(1, self.page(parts) * parts.micros // series.timeframe.micros)

    def serve(self, series: Series) -> bool:
        return series.timeframe in self.timeframes.get(series.asset_class, frozenset())

    def reach(self, timeframe: Timeframe, now: int) -> int | None:
        """The earliest open that it can have at `now`; None where only the listing limits it."""
        depth = self.depth.get(timeframe)
        return None if depth is None else now - depth


@dataclass(frozen=True, slots=True)
class Clocks:
    """The provider's clock when it made a response and ours when that came, in microseconds.

    age: how long the response lay in a cache between.
    """

    theirs: int
    ours: int
    age: int = 0

    @property
    def apart(self) -> int:
        """How far the clocks are apart, in microseconds."""
        return abs(self.ours - self.theirs - self.age)

    def __str__(self) -> str:
        later = "earlier" if self.ours < self.theirs else "later"
        theirs, ours = (iso(clock - clock % MICROS_PER_SECOND) for clock in (self.theirs, self.ours))
        if self.age:
            return f"its response is of {theirs}, from a cache, and this machine's clock shows {ours}"
        return f"its clock shows {theirs}, this machine's {ours}, {_length(self.apart)} {later}"


def _length(micros: int) -> str:
    """A time in its largest whole unit."""
    units = ((365 * MICROS_PER_DAY, "year"), (MICROS_PER_DAY, "day"), (MICROS_PER_HOUR, "hour"))
    for size, name in (*units, (MICROS_PER_MINUTE, "minute")):
        if micros >= 2 * size:
            return f"{micros // size:,} {name}s"
    return f"{micros // MICROS_PER_SECOND} seconds"


@dataclass(frozen=True, slots=True)
class Answer:
    """All that a provider returned for one range.

    Deliveries do not overlap each other, and their `ts` need not ascend. `requests` counts HTTP requests,
    retries included. `warnings` are sentences for the log (an archive that failed its checksum and was passed over).
    `clocks`: of the response in which the provider's was furthest behind; None where no response names its time. A
    candle that closed later than that is not among the candles.
    """

    deliveries: tuple[Delivery, ...]
    requests: int = 0
    warnings: tuple[str, ...] = ()
    clocks: Clocks | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a fetch would cost: HTTP requests, and seconds at the provider's rate limit."""

    requests: int
    seconds: float


class Provider(Protocol):
    """One source of candles. Implementations are safe to call from several threads."""

    name: str
    capabilities: Capabilities

    def fetch(self, series: Series, window: TimeRange) -> Answer:
        """Requests the candles of a native series that open in `window`, in as many requests as that takes.

        Returns what there is; rows outside the window may come along and are ignored by the
        caller. Nothing there is an empty answer. Raises PermanentError or TransientError when the
        window could not be answered as a whole, after the provider's own retries.
        """
        ...

    def estimate(self, series: Series, window: TimeRange) -> Estimate:
        """What `fetch` of the same window would cost; asks nobody."""
        ...

    def listed_at(self, series: Series) -> int | None:
        """The open of the first candle the provider ever had; None when it cannot tell cheaply.

        Raises UnknownSymbol where the provider does not know the symbol.
        """
        ...

    def instrument(self, series: Series) -> str:
        """The symbol as this provider writes it. Raises UnknownSymbol where it cannot be written."""
        ...

    def missing_key(self) -> str | None:
        """The name of the environment variable whose absence keeps this provider out; else None."""
        ...


def check_served(provider: Provider, series: Series) -> None:
    """What every `fetch` does first. Raises NotEntitled without its key, PermanentError for what it has not."""
    if (variable := provider.missing_key()) is not None:
        raise WrongKey(provider.name, f"it needs a key: set {variable}")
    if not provider.capabilities.serve(series):
        raise PermanentError(provider.name, f"it has no {series.timeframe} candles of {series.asset_class}")
    if (parts := provider.capabilities.parts(series)) is not series.timeframe:
        raise PermanentError(
            provider.name, f"its {series.timeframe} candles are derived from {parts}: request those"
        )


class Circuit(Protocol):
    """Which providers are left alone because they fail again and again; shared by all who ask them."""

    def closed_for(self, provider: str) -> Rest | None:
        """For how long it must not be asked, and why; None: it may be."""
        ...

    def failed(self, provider: str, reason: str) -> Rest | None:
        """It did not answer, its own retries included. `reason` holds no key.

        Returns the rest that begins with this failure, if one does.
        """
        ...

    def succeeded(self, provider: str) -> bool:
        """It answered: all its failures are forgotten. Returns whether it was left alone until now."""
        ...


@dataclass(frozen=True, slots=True)
class ProviderOptions:
    """The settings of one provider, as the faces hand them down.

    `retry_budget_seconds` bounds the retries of what fails without a word; `longest_wait_seconds`
    the sum of the waits that the provider itself asks for (Retry-After of a limit or a short ban).
    """

    base_url: str
    archive_url: str | None = None
    requests_per_minute: int | None = None
    timeout_seconds: float = 30.0
    retry_budget_seconds: float = 20.0
    longest_wait_seconds: float = 300.0
    key: str | None = field(default=None, repr=False)


__all__ = [
    "Answer",
    "BadAnswer",
    "Cancelled",
    "Capabilities",
    "Circuit",
    "Clocks",
    "ClocksDiffer",
    "Contradiction",
    "Delivery",
    "Estimate",
    "NotEntitled",
    "Origin",
    "PermanentError",
    "Provider",
    "ProviderError",
    "ProviderOptions",
    "RateLimited",
    "TooOld",
    "TransientError",
    "Transport",
    "UnknownSymbol",
    "WrongKey",
    "check_served",
]
