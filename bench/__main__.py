"""Runs the cases, prints a table, exits 1 if a limit is not met.

Pairs are measured alternately (A B A B ...) and the ratio is taken per pair, so that it is valid even if the
machine's speed drifts. The result is the median of the ratios. The shared limit (crowd, weight) is
measured once and at full length, which takes seven minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from statistics import median

import ccxt
import numpy as np

from bench.auditing import auditing
from bench.gaps import sensor
from bench.orchestral import overhead, refresh
from bench.result import Result
from bench.size import FULL, Size
from bench.world import SERIES, World, limited_market, prepare, stopwatch, world
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.rate_limits import RateWindow
from fks_backfill_dagster.pipeline.sync import sync
from fks_backfill_dagster.settings.model import CHECKOUT
from fks_backfill_dagster.store import copy_format
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.queries import read_candles
from fks_backfill_dagster_tests.store.crowd import Crowd, counting_server

Case = Callable[[World, int, Size], list[Result]]


def archives(place: World, runs: int, size: Size) -> list[Result]:
    """(a) one year of 1m from archives, end to end, against the bare COPY of the same rows; (c) the same again."""
    place.prepare("archive", size.short)
    place.clear()
    place.sync(size.short, archives=True)
    place.require_transport("archive")
    database = Database(place.database_url)
    candles = read_candles(database, SERIES, size.short)
    database.dispose()
    blocks = list(copy_format.encode(1, candles, np.ones(len(candles), dtype=np.int32)))
    ratios, again, rates = [], [], []
    for _ in range(runs):
        bare = bare_copy(place, blocks)
        place.clear()
        context = place.context(archives=True)
        with stopwatch() as first:
            report = sync(context, SERIES, size.short, ["binance"])
        with stopwatch() as second:
            repeated = sync(context, SERIES, size.short, ["binance"])
        context.database.dispose()
        if report.total_candles != len(candles) or repeated.requests or repeated.total_candles:
            raise SystemExit(f"the measured work differs from the expected one: {report}, {repeated}")
        ratios.append(bare / first[0])
        again.append(second[0] / first[0])
        rates.append(len(candles) / first[0])
    return [
        Result(
            "(a) archives end to end / bare COPY",
            ratios,
            0.6,
            True,
            f"{median(rates) / 1e3:,.0f}k candles/s, {len(candles):,} candles",
        ),
        Result("(c) the same again / (a)", again, 0.05, False, "no requests, no candles written"),
    ]


def bare_copy(place: World, blocks: Sequence[bytes]) -> float:
    """Seconds to COPY prebuilt binary blocks into the same empty table and commit."""
    place.clear()
    columns = ", ".join(copy_format.CANDLE_COLUMNS)
    statement = f'COPY fks."candles_1m" ({columns}) FROM STDIN (FORMAT BINARY)'
    with place.connect() as connection, connection.cursor() as cursor:
        with stopwatch() as seconds, connection.transaction(), cursor.copy(statement) as copy:
            for block in blocks:
                copy.write(block)
        return seconds[0]


def rest(place: World, runs: int, size: Size) -> list[Result]:
    """(b) one year of 1m by REST, end to end, against a ccxt loop that only collects rows."""
    place.prepare("binance", size.short)  # ccxt's pages
    place.prepare("binance", size.short, stride=999)  # pages of this project overlap by one candle
    place.clear()
    place.sync(size.short, archives=False)
    place.require_transport("rest")
    ratios, rates = [], []
    for _ in range(runs):
        with stopwatch() as reference:
            rows = ccxt_loop(place, size.short)
        place.clear()
        with stopwatch() as ours:
            report = place.sync(size.short, archives=False)
        if report.total_candles != rows:
            raise SystemExit(f"ccxt collected {rows} candles, the sync {report.total_candles}")
        ratios.append(reference[0] / ours[0])
        rates.append(rows / ours[0])
    detail = f"{median(rates) / 1e3:,.0f}k candles/s into the table"
    return [Result("(b) REST end to end / ccxt fetch_ohlcv loop", ratios, 1.0, True, detail)]


def ccxt_loop(place: World, requested: TimeRange) -> int:
    """The usual simple loop; returns the number of rows collected."""
    exchange = ccxt.binance({"enableRateLimit": False})
    exchange.urls["api"]["public"] = f"{place.market_url}/binance/api/v3"
    exchange.markets_loaded = True
    exchange.set_markets(
        {
            "BTC/USDT": exchange.safe_market_structure(
                {
                    "id": "BTCUSDT",
                    "symbol": "BTC/USDT",
                    "base": "BTC",
                    "quote": "USDT",
                    "spot": True,
                    "type": "spot",
                    "active": True,
                }
            )
        }
    )
    rows: list[list[float]] = []
    since = requested.start // 1000
    while since < requested.end // 1000:
        page = exchange.fetch_ohlcv("BTC/USDT", "1m", since=since, limit=1000)
        if not page:
            break
        rows += page
        since = int(page[-1][0]) + 60_000
    return sum(row[0] < requested.end // 1000 for row in rows)


# VmHWM is reset by exec; ru_maxrss would include the bench, which started the process.
_ONE_SYNC = """
import re, resource, sys
from pathlib import Path
from bench.world import World, TimeRange
place = World(sys.argv[1], sys.argv[2])
place.sync(TimeRange(int(sys.argv[3]), int(sys.argv[4])), archives=True)
status = Path("/proc/self/status")
if status.exists():
    print(int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) / 1024)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def memory(place: World, runs: int, size: Size) -> list[Result]:
    """(d) peak memory of ten years against one year, each in a separate process."""
    place.prepare("archive", size.long)
    one: list[float] = []
    ten: list[float] = []
    for _ in range(runs):
        for requested, peaks in ((size.short, one), (size.long, ten)):
            place.clear()
            command = [sys.executable, "-c", _ONE_SYNC, place.database_url, place.market_url]
            done = subprocess.run(
                [*command, str(requested.start), str(requested.end)],
                check=True,
                capture_output=True,
                text=True,
                cwd=CHECKOUT,
            )
            peaks.append(float(done.stdout))
    ratios = [b / a for a, b in zip(one, ten, strict=True)]
    detail = f"{median(ten):,.0f} MB against {median(one):,.0f} MB"
    return [Result("(d) peak memory, ten years / one year", ratios, 1.3, False, detail)]


