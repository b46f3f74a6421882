"""A real database and a real local market. The clock is the real one."""

from __future__ import annotations

from fks_backfill_dagster_tests.markets import market, running
from fks_backfill_dagster_tests.postgres import (
    database,
    database_url,
    empty_database_url,
    server_url,
    template,
)

__all__ = ["database", "database_url", "empty_database_url", "market", "running", "server_url", "template"]
