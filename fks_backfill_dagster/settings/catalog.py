"""The configured instruments and series: names, priorities, ranges, closed dates.

Belongs here: questions about a series that the settings answer. Does not belong here: the settings themselves
(`model`), questions about a provider (`Settings.provider`), stored state (`store`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import date, timedelta
from fnmatch import fnmatchcase
from functools import cached_property

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Instrument, Series, SeriesKey, identifier
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.settings.model import Settings
from fks_backfill_dagster.settings.sections import SymbolSettings
from fks_backfill_dagster.settings.sources import CLASS_CALENDARS, nearest
from fks_backfill_dagster.settings.symbols import check_symbol, infer_asset_class
from fks_backfill_dagster.settings.types import parse_timeframe, resolved_calendar


class Catalog:
    """The series of the settings. A series that is not configured has the defaults of its asset class."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def __contains__(self, series: Series) -> bool:
        """Whether the series is configured, by symbol and timeframe."""
        return series.key in self._by_key

    @cached_property
    def series(self) -> tuple[Series, ...]:
        """Every configured symbol at each of its timeframes, in the order of the file."""
        return tuple(
            entry.instrument.at(timeframe)
            for entry in self._settings.symbols
            for timeframe in entry.timeframes
        )

    def known(self, stored: Iterable[Series]) -> dict[SeriesKey, Series]:
        """The configured series in the order of the file, then those of `stored` that are not configured."""
        return self._by_key | {one.key: one for one in stored if one not in self}

    @cached_property
    def _by_key(self) -> dict[SeriesKey, Series]:
        return {one.key: one for one in self.series}

    # --- names ---

    def find_series(self, symbol: str, timeframe: str | Timeframe, stored: Iterable[Series] = ()) -> Series:
        """The series of a symbol in any notation (`BTC/USDT`, `BTC_USDT`, `btc/usdt`).

        A symbol that is not configured is looked up in `stored`, else inferred: `X_Y` is `X/Y`, the asset
        class follows from the form. Raises ValueError, with the nearest configured symbol, for an invalid
        one.
        """
        frame = parse_timeframe(timeframe)
        entry = self._configured(symbol)
        if entry is not None:
            return entry.instrument.at(frame)
        wanted = identifier(symbol.strip()).upper()
        known = [s for s in stored if s.timeframe is frame and identifier(s.symbol).upper() == wanted]
        if len(known) == 1:
            return known[0]
        return self._inferred(symbol).at(frame)

    def match_symbols(self, pattern: str | None = None) -> tuple[str, ...]:
        """The configured symbols that match a glob, as symbol or as asset key; None matches all."""
        return tuple(
            entry.symbol
            for entry in self._settings.symbols
            if pattern is None
            or fnmatchcase(entry.symbol, pattern)
            or fnmatchcase(identifier(entry.symbol), pattern)
        )

    def nearest_symbol(self, symbol: str) -> str | None:
        """The configured symbol closest to one that is not configured; None if none is close.

        Base and quote are compared separately: DOGE/USDT is not a mistyped ETH/USDT, despite the common part.
        """
        names = self.match_symbols()
        if symbol in names:
            return None
        base, slash, quote = symbol.partition("/")
        if not slash:
            return nearest(symbol, names)
        pairs = [name.partition("/") for name in names if "/" in name]
        bases = [one for one, _, _ in pairs if nearest(base, [one])]
        close = [f"{one}/{other}" for one, _, other in pairs if one in bases and nearest(quote, [other])]
        return nearest(symbol, close)

    @cached_property
    def _by_identifier(self) -> dict[str, SymbolSettings]:
        return {identifier(entry.symbol): entry for entry in self._settings.symbols}

    def _configured(self, symbol: str) -> SymbolSettings | None:
        wanted = identifier(symbol.strip())
        exact = self._by_identifier.get(wanted)
        if exact is not None:
            return exact
        loose = [key for key in self._by_identifier if key.upper() == wanted.upper()]
        return self._by_identifier[loose[0]] if len(loose) == 1 else None

    def _inferred(self, written: str) -> Instrument:
        symbol = written.strip().upper()
        if "/" not in symbol and symbol.count("_") == 1:
            symbol = symbol.replace("_", "/")
        asset_class = infer_asset_class(symbol)
        names = self.match_symbols()
        joined = {re.sub(r"\W|_", "", name): name for name in names}
        if asset_class is AssetClass.STOCKS and symbol in joined:
            raise ValueError(f"{written!r} is not configured; did you mean {joined[symbol]}?")
        try:
            check_symbol(symbol, asset_class)
        except ValueError as error:
            match = nearest(symbol, names)
            raise ValueError(f"{error}" + (f"; did you mean {match}?" if match else "")) from None
        return Instrument(symbol, asset_class)

    # --- what the settings say about a series ---

    def priority(self, series: Series) -> tuple[str, ...]:
        """The enabled providers of the series, in order of priority."""
        entry = self._entry(series)
        names = None if entry is None else entry.provider_priority
        if isinstance(names, dict):
            names = names.get(series.timeframe)
        if names is None:
            names = getattr(self._settings.provider_priority, series.asset_class.value)
        return tuple(name for name in names if self._settings.provider(name).enabled)

    def closed(self, series: Series) -> tuple[tuple[date, date], ...]:
        """The dates on which the market of the series was closed: first and last (inclusive) of each
        interval, ascending, disjoint. Those of its symbol and those of its calendar."""
        entry = self._entry(series)
        found = [] if entry is None else list(entry.closed)
        for name, calendar in self._settings.calendars.items():
            if calendar.closed and _is_calendar_of(name, series):
                found += calendar.closed
        merged: list[tuple[date, date]] = []
        for one in sorted(found, key=lambda dates: dates.start):
            if merged and one.start <= merged[-1][1] + timedelta(days=1):
                merged[-1] = (merged[-1][0], max(merged[-1][1], one.end))
            else:
                merged.append((one.start, one.end))
        return tuple(merged)

    @cached_property
    def earliest_start(self) -> int:
        """The earliest start of any series, in microseconds: partitions of every grain begin there, rounded down.

        All series of a grain share one partitions definition, as one run cannot mix two.
        """
        starts = (entry.start for entry in self._settings.symbols if entry.start is not None)
        return min((self._settings.history_start, *starts))

    def start_of(self, series: Series) -> int:
        """The start of the series, in microseconds."""
        entry = self._entry(series)
        return self._settings.history_start if entry is None or entry.start is None else entry.start

    def end_of(self, series: Series) -> int | None:
        """The end of the series (exclusive), in microseconds; None: no end."""
        entry = self._entry(series)
        return None if entry is None else entry.end

    def kept(self, series: Series, window: TimeRange) -> TimeRange:
        """The part of `window` from the series' start to its end; empty where there is none."""
        start, end = self.start_of(series), self.end_of(series)
        last = window.end if end is None else end
        return window.intersect(TimeRange(start, max(start, last)))

    def _entry(self, series: Series) -> SymbolSettings | None:
        entry = self._by_identifier.get(identifier(series.symbol))
        return entry if entry is not None and entry.symbol == series.symbol else None


def _is_calendar_of(name: str, series: Series) -> bool:
    venue = series.instrument.venue
    if name == venue or name in CLASS_CALENDARS or venue in CLASS_CALENDARS:
        return name == venue
    return resolved_calendar(name) == resolved_calendar(venue)
