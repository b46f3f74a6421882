"""Alembic's entry: runs the revisions on the connection that `store.database` hands over."""

from alembic import context

from fks_backfill_dagster.store.schema import SCHEMA, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table_schema=SCHEMA,
    include_schemas=True,
    transaction_per_migration=False,
)
context.run_migrations()
