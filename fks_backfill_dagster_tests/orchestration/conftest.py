"""A real database, a real local market, and the definitions over both. The clock is the real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
from dagster import AssetKey, DagsterInstance, Definitions, ExecuteInProcessResult

from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.orchestration.build import build_defs
from fks_backfill_dagster.orchestration.groups import asset_key
from fks_backfill_dagster.orchestration.resources import ProviderResource, TimescaleDB
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.model import Settings
from fks_backfill_dagster.settings.sections import ProviderPriority, SymbolSettings
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.markets import market, running
from fks_backfill_dagster_tests.postgres import (
    database,
    database_url,
    empty_database_url,
    server_url,
    template,
)

__all__ = ["database", "database_url", "empty_database_url", "market", "running", "server_url", "template"]

FRAMES = (Timeframe.M15, Timeframe.H1)


def settings_of(*symbols: str, start: str = "2024-01-01", frames: Sequence[Timeframe] = FRAMES) -> Settings:
    """Crypto symbols with Binance as their only provider, from `start` on."""
    return Settings(
        symbols=tuple(
            SymbolSettings(asset_class=AssetClass.CRYPTO, symbol=symbol, timeframes=tuple(frames))
            for symbol in symbols
        ),
        history_start=start,  # type: ignore[arg-type]
        provider_priority=ProviderPriority(crypto=("binance",)),
    )


@dataclass(frozen=True)
class Project:
    """The definitions of some settings, with an instance to run them in."""

    settings: Settings
    definitions: Definitions
    instance: DagsterInstance

    @property
    def catalog(self) -> Catalog:
        return Catalog(self.settings)

    def series(self, symbol: str, timeframe: str) -> Series:
        return self.catalog.find_series(symbol, timeframe)

    def key(self, symbol: str, timeframe: str) -> AssetKey:
        return asset_key(self.series(symbol, timeframe))

    def materialize(
        self, timeframe: str, first: str, last: str | None = None, *symbols: str, **config: object
    ) -> ExecuteInProcessResult:
        """A run over a range of partitions, as launched by the UI; all symbols unless some are named.

        `config`: that of the op, as entered in the launchpad; without any the run has no configuration.
        """
        names = symbols or self.catalog.match_symbols()
        return self.definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=self.instance,
            asset_selection=[self.key(name, timeframe) for name in names],
            raise_on_error=False,
            run_config={"ops": {f"ohlcv_crypto_{timeframe}": {"config": config}}} if config else None,
            tags={
                "dagster/asset_partition_range_start": first,
                "dagster/asset_partition_range_end": last or first,
            },
        )

    def with_symbols(self, symbols: Sequence[SymbolSettings], resources: dict[str, object]) -> Project:
        settings = self.settings.model_copy(update={"symbols": tuple(symbols)})
        return replace(
            self,
            settings=settings,
            definitions=build_defs(settings=settings, resource_overrides=resources),
        )


@pytest.fixture
def resources(market: LocalMarket, database_url: str) -> dict[str, object]:
    """The market's Binance with a short retry budget, and the test's database."""
    return {
        "timescaledb": TimescaleDB(url=database_url),
        "binance": ProviderResource(
            provider="binance",
            base_url=market.binance_url,
            archive_url=market.archive_url,
            timeout_seconds=5,
            retry_budget_seconds=0.5,
        ),
        "polygon": ProviderResource(provider="polygon", base_url=market.polygon_url),
    }


MakeProject = Callable[..., Project]


@pytest.fixture
def project(resources: dict[str, object]) -> Iterator[MakeProject]:
    """`project("BTC/USDT", ...)`: definitions over the market and the database, in a separate instance."""
    with DagsterInstance.ephemeral() as instance:

        def make(*symbols: str, **options: object) -> Project:
            settings = settings_of(*symbols, **options)  # type: ignore[arg-type]
            return Project(settings, build_defs(settings=settings, resource_overrides=resources), instance)

        yield make


__all__ += ["Database"]
