"""A provider that fails under a running `up`: 1m series become stale in time, and recover without intervention.

Webserver, daemon, code server and workers are real; results are read over GraphQL and from `fks-backfill status`. The
short case cannot wait for two polling intervals and begins as if they had passed (the last sync ended then, and a tick
is due); the long one waits (`make test-slow`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dagster import DagsterInstance
from dagster._core.scheduler.instigation import ScheduleInstigatorData
from dagster._core.storage.tags import SCHEDULED_EXECUTION_TIME_TAG

from fks_backfill_dagster.app import now
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_HOUR, MICROS_PER_MINUTE, to_datetime
from fks_backfill_dagster.host.processes import Background, stop
from fks_backfill_dagster.host.servers import DAEMON, WEBSERVER, dagster_folder
from fks_backfill_dagster.orchestration.groups import asset_key
from fks_backfill_dagster.orchestration.jobs import CHECKS
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.model import CHECKOUT
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.store.queries import read_candles
from fks_backfill_dagster_tests.host.site import Site, site
from fks_backfill_dagster_tests.host.test_daemon import start_schedule
from fks_backfill_dagster_tests.store.builders import execute

pytestmark = pytest.mark.server

SYMBOLS = ("BTC/USDT", "ETH/USDT")
POLLING = 15 * MICROS_PER_MINUTE
RED_WITHIN = 2 * POLLING + 3 * MICROS_PER_MINUTE
# The time of a refresh from its tick to its last event, including retries of failed requests.
RUN_TIME = 2 * MICROS_PER_MINUTE


@dataclass(frozen=True)
class Watched:
    """A site, and the indicators of its series."""

    site: Site

    @property
    def series(self) -> tuple[Series, ...]:
        return Catalog(self.site.settings).series

    def path(self, one: Series) -> tuple[str, ...]:
        return tuple(asset_key(one).path)

    def run(self, *line: str) -> subprocess.CompletedProcess[str]:
        """The command line, without Dagster."""
        return subprocess.run(
            [sys.executable, "-m", "fks_backfill_dagster", *line],
            env=dict(self.site.environment),
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            check=False,
        )

    def status(self) -> tuple[int, dict[str, dict[str, Any]]]:
        """The exit code of `status --check`, and its output by symbol."""
        done = self.run("status", "--check", "--json")
        return done.returncode, {one["symbol"]: one for one in json.loads(done.stdout)}

    def checks(self) -> dict[str, set[bool | None]]:
        """The last results of each check, of all series."""
        found: dict[str, set[bool | None]] = {}
        for one in self.series:
            for outcome in self.site.web.check_outcomes(self.path(one)):
                found.setdefault(outcome.name, set()).add(outcome.passed)
        return found

    def severities(self) -> set[tuple[bool, str]]:
        """Outcome and severity of the last `data_freshness` of each series."""
        found = set()
        for one in self.series:
            check = self.site.asset(
                self.path(one),
                'assetCheckOrError(checkName: "data_freshness") { ... on AssetCheck {'
                " executionForLatestMaterialization { evaluation { success severity } } } }",
            )["assetCheckOrError"]["executionForLatestMaterialization"]
            if check is not None:
                evaluation = check["evaluation"]
                found.add((evaluation["success"], evaluation["severity"]))
        return found

    def materializations(self) -> int:
        return sum(
            len(
                self.site.asset(self.path(one), "assetMaterializations { timestamp }")[
                    "assetMaterializations"
                ]
            )
            for one in self.series
        )

    def ended(self) -> list[str]:
        """The final statuses of the refreshes, newest first; empty while one is queued or running."""
        runs = [run for run in self.site.runs() if "fks/refresh" in run["tags"]]
        states = [str(run["status"]) for run in runs]
        return states if set(states) <= {"SUCCESS", "FAILURE"} else []

    def green(self) -> bool:
        """Whether all indicators pass."""
        return {passed for passed, _ in self.severities()} == {True} and self.status()[0] == 0

    def red(self) -> bool:
        """Whether all indicators fail."""
        return {passed for passed, _ in self.severities()} == {False} and self.status()[0] == 1

    def fail_provider(self) -> None:
        """From now on it returns 503 to all requests."""
        for name in ("binance", "archive"):
            self.site.market.plant_fault(name, "status", count=None, status=503, seconds=0)

    def matches_the_market(self, window: TimeRange) -> bool:
        """Whether the stored candles of the window equal the market's."""
        with self.site.database() as database:
            for one in self.series:
                stored = read_candles(database, one, window)
                truth = self.site.market.truth("binance", one.symbol, one.timeframe, window)
                pairs = zip(stored.columns(), truth.columns(), strict=True)
                if len(truth) != window.duration // MICROS_PER_MINUTE or not all(
                    np.array_equal(a, b) for a, b in pairs
                ):
                    return False
        return True


@contextmanager
def watched(home: Path) -> Iterator[Watched]:
    start = to_datetime(now() - 8 * MICROS_PER_HOUR)
    with (
        LocalMarket(MarketConfig(limits=False)) as market,
        site(home, market, SYMBOLS, "1m", f"{start:%Y-%m-01}") as made,
    ):
        yield Watched(made)


def backfilled(made: Watched, start: int, end: int) -> None:
    for symbol in SYMBOLS:
        line = (
            symbol,
            "1m",
            "--start",
            to_datetime(start).isoformat(),
            "--end",
            to_datetime(end).isoformat(),
        )
        done = made.run("backfill", *line, "--json")
        assert done.returncode == 0, done.stderr


