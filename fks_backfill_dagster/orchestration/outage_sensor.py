"""The sensor that reports each outage of a whole venue once, in its tick, where the UI lists it.

Each affected series gets one observation, and its `data_freshness` is evaluated, which fails during the outage.
The sensor reads the ledger and requests no run; gaps are filled individually (`gap_sensor`). Its cursor holds what
was reported.

Does not belong here: what an outage is (`domain.outages`), filling (`gap_sensor`).
"""

# No `from __future__ import annotations` here: Dagster inspects the annotation of `context` at runtime.

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dagster import (
    AssetKey,
    AssetObservation,
    DefaultSensorStatus,
    MetadataValue,
    SensorDefinition,
    SensorEvaluationContext,
    SensorResult,
    sensor,
)

from fks_backfill_dagster import app
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, iso
from fks_backfill_dagster.orchestration import cadence
from fks_backfill_dagster.orchestration.freshness import events_to_log, freshness_results
from fks_backfill_dagster.orchestration.groups import Group, asset_key
from fks_backfill_dagster.orchestration.resources import DATABASE
from fks_backfill_dagster.pipeline.outages import Outage, find_outages
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.model import Settings

SENSOR = "venue_outages"

MOST_LINES = 20
"""Outages reported per tick; further ones are reported by the next ticks."""

MOST_OBSERVATIONS = 500
"""Events of either kind per tick: each is a transaction of the daemon."""

# An outage that ended this long ago gains no further series: the cursor then only holds that all were observed.
_FINAL_AFTER = MICROS_PER_DAY


def build_outage_sensors(
    groups: Sequence[Group], settings: Settings, catalog: Catalog
) -> list[SensorDefinition]:
    """The sensor, if there is any series."""
    if not groups:
        return []
    series = [one for group in groups for one in group.series.values()]
    on = settings.automation.fill_gaps

    @sensor(
        name=SENSOR,
        minimum_interval_seconds=cadence.OUTAGE_SECONDS,
        default_status=DefaultSensorStatus.RUNNING if on else DefaultSensorStatus.STOPPED,
        description="Reports once when the same candles of several symbols of a venue are missing. Starts no run.",
        required_resource_keys={DATABASE},
    )
    def venue_outages(context: SensorEvaluationContext) -> SensorResult:
        database, now = getattr(context.resources, DATABASE).database, app.now()
        found = find_outages(database, series, TimeRange(0, now), catalog.end_of)
        before = Reported.parse(context.cursor)
        reported, lines = new_outages(found, before.outages)
        observed, affected = observations(found, reported, before.observed, now)
        for line in lines:
            context.log.warning(line)
        results = freshness_results(database, affected, app.freshness_rule(settings), now)
        return SensorResult(
            skip_reason="\n".join(lines) or "no new outage of a venue",
            cursor=Reported(reported, observed.seen).dump(),
            asset_events=[*observed.events, *events_to_log(context.instance, results, affected, now)],
        )

    return [venue_outages]


@dataclass(frozen=True, slots=True)
class Reported:
    """The cursor: the reported outages (in the form of `new_outages`), and by outage the observed assets; None: all
    of them, finally."""

    outages: str | None
    observed: Mapping[str, Sequence[str] | None] = field(default_factory=dict)

    @classmethod
    def parse(cls, cursor: str | None) -> "Reported":
        """A list is the cursor of an older version: its outages count as reported and completely observed."""
        found = json.loads(cursor) if cursor else None
        if isinstance(found, list):
            return cls(cursor, dict.fromkeys(found))
        return cls(None) if found is None else cls(json.dumps(found["told"]), found["observed"])

    def dump(self) -> str:
        return json.dumps({"told": json.loads(self.outages or "[]"), "observed": self.observed})


def new_outages(found: Sequence[Outage], cursor: str | None) -> tuple[str, list[str]]:
    """The new cursor, and a line for each outage that is not in the old one, MOST_LINES at most.

    Venue and start identify an outage, so one that continues is not new. Filled outages leave the cursor.
    """
    known = set(json.loads(cursor)) if cursor else set()
    by_name = {_name(one): one for one in found}
    fresh = [name for name in by_name if name not in known][:MOST_LINES]
    reported = [name for name in by_name if name in known or name in fresh]
    return json.dumps(reported), [str(by_name[name]) for name in fresh]


@dataclass(frozen=True, slots=True)
class Observed:
    """New observations, and by outage all assets observed so far (None: complete)."""

    events: Sequence[AssetObservation]
    seen: Mapping[str, Sequence[str] | None]


def observations(
    found: Sequence[Outage], reported: str, before: Mapping[str, Sequence[str] | None], now: int
) -> tuple[Observed, dict[AssetKey, Series]]:
    """One observation for each series of a reported outage that has none yet, MOST_OBSERVATIONS at most.

    Also returns those series by asset: their freshness may have changed.
    """
    names = set(json.loads(reported))
    events: list[AssetObservation] = []
    seen: dict[str, Sequence[str] | None] = {}
    affected: dict[AssetKey, Series] = {}
    for outage in (one for one in found if _name(one) in names):
        known = before.get(_name(outage), ())
        if known is None:
            seen[_name(outage)] = None
            continue
        members = {asset_key(one): one for one in outage.series}
        fresh = [key for key in members if key.to_user_string() not in set(known)]
        some = fresh[: MOST_OBSERVATIONS - len(events)]
        events += [_observation(key, outage) for key in some]
        affected |= {key: members[key] for key in some}
        complete = len(some) == len(fresh) and outage.window.end < now - _FINAL_AFTER
        seen[_name(outage)] = None if complete else [*known, *(key.to_user_string() for key in some)]
    return Observed(events, seen), affected


def _observation(key: AssetKey, outage: Outage) -> AssetObservation:
    return AssetObservation(
        key,
        description=f"Outage of its venue: {outage}.",
        metadata={
            "venue": outage.venue,
            "start": iso(outage.window.start),
            "end": iso(outage.window.end),
            "symbols": f"{len(outage.symbols):,} of {outage.synced:,}",
            "statuses": MetadataValue.json([status.value for status in outage.statuses]),
            "providers": MetadataValue.json(list(outage.providers)),
        },
    )


def _name(outage: Outage) -> str:
    return f"{outage.venue} {iso(outage.window.start)}"
