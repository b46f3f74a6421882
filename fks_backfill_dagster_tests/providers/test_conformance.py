"""Every provider against the contract of all of them; Yahoo's stands in test_yfinance.py, beside its market."""

from __future__ import annotations

from typing import ClassVar

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, Timeframe
from fks_backfill_dagster_tests.providers.conformance import KEY, ProviderConformance
from fks_backfill_dagster_tests.providers.markets import (
    SmallAlphaVantage,
    SmallCoinGecko,
    SmallOanda,
    small_polygon,
)
from fks_backfill_dagster_tests.providers.scripted import Asked, Said, SmallBinance, json_said, span

BINANCE, OANDA = SmallBinance(), SmallOanda(ProviderConformance.now, KEY)
ALPHA_VANTAGE, COINGECKO = SmallAlphaVantage(ProviderConformance.now), SmallCoinGecko(ProviderConformance.now)


class TestBinance(ProviderConformance):
    name = "binance"
    symbols: ClassVar = {AssetClass.CRYPTO: "BTC/USDT"}

    def market(self, asked: Asked) -> Said:
        return BINANCE(asked)

    def unknown(self, asked: Asked) -> Said:
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
    tells_unknown = False

    def market(self, asked: Asked) -> Said:
        return small_polygon(asked)

    def unknown(self, asked: Asked) -> Said:
        ticker = asked.path.split("/")[4]
        return json_said({"ticker": ticker, "queryCount": 0, "resultsCount": 0, "status": "OK"})

    def window(self, series: Series) -> TimeRange:
        # A forex week opens on a Sunday.
        return span("2024-05-05", "2024-05-20" if series.timeframe.minutes >= 240 else "2024-05-08")


class TestOanda(ProviderConformance):
    name = "oanda"
    symbols: ClassVar = {AssetClass.FOREX: "EUR/USD"}

    def market(self, asked: Asked) -> Said:
        return OANDA(asked)

    def unknown(self, asked: Asked) -> Said:
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

    def market(self, asked: Asked) -> Said:
        return ALPHA_VANTAGE(asked)

    def unknown(self, asked: Asked) -> Said:
        return json_said({"Error Message": "Invalid API call. Please retry or visit the documentation"})

    def window(self, series: Series) -> TimeRange:
        return span("2024-05-06", "2024-05-20")


class TestCoinGecko(ProviderConformance):
    name = "coingecko"
    symbols: ClassVar = {AssetClass.CRYPTO: "BTC/USDT"}

    def market(self, asked: Asked) -> Said:
        return COINGECKO(asked)

    def unknown(self, asked: Asked) -> Said:
        return json_said({"error": "coin not found"}, 404)

    def window(self, series: Series) -> TimeRange:
        """The whole candles within the depth of a demo key."""
        depth = {Timeframe.M30: 1, Timeframe.H1: 1}.get(series.timeframe, 30) * MICROS_PER_DAY
        grid = grid_of(series)
        first = int(grid.opens(TimeRange(self.now - depth, self.now))[0])
        return TimeRange(first, grid.closed_end(self.now))
