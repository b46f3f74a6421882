"""`make demo`: the complete program on one machine, from an empty folder to a report.

A local market with planted outages, the embedded PostgreSQL, Dagster's webserver and daemon, all in a separate home; a
real partition backfill over GraphQL, the checks, and a report from the database. Each step is printed. All processes
are stopped at the end unless `keep` is set, even after a kill -9.

Does not belong here: features for the demo only. It uses the same interfaces as users.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

import click

from fks_backfill_dagster import app, ownership
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.partitions import AssetPath, Grain, asset_path
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import Timeframe, iso, to_datetime, to_micros
from fks_backfill_dagster.host import servers
from fks_backfill_dagster.host.graphql import CheckOutcome, DagsterError, Run, Webserver
from fks_backfill_dagster.host.processes import Background, Guard, stop
from fks_backfill_dagster.pipeline.coverage import Coverage, coverage
from fks_backfill_dagster.pipeline.freshness import Rule
from fks_backfill_dagster.pipeline.plan import closed_window
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.load import home_of, load_settings
from fks_backfill_dagster.settings.model import KEY_VARIABLES
from fks_backfill_dagster.store.coverage import PartState, part_states
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.queries import batches, sync_status
from fks_backfill_dagster.tables import COVERAGE, CoverageRow, coverage_total
from fks_backfill_dagster.tables import lines as table
from fks_backfill_dagster.tables import percent as _percent

SYMBOLS = ("BTC/USDT", "ETH/USDT", "SOL/USDT")
MINUTE_MONTHS = 3
HISTORY_YEARS = 2
CHECKS = ("ohlc_sanity", "completeness", "data_freshness")
MARKET = "market"
HOME = "demo"
"""The folder below the default home."""
WAIT_SECONDS = 600.0

_SETTINGS = """\
# Written by `fks-backfill demo` in its first run and kept: further runs continue from there.
history_start: {start}
provider_priority:
  crypto: [binance, polygon]
providers:
  polygon:
    requests_per_minute: 600   # the local market has no free plan
symbols:
"""
_SYMBOL = """\
  - symbol: {symbol}
    asset_class: crypto
    timeframes: [1m, 1h, 1d]
"""

Say = Callable[[str], object]


class DemoFailed(Exception):
    """A step of the demo failed; the text names the step and the logs."""


@dataclass(frozen=True, slots=True)
class Outage:
    """A range that is missing from a symbol of the market's Binance. Polygon has it."""

    symbol: str
    window: TimeRange

    def __str__(self) -> str:
        return f"binance has no {self.symbol} from {_moment(self.window.start)} to {_moment(self.window.end)}"

    @property
    def option(self) -> str:
        """The value of `simulate --outage`."""
        return f"binance@{self.symbol}={iso(self.window.start)}/{iso(self.window.end)}"


@dataclass(frozen=True, slots=True)
class Line:
    """The report of one series: candles that had closed when the backfill was launched."""

    series: Series
    state: PartState
    coverage: Coverage
    checks: tuple[CheckOutcome, ...]

    @property
    def complete(self) -> bool:
        return (
            self.state.unexplained == 0
            and self.coverage.counts.open_gaps == 0
            and len(self.checks) == len(CHECKS)
            and all(check.passed for check in self.checks)
        )

    @property
    def row(self) -> CoverageRow:
        """The row of `status`, with the candles that were expected at the launch of the backfill."""
        found = self.coverage
        lag = found.assessment.freshness
        return CoverageRow(
            self.series, self.state, found.counts.open_gaps, lag.newest, lag.lag, found.next_attempt
        )


def run_demo(keep: bool = False, *, home: Path | None = None, say: Say = click.echo) -> int:
    """Runs the demo. Returns the exit code: 0 if every series is complete, 1 otherwise.

    `keep` leaves the servers up. Raises StoreError, EmbeddedError or OwnershipError.
    """
    try:
        return _run(keep, home, say)
    except (DemoFailed, servers.ServersError, DagsterError) as error:
        say(f"Error: {error}")
        return 1


