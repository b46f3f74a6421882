"""kill -9 during a backfill: of the run worker, of all processes except the webserver, and of the servers one by one.

In most cases the market delays the last month for longer than a test takes: the others are committed when the worker is
killed, so a retry only has that month to fetch.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.embedded import EmbeddedPostgres
from fks_backfill_dagster.host import launch
from fks_backfill_dagster.host.graphql import Run
from fks_backfill_dagster.host.processes import KEEPER, Background, backgrounds
from fks_backfill_dagster.host.servers import CODE, DAEMON, WEBSERVER, stop_part
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.store.queries import batches, read_candles
from fks_backfill_dagster_tests.host.site import Site, site

SYMBOLS = ("BTC/USDT", "ETH/USDT", "SOL/USDT")
MONTHS = ("2024-01-01", "2024-02-01", "2024-03-01", "2024-04-01", "2024-05-01", "2024-06-01")
HELD = MONTHS[-1]

MONITORED_SECONDS = 45
"""Run monitoring polls every 20 seconds, first at the daemon's start; the rest allows for busy machines."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A running webserver without a daemon, which polls for backfills at its start and then every 30 s."""
    home = tmp_path_factory.mktemp("kills") / "home"
    with (
        LocalMarket(MarketConfig(limits=False)) as market,
        site(home, market, SYMBOLS, "15m", MONTHS[0]) as made,
    ):
        made.up(WEBSERVER)
        yield made


@dataclass(frozen=True)
class Held:
    """A backfill that waits for its last month; the others are stored. `worker` executes its only run."""

    site: Site
    symbol: str
    backfill: str
    run: str
    worker: psutil.Process

    def runs(self) -> list[Run]:
        return self.site.web.backfill(self.backfill)[1]

    def fetched_by(self) -> dict[str, str | None]:
        """The stored months, each with the run that fetched it."""
        with self.site.database() as database:
            return {
                f"{one.range_start:%Y-%m-%d}": one.run_id
                for one in batches(database)
                if one.symbol == self.symbol
            }

    def assert_lost_and_retried(self) -> None:
        """The run fails and is retried once; the retry requests only the delayed month."""
        self.site.until(lambda: self.site.web.run(self.run).status == "FAILURE", MONITORED_SECONDS)
        self.site.until(lambda: len(self.runs()) == 2 and all(run.finished for run in self.runs()))
        (retry,) = [run for run in self.runs() if run.id != self.run]
        assert retry.status == "SUCCESS"
        assert self.site.run(retry.id)["parentRunId"] == self.run
        assert self.fetched_by() == dict.fromkeys(MONTHS, self.run) | {HELD: retry.id}
        requested = [line["target"] for line in self.site.market.journal()["last"]]
        months = [target for target in requested if "-15m-" in target]
        assert months
        assert all(f"{self.symbol.replace('/', '')}-15m-{HELD[:7]}" in target for target in months)
        # And the stored candle before it, to verify that the market is the same.
        assert len(requested) - len(months) <= 1
        assert self.site.web.failed_partitions(asset_of(self.symbol), MONTHS) == []


def asset_of(symbol: str) -> tuple[str, str, str]:
    return ("ohlcv", symbol.replace("/", "_"), "15m")


def backfill_and_hold(made: Site, symbol: str) -> Held:
    for transport in ("archive", "binance"):
        made.market.plant_fault(
            transport,
            "hang",
            count=None,
            seconds=300,
            symbol=symbol.replace("/", ""),
            start=HELD,
            end="2024-07-01",
        )
    stop_part(made.settings, DAEMON)
    backfill = made.web.launch_backfill({asset_of(symbol): (MONTHS[0], MONTHS[-1])})
    made.up()
    made.until(lambda: bool(made.web.backfill(backfill)[1]))
    (run,) = made.web.backfill(backfill)[1]
    made.until(lambda: len(pids_of(made, run.id)) == 1)
    held = Held(made, symbol, backfill, run.id, psutil.Process(*pids_of(made, run.id)))
    made.until(lambda: set(held.fetched_by()) == set(MONTHS) - {HELD})
    assert made.web.run(run.id).status == "STARTED"
    return held


