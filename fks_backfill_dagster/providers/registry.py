"""The construction of the known providers, and their rate limits.

Does not belong here: anything specific to one provider (`known_providers`, `providers/<name>.py`), or the order of the
providers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import cast

from fks_backfill_dagster.domain.rate_limits import RateLimits, RateWindow
from fks_backfill_dagster.known_providers import KNOWN, KnownProvider
from fks_backfill_dagster.providers.base import Provider, ProviderError, ProviderOptions
from fks_backfill_dagster.providers.http.client import CONNECT_SECONDS, RESPONSE_TIMEOUTS
from fks_backfill_dagster.providers.http.limiter import Limiter, ProcessLimiter, system_micros
from fks_backfill_dagster.providers.http.pool import RequestPool

Factory = Callable[[ProviderOptions, RequestPool, Limiter, Callable[[], int]], Provider]


def _implementation(known: KnownProvider) -> Factory:
    module, _, name = known.implementation.partition(":")
    return cast(Factory, getattr(import_module(f"fks_backfill_dagster.providers.{module}"), name))


# Imported with this module: a run worker is a fork of a process that has imported them.
_FACTORIES: Mapping[str, Factory] = {name: _implementation(known) for name, known in KNOWN.items()}


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
    known = _known(name)
    given = {
        "timeout_seconds": timeout_seconds,
        "retry_budget_seconds": retry_budget_seconds,
        "longest_wait_seconds": longest_wait_seconds,
    }
    return ProviderOptions(
        base_url=(base_url or known.base_url).rstrip("/"),
        archive_url=archive_url or (None if base_url else known.archive_url),
        requests_per_minute=requests_per_minute or known.requests_per_minute,
        key=(key or "").strip() or None,
        **{option: value for option, value in given.items() if value is not None},
    )


def rate_limits(options: Mapping[str, ProviderOptions]) -> dict[str, RateLimits]:
    """The rate limits of these providers, each for the account identified by its key and address.

    Archives have an account of their own, without a limit: only the waits that they demand apply.
    """
    found = {name: _rate_limits_of(name, one) for name, one in options.items()}
    archives = {name: one.archive_url for name, one in options.items() if one.archive_url}
    return found | {f"{name}-archive": RateLimits((), _account(url)) for name, url in archives.items()}


def _rate_limits_of(name: str, options: ProviderOptions) -> RateLimits:
    known, a_minute = _known(name), options.requests_per_minute
    # A configured limit describes another plan, so the daily budget of the default plan does not apply either.
    if known.windows and a_minute in (None, known.requests_per_minute):
        windows = known.windows
    else:
        windows = (RateWindow(a_minute * known.request_weight),) if a_minute else ()
    return RateLimits(
        windows,
        _account(options.base_url, options.key),
        CONNECT_SECONDS + RESPONSE_TIMEOUTS * options.timeout_seconds,
    )


def _account(url: str, key: str | None = None) -> str:
    """Identifies the account that requests are counted for, without revealing the key."""
    return hashlib.sha256(f"{url}\n{key or ''}".encode()).hexdigest()[:16]


def limiter_for(options: Mapping[str, ProviderOptions]) -> ProcessLimiter:
    """A limiter for this process only, with the limits of these providers."""
    return ProcessLimiter(rate_limits(options))


def build(
    name: str,
    options: ProviderOptions,
    pool: RequestPool,
    limiter: Limiter,
    clock: Callable[[], int] = system_micros,
) -> Provider:
    """The provider of this name. Raises UnknownProvider."""
    _known(name)
    return _FACTORIES[name](options, pool, limiter, clock)


def _known(name: str) -> KnownProvider:
    if name in KNOWN:
        return KNOWN[name]
    raise UnknownProvider(name, f"there is no such provider; there are {', '.join(sorted(KNOWN))}")