def _run(keep: bool, home: Path | None, say: Say) -> int:
    home = (_default_home() if home is None else home).resolve()
    began = time.monotonic()
    config = _write_settings(home)
    root = load_settings({"FKS_HOME": str(home), "FKS_CONFIG": str(config)}).root
    with Guard(home, root) as guard:
        demo: Demo | None = None
        try:
            demo = Demo(home, config, say)
            complete = demo.run()
            if keep:
                guard.keep()
        finally:
            if demo is not None and not (keep and sys.exc_info()[0] is None):
                demo.stop()
    say(f"\nDone in {time.monotonic() - began:.0f} s.")
    for line in _closing(home, config, demo.visit if keep else None):
        say(line)
    return 0 if complete else 1


def _closing(home: Path, config: Path, visit: str | None) -> list[str]:
    """How to look at the data; `visit`: the address of the UI while the servers are up."""
    unset = "env -u FKS_DATABASE_URL " if "FKS_DATABASE_URL" in os.environ else ""
    command = f"{unset}FKS_HOME={shlex.quote(str(home))} FKS_CONFIG={shlex.quote(str(config))} fks-backfill"
    servers = (
        ["All servers are stopped. `fks-backfill demo --keep` leaves them up."]
        if visit is None
        else [f"The servers are still up: {visit}", f"Stop them with `{command} down`."]
    )
    return [*servers, f"Its data: `{command} status`, in SQL `{command} db shell`."]


