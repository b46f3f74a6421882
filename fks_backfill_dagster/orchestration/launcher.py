"""Alias of `host.launcher`: a user's dagster.yaml may name this module."""

from fks_backfill_dagster.host.launcher import WatchedRunLauncher

__all__ = [
    "WatchedRunLauncher",
]
