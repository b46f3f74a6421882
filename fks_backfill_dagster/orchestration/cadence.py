"""How often each timeframe is looked at, when a series counts as stale, and what goes first.

Belongs here: the figures that schedules, assets and the queue share. Does not belong here: what is
done at a tick (`schedules`), how many runs go side by side (dagster.yaml), the polling intervals, which
the command line needs as well (`domain.freshness`).
"""

from __future__ import annotations

from datetime import timedelta

from dagster import FreshnessPolicy

from fks_backfill_dagster.domain.freshness import POLLING_MINUTES, polling_interval
from fks_backfill_dagster.domain.series import AssetClass
from fks_backfill_dagster.domain.timeframe import Timeframe

MOST_SERIES = 50
"""A run that nobody asked for takes at most so many series."""

PRIORITY = "dagster/priority"
FIRST, LAST = "10", "-10"
"""Priority in the queue: refresh before backfill (0, Dagster's default) before gap filling."""

FILL_SECONDS = 60
"""Between two looks at the ledger for gaps that are due."""

OUTAGE_SECONDS = 600
"""Between two looks for outages of whole venues."""

BEFORE_START_SECONDS = 60
"""Between two looks for partitions before a series' own start."""

FILL_RUNS = 10
"""So many runs that fill gaps wait or run at most: the rest is asked for when these are over."""

FILL_AGAIN_SECONDS = 600
"""A partition of a series is not asked for again so soon, whatever became of the run."""


def cron(timeframe: Timeframe) -> str:
    """When a timeframe is looked at: a minute or more after candles close, each in its own minute."""
    every, offset = POLLING_MINUTES[timeframe], 1 + list(Timeframe).index(timeframe)
    return f"{offset} * * * *" if every == 60 else f"{offset}-59/{every} * * * *"


def interval_of_looks(timeframe: Timeframe) -> int:
    """Microseconds."""
    return polling_interval(timeframe)


def interval(timeframe: Timeframe) -> timedelta:
    """The longest time between two materializations of a series that is kept fresh, its market open."""
    return timedelta(minutes=max(timeframe.minutes, POLLING_MINUTES[timeframe]))


def freshness(asset_class: AssetClass, timeframe: Timeframe) -> FreshnessPolicy:
    """Stale is what was not materialized for two intervals; exchanges that close are looked at daily."""
    expected = interval(timeframe)
    if asset_class is not AssetClass.CRYPTO:
        expected = max(expected, timedelta(days=1))
    slack = max(timedelta(hours=1), expected / 4)
    return FreshnessPolicy.time_window(fail_window=2 * expected + slack, warn_window=expected + slack)
