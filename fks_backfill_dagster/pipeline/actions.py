"""Corporate actions: imported from a person's file, or requested from the providers that list them.

Belongs here: which provider is requested for which stock, and the report. Does not belong here: the actions in the
responses of a sync (`sync`), their validity (`domain.actions`), the write (`store.writer.actions`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fks_backfill_dagster.domain.actions import FILE, Action, ReportedActions
from fks_backfill_dagster.domain.series import Instrument
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import repeated
from fks_backfill_dagster.store.writer.actions import WrittenActions, write_actions


@repeated
def import_actions(
    database: Database,
    actions: Mapping[Instrument, Sequence[Action]],
    priority: Callable[[Instrument], Sequence[str]],
    now: int,
) -> WrittenActions:
    """Stores the actions of a file, all of them or none. Importing them twice changes nothing."""
    done = WrittenActions()
    with database.begin() as connection:
        for instrument in sorted(actions, key=lambda one: one.symbol):
            reported = ReportedActions(FILE, now, tuple(actions[instrument]))
            done += write_actions(connection, instrument, reported, priority(instrument))
    return done
