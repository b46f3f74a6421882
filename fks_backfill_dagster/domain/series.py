"""Instruments and their candle series: an instrument at a timeframe."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from fks_backfill_dagster.domain.timeframe import Timeframe


class AssetClass(StrEnum):
    CRYPTO = "crypto"
    STOCKS = "stocks"
    FOREX = "forex"


DEFAULT_CALENDAR: Final = "XNYS"

SeriesKey = tuple[str, str]
"""Symbol and timeframe: what identifies a stored series."""


@dataclass(frozen=True, slots=True)
class Instrument:
    """What is traded: a symbol, with everything that is the same at each of its timeframes.

    `calendar` is the name of an exchange calendar (`XNYS`) and only meaningful for stocks.
    `provider_symbols` overrides the symbol at a provider: pairs (provider, its symbol).
    """

    symbol: str
    asset_class: AssetClass
    calendar: str = DEFAULT_CALENDAR
    provider_symbols: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    def at(self, timeframe: Timeframe) -> Series:
        return Series(self.symbol, timeframe, self.asset_class, self.calendar, self.provider_symbols)

    @property
    def venue(self) -> str:
        """Where it is traded: for stocks the exchange, by its calendar; else the market of the asset class."""
        return self.calendar if self.asset_class is AssetClass.STOCKS else self.asset_class.value


@dataclass(frozen=True, slots=True)
class Series:
    """One candle series: the fields of its instrument, and a timeframe."""

    symbol: str
    timeframe: Timeframe
    asset_class: AssetClass
    calendar: str = DEFAULT_CALENDAR
    provider_symbols: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return f"{self.symbol} {self.timeframe}"

    @property
    def key(self) -> SeriesKey:
        return self.symbol, self.timeframe.value

    @property
    def instrument(self) -> Instrument:
        return Instrument(self.symbol, self.asset_class, self.calendar, self.provider_symbols)

    def at(self, timeframe: Timeframe) -> Series:
        """The series of the same instrument at another timeframe."""
        return replace(self, timeframe=timeframe)

    def provider_symbol(self, provider: str) -> str | None:
        """The configured symbol at `provider`; None if its default applies."""
        return dict(self.provider_symbols).get(provider)


def identifier(symbol: str) -> str:
    """The symbol as part of an asset key: any other character than A-Z a-z 0-9 becomes `_` (`BTC_USDT`)."""
    return re.sub(r"[^A-Za-z0-9]", "_", symbol)
