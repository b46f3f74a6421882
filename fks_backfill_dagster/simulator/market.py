"""The synthetic market: any symbol, any minute since its listing, the same for ever.

A candle is a pure function of (seed, symbol, time): no state, no history to walk through. All of
it is integer arithmetic on a counter-based generator, so it is the same in every process and on
every machine. Also here: what a market is to the wire formats (`Market`), and paging through one.

Not here: planted outages, the clock, anything of HTTP. They are passed in or live elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_MINUTE, Timeframe
from fks_backfill_dagster.simulator.bars import Bars, Scale, Step, Units, aggregate, concat

LISTED = 17_167 * MICROS_PER_DAY
"""2017-01-01T00:00Z: where every symbol begins unless told otherwise."""

FOR_EVER = 2**62
"""An instant after every other one: the end of a market that goes on."""

QUOTES = ("FDUSD", "USDT", "USDC", "BUSD", "TUSD", "BTC", "ETH", "BNB", "EUR", "GBP", "TRY", "BRL", "JPY")
UNKNOWN_BASES = frozenset({"NOPE", "UNKNOWN", "INVALID", "DOESNOTEXIST"})

NO_OUTAGE = RangeSet()

_MINUTES_PER_DAY = 1440
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
# Slow waves and daily noise of the price around its level: (days, amplitude in millionths). The
# amplitudes sum to 0.55, so a price never falls below 0.45 of its level before the walk within
# the day, and that one stays within 0.23 of the day's own price: prices are positive by construction.
_WAVES = ((600, 250_000), (150, 150_000), (40, 80_000), (10, 40_000), (2, 20_000), (1, 10_000))
_STEP_DIVISOR = 400_000  # of 128: at most 3.2 basis points a minute
_WICK_DIVISOR = 1_500_000  # of 255: at most 1.7 basis points beyond open and close
_CHUNK = 64 * MICROS_PER_DAY  # what is generated at once: bounds memory for years of daily candles


class Market(Protocol):
    """Candles of symbols, as a wire format asks for them. Symbols are written without separator."""

    def knows(self, symbol: str) -> bool: ...

    def listing(self, symbol: str) -> TimeRange:
        """From the first candle's open to the end of the last one's (`FOR_EVER` for a live market)."""
        ...

    def symbols(self) -> tuple[str, ...]:
        """Some symbols it knows: all of a replay, the well-known ones of the synthetic market."""
        ...

    def bars(self, symbol: str, step: Step, window: TimeRange, now: int, outages: RangeSet) -> Bars:
        """The candles that open in `window` and not after `now`; the last one may be forming.

        Minutes of an outage do not exist: a candle made only of them is absent, another one
        aggregates the rest.
        """
        ...

    def truth(
        self,
        symbol: str,
        timeframe: Timeframe,
        window: TimeRange,
        *,
        now: int = FOR_EVER,
        outages: RangeSet = NO_OUTAGE,
    ) -> Candles:
        """The closed candles that open in `window`: what an honest provider would have given."""
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

    def bars(self, symbol: str, step: Step, window: TimeRange, now: int, outages: RangeSet) -> Bars:
        listed = self.listing(symbol).start
        start = max(step.ceil(window.start), step.floor(listed))
        end = min(step.ceil(window.end), step.floor(now) + step.length)
        if start >= end:
            return _nothing(_profile(self.seed, symbol))
        width = max(_CHUNK // step.length, 1) * step.length
        return concat(
            [
                self._chunk(symbol, step, TimeRange(max(at, listed), min(at + width, end)), now, outages)
                for at in range(start, end, width)
                if min(at + width, end) > listed
            ]
        )

    def _chunk(self, symbol: str, step: Step, span: TimeRange, now: int, outages: RangeSet) -> Bars:
        profile = _profile(self.seed, symbol)
        minutes = _minutes(profile, TimeRange(_MINUTE.ceil(span.start), span.end))
        if now < span.end:
            minutes = _as_of(minutes, now)
        if outages:
            minutes = minutes.take(~outages.contains(minutes.ts))
        return minutes if step == _MINUTE else aggregate(minutes, step)

    def truth(
        self,
        symbol: str,
        timeframe: Timeframe,
        window: TimeRange,
        *,
        now: int = FOR_EVER,
        outages: RangeSet = NO_OUTAGE,
    ) -> Candles:
        return closed(self, symbol, Step.of(timeframe), window, now, outages).candles()


def closed(market: Market, symbol: str, step: Step, window: TimeRange, now: int, outages: RangeSet) -> Bars:
    """The candles of `window` that are complete at `now`."""
    end = min(window.end, step.floor(now))
    return market.bars(symbol, step, TimeRange(min(window.start, end), end), now, outages)


def oldest(read: Callable[[TimeRange], Bars], step: Step, window: TimeRange, limit: int) -> Bars:
    """The first `limit` candles of `window`, however far apart they are.

    `read` gives the candles that open in a range. Each try is twice as wide as the one before, so
    that a long outage costs a few of them.
    """
    blocks, found, at, width = [read(TimeRange(window.start, window.start))], 0, window.start, limit
    while found < limit and at < window.end:
        block = read(TimeRange(at, min(at + width * step.length, window.end)))
        blocks.append(block)
        found, at, width = found + len(block), at + width * step.length, width * 2
    return concat(blocks).take(slice(0, limit))


def newest(read: Callable[[TimeRange], Bars], step: Step, window: TimeRange, limit: int) -> Bars:
    """The last `limit` candles of `window`, ascending."""
    blocks, found, at, width = [read(TimeRange(window.end, window.end))], 0, window.end, limit
    while found < limit and at > window.start:
        block = read(TimeRange(max(at - width * step.length, window.start), at))
        blocks.insert(0, block)
        found, at, width = found + len(block), at - width * step.length, width * 2
    return concat(blocks).take(slice(max(found - limit, 0), None))


@dataclass(frozen=True, slots=True)
class _Profile:
    """What a symbol's name decides: generator key, price level in ticks, digits, volume level."""

    key: int
    ticks: int
    volume: int
    scale: Scale


