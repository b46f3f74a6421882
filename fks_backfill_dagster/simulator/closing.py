"""Markets that close: what one is to the wire formats, and the synthetic stocks and currencies.

A minute's candle is a pure function of (seed, symbol, time), as everywhere in the sandbox. Unlike
crypto, there is none outside the trading hours, and none in a quiet minute: in a few single minutes
and in some whole quarters of an hour nobody trades; before and after a stock's session hardly anybody.

Not here: how a wire format cuts bars (`frames`), replayed files (`replay_closing`).
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
from fks_backfill_dagster.domain.timeframe import MICROS_PER_MINUTE, Timeframe
from fks_backfill_dagster.simulator import generator
from fks_backfill_dagster.simulator.bars import Bars, Scale, concat
from fks_backfill_dagster.simulator.frames import Frame, fill, of_grid
from fks_backfill_dagster.simulator.generator import CHUNK, Profile
from fks_backfill_dagster.simulator.market import FOR_EVER, LISTED, UNKNOWN_BASES
from fks_backfill_dagster.simulator.sessions import stock_sessions
from fks_backfill_dagster.simulator.splits import Split, as_traded, of_symbol

_CODES = "AUD CAD CHF CNH EUR GBP HKD JPY MXN NOK NZD PLN SEK SGD TRY USD ZAR"
CURRENCIES = frozenset(_CODES.split())

# Parts of a thousand: minutes and quarters of an hour without a trade, and pre- and post-market
# minutes with one.
_QUIET_MINUTES, _QUIET_QUARTERS, _EXTENDED_MINUTES = 25, 4, 120
# Streams of the generator; those of prices are below ten.
_MINUTE_STREAM, _QUARTER_STREAM = 100, 101
_STOCK_VOLUME = 1 << 17  # shares a minute, at most


class ClosingMarket(Protocol):
    """Bars of stocks or of currency pairs. Symbols are written without separator."""

    @property
    def asset_class(self) -> AssetClass: ...

    def knows(self, symbol: str) -> bool: ...

    def symbols(self) -> tuple[str, ...]:
        """Some symbols it knows: all of a replay, the well-known ones of a synthetic market."""
        ...

    def listing(self, symbol: str) -> TimeRange:
        """From the first trade to the end of the last candle (`FOR_EVER` for a live market)."""
        ...

    def bars(self, symbol: str, frame: Frame, now: int, outages: RangeSet) -> Bars:
        """The bars of `frame` in which there was a trade before `now`; the last one may be forming.

        Prices are as traded. The volume of a currency pair counts ticks, or is None.
        """
        ...

    def truth(
        self, symbol: str, timeframe: Timeframe, window: TimeRange, now: int, outages: RangeSet
    ) -> Bars:
        """The closed candles of the project's grid that open in `window`: regular sessions only,
        prices as traded, volume in base units or None."""
        ...


@dataclass(frozen=True, slots=True)
class SyntheticClosing:
    """Made-up stocks or currency pairs. `listed` overrides LISTED: pairs (symbol, instant)."""

    asset_class: AssetClass
    seed: int = 1
    listed: tuple[tuple[str, int], ...] = ()
    splits: tuple[Split, ...] = ()

    def knows(self, symbol: str) -> bool:
        """Stocks are one to five letters, perhaps with a class (BRK.B), but for a few unknown names;
        currency pairs are two of CURRENCIES."""
        if self.asset_class is AssetClass.FOREX:
            return {symbol[:3], symbol[3:]} <= CURRENCIES and symbol[:3] != symbol[3:]
        return re.fullmatch(r"[A-Z]{1,5}(\.[A-Z])?", symbol) is not None and symbol not in UNKNOWN_BASES

    def symbols(self) -> tuple[str, ...]:
        if self.asset_class is AssetClass.FOREX:
            return ("EURUSD", "GBPUSD", "USDJPY")
        return ("AAPL", "MSFT", "GOOG")

    def listing(self, symbol: str) -> TimeRange:
        return TimeRange(dict(self.listed).get(symbol, LISTED), FOR_EVER)

    def bars(self, symbol: str, frame: Frame, now: int, outages: RangeSet) -> Bars:
        blocks = [generator.nothing(_profile(self.seed, symbol, self.asset_class))]
        listed = self.listing(symbol).start
        per_chunk = max(CHUNK // frame.length, 1)
        for at in range(0, len(frame), per_chunk):
            part = frame.take(slice(at, at + per_chunk))
            span = TimeRange(listed, max(listed, now + 1)).intersect(part.hull)
            if span:
                blocks.append(fill(self._minutes(symbol, span, now, outages, part.extended), part))
        return concat(blocks)

    def _minutes(self, symbol: str, span: TimeRange, now: int, outages: RangeSet, extended: bool) -> Bars:
        profile = _profile(self.seed, symbol, self.asset_class)
        whole = TimeRange(span.start, -(-span.end // MICROS_PER_MINUTE) * MICROS_PER_MINUTE)
        minutes = generator.minutes(profile, whole)
        minutes = minutes.take(self._trades(profile, minutes.ts, extended))
        if now < whole.end:
            minutes = generator.as_of(minutes, now)
        if outages:
            minutes = minutes.take(~outages.contains(minutes.ts))
        return as_traded(minutes, of_symbol(self.splits, symbol))

    def _trades(self, profile: Profile, ts: Instants, extended: bool) -> NDArray[np.bool_]:
        """The minutes in which anybody trades."""
        luck, quarter = (
            (generator.draw(profile.key, stream, ts // MICROS_PER_MINUTE // of) % np.uint64(1000)).astype(int)
            for stream, of in ((_MINUTE_STREAM, 1), (_QUARTER_STREAM, 15))
        )
        awake: NDArray[np.bool_] = (luck >= _QUIET_MINUTES) & (quarter >= _QUIET_QUARTERS)
        if self.asset_class is AssetClass.FOREX:
            return awake & grid_of(Series("", Timeframe.M1, AssetClass.FOREX)).contains(ts)
        sessions = stock_sessions()
        regular = awake & sessions.regular(ts)
        if not extended:
            return regular
        outside = sessions.trading(ts) & ~sessions.regular(ts) & (luck < _EXTENDED_MINUTES)
        both: NDArray[np.bool_] = regular | outside
        return both

    def truth(
        self, symbol: str, timeframe: Timeframe, window: TimeRange, now: int, outages: RangeSet
    ) -> Bars:
        # The candle of the first trade may open before it.
        known = TimeRange(self.listing(symbol).start - Timeframe.W1.micros, FOR_EVER)
        frame = truth_frame(self.asset_class, timeframe, window.intersect(known), now)
        found = self.bars(symbol, frame, now, outages)
        return replace(found, volume=None) if self.asset_class is AssetClass.FOREX else found


def truth_frame(asset_class: AssetClass, timeframe: Timeframe, window: TimeRange, now: int) -> Frame:
    """The project's own candles that open in `window` and are closed at `now`."""
    grid = grid_of(Series("", timeframe, asset_class))
    end = max(window.start, min(window.end, grid.closed_end(now)))
    return of_grid(grid, timeframe.micros, TimeRange(window.start, end))


@lru_cache(maxsize=4096)
def _profile(seed: int, symbol: str, asset_class: AssetClass) -> Profile:
    """Stocks cost 50 to 500 and have two digits. Pairs have five digits, three where yen are the price."""
    named = f"{seed}:{asset_class}:{symbol}"
    key = int.from_bytes(blake2b(named.encode(), digest_size=8).digest(), "little")
    if asset_class is AssetClass.STOCKS:
        return Profile(key, 5_000 + key % 45_000, _STOCK_VOLUME, Scale(2, 0))
    return Profile(key, 80_000 + key % 70_000, 1 << 9, Scale(3 if symbol.endswith("JPY") else 5, 0))
