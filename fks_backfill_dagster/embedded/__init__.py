"""The embedded PostgreSQL: a private server below FKS_HOME, started when it is needed and never left behind.

Here belongs everything about the server as a process: where its files are, who runs it, when it starts and
ends. Nothing here knows SQL or tables (that is `store/`), and nothing of the project is imported but `ownership`.
The reasons for the design are in docs/adr/0003-embedded-postgresql.md.
"""

from __future__ import annotations

from fks_backfill_dagster.embedded.errors import EmbeddedError
from fks_backfill_dagster.embedded.supervisor import EmbeddedPostgres, Status

__all__ = ["EmbeddedError", "EmbeddedPostgres", "Status"]
