"""The sensor that reports an outage of a whole venue, once: in its tick, where the UI lists it.

Each series of the outage gets one observation, and its `data_freshness` is evaluated: while the outage goes on,
it fails. The sensor reads the ledger and requests no run: each gap is filled by itself. What it has reported is
its cursor.
Does not belong here: what an outage is (`domain.outages`), filling (`gap_sensor`).
"""

# No `from __future__ import annotations` here: Dagster looks at the annotation of `context` itself.

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
from fks_backfill_dagster.orchestration.freshness import freshness_results, worth_an_event
from fks_backfill_dagster.orchestration.groups import Group, asset_key
from fks_backfill_dagster.orchestration.resources import DATABASE
from fks_backfill_dagster.pipeline.outages import Outage, find_outages
from fks_backfill_dagster.settings.model import Settings

SENSOR = "venue_outages"

MOST_LINES = 20
"""So many outages stand in one tick; the rest of them in the next ones."""

MOST_OBSERVATIONS = 500
"""So many events of either kind a tick leaves behind: each is a transaction of the daemon."""

# What is over for so long gets no further series: then it is enough to remember that all were observed.
_OVER = MICROS_PER_DAY


def build_outage_sensors(groups: Sequence[Group], settings: Settings) -> list[SensorDefinition]:
    """The sensor, where there is any series."""
    if not groups:
        return []
    series = [one for group in groups for one in group.series.values()]
    on = settings.automation.fill_gaps

    @sensor(
        name=SENSOR,
        minimum_interval_seconds=cadence.OUTAGE_SECONDS,
        default_status=DefaultSensorStatus.RUNNING if on else DefaultSensorStatus.STOPPED,
        description="Reports once when several symbols of a venue lack the same candles. Starts no run.",
        required_resource_keys={DATABASE},
    )
    def venue_outages(context: SensorEvaluationContext) -> SensorResult:
        database, now = getattr(context.resources, DATABASE).database, app.now()
        found = find_outages(database, series, TimeRange(0, now), settings.end_of)
        before = Reported.parse(context.cursor)
        told, lines = news(found, before.told)
        observed, affected = observations(found, told, before.observed, now)
        for line in lines:
            context.log.warning(line)
        results = freshness_results(database, affected, app.freshness_rule(settings), now)
        return SensorResult(
            skip_reason="\n".join(lines) or "no venue has an outage that was not told",
            cursor=Reported(told, observed.seen).dump(),
            asset_events=[*observed.events, *worth_an_event(context.instance, results, affected, now)],
        )

    return [venue_outages]


@dataclass(frozen=True, slots=True)
class Reported:
    """What the cursor holds: the outages that were told (as `news` has them), and by outage the assets that
    were observed; None: all that ever will be."""

    told: str | None
    observed: Mapping[str, Sequence[str] | None] = field(default_factory=dict)

    @classmethod
    def parse(cls, cursor: str | None) -> "Reported":
        """A list is the cursor of an older version: its outages were told, and stay as they are."""
        found = json.loads(cursor) if cursor else None
        if isinstance(found, list):
            return cls(cursor, dict.fromkeys(found))
        return cls(None) if found is None else cls(json.dumps(found["told"]), found["observed"])

    def dump(self) -> str:
        return json.dumps({"told": json.loads(self.told or "[]"), "observed": self.observed})


def news(found: Sequence[Outage], cursor: str | None) -> tuple[str, list[str]]:
    """The new cursor, and a line for each outage that is not in the old one, MOST_LINES at most.

    An outage that goes on is known by its venue and beginning; one that is over and filled is forgotten.
    """
    known = set(json.loads(cursor)) if cursor else set()
    by_name = {_name(one): one for one in found}
    fresh = [name for name in by_name if name not in known][:MOST_LINES]
    told = [name for name in by_name if name in known or name in fresh]
    return json.dumps(told), [str(by_name[name]) for name in fresh]


@dataclass(frozen=True, slots=True)
class Observed:
    """New observations, and the assets that are observed with them, by outage."""

    events: Sequence[AssetObservation]
    seen: Mapping[str, Sequence[str] | None]


def observations(
    found: Sequence[Outage], told: str, before: Mapping[str, Sequence[str] | None], now: int
) -> tuple[Observed, dict[AssetKey, Series]]:
    """One observation for every series of a told outage that has none yet, MOST_OBSERVATIONS at most.

    Also those series by asset: what befell them may have changed their freshness.
    """
    names = set(json.loads(told))
    events: list[AssetObservation] = []
    seen: dict[str, Sequence[str] | None] = {}
    affected: dict[AssetKey, Series] = {}
    for outage in (one for one in found if _name(one) in names):
        known = before.get(_name(outage), ())
        if known is None:
            seen[_name(outage)] = None
            continue
        lacking = {asset_key(one): one for one in outage.series}
        fresh = [key for key in lacking if key.to_user_string() not in set(known)]
        some = fresh[: MOST_OBSERVATIONS - len(events)]
        events += [_observation(key, outage) for key in some]
        affected |= {key: lacking[key] for key in some}
        complete = len(some) == len(fresh) and outage.window.end < now - _OVER
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