class Demo:
    """One run of the demo in its home."""

    def __init__(self, home: Path, config: Path, say: Say) -> None:
        self._home, self._say = home, say
        self._market = Background(home, MARKET)
        self._plain = _clean_environment(home, config)
        self._settings = load_settings(self._plain)
        self._series = Catalog(self._settings).series
        self.url = self.visit = ""

    def run(self) -> bool:
        """Runs all steps, from the market to the report. Returns whether every series is complete."""
        self._say(f"1. A local market, a database and Dagster, all below {self._home}")
        market = self._start_market()
        environment = {**self._plain, **market}
        self._settings = load_settings(environment)
        with ExitStack() as stack:
            database = stack.enter_context(app.open_database(self._settings))
            before = sum(status.total_candles for status in sync_status(database))
            self._up(environment, (servers.WEBSERVER,))
            web = self._web
            self._say(f"   market    {market['FKS_PROVIDERS__BINANCE__BASE_URL'].removesuffix('/binance')}")
            self._say(f"   Dagster   {self.url}")
            for outage in self._outages():
                self._say(f"   planted   {outage}")
            launched_at = app.now()
            backfill = self._launch(web, launched_at)
            # The daemon polls for new backfills at its start and then every 30 s, so it starts after the launch.
            self._up(environment, (servers.WEBSERVER, servers.DAEMON))
            runs = self._wait_for_backfill(web, database, backfill)
            checks = self._check(web)
            lines = self._lines(database, launched_at, checks)
            self._report(database, lines, runs, before)
        return all(line.complete for line in lines) and all(run.status == "SUCCESS" for run in runs)

    def stop(self) -> None:
        """Stops the servers, the market and the database."""
        servers.down(self._settings, say=lambda text: None)

    # --- the servers ---

    def _start_market(self) -> dict[str, str]:
        """Starts the market by the command line. Returns the settings that point to it."""
        stop([self._market])
        port = _free_port(0)
        planted = [part for outage in self._outages() for part in ("--outage", outage.option)]
        command = [sys.executable, "-m", "fks_backfill_dagster", "simulate", "--port", str(port), *planted]
        self._market.start(command, cwd=self._settings.root, environment=self._plain, port=port)
        deadline = time.monotonic() + 60
        while self._market_requests() is None:
            if not self._market.is_running() or time.monotonic() > deadline:
                raise DemoFailed(f"the local market did not start:\n{self._market.last_words()}")
            time.sleep(0.05)
        url = f"http://{servers.HOST}:{port}"
        return {
            "FKS_PROVIDERS__BINANCE__BASE_URL": f"{url}/binance",
            "FKS_PROVIDERS__BINANCE__ARCHIVE_URL": f"{url}/archive",
            "FKS_PROVIDERS__POLYGON__BASE_URL": f"{url}/polygon",
            "POLYGON_API_KEY": "demo",
        }

    def _market_requests(self) -> dict[str, Any] | None:
        """The requests to the market so far; None while it does not respond."""
        url = f"http://{servers.HOST}:{self._market.port}/sim/requests?last=0"
        try:
            with build_opener(ProxyHandler({})).open(url, timeout=10) as response:
                found: dict[str, Any] = json.loads(response.read())
                return found
        except OSError:
            return None

    def _up(self, environment: Mapping[str, str], parts: Sequence[str]) -> None:
        listens = Background(self._home, servers.WEBSERVER).is_running()
        up = servers.up(
            self._settings,
            port=None if listens else _free_port(servers.PORT),
            parts=parts,
            keep_database=False,
            environment=environment,
            say=lambda text: None,
        )
        self.url, self.visit, self._web = up.url, up.web.visit, up.web

    # --- the backfill ---

    def _outages(self) -> tuple[Outage, ...]:
        """The planted outages, fixed per home: in the month before its first run."""
        month = Grain.MONTH.start(self._settings.history_start, 12 * HISTORY_YEARS - 1)
        return (
            Outage("BTC/USDT", _hours(month, day=12, first=2, last=6)),
            Outage("ETH/USDT", _hours(month, day=20, first=13, last=15)),
        )

    def _first(self, series: Series, now: int) -> int:
        """The start of a series' backfill: the start of a partition or of its history."""
        if series.timeframe is Timeframe.M1:
            return Grain.MONTH.start(now, 1 - MINUTE_MONTHS)
        return self._settings.history_start

    def _launch(self, web: Webserver, now: int) -> str:
        partitions: dict[AssetPath, tuple[str, str]] = {}
        for series in self._series:
            grain = Grain.of(series.timeframe)
            partitions[asset_path(series)] = (grain.key(self._first(series, now)), grain.key(now))
        spans = {key[-1]: span for key, span in partitions.items()}
        self._say(f"\n2. A Dagster backfill of {len(partitions)} assets over their partitions")
        for timeframe, (first, last) in spans.items():
            self._say(f"   {timeframe:3} {', '.join(SYMBOLS)}: {first} .. {last}")
        return web.launch_backfill(partitions)

    def _wait_for_backfill(self, web: Webserver, database: Database, backfill: str) -> list[Run]:
        """Waits until every asset has a run and all runs have ended; Dagster itself notices up to 30 s later."""
        wanted = {asset_path(series) for series in self._series}
        began, reported_at = time.monotonic(), 0.0
        while True:
            _, runs = web.backfill(backfill)
            finished = sum(run.finished for run in runs)
            over = wanted <= {key for run in runs for key in run.assets} and finished == len(runs)
            if over or time.monotonic() - reported_at >= 3:
                stored = sum(status.total_candles for status in sync_status(database))
                self._say(
                    f"   {time.monotonic() - began:4.0f} s  {finished} of {len(runs)} runs ended,"
                    f" {stored:,} candles stored"
                )
                reported_at = time.monotonic()
            if over:
                break
            if time.monotonic() - began > WAIT_SECONDS:
                raise DemoFailed(f"the backfill did not end: see {self.url}/runs and {self._home / 'logs'}")
            time.sleep(0.3)
        for run in runs:
            for failure in web.failures(run.id) if run.status != "SUCCESS" else ():
                self._say(f"   run {run.id} failed: {failure.strip()}")
        return runs

    def _check(self, web: Webserver) -> dict[AssetPath, list[CheckOutcome]]:
        """Runs the checks of all series, without fetching."""
        keys = [asset_path(series) for series in self._series]
        self._say(f"\n3. {len(keys) * len(CHECKS)} checks")
        run = web.launch_checks([(key, name) for key in keys for name in CHECKS])
        deadline = time.monotonic() + WAIT_SECONDS
        while not web.run(run).finished:
            if time.monotonic() > deadline:
                raise DemoFailed(f"the checks did not end: see {self.url}/runs/{run}")
            time.sleep(0.2)
        found = {key: web.check_outcomes(key) for key in keys}
        passed = sum(bool(check.passed) for outcomes in found.values() for check in outcomes)
        self._say(f"   {passed} passed, {len(keys) * len(CHECKS) - passed} failed")
        return found

    # --- the report ---

    def _lines(
        self, database: Database, now: int, checks: Mapping[AssetPath, Sequence[CheckOutcome]]
    ) -> list[Line]:
        found = coverage(database, self._series, app.now(), Rule())
        return [
            Line(
                one.series,
                part_states(database, one.series, {"": self._expected_window(one.series, now)})[""],
                one,
                tuple(checks[asset_path(one.series)]),
            )
            for one in found
        ]

    def _expected_window(self, series: Series, now: int) -> TimeRange:
        """The range that had closed when the backfill was launched."""
        window = TimeRange(self._first(series, now), now)
        return closed_window(window, grid_of(series), now, None)

    def _report(self, database: Database, lines: Sequence[Line], runs: Sequence[Run], before: int) -> None:
        self._say("\n4. Database contents\n")
        present = app.now()
        rows: list[tuple[object, ...]] = [
            (
                *line.row.cells(present),
                f"{sum(bool(check.passed) for check in line.checks)} of {len(CHECKS)}",
                _shares(line.state.providers),
            )
            for line in lines
        ]
        rows.append((*coverage_total([line.row for line in lines], present), "", ""))
        for text in table((*COVERAGE, "checks", "providers"), rows):
            self._say(text)
        self._say("")
        for outage in self._outages():
            for line in lines:
                if line.series.symbol == outage.symbol:
                    filled = part_states(database, line.series, {"": outage.window})[""]
                    if filled.expected:
                        self._say(
                            f"Planted: {outage}. {line.series}: {filled.stored:,} of {filled.expected:,}"
                            f" candles stored, from {_shares(filled.providers) or 'no provider'}."
                        )
        self._report_requests(database, runs, before)

    def _report_requests(self, database: Database, runs: Sequence[Run], before: int) -> None:
        ids = {run.id for run in runs}
        fetched = [batch for batch in batches(database) if batch.run_id in ids]
        new, changed = sum(b.inserted for b in fetched), sum(b.updated for b in fetched)
        requests = self._market_requests() or {"total": 0, "providers": {}}
        each = ", ".join(f"{name} {found['requests']:,}" for name, found in requests["providers"].items())
        self._say(f"Requests to the market: {requests['total']:,}{f' ({each})' if each else ''}.")
        if before:
            self._say(
                f"{before:,} candles were stored by an earlier run and not fetched again ({changed:,}"
                f" changed); {new:,} were new."
            )


