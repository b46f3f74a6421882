"""Which providers there are, and how one is made from its settings.

Belongs here: the names, the defaults of their addresses, one line of registration per provider.
Does not belong here: anything that only one provider knows, or the order in which they are asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fks_backfill_dagster.providers import binance, polygon
from fks_backfill_dagster.providers.base import Provider, ProviderError, ProviderOptions
from fks_backfill_dagster.providers.http import Limiter, ProcessLimiter, RequestPool, system_micros

# All that settings may name.
NAMES = ("binance", "coingecko", "polygon", "yfinance", "alphavantage", "oanda")

Factory = Callable[[ProviderOptions, RequestPool, Limiter, Callable[[], int]], Provider]


@dataclass(frozen=True, slots=True)
class Registration:
    """What the registry knows of a provider.

    `requests_per_minute` is its default pace, None for one that paces us by its own answers.
    `request_weight` is what one request takes of the limiter.
    """

    factory: Factory
    base_url: str
    archive_url: str | None = None
    requests_per_minute: int | None = None
    request_weight: int = 1


BUILT: Mapping[str, Registration] = {
    binance.NAME: Registration(
        binance.Binance,
        binance.DEFAULT_BASE_URL,
        archive_url=binance.DEFAULT_ARCHIVE_URL,
        request_weight=binance.KLINES_WEIGHT,
    ),
    polygon.NAME: Registration(
        polygon.Polygon, polygon.DEFAULT_BASE_URL, requests_per_minute=polygon.REQUESTS_PER_MINUTE
    ),
}


class UnknownProvider(ProviderError):
    """No provider has this name."""


class NotBuilt(ProviderError):
    """The name is known, but this version cannot ask that provider yet."""


def resolve_options(
    name: str,
    *,
    base_url: str | None = None,
    archive_url: str | None = None,
    requests_per_minute: int | None = None,
    timeout_seconds: float | None = None,
    retry_budget_seconds: float | None = None,
    longest_wait_seconds: float | None = None,
    key: str | None = None,
) -> ProviderOptions:
    """The options of a provider: what the settings give, else its defaults.

    With a base_url of one's own and no archive_url the archives are off: a local market must never be
    mixed with the real archives. Raises UnknownProvider or NotBuilt.
    """
    registered = _registration(name)
    given = {
        "timeout_seconds": timeout_seconds,
        "retry_budget_seconds": retry_budget_seconds,
        "longest_wait_seconds": longest_wait_seconds,
    }
    return ProviderOptions(
        base_url=(base_url or registered.base_url).rstrip("/"),
        archive_url=archive_url or (None if base_url else registered.archive_url),
        requests_per_minute=requests_per_minute or registered.requests_per_minute,
        key=key or None,
        **{option: value for option, value in given.items() if value is not None},
    )


def limiter_for(options: Mapping[str, ProviderOptions], pool: RequestPool) -> ProcessLimiter:
    """A limiter of this process with the pace of each of these providers."""
    paces = {
        name: one.requests_per_minute * _registration(name).request_weight
        for name, one in options.items()
        if one.requests_per_minute
    }
    return ProcessLimiter(paces, stop=pool.stop)


def build(
    name: str,
    options: ProviderOptions,
    pool: RequestPool,
    limiter: Limiter,
    clock: Callable[[], int] = system_micros,
) -> Provider:
    """The provider of that name. Raises UnknownProvider or NotBuilt."""
    return _registration(name).factory(options, pool, limiter, clock)


def _registration(name: str) -> Registration:
    if name in BUILT:
        return BUILT[name]
    if name in NAMES:
        raise NotBuilt(name, f"this version cannot ask it yet; it has {', '.join(BUILT)}")
    raise UnknownProvider(name, f"there is no such provider; there are {', '.join(NAMES)}")
