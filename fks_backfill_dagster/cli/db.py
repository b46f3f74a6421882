"""`fks-backfill db`: the database itself, the embedded one or the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from fks_backfill_dagster.cli.output import (
    Failed,
    confirm,
    example,
    json_option,
    log,
    many,
    print_json,
    print_line,
    print_table,
    wide_option,
)

if TYPE_CHECKING:
    from fks_backfill_dagster.documents import Document
    from fks_backfill_dagster.embedded.clusters import Cluster
    from fks_backfill_dagster.settings.model import Settings
    from fks_backfill_dagster.store.roles import Reader

LONGEST_ROLE_NAME = 63
"""PostgreSQL truncates longer names, so another role would get the grants."""

ROLES_DOC = "docs/operations.md, Roles"


@click.group()
def db() -> None:
    """The database: that of FKS_DATABASE_URL, or the embedded one under FKS_HOME."""


@db.command(epilog=example("db url") + '\n  psql "$(fks-backfill db url)"')
@json_option
def url(as_json: bool) -> None:
    """Print the database's URL for psql and other clients, with its password if it has one.

    The embedded PostgreSQL is started and runs until `db stop`.
    """
    from fks_backfill_dagster.settings.load import load_settings

    found = _kept_url(load_settings())
    if as_json:
        print_json({"url": found})
    else:
        print_line(found)


@db.command(epilog=example("db shell", "db shell -- -c 'SELECT * FROM fks.sync_status'"))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- PSQL ARGUMENTS]")
def shell(arguments: tuple[str, ...]) -> int:
    """Open psql on the database; arguments after -- go to psql, whose exit code is returned.

    The connection is passed in the environment, so that a password appears in no list of processes. The embedded
    PostgreSQL runs at least as long as psql.
    """
    import shutil

    from fks_backfill_dagster.app import connect, database_url, embedded, open_database
    from fks_backfill_dagster.settings.load import load_settings
    from fks_backfill_dagster.store.libpq import client_environment

    settings = load_settings()
    program = shutil.which("psql")
    with ExitStack() as stack:
        if embedded(settings) is not None:  # a database of the user's own may need the shell for its schema
            stack.enter_context(open_database(settings))
        url = database_url(settings)
        if program is None:
            raise Failed(_without_psql(connect(settings, url).where))
        return _run_client([program, *arguments], client_environment(url))


def _role_name(context: click.Context, option: click.Parameter, name: str | None) -> str | None:
    try:
        size = None if name is None else len(name.encode())
    except UnicodeEncodeError:  # the argument is not UTF-8
        size = 0
    if name is not None and (not size or size > LONGEST_ROLE_NAME or "\0" in name):
        raise click.BadParameter(f"a role's name has 1 to {LONGEST_ROLE_NAME} bytes of UTF-8.")
    return name


@db.command(epilog=example("db init", "db init --reader fks_reader"))
@click.option(
    "--reader",
    metavar="NAME",
    callback=_role_name,
    help="Grant this role read access to the views only; created (without login) if it does not exist.",
)
@json_option
def init(reader: str | None, as_json: bool) -> None:
    """Create the schema if it is missing; the embedded PostgreSQL is started and runs until `db stop`."""
    _prepare(as_json, upgrade=False, reader=reader)


@db.command(epilog=example("db upgrade"))
@json_option
def upgrade(as_json: bool) -> None:
    """Upgrade the schema to the version of this program."""
    _prepare(as_json, upgrade=True)


@db.command(epilog=example("db stop"))
@json_option
def stop(as_json: bool) -> None:
    """Stop the embedded PostgreSQL, even while it is in use. Committed data is kept."""
    from fks_backfill_dagster.app import embedded
    from fks_backfill_dagster.settings.load import load_settings

    server = embedded(load_settings())
    stopped = server is not None and server.stop()
    if as_json:
        print_json({"embedded": server is not None, "stopped": stopped})
    elif server is None:
        print_line("Nothing to stop: FKS_DATABASE_URL names a database of your own.")
    else:
        print_line("Stopped." if stopped else "It was not running.")


@db.command("list", epilog=example("db list", "db list --json"))
@wide_option
@json_option
def list_clusters(as_json: bool) -> None:
    """List the clusters of embedded databases: that of this home, and for root those in /var/lib/fks-backfill.

    A cluster is `running`, `in use` (its home exists), an `orphan` (its home is gone), or `unknown` (created by an
    earlier version: its home is recorded at the next start).
    """
    from fks_backfill_dagster.embedded import clusters
    from fks_backfill_dagster.settings.load import load_settings

    own = clusters.of_home(load_settings().home)
    others = [one for one in clusters.elsewhere() if own is None or one.folder != own.folder]
    found = [(one, one.size()) for one in (*([] if own is None else [own]), *others)]
    if as_json:
        print_json([_cluster(*each) for each in found])
        return
    rows = [(one.folder, one.home or "", _megabytes(size), one.state.value) for one, size in found]
    print_table(("cluster", "home", "size", "state"), rows)
    orphans = [size for one, size in found if one.state is clusters.State.ORPHAN]
    if orphans:
        log(
            f"{many(len(orphans), 'orphan')}, {_megabytes(sum(orphans))}: `fks-backfill db remove` removes them."
        )


@db.command(epilog=example("db remove", "db remove cluster-0c2d71476addc399 --yes"))
@click.argument("names", nargs=-1, metavar="[CLUSTER]...")
@click.option("--yes", is_flag=True, help="Remove without confirmation.")
@json_option
def remove(names: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """Remove clusters whose home is gone, with all their data: all orphans, or those named.

    An `unknown` cluster is removed only if it is named here. A cluster whose server runs or whose home exists
    is never removed.
    """
    from fks_backfill_dagster.embedded import clusters

    chosen = [(one, one.size()) for one in _chosen(names, clusters.elsewhere())]
    if chosen and not yes:
        for one, size in chosen:
            log(f"{one.folder}  {one.home or 'home unknown'}  {_megabytes(size)}")
        confirm(
            f"Remove {many(len(chosen), 'cluster')} with all data?",
            "Nothing was removed; --yes removes without confirmation.",
        )
    for one, _ in chosen:
        clusters.remove(one)
    if as_json:
        print_json([_cluster(*each) for each in chosen])
    elif chosen:
        print_line(f"Removed {many(len(chosen), 'cluster')}, {_megabytes(sum(size for _, size in chosen))}.")
    else:
        print_line("There is no cluster whose home is gone.")


def _chosen(names: Sequence[str], found: Sequence[Cluster]) -> list[Cluster]:
    """The clusters of these names or paths; without any, the orphans."""
    from fks_backfill_dagster.embedded.clusters import State

    if not names:
        return [one for one in found if one.state is State.ORPHAN]
    known = {key: one for one in found for key in (one.name, str(one.folder))}
    for name in names:
        if name.rstrip("/") not in known:
            raise click.BadParameter(f"there is no cluster {name}: `fks-backfill db list` shows them.")
    return list({known[name.rstrip("/")].folder: known[name.rstrip("/")] for name in names}.values())


def _cluster(one: Cluster, size: int) -> Document:
    return {
        "cluster": str(one.folder),
        "home": None if one.home is None else str(one.home),
        "size_bytes": size,
        "state": one.state.value,
    }


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def _prepare(as_json: bool, *, upgrade: bool, reader: str | None = None) -> None:
    from fks_backfill_dagster.app import connect, database_url
    from fks_backfill_dagster.settings.load import load_settings
    from fks_backfill_dagster.store import roles

    settings = load_settings()
    database = connect(settings, database_url(settings), pool_size=1)
    try:
        if upgrade:
            database.upgrade()
        database.ensure()
        revision, timescale = database.revision(), database.has_timescale()
        reading = None if reader is None else roles.make_reader(database, reader)
        _kept_url(settings)  # only after success: a failed command leaves no server running
    finally:
        database.dispose()
    if as_json:
        document: dict[str, object] = {
            "database": database.where,
            "revision": revision,
            "timescaledb": timescale,
        }
        if reading is not None:
            document["reader"] = asdict(reading)
        print_json(document)
        return
    kind = "TimescaleDB" if timescale else "plain PostgreSQL"
    print_line(f"{database.where} ({kind}) has the schema fks, revision {revision}.")
    if reading is not None:
        print_line(_sentence(reading))


def _sentence(reader: Reader) -> str:
    made = "was created" if reader.made else "exists"
    granted = (
        f"is granted {', '.join(reader.granted)}" if reader.granted else "has all privileges of a reader"
    )
    login = (
        "" if reader.can_log_in else f" It cannot log in: grant it to a role that can, or see {ROLES_DOC}."
    )
    return f"The role {reader.name} {made} and {granted}.{login}"


def _without_psql(where: str) -> str:
    return (
        "psql is not on the PATH: install PostgreSQL's client (Debian, Ubuntu: `apt-get install postgresql-client`;"
        " Fedora: `dnf install postgresql`; macOS: `brew install libpq`), or connect another client to"
        f" {where}; `fks-backfill db url` starts an embedded server and prints the URL with its password."
    )


def _run_client(command: Sequence[str], connection: dict[str, str]) -> int:
    """Runs an interactive client and returns its exit code. Ctrl-C is for the client: it cancels a query."""
    import os
    import signal
    import subprocess

    before = signal.signal(
        signal.SIGINT, lambda number, frame: None
    )  # not ignored: the client would inherit that
    try:
        with subprocess.Popen(command, env=os.environ | connection) as client:
            try:
                return client.wait()
            except BaseException:
                client.terminate()
                raise
    finally:
        signal.signal(signal.SIGINT, before)


def _kept_url(settings: Settings) -> str:
    """The URL; the embedded server runs on after this command."""
    from fks_backfill_dagster.app import database_url, embedded

    server = embedded(settings)
    return database_url(settings) if server is None else server.start(keep=True)
