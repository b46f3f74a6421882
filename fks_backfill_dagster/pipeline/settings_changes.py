"""The ledger follows the settings: new providers and keys reopen gaps, changed closed dates explain or reopen them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fks_backfill_dagster.domain.closures import format_dates
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.pipeline.closures import settle_changed, settle_series
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.store import ledger
from fks_backfill_dagster.store.errors import repeated


@repeated
def reopen(context: Context, series: Iterable[Series]) -> None:
    """Reopens gaps whose explanation lacks the response of a new eligible provider, and settles the ledger by the
    closed dates of the settings."""
    eligible_now = {one: context.eligible(one) for one in series}
    with context.database.begin() as connection:
        ledger.reopen(connection, eligible_now, context.clock())
    settle_closures(context, eligible_now)


def settle_closures(context: Context, series: Iterable[Series]) -> None:
    """Settles the ledger by changed closed dates: explains gaps on added dates, and reopens those on withdrawn
    dates."""
    dates = {one: context.closed_dates(one) for one in series}
    settle_changed(
        context.database, dates, lambda: context.providers, context.priority, context.max_gap_minutes
    )


@repeated
def current_identity(context: Context, series: Series, warn: Callable[[str], None]) -> int | None:
    """The id of a series that was synced before, its ledger updated by the settings like `reopen` does.
    Raises SeriesChanged."""
    names = context.eligible(series)
    with context.database.begin() as connection:
        found = ledger.registered(connection, series)
        if found is not None and found.eligible != names:
            ledger.reopen(connection, {series: names}, context.clock())
    if found is None:
        return None
    dates = context.closed_dates(series)
    if found.closed != format_dates(dates) and names:
        done = settle_series(
            context.database, series, found, dates, names, context.strict, context.max_gap_minutes
        )
        if done.warning:
            warn(done.warning)
    return found.identity
