"""The slow, obvious reading of the wire formats, for comparison with the truth."""

from __future__ import annotations

import csv
import io
import zipfile
from typing import Any

import numpy as np
import requests

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.simulator.config import instant


def window(start: str, end: str) -> TimeRange:
    return TimeRange(instant(start), instant(end))


def klines(market: LocalMarket, **params: Any) -> requests.Response:
    asked = {"symbol": "BTCUSDT", "interval": "1m", **params}
    return requests.get(f"{market.binance_url}/api/v3/klines", params=asked, timeout=10)


def span(of: TimeRange) -> dict[str, int]:
    """A half-open window as Binance's inclusive bounds."""
    return {"startTime": of.start // 1000, "endTime": of.end // 1000 - 1}


def archive(market: LocalMarket, path: str) -> requests.Response:
    return requests.get(f"{market.archive_url}/data/spot/{path}", timeout=10)


def aggs(market: LocalMarket, path: str, key: str = "any", **params: Any) -> requests.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = f"{market.polygon_url}/v2/aggs/ticker/{path}"
    return requests.get(url, params=params, headers=headers, timeout=10)


def unzipped(body: bytes) -> list[list[str]]:
    with zipfile.ZipFile(io.BytesIO(body)) as file:
        (name,) = file.namelist()
        return list(csv.reader(io.StringIO(file.read(name).decode())))


def of_klines(rows: list[list[Any]], unit: int = 1000) -> Candles:
    ts = np.array([int(row[0]) * unit for row in rows], dtype=np.int64)
    return Candles(ts, *(np.array([float(row[i]) for row in rows]) for i in range(1, 6)))


def of_aggs(results: list[dict[str, Any]]) -> Candles:
    ts = np.array([row["t"] * 1000 for row in results], dtype=np.int64)
    return Candles(ts, *(np.array([float(row[key]) for row in results]) for key in "ohlcv"))
