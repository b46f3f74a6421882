"""The composition root: settings become a database, providers and the context that every verb works with.

Belongs here: which parts are made from which settings, and how long they live. The faces (command
line, Dagster, API) take from here and build nothing themselves.
Does not belong here: what is done with the parts.

Importing this module is cheap; what is heavy is imported by the function that needs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fks_backfill_dagster.settings.model import Settings
from fks_backfill_dagster.settings.sections import Binance

if TYPE_CHECKING:
    from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
    from fks_backfill_dagster.domain.series import Series
    from fks_backfill_dagster.embedded import EmbeddedPostgres
    from fks_backfill_dagster.pipeline.closures import SettledClosures
    from fks_backfill_dagster.pipeline.freshness import Rule
    from fks_backfill_dagster.pipeline.sync import Context
    from fks_backfill_dagster.providers.base import Circuit, Provider, ProviderOptions
    from fks_backfill_dagster.providers.http.limiter import Limiter
    from fks_backfill_dagster.providers.http.pool import RequestPool
    from fks_backfill_dagster.store.database import Database
    from fks_backfill_dagster.store.rate_limits import ProviderState
    from fks_backfill_dagster.store.sources import HostInUse

# Hosts of Binance itself: the same candles as in its public archives.
_BINANCE_HOSTS = (".binance.com", ".binance.vision")

# Documented hosts beside the defaults of `providers.registry`: they give the same candles. Not api.binance.us, which
# is another exchange, nor testnet.binance.vision.
_DOCUMENTED_HOSTS: Mapping[str, frozenset[str]] = {
    "binance": frozenset(
        (
            "api1.binance.com",
            "api2.binance.com",
            "api3.binance.com",
            "api4.binance.com",
            "api-gcp.binance.com",
            "data-api.binance.vision",
        )
    ),
    "polygon": frozenset(("api.polygon.io", "api.massive.com")),
    "yfinance": frozenset(("query1.finance.yahoo.com", "query2.finance.yahoo.com")),
    "coingecko": frozenset(("api.coingecko.com", "pro-api.coingecko.com")),
    "alphavantage": frozenset(("www.alphavantage.co", "alphavantage.co")),
    "oanda": frozenset(("api-fxpractice.oanda.com", "api-fxtrade.oanda.com")),
}


@dataclass(frozen=True, slots=True)
class App:
    """What a face that fetches holds while it works. `pool.stop` ends every wait of a provider at once."""

    settings: Settings
    database: Database
    pool: RequestPool
    context: Context


def make_context(
    settings: Settings,
    database: Database,
    providers: Mapping[str, Provider],
    options: Mapping[str, ProviderOptions],
) -> Context:
    """What every verb works with, by the settings; the providers were made with these options.

    Raises MixedSources where their hosts are of another kind than those that the database's candles came from.
    """
    from fks_backfill_dagster.pipeline.sync import Context

    if not settings.allow_mixed_sources:
        refuse_mixed_sources(settings, database, providers, options)
    return Context(
        database=database,
        providers=providers,
        clock=now,
        batch_size_days=settings.batch_size_days,
        max_concurrent_requests=settings.max_concurrent_requests,
        tolerance=settings.validation.tolerance_pct,
        max_gap_minutes=settings.gap_detection.max_gap_minutes,
        circuit=circuit_for(options, database),
        closed_dates=settings.closed,
        priority=settings.priority,
    )


def now() -> int:
    """The present in microseconds UTC: the clock of all faces."""
    return time.time_ns() // 1000


@contextmanager
def open_app(settings: Settings, tell: Callable[[str], None] = lambda _: None) -> Iterator[App]:
    """The database, the providers that are enabled, and the context of the pipeline's verbs.

    `tell` gets a sentence when a provider keeps everybody waiting, from any thread.
    Raises StoreError or EmbeddedError when the database cannot be had, or must not be used with these hosts.
    """
    from fks_backfill_dagster.providers.http.pool import RequestPool

    with ExitStack() as stack:
        database = stack.enter_context(open_database(settings))
        pool = RequestPool(settings.max_concurrent_requests, tell=tell)
        stack.callback(pool.close)
        providers = build_providers(settings, pool, database)
        context = make_context(settings, database, providers, enabled_options(settings))
        yield App(settings, database, pool, context)


# The database -----------------------------------------------------------------------------------------


@contextmanager
def open_database(settings: Settings) -> Iterator[Database]:
    """The database with its schema, for the length of the block.

    The embedded one runs at least that long, and is upgraded without being asked: it has no other
    owner. A database of the user's own gets its schema when it has none, and is never upgraded.
    """
    server = embedded(settings)
    try:
        database = connect(settings, server.start() if server else database_url(settings))
        try:
            prepare(database, settings)
            yield database
        finally:
            database.dispose()
    finally:
        if server:
            server.release()


def connect(settings: Settings, url: str, *, pool_size: int = 8) -> Database:
    """The database of the settings at its URL. Nothing is connected yet."""
    from fks_backfill_dagster.store.database import Database

    return Database(url, pool_size=pool_size, log=embedded_log(settings))


def embedded_log(settings: Settings) -> Path | None:
    """The log of the embedded PostgreSQL; None where the settings name another database."""
    server = embedded(settings)
    return None if server is None else server.log


def prepare(database: Database, settings: Settings) -> None:
    """Makes the schema where there is none, and upgrades that of the embedded database."""
    from fks_backfill_dagster.store.errors import SchemaTooOld

    try:
        database.ensure()
    except SchemaTooOld:
        if embedded(settings) is None:
            raise
        database.upgrade()
        database.check()


def database_url(settings: Settings) -> str:
    """The libpq URL of the database; the embedded one is started and runs as long as this process.

    It holds the password in clear: hand it to a client, never to a log. Raises EmbeddedError.
    """
    if settings.database_url is not None:
        return settings.database_url.get_secret_value().replace("postgresql+psycopg://", "postgresql://", 1)
    server = embedded(settings)
    assert server is not None
    return server.start()


def embedded(settings: Settings) -> EmbeddedPostgres | None:
    """The embedded PostgreSQL, not started; None where the settings name another database."""
    if settings.database_url is not None:
        return None
    from fks_backfill_dagster.embedded import EmbeddedPostgres

    return EmbeddedPostgres(settings.home)


# The providers ----------------------------------------------------------------------------------------


def build_providers(
    settings: Settings, pool: RequestPool, database: Database | None = None
) -> dict[str, Provider]:
    """The enabled providers of this version by name, with one pool and one limiter.

    Without a database the limits hold for this process alone: for those who only look at the providers.
    """
    from fks_backfill_dagster.providers import registry

    options = enabled_options(settings)
    limiter = limiter_for(options, database) if database else registry.limiter_for(options)
    return {name: registry.build(name, options[name], pool, limiter, now) for name in options}


def freshness_rule(settings: Settings) -> Rule:
    """What is lag by the settings. Providers are imported when a publication delay is first looked up."""
    from fks_backfill_dagster.domain.freshness import Thresholds
    from fks_backfill_dagster.pipeline.freshness import Rule, publication_delay

    usable = cache(lambda: _usable_providers(settings))
    limits = settings.freshness
    return Rule(
        thresholds=Thresholds(limits.warn_candles, limits.error_candles),
        publication_delay=lambda series: publication_delay(usable(), settings.priority(series), series),
        end_of=settings.end_of,
        closed=closures(settings),
        venue_members=settings.series(),
    )


def closures(settings: Settings) -> Callable[[Series, TimeRange], RangeSet]:
    """Where the market of a series was closed within a window though candles are expected, by the settings."""
    from fks_backfill_dagster.domain.closures import market_closures

    return lambda series, window: market_closures(series, settings.closed(series), window)


def settle_closures(
    settings: Settings, database: Database, series: Iterable[Series]
) -> list[SettledClosures]:
    """Brings the ledger in line with the closed dates of the settings, where those have changed since: one
    statement where they have not, and providers are imported only then."""
    from fks_backfill_dagster.pipeline.closures import settle_changed

    return settle_changed(
        database,
        {one: settings.closed(one) for one in series},
        lambda: _usable_providers(settings),
        settings.priority,
        settings.gap_detection.max_gap_minutes,
    )


def _usable_providers(settings: Settings) -> dict[str, Provider]:
    """The enabled providers, for what they declare; without those whose key cannot be one."""
    from fks_backfill_dagster.providers import registry
    from fks_backfill_dagster.providers.base import ProviderError
    from fks_backfill_dagster.providers.http.pool import RequestPool

    options, found = enabled_options(settings), {}
    pool = RequestPool(1)
    for name, one in options.items():
        with suppress(ProviderError):
            found[name] = registry.build(name, one, pool, registry.limiter_for(options), now)
    pool.close()
    return found


def limiter_for(options: Mapping[str, ProviderOptions], database: Database) -> Limiter:
    """The limits of these providers, shared by all processes on this database."""
    from fks_backfill_dagster.providers import registry
    from fks_backfill_dagster.store.rate_limits import SharedLimiter

    return SharedLimiter(database, registry.paces(options))


def circuit_for(options: Mapping[str, ProviderOptions], database: Database) -> Circuit:
    """Which of these providers are left alone, shared by all processes on this database."""
    from fks_backfill_dagster.providers import registry
    from fks_backfill_dagster.store.rate_limits import SharedCircuit

    return SharedCircuit(database, registry.paces(options))


def provider_states(settings: Settings, database: Database) -> dict[str, ProviderState]:
    """The enabled providers that are not asked now, with the accounts of the settings; usually none.

    Providers are imported only where there is something to tell.
    """
    from fks_backfill_dagster.store import rate_limits

    out = [state for state in rate_limits.provider_states(database) if state.is_out]
    if not out:
        return {}
    from fks_backfill_dagster.providers import registry

    paces = registry.paces(enabled_options(settings))
    return {
        state.provider: state
        for state in out
        if state.provider in paces and paces[state.provider].account == state.account
    }


def reset_provider(settings: Settings, database: Database, name: str) -> list[ProviderState]:
    """Ends every wait of a provider and of its archives, with the account of the settings; how those stood that had
    one, or had failed. Processes that run notice by themselves."""
    from fks_backfill_dagster.providers import registry
    from fks_backfill_dagster.store import rate_limits

    paces = registry.paces({name: provider_options(settings, name)})
    found = (rate_limits.reset(database, lane, pace.account) for lane, pace in paces.items())
    return [state for state in found if state is not None]


def refuse_mixed_sources(
    settings: Settings,
    database: Database,
    providers: Mapping[str, Provider],
    options: Mapping[str, ProviderOptions],
) -> None:
    """Raises MixedSources, see `store.sources`; of the providers that are enabled and have their key."""
    from fks_backfill_dagster.store import sources

    wanted = [
        name for name in options if settings.provider(name).enabled and providers[name].missing_key() is None
    ]
    sources.check(database, {name: host_in_use(name, options[name]) for name in wanted}, is_documented_host)


def host_in_use(name: str, options: ProviderOptions) -> HostInUse:
    """Where a provider is requested; of a custom and a documented host of one provider, the custom one."""
    from fks_backfill_dagster.providers.http.errors import host_of
    from fks_backfill_dagster.store.sources import HostInUse

    hosts = [host_of(url) for url in (options.base_url, options.archive_url) if url]
    custom = [host for host in hosts if not is_documented_host(name, host)]
    return HostInUse((custom or hosts)[0], bool(custom))


def is_documented_host(name: str, host: str) -> bool:
    """Whether a provider documents this host (a URL) as its own; all else is custom, a local market too."""
    from fks_backfill_dagster.providers import registry

    registered = registry.BUILT.get(name)
    defaults = (registered.base_url, registered.archive_url) if registered else ()
    known = {urlsplit(url).hostname for url in defaults if url} | _DOCUMENTED_HOSTS.get(name, frozenset())
    return urlsplit(host).hostname in known


def enabled_options(settings: Settings) -> dict[str, ProviderOptions]:
    """The options of the enabled providers of this version."""
    from fks_backfill_dagster.providers import registry

    return {
        name: provider_options(settings, name) for name in registry.BUILT if settings.provider(name).enabled
    }


def provider_options(settings: Settings, name: str) -> ProviderOptions:
    """What the settings say of one provider."""
    from fks_backfill_dagster.providers import registry

    own = settings.provider(name)
    return registry.resolve_options(
        name,
        base_url=own.base_url,
        archive_url=_archive_url(own) if isinstance(own, Binance) else None,
        requests_per_minute=own.requests_per_minute,
        timeout_seconds=own.timeout_seconds,
        key=settings.key_of(name),
    )


def _archive_url(binance: Binance) -> str | None:
    """The public archives belong to Binance's own hosts only.

    With a base_url elsewhere (a local market) and an archive_url that nobody changed they are off:
    candles of two markets must not be mixed.
    """
    host = urlsplit(binance.base_url).hostname or ""
    default = Binance.model_fields["archive_url"].default
    if binance.archive_url == default and not f".{host}".endswith(_BINANCE_HOSTS):
        return None
    return binance.archive_url