@lru_cache(maxsize=4096)
def _profile(seed: int, symbol: str) -> _Profile:
    key = int.from_bytes(blake2b(f"{seed}:{symbol}".encode(), digest_size=8).digest(), "little")
    drawn = 100_000 * (1 + key % 89), 2 + (key >> 8) % 4
    ticks, digits = _MAJORS.get(symbol, drawn)
    return _Profile(key, ticks, 1 << (20 + (key >> 16) % 6), Scale(digits, _VOLUME_DIGITS))


def _nothing(profile: _Profile) -> Bars:
    none = np.empty(0, dtype=np.int64)
    return Bars(none, none, none, none, none, none, profile.scale)


def _mix(counters: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64: 64 good bits for every counter, with no state between them."""
    z = counters * np.uint64(0x9E3779B97F4A7C15)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def _draw(key: int, stream: int, indices: Units) -> NDArray[np.uint64]:
    return _mix(indices.view(np.uint64) + np.uint64((key + (stream << 56)) % 2**64))


def _anchors(profile: _Profile, days: Units) -> Units:
    """The price in ticks at 00:00 of each day: waves of several lengths, linear between their nodes."""
    millionths = np.full(len(days), 1_000_000, dtype=np.int64)
    for stream, (period, amplitude) in enumerate(_WAVES, start=1):
        node, into = np.divmod(days, period)
        here, there = (
            (_draw(profile.key, stream, n) % np.uint64(2 * amplitude + 1)).astype(np.int64) - amplitude
            for n in (node, node + 1)
        )
        millionths += (here * (period - into) + there * into) // period
    return profile.ticks * millionths // 1_000_000


def _minutes(profile: _Profile, span: TimeRange) -> Bars:
    """All minutes that open in `span`, which is on whole minutes.

    Whole days are made: a random walk from each day's anchor, bent so that it ends on the next one.
    """
    first, last = span.start // MICROS_PER_DAY, -(-span.end // MICROS_PER_DAY)
    days = last - first
    index = np.arange(first * _MINUTES_PER_DAY, last * _MINUTES_PER_DAY, dtype=np.int64)
    bits = _draw(profile.key, 0, index)

    def field(shift: int, mask: int) -> Units:
        return ((bits >> np.uint64(shift)) & np.uint64(mask)).astype(np.int64).reshape(days, -1)

    anchors = _anchors(profile, np.arange(first, last + 1, dtype=np.int64))
    here, move = anchors[:-1, None], np.diff(anchors)[:, None]
    walk = np.cumsum(field(0, 0xFF) - 128, axis=1)
    into = np.arange(1, _MINUTES_PER_DAY + 1, dtype=np.int64)
    bent = (walk * _MINUTES_PER_DAY - walk[:, -1:] * into) * here // (_MINUTES_PER_DAY * _STEP_DIVISOR)
    close = here + move * into // _MINUTES_PER_DAY + bent
    # The open is the previous close or a tick beside it: a market that is continuous, but in which
    # nobody can get the open right by copying the close.
    opened = np.concatenate([here, close[:, :-1]], axis=1) + field(40, 0xFF) % 3 - 1
    high = np.maximum(opened, close) + field(8, 0xFF) * here // _WICK_DIVISOR
    low = np.minimum(opened, close) - field(16, 0xFF) * here // _WICK_DIVISOR
    volume = 1 + (field(24, 0xFFFF) * field(48, 0xFF) * profile.volume >> 24)
    whole = Bars(
        index * MICROS_PER_MINUTE,
        opened.ravel(),
        high.ravel(),
        low.ravel(),
        close.ravel(),
        volume.ravel(),
        profile.scale,
    )
    return whole.within(span)


def _as_of(minutes: Bars, now: int) -> Bars:
    """What is known of ascending `minutes` at `now`: later ones are gone, the running one is partial.

    The running minute has gone the elapsed share of its way from open to close and of its volume;
    at the very moment it opens it has one unit of volume.
    """
    seen = minutes.within(TimeRange(min(0, now), now + 1))
    if len(seen) == 0 or now >= int(seen.ts[-1]) + MICROS_PER_MINUTE or seen.volume is None:
        return seen
    elapsed = now - int(seen.ts[-1])
    opened, volume = int(seen.open[-1]), int(seen.volume[-1])
    close = opened + (int(seen.close[-1]) - opened) * elapsed // MICROS_PER_MINUTE

    def ending_in(column: Units, value: int) -> Units:
        return np.concatenate([column[:-1], np.array([value], dtype=np.int64)])

    return Bars(
        seen.ts,
        seen.open,
        ending_in(seen.high, max(opened, close)),
        ending_in(seen.low, min(opened, close)),
        ending_in(seen.close, close),
        ending_in(seen.volume, max(volume * elapsed // MICROS_PER_MINUTE, 1)),
        seen.scale,
    )