def pids_of(made: Site, run: str) -> set[int]:
    """The process of a run according to its events; empty before its start."""
    return {int(found[1]) for _, text in made.messages(run) if (found := re.search(r"\(pid: (\d+)\)", text))}


def recover(made: Site) -> None:
    made.market.clear_faults()
    made.market.reset_requests()


def test_a_killed_worker(running: Site) -> None:
    held = backfill_and_hold(running, "BTC/USDT")
    held.worker.kill()
    recover(running)
    held.assert_lost_and_retried()


def test_a_worker_killed_with_all_processes_but_the_webserver(running: Site) -> None:
    """No process is left to detect the loss; the next daemon does."""
    held = backfill_and_hold(running, "ETH/USDT")
    groups = [group for group in backgrounds(running.settings.home) if group.name != WEBSERVER]
    groups.sort(key=lambda group: group.name != KEEPER)  # it would restart the others
    victims = [one for group in groups for one in sorted(group.members(), key=lambda one: one.pid)]
    assert held.worker in victims
    for victim in victims:  # parents before their children
        with suppress(psutil.NoSuchProcess):
            victim.kill()
    assert running.web.run(held.run).status == "STARTED"
    recover(running)
    running.up()
    held.assert_lost_and_retried()


# On a busy machine Dagster's retry may read the run between its failure event and its failed status, and then gives up
# ("a run that is not failed").
@pytest.mark.slow
def test_a_worker_whose_code_server_is_killed(running: Site) -> None:
    """The code server is restarted, its worker is stopped, and the run is retried."""
    held = backfill_and_hold(running, "SOL/USDT")
    (code,) = [group for group in backgrounds(running.settings.home) if group.name == CODE]
    before = code.pid
    assert before is not None
    psutil.Process(before).kill()
    recover(running)
    running.until(lambda: code.is_running() and code.pid != before)
    held.assert_lost_and_retried()
    assert running.web.load_errors() == []


# The servers one by one -----------------------------------------------------------------------------------

LONG = TimeRange(instant("2019-01-01"), instant("2024-01-01"))


def postmaster(made: Site) -> int | None:
    """The pid of the database server, without starting it."""
    return EmbeddedPostgres(made.settings.home).status().pid


def leader(made: Site, name: str) -> int | None:
    process = Background(made.settings.home, name)
    return process.pid if process.is_running() else None


def stored(made: Site) -> int:
    with made.database() as database:
        return sum(one.inserted for one in batches(database))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_server_is_killed_during_a_backfill(tmp_path: Path) -> None:
    """The backfill completes without intervention, and `watch` reports it."""
    servers: dict[str, Callable[[Site], int | None]] = {"postmaster": postmaster}
    servers |= {name: partial(leader, name=name) for name in (WEBSERVER, DAEMON, CODE)}
    with (
        LocalMarket(MarketConfig(limits=False, latency=1.0), process=True) as market,
        site(tmp_path / "home", market, SYMBOLS, "15m", "2019-01-01") as made,
        ThreadPoolExecutor(1) as thread,
    ):
        made.up(WEBSERVER)
        catalog = Catalog(made.settings)
        orders = [launch.order(catalog, series, LONG) for series in catalog.series]
        backfill = launch.start(made.web, orders)
        made.up()
        watched = thread.submit(launch.watch, made.web, backfill, orders, lambda seen: None)
        for find in servers.values():
            before, pid = stored(made), find(made)
            made.until(lambda: stored(made) > before)  # noqa: B023
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + 60
            while find(made) in (None, pid):
                assert time.monotonic() < deadline, "not restarted"
                time.sleep(0.1)
        assert not watched.done()
        assert watched.result(600).succeeded
        with made.database() as database:
            for one in orders:
                found = read_candles(database, one.series, LONG)
                truth = market.truth("binance", one.series.symbol.replace("/", ""), Timeframe.M15, LONG)
                assert all(
                    (ours == theirs).all()
                    for ours, theirs in zip(found.columns(), truth.columns(), strict=True)
                )
