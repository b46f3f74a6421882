"""What Dagster loads (workspace.yaml): the definitions of the settings found from here."""

from __future__ import annotations

from fks_backfill_dagster.orchestration.build import build_defs

defs = build_defs()
