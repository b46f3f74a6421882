"""Corporate actions: splits of stocks, as data of their own. Prices are stored as traded, and adjusted when read.

Belongs here: an action, the rules for a valid one, and the comparison of what several providers report.
Does not belong here: which candles an action adjusts (the function `fks.ohlcv_adjusted`), where actions come from
(`providers`, `files`), their storage (`store`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, time, timedelta
from enum import StrEnum
from functools import cache
from itertools import groupby
from typing import Final
from zoneinfo import ZoneInfo

from fks_backfill_dagster.domain.series import AssetClass, Instrument

FILE: Final = "file"
"""The provider of actions that a person imported. Where it reports an action, no other provider counts."""

SAME_ACTION = timedelta(days=7)
"""Reports of different providers that are not further apart can be one action: providers differ about dates."""

# No split of record is beyond; a larger number is a mistake, and would exceed a double in a product.
LARGEST_RATIO = 1_000_000.0
_FIRST, _PAST = date(1900, 1, 1), date(2100, 1, 1)
# 1/3 has other digits at each provider.
_EQUAL = 1e-4


class ActionKind(StrEnum):
    SPLIT = "split"
    DIVIDEND = "dividend"


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """One action of a stock.

    ex_date: the first date of the exchange that trades with it. ratio: of a split, new shares per old share (4.0 for
    4:1, 0.1 for 1:10). amount, currency: of a dividend, per share.
    """

    symbol: str
    kind: ActionKind
    ex_date: date
    ratio: float | None = None
    amount: float | None = None
    currency: str | None = None


@dataclass(frozen=True, slots=True)
class ReportedActions:
    """The actions in the responses of one provider, or in a file, at `fetched_at` (microseconds).

    refused: a sentence for each row that is no valid action.
    """

    provider: str
    fetched_at: int
    actions: tuple[Action, ...] = ()
    refused: tuple[str, ...] = field(default=())

    def __bool__(self) -> bool:
        return bool(self.actions or self.refused)


@dataclass(frozen=True, slots=True)
class StoredAction:
    """One row of the view fks.actions. `used`: whether adjustment applies it."""

    action: Action
    provider: str
    fetched_at: datetime
    begins_at: datetime
    used: bool


def split_of(symbol: str, ex_date: str, ratio: float) -> Action:
    """A valid split. Raises ValueError with the reason, as the end of a sentence."""
    return Action(symbol, ActionKind.SPLIT, date_of(ex_date), checked_ratio(ratio))


def date_of(text: str) -> date:
    """A date such as 2020-08-31. Raises ValueError."""
    try:
        found = date.fromisoformat(text)
        if str(found) != text:  # it takes 2020-W36-1 and 20200831 too
            raise ValueError
    except (ValueError, TypeError):
        raise ValueError(f"ex_date {text!r} is not a date such as 2020-08-31") from None
    if not _FIRST <= found < _PAST:
        raise ValueError(f"ex_date {text} is not between {_FIRST} and {_PAST}")
    return found


def is_ratio(ratio: float) -> bool:
    """Whether a split can have this ratio."""
    return math.isfinite(ratio) and 1 / LARGEST_RATIO <= ratio <= LARGEST_RATIO


def checked_ratio(ratio: float) -> float:
    """The ratio of a split. Raises ValueError."""
    if not is_ratio(ratio):
        raise ValueError(
            f"ratio {ratio:g} is not the new shares per old share of a split: it is above 0, such as 4 for 4:1 and 0.1"
            " for 1:10"
        )
    return ratio


def combined(splits: Iterable[Action]) -> tuple[Action, ...]:
    """The splits by date; those of one date as one, with the product of their ratios: a reverse split is often
    followed by a split in the same night."""
    found = []
    for _, same in groupby(sorted(splits), key=lambda one: (one.symbol, one.kind, one.ex_date)):
        group = list(same)
        found.append(replace(group[0], ratio=math.prod(one.ratio or 1.0 for one in group)))
    return tuple(found)


# The exchange ------------------------------------------------------------------------------------------


def begins_at(instrument: Instrument, ex_date: date) -> datetime:
    """The moment at which a date begins at the exchange of a stock, in UTC: trades from then on are in new shares."""
    zone = ZoneInfo(_zone_of(instrument.calendar))
    return datetime.combine(ex_date, time(), zone).astimezone(UTC)


def has_actions(instrument: Instrument) -> bool:
    """Whether an instrument can have actions: coins and currencies have none."""
    return instrument.asset_class is AssetClass.STOCKS


@cache
def _zone_of(calendar: str) -> str:
    """The time zone of an exchange calendar. Raises ValueError for an unknown one."""
    import exchange_calendars  # half a second, which nothing but stocks needs
    from exchange_calendars.errors import InvalidCalendarName

    try:
        known = exchange_calendars.get_calendar(calendar, start="2024-01-01", end="2024-01-31")
    except InvalidCalendarName as error:
        raise ValueError(f"there is no exchange calendar {calendar!r}") from error
    return str(known.tz)


# Several providers -------------------------------------------------------------------------------------


def disputes(rows: Sequence[StoredAction]) -> tuple[str, ...]:
    """Where providers contradict the report that is used, one sentence each; not where a person has decided."""
    used = [row for row in rows if row.used]
    found = []
    for row in rows:
        if row.used or row.provider == FILE:
            continue
        beside = [other for other in used if _may_be_same(row.action, other.action)]
        if not beside or any(other.provider == FILE for other in beside):
            continue
        if not any(_agree(row.action, other.action) for other in beside):
            nearest = min(beside, key=lambda other: abs(other.action.ex_date - row.action.ex_date))
            found.append(
                f"{row.action.symbol}: {row.provider} reports {described(row.action)}, {nearest.provider}"
                f" {described(nearest.action)}, which is used; import the correct one from a file to decide"
            )
    return tuple(found)


def described(action: Action) -> str:
    """`a split of 4:1 on 2020-08-31`."""
    ratio = action.ratio or 1.0
    text = f"{ratio:.6g}:1" if ratio >= 1 else f"1:{1 / ratio:.6g}"
    return f"a {action.kind} of {text} on {action.ex_date}"


def _may_be_same(one: Action, other: Action) -> bool:
    return (one.symbol, one.kind) == (other.symbol, other.kind) and abs(
        one.ex_date - other.ex_date
    ) <= SAME_ACTION


def _agree(one: Action, other: Action) -> bool:
    return one.ex_date == other.ex_date and math.isclose(one.ratio or 0, other.ratio or 0, rel_tol=_EQUAL)
