"""Read queries of corporate actions.

Belongs here: the stored actions. Does not belong here: their meaning (`domain.actions`), writing
(`store.writer.actions`), adjusted candles (`queries`, with the function `fks.ohlcv_adjusted`).
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from fks_backfill_dagster.domain.actions import Action, ActionKind, StoredAction
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import repeated


@repeated
def stored_actions(database: Database, symbols: Sequence[str] | None = None) -> list[StoredAction]:
    """The actions of these symbols, or of all: by symbol, date and provider."""
    query = (
        "SELECT symbol, kind, ex_date, ratio, amount, currency, provider, fetched_at, begins_at, used"
        " FROM fks.actions"
    )
    if symbols is not None:
        query += " WHERE symbol = ANY(:symbols)"
    with database.begin() as connection:
        rows = connection.execute(
            sa.text(f"{query} ORDER BY symbol, ex_date, kind, provider"),
            {} if symbols is None else {"symbols": list(symbols)},
        )
        return [
            StoredAction(
                Action(row.symbol, ActionKind(row.kind), row.ex_date, row.ratio, row.amount, row.currency),
                row.provider,
                row.fetched_at,
                row.begins_at,
                row.used,
            )
            for row in rows
        ]
