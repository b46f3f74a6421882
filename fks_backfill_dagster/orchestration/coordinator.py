"""The former place of `host.coordinator`, which a dagster.yaml of a user may name."""

from fks_backfill_dagster.host.coordinator import AssetClassRunCoordinator

__all__ = [
    "AssetClassRunCoordinator",
]
