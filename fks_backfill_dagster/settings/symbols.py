"""The asset class of a symbol, from its form."""

from __future__ import annotations

import re
from typing import Final

from fks_backfill_dagster.domain.series import AssetClass

_FIAT = (
    "AUD BRL CAD CHF CLP CNH CNY COP CZK DKK EUR GBP HKD HUF IDR ILS INR JPY KRW MXN MYR NOK NZD "
    "PHP PLN RON SAR SEK SGD THB TRY TWD USD ZAR"
)
FIAT: Final = frozenset(_FIAT.split())


def infer_asset_class(symbol: str) -> AssetClass:
    """Two fiat currencies are forex, any other pair is crypto, a symbol without a slash is a stock."""
    base, slash, quote = symbol.partition("/")
    if not slash:
        return AssetClass.STOCKS
    return AssetClass.FOREX if {base, quote} <= FIAT else AssetClass.CRYPTO


def check_symbol(symbol: str, asset_class: AssetClass) -> None:
    """Raises ValueError if `symbol` is invalid for its asset class."""
    if asset_class is AssetClass.STOCKS:
        if not re.fullmatch(r"[A-Za-z0-9.^=_-]+", symbol):
            raise ValueError(f"{symbol!r} is not a ticker such as AAPL or BRK.B")
        return
    sides = symbol.split("/")
    if len(sides) != 2 or not all(side.isalnum() and side == side.upper() for side in sides):
        example = "EUR/USD" if asset_class is AssetClass.FOREX else "BTC/USDT"
        raise ValueError(f"{symbol!r} is not BASE/QUOTE in capitals, such as {example}")
