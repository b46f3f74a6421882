"""The contract of a provider, and its exceptions.

ProviderError                  a request to a provider failed
  PermanentError               a retry will not help: request from the next provider
    ClocksDiffer               the clocks are too far apart to decide which candles are closed
    UnknownSymbol              the provider does not offer the symbol
    WrongKey                   the key is missing or invalid
    NotEntitled                the key does not cover this data
      TooOld                   the key covers newer data only, or only that is certain: request again from `since` on
  TransientError               a retry may help: wait for `retry_after` or back off, within a budget
    RateLimited                too many requests, or a ban
    InvalidResponse            HTML, truncated JSON, another shape
      Contradiction            responses contradict one another
    Unreachable                no connection, or no response in time (`http.errors`)
  Cancelled                    the run is being interrupted
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from fks_backfill_dagster.domain.actions import ReportedActions
from fks_backfill_dagster.domain.delivery import Delivery, Origin, Transport
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.rate_limits import CoolDown, bounded_wait
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
    """Base of all errors of a provider.

    The text never contains a key. Unprintable characters are replaced by "?", so that text from a provider cannot
    control a terminal and can be stored in a database.
    `requests`: the HTTP requests of the failed fetch, retries included.
    """

    def __init__(self, provider: str, message: str) -> None:
        super().__init__(f"{provider}: {''.join(c if c.isprintable() else '?' for c in message)}")
        self.provider = provider
        self.requests = 0


class PermanentError(ProviderError):
    """A retry will not help."""


class UnknownSymbol(PermanentError):
    """The provider does not offer the symbol."""


class ClocksDiffer(PermanentError):
    """The two clocks are too far apart to decide which of the requested candles are closed."""


class WrongKey(PermanentError):
    """The key is missing or invalid."""


class NotEntitled(PermanentError):
    """The key does not cover this data; only another key or plan does."""


class TooOld(NotEntitled):
    """Only candles that open at `since` (microseconds) or later are available: the key does not cover older data, or
    older prices are not certain (a split that may not have been applied)."""

    def __init__(self, provider: str, message: str, since: int) -> None:
        super().__init__(provider, message)
        self.since = since


class TransientError(ProviderError):
    """A retry may help. `retry_after`: seconds, at most a day; None if the provider demands no wait."""

    def __init__(self, provider: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(provider, message)
        self.retry_after = None if retry_after is None else bounded_wait(retry_after)


class RateLimited(TransientError):
    """Too many requests, or a ban."""


class InvalidResponse(TransientError):
    """An invalid response: HTML with status 200, truncated JSON, a wrong shape or checksum."""


class Contradiction(InvalidResponse):
    """Responses have different values for one candle: some of them belong to another instrument."""


class Cancelled(ProviderError):
    """The run is being interrupted: the request was abandoned, its outcome is unknown."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a provider offers.

    timeframes: per asset class, the timeframes available on our grid, native or derived from finer ones.
    derived: per asset class, the derived timeframes and the native timeframe of their parts: the provider's own
        candle of that timeframe is defined differently. The pipeline derives them; `fetch` returns native ones only.
    page_size: maximum candles per request; `page_sizes`: exceptions per timeframe.
    needs_key: the environment variable of the key, None for a keyless provider.
    has_volume: whether the volume is in base units; otherwise it is stored as NULL.
    omits_no_trade: intervals without a trade are omitted, so a candle missing between two rows of a complete response
        may be a no-trade interval. A provider that returns every interval and misses one had an outage.
    confirms_absence: `fetch` itself repeats the request for candles missing from a response.
    adjusted: prices are adjusted at the source; the provider undoes known splits or declines.
    depth: per timeframe, microseconds before now up to which data exist; no entry: since listing.
    publication_delay: microseconds after its close within which a candle may not be published yet, according to the
        provider's documentation. A series whose providers all have this delay is not reported as lagging by it.
    """

    timeframes: Mapping[AssetClass, frozenset[Timeframe]]
    page_size: int
    needs_key: str | None = None
    has_volume: bool = True
    omits_no_trade: bool = False
    confirms_absence: bool = False
    adjusted: bool = False
    depth: Mapping[Timeframe, int] = field(default_factory=dict)
    page_sizes: Mapping[Timeframe, int] = field(default_factory=dict)
    derived: Mapping[AssetClass, Mapping[Timeframe, Timeframe]] = field(default_factory=dict)
    publication_delay: int = 0

    def parts(self, series: Series) -> Timeframe:
        """The native timeframe that the series is derived from; its own if it is native."""
        return self.derived.get(series.asset_class, {}).get(series.timeframe, series.timeframe)

    def page(self, timeframe: Timeframe) -> int:
        """The maximum number of `timeframe` candles per request."""
        return self.page_sizes.get(timeframe, self.page_size)

    def candles_a_request(self, series: Series) -> int:
        """The maximum number of candles of a series per request; for a derived series, through its parts."""
        parts = self.parts(series)
        return max(1, self.page(parts) * parts.micros // series.timeframe.micros)

    def serve(self, series: Series) -> bool:
        return series.timeframe in self.timeframes.get(series.asset_class, frozenset())

    def reach(self, timeframe: Timeframe, now: int) -> int | None:
        """The earliest available open at `now`; None if only the listing limits it."""
        depth = self.depth.get(timeframe)
        return None if depth is None else now - depth


@dataclass(frozen=True, slots=True)
class Clocks:
    """The provider's clock when it created a response and ours on receipt, in microseconds.

    age: the time the response spent in a cache.
    """

    theirs: int
    ours: int
    age: int = 0

    @property
    def apart(self) -> int:
        """The difference of the clocks, in microseconds."""
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
class FetchResult:
    """The result of a fetch: everything a provider returned for one range.

    deliveries: do not overlap each other; their `ts` need not ascend.
    requests: HTTP requests, retries included.
    warnings: sentences for the log (an archive that failed its checksum and was skipped).
    clocks: those of the response in which the provider's clock was furthest behind; None if no response has a time.
        Candles that closed after that time are left out.
    actions: the corporate actions that the same responses list.
    """

    deliveries: tuple[Delivery, ...]
    requests: int = 0
    warnings: tuple[str, ...] = ()
    clocks: Clocks | None = None
    actions: ReportedActions | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimated cost of a fetch: HTTP requests, and seconds at the provider's rate limit."""

    requests: int
    seconds: float