def _default_home() -> Path:
    home = home_of()
    return home if home.name == HOME else home / HOME  # FKS_HOME may be this one already, after `demo --keep`


def _write_settings(home: Path) -> Path:
    """The settings file of the home; an existing one is kept."""
    ownership.make_home(home)
    path = home / "backfill.yaml"
    if not path.exists():
        start = to_datetime(Grain.MONTH.start(to_micros(datetime.now(UTC)), -12 * HISTORY_YEARS))
        symbols = "".join(_SYMBOL.format(symbol=symbol) for symbol in SYMBOLS)
        ownership.write_text(path, _SETTINGS.format(start=f"{start:%Y-%m-%d}") + symbols)
    return path


def _clean_environment(home: Path, config: Path) -> dict[str, str]:
    """This process's environment without settings and provider keys: the demo must not use real keys."""
    prefixes = ("FKS_", "DAGSTER_")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(prefixes) and name not in KEY_VARIABLES.values()
    }
    # Automated runs would interfere with the steps of the demo.
    disabled = {f"FKS_AUTOMATION__{name}": "false" for name in ("FILL_GAPS", "CHECKS", "AUDIT")}
    disabled["FKS_AUTOMATION__REFRESH"] = "[]"
    return {**kept, **disabled, "FKS_HOME": str(home), "FKS_CONFIG": str(config)}


def _free_port(wanted: int) -> int:
    """`wanted` if it is free, else any free port."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((servers.HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise DemoFailed("there is no free port")


def _hours(month: int, day: int, first: int, last: int) -> TimeRange:
    start = to_datetime(month).replace(day=day)
    return TimeRange.of(start.replace(hour=first), start.replace(hour=last))


def _moment(instant: int) -> str:
    return f"{to_datetime(instant):%Y-%m-%d %H:%M}"


def _shares(providers: Mapping[str, int]) -> str:
    total = sum(providers.values())
    return ", ".join(f"{name} {_percent(count / total)}" for name, count in providers.items())
