"""The contract of all providers; Yahoo's test is in test_yfinance.py, next to its market."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, Timeframe
from fks_backfill_dagster_tests.providers.conformance import ProviderConformance
from fks_backfill_dagster_tests.providers.conformance_base import KEY
from fks_backfill_dagster_tests.providers.markets import (
    SmallAlphaVantage,
    SmallCoinGecko,
    SmallOanda,
    small_polygon,
)
from fks_backfill_dagster_tests.providers.scripted import (
    Received,
    Scripted,
    SmallBinance,
    crypto,
    json_said,
    span,
)

pytestmark = pytest.mark.server


def relabelled(response: Scripted, theirs: str, ours: str) -> Scripted:
    """A response with another symbol name."""
    return replace(response, body=response.body.replace(theirs.encode(), ours.encode()))


BINANCE, OANDA = SmallBinance(), SmallOanda(ProviderConformance.now, KEY)
ALPHA_VANTAGE, COINGECKO = SmallAlphaVantage(ProviderConformance.now), SmallCoinGecko(ProviderConformance.now)


class TestBinance(ProviderConformance):
    name = "binance"
    symbols: ClassVar = {AssetClass.CRYPTO: "BTC/USDT"}

    def market(self, asked: Received) -> Scripted:
        return BINANCE(asked)

    def paged(self) -> tuple[Series, TimeRange]:
        return crypto(), span("2024-05-06", "2024-05-09")

    def disguised(self, asked: Received) -> Scripted:
        return BINANCE(replace(asked, query={**asked.query, "symbol": "ETHUSDT"}))

    def unknown(self, asked: Received) -> Scripted:
        return json_said({"code": -1121, "msg": "Invalid symbol."}, 400)

    def window(self, series: Series) -> TimeRange:
        return (
            span("2024-05-06", "2024-05-20")
            if series.timeframe.minutes >= 240
            else span("2024-05-06", "2024-05-07")
        )


class TestPolygon(ProviderConformance):
    name = "polygon"
    symbols: ClassVar = {
        AssetClass.CRYPTO: "BTC/USDT",
        AssetClass.STOCKS: "AAPL",
        AssetClass.FOREX: "EUR/USD",
    }
    reports_unknown = False

    def market(self, asked: Received) -> Scripted:
        return small_polygon(asked)

    def paged(self) -> tuple[Series, TimeRange]:
        return crypto(), span("2024-05-06", "2024-05-09")

    def disguised(self, asked: Received) -> Scripted:
        other = small_polygon(replace(asked, path=asked.path.replace("BTC", "ETH")))
        return relabelled(other, "ETH", "BTC")

    def unknown(self, asked: Received) -> Scripted:
        ticker = asked.path.split("/")[4]
        return json_said({"ticker": ticker, "queryCount": 0, "resultsCount": 0, "status": "OK"})

    def window(self, series: Series) -> TimeRange:
        # A forex week opens on a Sunday.
        return span("2024-05-05", "2024-05-20" if series.timeframe.minutes >= 240 else "2024-05-08")


class TestOanda(ProviderConformance):
    name = "oanda"
    symbols: ClassVar = {AssetClass.FOREX: "EUR/USD"}

    def market(self, asked: Received) -> Scripted:
        return OANDA(asked)

    def paged(self) -> tuple[Series, TimeRange]:
        return Series("EUR/USD", Timeframe.M1, AssetClass.FOREX), span("2024-05-06", "2024-05-18")

    def disguised(self, asked: Received) -> Scripted:
        other = OANDA(replace(asked, path=asked.path.replace("EUR_USD", "USD_JPY")))
        return relabelled(other, "USD_JPY", "EUR_USD")

    def unknown(self, asked: Received) -> Scripted:
        return json_said({"errorMessage": "Invalid value specified for 'instrument'"}, 400)

    def window(self, series: Series) -> TimeRange:
        return (
            span("2024-05-05", "2024-05-26")
            if series.timeframe.minutes >= 240
            else span("2024-05-03", "2024-05-07")
        )


class TestAlphaVantage(ProviderConformance):
    name = "alphavantage"
    symbols: ClassVar = {AssetClass.STOCKS: "AAPL"}

    def market(self, asked: Received) -> Scripted:
        return ALPHA_VANTAGE(asked)

    def paged(self) -> tuple[Series, TimeRange]:
        return Series("AAPL", Timeframe.M30, AssetClass.STOCKS), span("2024-02-12", "2024-05-20")

    def disguised(self, asked: Received) -> Scripted:
        other = ALPHA_VANTAGE(replace(asked, query={**asked.query, "symbol": "BRK.B"}))
        return relabelled(other, "BRK.B", "AAPL")

    def unknown(self, asked: Received) -> Scripted:
        return json_said({"Error Message": "Invalid API call. Please retry or visit the documentation"})

    def window(self, series: Series) -> TimeRange:
        return span("2024-05-06", "2024-05-20")


class TestCoinGecko(ProviderConformance):
    name = "coingecko"
    symbols: ClassVar = {AssetClass.CRYPTO: "BTC/USDT"}

    def market(self, asked: Received) -> Scripted:
        return COINGECKO(asked)

    def paged(self) -> None:
        """None for a demo key; test_coingecko.py tests the ranges of a paid key."""

    def unknown(self, asked: Received) -> Scripted:
        return json_said({"error": "coin not found"}, 404)

    def window(self, series: Series) -> TimeRange:
        """The whole candles within the depth of a demo key."""
        depth = {Timeframe.M30: 1, Timeframe.H1: 1}.get(series.timeframe, 30) * MICROS_PER_DAY
        grid = grid_of(series)
        first = int(grid.opens(TimeRange(self.now - depth, self.now))[0])
        return TimeRange(first, grid.closed_end(self.now))
