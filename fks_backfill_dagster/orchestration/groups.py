"""Groups: the series that share one op; the asset key of a series.

2,000 assets and 4,000 checks as separate definitions take 9 s to load, in every run worker; as one multi-asset
per (asset class, timeframe) they take 1 s. Reasons: docs/adr/0004-dagster-shape.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dagster import AssetKey

from fks_backfill_dagster.domain.partitions import asset_path
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.settings.catalog import Catalog


@dataclass(frozen=True, slots=True)
class Group:
    """The series of one asset class and timeframe, by asset key, in the order of the settings."""

    asset_class: AssetClass
    timeframe: Timeframe
    series: Mapping[AssetKey, Series]

    @property
    def name(self) -> str:
        """Part of op names, so `[A-Za-z0-9_]` only."""
        return f"{self.asset_class}_{self.timeframe}"

    @property
    def op_name(self) -> str:
        return op_name(self.asset_class, self.timeframe)


def asset_key(series: Series) -> AssetKey:
    return AssetKey(asset_path(series))


def op_name(asset_class: AssetClass, timeframe: Timeframe) -> str:
    """The op that materializes the series of a group."""
    return f"ohlcv_{asset_class}_{timeframe}"


def groups_of(catalog: Catalog) -> tuple[Group, ...]:
    """All configured series by group, groups in the order of their first series in the settings."""
    found: dict[tuple[AssetClass, Timeframe], dict[AssetKey, Series]] = {}
    for series in catalog.series:
        found.setdefault((series.asset_class, series.timeframe), {})[asset_key(series)] = series
    return tuple(
        Group(asset_class, timeframe, members) for (asset_class, timeframe), members in found.items()
    )
