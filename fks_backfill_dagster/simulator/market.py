"""The synthetic crypto market: any symbol, any minute since its listing, the same for ever.

A candle is a pure function of (seed, symbol, time). Also here: what a market that never closes is
to the wire formats (`Market`), and paging through one.

Not here: how minutes are made up (`generator`), markets that close (`closing`), outages of providers,
the clock, anything of HTTP. They are passed in or live elsewhere.
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
"""2017-01-01T00:00Z: where every symbol begins unless told otherwise."""

FOR_EVER = 2**62
"""An instant after every other one: the end of a market that goes on."""

QUOTES = ("FDUSD", "USDT", "USDC", "BUSD", "TUSD", "BTC", "ETH", "BNB", "EUR", "GBP", "TRY", "BRL", "JPY")
UNKNOWN_BASES = frozenset({"NOPE", "UNKNOWN", "INVALID", "DOESNOTEXIST"})

NO_HALT = RangeSet()

_VOLUME_DIGITS = 5
_MINUTE = Step(MICROS_PER_MINUTE)
# Ticks and digits of the symbols people look at first; all others are drawn from their name.
_MAJORS = {
    "BTCUSDT": (3_000_000, 2),
    "ETHUSDT": (200_000, 2),
    "BNBUSDT": (300_000, 3),
    "SOLUSDT": (80_000, 3),
    "XRPUSDT": (60_000, 5),
}


class Market(Protocol):
    """Candles of symbols, as a wire format asks for them. Symbols are written without separator."""

    def knows(self, symbol: str) -> bool: ...

    def listing(self, symbol: str) -> TimeRange:
        """From the first candle's open to the end of the last one's (`FOR_EVER` for a live market)."""
        ...

    def symbols(self) -> tuple[str, ...]:
        """Some symbols it knows: all of a replay, the well-known ones of the synthetic market."""
        ...

    def bars(self, symbol: str, step: Step, window: TimeRange, now: int, halts: RangeSet) -> Bars:
        """The candles that open in `window` and not after `now`; the last one may be forming.

        In the minutes of a halt nobody trades: a candle made only of them is absent, another one
        aggregates the rest. Outages of a provider are not the market's (`state`).
        """
        ...

    def truth(
        self,
        symbol: str,
        timeframe: Timeframe,
        window: TimeRange,
        *,
        now: int = FOR_EVER,
        halts: RangeSet = NO_HALT,
    ) -> Candles:
        """The closed candles that open in `window`, made of all that was traded."""
        ...


@dataclass(frozen=True, slots=True)
class SyntheticMarket:
    """The deterministic market. `listed` overrides LISTED: pairs (symbol, instant)."""

    seed: int = 1
    listed: tuple[tuple[str, int], ...] = ()

    def knows(self, symbol: str) -> bool:
        """Symbols are a base of two or more of A-Z 0-9 and a quote of QUOTES; a few bases are unknown."""
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
        return TimeRange(dict(self.listed).get(symbol, LISTED), FOR_EVER)

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
        now: int = FOR_EVER,
        halts: RangeSet = NO_HALT,
    ) -> Candles:
        return closed(self, symbol, Step.of(timeframe), window, now, halts).candles()


def closed(market: Market, symbol: str, step: Step, window: TimeRange, now: int, halts: RangeSet) -> Bars:
    """The candles of `window` that are complete at `now`."""
    end = min(window.end, step.floor(now))
    return market.bars(symbol, step, TimeRange(min(window.start, end), end), now, halts)


def oldest(read: Callable[[TimeRange], Bars], length: int, window: TimeRange, limit: int) -> Bars:
    """The first `limit` candles of `window`, however far apart they are.

    `read` gives the candles that open in a range, `length` is theirs. Each try is twice as wide as the one before, so
    that a long outage costs a few of them.
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
