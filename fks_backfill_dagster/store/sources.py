"""The hosts that a database's candles come from: documented ones of the providers, or custom ones such as a simulator.

Belongs here: the hosts in the lineage, and the check that both kinds do not mix. Does not belong here: which hosts
are documented (`app`), and the setting that allows a mix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import MixedSources

# From one pair to the next in the index `batch_by_host`: a few look-ups, however many batches there are. Undone
# batches do not count.
_STANDING = "b.undoes IS NULL AND b.undone_by IS NULL"
_HOSTS = f"""
WITH RECURSIVE pair AS (
    SELECT f.* FROM (
        SELECT b.provider, b.host FROM fks.batch b WHERE {_STANDING} ORDER BY b.provider, b.host LIMIT 1) f
    UNION ALL
    SELECT n.* FROM pair p CROSS JOIN LATERAL (
        SELECT b.provider, b.host FROM fks.batch b
        WHERE (b.provider, b.host) > (p.provider, p.host) AND {_STANDING}
        ORDER BY b.provider, b.host LIMIT 1) n
)
SELECT provider, host FROM pair
"""

UNKNOWN = ""
"""The host of batches from before hosts were recorded."""


@dataclass(frozen=True, slots=True)
class HostInUse:
    """The host of a provider by the settings (scheme, host and port); custom if not documented for it."""

    host: str
    is_custom: bool


def hosts(database: Database) -> dict[str, frozenset[str]]:
    """The hosts that delivered candles to this database, by provider; may include UNKNOWN."""
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
    custom hosts are one kind (a simulator gets a new port at each start); candles from before hosts were recorded
    count as neither. Settings that name both kinds (one provider behind a proxy) are allowed as long as each
    provider stays with its kind.
    """
    custom: dict[str, str] = {}
    documented: dict[str, str] = {}
    for name, found in hosts(database).items():
        undocumented = {host for host in found if host != UNKNOWN and not is_documented(name, host)}
        if undocumented:
            custom[name] = min(undocumented)
        if official := found - undocumented - {UNKNOWN}:
            documented[name] = max(official)
    for name, used in in_use.items():
        if used.is_custom and (name in documented or (documented and not custom)):
            holder = name if name in documented else min(documented)
            raise _mixed(f"candles of {holder} from {documented[holder]}", name, used.host)
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
