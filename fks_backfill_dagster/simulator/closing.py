"""Markets that close: their interface for wire formats, and the synthetic stocks and currencies.

A minute's candle is a pure function of (seed, symbol, time), as in `market`. Unlike
crypto, there are no candles outside the trading hours and in minutes without trades: a few single
minutes, some whole quarters of an hour, and most minutes before and after a stock's session.
A stock's day is the official one of its exchange, with the auctions, which no minute contains (`official`).

Out of scope: the bar boundaries of wire formats (`frames`), replayed files (`replay_closing`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_MINUTE, Timeframe
from fks_backfill_dagster.simulator import generator
from fks_backfill_dagster.simulator.bars import Bars, Scale, concat
from fks_backfill_dagster.simulator.frames import Frame, SessionRuler, fill, of_grid
from fks_backfill_dagster.simulator.generator import CHUNK, Profile
from fks_backfill_dagster.simulator.market import LISTED, NO_END, UNKNOWN_BASES
from fks_backfill_dagster.simulator.sessions import stock_sessions
from fks_backfill_dagster.simulator.splits import Split, as_traded, of_symbol

_CODES = "AUD CAD CHF CNH EUR GBP HKD JPY MXN NOK NZD PLN SEK SGD TRY USD ZAR"
CURRENCIES = frozenset(_CODES.split())

# Per thousand: minutes and quarters of an hour without trades, and pre- and post-market minutes with
# trades.
_QUIET_MINUTES, _QUIET_QUARTERS, _EXTENDED_MINUTES = 25, 4, 120
_WEEKEND_MINUTES = 3  # of a currency pair
# Streams of the generator; price streams are below ten.
_MINUTE_STREAM, _QUARTER_STREAM, _AUCTION_STREAM = 100, 101, 102
_STOCK_VOLUME = 1 << 17  # maximum shares a minute
# Maximum distance of an auction price from the adjacent trade, in millionths; and a day's volume beyond the
# sum of its minutes, in thousandths: the auctions and late reports of other venues.
_AUCTION_MOVE, _LEAST_EXTRA, _EXTRA_SPREAD = 800, 50, 100


class ClosingMarket(Protocol):
    """Bars of stocks or of currency pairs. Symbols have no separator."""

    @property
    def asset_class(self) -> AssetClass: ...

    def has_symbol(self, symbol: str) -> bool: ...

    def symbols(self) -> tuple[str, ...]:
        """Available symbols: all of a replay, a few examples of a synthetic market."""
        ...

    def listing(self, symbol: str) -> TimeRange:
        """From the first trade to the end of the last candle (`NO_END` for a live market)."""
        ...

    def bars(self, symbol: str, frame: Frame, now: int, halts: RangeSet) -> Bars:
        """The bars of `frame` in which there was a trade before `now`; the last one may be forming.

        Prices are as traded. The volume of a currency pair counts ticks, or is None. The minutes of a
        halt have no trades. Outages of providers are applied by `state`.
        """
        ...

    def truth(self, symbol: str, timeframe: Timeframe, window: TimeRange, now: int, halts: RangeSet) -> Bars:
        """The closed candles of the project's grid that open in `window`: regular sessions only,
        prices as traded, volume in base units or None."""
        ...


@dataclass(frozen=True, slots=True)
class SyntheticClosing:
    """Synthetic stocks or currency pairs. `listed` overrides LISTED: pairs (symbol, instant)."""

    asset_class: AssetClass
    seed: int = 1
    listed: tuple[tuple[str, int], ...] = ()
    splits: tuple[Split, ...] = ()

    def has_symbol(self, symbol: str) -> bool:
        """Stocks are one to five letters with an optional class (BRK.B), except a few unknown names;
        currency pairs are two of CURRENCIES."""
        if self.asset_class is AssetClass.FOREX:
            return {symbol[:3], symbol[3:]} <= CURRENCIES and symbol[:3] != symbol[3:]
        return re.fullmatch(r"[A-Z]{1,5}(\.[A-Z])?", symbol) is not None and symbol not in UNKNOWN_BASES

    def symbols(self) -> tuple[str, ...]:
        if self.asset_class is AssetClass.FOREX:
            return ("EURUSD", "GBPUSD", "USDJPY")
        return ("AAPL", "MSFT", "GOOG")

    def listing(self, symbol: str) -> TimeRange:
        return TimeRange(dict(self.listed).get(symbol, LISTED), NO_END)

    def bars(self, symbol: str, frame: Frame, now: int, halts: RangeSet) -> Bars:
        """As in `ClosingMarket`; a stock's days are official ones, its weeks are aggregated from them."""
        if self.asset_class is not AssetClass.STOCKS or frame.length < MICROS_PER_DAY:
            return self._filled(symbol, frame, now, halts)
        sessions = SessionRuler(MICROS_PER_DAY).frame(frame.hull)
        days = self._filled(symbol, sessions, now, halts)
        over = sessions.ends[np.searchsorted(sessions.opens, days.ts)] <= now
        return fill(official(_profile(self.seed, symbol, self.asset_class).key, days, over), frame)

    def _filled(self, symbol: str, frame: Frame, now: int, halts: RangeSet) -> Bars:
        blocks = [generator.nothing(_profile(self.seed, symbol, self.asset_class))]
        listed = self.listing(symbol).start
        per_chunk = max(CHUNK // frame.length, 1)
        for at in range(0, len(frame), per_chunk):
            part = frame.take(slice(at, at + per_chunk))
            span = TimeRange(listed, max(listed, now + 1)).intersect(part.hull)
            if span:
                blocks.append(fill(self._minutes(symbol, span, now, halts, part.extended), part))
        return concat(blocks)

    def _minutes(self, symbol: str, span: TimeRange, now: int, halts: RangeSet, extended: bool) -> Bars:
        profile = _profile(self.seed, symbol, self.asset_class)
        whole = TimeRange(span.start, -(-span.end // MICROS_PER_MINUTE) * MICROS_PER_MINUTE)
        minutes = generator.minutes(profile, whole)
        minutes = minutes.take(self._trades(profile, minutes.ts, extended))
        if now < whole.end:
            minutes = generator.as_of(minutes, now)
        if halts:
            minutes = minutes.take(~halts.contains(minutes.ts))
        return as_traded(minutes, of_symbol(self.splits, symbol))

    def _trades(self, profile: Profile, ts: Instants, extended: bool) -> NDArray[np.bool_]:
        """The minutes with trades."""
        luck, quarter = (
            (generator.draw(profile.key, stream, ts // MICROS_PER_MINUTE // of) % np.uint64(1000)).astype(int)
            for stream, of in ((_MINUTE_STREAM, 1), (_QUARTER_STREAM, 15))
        )
        active: NDArray[np.bool_] = (luck >= _QUIET_MINUTES) & (quarter >= _QUIET_QUARTERS)
        if self.asset_class is AssetClass.FOREX:
            week = grid_of(Series("", Timeframe.M1, AssetClass.FOREX)).contains(ts)
            # There are quotes on Saturdays too; only some providers serve them.
            weekend = ~week & (luck < _WEEKEND_MINUTES) & np.bool_(extended)
            traded: NDArray[np.bool_] = (active & week) | weekend
            return traded
        sessions = stock_sessions()
        regular = active & sessions.regular(ts)
        if not extended:
            return regular
        outside = sessions.trading(ts) & ~sessions.regular(ts) & (luck < _EXTENDED_MINUTES)
        both: NDArray[np.bool_] = regular | outside
        return both

    def truth(self, symbol: str, timeframe: Timeframe, window: TimeRange, now: int, halts: RangeSet) -> Bars:
        # The candle that contains the first trade can open before it.
        known = TimeRange(self.listing(symbol).start - Timeframe.W1.micros, NO_END)
        frame = truth_frame(self.asset_class, timeframe, window.intersect(known), now)
        found = self.bars(symbol, frame, now, halts)
        return replace(found, volume=None) if self.asset_class is AssetClass.FOREX else found


def official(key: int, days: Bars, over: NDArray[np.bool_]) -> Bars:
    """The official days of a stock, from days aggregated from the minutes of the regular session.

    Open and close are auction prices: near the open of the first and the close of the last minute, and
    within the day's high and low, which come from the minutes. The volume is consolidated: 5 to 15 % above the
    sum of the minutes. A day that is not `over` has no closing auction yet. `key` is the symbol's; the
    auctions of a day depend only on it and on the date.
    """
    bits = generator.draw(key, _AUCTION_STREAM, days.ts // MICROS_PER_DAY)
    moves = [
        ((bits >> np.uint64(shift)) % np.uint64(2 * _AUCTION_MOVE + 1)).astype(np.int64) - _AUCTION_MOVE
        for shift in (0, 20)
    ]
    opened, close = (
        np.clip(price + price * move // 1_000_000, days.low, days.high)
        for price, move in zip((days.open, days.close), moves, strict=True)
    )
    extra = (bits >> np.uint64(40)).astype(np.int64) % (_EXTRA_SPREAD + 1) + _LEAST_EXTRA
    assert days.volume is not None
    volume = days.volume + 1 + np.where(over, days.volume * extra // 1000, 0)
    return replace(days, open=opened, close=np.where(over, close, days.close), volume=volume)


def truth_frame(asset_class: AssetClass, timeframe: Timeframe, window: TimeRange, now: int) -> Frame:
    """The candles of the project's grid that open in `window` and are closed at `now`."""
    grid = grid_of(Series("", timeframe, asset_class))
    end = max(window.start, min(window.end, grid.closed_end(now)))
    return of_grid(grid, timeframe.micros, TimeRange(window.start, end))


@lru_cache(maxsize=4096)
def _profile(seed: int, symbol: str, asset_class: AssetClass) -> Profile:
    """Stocks: prices of 50 to 500 with two decimals. Pairs: five decimals, three if quoted in JPY."""
    named = f"{seed}:{asset_class}:{symbol}"
    key = int.from_bytes(blake2b(named.encode(), digest_size=8).digest(), "little")
    if asset_class is AssetClass.STOCKS:
        return Profile(key, 5_000 + key % 45_000, _STOCK_VOLUME, Scale(2, 0))
    return Profile(key, 80_000 + key % 70_000, 1 << 9, Scale(3 if symbol.endswith("JPY") else 5, 0))