_LOAD = """
import json, os, time
import dagster
from fks_backfill_dagster.settings import load_settings
from fks_backfill_dagster.orchestration.build import build_defs
began = time.perf_counter()
repository = build_defs().get_repository_def()
seconds = time.perf_counter() - began
print(len(repository.asset_graph.get_all_asset_keys()), seconds)
"""


def definitions(place: World, runs: int, size: Size) -> list[Result]:
    """(e) definitions of thousands of series: seconds beyond `import dagster`."""
    symbols = [
        {"symbol": f"C{n:03d}/USDT", "asset_class": "crypto", "timeframes": ["1m", "5m", "1h", "1d"]}
        for n in range(size.symbols)
    ]
    environment = os.environ | {"FKS_SYMBOLS": json.dumps(symbols), "FKS_DATABASE_URL": place.database_url}
    values = []
    for _ in range(runs):
        done = subprocess.run(
            [sys.executable, "-c", _LOAD],
            check=True,
            capture_output=True,
            text=True,
            env=environment,
            cwd=CHECKOUT,
        )
        defined, seconds = done.stdout.split()[-2:]
        if int(defined) != 4 * size.symbols:
            raise SystemExit(f"{defined} assets are defined, not {4 * size.symbols}")
        values.append(float(seconds))
    return [
        Result(
            f"(e) definitions of {4 * size.symbols:,} series, seconds",
            values,
            3.0,
            False,
            "beyond import dagster",
        )
    ]


# The shared limit -------------------------------------------------------------------------------------


def crowd(place: World, runs: int, size: Size) -> list[Result]:
    """(f) 8 processes, 5 threads each, at one limit for 60 s, measured at a counting server."""
    cases = (("100 in 1 s", RateWindow(100, 1.0), 1), ("6000 in 60 s, weight 2", RateWindow(6000, 60.0), 2))
    results = []
    for name, limit, weight in cases:
        place.reset_rate_limits()
        with counting_server(delay=0.01) as server:
            clients = Crowd(place.database_url, server, (limit,), threads=[5] * size.crowd, weight=weight)
            seen = clients.ask_for(size.crowd_seconds)
        most = weight * seen.most_within(limit.seconds) / limit.limit
        used = weight * len(seen.at) / (limit.limit * size.crowd_seconds / limit.seconds)
        detail = f"{name}: {len(seen.at):,} requests"
        results += [
            Result("(f) most requests in a window / limit", [most], 1.0, False, detail),
            Result("(f) used / limit", [used], 0.9, True, detail),
            Result("(f) fewest requests of a process / mean", [seen.least_share()], 0.5, True, detail),
        ]
    return results


def full_weight(place: World, runs: int, size: Size) -> list[Result]:
    """(g) Binance's real limit, one process, 5 minutes of klines requests by the provider client."""
    seconds = size.weight_seconds
    place.reset_rate_limits()
    with limited_market() as market:
        prepare(market.url, "binance", size.short, stride=999)
        place.request_binance(market.binance_url, size.short, seconds)
        counted = market.journal(last=0)["providers"]["binance"]
    rejected = sum(count for status, count in counted["statuses"].items() if status != "200")
    used = counted["weight"] / (6000 * seconds / 60)
    detail = f"{counted['requests']:,} requests, weight {counted['weight']:,}"
    return [
        Result("(g) Binance's weight used / permitted", [used], 0.9, True, detail),
        Result("(g) responses other than 200", [rejected], 0, False, detail),
    ]


CASES: dict[str, Case] = {
    "archives": archives,
    "rest": rest,
    "memory": memory,
    "definitions": definitions,
    "crowd": crowd,
    "weight": full_weight,
    "dagster_overhead": overhead,
    "refresh": refresh,
    "sensor": sensor,
    "audit": auditing,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help="default: all")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    passed = True
    with world() as place:
        for name in options.cases or CASES:
            for result in CASES[name](place, options.runs, FULL):
                print(result.row(), flush=True)
                passed = passed and result.passed
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
