"""The former place of `host.storage`, which a dagster.yaml of a user may name."""

from fks_backfill_dagster.host.storage import DatabaseStorage, HomeArtifacts, HomeComputeLogs

__all__ = [
    "DatabaseStorage",
    "HomeArtifacts",
    "HomeComputeLogs",
]
