"""The eligible providers of a series.

Belongs here: the choice by capabilities, keys and priority. Does not belong here: their behaviour during a
sync (`fallback`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.providers.base import Provider


@dataclass(frozen=True, slots=True)
class Eligible:
    """The providers that serve a series and have their key, in order of priority; a warning for each that
    is skipped because its key is missing."""

    providers: Mapping[str, Provider]
    warnings: tuple[str, ...]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.providers)


def eligible(providers: Mapping[str, Provider], series: Series, priority: Sequence[str]) -> Eligible:
    """The eligible providers of a series, by `priority`; those that do not serve it are excluded without a warning."""
    found: dict[str, Provider] = {}
    warnings = []
    for name in dict.fromkeys(priority):
        provider = providers.get(name)
        if provider is None or not provider.capabilities.serve(series):
            continue
        key = provider.missing_key()
        if key is None:
            found[name] = provider
        else:
            warnings.append(f"{name} is skipped: {key} is not set")
    return Eligible(found, tuple(warnings))


def strict(providers: Mapping[str, Provider]) -> frozenset[str]:
    """The names of the providers that return every interval, with or without trades."""
    return frozenset(name for name, one in providers.items() if not one.capabilities.omits_no_trade)
