"""The picture of coverage in the README: months by series, from the public views of a database.

The command line fills the database from a local market: of three outages, one is filled by the second provider, for one
the second provider has no candles either, and for one its requests fail; one symbol is listed late. `read` takes its
rows from `fks.ohlcv`, `fks.sync_status` and `fks.gaps` alone, `page` draws them. The period is fixed: the same program
gives the same picture.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from html import escape
from pathlib import Path
from typing import Any

import psycopg
from generate import Session

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.simulator.config import instant

START, END = datetime(2023, 1, 1, tzinfo=UTC), datetime(2025, 1, 1, tzinfo=UTC)

_SETTINGS = """\
history_start: 2023-01-01
provider_priority: {crypto: [binance, polygon], stocks: [polygon, yfinance], forex: [oanda, polygon]}
providers: {polygon: {requests_per_minute: 6000}}   # the local market has no free plan
symbols:
  - {symbol: BTC/USDT, asset_class: crypto, timeframes: [1h, 1d]}
  - {symbol: ETH/USDT, asset_class: crypto, timeframes: [1h]}
  - {symbol: ARB/USDT, asset_class: crypto, timeframes: [1h]}
  - {symbol: AAPL, asset_class: stocks, timeframes: [1h, 1d]}
  - {symbol: EUR/USD, asset_class: forex, timeframes: [1h]}
