"""Alias of `host.coordinator`: a user's dagster.yaml may name this module."""

from fks_backfill_dagster.host.coordinator import AssetClassRunCoordinator

__all__ = [
    "AssetClassRunCoordinator",
]
