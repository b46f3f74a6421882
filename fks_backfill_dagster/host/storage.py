"""Dagster's storage: its state in the project's database, schema `dagster`; its files below FKS_HOME.

dagster.yaml names these classes, so that one file works for the embedded database and for a server, without an address
or password. Each Dagster process takes them from the settings.

Does not belong here: the choice of the database (`app`), what Dagster stores.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from dagster._config.config_schema import UserConfigSchema
from dagster._core.execution.compute_logs import redirect_to_file
from dagster._core.storage.compute_log_manager import CapturedLogContext, ComputeIOType
from dagster._core.storage.local_compute_log_manager import IO_TYPE_EXTENSION, LocalComputeLogManager
from dagster._core.storage.root import LocalArtifactStorage
from dagster._serdes import ConfigurableClassData
from dagster._utils import ensure_file, touch_file
from dagster_postgres import (
    DagsterPostgresStorage,
    PostgresEventLogStorage,
    PostgresRunStorage,
    PostgresScheduleStorage,
)
from dagster_postgres.utils import create_pg_engine

from fks_backfill_dagster import app, ownership
from fks_backfill_dagster.host.servers import dagster_folder
from fks_backfill_dagster.host.storage_retries import add_retries
from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.settings.model import Settings
from fks_backfill_dagster.store import sessions
from fks_backfill_dagster.store.dagster_schema import DAGSTER_SCHEMA, keeps_connections, make_dagster_schema
from fks_backfill_dagster.store.errors import Place

_CONNECTIONS_KEPT = 2
"""A process writes one event at a time; further connections of concurrent threads are closed after use."""


class DatabaseStorage(DagsterPostgresStorage):
    """Runs, events and schedules in the database of the settings.

    Dagster's own class opens a connection per query, because each instance would keep its own: hundreds in a run of
    50 series. Here all instances of a process share an engine with a small pool.
    """

    def __init__(
        self,
        place: DagsterPlace,
        inst_data: ConfigurableClassData | None = None,
        *,
        makes_tables: bool = False,
    ) -> None:
        super().__init__(place.url, should_autocreate_tables=False, inst_data=inst_data)
        self._run_storage = _Runs(place, makes_tables)
        self._event_log_storage = _Events(place, makes_tables)
        self._schedule_storage = _Schedules(place, makes_tables)

    @classmethod
    def config_type(cls) -> UserConfigSchema:
        return {}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> DatabaseStorage:
        settings = _settings()
        return cls(_prepared(app.database_url(settings), app.embedded_log(settings)), inst_data)


@dataclass(frozen=True, slots=True)
class DagsterPlace:
    """The database of Dagster's tables. `url` contains the password; `place` is its form for messages."""

    url: str = field(repr=False)
    place: Place


class _InSchema:
    """One of Dagster's three storages, with the session setup of our connections and the schema in the search_path.

    Dagster creates engines from the URL, a separate one for the webserver: each is attached here. All others share
    one engine.
    """

    def __init__(self, place: DagsterPlace, makes_tables: bool) -> None:
        self._place = place
        super().__init__(place.url, makes_tables)  # type: ignore[call-arg]
        add_retries(self)

    @property
    def _engine(self) -> Any:
        return self._attached

    @_engine.setter
    def _engine(self, made: Any) -> None:
        if not keeps_connections(made):
            self._attached = _shared_engine(self._place)
        else:
            self._attached = _attached(made, self._place.place)


class _Runs(_InSchema, PostgresRunStorage):
    pass


class _Events(_InSchema, PostgresEventLogStorage):
    pass


class _Schedules(_InSchema, PostgresScheduleStorage):
    pass


class HomeArtifacts(LocalArtifactStorage):
    """Dagster's files below FKS_HOME."""

    @classmethod
    def config_type(cls) -> UserConfigSchema:
        return {}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> HomeArtifacts:
        return cls(str(_own_folder()), inst_data=inst_data)


class HomeComputeLogs(LocalComputeLogManager):
    """The output of runs, below FKS_HOME.

    It is repeated on a terminal (`dagster dev`) only: Dagster's own class uses four processes per run to repeat it in
    the log of the parent process.
    """

    @classmethod
    def config_type(cls) -> UserConfigSchema:
        return {}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> HomeComputeLogs:
        return cls(str(_own_folder() / "compute_logs"), inst_data=inst_data)

    @contextmanager
    def capture_logs(self, log_key: Sequence[str]) -> Iterator[CapturedLogContext]:
        if sys.stdout.isatty() or sys.stderr.isatty():
            with super().capture_logs(log_key) as context:
                yield context
            return
        out, err = (
            self.get_captured_local_path(log_key, IO_TYPE_EXTENSION[kind])
            for kind in (ComputeIOType.STDOUT, ComputeIOType.STDERR)
        )
        ensure_file(out)
        ensure_file(err)
        with redirect_to_file(sys.stdout, out), redirect_to_file(sys.stderr, err):
            yield CapturedLogContext(log_key)
        touch_file(self.complete_artifact_path(log_key))  # type: ignore[no-untyped-call]


def _own_folder() -> Path:
    """Dagster's folder in the home, closed to other accounts: it holds the output of runs."""
    home = _settings().home
    folder = dagster_folder(home)
    ownership.make_home(home)
    ownership.make_folder(folder)
    return folder


def _settings() -> Settings:
    """The settings of this process, cached: each Dagster instance needs them three times, and a run has several."""
    return _settings_of(tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("FKS_"))))


@cache
def _settings_of(environment: tuple[tuple[str, str], ...]) -> Settings:
    """Cached by environment: home and database, which these classes need, are set there only."""
    return load_settings()


@cache
def _prepared(database_url: str, log: Path | None) -> DagsterPlace:
    """The place of Dagster's tables; creates missing ones, once per process."""
    place = dagster_place(database_url, log)
    DatabaseStorage(place, makes_tables=True)
    return place


@cache
def _shared_engine(place: DagsterPlace) -> Any:
    engine = create_pg_engine(
        place.url,
        isolation_level="AUTOCOMMIT",
        pool_size=_CONNECTIONS_KEPT,
        max_overflow=-1,
        pool_pre_ping=True,
        pool_use_lifo=True,
    )
    return _attached(engine, place.place)


def _attached(engine: Any, place: Place) -> Any:
    """With waits for an unavailable database: the command that started Dagster has connected to it before."""
    sessions.attach(engine, place, search_path=DAGSTER_SCHEMA, is_patient=True)
    return engine


def dagster_place(database_url: str, log: Path | None = None) -> DagsterPlace:
    """Dagster's schema in our database, created if missing. Raises a StoreError.

    The driver is explicit: SQLAlchemy 2.1 reads `postgresql://` as psycopg 3, which breaks dagster-postgres.
    """
    return DagsterPlace(*make_dagster_schema(database_url, DAGSTER_SCHEMA, "psycopg2", log=log))
