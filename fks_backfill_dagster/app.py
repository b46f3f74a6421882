"""The composition root: builds the database, the providers and the context of the pipeline from the settings.

Belongs here: which component is built from which settings, and its lifetime. The interfaces (command
line, Dagster, API) use this module and build nothing themselves.
Does not belong here: the use of the components.

Importing this module is cheap; heavy modules are imported by the functions that need them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from fks_backfill_dagster.known_providers import KNOWN
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.model import Settings

if TYPE_CHECKING:
    from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
    from fks_backfill_dagster.domain.series import Series
    from fks_backfill_dagster.embedded import EmbeddedPostgres
    from fks_backfill_dagster.pipeline.closures import SettledClosures
    from fks_backfill_dagster.pipeline.context import Context
    from fks_backfill_dagster.pipeline.freshness import Rule
    from fks_backfill_dagster.providers.base import Circuit, Provider, ProviderOptions
    from fks_backfill_dagster.providers.http.limiter import Limiter
    from fks_backfill_dagster.providers.http.pool import RequestPool
    from fks_backfill_dagster.store.database import Database
    from fks_backfill_dagster.store.rate_limits import ProviderState
    from fks_backfill_dagster.store.sources import HostInUse


@dataclass(frozen=True, slots=True)
class App:
    """The components that a fetching interface holds while it works. `pool.stop` ends all waits at once."""

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
    """The context of the pipeline by the settings; `options`: those that the providers were built with.

    Raises MixedSources where their hosts are of another kind than those of the database's candles.
    """
    from fks_backfill_dagster.pipeline.context import Context

    catalog = Catalog(settings)
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
        closed_dates=catalog.closed,
        priority=catalog.priority,
    )


def now() -> int:
    """The current time in microseconds UTC: the clock of all interfaces."""
    return time.time_ns() // 1000


@contextmanager
def open_app(settings: Settings, on_wait: Callable[[str], None] = lambda _: None) -> Iterator[App]:
    """The database, the enabled providers, and the context of the pipeline.

    `on_wait` is called from any thread with a message when requests wait for a provider.
    Raises StoreError or EmbeddedError when the database is unavailable, or must not be used with these hosts.
    """
    from fks_backfill_dagster.providers.http.pool import RequestPool

    with ExitStack() as stack:
        database = stack.enter_context(open_database(settings))
        pool = RequestPool(settings.max_concurrent_requests, on_wait=on_wait)
        stack.callback(pool.close)
        providers = build_providers(settings, pool, database)
        context = make_context(settings, database, providers, enabled_options(settings))
        yield App(settings, database, pool, context)


# The database -----------------------------------------------------------------------------------------


@contextmanager
def open_database(settings: Settings) -> Iterator[Database]:
    """The database with its schema, for the duration of the block.

    The embedded one runs at least that long, and is upgraded automatically: this program is its only owner. The
    schema of a user's own database is created if missing, and never upgraded.
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
    """The database of the settings at its URL, not connected yet."""
    from fks_backfill_dagster.store.database import Database

    return Database(url, pool_size=pool_size, log=embedded_log(settings))


def embedded_log(settings: Settings) -> Path | None:
    """The log of the embedded PostgreSQL; None where the settings name another database."""
    server = embedded(settings)
    return None if server is None else server.log


