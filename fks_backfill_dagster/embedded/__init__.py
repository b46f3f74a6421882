"""The embedded PostgreSQL: a private server below FKS_HOME, started on demand and stopped when unused.

Belongs here: the server as a process, its files, its account, its start and stop. Does not belong here: SQL and
tables (`store`). Of the project only `ownership` is imported. The reasons for the design are in
docs/adr/0003-embedded-postgresql.md.
"""

from __future__ import annotations

from fks_backfill_dagster.embedded.errors import EmbeddedError
from fks_backfill_dagster.embedded.supervisor import EmbeddedPostgres, Status

__all__ = ["EmbeddedError", "EmbeddedPostgres", "Status"]
