"""The configuration of a run: what it requests, and from which providers.

It has no address and no key: a run cannot change where requests go (`resources`).
Does not belong here: the range that a refresh requests (`refresh`), how a run is executed (`assets`).
"""

# No `from __future__ import annotations` here: Dagster inspects the annotations of a Config at runtime.

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from dagster import Config, DagsterRun, Failure
from pydantic import Field

from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.orchestration.groups import op_name
from fks_backfill_dagster.orchestration.resources import PROVIDERS
from fks_backfill_dagster.pipeline.plan import Scope
from fks_backfill_dagster.settings.model import Settings

REFRESH = "fks/refresh"
"""The tag of a refresh, its value the timeframe."""

FILL = "fks/fill"
"""The tag of a run that fills gaps, its value the partition."""


class SyncMode(StrEnum):
    """What a run requests of the partitions it covers."""

    BACKFILL = "backfill"
    """Missing candles and every gap, due or not."""
    REFRESH = "refresh"
    """Candles that have closed since the last sync."""
    FILL_GAPS = "fill_gaps"
    """Due gaps; ranges that were never synced stay pending."""
    REFETCH = "refetch"
    """All candles; stored ones that a provider returns differently are corrected, their former values kept."""

    @property
    def scope(self) -> Scope:
        scopes = {SyncMode.FILL_GAPS: Scope.GAPS, SyncMode.REFETCH: Scope.EVERYTHING}
        return scopes.get(self, Scope.MISSING)

    @property
    def rechecks(self) -> bool:
        """Whether gaps that are not due, and providers in cool-down, are requested: as an operator expects."""
        return self in (SyncMode.BACKFILL, SyncMode.REFETCH)


if TYPE_CHECKING:
    ProviderName = str
else:
    # Dagster checks an enum before a run starts, and its error repeats the enum's name, not its values.
    ProviderName = StrEnum(f"one of {', '.join(PROVIDERS)}", {name: name for name in PROVIDERS})


class SyncConfig(Config):
    """The configuration of the ops that materialize series, shown in the launchpad."""

    mode: Literal["backfill", "refresh", "fill_gaps", "refetch"] = Field(
        default="backfill",
        description="backfill: missing candles and gaps. refetch: all candles; stored ones that a provider returns"
        " differently are corrected. refresh: candles closed since the last sync. fill_gaps: due gaps only.",
    )
    providers: list[ProviderName] = Field(
        default=[],
        description="The providers to request, in this order; empty: the priority of the settings."
        f" Available: {', '.join(PROVIDERS)}.",
    )


@dataclass(frozen=True, slots=True)
class SyncOptions:
    """What a run does. `providers` in the order of requests; empty: the priority of each series."""

    mode: SyncMode = SyncMode.BACKFILL
    providers: tuple[str, ...] = ()


def options_of(run: DagsterRun, op: str, config: SyncConfig, settings: Settings) -> SyncOptions:
    """The options of a run by its configuration.

    Where that has no mode, the tags decide: earlier versions queued refreshes and gap fillings with tags only.
    Raises Failure for a disabled provider.
    """
    try:
        settings.check_enabled(config.providers)
    except ValueError as error:
        raise Failure(f"op {op}, providers: {error}", allow_retries=False) from None
    ops: Mapping[str, Any] = run.run_config.get("ops") or {}  # type: ignore[assignment]
    given = ops.get(op, {}).get("config") or {}
    mode = SyncMode(config.mode) if "mode" in given else _tagged(run.tags)
    return SyncOptions(mode, tuple(config.providers))


def _tagged(tags: Mapping[str, str]) -> SyncMode:
    if REFRESH in tags:
        return SyncMode.REFRESH
    return SyncMode.FILL_GAPS if FILL in tags else SyncMode.BACKFILL


def run_config(mode: SyncMode, series: Iterable[Series]) -> dict[str, Any]:
    """The configuration of a run of these series."""
    names = dict.fromkeys(op_name(one.asset_class, one.timeframe) for one in series)
    return {"ops": {name: {"config": {"mode": mode.value}} for name in names}}
