"""A candle series: a symbol of an asset class at a timeframe."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum

from fks_backfill_dagster.domain.timeframe import Timeframe


class AssetClass(StrEnum):
    CRYPTO = "crypto"
    STOCKS = "stocks"
    FOREX = "forex"


@dataclass(frozen=True, slots=True)
class Series:
    """One candle series.

    `calendar` is the name of an exchange calendar (`XNYS`) and only meaningful for stocks.
    `provider_symbols` overrides the symbol at a provider: pairs (provider, its symbol).
    """

    symbol: str
    timeframe: Timeframe
    asset_class: AssetClass
    calendar: str = "XNYS"
    provider_symbols: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return f"{self.symbol} {self.timeframe}"

    def provider_symbol(self, provider: str) -> str | None:
        """The configured symbol at `provider`; None if its default applies."""
        return dict(self.provider_symbols).get(provider)


def identifier(symbol: str) -> str:
    """The symbol as part of an asset key: any other character than A-Z a-z 0-9 becomes `_` (`BTC_USDT`)."""
    return re.sub(r"[^A-Za-z0-9]", "_", symbol)
