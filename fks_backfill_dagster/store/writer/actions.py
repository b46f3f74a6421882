"""Corporate actions: one row per symbol, kind, date and provider.

Belongs here: the write. Does not belong here: candles, which keep their prices as traded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from fks_backfill_dagster.domain.actions import FILE, ReportedActions, begins_at
from fks_backfill_dagster.domain.series import Instrument
from fks_backfill_dagster.domain.timeframe import to_datetime

# Of providers that the priority of a symbol does not name.
_LAST = 1_000


@dataclass(frozen=True, slots=True)
class WrittenActions:
    """The numbers of new and of changed rows."""

    inserted: int = 0
    updated: int = 0

    def __add__(self, other: WrittenActions) -> WrittenActions:
        return WrittenActions(self.inserted + other.inserted, self.updated + other.updated)


# The lock of a symbol: two timeframes of it can report actions at the same time.
_SYMBOL_LOCK = 46138

# Rows with the same values are not written.
_WRITE = """
INSERT INTO fks.action (symbol, kind, ex_date, provider, ratio, amount, currency, fetched_at, begins_at, rank)
SELECT :symbol, g.kind, g.ex_date, :provider, g.ratio, g.amount, g.currency, :fetched_at, g.begins_at, :rank
FROM unnest(
    CAST(:kinds AS text[]), CAST(:dates AS date[]), CAST(:ratios AS float8[]), CAST(:amounts AS float8[]),
    CAST(:currencies AS text[]), CAST(:begins AS timestamptz[])
) AS g(kind, ex_date, ratio, amount, currency, begins_at)
WHERE NOT EXISTS (
    SELECT FROM fks.action a
    WHERE a.symbol = :symbol AND a.kind = g.kind AND a.ex_date = g.ex_date AND a.provider = :provider
      AND (a.ratio, a.amount, a.currency, a.begins_at)
        IS NOT DISTINCT FROM (g.ratio, g.amount, g.currency, g.begins_at)
)
ON CONFLICT (symbol, kind, ex_date, provider) DO UPDATE
SET ratio = excluded.ratio, amount = excluded.amount, currency = excluded.currency,
    fetched_at = excluded.fetched_at, begins_at = excluded.begins_at, rank = excluded.rank
RETURNING xmax = 0 AS is_new
"""

_RANK = """
UPDATE fks.action a SET rank = r.rank
FROM (
    SELECT x.symbol, x.kind, x.ex_date, x.provider,
        CASE WHEN x.provider = :file THEN 0
             ELSE coalesce(array_position(CAST(:priority AS text[]), x.provider), :last) END AS rank
    FROM fks.action x WHERE x.symbol = :symbol
) r
WHERE (a.symbol, a.kind, a.ex_date, a.provider) = (r.symbol, r.kind, r.ex_date, r.provider) AND a.rank <> r.rank
"""


def write_actions(
    connection: sa.Connection, instrument: Instrument, reported: ReportedActions, priority: Sequence[str]
) -> WrittenActions:
    """Writes the actions of one instrument as one provider reports them. Writing them twice changes nothing.

    `priority`: the providers of the instrument in order; it decides whose report is used where they differ, also
    among the rows that are stored already. Who writes several symbols in one transaction writes them in their order.
    """
    actions = sorted(reported.actions)
    if any(one.symbol != instrument.symbol for one in actions):
        raise ValueError(f"actions of another symbol than {instrument.symbol}")
    if not actions:
        return WrittenActions()
    connection.execute(
        sa.text("SELECT pg_advisory_xact_lock(:class, hashtext(:symbol))"),
        {"class": _SYMBOL_LOCK, "symbol": instrument.symbol},
    )
    ranks = {FILE: 0} | {name: place for place, name in enumerate(priority, 1)}
    rows = connection.execute(
        sa.text(_WRITE),
        {
            "symbol": instrument.symbol,
            "provider": reported.provider,
            "fetched_at": to_datetime(reported.fetched_at),
            "rank": ranks.get(reported.provider, _LAST),
            "kinds": [one.kind.value for one in actions],
            "dates": [one.ex_date for one in actions],
            "ratios": [one.ratio for one in actions],
            "amounts": [one.amount for one in actions],
            "currencies": [one.currency for one in actions],
            "begins": [begins_at(instrument, one.ex_date) for one in actions],
        },
    )
    new = [bool(row.is_new) for row in rows]
    named = {"symbol": instrument.symbol, "priority": list(priority), "file": FILE, "last": _LAST}
    connection.execute(sa.text(_RANK), named)
    return WrittenActions(sum(new), len(new) - sum(new))
