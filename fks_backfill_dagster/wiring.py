"""The composition root: settings become a database, providers and the context that every verb works with.

Belongs here: which parts are made from which settings, and how long they live. The faces (command
line, Dagster, API) take from here and build nothing themselves.
Does not belong here: what is done with the parts.

Importing this module is cheap; what is heavy is imported by the function that needs it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fks_backfill_dagster.settings import Binance, Settings

if TYPE_CHECKING:
    from fks_backfill_dagster.embedded import EmbeddedPostgres
    from fks_backfill_dagster.pipeline.sync import Context
    from fks_backfill_dagster.providers.base import Provider, ProviderOptions
    from fks_backfill_dagster.providers.http import RequestPool
    from fks_backfill_dagster.store.database import Database

# Hosts of Binance itself: the same candles as in its public archives.
_BINANCE_HOSTS = (".binance.com", ".binance.vision")


@dataclass(frozen=True, slots=True)
class App:
    """What a face that fetches holds while it works. `pool.stop` ends every wait of a provider at once."""

    settings: Settings
    database: Database
    pool: RequestPool
    context: Context


def now() -> int:
    """The present in microseconds UTC: the clock of all faces."""
    return time.time_ns() // 1000


@contextmanager
def open_app(settings: Settings) -> Iterator[App]:
    """The database, the providers that are enabled, and the context of the pipeline's verbs.

    Raises StoreError or EmbeddedError when the database cannot be had.
    """
    from fks_backfill_dagster.pipeline.sync import Context
    from fks_backfill_dagster.providers.http import RequestPool

    with ExitStack() as stack:
        database = stack.enter_context(open_database(settings))
        pool = RequestPool(settings.max_concurrent_requests)
        stack.callback(pool.close)
        context = Context(
            database=database,
            providers=build_providers(settings, pool),
            clock=now,
            batch_size_days=settings.batch_size_days,
            max_concurrent_requests=settings.max_concurrent_requests,
        )
        yield App(settings, database, pool, context)


# The database -----------------------------------------------------------------------------------------


@contextmanager
def open_database(settings: Settings) -> Iterator[Database]:
    """The database with its schema, for the length of the block.

    The embedded one runs at least that long, and is upgraded without being asked: it has no other
    owner. A database of the user's own gets its schema when it has none, and is never upgraded.
    """
    from fks_backfill_dagster.store.database import Database

    server = embedded(settings)
    try:
        database = Database(server.start() if server else database_url(settings))
        try:
            prepare(database, settings)
            yield database
        finally:
            database.dispose()
    finally:
        if server:
            server.release()


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


def build_providers(settings: Settings, pool: RequestPool) -> dict[str, Provider]:
    """The enabled providers of this version by name; those of one process share pool and limiter."""
    from fks_backfill_dagster.providers import registry

    enabled = [name for name in registry.BUILT if settings.provider(name).enabled]
    options = {name: provider_options(settings, name) for name in enabled}
    limiter = registry.limiter_for(options, pool)
    return {name: registry.build(name, options[name], pool, limiter, now) for name in enabled}


def provider_options(settings: Settings, name: str) -> ProviderOptions:
    """What the settings say of one provider. Raises NotBuilt for one that this version cannot ask."""
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
