"""How much the cases measure: FULL gives the figures of docs/measurements.md, TINY shows that every case still works.

Does not belong here: what is measured, and the limits of the figures, which apply to FULL only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from bench.world import months, window
from fks_backfill_dagster.domain.ranges import TimeRange


@dataclass(frozen=True, slots=True)
class Size:
    """Ranges of 1m candles: `short` of one sync, `long` of one whose memory is compared, `run` of a Dagster run.

    `symbols`, `sensor_symbols`: there are four series of each. `refreshed`: series. `sensor_candles`,
    `audited`: stored candles. `crowd`: client processes at one limit.
    """

    short: TimeRange
    long: TimeRange
    run: TimeRange
    symbols: int
    refreshed: int
    sensor_symbols: int
    sensor_candles: int
    audited: int
    crowd: int
    crowd_seconds: float
    weight_seconds: float


FULL = Size(
    short=window(2023, 1),
    long=window(2015, 10),
    run=window(2019, 5),
    symbols=500,
    refreshed=2000,
    sensor_symbols=1000,
    sensor_candles=5_000_000,
    audited=int(os.environ.get("BENCH_AUDIT_CANDLES", "5000000")),
    crowd=8,
    crowd_seconds=60.0,
    weight_seconds=300.0,
)
TINY = Size(
    short=months("2023-01", 1),
    long=months("2023-01", 2),
    run=months("2023-01", 2),
    symbols=2,
    refreshed=8,
    sensor_symbols=5,
    sensor_candles=1000,
    audited=20_000,
    crowd=2,
    crowd_seconds=0.5,
    weight_seconds=1.0,
)
