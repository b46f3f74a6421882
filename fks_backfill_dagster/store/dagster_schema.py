"""The schema of our database for Dagster's tables, and its obsolete rows.

Belongs here: the schema, its address, and queries over many of Dagster's events, which its own API serves one run
at a time. Does not belong here: deleting rows of runs, which that API does.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import sqlalchemy as sa

from fks_backfill_dagster.store.database import Database, make_schema
from fks_backfill_dagster.store.errors import Place

DAGSTER_SCHEMA = "dagster"


def make_dagster_schema(
    database_url: str, schema: str, driver: str, *, log: Path | None = None
) -> tuple[str, Place]:
    """Creates the schema. Returns the SQLAlchemy URL with which `driver` connects, and the database for messages.

    The engine still has to be attached (`sessions.attach`) with the schema as its search_path: Dagster's tables are
    not schema-qualified. The URL contains the password in clear. `log`: see `Database`. Raises StoreError.
    """
    database = Database(database_url, pool_size=1, log=log)
    try:
        with database.begin() as connection:
            make_schema(connection, schema, database.place)
    finally:
        database.dispose()
    return database.url.set(drivername=f"postgresql+{driver}").render_as_string(
        hide_password=False
    ), database.place


def keeps_connections(engine: sa.Engine) -> bool:
    """Whether the engine of another program has a connection pool."""
    return not isinstance(engine.pool, sa.NullPool)


# A partition's state follows from its newest materialization and its newest plan; a check's from its
# newest evaluation. Runs that hold one of those are kept.
_OBSOLETE = """
WITH newest AS (
    SELECT max(id) AS id FROM {schema}.event_logs
    WHERE asset_key IS NOT NULL
      AND dagster_event_type IN ('ASSET_MATERIALIZATION', 'ASSET_MATERIALIZATION_PLANNED')
    GROUP BY asset_key, dagster_event_type, partition
), kept AS (
    SELECT e.run_id FROM {schema}.event_logs e JOIN newest USING (id)
    UNION
    SELECT c.run_id FROM {schema}.asset_check_executions c WHERE c.id IN (
        SELECT max(id) FROM {schema}.asset_check_executions GROUP BY asset_key, check_name)
)
SELECT r.run_id FROM {schema}.runs r
WHERE r.status IN ('SUCCESS', 'FAILURE', 'CANCELED') AND r.update_timestamp < :before
  AND NOT EXISTS (SELECT FROM kept k WHERE k.run_id = r.run_id)
ORDER BY r.id
"""

# Dagster does not delete them, not even with their run.
_ORPHANED_CHECKS = """
DELETE FROM {schema}.asset_check_executions c
WHERE NOT EXISTS (SELECT FROM {schema}.runs r WHERE r.run_id = c.run_id)
"""

# Snapshots of jobs and of their plans, one per selection of assets that was ever run: a later run creates
# its own again. The newest are kept, because their run may not be written yet.
_UNUSED_SNAPSHOTS = """
WITH used AS (
    SELECT snapshot_id FROM {schema}.runs WHERE snapshot_id IS NOT NULL
    UNION
    SELECT (regexp_match(run_body, '"execution_plan_snapshot_id": "([0-9a-f]+)"'))[1] FROM {schema}.runs
)
DELETE FROM {schema}.snapshots s
WHERE s.id < (SELECT max(id) FROM {schema}.snapshots) - 200
  AND NOT EXISTS (SELECT FROM used u WHERE u.snapshot_id = s.snapshot_id)
"""


def obsolete_runs(database: Database, schema: str, before: datetime) -> list[str]:
    """Ids of the runs that ended before that moment and that no state shown in Dagster depends on."""
    with database.begin() as connection:
        query = sa.text(_OBSOLETE.format(schema=schema))
        # Dagster's timestamps are UTC without a zone.
        return list(connection.scalars(query, {"before": before.replace(tzinfo=None)}))


def forget_strays(database: Database, schema: str) -> int:
    """Deletes rows that deleted runs leave behind; returns their number."""
    statements = (_ORPHANED_CHECKS, _UNUSED_SNAPSHOTS)
    with database.begin() as connection:
        return sum(connection.execute(sa.text(text.format(schema=schema))).rowcount for text in statements)


def event_count(database: Database, schema: str) -> int:
    with database.begin() as connection:
        return connection.scalar(sa.text(f"SELECT count(*) FROM {schema}.event_logs")) or 0
