"""The sensor that tells of an outage of a whole venue, once: in its tick, where the UI lists it.

It reads the ledger and asks for no run: each gap is filled by itself. What it has told is its cursor.
Does not belong here: what an outage is (`domain.outages`), filling (`filling`).
"""

# No `from __future__ import annotations` here: Dagster looks at the annotation of `context` itself.

import json
from collections.abc import Sequence

from dagster import DefaultSensorStatus, SensorDefinition, SensorEvaluationContext, SkipReason, sensor

from fks_backfill_dagster import wiring
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import iso
from fks_backfill_dagster.orchestration import pace
from fks_backfill_dagster.orchestration.groups import Group
from fks_backfill_dagster.orchestration.resources import DATABASE
from fks_backfill_dagster.pipeline.outages import Outage, find_outages
from fks_backfill_dagster.settings import Settings

SENSOR = "venue_outages"

MOST_LINES = 20
"""So many outages stand in one tick; the rest of them in the next ones."""


def build_outage_sensors(groups: Sequence[Group], settings: Settings) -> list[SensorDefinition]:
    """The sensor, where there is any series."""
    if not groups:
        return []
    series = [one for group in groups for one in group.series.values()]
    on = settings.automation.fill_gaps

    @sensor(
        name=SENSOR,
        minimum_interval_seconds=pace.OUTAGE_SECONDS,
        default_status=DefaultSensorStatus.RUNNING if on else DefaultSensorStatus.STOPPED,
        description="Tells once when several symbols of a venue lack the same candles. Starts no run.",
        required_resource_keys={DATABASE},
    )
    def venue_outages(context: SensorEvaluationContext) -> SkipReason:
        database = getattr(context.resources, DATABASE).database
        found = find_outages(database, series, TimeRange(0, wiring.now()), settings.end_of)
        told, lines = news(found, context.cursor)
        context.update_cursor(told)
        for line in lines:
            context.log.warning(line)
        return SkipReason("\n".join(lines) or "no venue has an outage that was not told")

    return [venue_outages]


def news(found: Sequence[Outage], cursor: str | None) -> tuple[str, list[str]]:
    """The new cursor, and a line for each outage that is not in the old one, MOST_LINES at most.

    An outage that goes on is known by its venue and beginning; one that is over and filled is forgotten.
    """
    known = set(json.loads(cursor)) if cursor else set()
    by_name = {f"{one.venue} {iso(one.window.start)}": one for one in found}
    fresh = [name for name in by_name if name not in known][:MOST_LINES]
    told = [name for name in by_name if name in known or name in fresh]
    return json.dumps(told), [str(by_name[name]) for name in fresh]
