"""The stored candles of a validation, block by block, at the timeframe at which they are compared.

Belongs here: reading, aggregation, and which candles are a provider's own. Does not belong here: which ranges are read
(`validate`), requests (`validation_requests`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.derive import derive, owners, parts_span
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.pipeline.fetch.suspicion import StoredRows
from fks_backfill_dagster.pipeline.stored_rows import stored_rows
from fks_backfill_dagster.providers.base import Provider
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database

_NONE = np.empty(0, dtype=np.int64)

BLOCK = 45_000
"""Candles of the series in memory at a time: about a month of 1m."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredBlock:
    """The sampled candles of a block, ascending.

    own: by provider, the opens of those that it delivered, or for an aggregated candle a part of it. incomplete: the
    number of candles that could not be aggregated because parts are missing.
    """

    window: TimeRange
    candles: Candles
    own: Mapping[str, Instants]
    incomplete: int = 0


def read_blocks(
    database: Database, series: Series, compared: Series, sample: RangeSet, providers: Mapping[str, Provider]
) -> Iterator[StoredBlock]:
    """The blocks of a sample that are not empty. `compared`: the series at the compared timeframe."""
    length = max(BLOCK * series.timeframe.micros, compared.timeframe.micros)
    hull = sample.hull
    for start in range(hull.start, hull.end, length):
        part = sample & RangeSet([TimeRange(start, min(start + length, hull.end))])
        if not part:
            continue
        if compared.timeframe is series.timeframe:
            block = _stored(database, series, part, providers)
        else:
            block = _aggregated(database, series, compared, part, providers)
        if len(block.candles) or block.incomplete:
            yield block


def _stored(
    database: Database, series: Series, part: RangeSet, providers: Mapping[str, Provider]
) -> StoredBlock:
    rows = stored_rows(database, series, part.hull)
    own = {name: _own(rows, one, series) for name, one in providers.items()}
    return StoredBlock(part.hull, rows.candles.take(part.contains(rows.candles.ts)), own)


def _aggregated(
    database: Database, series: Series, compared: Series, part: RangeSet, providers: Mapping[str, Provider]
) -> StoredBlock:
    """Only candles of which every part is stored or a no-trade interval."""
    fine, coarse, window = grid_of(series), grid_of(compared), part.hull
    span = parts_span(coarse, window)
    rows = stored_rows(database, series, span)
    quiet = queries.what_is_known(database, series, span).no_trade(span)
    no_trade = np.concatenate([_NONE, *(fine.opens(one) for one in quiet)])
    made = derive(rows.candles, fine, coarse, window, no_trade)
    incomplete = made.opens[made.partial & part.contains(made.opens)]
    own = {
        name: np.unique(owners(made.opens, coarse, _own(rows, one, series)))
        for name, one in providers.items()
    }
    return StoredBlock(window, made.candles.take(part.contains(made.candles.ts)), own, len(incomplete))


def _own(rows: StoredRows, provider: Provider, series: Series) -> Instants:
    """As `validators.delivered_for`, for rows. The same provider's candles of another instrument are another source."""
    recorded = rows.instrument.astype(str)
    unknown = (recorded == "None") | (recorded == "")
    mine = (rows.provider == provider.name) & (unknown | (recorded == provider.instrument(series)))
    opens: Instants = rows.candles.ts[mine.astype(bool)]
    return opens
