"""A simple reference parser of the wire formats, for comparison with the truth."""

from __future__ import annotations

import csv
import io
import zipfile
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import requests

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import iso, to_micros
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.simulator.config import instant


def window(start: str, end: str) -> TimeRange:
    return TimeRange(instant(start), instant(end))


def klines(market: LocalMarket, **params: Any) -> requests.Response:
    requested = {"symbol": "BTCUSDT", "interval": "1m", **params}
    return requests.get(f"{market.binance_url}/api/v3/klines", params=requested, timeout=10)


def span(of: TimeRange) -> dict[str, int]:
    """A half-open window as Binance's inclusive bounds."""
    return {"startTime": of.start // 1000, "endTime": of.end // 1000 - 1}


def archive(market: LocalMarket, path: str) -> requests.Response:
    return requests.get(f"{market.archive_url}/data/spot/{path}", timeout=10)


def aggs(market: LocalMarket, path: str, key: str = "any", **params: Any) -> requests.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = f"{market.polygon_url}/v2/aggs/ticker/{path}"
    return requests.get(url, params=params, headers=headers, timeout=10)


def chart(market: LocalMarket, symbol: str = "AAPL", **params: Any) -> requests.Response:
    """Yahoo; `of` is a half-open window instead of period1 and period2."""
    if (of := params.pop("of", None)) is not None:
        params |= {"period1": of.start // 1_000_000, "period2": of.end // 1_000_000}
    return requests.get(f"{market.yahoo_url}/v8/finance/chart/{symbol}", params=params, timeout=10)


def vantage(market: LocalMarket, function: str, **params: Any) -> requests.Response:
    """Alpha Vantage with a premium key, as traded, regular hours, full output by default."""
    requested = {"symbol": "AAPL", "apikey": "premium", "outputsize": "full"}
    if function == "TIME_SERIES_INTRADAY":
        requested |= {"adjusted": "false", "extended_hours": "false"}
    requested = {name: value for name, value in (requested | params).items() if value is not None}
    url = f"{market.alphavantage_url}/query"
    return requests.get(url, params={"function": function, **requested}, timeout=10)


def candles(
    market: LocalMarket, instrument: str = "EUR_USD", key: str = "any", **params: Any
) -> requests.Response:
    """OANDA; `of` is a half-open window instead of from and to."""
    if (of := params.pop("of", None)) is not None:
        params |= {"from": iso(of.start), "to": iso(of.end)}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = f"{market.oanda_url}/v3/instruments/{instrument}/candles"
    return requests.get(url, params=params, headers=headers, timeout=10)


def ohlc(market: LocalMarket, path: str = "bitcoin/ohlc", **params: Any) -> requests.Response:
    """CoinGecko; `pro` or `demo` is a key."""
    headers = {f"x-cg-{plan}-api-key": params.pop(plan) for plan in ("pro", "demo") if plan in params}
    requested = {"vs_currency": "usd", **params}
    url = f"{market.coingecko_url}/api/v3/coins/{path}"
    return requests.get(url, params=requested, headers=headers, timeout=10)


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


def of_chart(answer: requests.Response) -> Candles:
    """Yahoo's bars without the empty ones, by their stamps."""
    result = answer.json()["chart"]["result"][0]
    quote = result["indicators"]["quote"][0]
    columns = [quote[name] for name in ("open", "high", "low", "close", "volume")]
    rows = [row for row in zip(result["timestamp"], *columns, strict=True) if row[1] is not None]
    return _candles([[row[0] * 1_000_000, *row[1:]] for row in rows])


def of_series(answer: requests.Response) -> Candles:
    """Alpha Vantage's bars, ascending, by their stamps as New York wall time."""
    document = answer.json()
    (series,) = (document[key] for key in document if key.startswith("Time Series"))
    rows = []
    for name, cells in reversed(series.items()):
        moment = datetime.fromisoformat(name)
        if len(name) > len("2024-01-05"):
            moment = moment.replace(tzinfo=ZoneInfo("America/New_York"))
        else:
            moment = moment.replace(tzinfo=UTC)
        rows.append([to_micros(moment), *map(float, cells.values())])
    return _candles(rows)


def of_candles(answer: requests.Response) -> Candles:
    """OANDA's complete candles, without volume: OANDA's volume counts ticks."""
    complete = [candle for candle in answer.json()["candles"] if candle["complete"]]
    return _candles(
        [
            [instant(c["time"].replace("000Z", "Z")), *(float(c["mid"][k]) for k in "ohlc"), np.nan]
            for c in complete
        ]
    )


def of_ohlc(answer: requests.Response, length: int) -> Candles:
    """CoinGecko's candles of `length` by their open."""
    return _candles([[row[0] * 1000 - length, *row[1:], np.nan] for row in answer.json()])


def _candles(rows: list[list[Any]]) -> Candles:
    ts = np.array([row[0] for row in rows], dtype=np.int64)
    return Candles(ts, *(np.array([float(row[i]) for row in rows]) for i in range(1, 6)))
