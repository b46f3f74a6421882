"""Alias of `host.storage`: a user's dagster.yaml may name this module."""

from fks_backfill_dagster.host.storage import DatabaseStorage, HomeArtifacts, HomeComputeLogs

__all__ = [
    "DatabaseStorage",
    "HomeArtifacts",
    "HomeComputeLogs",
]
