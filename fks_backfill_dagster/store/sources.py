"""Whose candles a database holds: of the providers' documented hosts, or of custom ones such as a simulator.

Belongs here: which hosts the lineage names, and that both kinds do not mix. Does not belong here: which hosts are
documented (`wiring`), and what an operator allows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import MixedSources

# From one provider to the next and from one host to the next in the index `batch_by_host`: a few look-ups,
# however many batches there are. The last host of each provider is NULL, which stands for the batches from
# before hosts were kept. A pair counts while one of its batches was not undone.
_HOSTS = """
WITH RECURSIVE provider AS (
    SELECT min(b.provider) AS name FROM fks.batch b
    UNION ALL
    SELECT (SELECT min(b.provider) FROM fks.batch b WHERE b.provider > p.name) FROM provider p
    WHERE p.name IS NOT NULL
), pair AS (
    SELECT p.name, (SELECT min(b.host) FROM fks.batch b WHERE b.provider = p.name) AS host
    FROM provider p WHERE p.name IS NOT NULL
    UNION ALL
    SELECT p.name, (SELECT min(b.host) FROM fks.batch b WHERE b.provider = p.name AND b.host > p.host)
    FROM pair p WHERE p.host IS NOT NULL
)
SELECT p.name AS provider, p.host FROM pair p WHERE CASE WHEN p.host IS NULL
    THEN EXISTS (SELECT FROM fks.batch b WHERE b.provider = p.name AND b.host IS NULL AND b.undoes IS NULL
        AND NOT EXISTS (SELECT FROM fks.batch u WHERE u.undoes = b.id))
    ELSE EXISTS (SELECT FROM fks.batch b WHERE b.provider = p.name AND b.host = p.host AND b.undoes IS NULL
        AND NOT EXISTS (SELECT FROM fks.batch u WHERE u.undoes = b.id))
    END
ORDER BY 1, 2
"""


@dataclass(frozen=True, slots=True)
class HostInUse:
    """Where a provider is requested by the settings: scheme, host and port; custom if not documented for it."""

    host: str
    is_custom: bool


def hosts(database: Database) -> dict[str, frozenset[str | None]]:
    """The hosts that delivered to this database, by provider; None: before hosts were kept."""
    with database.begin() as connection:
        rows = connection.execute(sa.text(_HOSTS)).all()
    return {
        name: frozenset(row.host for row in rows if row.provider == name)
        for name in dict.fromkeys(row.provider for row in rows)
    }


def check(
    database: Database,
    in_use: Mapping[str, HostInUse],
    is_documented: Callable[[str, str], bool],
) -> None:
    """Raises MixedSources where a sync with these hosts would mix documented and custom ones.

    `in_use`: the providers that would be requested, by name. `is_documented` takes a provider and a host. All
    custom hosts are one kind (a simulator takes a new port at each start), and candles from before hosts were
    kept count as documented.
    """
    stored = hosts(database)
    custom = {
        name: min(host for host in found if host is not None and not is_documented(name, host))
        for name, found in stored.items()
        if any(host is not None and not is_documented(name, host) for host in found)
    }
    documented = {
        name
        for name, found in stored.items()
        if any(host is None or is_documented(name, host) for host in found)
    }
    for name, used in in_use.items():
        if used.is_custom and (name in documented or (documented and not custom)):
            holder = name if name in documented else min(documented)
            raise _mixed(f"candles of {holder} from its documented host", name, used.host)
    keeps_custom = any(used.is_custom for used in in_use.values())
    for name, used in in_use.items():
        if not used.is_custom and (name in custom or (custom and not documented and not keeps_custom)):
            holder = name if name in custom else min(custom)
            raise _mixed(f"candles of {holder} from {custom[holder]}", name, used.host)


def _mixed(stored: str, name: str, host: str) -> MixedSources:
    return MixedSources(
        f"This database holds {stored}, and the settings request {name} from {host}: candles of documented and"
        " custom hosts are not mixed. Use another database (FKS_HOME or FKS_DATABASE_URL), correct"
        f" providers.{name}.base_url, or set allow_mixed_sources: true."
    )
