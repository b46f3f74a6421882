"""Commands that start and stop Dagster: `demo`, `up`, `down`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fks_backfill_dagster.cli.output import (
    Failed,
    example,
    is_verbose,
    json_option,
    log,
    many,
    print_json,
    print_line,
    verbose_option,
)

if TYPE_CHECKING:
    from fks_backfill_dagster.settings.model import Settings

DAGSTER_PORT = 3000
"""The same as `servers.PORT`, which is not imported for `--help`."""


@click.command(epilog=example("demo", "demo --keep"))
@click.option("--keep", is_flag=True, help="Leave the servers running afterwards.")
def demo(keep: bool) -> int:
    """Run everything once on a local market: backfill through Dagster, fill an outage, check, report.

    Exit code 0 only if no gap is open at the end.
    """
    from fks_backfill_dagster.demo.demo import run_demo
    from fks_backfill_dagster.host.servers import ServersError

    try:
        return run_demo(keep=keep)
    except ServersError as error:
        raise Failed(str(error)) from None


@click.command(epilog=example("up", "up --port 3001"))
@click.option(
    "--port",
    type=click.IntRange(1, 65_535),
    default=None,
    show_default=str(DAGSTER_PORT),
    help="Port of Dagster's webserver. An error if it already listens on another one.",
)
@verbose_option
@json_option
def up(port: int | None, as_json: bool) -> None:
    """Start the database (if it is the embedded one), Dagster's webserver and daemon.

    They run in the background until `down`. Servers that already run are not restarted. The printed address
    holds the token that the pages require (webserver.login). Prints as well which providers are skipped because
    their key is not set, and the automation that has started.
    """
    from fks_backfill_dagster.host import servers
    from fks_backfill_dagster.settings.load import load_settings

    settings = load_settings()
    say = log if as_json else print_line
    try:
        running = servers.up(settings, port=port, say=say)
    except servers.ServersError as error:
        raise Failed(str(error)) from None
    addresses, keys = settings.custom_addresses(), _missing_keys(settings)
    if as_json:
        print_json(
            {
                "url": running.url,
                "token": running.token,
                "logs": str(running.logs),
                "started": running.started,
                "addresses": addresses,
                "missing_keys": keys,
                "automation": settings.automation.model_dump(mode="json"),
            }
        )
    for name, address in addresses.items():
        say(f"{name} is requested at {address}, not at its default address.")
    if keys:
        names = ", ".join(f"{name} ({variable})" for name, variable in keys.items())
        say(f"Skipped without a key: {names}. Set it, then run `fks-backfill down` and `up`.")
    for line in _automation(settings):
        say(line)
    if is_verbose():
        _log_processes(settings)


def _missing_keys(settings: Settings) -> dict[str, str]:
    """The providers of the configured series whose key is not set, with its variable."""
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.model import KEY_VARIABLES

    catalog = Catalog(settings)
    used = {name for one in catalog.series for name in catalog.priority(one)}
    return {
        name: variable
        for name, variable in KEY_VARIABLES.items()
        if name in used and settings.key_of(name) is None
    }


def _automation(settings: Settings) -> list[str]:
    """What Dagster does automatically, and what it does not."""
    from fks_backfill_dagster.settings.catalog import Catalog

    chosen, series = settings.automation, Catalog(settings).series
    frames = dict.fromkeys(one.timeframe for one in series if one.timeframe in chosen.refresh)
    tasks = [
        *([f"refresh of {' '.join(frames)}"] if frames else []),
        *(["gap filling"] if chosen.fill_gaps else []),
        *(["daily checks"] if chosen.checks else []),
        *(["audits"] if chosen.audit else []),
        *(["deletion of old runs"] if chosen.housekeeping else []),
    ]
    count = many(len(series), "series")
    return [
        f"Automatic for {count}: {', '.join(tasks) or 'nothing'} (automation in the settings).",
        "Earlier history is fetched on request only: `fks-backfill launch --all`.",
    ]


def _log_processes(settings: Settings) -> None:
    from fks_backfill_dagster.host.processes import backgrounds

    for one in backgrounds(settings.home):
        log(f"  {one.name}: process {one.pid}, log {one.log}")


@click.command(epilog=example("down"))
@json_option
def down(as_json: bool) -> None:
    """Stop the servers that `up` has started, and the embedded database.

    Prints first which runs have not ended: those in progress end as failed, and what they have committed is kept.
    """
    from fks_backfill_dagster.host import servers
    from fks_backfill_dagster.settings.load import load_settings

    settings = load_settings()
    try:
        stopped = servers.down(settings, say=log if as_json else print_line)
    except servers.ServersError as error:
        raise Failed(str(error)) from None
    if as_json:
        print_json({"stopped": stopped})
