"""The registry of providers, and their construction from the settings.

Belongs here: names, default addresses, one registration per provider.
Does not belong here: anything specific to one provider, or the order of the providers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fks_backfill_dagster.domain.rate_limits import Pace, Window
from fks_backfill_dagster.providers import (
    alphavantage,
    binance,
    binance_klines,
    coingecko,
    oanda,
    polygon,
    yfinance,
)
from fks_backfill_dagster.providers.base import Provider, ProviderError, ProviderOptions
from fks_backfill_dagster.providers.http.client import CONNECT_SECONDS, RESPONSE_TIMEOUTS
from fks_backfill_dagster.providers.http.limiter import Limiter, ProcessLimiter, system_micros
from fks_backfill_dagster.providers.http.pool import RequestPool

Factory = Callable[[ProviderOptions, RequestPool, Limiter, Callable[[], int]], Provider]


@dataclass(frozen=True, slots=True)
class Registration:
    """The registration of a provider.

    windows: the default rate windows, used unless a rate limit is configured.
    requests_per_minute: the default rate for estimates, and the rate limit if there are no `windows`.
    request_weight: the weight of one request in the rate limit.
    """

    factory: Factory
    base_url: str
    archive_url: str | None = None
    requests_per_minute: int | None = None
    request_weight: int = 1
    windows: tuple[Window, ...] = ()


BUILT: Mapping[str, Registration] = {
    binance_klines.NAME: Registration(
        binance.Binance,
        binance.DEFAULT_BASE_URL,
        archive_url=binance.DEFAULT_ARCHIVE_URL,
        request_weight=binance_klines.KLINES_WEIGHT,
        windows=(Window(binance_klines.REQUESTS_PER_MINUTE * binance_klines.KLINES_WEIGHT),),
    ),
    polygon.NAME: Registration(
        polygon.Polygon, polygon.DEFAULT_BASE_URL, requests_per_minute=polygon.REQUESTS_PER_MINUTE
    ),
    yfinance.NAME: Registration(
        yfinance.YFinance, yfinance.DEFAULT_BASE_URL, requests_per_minute=yfinance.REQUESTS_PER_MINUTE
    ),
    coingecko.NAME: Registration(
        coingecko.CoinGecko, coingecko.DEFAULT_BASE_URL, requests_per_minute=coingecko.REQUESTS_PER_MINUTE
    ),
    alphavantage.NAME: Registration(
        alphavantage.AlphaVantage,
        alphavantage.DEFAULT_BASE_URL,
        requests_per_minute=alphavantage.REQUESTS_PER_MINUTE,
        windows=(Window(1, 1.0), Window(alphavantage.REQUESTS_PER_DAY, 86_400.0)),
    ),
    oanda.NAME: Registration(
        oanda.Oanda,
        oanda.DEFAULT_BASE_URL,
        requests_per_minute=oanda.REQUESTS_PER_MINUTE,
        windows=(Window(oanda.REQUESTS_PER_SECOND, 1.0),),
    ),
}


class UnknownProvider(ProviderError):
    """There is no provider of this name."""


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
    """The options of a provider: configured values, otherwise its defaults.

    A configured base_url without an archive_url disables the archives: a local market must never be mixed with the
    real archives. Raises UnknownProvider.
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
        key=(key or "").strip() or None,
        **{option: value for option, value in given.items() if value is not None},
    )


def paces(options: Mapping[str, ProviderOptions]) -> dict[str, Pace]:
    """The rate limits of these providers, each for the account identified by its key and address.

    Archives have an account of their own, without a limit: only the waits that they demand apply.
    """
    found = {name: _pace(name, one) for name, one in options.items()}
    archives = {name: one.archive_url for name, one in options.items() if one.archive_url}
    return found | {f"{name}-archive": Pace((), _account(url)) for name, url in archives.items()}


def _pace(name: str, options: ProviderOptions) -> Pace:
    registered, a_minute = _registration(name), options.requests_per_minute
    # A configured limit describes another plan, so the daily budget of the default plan does not apply either.
    if registered.windows and a_minute in (None, registered.requests_per_minute):
        windows = registered.windows
    else:
        windows = (Window(a_minute * registered.request_weight),) if a_minute else ()
    return Pace(
        windows,
        _account(options.base_url, options.key),
        CONNECT_SECONDS + RESPONSE_TIMEOUTS * options.timeout_seconds,
    )


def _account(url: str, key: str | None = None) -> str:
    """Identifies the account that requests are counted for, without revealing the key."""
    return hashlib.sha256(f"{url}\n{key or ''}".encode()).hexdigest()[:16]


def limiter_for(options: Mapping[str, ProviderOptions]) -> ProcessLimiter:
    """A limiter for this process only, with the limits of these providers."""
    return ProcessLimiter(paces(options))


def build(
    name: str,
    options: ProviderOptions,
    pool: RequestPool,
    limiter: Limiter,
    clock: Callable[[], int] = system_micros,
) -> Provider:
    """The provider of this name. Raises UnknownProvider."""
    return _registration(name).factory(options, pool, limiter, clock)


def _registration(name: str) -> Registration:
    if name in BUILT:
        return BUILT[name]
    raise UnknownProvider(name, f"there is no such provider; there are {', '.join(sorted(BUILT))}")
