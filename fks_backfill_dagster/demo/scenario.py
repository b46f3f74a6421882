"""A local market that fails for one month of one symbol, with a running Dagster: for tests and pictures.

    with failed_month(home) as scene:       # 3 symbols x 24 months; one partition is failed
        scene.web.url, scene.failed         # ... inspect it ...
        scene.ask_again()                   # the market has recovered: only that month is fetched

The market's HTTP, the database, webserver and daemon are real. All of them are stopped when the block ends, even by a
kill.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fks_backfill_dagster import app
from fks_backfill_dagster.domain.partitions import Grain
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.host import launch, servers
from fks_backfill_dagster.host.graphql import Webserver
from fks_backfill_dagster.host.launch import Launched, Order
from fks_backfill_dagster.host.processes import Guard
from fks_backfill_dagster.ownership import make_home, write_text
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.settings.model import KEY_VARIABLES, Settings
from fks_backfill_dagster.simulator.config import MarketConfig
from fks_backfill_dagster.simulator.local import LocalMarket
from fks_backfill_dagster.store.queries import BatchInfo, batches

SYMBOLS = ("BTC/USDT", "ETH/USDT", "SOL/USDT")
TIMEFRAME = "15m"
MONTHS = 24
FAILED_SYMBOL, FAILED_MONTH = "ETH/USDT", 9
"""The tenth of the 24 months."""

_CONFIG = """\
history_start: {start}
provider_priority: {{crypto: [binance]}}
automation: {{refresh: [], fill_gaps: false, checks: false, audit: false, housekeeping: false}}
symbols:
"""
_SYMBOL = "  - {{symbol: {symbol}, asset_class: crypto, timeframes: [{timeframe}]}}\n"


@dataclass(frozen=True, slots=True)
class Scene:
    """The state after the first backfill. `failed` is the key of the failed partition."""

    settings: Settings
    environment: Mapping[str, str]
    market: LocalMarket
    web: Webserver
    orders: tuple[Order, ...]
    failed: str
    first: Launched

    def ask_again(self) -> tuple[Launched, list[BatchInfo]]:
        """Removes the fault and backfills all partitions again. Returns the result and the new batches."""
        self.market.clear_faults()
        self.market.reset_requests()
        before = {batch.id for batch in _batches(self.settings)}
        done = _backfill(self.settings, self.environment, self.orders)
        return done, [batch for batch in _batches(self.settings) if batch.id not in before]


def failed_partition() -> str:
    """The key of the partition that fails in a scene created now."""
    return Grain.MONTH.key(_months()[FAILED_MONTH])


@contextmanager
def failed_month(home: Path, *, port: int = 0, environ: Mapping[str, str] | None = None) -> Iterator[Scene]:
    """The scene in `home`, which is created; `port` 0: a free port for Dagster's webserver.

    `environ` replaces this process's environment. Without FKS_DATABASE_URL in it the database is the
    embedded one of `home`. Raises ServersError, DagsterError, StoreError or EmbeddedError.
    """
    months = _months()
    failed = TimeRange(months[FAILED_MONTH], months[FAILED_MONTH + 1])
    config = _write(home, months[0])
    with LocalMarket(MarketConfig(limits=False)) as market:
        environment = _environment(home, config, market, os.environ if environ is None else environ)
        settings = load_settings(environment)
        for transport in ("binance", "archive"):
            market.plant_fault(
                transport,
                "status",
                count=None,
                status=400,  # a status that no client retries
                symbol=FAILED_SYMBOL.replace("/", ""),
                start=Grain.MONTH.key(failed.start),
                end=Grain.MONTH.key(failed.end),
            )
        with Guard(home, settings.root):
            try:
                window, catalog = TimeRange(months[0], months[-1]), Catalog(settings)
                orders = tuple(launch.order(catalog, one, window) for one in catalog.series)
                first = _backfill(settings, environment, orders, port or servers.free_port())
                web = launch.running_webserver(settings)
                yield Scene(settings, environment, market, web, orders, Grain.MONTH.key(failed.start), first)
            finally:
                servers.down(settings, say=_silent)


def _backfill(
    settings: Settings, environment: Mapping[str, str], orders: tuple[Order, ...], port: int | None = None
) -> Launched:
    """Launches before the daemon starts, because it polls for backfills at its start and then every 30 s."""
    servers.stop_part(settings, servers.DAEMON)
    up = servers.up(
        settings,
        port=port,
        parts=(servers.WEBSERVER,),
        keep_database=False,
        environment=environment,
        say=_silent,
    )
    web = up.web
    identity = launch.start(web, orders)
    servers.up(settings, keep_database=False, environment=environment, say=_silent)
    return launch.watch(web, identity, orders, _silent)


def _batches(settings: Settings) -> list[BatchInfo]:
    with app.open_database(settings) as database:
        return batches(database)


def _months() -> list[int]:
    """The starts of the 24 complete months before the current one, and of the current one: 25 edges."""
    return [Grain.MONTH.start(app.now(), -before) for before in range(MONTHS, -1, -1)]


def _write(home: Path, start: int) -> Path:
    make_home(home)
    config = home / "backfill.yaml"
    symbols = "".join(_SYMBOL.format(symbol=symbol, timeframe=TIMEFRAME) for symbol in SYMBOLS)
    write_text(config, _CONFIG.format(start=Grain.MONTH.key(start)) + symbols)
    return config


def _environment(home: Path, config: Path, market: LocalMarket, environ: Mapping[str, str]) -> dict[str, str]:
    """The settings of the scene, and of the caller's only the database."""
    kept = {
        name: value
        for name, value in environ.items()
        if name == "FKS_DATABASE_URL"
        or not (name.startswith(("FKS_", "DAGSTER_")) or name in KEY_VARIABLES.values())
    }
    return kept | {
        "FKS_HOME": str(home),
        "FKS_CONFIG": str(config),
        "FKS_PROVIDERS__BINANCE__BASE_URL": market.binance_url,
        "FKS_PROVIDERS__BINANCE__ARCHIVE_URL": market.archive_url,
    }


def _silent(_: object) -> None:
    """Discards messages."""
