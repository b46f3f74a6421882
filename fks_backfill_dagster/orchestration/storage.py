"""Where Dagster keeps its own state: in our database, schema `dagster`; its files below FKS_HOME.

dagster.yaml names these classes, so that one file serves the embedded database and a server, and no
address or password stands in it. Every Dagster process resolves them anew from the settings.

Does not belong here: how the database is found (wiring), what Dagster keeps (Dagster).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dagster._config.config_schema import UserConfigSchema
from dagster._core.storage.local_compute_log_manager import LocalComputeLogManager
from dagster._core.storage.root import LocalArtifactStorage
from dagster._serdes import ConfigurableClassData
from dagster_postgres import DagsterPostgresStorage

from fks_backfill_dagster import wiring
from fks_backfill_dagster.orchestration.servers import dagster_folder
from fks_backfill_dagster.settings import load_settings
from fks_backfill_dagster.store.lending import DAGSTER_SCHEMA, lend_schema


class DatabaseStorage(DagsterPostgresStorage):
    """Runs, events and schedules in the database of the settings."""

    @classmethod
    def config_type(cls) -> UserConfigSchema:
        return {}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> DatabaseStorage:
        return cls(storage_url(wiring.database_url(load_settings())), inst_data=inst_data)


class HomeArtifacts(LocalArtifactStorage):
    """Dagster's files below FKS_HOME."""

    @classmethod
    def config_type(cls) -> UserConfigSchema:
        return {}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> HomeArtifacts:
        return cls(str(dagster_folder(load_settings().home)), inst_data=inst_data)


class HomeComputeLogs(LocalComputeLogManager):
    """What runs print, below FKS_HOME."""

    @classmethod
    def config_type(cls) -> UserConfigSchema:
        return {}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> HomeComputeLogs:
        return cls(str(dagster_folder(load_settings().home) / "compute_logs"), inst_data=inst_data)


def storage_url(database_url: str) -> str:
    """Dagster's URL into our database; makes its schema there. Raises a StoreError.

    The driver is named: SQLAlchemy 2.1 reads `postgresql://` as psycopg 3, which breaks dagster-postgres.
    """
    return lend_schema(database_url, DAGSTER_SCHEMA, "psycopg2")
