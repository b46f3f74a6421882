"""`fks-backfill db`: the database itself, the embedded one or the user's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fks_backfill_dagster.cli.speaking import answer, answer_json, example, json_option

if TYPE_CHECKING:
    from fks_backfill_dagster.settings import Settings


@click.group()
def db() -> None:
    """The database: that of FKS_DATABASE_URL, or the embedded one under FKS_HOME."""


@db.command(epilog=example("db url") + '\n  psql "$(fks-backfill db url)"')
@json_option
def url(as_json: bool) -> None:
    """Print the database's URL for psql and other clients, with its password if it has one.

    The embedded PostgreSQL is started and runs until `db stop`.
    """
    from fks_backfill_dagster.settings import load_settings

    found = _kept_url(load_settings())
    if as_json:
        answer_json({"url": found})
    else:
        answer(found)


@db.command(epilog=example("db init"))
@json_option
def init(as_json: bool) -> None:
    """Make the schema where there is none; the embedded PostgreSQL is started and runs until `db stop`."""
    _prepare(as_json, upgrade=False)


@db.command(epilog=example("db upgrade"))
@json_option
def upgrade(as_json: bool) -> None:
    """Bring the schema to this program's version."""
    _prepare(as_json, upgrade=True)


@db.command(epilog=example("db stop"))
@json_option
def stop(as_json: bool) -> None:
    """Stop the embedded PostgreSQL, whoever uses it. Nothing that was committed is lost."""
    from fks_backfill_dagster.settings import load_settings
    from fks_backfill_dagster.wiring import embedded

    server = embedded(load_settings())
    stopped = server is not None and server.stop()
    if as_json:
        answer_json({"embedded": server is not None, "stopped": stopped})
    elif server is None:
        answer("Nothing to stop: FKS_DATABASE_URL names a database of your own.")
    else:
        answer("Stopped." if stopped else "It was not running.")


def _prepare(as_json: bool, *, upgrade: bool) -> None:
    from fks_backfill_dagster.settings import load_settings
    from fks_backfill_dagster.store.database import Database

    database = Database(_kept_url(load_settings()), pool_size=1)
    try:
        if upgrade:
            database.upgrade()
        database.ensure()
        revision, timescale = database.revision(), database.has_timescale()
    finally:
        database.dispose()
    if as_json:
        answer_json({"database": database.where, "revision": revision, "timescaledb": timescale})
    else:
        kind = "TimescaleDB" if timescale else "plain PostgreSQL"
        answer(f"{database.where} ({kind}) has the schema fks, revision {revision}.")


def _kept_url(settings: Settings) -> str:
    """The URL; the embedded server outlives this command."""
    from fks_backfill_dagster.wiring import database_url, embedded

    server = embedded(settings)
    return database_url(settings) if server is None else server.start(keep=True)
