"""A simulated version of the calendar library: the installed one with a changed calendar, in this whole process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import time

import exchange_calendars
import pandas as pd
import pytest
from exchange_calendars import calendar_utils
from exchange_calendars.exchange_calendar_xhkg import XHKGExchangeCalendar
from exchange_calendars.exchange_calendar_xnys import XNYSExchangeCalendar

from fks_backfill_dagster.domain import calendars, grid

CLASSES = {"XHKG": XHKGExchangeCalendar, "XNYS": XNYSExchangeCalendar}

Update = Callable[..., None]


@pytest.fixture
def update() -> Iterator[Update]:
    """`update("XHKG", closed=[...], early=[...])`: a version of the library with these additional closures and closes
    at noon; without any the installed one. Other processes have the installed one."""

    def change(name: str, closed: Sequence[str] = (), early: Sequence[str] = ()) -> None:
        installed = CLASSES[name]

        class Later(installed):  # type: ignore[misc, valid-type]
            @property
            def adhoc_holidays(self) -> list[pd.Timestamp]:
                return [*super().adhoc_holidays, *map(pd.Timestamp, closed)]

            @property
            def special_closes_adhoc(self) -> list[tuple[time, pd.DatetimeIndex]]:
                return [
                    *super().special_closes_adhoc,
                    *([(time(12), pd.DatetimeIndex(list(early)))] if early else []),
                ]

        _install(name, Later)

    yield change
    for name, installed in CLASSES.items():
        _install(name, installed)


def _install(name: str, calendar: type) -> None:
    """Also clears this process's caches of the library, which is read only once."""
    exchange_calendars.register_calendar_type(name, calendar, force=True)
    calendar_utils.global_calendar_dispatcher._factory_output_cache.pop(name, None)
    for kept in (grid._grid, grid.sessions_of, calendars.past_sessions, calendars.digest_of):
        kept.cache_clear()
