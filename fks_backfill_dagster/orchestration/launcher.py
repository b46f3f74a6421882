"""The former place of `host.launcher`, which a dagster.yaml of a user may name."""

from fks_backfill_dagster.host.launcher import WatchedRunLauncher

__all__ = [
    "WatchedRunLauncher",
]
