"""A partition backfill of some series through the running Dagster, watched to its end.

Belongs here: which partitions a range means, and when all of them have been run. Does not belong here:
how it is shown (command line), how Dagster is asked (`webserver`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.orchestration.names import AssetPath, asset_path, keys_of
from fks_backfill_dagster.orchestration.processes import Background
from fks_backfill_dagster.orchestration.servers import DAEMON, HOST, WEBSERVER, ServersError
from fks_backfill_dagster.orchestration.webserver import Run, Webserver
from fks_backfill_dagster.settings import Settings

LOOK_SECONDS = 1.0
ENDED = frozenset({"CANCELED", "FAILED", "COMPLETED", "COMPLETED_FAILED", "COMPLETED_SUCCESS"})


@dataclass(frozen=True, slots=True)
class Order:
    """One series and the keys of its partitions, ascending, without a hole."""

    series: Series
    keys: tuple[str, ...]

    @property
    def asset(self) -> AssetPath:
        return asset_path(self.series)


@dataclass(frozen=True, slots=True)
class Seen:
    """How far a backfill is: partitions whose run has ended, of all; runs ended, of those that exist."""

    partitions: int
    wanted: int
    runs: Sequence[Run]

    @property
    def ended(self) -> int:
        return sum(run.finished for run in self.runs)

    @property
    def over(self) -> bool:
        return self.partitions == self.wanted and self.ended == len(self.runs)


@dataclass(frozen=True, slots=True)
class Launched:
    """What came of a backfill. `failed` are the partitions of each order that Dagster shows as failed."""

    id: str
    runs: Sequence[Run]
    failed: Mapping[Order, Sequence[str]]
    reasons: Sequence[str]

    @property
    def succeeded(self) -> bool:
        last = [run for run in self.runs if not run.retried]
        return not any(self.failed.values()) and all(run.status == "SUCCESS" for run in last)


def order(settings: Settings, series: Series, window: TimeRange) -> Order:
    """The partitions that `window` reaches into, from where Dagster's partitions begin.

    Raises ValueError when it ends before that.
    """
    start = max(window.start, settings.history_start)
    if start >= window.end:
        raise ValueError(
            f"Dagster's partitions begin at history_start, and the range of {series} ends before"
        )
    return Order(series, tuple(keys_of(series.timeframe, TimeRange(start, window.end))))


def running_webserver(settings: Settings) -> Webserver:
    """The webserver that `up` has started. Raises ServersError unless it and the daemon run."""
    server, daemon = Background(settings.home, WEBSERVER), Background(settings.home, DAEMON)
    if not (server.is_running() and daemon.is_running() and server.port):
        raise ServersError("Dagster is not up: start it with `fks-backfill up`, then launch again.")
    return Webserver(f"http://{HOST}:{server.port}")


def start(web: Webserver, orders: Sequence[Order]) -> str:
    """Has Dagster backfill them; the id of the backfill. Raises DagsterRefused."""
    return web.launch_backfill({one.asset: (one.keys[0], one.keys[-1]) for one in orders})


def watch(web: Webserver, identity: str, orders: Sequence[Order], see: Callable[[Seen], object]) -> Launched:
    """Tells how far it is, about once a second, until every partition was run. Raises DagsterRefused.

    Dagster's daemon looks for new backfills every 30 seconds, and as long after their end.
    """
    while True:
        status, runs = web.backfill(identity)
        seen = _seen(orders, runs)
        see(seen)
        if seen.over or status in ENDED:  # of a backfill that has ended no lost run is tried again
            break
        time.sleep(LOOK_SECONDS)
    return Launched(
        identity,
        runs,
        {one: web.failed_partitions(one.asset, one.keys) for one in orders},
        [
            text.strip()
            for run in runs
            if run.status == "FAILURE" and not run.retried
            for text in web.failures(run.id)
        ],
    )


def _seen(orders: Sequence[Order], runs: Sequence[Run]) -> Seen:
    """A partition counts as run when a run that covers it has ended and none that does is left."""
    ended = 0
    for one in orders:
        mine = [run for run in runs if one.asset in run.assets and run.partitions]
        for key in one.keys:
            covering = [
                run for run in mine if run.partitions and run.partitions[0] <= key <= run.partitions[1]
            ]
            ended += bool(covering) and all(run.finished for run in covering)
    return Seen(ended, sum(len(one.keys) for one in orders), runs)
