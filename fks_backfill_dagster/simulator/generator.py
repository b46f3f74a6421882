"""Synthetic minutes: a random walk that is a pure function of (key, time).

Integer arithmetic on a counter-based generator: no state, no history to iterate over, the same in every
process and on every machine. The generator makes every minute; market hours and minutes without trades
are applied by the markets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_MINUTE
from fks_backfill_dagster.simulator.bars import Bars, Scale, Units

CHUNK = 64 * MICROS_PER_DAY
"""Time that a market generates at once: bounds memory for years of daily candles."""

_MINUTES_PER_DAY = 1440
# Slow waves and daily noise of the price around its level: (days, amplitude in millionths). The
# amplitudes sum to 0.55, so a price never falls below 0.45 of its level before the walk within
# the day, and that walk stays within 0.23 of the day's own price: prices are positive by construction.
_WAVES = ((600, 250_000), (150, 150_000), (40, 80_000), (10, 40_000), (2, 20_000), (1, 10_000))
_STEP_DIVISOR = 400_000  # of 128: at most 3.2 basis points a minute
_WICK_DIVISOR = 1_500_000  # of 255: at most 1.7 basis points beyond open and close


@dataclass(frozen=True, slots=True)
class Profile:
    """Parameters derived from a symbol's name: generator key, price level in ticks, digits, volume level.

    A minute's volume is less than `volume` units.
    """

    key: int
    ticks: int
    volume: int
    scale: Scale


def nothing(profile: Profile) -> Bars:
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


def draw(key: int, stream: int, indices: Units) -> NDArray[np.uint64]:
    """64 random bits for every index; streams (0 to 255) are independent of each other."""
    return _mix(indices.view(np.uint64) + np.uint64((key + (stream << 56)) % 2**64))


def _anchors(profile: Profile, days: Units) -> Units:
    """The price in ticks at 00:00 of each day: waves of several lengths, linear between their nodes."""
    millionths = np.full(len(days), 1_000_000, dtype=np.int64)
    for stream, (period, amplitude) in enumerate(_WAVES, start=1):
        node, into = np.divmod(days, period)
        here, there = (
            (draw(profile.key, stream, n) % np.uint64(2 * amplitude + 1)).astype(np.int64) - amplitude
            for n in (node, node + 1)
        )
        millionths += (here * (period - into) + there * into) // period
    return profile.ticks * millionths // 1_000_000


def minutes(profile: Profile, span: TimeRange) -> Bars:
    """All minutes that open in `span`, whose edges are whole minutes.

    Whole days are generated: a random walk from each day's anchor, adjusted to end on the next anchor.
    """
    first, last = span.start // MICROS_PER_DAY, -(-span.end // MICROS_PER_DAY)
    days = last - first
    index = np.arange(first * _MINUTES_PER_DAY, last * _MINUTES_PER_DAY, dtype=np.int64)
    bits = draw(profile.key, 0, index)

    def field(shift: int, mask: int) -> Units:
        return ((bits >> np.uint64(shift)) & np.uint64(mask)).astype(np.int64).reshape(days, -1)

    anchors = _anchors(profile, np.arange(first, last + 1, dtype=np.int64))
    here, move = anchors[:-1, None], np.diff(anchors)[:, None]
    walk = np.cumsum(field(0, 0xFF) - 128, axis=1)
    into = np.arange(1, _MINUTES_PER_DAY + 1, dtype=np.int64)
    bent = (walk * _MINUTES_PER_DAY - walk[:, -1:] * into) * here // (_MINUTES_PER_DAY * _STEP_DIVISOR)
    close = here + move * into // _MINUTES_PER_DAY + bent
    # The open is within a tick of the previous close: the market is continuous, but an open that is copied
    # from the previous close is detectable.
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


def as_of(minutes: Bars, now: int) -> Bars:
    """The ascending `minutes` as of `now`: without later ones, the running one partial.

    Close and volume of the running minute are the elapsed share of its move and its volume; at its
    open it has one unit of volume.
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
