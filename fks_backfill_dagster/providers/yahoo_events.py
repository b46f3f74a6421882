"""The splits in the events of a Yahoo chart, as actions.

Belongs here: reading them one by one, and their dates. Does not belong here: the request (`yfinance`), whether a split
has been applied to the prices (`splits`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np

from fks_backfill_dagster.domain.actions import Action, ActionKind, checked_ratio, combined, is_ratio
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import (
    MICROS_PER_DAY,
    MICROS_PER_SECOND,
    Timeframe,
    to_datetime,
)
from fks_backfill_dagster.providers.numbers import to_instant
from fks_backfill_dagster.providers.sessions import session_dates, wall_clock


@dataclass(frozen=True, slots=True)
class Events:
    """The splits of a chart: new shares per old share by instant (microseconds), a sentence for each invalid one, and
    the zone of the exchange; None for a chart without a range."""

    splits: Mapping[int, float]
    refused: tuple[str, ...]
    zone: ZoneInfo | None


NO_EVENTS = Events({}, (), None)


def read_events(result: Any, provider: str, symbol: str) -> Events:
    """The splits of the result of a chart. A single bad one is refused; raises LookupError, TypeError, ValueError or
    AttributeError for a result of another shape."""
    found, refused = dict[int, float](), []
    for split in ((result.get("events") or {}).get("splits") or {}).values():
        try:
            at = to_instant(split["date"], MICROS_PER_SECOND)
            found[at] = checked_ratio(float(split["numerator"]) / float(split["denominator"]))
        except (LookupError, TypeError, ArithmeticError):
            refused.append(f"{provider}: {symbol}: a split of another shape: {ascii(split)[:120]}")
        except ValueError as error:
            refused.append(f"{provider}: {symbol}: {error}: {ascii(split)[:120]}")
    return Events(found, tuple(refused), ZoneInfo(result["meta"]["exchangeTimezoneName"]))


def dated(splits: Mapping[int, float], series: Series, zone: ZoneInfo | None) -> tuple[Action, ...]:
    """The actions of splits by instant: dated with their session, or with the local date if there is none. Ratios that
    no split can have are left out: prices before them are declined."""
    known = {at: ratio for at, ratio in splits.items() if is_ratio(ratio)}
    if zone is None or not known:
        return ()
    at = np.array(list(known), dtype=np.int64)
    local = wall_clock(at, zone) // MICROS_PER_DAY * MICROS_PER_DAY
    dates = session_dates(at, series.at(Timeframe.D1), zone)
    dates = np.where(dates % MICROS_PER_DAY == 0, dates, local)
    return combined(
        Action(series.symbol, ActionKind.SPLIT, to_datetime(day).date(), ratio)
        for day, ratio in zip(dates.tolist(), known.values(), strict=True)
    )