def make_a_tick_due(made: Site) -> None:
    """Restarts the daemon with the state of schedules and failed refreshes moved back by one polling interval, so that
    a tick is due now instead of in a quarter of an hour."""
    stop([Background(made.settings.home, DAEMON)])
    with made.database() as database:
        execute(database, *_SYNCED_EARLIER)
    with pytest.MonkeyPatch.context() as patch:
        for name in [one for one in os.environ if one.startswith(("FKS_", "DAGSTER_"))]:
            patch.delenv(name)
        for name, value in made.environment.items():
            if name.startswith("FKS_"):
                patch.setenv(name, value)
        with DagsterInstance.from_config(str(dagster_folder(made.settings.home))) as instance:
            _move_back(instance, timedelta(microseconds=POLLING))
    made.up()


# No candle is stored after the last gap, which ends where the coverage of the series ends.
_SYNCED_EARLIER = (
    "UPDATE fks.gap g SET gap_end = gap_end - interval '15 minutes', missing_candles = missing_candles - 15,"
    " found_at = found_at - interval '15 minutes', next_attempt_at = next_attempt_at - interval '15 minutes'"
    " FROM fks.sync_state s WHERE s.series_id = g.series_id AND g.gap_end = upper(s.synced)",
    "UPDATE fks.sync_state s"
    " SET synced = synced * tstzmultirange(tstzrange(NULL, upper(synced) - interval '15 minutes'))"
    " WHERE EXISTS (SELECT FROM fks.gap g WHERE g.series_id = s.series_id)",
)


def _move_back(instance: DagsterInstance, by: timedelta) -> None:
    """Moves back the ticks of the schedules and the tick times in the tags of their runs."""
    for state in instance.all_instigator_state():
        data = state.instigator_data
        if not isinstance(data, ScheduleInstigatorData):  # a sensor
            continue
        for tick in instance.get_ticks(state.instigator_origin_id, state.selector_id):
            earlier = tick.tick_data.timestamp - by.total_seconds()
            instance.update_tick(tick._replace(tick_data=tick.tick_data._replace(timestamp=earlier)))
        began = (data.start_timestamp or 0) - by.total_seconds()
        instance.update_instigator_state(state.with_data(ScheduleInstigatorData(data.cron_schedule, began)))
    for run in instance.get_runs():
        at = run.tags.get(SCHEDULED_EXECUTION_TIME_TAG)
        if at is not None:
            moved = (datetime.fromisoformat(at) - by).isoformat()
            instance.add_run_tags(run.run_id, {SCHEDULED_EXECUTION_TIME_TAG: moved})


def test_a_provider_that_failed_two_polling_intervals_ago(tmp_path: Path) -> None:
    with watched(tmp_path / "home") as made:
        made.site.up(WEBSERVER)
        cut = (now() - RED_WITHIN) // MICROS_PER_MINUTE * MICROS_PER_MINUTE
        backfilled(made, cut - 6 * MICROS_PER_HOUR, cut)
        made.fail_provider()
        start_schedule(made.site, "refresh_1m")
        make_a_tick_due(made.site)
        made.site.until(lambda: bool(made.ended()), 200)

        assert set(made.ended()) == {"FAILURE"}
        assert made.severities() == {(False, "ERROR")}
        assert made.materializations() == 0, "so that the freshness policy turns stale"
        code, found = made.status()
        assert code == 1
        for symbol in SYMBOLS:
            assert found[symbol]["status"] == "error"
            assert found[symbol]["open_gaps"] == 1
            assert found[symbol]["lag"] >= RED_WITHIN // MICROS_PER_MINUTE - 1
            assert found[symbol]["newest_data"] == to_datetime(cut - MICROS_PER_MINUTE).isoformat()
        assert made.site.until_ended(made.site.launch_job(CHECKS)) == "SUCCESS"
        assert made.checks() == {"data_freshness": {False}, "completeness": {False}, "ohlc_sanity": {True}}

        made.site.market.clear_faults()
        before = len(made.ended())
        make_a_tick_due(made.site)
        made.site.until(lambda: len(made.ended()) > before, 200)
        made.site.until(lambda: made.ended()[0] == "SUCCESS", 10)
        assert {passed for passed, _ in made.severities()} == {True}
        assert made.materializations() > 0
        code, found = made.status()
        assert code == 0
        assert {one["status"] for one in found.values()} == {"completed"}
        assert made.matches_the_market(TimeRange(cut - 6 * MICROS_PER_HOUR, cut + RED_WITHIN - POLLING))
        assert made.site.until_ended(made.site.launch_job(CHECKS)) == "SUCCESS"
        assert made.checks() == {"data_freshness": {True}, "completeness": {True}, "ohlc_sanity": {True}}


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_a_provider_that_fails_in_real_time(tmp_path: Path) -> None:
    """Takes an hour. All indicators fail within two polling intervals and three candles after the failure, and pass
    within one interval after the recovery."""
    with watched(tmp_path / "home") as made:
        made.site.up(WEBSERVER)
        begin = now() // MICROS_PER_MINUTE * MICROS_PER_MINUTE - 6 * MICROS_PER_HOUR
        backfilled(made, begin, now() - POLLING - 5 * MICROS_PER_MINUTE)  # before the tick that is due
        start_schedule(made.site, "refresh_1m")
        make_a_tick_due(made.site)
        made.site.until(lambda: made.ended()[:1] == ["SUCCESS"], 200)
        assert made.green()

        failed_at = now()
        made.fail_provider()
        made.site.until(made.red, (RED_WITHIN + RUN_TIME) / 1e6)
        assert not made.green()

        made.site.market.clear_faults()
        made.site.until(made.green, (POLLING + RUN_TIME) / 1e6)
        assert made.matches_the_market(
            TimeRange(begin, failed_at // MICROS_PER_MINUTE * MICROS_PER_MINUTE + POLLING)
        )
