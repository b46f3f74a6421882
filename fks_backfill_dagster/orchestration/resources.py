"""The resources of the ops: the database, and one resource per provider.

A resource holds an address and options. It opens connections when a run starts, not when definitions are loaded.
Secrets are not fields: Dagster shows fields in its UI and stores them with runs.

The configuration of a run cannot replace any field of a resource (`fixed`): another base_url would receive the
provider's key, and `{"env": "POLYGON_API_KEY"}` as a value would show it.
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
from fks_backfill_dagster.known_providers import KNOWN
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.providers.base import Provider, ProviderOptions
from fks_backfill_dagster.providers.http.limiter import Limiter
from fks_backfill_dagster.providers.http.pool import RequestPool
from fks_backfill_dagster.providers.registry import build, resolve_options
from fks_backfill_dagster.settings.model import Settings
from fks_backfill_dagster.store.database import Database

DATABASE = "timescaledb"
PROVIDERS = tuple(KNOWN)
ALL = frozenset({DATABASE, *PROVIDERS})


class TimescaleDB(ConfigurableResource):  # type: ignore[type-arg]
    """The database at `url`, for tests and other deployments. Creates the schema if it is missing.

    Pass the url as an EnvVar, so that the UI does not show a password.
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
    """The addresses, limits and timeouts of a provider. Its key comes from the environment only."""

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
    """The resources for these settings.

    No op passes a value to another one. The I/O manager is replaced because Dagster's default takes a folder from
    the configuration of a run.
    """
    return {
        DATABASE: _database(settings),
        **{name: _provider(settings, name) for name in PROVIDERS},
        "io_manager": IOManagerDefinition(lambda _: InMemoryIOManager(), config_schema={}),  # type: ignore[no-untyped-call]
    }


def fixed(resource: object) -> object:
    """The resource without fields that a run's configuration could replace; any other object unchanged.

    Dagster then rejects such a run, wherever it is launched, before it resolves any configured value.
    """
    if not isinstance(resource, ConfigurableResource):
        return resource

    given = {name: getattr(resource, name) for name in type(resource).model_fields}

    def opened_once(context: InitResourceContext) -> Iterator[object]:
        values = {
            name: value.get_value() if isinstance(value, EnvVar) else value for name, value in given.items()
        }
        # Creates the resource from the run's configuration, which is empty, and these values.
        with type(resource).from_resource_context_cm(context, values) as opened_resource:
            yield opened_resource

    return ResourceDefinition(
        resource_fn=opened_once,
        config_schema={},
        description=_description(resource),
    )


def _description(resource: ConfigurableResource[Any]) -> str:
    """The description on Dagster's page of the resource."""
    if isinstance(resource, ProviderResource):
        return f"{resource.provider}, requested at {resource.base_url}. Set in the settings, not by a run."
    return type(resource).__doc__ or type(resource).__name__


def _database(settings: Settings) -> TimescaleDB:
    class SettingsDatabase(TimescaleDB):
        """The database of the settings: FKS_DATABASE_URL, else the embedded PostgreSQL."""

        # A separate class because the url holds a password, and Dagster shows every field.

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
def opened(resources: Any, settings: Settings, on_wait: Callable[[str], None]) -> Iterator[Context]:
    """The context of syncs, from a run's resources: one request pool, rate limits shared with other processes.

    `on_wait` receives a message when a provider delays all requests, from any thread.
    """
    given: Mapping[str, ProviderResource] = {name: getattr(resources, name) for name in PROVIDERS}
    options = {name: resource.options(settings.key_of(name)) for name, resource in given.items()}
    _log_addresses(settings, options)
    database: Database = getattr(resources, DATABASE).database
    pool = RequestPool(settings.max_concurrent_requests, on_wait=on_wait)
    try:
        limiter = app.limiter_for(options, database)
        providers = {name: given[name].make(options[name], pool, limiter) for name in given}
        yield app.make_context(settings, database, providers, options)
    except BaseException:
        pool.stop.set()  # ends all waits for providers immediately
        raise
    finally:
        pool.close()


def _log_addresses(settings: Settings, options: Mapping[str, ProviderOptions]) -> None:
    """Logs one line with all custom provider addresses, so that the run log shows the source of its candles."""
    custom = {
        name: KNOWN[name].custom_address(each.base_url, each.archive_url)
        for name, each in options.items()
        if settings.provider(name).enabled
    }
    shown = [f"{name} at {address}" for name, address in custom.items() if address is not None]
    if shown:
        get_dagster_logger().info(f"Custom provider addresses: {', '.join(shown)}")
