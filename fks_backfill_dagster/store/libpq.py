"""The connection of a libpq client, such as psql, without its password on a command line."""

from __future__ import annotations

from psycopg.pq import Conninfo


def client_environment(url: str) -> dict[str, str]:
    """The libpq environment variables of a database's URL; parameters that have no variable are left out."""
    return {
        option.envvar.decode(): option.val.decode()
        for option in Conninfo.parse(url.encode())
        if option.envvar is not None and option.val is not None
    }
