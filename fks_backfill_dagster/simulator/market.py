"""The synthetic crypto market: any symbol, any minute since its listing, deterministic.

A candle is a pure function of (seed, symbol, time). In scope too: the interface of markets that never close
for wire formats (`Market`), and paging.

Out of scope: generated minutes (`generator`), markets that close (`closing`), outages of providers, the
clock, HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Protocol

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_MINUTE, Timeframe
from fks_backfill_dagster.simulator import generator
from fks_backfill_dagster.simulator.bars import Bars, Scale, Step, aggregate, concat
from fks_backfill_dagster.simulator.generator import CHUNK, Profile, as_of, nothing

LISTED = 17_167 * MICROS_PER_DAY
"""2017-01-01T00:00Z: the default listing time."""

NO_END = 2**62
"""An instant after every other one: the end of a live market."""

QUOTES = ("FDUSD", "USDT", "USDC", "BUSD", "TUSD", "BTC", "ETH", "BNB", "EUR", "GBP", "TRY", "BRL", "JPY")
UNKNOWN_BASES = frozenset({"NOPE", "UNKNOWN", "INVALID", "DOESNOTEXIST"})

NO_HALT = RangeSet()

_VOLUME_DIGITS = 5
_MINUTE = Step(MICROS_PER_MINUTE)
# Ticks and digits of the main symbols; those of other symbols are derived from the name.
_MAJORS = {
    "BTCUSDT": (3_000_000, 2),
    "ETHUSDT": (200_000, 2),
    "BNBUSDT": (300_000, 3),
    "SOLUSDT": (80_000, 3),
    "XRPUSDT": (60_000, 5),
}


class Market(Protocol):
    """Candles of symbols, for wire formats. Symbols have no separator."""

    def has_symbol(self, symbol: str) -> bool: ...

    def listing(self, symbol: str) -> TimeRange:
        """From the first candle's open to the end of the last one's (`NO_END` for a live market)."""
        ...

    def symbols(self) -> tuple[str, ...]:
        """Available symbols: all of a replay, a few examples of the synthetic market."""
        ...

    def bars(self, symbol: str, step: Step, window: TimeRange, now: int, halts: RangeSet) -> Bars:
        """The candles that open in `window` and not after `now`; the last one may be forming.

        The minutes of a halt have no trades: a candle of such minutes only is absent, other candles
        aggregate the remaining minutes. Outages of providers are applied by `state`.
        """
        ...

    def truth(
        self,
        symbol: str,
        timeframe: Timeframe,
        window: TimeRange,
        *,
        now: int = NO_END,
        halts: RangeSet = NO_HALT,
    ) -> Candles:
        """The closed candles that open in `window`, aggregated from all trades."""
        ...


@dataclass(frozen=True, slots=True)
class SyntheticMarket:
    """The deterministic market. `listed` overrides LISTED: pairs (symbol, instant)."""

    seed: int = 1
    listed: tuple[tuple[str, int], ...] = ()

    def has_symbol(self, symbol: str) -> bool:
        """A symbol is a base of at least two of A-Z 0-9 and a quote of QUOTES; a few bases are unknown."""
        if not re.fullmatch(r"[A-Z0-9]{3,20}", symbol):
            return False
        quote = next((q for q in QUOTES if symbol.endswith(q)), None)
        if quote is None:
            return False
        base = symbol.removesuffix(quote)
        return len(base) >= 2 and base not in UNKNOWN_BASES

    def symbols(self) -> tuple[str, ...]:
        return tuple(_MAJORS)

    def listing(self, symbol: str) -> TimeRange:
        return TimeRange(dict(self.listed).get(symbol, LISTED), NO_END)

    def bars(self, symbol: str, step: Step, window: TimeRange, now: int, halts: RangeSet) -> Bars:
        listed = self.listing(symbol).start
        start = max(step.ceil(window.start), step.floor(listed))
        end = min(step.ceil(window.end), step.floor(now) + step.length)
        if start >= end:
            return nothing(_profile(self.seed, symbol))
        width = max(CHUNK // step.length, 1) * step.length
        return concat(
            [
                self._chunk(symbol, step, TimeRange(max(at, listed), min(at + width, end)), now, halts)
                for at in range(start, end, width)
                if min(at + width, end) > listed
            ]
        )

    def _chunk(self, symbol: str, step: Step, span: TimeRange, now: int, halts: RangeSet) -> Bars:
        profile = _profile(self.seed, symbol)
        minutes = generator.minutes(profile, TimeRange(_MINUTE.ceil(span.start), span.end))
        if now < span.end:
            minutes = as_of(minutes, now)
        if halts:
            minutes = minutes.take(~halts.contains(minutes.ts))
        return minutes if step == _MINUTE else aggregate(minutes, step)

    def truth(
        self,
        symbol: str,
        timeframe: Timeframe,
        window: TimeRange,
        *,
        now: int = NO_END,
        halts: RangeSet = NO_HALT,
    ) -> Candles:
        return closed(self, symbol, Step.of(timeframe), window, now, halts).candles()


def closed(market: Market, symbol: str, step: Step, window: TimeRange, now: int, halts: RangeSet) -> Bars:
    """The candles of `window` that are complete at `now`."""
    end = min(window.end, step.floor(now))
    return market.bars(symbol, step, TimeRange(min(window.start, end), end), now, halts)


def oldest(read: Callable[[TimeRange], Bars], length: int, window: TimeRange, limit: int) -> Bars:
    """The first `limit` candles of `window`, however far apart they are.

    `read` returns the candles that open in a range, `length` is their length. The range doubles with each read, so
    that a long outage takes few reads.
    """
    blocks, found, at, width = [read(TimeRange(window.start, window.start))], 0, window.start, limit
    while found < limit and at < window.end:
        block = read(TimeRange(at, min(at + width * length, window.end)))
        blocks.append(block)
        found, at, width = found + len(block), at + width * length, width * 2
    return concat(blocks).take(slice(0, limit))


def newest(read: Callable[[TimeRange], Bars], length: int, window: TimeRange, limit: int) -> Bars:
    """The last `limit` candles of `window`, ascending."""
    blocks, found, at, width = [read(TimeRange(window.end, window.end))], 0, window.end, limit
    while found < limit and at > window.start:
        block = read(TimeRange(max(at - width * length, window.start), at))
        blocks.insert(0, block)
        found, at, width = found + len(block), at - width * length, width * 2
    return concat(blocks).take(slice(max(found - limit, 0), None))


@lru_cache(maxsize=4096)
def _profile(seed: int, symbol: str) -> Profile:
    key = int.from_bytes(blake2b(f"{seed}:{symbol}".encode(), digest_size=8).digest(), "little")
    drawn = 100_000 * (1 + key % 89), 2 + (key >> 8) % 4
    ticks, digits = _MAJORS.get(symbol, drawn)
    return Profile(key, ticks, 1 << (20 + (key >> 16) % 6), Scale(digits, _VOLUME_DIGITS))
