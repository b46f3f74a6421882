"""Why a run was asked for, told by its tags: by a person, by a refresh, or to fill gaps."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from fks_backfill_dagster.orchestration.run_config import REFRESH

FILL = "fks/fill"
"""The tag of a run that fills gaps, its value the partition."""


class Errand(Enum):
    BACKFILL = "backfill"
    REFRESH = "refresh"
    FILL = "fill"

    @classmethod
    def of(cls, tags: Mapping[str, str]) -> Errand:
        if REFRESH in tags:
            return cls.REFRESH
        return cls.FILL if FILL in tags else cls.BACKFILL
