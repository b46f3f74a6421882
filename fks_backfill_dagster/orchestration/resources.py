"""What the ops need from outside: the database, and one resource per provider.

A resource only says where something is and how to open it; it does so when a run begins, never when
definitions are loaded. Secrets are no fields: Dagster shows fields in its UI and keeps them in runs.

Nothing of a resource can be replaced by the configuration of a run (`fixed`): a run with another base_url
would send the provider's key there, and one with `{"env": "POLYGON_API_KEY"}` as a value would show it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dagster import (
    ConfigurableResource,
    EnvVar,
    InitResourceContext,
    InMemoryIOManager,
    IOManagerDefinition,
    ResourceDefinition,
    get_dagster_logger,
)
from pydantic import PrivateAttr

from fks_backfill_dagster import app
from fks_backfill_dagster.pipeline.sync import Context
from fks_backfill_dagster.providers.base import Provider, ProviderOptions
from fks_backfill_dagster.providers.http.limiter import Limiter
from fks_backfill_dagster.providers.http.pool import RequestPool
from fks_backfill_dagster.providers.registry import BUILT, build, resolve_options
from fks_backfill_dagster.settings.model import Settings, custom_address
from fks_backfill_dagster.store.database import Database

DATABASE = "timescaledb"
PROVIDERS = tuple(BUILT)
ALL = frozenset({DATABASE, *PROVIDERS})


class TimescaleDB(ConfigurableResource):  # type: ignore[type-arg]
    """The database at `url`, for tests and other deployments. Its schema is made where there is none.

    Give the url as an EnvVar, so that no password is shown in the UI.
    """

    url: str
    _database: Database = PrivateAttr()

    def setup_for_execution(self, context: InitResourceContext) -> None:
        self._database = self._open()

    def teardown_after_execution(self, context: InitResourceContext) -> None:
        self._database.dispose()

    @property
    def database(self) -> Database:
        return self._database

    def _open(self) -> Database:
        database = Database(self.url)
        database.ensure()
        return database


class ProviderResource(ConfigurableResource):  # type: ignore[type-arg]
    """Where and how a provider is asked. Its key comes from the environment only."""

    provider: str
    base_url: str
    archive_url: str | None = None
    requests_per_minute: int | None = None
    timeout_seconds: float = 30.0
    retry_budget_seconds: float = 20.0
    longest_wait_seconds: float = 300.0

    def options(self, key: str | None) -> ProviderOptions:
        return resolve_options(
            self.provider,
            base_url=self.base_url,
            archive_url=self.archive_url,
            requests_per_minute=self.requests_per_minute,
            timeout_seconds=self.timeout_seconds,
            retry_budget_seconds=self.retry_budget_seconds,
            longest_wait_seconds=self.longest_wait_seconds,
            key=key,
        )

    def make(self, options: ProviderOptions, pool: RequestPool, limiter: Limiter) -> Provider:
        return build(self.provider, options, pool, limiter, app.now)


def default_resources(settings: Settings) -> dict[str, object]:
    """The resources as the settings have them.

    No op hands a value to another one. Dagster's own I/O manager for that takes a folder from a run's
    configuration.
    """
    return {
        DATABASE: _database(settings),
        **{name: _provider(settings, name) for name in PROVIDERS},
        "io_manager": IOManagerDefinition(lambda _: InMemoryIOManager(), config_schema={}),  # type: ignore[no-untyped-call]
    }


def fixed(resource: object) -> object:
    """The resource without what a run's configuration could replace; any other object as it is.

    Dagster then refuses such a run, wherever it is launched, before a value of its configuration is looked at.
    """
    if not isinstance(resource, ConfigurableResource):
        return resource

    given = {name: getattr(resource, name) for name in type(resource).model_fields}

    def opened_once(context: InitResourceContext) -> Iterator[object]:
        values = {
            name: value.get_value() if isinstance(value, EnvVar) else value for name, value in given.items()
        }
        # It makes a resource of what is configured, which is nothing, and of what is given beside that.
        with type(resource).from_resource_context_cm(context, values) as opened_resource:
            yield opened_resource

    return ResourceDefinition(
        resource_fn=opened_once,
        config_schema={},
        description=_description(resource),
    )


def _description(resource: ConfigurableResource[Any]) -> str:
    """What Dagster's page of the resource shows."""
    if isinstance(resource, ProviderResource):
        return f"{resource.provider}, requested at {resource.base_url}. Set in the settings, not by a run."
    return type(resource).__doc__ or type(resource).__name__


def _database(settings: Settings) -> TimescaleDB:
    class SettingsDatabase(TimescaleDB):
        """The database of the settings: FKS_DATABASE_URL, else the embedded PostgreSQL."""

        # A class of its own because its address holds a password, and Dagster shows every field.

        url: str = ""

        def _open(self) -> Database:
            database = app.connect(settings, app.database_url(settings))
            app.prepare(database, settings)
            return database

    return SettingsDatabase()


def _provider(settings: Settings, name: str) -> ProviderResource:
    options = app.provider_options(settings, name)
    return ProviderResource(
        provider=name,
        base_url=options.base_url,
        archive_url=options.archive_url,
        requests_per_minute=options.requests_per_minute,
        timeout_seconds=options.timeout_seconds,
        retry_budget_seconds=options.retry_budget_seconds,
        longest_wait_seconds=options.longest_wait_seconds,
    )


@contextmanager
def opened(resources: Any, settings: Settings, tell: Callable[[str], None]) -> Iterator[Context]:
    """What a sync works with, from a run's resources: one pool for all, limits shared with every process.

    `tell` gets a sentence when a provider keeps everybody waiting, from any thread.
    """
    given: Mapping[str, ProviderResource] = {name: getattr(resources, name) for name in PROVIDERS}
    options = {name: resource.options(settings.key_of(name)) for name, resource in given.items()}
    _log_addresses(settings, options)
    database: Database = getattr(resources, DATABASE).database
    pool = RequestPool(settings.max_concurrent_requests, tell=tell)
    try:
        limiter = app.limiter_for(options, database)
        providers = {name: given[name].make(options[name], pool, limiter) for name in given}
        yield app.make_context(settings, database, providers, options)
    except BaseException:
        pool.stop.set()  # ends every wait of a provider at once
        raise
    finally:
        pool.close()


def _log_addresses(settings: Settings, options: Mapping[str, ProviderOptions]) -> None:
    """One line of the run log for all addresses that are no default ones: whose candles a run stored can
    be found out from it."""
    custom = {
        name: custom_address(name, each.base_url, each.archive_url)
        for name, each in options.items()
        if settings.provider(name).enabled
    }
    told = [f"{name} at {address}" for name, address in custom.items() if address is not None]
    if told:
        get_dagster_logger().info(f"Not the default addresses: {', '.join(told)}")
