"""A schema of our database lent to another program, which has its own driver and makes its own tables.

Belongs here: the schema and the address of it. Does not belong here: anything inside that schema.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from fks_backfill_dagster.store.database import Database, make_schema
from fks_backfill_dagster.store.errors import Place

DAGSTER_SCHEMA = "dagster"


def lend_schema(database_url: str, schema: str, driver: str, *, log: Path | None = None) -> tuple[str, Place]:
    """The SQLAlchemy URL with which `driver` connects, and the database for messages. Makes the schema.

    The engine still has to be attached (`sessions.attach`) with the schema as its search_path: programs whose tables
    carry no schema of their own find them by it. The URL holds the password in clear. `log`: as for Database. Raises
    StoreError.
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
    """Whether an engine of another program has a pool of its own."""
    return not isinstance(engine.pool, sa.NullPool)
