"""A schema of our database lent to another program, which brings its own driver and makes its own tables.

Belongs here: the schema and the address of it. Does not belong here: anything inside that schema.
"""

from __future__ import annotations

import sqlalchemy as sa

from fks_backfill_dagster.store.database import Database

DAGSTER_SCHEMA = "dagster"


def lend_schema(database_url: str, schema: str, driver: str) -> str:
    """The SQLAlchemy URL with which `driver` works in `schema`, which is made where there is none.

    The schema is the connection's search_path, for programs whose tables carry none of their own. The
    URL holds the password in clear. Raises a StoreError when the database cannot be had.
    """
    database = Database(database_url, pool_size=1)
    try:
        with database.begin() as connection:
            # CREATE SCHEMA IF NOT EXISTS needs a right even when the schema exists: ask first.
            if connection.scalar(sa.text("SELECT to_regnamespace(:name)"), {"name": schema}) is None:
                connection.execute(sa.text(f'CREATE SCHEMA IF NOT EXISTS "{schema}"'))
        given = database.url.query.get("options", "")
    finally:
        database.dispose()
    options = f"{given if isinstance(given, str) else ' '.join(given)} -csearch_path={schema}".strip()
    url = database.url.set(drivername=f"postgresql+{driver}").update_query_dict({"options": options})
    return url.render_as_string(hide_password=False)
