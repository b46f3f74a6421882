"""Changed closed dates: settles the ledger by the closed dates of the settings, without a request.

Each series records the dates by which its ledger was settled. So a date that is added after a request without a
result explains the gap at once, and a date that is removed reopens it.

Belongs here: the affected series, and the report. Does not belong here: which candles lie on a date
(`domain.closures`), the write (`store.writer`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fks_backfill_dagster.domain import closures
from fks_backfill_dagster.domain.closures import ClosureChange, Dates
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.ledger.settle import Rules, surroundings
from fks_backfill_dagster.pipeline.eligible import eligible, strict
from fks_backfill_dagster.providers.base import Provider
from fks_backfill_dagster.store import ledger
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.ledger import Registered
from fks_backfill_dagster.store.writer.closures import settle_closures


@dataclass(frozen=True, slots=True)
class SettledClosures:
    """The effect of changed closed dates on a series: the numbers of added and withdrawn dates, and of stored candles
    on the added ones."""

    series: Series
    added: int
    withdrawn: int
    stored: int

    @property
    def warning(self) -> str | None:
        """A warning about candles that contradict the settings; None if there are none."""
        if not self.stored:
            return None
        candles = "candle lies" if self.stored == 1 else "candles lie"
        return (
            f"{self.stored:,} stored {candles} on dates that the settings now close, and are kept: remove the dates"
            " from `closed` if the market was open"
        )

    def __str__(self) -> str:
        changes = [
            f"{number:,} closed {'date' if number == 1 else 'dates'} {what}"
            for number, what in ((self.added, "added"), (self.withdrawn, "withdrawn"))
            if number
        ]
        return f"{' and '.join(changes)} by the settings" + (f"; {self.warning}" if self.warning else "")


def settle_changed(
    database: Database,
    closed: Mapping[Series, Dates],
    providers: Callable[[], Mapping[str, Provider]],
    priority: Callable[[Series], Sequence[str]],
    max_gap_minutes: int,
) -> list[SettledClosures]:
    """Settles the ledger of every series that was settled by other closed dates than `closed`.

    One statement if nothing has changed; otherwise `providers` is called. A series without an eligible provider is
    skipped until it has one, since none of its gaps is explained.
    """
    with database.begin() as connection:
        changed = ledger.closed_otherwise(
            connection, {one: closures.format_dates(dates) for one, dates in closed.items()}
        )
    settled = []
    built = providers() if changed else {}
    for series, found in changed.items():
        names = eligible(built, series, priority(series)).names
        if not names:
            continue
        try:
            done = settle_series(
                database, series, found, closed[series], names, strict(built), max_gap_minutes
            )
        except (
            ValueError
        ):  # its calendar cannot be built: its sync reports that, and it stops no other series
            continue
        settled.append(done)
    return settled


def settle_series(
    database: Database,
    series: Series,
    found: Registered,
    dates: Dates,
    names: frozenset[str],
    strict: frozenset[str],
    max_gap_minutes: int,
) -> SettledClosures:
    """Settles one series whose closed dates have changed; `names`: its eligible providers, `strict`: those that
    return every interval."""
    change, grid = ClosureChange.of(series, closures.parse_dates(found.closed), dates), grid_of(series)
    declared = closures.closed_ranges(series, dates)
    rules = Rules(
        eligible=names,
        strict=strict,
        tolerated=max_gap_minutes // series.timeframe.minutes,
        closed=closures.market_closures(series, dates, surroundings(change.touched.hull, grid)),
        declared=declared,
        reopened=change.touched - declared,
    )
    text = closures.format_dates(dates)
    stored = settle_closures(database, series, found.identity, change, rules, grid, text)
    return SettledClosures(series, change.dates, change.withdrawn, stored)
