"""Launching a partition backfill of series in the running Dagster, and watching it.

Belongs here: the partitions of a range, and when all of them have been run. Does not belong here: the display
(command line), the client of Dagster (`graphql`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fks_backfill_dagster.domain.partitions import AssetPath, Grain, asset_path
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import iso
from fks_backfill_dagster.host.graphql import Backfill, DagsterError, Run, Webserver
from fks_backfill_dagster.host.processes import KEEPER, Background
from fks_backfill_dagster.host.servers import DAEMON, HOST, WEBSERVER, ServersError
from fks_backfill_dagster.login import token_of
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.model import Settings

POLL_SECONDS = 1.0
START_SECONDS = 30.0
AWAY_SECONDS = 120.0
ENDED = frozenset({"CANCELED", "FAILED", "COMPLETED", "COMPLETED_FAILED", "COMPLETED_SUCCESS"})

Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Order:
    """One series and its partition keys, ascending and contiguous."""

    series: Series
    keys: tuple[str, ...]

    @property
    def asset(self) -> AssetPath:
        return asset_path(self.series)

    def within(self, run: Run) -> tuple[str, ...]:
        """The partitions of this order that the run covers."""
        if run.partitions is None or self.asset not in run.assets:
            return ()
        first, last = run.partitions
        return tuple(key for key in self.keys if first <= key <= last)


@dataclass(frozen=True, slots=True)
class Seen:
    """The progress of a backfill, counted as on Dagster's backfill page.

    `materialized` and `failed` of `wanted` partitions; `settled`: partitions that no unfinished run can change.
    """

    wanted: int
    runs: Sequence[Run]
    materialized: int = 0
    failed: int = 0
    settled: int = 0

    @property
    def ended(self) -> int:
        return sum(run.finished for run in self.runs)

    @property
    def over(self) -> bool:
        return self.settled == self.wanted and self.ended == len(self.runs)


@dataclass(frozen=True, slots=True)
class Launched:
    """The result of a backfill. `failed`: the partitions of each order that it did not materialize.

    `removed`: the orders whose symbol was removed from the settings meanwhile; their partitions do not count as
    failed. `followed`: the ids of further backfills for the remaining orders. `excused`: the runs that did not
    succeed because they contained a removed symbol.
    """

    id: str
    runs: Sequence[Run]
    failed: Mapping[Order, Sequence[str]]
    reasons: Sequence[str]
    removed: Sequence[Order] = ()
    followed: Sequence[str] = ()
    excused: frozenset[str] = field(default=frozenset())

    @property
    def succeeded(self) -> bool:
        last = [run for run in self.runs if not run.retried and run.id not in self.excused]
        return not any(self.failed.values()) and all(run.status == "SUCCESS" for run in last)


def order(catalog: Catalog, series: Series, window: TimeRange) -> Order:
    """The partitions that overlap `window`, from the series' own start on.

    Raises ValueError if the window ends before that start.
    """
    start = max(window.start, catalog.start_of(series))
    if start >= window.end:
        raise ValueError(f"{series} starts at {iso(start)}, and the range ends before")
    return Order(series, tuple(Grain.of(series.timeframe).keys(TimeRange(start, window.end))))


def running_webserver(settings: Settings) -> Webserver:
    """The webserver that `up` has started. Waits while the keeper restarts it or the daemon.

    Raises ServersError unless both run.
    """
    server, daemon, keeper = (Background(settings.home, name) for name in (WEBSERVER, DAEMON, KEEPER))
    deadline = time.monotonic() + START_SECONDS
    while True:
        runs = server.is_running() and daemon.is_running() and server.port
        web = Webserver(f"http://{HOST}:{server.port}", token_of(settings)) if runs else None
        if (web and web.answers()) or not keeper.is_running() or time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    if web is None:
        raise ServersError("Dagster is not up: start it with `fks-backfill up`, then launch again.")
    return web


def start(web: Webserver, orders: Sequence[Order], say: Say | None = None) -> str:
    """Launches a backfill of the orders; returns its id.

    Reloads the definitions first if they lack a symbol or a start of the settings. Raises DagsterError.
    """
    if _unknown(web, orders):
        if say is not None:
            say("The settings have changed since Dagster loaded them: reloading the code location")
        errors = web.reloaded()
        if errors:
            raise DagsterError(f"the definitions fail to load: {errors[0].strip()}")
        unknown = _unknown(web, orders)
        if unknown:
            raise DagsterError(
                f"{', '.join(unknown)}: not defined in the running Dagster, which has other settings than this"
                " command. Compare FKS_CONFIG, or restart it: `fks-backfill down`, then `up`."
            )
    return web.launch_backfill({one.asset: (one.keys[0], one.keys[-1]) for one in orders})


def _unknown(web: Webserver, orders: Sequence[Order]) -> list[str]:
    """Orders that the running definitions lack: series, and per grain a partition before their first one."""
    defined = web.defined([one.asset for one in orders])
    missing = [str(one.series) for one in orders if one.asset not in defined]
    if missing:
        return missing
    for grain in Grain:
        mine = [one for one in orders if Grain.of(one.series.timeframe) is grain]
        if mine:
            first = min(mine, key=lambda one: one.keys[0])
            begin = web.first_partition(first.asset)
            if begin is None or begin > first.keys[0]:
                missing.append(f"the partition {first.keys[0]} of {first.series}")
    return missing


# Watching ----------------------------------------------------------------------------------------------


def watch(
    web: Webserver,
    identity: str,
    orders: Sequence[Order],
    see: Callable[[Seen], object],
    say: Say | None = None,
) -> Launched:
    """Reports the progress about once a second until every partition was run.

    If symbols are removed from the settings meanwhile and partitions of other symbols are lost with them, another
    backfill runs those. Waits for a webserver that is being restarted. Raises DagsterError if Dagster fails the
    backfill for any other reason.
    """
    web_without_retries, web = web, replace(web, patience=AWAY_SECONDS)
    runs: list[Run] = []
    ids, wanted, removed = [identity], list(orders), set[Order]()
    while True:
        state = _watched(web, ids[-1], wanted, see)
        runs += state.runs
        defined = web.defined([one.asset for one in orders])
        gone = {one for one in orders if one.asset not in defined}
        if not defined and (errors := web.load_errors()):
            raise DagsterError(
                f"the definitions fail to load: {errors[0].strip()}. Started runs continue: {web.url}/runs/b/{ids[-1]}"
            )
        if len(gone) == len(orders):
            raise DagsterError(
                "every symbol of the backfill was removed from the settings: add them again, then launch again"
            )
        if state.error and gone == removed:
            raise DagsterError(
                f"the backfill failed: {state.error.strip()}\nLaunch again to complete it: only missing candles"
                " are fetched."
            )
        wanted = _left(orders, gone, runs)
        if gone == removed or not wanted:
            break
        removed = gone
        ids.append(start(web_without_retries, wanted))  # a mutation without a response may have succeeded
        if say is not None:
            names = ", ".join(sorted({one.series.symbol for one in gone}))
            say(f"{names}: removed from the settings. The other symbols continue: {web.url}/runs/b/{ids[-1]}")
    return _launched(web, ids, orders, gone, runs)


def _watched(
    web: Webserver, identity: str, orders: Sequence[Order], see: Callable[[Seen], object]
) -> Backfill:
    """The final state of a backfill.

    Returns when all runs have ended: Dagster's daemon polls backfills every 30 seconds and notices their end late.
    """
    counted: dict[str, int] = {}
    last = frozenset[str]()
    while True:
        state = web.backfill_state(identity)
        counted |= web.materializations([run.id for run in state.runs if run.id not in last])
        last = frozenset(run.id for run in state.runs if run.finished)
        seen = count(orders, state.runs, counted)
        see(seen)
        if seen.over or state.status in ENDED:  # lost runs of an ended backfill are not retried
            return state
        time.sleep(POLL_SECONDS)


def count(orders: Sequence[Order], runs: Sequence[Run], materialized: Mapping[str, int]) -> Seen:
    """The progress. `materialized`: the partitions that each run has materialized so far.

    A lost run with a retry does not count: the retry covers all of its partitions.
    """
    settled = 0
    for one in orders:
        mine = [(run, frozenset(one.within(run))) for run in runs]
        for key in one.keys:
            covering = [run for run, keys in mine if key in keys]
            settled += bool(covering) and all(run.finished for run in covering)
    valid = [run for run in runs if not run.retried]
    done = {run.id: materialized.get(run.id, 0) for run in valid}
    failed = sum(
        max(0, sum(len(one.within(run)) for one in orders) - done[run.id]) for run in valid if run.finished
    )
    total = sum(len(one.keys) for one in orders)
    return Seen(total, runs, min(total, sum(done.values())), failed, settled)


def _left(orders: Sequence[Order], gone: set[Order], runs: Sequence[Run]) -> list[Order]:
    """The partitions that remaining orders have lost because of removed ones, extended to contiguous orders.

    Lost are partitions without a run that succeeded, continues, or failed for another reason.
    """
    lost = {one.asset for one in gone}
    left = []
    for one in orders:
        if one in gone:
            continue
        covered = {
            key
            for run in runs
            if run.status == "SUCCESS" or not lost & set(run.assets)
            for key in one.within(run)
        }
        keys = [key for key in one.keys if key not in covered]
        if keys:
            left.append(Order(one.series, tuple(key for key in one.keys if keys[0] <= key <= keys[-1])))
    return left


def _launched(
    web: Webserver, ids: Sequence[str], orders: Sequence[Order], gone: set[Order], runs: Sequence[Run]
) -> Launched:
    lost = {one.asset for one in gone}
    excused = frozenset(run.id for run in runs if run.status != "SUCCESS" and lost & set(run.assets))
    failed = {one: () if one in gone else _failed(web, one, runs) for one in orders}
    reasons = [
        text.strip()
        for run in runs
        if run.status == "FAILURE" and not run.retried and run.id not in excused
        for text in web.failures(run.id)
    ]
    return Launched(ids[0], runs, failed, reasons, [one for one in orders if one in gone], ids[1:], excused)


def _failed(web: Webserver, one: Order, runs: Sequence[Run]) -> list[str]:
    """The partitions that Dagster shows as failed, and those that no run has finished.

    Keys before the current start of the settings are no longer partitions.
    """
    begin = web.first_partition(one.asset) or ""
    shown = set(web.failed_partitions(one.asset, one.keys))
    covered = {key for run in runs if run.status in ("SUCCESS", "FAILURE") for key in one.within(run)}
    return [key for key in one.keys if key >= begin and (key in shown or key not in covered)]
