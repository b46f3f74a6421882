"""Cases with Dagster: overhead of a run, response times of pages, a refresh of thousands of series."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from bench.cpu import metered
from bench.dagster_world import (
    RunningDagster,
    duration_of,
    environment_of,
    launch_all,
    requests_of,
    running_dagster,
    wait_for_runs,
)
from bench.result import Result
from bench.size import Size
from bench.world import World
from fks_backfill_dagster import app
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import iso
from fks_backfill_dagster.host import launch
from fks_backfill_dagster.host.graphql import Webserver
from fks_backfill_dagster.pipeline.plan import GRACE
from fks_backfill_dagster.pipeline.sync import sync
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.settings.model import CHECKOUT

_SEEDED = 3
"""Candles of each series before a refresh."""
_MINUTES = [{"symbol": "BTC/USDT", "asset_class": "crypto", "timeframes": ["1m"]}]


def overhead(place: World, runs: int, size: Size) -> list[Result]:
    """(h) a Dagster run of 60 months of 1m against the same sync by the command line; (i) an empty run."""
    place.prepare("archive", size.run)
    ratios, empty, walls = [], [], []
    with tempfile.TemporaryDirectory(prefix="fks-bench-") as home:
        environment = environment_of(Path(home), place.database_url, place.market_url, _MINUTES, "2019-01-01")
        with running_dagster(environment) as dagster:
            for _ in range(runs):
                place.clear()
                began = time.perf_counter()
                plain = _command_line(environment, size.run)
                walls.append(time.perf_counter() - began)
                place.clear()
                ratios.append(_run_seconds(dagster, size.run) / plain)
                empty.append(_run_seconds(dagster, size.run))
    detail = f"the whole command takes {median(walls):.1f} s"
    return [
        Result("(h) run of 60 months of 1m / fks-backfill backfill", ratios, 1.3, False, detail),
        Result("(i) the same again: overhead of a run, seconds", empty, 2.0, False, "nothing to fetch"),
    ]


def _command_line(environment: dict[str, str], requested: TimeRange) -> float:
    """Seconds of the sync itself, without imports."""
    arguments = ["BTC/USDT", "1m", "--start", iso(requested.start), "--end", iso(requested.end), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "fks_backfill_dagster", "backfill", *arguments],
        env=environment,
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(json.loads(done.stdout)["seconds"])


def _run_seconds(dagster: RunningDagster, requested: TimeRange) -> float:
    """From RUN_START to RUN_SUCCESS of one run over the months of `requested`."""
    catalog = Catalog(dagster.settings)
    series = catalog.series[0]
    one = launch.order(catalog, series, requested)
    identity = launch.start(dagster.web, [one])
    done = launch.watch(dagster.web, identity, [one], lambda seen: None)
    (times,) = wait_for_runs(dagster.web, [run.id for run in done.runs])
    if not done.succeeded:
        raise SystemExit(f"the measured run failed: {done}")
    return times.ended - times.started


def refresh(place: World, runs: int, size: Size) -> list[Result]:
    """(j) one refresh with a new candle of 2,000 series; (k) the UI's pages with them. Measured once: it is slow."""
    symbols = [
        {"symbol": f"C{n:04d}/USDT", "asset_class": "crypto", "timeframes": ["1h"]}
        for n in range(size.refreshed)
    ]
    place.clear()
    with tempfile.TemporaryDirectory(prefix="fks-bench-") as home:
        environment = environment_of(Path(home), place.database_url, place.market_url, symbols, "2024-01-01")
        _seed(environment)
        with running_dagster(environment) as dagster:
            web = dagster.web
            with place.connect() as connection, metered(Path(home), connection.info.backend_pid) as cpu:
                began = time.perf_counter()
                requests = requests_of(web, "refresh_1h", time.time() // 3600 * 3600 + 1200)
                ticked = time.perf_counter() - began
                ids = launch_all(web, "ohlcv_years", requests)
                launched = time.perf_counter() - began
                times = wait_for_runs(web, ids)
                seconds = time.perf_counter() - began
            if {t.status for t in times} != {"SUCCESS"}:
                raise SystemExit(f"runs of the refresh failed: {[t.status for t in times]}")
            _require_new_candles(place, size.refreshed)
            detail = (
                f"{len(ids)} runs: tick {ticked:.1f} s, launching {launched - ticked:.1f} s; of a run:"
                f" worker {median(t.started - t.launched for t in times):.1f} s,"
                f" work {median(t.ended - t.started for t in times):.1f} s; CPU "
                + ", ".join(f"{part} {used:.0f} s" for part, used in sorted(cpu.items(), key=lambda i: -i[1]))
            )
            events = _events(place, ids)
            pages = [_page(web, size.refreshed, name, *query) for name, query in _PAGES.items()]
    return [
        Result(f"(j) refresh of {size.refreshed:,} series, seconds", [seconds], 300, False, detail),
        events,
        *pages,
    ]


def _require_new_candles(place: World, series: int) -> None:
    with place.connect() as connection:
        [found] = connection.execute(
            "SELECT count(*) FROM fks.sync_state WHERE total_candles > %s", [_SEEDED]
        )
    if found != (series,):
        raise SystemExit(f"{found[0]} of {series} series have a new candle")


def _events(place: World, runs: list[str]) -> Result:
    """The number of Dagster events per run."""
    with place.connect() as connection:
        found = connection.execute(
            "SELECT coalesce(dagster_event_type, 'log line') AS kind, count(*) FROM dagster.event_logs"
            " WHERE run_id = ANY(%s) GROUP BY 1 ORDER BY 2 DESC",
            [runs],
        ).fetchall()
        per_run = connection.execute(
            "SELECT count(*) FROM dagster.event_logs WHERE run_id = ANY(%s) GROUP BY run_id", [runs]
        ).fetchall()
    detail = ", ".join(f"{kind.lower()} {count / len(runs):g}" for kind, count in found)
    return Result("(j) events of a run of 50 series", [count for (count,) in per_run], 250, False, detail)


def _page(web: Webserver, series: int, name: str, query: str, variables: dict[str, object]) -> Result:
    values = [duration_of(lambda: web.query(query, **variables)) for _ in range(3)]
    return Result(f"(k) {name}, seconds", values, 3.0, False, f"{series:,} series")


_KEY = {"path": ["ohlcv", "C0007_USDT", "1h"]}
# The queries of the UI's asset page, asset list and backfill dialog.
_PAGES: dict[str, tuple[str, dict[str, object]]] = {
    "asset page": (
        "query($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { ... on AssetNode { id description"
        " groupName kinds owners { ... on TeamAssetOwner { team } } partitionStats { numMaterialized numFailed }"
        " partitionKeysByDimension { name partitionKeys } assetMaterializations(limit: 100) { partition timestamp"
        " metadataEntries { label } } assetChecksOrError { ... on AssetChecks { checks { name"
        " executionForLatestMaterialization { status } } } } } } }",
        {"key": _KEY},
    ),
    "backfill dialog": (
        "query($keys: [AssetKeyInput!]!) { assetNodes(assetKeys: $keys) { id assetKey { path }"
        " partitionKeysByDimension { name type partitionKeys } assetPartitionStatuses { ... on"
        " TimePartitionStatuses { ranges { status startKey endKey } } } } }",
        {"keys": [_KEY]},
    ),
    "asset catalogue": (
        "{ assetNodes { id assetKey { path } groupName kinds isPartitioned hasAssetChecks } }",
        {},
    ),
}


def _seed(environment: dict[str, str]) -> None:
    """Syncs every series up to its second-last candle."""
    settings = load_settings(environment, CHECKOUT)
    with app.open_app(settings) as opened, ThreadPoolExecutor(4) as pool:
        now = app.now()

        def seed(series: Series) -> None:
            step = series.timeframe.micros
            end = grid_of(series).closed_end(now - GRACE) - step
            report = sync(opened.context, series, TimeRange(end - _SEEDED * step, end), ["binance"])
            if report.missing:
                raise SystemExit(f"seeding failed: {report}")

        list(pool.map(seed, Catalog(settings).series))
