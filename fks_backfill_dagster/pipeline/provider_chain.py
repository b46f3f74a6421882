"""The provider chain of a sync: the providers of a series, and what their responses are compared with.

Belongs here: the connection of chain, settings and database. Does not belong here: the chain (`fetch.chain`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.pipeline.eligible import eligible
from fks_backfill_dagster.pipeline.fetch.chain import ChainOptions, ProviderChain
from fks_backfill_dagster.pipeline.fetch.suspicion import StoredRows
from fks_backfill_dagster.pipeline.stored_rows import stored_rows
from fks_backfill_dagster.store import queries


def make_chain(
    context: Context,
    series: Series,
    priority: Sequence[str],
    *,
    heed_circuit: bool = True,
    force: bool = False,
) -> ProviderChain:
    """The providers of `priority` that can serve the series. `heed_circuit`: providers in cool-down are not requested.
    `force`: see `sync`."""

    def stored(opens: Instants) -> Candles:
        found = queries.read_opens(context.database, series, opens)
        return _without_pinned(context, series, found)

    def unpinned_rows(window: TimeRange) -> StoredRows:
        found = stored_rows(context.database, series, window)
        return found.take(np.isin(found.candles.ts, _without_pinned(context, series, found.candles).ts))

    options = ChainOptions(
        clock=context.clock,
        stored=stored,
        stored_within=lambda window: queries.read_candles(context.database, series, window),
        stored_rows=unpinned_rows,
        tolerance=context.tolerance,
        closed=context.closed,
        declared=context.declared,
        force=force,
        eligible=context.eligible(series),
    )
    chosen = eligible(context.providers, series, priority)
    return ProviderChain(series, chosen, options, context.circuit, heed_circuit=heed_circuit)


def _without_pinned(context: Context, series: Series, candles: Candles) -> Candles:
    """The candles by which a response is recognised as another market's: a person's values say nothing about that."""
    if not len(candles):
        return candles
    window = TimeRange(int(candles.ts[0]), int(candles.ts[-1]) + 1)
    pinned = queries.pinned_opens(context.database, series, window)
    return candles.take(~np.isin(candles.ts, pinned)) if len(pinned) else candles
