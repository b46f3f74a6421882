"""Cadences, freshness policies and run priorities.

Belongs here: the figures that schedules, sensors, assets and the queue share. Does not belong here: what a tick
does (`schedules`), the concurrency of runs (dagster.yaml), the polling intervals, which the command line needs
as well (`domain.freshness`).
"""

from __future__ import annotations

from datetime import timedelta

from dagster import FreshnessPolicy

from fks_backfill_dagster.domain.freshness import POLLING_MINUTES, polling_interval
from fks_backfill_dagster.domain.series import AssetClass
from fks_backfill_dagster.domain.timeframe import Timeframe

MOST_SERIES = 50
"""The largest number of series of an automated run."""

PRIORITY = "dagster/priority"
FIRST, LAST = "10", "-10"
"""Priority in the queue: refresh before backfill (0, Dagster's default) before gap filling."""

FILL_SECONDS = 60
"""Interval of the gap sensor."""

OUTAGE_SECONDS = 600
"""Interval of the sensor of venue outages."""

BEFORE_START_SECONDS = 60
"""Interval of the sensor of partitions before a series' own start."""

FILL_RUNS = 10
"""The largest number of queued and running gap-filling runs; further gaps are requested when these end."""

FILL_AGAIN_SECONDS = 600
"""The shortest time between two gap-filling runs of one partition of a series, whatever the outcome."""


def cron(timeframe: Timeframe) -> str:
    """The refresh schedule of a timeframe: a minute or more after candles close, each timeframe in its own minute."""
    every, offset = POLLING_MINUTES[timeframe], 1 + list(Timeframe).index(timeframe)
    return f"{offset} * * * *" if every == 60 else f"{offset}-59/{every} * * * *"


def tick_interval(timeframe: Timeframe) -> int:
    """The time between two ticks of a refresh, in microseconds."""
    return polling_interval(timeframe)


def interval(timeframe: Timeframe) -> timedelta:
    """The longest time between two materializations of a fresh series while its market is open."""
    return timedelta(minutes=max(timeframe.minutes, POLLING_MINUTES[timeframe]))


def freshness(asset_class: AssetClass, timeframe: Timeframe) -> FreshnessPolicy:
    """Warns after one interval without a materialization and fails after two, each plus a quarter of it, at least an
    hour. The interval is at least a day for markets that close."""
    expected = interval(timeframe)
    if asset_class is not AssetClass.CRYPTO:
        expected = max(expected, timedelta(days=1))
    slack = max(timedelta(hours=1), expected / 4)
    return FreshnessPolicy.time_window(fail_window=2 * expected + slack, warn_window=expected + slack)
