"""The case of the gap sensor: one tick over a large ledger, evaluated by the code server as for the daemon."""

from __future__ import annotations

import tempfile
from pathlib import Path

import psycopg

from bench.dagster_world import RunningDagster, duration_of, environment_of, running_dagster
from bench.result import Result
from bench.size import Size
from bench.world import World
from fks_backfill_dagster.host.graphql import REPOSITORY
from fks_backfill_dagster.store.database import Database

FRAMES = ("1m", "5m", "15m", "30m")
"""Of each symbol: series with monthly partitions."""

MONTHS = 96

_SERIES = """
WITH made AS (
    INSERT INTO fks.series (symbol, timeframe, asset_class, calendar)
    SELECT 'C' || lpad(n::text, 4, '0') || '/USDT', frame, 'crypto', 'XNYS'
    FROM generate_series(0, %(symbols)s - 1) n CROSS JOIN unnest(%(frames)s::text[]) frame RETURNING id
) INSERT INTO fks.sync_state (series_id, synced)
SELECT id, '{[2016-01-01Z, 2024-01-01Z)}' FROM made
"""

# In every month one filled gap and one that is not filled; a quarter of the latter is due.
_GAPS = """
INSERT INTO fks.gap (series_id, gap_start, gap_end, missing_candles, status, attempts, next_attempt_at,
    evidence, found_at)
SELECT s.id, m + (s.id %% 20) * interval '1 day' + hours * interval '1 hour',
    m + (s.id %% 20) * interval '1 day' + (hours + 3) * interval '1 hour', 180,
    CASE WHEN hours = 0 THEN 'filled' WHEN number %% 8 = 0 THEN 'open' ELSE 'unavailable' END, 3,
    CASE WHEN hours = 0 THEN NULL WHEN number %% 4 = 0 THEN now() ELSE now() + interval '20 days' END,
    '[{"provider": "binance", "outcome": "absent", "asked_at": "2024-06-01T00:00:00+00:00"}]',
    now() - ((s.id * 7919 + number * 104729) %% 100000) * interval '1 minute'
FROM fks.series s CROSS JOIN (
    SELECT m, row_number() OVER (ORDER BY m) + 0 AS number FROM generate_series(
        '2016-01-01Z'::timestamptz, '2023-12-01Z', '1 month') m) months
CROSS JOIN (VALUES (0), (48)) AS kind(hours)
"""

_CANDLES = """
INSERT INTO fks.candles_1m (series_id, ts, batch_id, open, high, low, close, volume)
SELECT (SELECT min(id) FROM fks.series) + n / 500000, '2016-01-01Z'::timestamptz + (n %% 500000) * interval '1 minute',
    1, 1, 1, 1, 1, 1 FROM generate_series(0, %(candles)s - 1) n
"""

_TICK = (
    "mutation($s: SensorSelector!) { sensorDryRun(selectorData: $s, cursor: null) { __typename"
    " ... on PythonError { message } ... on DryRunInstigationTick { evaluationResult { skipReason"
    " error { message } runRequests { assetSelection { path } } } } } }"
)


def sensor(place: World, runs: int, size: Size) -> list[Result]:
    """(m) a tick over 4,000 series of 96 months, a gap in each; (n) the same with five million candles."""
    place.clear()
    Database(place.database_url).ensure()
    symbols = [
        {"symbol": f"C{n:04d}/USDT", "asset_class": "crypto", "timeframes": list(FRAMES)}
        for n in range(size.sensor_symbols)
    ]
    with tempfile.TemporaryDirectory(prefix="fks-bench-") as home:
        environment = environment_of(Path(home), place.database_url, place.market_url, symbols, "2016-01-01")
        with running_dagster(environment) as dagster:
            with psycopg.connect(place.database_url, autocommit=True) as connection:
                connection.execute(_SERIES, {"symbols": size.sensor_symbols, "frames": list(FRAMES)})
                connection.execute(_GAPS, {})
                connection.execute("ANALYZE fks.gap, fks.series, fks.sync_state")
                empty = [duration_of(lambda: _tick(dagster)) for _ in range(runs + 1)][1:]
                connection.execute(_CANDLES, {"candles": size.sensor_candles})
                connection.execute("ANALYZE fks.candles_1m")
                full = [duration_of(lambda: _tick(dagster)) for _ in range(runs + 1)][1:]
            requested = _tick(dagster)
    ratios = [a / b for a, b in zip(full, empty, strict=True)]
    detail = f"{size.sensor_symbols * len(FRAMES):,} series x {MONTHS} months; requests {requested} runs"
    return [
        Result("(m) a tick of the gap sensor, seconds", empty, 2.0, False, detail),
        Result("(n) the same with 5 M candles / without", ratios, 1.3, False, f"{max(full):.2f} s at most"),
    ]


def _tick(dagster: RunningDagster) -> int:
    """The number of runs that a tick requests."""
    found = dagster.web.query(_TICK, s={**REPOSITORY, "sensorName": "fill_gaps"})["sensorDryRun"]
    result = found.get("evaluationResult") or {}
    if found["__typename"] != "DryRunInstigationTick" or result.get("error"):
        raise SystemExit(f"the sensor was not evaluated: {found}")
    requests = result["runRequests"] or []
    if not requests:
        raise SystemExit(f"the sensor requested no runs: {result['skipReason']}")
    return len(requests)
