"""The settings of the local market, and the text forms of instants and outages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import to_micros
from fks_backfill_dagster.simulator.splits import Split

PROVIDERS = ("binance", "polygon", "yahoo", "alphavantage", "oanda", "coingecko")
ALIASES = {"yfinance": "yahoo"}
"""Provider names of the project that differ from the address."""

EVERYWHERE = "all"
"""The provider of an outage or a halt that applies to all providers."""


def instant(text: str) -> int:
    """ISO 8601 as microseconds, UTC where no zone is given. Raises ValueError."""
    moment = datetime.fromisoformat(text)
    return to_micros(moment if moment.tzinfo else moment.replace(tzinfo=UTC))


def plain_symbol(symbol: str) -> str:
    """`BTC/USDT`, `EUR_USD`, `btcusdt`, `X:BTCUSD` and `C:EURUSD` without prefix and separators, upper case."""
    return re.sub(r"[/_:-]", "", symbol.upper().removeprefix("X:").removeprefix("C:"))


class Absence(StrEnum):
    """The cause of absent minutes, which decides how coarser candles are affected."""

    OUTAGE = "outage"  # there were trades, but the provider has no data
    HALT = "halt"  # there were no trades


@dataclass(frozen=True, slots=True)
class Outage:
    """Absent minutes of a provider, by open time; `symbol` None means all of its symbols.

    OUTAGE: missing data of a provider. Every row, of every timeframe, that contains such a minute of the
    trading hours is missing. HALT: a market without trades. A coarser candle contains the trades before and
    after. Downtime of an exchange is a halt of the provider that is this exchange (Binance); a trading halt
    of a stock has `provider` EVERYWHERE.

    `published` (of an OUTAGE only): the provider serves the rows from this instant of the market's clock
    on; None: never.
    """

    provider: str
    window: TimeRange
    symbol: str | None = None
    published: int | None = None
    kind: Absence = Absence.OUTAGE

    def __post_init__(self) -> None:
        object.__setattr__(self, "provider", ALIASES.get(self.provider, self.provider))
        if self.provider not in (*PROVIDERS, EVERYWHERE):
            known = ", ".join((*PROVIDERS, EVERYWHERE))
            raise ValueError(f"{self.kind} of {self.provider!r}: the provider is one of {known}")
        if not self.window:
            raise ValueError("an outage must end after its start")
        if self.kind is Absence.HALT and self.published is not None:
            raise ValueError("a halt cannot be published late: there are no trades to publish")

    def applies_to(self, provider: str) -> bool:
        return self.provider in (provider, EVERYWHERE)

    @classmethod
    def parse(cls, text: str, kind: Absence = Absence.OUTAGE) -> Outage:
        """`PROVIDER[@SYMBOL]=START/END`, such as `binance@BTC/USDT=2024-01-05T03:00/2024-01-05T07:30`;
        PROVIDER may be `all`.

        Raises ValueError with the expected form.
        """
        match = re.fullmatch(r"(\w+)(?:@([^=]+))?=([^/]+)/([^/]+)", text)
        try:
            if match is None:
                raise ValueError("wrong format")
            provider, symbol, start, end = match.groups()
            window = TimeRange(instant(start), instant(end))
            return cls(provider, window, plain_symbol(symbol) if symbol else None, kind=kind)
        except ValueError as error:
            raise ValueError(f"{kind} {text!r} is not PROVIDER[@SYMBOL]=START/END: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class MarketConfig:
    """The settings of a local market at its start; what can change later has a route under /sim.

    replay: directory of real candles to serve instead of the synthetic market.
    host, port: where to listen; port 0 takes a free one.
    latency: seconds added to every provider response.
    limits: whether Binance's weight limit is enforced, with weight_per_minute, ban_after (rejections in a
        minute before the ban) and ban_seconds.
    polygon_per_minute: Polygon's request limit; None for none (its free plan has 5).
    yahoo_per_minute: Yahoo's request limit; the real one is not published.
    alphavantage_per_day, alphavantage_per_second: of all free keys together (25 and 1).
    oanda_per_second: 100 in reality. coingecko_per_minute: 100 for a demo key.
    now: the fixed time of the market's clock (microseconds); with clock_runs its start time.
    outages: outages and halts planted at the start.
    seed, listed: of the synthetic market; `listed` are pairs (BTCUSDT, microseconds).
    splits: of stocks. The synthetic market trades in unadjusted shares; for replayed files these are
        added to the directory's equity/splits.csv.
    close_stamped: whether Alpha Vantage stamps intraday bars with their close, as it did in the past.
    single_precision: whether Yahoo's prices are 32-bit numbers, like the real ones.
    archive_header_from: archives of periods from this instant on have a header line.
    polygon_offset_ppm: offset of Polygon's prices from Binance's, in millionths.
    bad_keys: keys that every provider with keys rejects.
    access_log: whether the server prints a line for every request.
    """

    replay: Path | None = None
    host: str = "127.0.0.1"
    port: int = 0
    latency: float = 0.0
    limits: bool = True
    weight_per_minute: int = 6000
    ban_after: int = 10
    ban_seconds: float = 120.0
    polygon_per_minute: int | None = None
    yahoo_per_minute: int | None = None
    alphavantage_per_day: int | None = None
    alphavantage_per_second: int | None = None
    oanda_per_second: int | None = None
    coingecko_per_minute: int | None = None
    now: int | None = None
    clock_runs: bool = False
    outages: tuple[Outage, ...] = ()
    seed: int = 1
    listed: tuple[tuple[str, int], ...] = ()
    splits: tuple[Split, ...] = ()
    close_stamped: bool = False
    single_precision: bool = False
    archive_header_from: int | None = None
    polygon_offset_ppm: int = 0
    bad_keys: tuple[str, ...] = ("bad-key",)
    access_log: bool = False
