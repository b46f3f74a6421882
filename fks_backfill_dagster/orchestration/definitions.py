"""The module that Dagster loads (workspace.yaml): the definitions for the settings of the working folder."""

from __future__ import annotations

from fks_backfill_dagster.orchestration.build import build_defs

defs = build_defs()