def prepare(database: Database, settings: Settings) -> None:
    """Creates a missing schema, and upgrades that of the embedded database."""
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

    It contains the password in clear: pass it to a client, never to a log. Raises EmbeddedError.
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

    Without a database the limits hold for this process only: enough for reading what providers declare.
    """
    from fks_backfill_dagster.providers import registry

    options = enabled_options(settings)
    limiter = limiter_for(options, database) if database else registry.limiter_for(options)
    return {name: registry.build(name, options[name], pool, limiter, now) for name in options}


def freshness_rule(settings: Settings) -> Rule:
    """The freshness rule of the settings. Providers are imported when a publication delay is first looked up."""
    from fks_backfill_dagster.domain.freshness import Thresholds
    from fks_backfill_dagster.pipeline.freshness import Rule, publication_delay

    usable = cache(lambda: _usable_providers(settings))
    catalog, limits = Catalog(settings), settings.freshness
    return Rule(
        thresholds=Thresholds(limits.warn_candles, limits.error_candles),
        publication_delay=lambda series: publication_delay(usable(), catalog.priority(series), series),
        end_of=catalog.end_of,
        closed=closures(catalog),
        venue_members=catalog.series,
    )


def closures(catalog: Catalog) -> Callable[[Series, TimeRange], RangeSet]:
    """The ranges of a window in which candles are expected, but the market of a series was closed by the settings."""
    from fks_backfill_dagster.domain.closures import market_closures

    return lambda series, window: market_closures(series, catalog.closed(series), window)


def settle_closures(
    settings: Settings, database: Database, series: Iterable[Series]
) -> list[SettledClosures]:
    """Settles the ledger by the closed dates of the settings where those have changed. One statement if none has;
    providers are imported only if one has."""
    from fks_backfill_dagster.pipeline.closures import settle_changed

    catalog = Catalog(settings)
    return settle_changed(
        database,
        {one: catalog.closed(one) for one in series},
        lambda: _usable_providers(settings),
        catalog.priority,
        settings.gap_detection.max_gap_minutes,
    )


def _usable_providers(settings: Settings) -> dict[str, Provider]:
    """The enabled providers, for what they declare; without those whose key is malformed."""
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

    return SharedLimiter(database, registry.rate_limits(options))


def circuit_for(options: Mapping[str, ProviderOptions], database: Database) -> Circuit:
    """The circuits of these providers, shared by all processes on this database."""
    from fks_backfill_dagster.providers import registry
    from fks_backfill_dagster.store.rate_limits import SharedCircuit

    return SharedCircuit(database, registry.rate_limits(options))


def provider_states(settings: Settings, database: Database) -> dict[str, ProviderState]:
    """The enabled providers that get no requests now, with the accounts of the settings; usually none.

    Providers are imported only if there is one.
    """
    from fks_backfill_dagster.store import rate_limits

    out = [state for state in rate_limits.provider_states(database) if state.is_out]
    if not out:
        return {}
    from fks_backfill_dagster.providers import registry

    limits = registry.rate_limits(enabled_options(settings))
    return {
        state.provider: state
        for state in out
        if state.provider in limits and limits[state.provider].account == state.account
    }


def reset_provider(settings: Settings, database: Database, name: str) -> list[ProviderState]:
    """Ends every wait of a provider and of its archives, with the account of the settings. Returns the former states
    of those with a wait or a failure. Running processes pick the reset up."""
    from fks_backfill_dagster.providers import registry
    from fks_backfill_dagster.store import rate_limits

    limits = registry.rate_limits({name: provider_options(settings, name)})
    found = (rate_limits.reset(database, lane, limit.account) for lane, limit in limits.items())
    return [state for state in found if state is not None]


def refuse_mixed_sources(
    settings: Settings,
    database: Database,
    providers: Mapping[str, Provider],
    options: Mapping[str, ProviderOptions],
) -> None:
    """Raises MixedSources, see `store.sources`; checks the enabled providers that have their key."""
    from fks_backfill_dagster.store import sources

    wanted = [
        name for name in options if settings.provider(name).enabled and providers[name].missing_key() is None
    ]
    sources.check(database, {name: host_in_use(name, options[name]) for name in wanted}, is_documented_host)


def host_in_use(name: str, options: ProviderOptions) -> HostInUse:
    """The host of a provider; the custom one if it has both a custom and a documented host."""
    from fks_backfill_dagster.providers.http.errors import host_of
    from fks_backfill_dagster.store.sources import HostInUse

    hosts = [host_of(url) for url in (options.base_url, options.archive_url) if url]
    custom = [host for host in hosts if not is_documented_host(name, host)]
    return HostInUse((custom or hosts)[0], bool(custom))


def is_documented_host(name: str, host: str) -> bool:
    """Whether a provider documents this host (a URL) as its own; any other is custom, including a local market."""
    known = KNOWN.get(name)
    return known is not None and known.documents(host)


def enabled_options(settings: Settings) -> dict[str, ProviderOptions]:
    """The options of the enabled providers of this version."""
    return {name: provider_options(settings, name) for name in KNOWN if settings.provider(name).enabled}


def provider_options(settings: Settings, name: str) -> ProviderOptions:
    """The options of one provider by the settings."""
    from fks_backfill_dagster.providers import registry

    own = settings.provider(name)
    return registry.resolve_options(
        name,
        base_url=own.base_url,
        archive_url=KNOWN[name].archives_for(own.base_url, getattr(own, "archive_url", None)),
        requests_per_minute=own.requests_per_minute,
        timeout_seconds=own.timeout_seconds,
        key=settings.key_of(name),
    )