class Provider(Protocol):
    """One source of candles. Implementations are safe to call from several threads."""

    name: str
    capabilities: Capabilities

    def fetch(self, series: Series, window: TimeRange) -> FetchResult:
        """Fetches the candles of a native series that open in `window`, in as many requests as needed.

        Returns the available candles, possibly none; rows outside the window are ignored by the caller. Raises
        PermanentError or TransientError, after the provider's own retries, unless the whole window was fetched.
        """
        ...

    def estimate(self, series: Series, window: TimeRange) -> Estimate:
        """The estimated cost of `fetch` for the same window; sends no request."""
        ...

    def listed_at(self, series: Series) -> int | None:
        """The open of the provider's first candle; None if that cannot be determined cheaply.

        Raises UnknownSymbol if the provider does not offer the symbol.
        """
        ...

    def instrument(self, series: Series) -> str:
        """The symbol in this provider's notation. Raises UnknownSymbol if there is none."""
        ...

    def missing_key(self) -> str | None:
        """The environment variable of a key that is required but not set; otherwise None."""
        ...


@runtime_checkable
class ActionSource(Protocol):
    """A provider that lists corporate actions: implemented besides `Provider` by those that do."""

    def fetch_actions(self, series: Series) -> ReportedActions:
        """Every action of a stock that the provider lists, announced ones included; `series` at any timeframe.

        Invalid rows are refused one by one. Raises PermanentError or TransientError, after the provider's own retries.
        """
        ...


def check_served(provider: Provider, series: Series) -> None:
    """The first step of every `fetch`. Raises WrongKey without a key, PermanentError for an unsupported series."""
    if (variable := provider.missing_key()) is not None:
        raise WrongKey(provider.name, f"it needs a key: set {variable}")
    if not provider.capabilities.serve(series):
        raise PermanentError(provider.name, f"it has no {series.timeframe} candles of {series.asset_class}")
    if (parts := provider.capabilities.parts(series)) is not series.timeframe:
        raise PermanentError(
            provider.name, f"its {series.timeframe} candles are derived from {parts}: request those"
        )


class Circuit(Protocol):
    """Circuit breaker: the cool-downs of providers that fail repeatedly; shared by all processes."""

    def closed_for(self, provider: str) -> CoolDown | None:
        """The remaining cool-down of the provider; None: it may be requested."""
        ...

    def failed(self, provider: str, reason: str) -> CoolDown | None:
        """Records a failed fetch, after its retries. `reason` contains no key.

        Returns the cool-down that begins with this failure, if any.
        """
        ...

    def succeeded(self, provider: str) -> bool:
        """Records a successful fetch, which resets the failure count. Returns whether a cool-down ends with it."""
        ...


@dataclass(frozen=True, slots=True)
class ProviderOptions:
    """The settings of one provider.

    retry_budget_seconds: limits the retries of failures for which the provider demands no wait.
    longest_wait_seconds: limits the sum of the waits that the provider demands (Retry-After of a limit or a short ban).
    """

    base_url: str
    archive_url: str | None = None
    requests_per_minute: int | None = None
    timeout_seconds: float = 30.0
    retry_budget_seconds: float = 20.0
    longest_wait_seconds: float = 300.0
    key: str | None = field(default=None, repr=False)


__all__ = [
    "ActionSource",
    "Cancelled",
    "Capabilities",
    "Circuit",
    "Clocks",
    "ClocksDiffer",
    "Contradiction",
    "Delivery",
    "Estimate",
    "FetchResult",
    "InvalidResponse",
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
