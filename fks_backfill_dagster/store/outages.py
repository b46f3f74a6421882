"""Missing candles of many series over one window, and the gaps behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from fks_backfill_dagster.domain.outages import Spans
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import to_datetime
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.ledger.records import Outcome
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.sql import micros, series_of


@dataclass(frozen=True, slots=True)
class Absences:
    """The missing ranges (without `no_trade`) and the coverage of many series.

    `gaps`: gap ids, one per range of `missing`. Owners are indices into the requested series.
    """

    synced: Spans
    missing: Spans
    gaps: NDArray[np.int64]


def absences(database: Database, series: Sequence[Series], window: TimeRange) -> Absences:
    """The absences of all `series` within `window`, cut to it, in two queries."""
    index = {one: position for position, one in enumerate(series)}
    with database.begin() as connection:
        owners = {identity: index[one] for identity, one in series_of(connection, series).items()}
        named = {"ids": list(owners), "from": to_datetime(window.start), "to": to_datetime(window.end)}
        synced = connection.execute(
            sa.text(
                f"SELECT s.series_id, {micros('lower(r)')}, {micros('upper(r)')}"
                " FROM fks.sync_state s, unnest(s.synced * tstzmultirange(tstzrange(:from, :to))) AS r"
                " WHERE s.series_id = ANY(:ids)"
            ),
            named,
        ).all()
        missing = connection.execute(
            sa.text(
                f"SELECT series_id, {micros('greatest(gap_start, :from)')},"
                f"   {micros('least(gap_end, :to)')}, id FROM fks.gap"
                " WHERE series_id = ANY(:ids) AND status <> 'filled' AND status <> 'no_trade'"
                "   AND gap_start < :to AND gap_end > :from"
            ),
            named,
        ).all()
    return Absences(
        _spans([*map(tuple, synced)], owners),
        _spans([*map(tuple, missing)], owners),
        np.array([row.id for row in missing], dtype=np.int64),
    )


def _spans(rows: Sequence[Sequence[int]], owners: Mapping[int, int]) -> Spans:
    """Rows of (series_id, start, end, ...) as columns."""
    table = np.array([(owners[row[0]], row[1], row[2]) for row in rows], dtype=np.int64).reshape(-1, 3)
    return Spans(table[:, 0], table[:, 1], table[:, 2])


@dataclass(frozen=True, slots=True)
class GapState:
    """The state of a gap, and the providers in its evidence."""

    status: GapStatus
    providers: tuple[str, ...]


def gap_states(database: Database, gaps: Sequence[int]) -> dict[int, GapState]:
    """The ledger's state of gaps, by id."""
    with database.begin() as connection:
        rows = connection.execute(
            sa.text(
                "SELECT id, status, ARRAY(SELECT e->>'provider' FROM jsonb_array_elements(evidence) e"
                "   WHERE e->>'outcome' IS DISTINCT FROM :undone) AS providers FROM fks.gap WHERE id = ANY(:ids)"
            ),
            {"ids": list(gaps), "undone": Outcome.UNDONE.value},
        )
        return {row.id: GapState(GapStatus(row.status), tuple(row.providers)) for row in rows}
