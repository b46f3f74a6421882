"""The expected grid: which candles should exist, when each opens and closes.

Belongs here: the three kinds of market (crypto, stocks, forex), each as arithmetic over arrays.
Does not belong here: stored candles, gaps and their causes (`ledger.gaps`), listing times.

A grid is an ascending list of opens, too long to hold in memory for minutes of many years. So it is stored as
blocks of equidistant opens (one block is a trading session, or one candle where candles are days or
weeks), and the n-th open, or the number of opens before an instant, is found by bisection.

Calendars are loaded when a grid is first requested, and cached. They cover 1970 to 2049, or the part of it
that the calendar defines: nothing is expected before, and `closed_end` raises after, so that an exhausted
calendar is an error instead of "nothing more to fetch".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Protocol
from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import (
    FIRST_MONDAY,
    MICROS_PER_DAY,
    MICROS_PER_HOUR,
    MICROS_PER_MINUTE,
    MICROS_PER_WEEK,
    Timeframe,
    iso,
)

# A fixed span rather than "until a year from now", so that the grid does not depend on a clock.
FIRST_DATE, LAST_DATE = "1970-01-01", "2049-12-31"

_NEW_YORK = ZoneInfo("America/New_York")


class Grid(Protocol):
    """The expected candles of one (asset class, calendar, timeframe).

    Opens ascend strictly, closes weakly, and a candle closes after it opens.
    """

    def opens(self, window: TimeRange) -> Instants:
        """The expected opens `window.start <= ts < window.end`, ascending."""
        ...

    def count(self, window: TimeRange) -> int:
        """`len(opens(window))`, without building the array."""
        ...

    def rank(self, instants: Instants) -> Instants:
        """How many expected opens lie before each instant, counted from a fixed origin.

        Two expected opens are neighbours in the grid when their ranks differ by one.
        """
        ...

    def at(self, ranks: Instants) -> Instants:
        """The expected open of each rank: the inverse of `rank`."""
        ...

    def closes(self, opens: Instants) -> Instants:
        """The close of each expected open; undefined for any other instant."""
        ...

    def next_open(self, instant: int) -> int | None:
        """The first expected open at or after an instant; None beyond the end of the calendar."""
        ...

    def previous_open(self, instant: int) -> int | None:
        """The last expected open before an instant; None before the first one of the grid."""
        ...

    def holds_session(self, first: Instants, last: Instants) -> NDArray[np.bool_]:
        """For runs of expected opens from rank `first` to rank `last`: whether they contain a whole trading
        session of an exchange (with a lunch break: a whole half of one)."""
        ...

    def closed_end(self, now: int) -> int:
        """The open of the first expected candle that is not closed at `now`; all before it are closed.

        So it is an exclusive bound, it moves only when a candle closes, and over a weekend it lies
        in the future. `now` is already reduced by the grace. Raises ValueError if the calendar ends
        before it.
        """
        ...

    def contains(self, instants: Instants) -> NDArray[np.bool_]:
        """For each instant whether it is an expected open."""
        ...

    def on_clock(self, instants: Instants) -> NDArray[np.bool_]:
        """For each instant whether a candle could open there if the market traded at all times.

        True for every expected open, and for a bar outside the session (pre-market, a holiday).
        """
        ...


def grid_of(series: Series) -> Grid:
    """The grid of a series; built once per (asset class, timeframe, calendar).

    Raises ValueError for a calendar that is unknown or cannot be built.
    """
    calendar = series.calendar if series.asset_class is AssetClass.STOCKS else ""
    return _grid(series.asset_class, series.timeframe, calendar)


@cache
def _grid(asset_class: AssetClass, timeframe: Timeframe, calendar: str) -> Grid:
    match asset_class:
        case AssetClass.CRYPTO:
            return _EvenGrid(timeframe.micros, FIRST_MONDAY if timeframe is Timeframe.W1 else 0)
        case AssetClass.STOCKS:
            return _stocks(sessions_of(calendar), timeframe)
        case AssetClass.FOREX:
            return _forex(timeframe)


@dataclass(frozen=True, slots=True)
class _EvenGrid:
    """Every `anchor + n * step`: a market that never closes."""

    step: int
    anchor: int

    def opens(self, window: TimeRange) -> Instants:
        first, past = (self._rank(instant) for instant in (window.start, window.end))
        return np.arange(first, past, dtype=np.int64) * self.step + self.anchor

    def count(self, window: TimeRange) -> int:
        return self._rank(window.end) - self._rank(window.start)

    def _rank(self, instant: int) -> int:
        return -((self.anchor - instant) // self.step)

    def rank(self, instants: Instants) -> Instants:
        return -((self.anchor - instants) // self.step)

    def at(self, ranks: Instants) -> Instants:
        return ranks * self.step + self.anchor

    def closes(self, opens: Instants) -> Instants:
        return opens + self.step

    def next_open(self, instant: int) -> int | None:
        return self._rank(instant) * self.step + self.anchor

    def previous_open(self, instant: int) -> int | None:
        return (self._rank(instant) - 1) * self.step + self.anchor

    def holds_session(self, first: Instants, last: Instants) -> NDArray[np.bool_]:
        return np.zeros(len(first), dtype=bool)

    def closed_end(self, now: int) -> int:
        return now - (now - self.anchor) % self.step

    def contains(self, instants: Instants) -> NDArray[np.bool_]:
        on_clock: NDArray[np.bool_] = (instants - self.anchor) % self.step == 0
        return on_clock

    def on_clock(self, instants: Instants) -> NDArray[np.bool_]:
        return self.contains(instants)


@dataclass(frozen=True, eq=False)
class _BlockGrid:
    """Blocks of equidistant opens: block k contains `first[k] + n * step` for n in 0 .. slots[k] - 1.

    Blocks ascend and do not overlap; none is empty. `last_close[k]` is the close of the block's
    last candle; every other candle closes where the next one opens. `source` names the calendar. `sessions`:
    blocks are trading sessions of an exchange (for days and weeks: every candle is one session or more).
    """

    source: str
    step: int
    first: Instants
    slots: Instants
    last_close: Instants
    sessions: bool = False
    before: Instants = field(init=False)  # before[k]: opens in all blocks before k; one longer than `first`

    def __post_init__(self) -> None:
        object.__setattr__(self, "before", np.concatenate([[0], np.cumsum(self.slots)]))

    def opens(self, window: TimeRange) -> Instants:
        low, high = self._ranks(window)
        if low == high:
            return np.empty(0, dtype=np.int64)
        a = int(np.searchsorted(self.before, low, side="right")) - 1
        b = int(np.searchsorted(self.before, high, side="left"))
        # The n-th open of the grid, in block k, is first[k] + (n - before[k]) * step.
        origins = np.repeat(self.first[a:b] - self.before[a:b] * self.step, self.slots[a:b])
        skip = low - int(self.before[a])
        return origins[skip : skip + high - low] + np.arange(low, high, dtype=np.int64) * self.step

    def count(self, window: TimeRange) -> int:
        low, high = self._ranks(window)
        return high - low

    def _ranks(self, window: TimeRange) -> tuple[int, int]:
        low, high = self.rank(np.array([window.start, window.end], dtype=np.int64)).tolist()
        return low, high

    def rank(self, instants: Instants) -> Instants:
        block = self._block(instants)
        passed = -((self.first[block] - instants) // self.step)
        ranks: Instants = self.before[block] + np.clip(passed, 0, self.slots[block])
        return ranks

    def at(self, ranks: Instants) -> Instants:
        block = np.searchsorted(self.before, ranks, side="right") - 1
        opens: Instants = self.first[block] + (ranks - self.before[block]) * self.step
        return opens

    def closes(self, opens: Instants) -> Instants:
        block = self._block(opens)
        is_last = opens == (self.first + (self.slots - 1) * self.step)[block]
        return np.where(is_last, self.last_close[block], opens + self.step)

    def next_open(self, instant: int) -> int | None:
        return self._at(int(self.rank(np.array([instant]))[0]))

    def previous_open(self, instant: int) -> int | None:
        return self._at(int(self.rank(np.array([instant]))[0]) - 1)

    def _at(self, rank: int) -> int | None:
        return int(self.at(np.array([rank]))[0]) if 0 <= rank < self.before[-1] else None

    def holds_session(self, first: Instants, last: Instants) -> NDArray[np.bool_]:
        if not self.sessions:
            return np.zeros(len(first), dtype=bool)
        # The first block that begins at or after the run's first open, if it ends by the run's last open.
        block = np.searchsorted(self.before, first, side="left")
        end = self.before[np.minimum(block + 1, len(self.before) - 1)]
        whole: NDArray[np.bool_] = (block < len(self.slots)) & (end <= last + 1)
        return whole

    def closed_end(self, now: int) -> int:
        block = int(np.searchsorted(self.last_close, now, side="right"))
        if block == len(self.first):
            raise ValueError(
                f"{self.source} is known up to {iso(int(self.last_close[-1]))} only, but it is "
                f"{iso(now)}: upgrade exchange-calendars"
            )
        first, last_slot = int(self.first[block]), int(self.slots[block]) - 1
        return first + min(max((now - first) // self.step, 0), last_slot) * self.step

    def contains(self, instants: Instants) -> NDArray[np.bool_]:
        block = self._block(instants)
        slot, rest = np.divmod(instants - self.first[block], self.step)
        found: NDArray[np.bool_] = (rest == 0) & (slot >= 0) & (slot < self.slots[block])
        return found

    def on_clock(self, instants: Instants) -> NDArray[np.bool_]:
        # Between two sessions the clock may have changed: both phases are valid there.
        block = self._block(instants)
        after = np.minimum(block + 1, len(self.first) - 1)
        fits: NDArray[np.bool_] = ((instants - self.first[block]) % self.step == 0) | (
            (instants - self.first[after]) % self.step == 0
        )
        return fits

    def _block(self, instants: Instants) -> NDArray[np.intp]:
        """The last block that opens at or before each instant; the first one where none does."""
        return np.maximum(np.searchsorted(self.first, instants, side="right") - 1, 0)


def _single(
    source: str, step: int, opens: Instants, closes: Instants, *, sessions: bool = False
) -> _BlockGrid:
    """A grid of days or weeks: every candle is its own block.

    A day is named by its date at 00:00 UTC, and a half-day in Auckland ends before that. Its candle
    gets a length of one minute, so that no candle closes before it opens.
    """
    closes = np.maximum(closes, opens + MICROS_PER_MINUTE)
    return _BlockGrid(source, step, opens, np.ones_like(opens), closes, sessions)


def _intraday(
    source: str,
    step: int,
    starts: Instants,
    ends: Instants,
    offsets: Instants,
    *,
    sessions: bool = False,
) -> _BlockGrid:
    """Bars on multiples of `step` of the local clock (UTC + offset) that overlap a session.

    Sessions ascend and do not overlap. Two of them can share a bar (a lunch break inside a 4h bar,
    the hour between two futures sessions): it belongs to the earlier one. A bar closes on the clock,
    or with the last session in it if that ends earlier.
    """
    first = (starts + offsets) // step * step - offsets
    past = -(-(ends + offsets) // step) * step - offsets
    taken = np.concatenate([first[:1], past[:-1]])
    first = first + np.maximum(-((first - taken) // step), 0) * step
    slots = (past - first) // step
    last_close = np.minimum(past, ends[np.searchsorted(starts, past, side="left") - 1])
    kept = slots > 0
    return _BlockGrid(source, step, first[kept], slots[kept], last_close[kept], sessions)


@dataclass(frozen=True, slots=True, eq=False)
class Sessions:
    """The sessions of an exchange calendar.

    `dates` (00:00 UTC of the session's date) and `closes` have one element per session. `starts`,
    `ends`, `offsets` (local clock minus UTC) and `days` (the session's date again) have one per period
    of trading: a session with a lunch break has two.
    """

    calendar: str
    dates: Instants
    closes: Instants
    starts: Instants
    ends: Instants
    offsets: Instants
    days: Instants


def _stocks(sessions: Sessions, timeframe: Timeframe) -> Grid:
    source = f"the exchange calendar {sessions.calendar}"
    if timeframe.is_intraday:
        return _intraday(
            source, timeframe.micros, sessions.starts, sessions.ends, sessions.offsets, sessions=True
        )
    if timeframe is Timeframe.D1:
        return _single(source, timeframe.micros, sessions.dates, sessions.closes, sessions=True)
    mondays = sessions.dates - (sessions.dates - FIRST_MONDAY) % MICROS_PER_WEEK
    # The last known week is excluded: its later sessions may be unknown.
    ends_week = np.flatnonzero(mondays[1:] != mondays[:-1])
    return _single(source, timeframe.micros, mondays[ends_week], sessions.closes[ends_week], sessions=True)


@cache
def sessions_of(calendar: str) -> Sessions:
    """The sessions of an exchange calendar as its library defines them; built once.

    Raises ValueError for a calendar that is unknown or cannot be built.
    """
    # Imported here: the import takes half a second, which a crypto backfill does not need.
    import exchange_calendars
    import pandas as pd
    from exchange_calendars.errors import CalendarError, InvalidCalendarName

    try:
        # A month that every calendar covers, to read its bounds: its own default span takes up to two seconds.
        known = exchange_calendars.get_calendar(calendar, start="2024-01-01", end="2024-01-31")
        if _is_ignored(known.day, renamed=hasattr(pd.tseries.offsets.BaseOffset, "_add_datetime")):
            raise NotImplementedError("pandas ignores the calendar's own weeks")
        start = max(pd.Timestamp(FIRST_DATE), known.bound_min() or pd.Timestamp.min)
        end = min(pd.Timestamp(LAST_DATE), known.bound_max() or pd.Timestamp.max)
        whole = exchange_calendars.get_calendar(calendar, start=start, end=end)
    except InvalidCalendarName as error:
        raise ValueError(
            f"there is no exchange calendar {calendar!r}; give the name of one of exchange_calendars, "
            "such as XNYS, XLON or XTKS"
        ) from error
    except (CalendarError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"the exchange calendar {calendar!r} cannot be built by exchange-calendars"
            f" {exchange_calendars.__version__} with pandas {pd.__version__} ({_brief(error)}); install the versions"
            " that fks-backfill requires (pandas below 3.1), or configure another calendar"
        ) from error

    table = whole.schedule
    opens, break_starts, break_ends, closes = (
        _micros(pd.DatetimeIndex(table[column])) for column in ("open", "break_start", "break_end", "close")
    )
    has_break = table["break_start"].notna().to_numpy()
    starts = np.concatenate([opens, break_ends[has_break]])
    ends = np.concatenate([np.where(has_break, break_starts, closes), closes[has_break]])
    order = np.argsort(starts)
    starts, ends = starts[order], ends[order]
    local = pd.DatetimeIndex(starts.view("datetime64[us]")).tz_localize("UTC").tz_convert(whole.tz)
    dates = _micros(table.index)
    days = np.concatenate([dates, dates[has_break]])[order]
    return Sessions(calendar, dates, closes, starts, ends, _micros(local) - starts, days)


def _is_ignored(day: object, *, renamed: bool) -> bool:
    """Whether pandas would compute sessions without `day`, the calendar's own rule for them.

    `renamed`: from 3.1 on pandas calls `_add_datetime` of an offset, or no method, instead of `_apply`.
    A calendar with other weeks in the past (Saturdays in Seoul, Sundays in Tel Aviv) overrides `_apply`, and would be
    built with the present weeks, without an error.
    """
    from pandas.tseries.offsets import CustomBusinessDay

    own = [kind for kind in type(day).__mro__ if kind not in CustomBusinessDay.__mro__]
    return renamed and any("_apply" in vars(kind) for kind in own)


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _forex(timeframe: Timeframe) -> Grid:
    """Sunday 17:00 to Friday 17:00 New York, holidays included.

    Summer time begins and ends on Sundays at 02:00, between two sessions: it shifts whole sessions in
    UTC and does not change them inside.
    """
    import pandas as pd

    end = np.datetime64(LAST_DATE, "us").astype(np.int64)
    sundays = np.arange(FIRST_MONDAY - MICROS_PER_DAY, end, MICROS_PER_WEEK)
    wall = sundays[:, None] + np.arange(6) * MICROS_PER_DAY + 17 * MICROS_PER_HOUR
    naive = pd.DatetimeIndex(wall.ravel().view("datetime64[us]"))
    # One row a week: 17:00 New York of Sunday, Monday .. Friday.
    fives = _micros(naive.tz_localize(_NEW_YORK).tz_convert("UTC")).reshape(-1, 6)

    source, step = "the forex calendar", timeframe.micros
    if timeframe is Timeframe.D1:
        return _single(source, step, fives[:, :5].ravel(), fives[:, 1:].ravel())
    starts, ends = fives[:, 0], fives[:, 5]
    if timeframe is Timeframe.W1:
        return _single(source, step, starts, ends)
    return _intraday(source, step, starts, ends, np.zeros_like(starts))


def _micros(moments: object) -> Instants:
    """The wall clock of a DatetimeIndex, aware or naive and of any unit, in microseconds; undefined for NaT."""
    import pandas as pd

    index = pd.DatetimeIndex(moments).tz_localize(None)  # type: ignore[arg-type]
    return index.to_numpy().astype("datetime64[us]").view(np.int64)