"""


class State(Enum):
    """The state of a month of a series; of several the first one."""

    OPEN = "open"
    EXPLAINED = "explained"
    FALLBACK = "fallback"
    COMPLETE = "complete"
    BEFORE = "before"
    """Before the first candle: nothing is expected."""
    UNKNOWN = "unknown"
    """No candle, and no gap that says so."""


@dataclass(slots=True)
class Month:
    """Candles of one month of a series: stored ones by provider, missing ones by the status of their gap, and
    no-trade intervals."""

    stored: dict[str, int] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    no_trade: int = 0


@dataclass(frozen=True, slots=True)
class Gap:
    """A row of `fks.gaps`, with the outcome at each provider."""

    start: datetime
    end: datetime
    missing: int
    status: str
    outcomes: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Row:
    """One series: its months from START to END, its first candle, its gaps."""

    symbol: str
    timeframe: Timeframe
    first: datetime
    months: Mapping[datetime, Month]
    gaps: list[Gap]

    @property
    def main_provider(self) -> str:
        """The provider of most of its candles."""
        totals: dict[str, int] = {}
        for month in self.months.values():
            for provider, count in month.stored.items():
                totals[provider] = totals.get(provider, 0) + count
        return max(totals, key=totals.__getitem__)

    @property
    def coverage(self) -> float:
        """Stored candles and no-trade intervals as a share of the expected candles."""
        every = self.months.values()
        present = sum(sum(month.stored.values()) + month.no_trade for month in every)
        return present / (present + sum(sum(month.missing.values()) for month in every))

    def state(self, month: datetime) -> tuple[State, int]:
        """The state of a month, and the number of candles that decide it (all of a complete one)."""
        found = self.months[month]
        stored = sum(found.stored.values())
        elsewhere = stored - found.stored.get(self.main_provider, 0)
        if "open" in found.missing:
            return State.OPEN, found.missing["open"]
        if found.missing:
            return State.EXPLAINED, sum(found.missing.values())
        if elsewhere:
            return State.FALLBACK, elsewhere
        if stored:
            return State.COMPLETE, stored
        return (State.BEFORE if _next(month) <= self.first else State.UNKNOWN), 0


def months() -> list[datetime]:
    found = [START]
    while _next(found[-1]) < END:
        found.append(_next(found[-1]))
    return found


def _month(moment: datetime) -> datetime:
    return moment.replace(day=1, hour=0, minute=0)


def _next(month: datetime) -> datetime:
    return _month(month + timedelta(days=31))


# --- the database ---


@contextmanager
def filled() -> Iterator[psycopg.Connection]:
    """A database with the series of `_SETTINGS`; removed afterwards."""
    usd = ("ARBUSDT", "ARBUSD")  # the names of one market at Binance and at Polygon
    config = MarketConfig(limits=False, listed=tuple((name, instant("2023-03-23T06:00")) for name in usd))
    with (
        tempfile.TemporaryDirectory(prefix="fks-pictures-", ignore_cleanup_errors=True) as name,
        LocalMarket(config) as market,
    ):
        _plant(market)
        settings = Path(name, "config", "backfill.yaml")
        settings.parent.mkdir()
        settings.write_text(_SETTINGS, encoding="utf-8")
        session = Session(Path(name), market)
        try:
            output = session.run(f"fks-backfill backfill --all --start {START:%F} --end {END:%F}")
            url = session.run("fks-backfill db url").strip()
            if not url.startswith("postgresql"):
                raise RuntimeError(f"the backfill of the picture failed:\n{output}\n{url}")
            with psycopg.connect(url) as connection:
                yield connection
        finally:
            session.end()


def _plant(market: LocalMarket) -> None:
    def hours(first: str, last: str) -> TimeRange:
        return TimeRange(instant(first), instant(last))

    market.plant_outage("binance", hours("2024-03-10T02:00", "2024-03-10T20:00"), "BTC/USDT")
    market.plant_outage("all", hours("2023-11-14T03:00", "2023-11-14T21:00"), "ETH/USDT")
    forex = hours("2024-09-03T06:00", "2024-09-03T18:00")
    market.plant_outage("oanda", forex, "EUR/USD")
    market.plant_fault("polygon", "status", window=forex, count=None, status=503, symbol="C:EURUSD")


def read(connection: psycopg.Connection) -> list[Row]:
    """The series of the database in the order of the settings, from the public views."""
    found = {
        (symbol, timeframe): Row(
            symbol, Timeframe(timeframe), first.astimezone(UTC), {month: Month() for month in months()}, []
        )
        for symbol, timeframe, first in connection.execute(
            "SELECT symbol, timeframe, oldest_data_time FROM fks.sync_status WHERE total_candles > 0"
        )
    }
    stored = connection.execute(
        "SELECT symbol, timeframe, date_trunc('month', ts, 'UTC'), provider, count(*) FROM fks.ohlcv"
        " WHERE ts >= %s AND ts < %s GROUP BY 1, 2, 3, 4",
        (START, END),
    )
    for symbol, timeframe, month, provider, count in stored:
        found[symbol, timeframe].months[month.astimezone(UTC)].stored[provider] = count
    gaps = connection.execute(
        "SELECT symbol, timeframe, gap_start, gap_end, missing_candles, status, evidence FROM fks.gaps"
        " WHERE status <> 'filled' AND gap_start >= %s AND gap_end <= %s ORDER BY gap_start",
        (START, END),
    )
    for symbol, timeframe, start, end, missing, status, evidence in gaps:
        row = found[symbol, timeframe]
        _add(row, Gap(start.astimezone(UTC), end.astimezone(UTC), missing, status, _outcomes(evidence)))
    order = list(Timeframe)
    return sorted(found.values(), key=lambda row: (_SETTINGS.index(row.symbol), order.index(row.timeframe)))


def _add(row: Row, gap: Gap) -> None:
    month = row.months[_month(gap.start)]
    if gap.status == "no_trade":
        month.no_trade += gap.missing
        return
    month.missing[gap.status] = month.missing.get(gap.status, 0) + gap.missing
    row.gaps.append(gap)


def _outcomes(evidence: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {one["provider"]: one["outcome"] for one in evidence}


# --- the page ---

_LEGEND = (
    (State.COMPLETE, "", "complete"),
    (State.FALLBACK, "18", "complete, 18 candles from the second provider"),
    (State.EXPLAINED, "18", "18 candles missing, no provider has them"),
    (State.OPEN, "12!", "12 candles missing, requested again"),
    (State.BEFORE, "", "before the first candle"),
)

_STYLE = Path(__file__).with_suffix(".css")


def page(rows: Sequence[Row]) -> str:
    """The picture as HTML; its colours follow the scheme of the browser."""
    cells = [_years(), *(_line(row) for row in rows)]
    legend = "".join(
        f'<div><span class="cell {state.value}">{text}</span>{words}</div>' for state, text, words in _LEGEND
    )
    reasons = "".join(_reasons(rows))
    return (
        f'<!doctype html><meta charset="utf-8"><title>Coverage</title><style>{_STYLE.read_text()}</style>'
        f"<h1>Every candle that should exist is stored, or its absence has a reason</h1>"
        f'<div class="grid">{"".join(cells)}</div><div class="legend">{legend}</div>'
        f"<table><tr><th>series<th>when (UTC)<th>state<th>what the providers returned</tr>{reasons}</table>"
    )


def _years() -> str:
    all_months = months()
    years = "".join(f'<span class="year">{year}</span>' for year in range(START.year, END.year))
    names = "".join(f'<span class="month">{month:%b}</span>' for month in all_months)
    return f'<span></span>{years}<span></span><span></span>{names}<span class="month share">coverage</span>'


def _line(row: Row) -> str:
    cells = []
    for month in row.months:
        state, count = row.state(month)
        text = {State.COMPLETE: "", State.BEFORE: "", State.OPEN: f"{count}!"}.get(state, str(count))
        cells.append(f'<span class="cell {state.value}">{text}</span>')
    name = f'<span class="name">{escape(row.symbol)} <small>{row.timeframe}</small></span>'
    # Rounded down: a series with a missing candle does not have 100 %.
    return f'{name}{"".join(cells)}<span class="share">{int(row.coverage * 10_000) / 100:.2f} %</span>'


def _reasons(rows: Sequence[Row]) -> Iterator[str]:
    """One line for each late beginning, each month with a second provider, and each gap."""
    for row in rows:
        name = f"{row.symbol} {row.timeframe}"
        if _month(row.first) > START:
            yield _reason(name, f"until {row.first:%Y-%m-%d %H:%M}", "not listed", "no earlier candle")
        for month, found in row.months.items():
            others = [(one, count) for one, count in found.stored.items() if one != row.main_provider]
            for provider, count in others:
                total = sum(found.stored.values())
                yield _reason(name, f"{month:%Y-%m}", "filled", f"{provider}: {count} of {total}")
        for gap in row.gaps:
            outcomes = ", ".join(f"{provider}: {outcome}" for provider, outcome in gap.outcomes.items())
            when = f"{gap.start:%Y-%m-%d %H:%M} to {gap.end:%H:%M}"
            yield _reason(name, when, f"{gap.status}, {gap.missing} missing", outcomes)


def _reason(*cells: str) -> str:
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
