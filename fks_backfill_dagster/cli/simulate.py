"""The command `simulate`: the local market, and the environment that points to it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fks_backfill_dagster.cli.arguments import usage
from fks_backfill_dagster.cli.output import Failed, example, json_option, log, print_json, print_line
from fks_backfill_dagster.cli.times import Moment

if TYPE_CHECKING:
    from fks_backfill_dagster.simulator.config import MarketConfig, Outage

MARKET_PORT = 8899
SANDBOX_HOME = "sandbox"
"""The folder below the usual home for the data of a local market."""


@click.command(
    epilog=example(
        "simulate",
        "simulate --replay candles --port 8899",
        "simulate --outage binance@BTC/USDT=2024-01-05T03:00/2024-01-05T07:30 --latency 0.05",
        "simulate --halt all@AAPL=2024-01-05T15:00/2024-01-05T16:00",
    )
    + '\n\n\b\nIn the shell that uses it:\n  eval "$(fks-backfill simulate --env)"'
)
@click.option(
    "--replay",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Serve the candles of <venue>/<SYMBOL>-<TIMEFRAME>.csv[.gz] below DIR instead of generated ones.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=MARKET_PORT,
    show_default=True,
    help="The port to listen on; 0 takes a free one.",
)
@click.option("--now", type=Moment(), help="Stops the market's clock at this time.")
@click.option(
    "--latency", type=click.FloatRange(min=0), default=0.0, metavar="SECONDS", help="Delay of every response."
)
@click.option(
    "--limits/--no-limits", default=True, show_default=True, help="Enforce Binance's request limits."
)
@click.option(
    "--outage",
    "outages",
    multiple=True,
    metavar="PROVIDER[@SYMBOL]=START/END",
    help="The provider omits every candle that overlaps the range; PROVIDER may be all. May be repeated.",
)
@click.option(
    "--halt",
    "halts",
    multiple=True,
    metavar="PROVIDER[@SYMBOL]=START/END",
    help="No trades in the range: coarser candles hold the trades around it. PROVIDER may be all. May be repeated.",
)
@click.option(
    "--home",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help=f"The FKS_HOME to print; by default the folder {SANDBOX_HOME} below the usual one.",
)
@click.option(
    "--env",
    "only_environment",
    is_flag=True,
    help="Print the environment for the market at --host and --port, and start nothing.",
)
@json_option
def simulate(
    replay: Path | None,
    host: str,
    port: int,
    now: int | None,
    latency: float,
    limits: bool,
    outages: tuple[str, ...],
    halts: tuple[str, ...],
    home: Path | None,
    only_environment: bool,
    as_json: bool,
) -> None:
    """Run the local market until Ctrl-C: all six providers, and Binance's archives, on one port.

    Prints the environment that points fks-backfill to it, with a separate home: simulated candles never
    enter the database of real ones. Its responses have the providers' formats, and faults and outages
    can be planted while it runs.
    """
    if only_environment:
        _print_environment_of_running(host, port, home, as_json)
        return
    from fks_backfill_dagster.simulator.config import MarketConfig

    config = MarketConfig(
        replay=replay,
        host=host,
        port=port,
        now=now,
        latency=latency,
        limits=limits,
        outages=_planted(outages, halts),
    )
    _run(config, home, as_json)


def _planted(outages: tuple[str, ...], halts: tuple[str, ...]) -> tuple[Outage, ...]:
    from fks_backfill_dagster.simulator.config import Absence, Outage

    with usage():
        return tuple(
            Outage.parse(text, kind)
            for kind, texts in ((Absence.OUTAGE, outages), (Absence.HALT, halts))
            for text in texts
        )


def _run(config: MarketConfig, home: Path | None, as_json: bool) -> None:
    """Serves the market until Ctrl-C."""
    from fks_backfill_dagster.loopback import is_loopback
    from fks_backfill_dagster.simulator.replay import ReplayError
    from fks_backfill_dagster.simulator.server import run

    def announce(url: str) -> None:
        if not is_loopback(config.host):
            log(
                f"Warning: --host {config.host} lets other machines use this market and, by its control routes, change"
                " what it serves. Without --host it listens on this machine only."
            )
        log(f"The local market listens at {url}. Ctrl-C ends it. To use it, in another terminal:")
        _print_environment(url, home, as_json)

    try:
        run(config, announce)
    except KeyboardInterrupt:
        return  # the normal end
    except ReplayError as error:
        raise Failed(f"{error}.") from None
    except OSError as error:
        raise Failed(f"The local market cannot start: {error}.") from None


def _print_environment_of_running(host: str, port: int, home: Path | None, as_json: bool) -> None:
    from fks_backfill_dagster.simulator.server import url_of

    if port == 0:
        raise click.UsageError("--env needs the port of the market: add --port")
    _find_market(url_of(host, port), port)
    _print_environment(url_of(host, port), home, as_json)


def _print_environment(url: str, home: Path | None, as_json: bool) -> None:
    """The environment in which fks-backfill uses the market at `url`, and no real data.

    FKS_DATABASE_URL takes precedence over the home, so it is unset. So are the keys if the market runs on another
    machine: the settings refuse to send them there unencrypted.
    """
    from fks_backfill_dagster.settings.load import home_of
    from fks_backfill_dagster.settings.model import KEY_VARIABLES
    from fks_backfill_dagster.settings.types import leaves_unencrypted

    usual = home_of()
    own = usual if usual.name == SANDBOX_HOME else usual / SANDBOX_HOME  # the shell may have it already
    environment = {
        "FKS_PROVIDERS__BINANCE__BASE_URL": f"{url}/binance",
        "FKS_PROVIDERS__BINANCE__ARCHIVE_URL": f"{url}/archive",
        "FKS_PROVIDERS__POLYGON__BASE_URL": f"{url}/polygon",
        "POLYGON_API_KEY": "any",
        "FKS_PROVIDERS__YFINANCE__BASE_URL": f"{url}/yahoo",
        "FKS_PROVIDERS__ALPHAVANTAGE__BASE_URL": f"{url}/alphavantage",
        "ALPHAVANTAGE_API_KEY": "premium",
        "FKS_PROVIDERS__OANDA__BASE_URL": f"{url}/oanda",
        "OANDA_API_TOKEN": "any",
        "FKS_PROVIDERS__COINGECKO__BASE_URL": f"{url}/coingecko",
        "COINGECKO_API_KEY": "any",
        "FKS_HOME": str((own if home is None else home).resolve()),
    }
    unset = ["FKS_DATABASE_URL"]
    if leaves_unencrypted(url):
        unset += KEY_VARIABLES.values()
        environment = {name: value for name, value in environment.items() if name not in unset}
    if as_json:
        print_json({"url": url, "environment": environment, "unset": unset})
        return
    for name, value in environment.items():
        print_line(f"export {name}={shlex.quote(value)}")
    for name in unset:
        print_line(f"unset {name}")


def _find_market(url: str, port: int) -> None:
    """Logs that there is no market at `url` yet. Raises Failed if another server listens there."""
    from urllib.error import URLError
    from urllib.request import ProxyHandler, build_opener

    from fks_backfill_dagster.simulator.server import TITLE

    try:
        with build_opener(ProxyHandler({})).open(url, timeout=2) as response:
            is_market = response.read(len(TITLE)) == TITLE.encode()
    except (URLError, OSError) as error:
        if not isinstance(getattr(error, "reason", error), ConnectionRefusedError):
            raise Failed(
                f"The server at {url} is not a local market ({error}): choose another --port."
            ) from None
        log(f"Nothing listens at {url} yet: start `fks-backfill simulate --port {port}` in another terminal.")
        return
    if not is_market:
        raise Failed(f"The server at {url} is not a local market: choose another --port.")
