"""`make docs`: what the documents quote is produced by the program.

command-line.md  from the commands themselves
settings.md      its tables, from the models of the settings
tutorial.md      each command of its session is run against a local market, and its output is put below it

A test compares them with the program: the references to the letter, the session but for its figures.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import click
import psycopg
from settings_tables import with_tables

from fks_backfill_dagster.cli.main import main
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.embedded import EmbeddedPostgres
from fks_backfill_dagster.settings.model import CHECKOUT
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.simulator.config import instant

DOCS = Path(__file__).parent
REFERENCE, SETTINGS, TUTORIAL = (DOCS / name for name in ("command-line.md", "settings.md", "tutorial.md"))
WIDTH = 100

_HEAD = """\
# Command line

Made by `make docs` from the commands' own `--help`. The command is `fks-backfill`, in the repository after
`make env` and `. .venv/bin/activate`.

`SYMBOL` is `BTC/USDT` or `BTC_USDT`, or a glob such as `'*/USDT'`; without `TIMEFRAME` all of its timeframes.
`--all` takes every configured symbol, also with a `TIMEFRAME`. Reports, `fill-gaps` and `audit` are about all series if
no argument is given.

A time is ISO 8601, UTC where no zone is given; `2024` and `2024-01` are the first instant of that year or month; `-7d`
is seven days before now (units `m` minutes, `h`, `d`, `w`). `--end` is exclusive, so `--start 2024 --end 2025` is one
year.

With `--json` the result is one JSON document on stdout; progress and messages go to stderr. Messages are short and
printed once; `-v` prints all of them, with URLs. Tables fit the terminal, `--wide` prints them in full; a pipe or a
file always gets full tables, plain lines and no colours.

| exit code | means |
|---|---|
| 0 | done |
| 1 | something is incomplete or invalid; with `status --check`: stale, open or in error |
| 2 | usage or settings; for `status`, `gaps` and `validate`: the series is neither configured nor stored |
| 128 + n | ended by signal n (130 by Ctrl-C) |

Commands, options, providers, and the symbols and timeframes of the settings complete with Tab after the line of your
shell in its startup file (`~/.bashrc`, `~/.zshrc` after `compinit`, `~/.config/fish/config.fish`), with `fks-backfill`
on the `PATH`:

    eval "$(_FKS_BACKFILL_COMPLETE=bash_source fks-backfill)"     # bash 4.4 or newer
    eval "$(_FKS_BACKFILL_COMPLETE=zsh_source fks-backfill)"      # zsh
    _FKS_BACKFILL_COMPLETE=fish_source fks-backfill | source      # fish
"""

_SESSION = re.compile(r"<!-- session -->\n(.*)<!-- end of the session -->", re.DOTALL)
_COMMAND = re.compile(r"    \$ (.+)\n((?:    .*\n)*)")

_STATEMENT = re.compile(r"psql .* -c (.+)")

MOST_LINES, FIRST, LAST = 9, 4, 3
"""A longer output is shown with its first and its last lines."""

_OUTAGE = TimeRange(instant("2024-03-10T02:00"), instant("2024-03-10T05:00"))


def commands(group: click.Group, name: str) -> Iterator[tuple[str, click.Command]]:
    """All commands below a group, with their full names, in the order of the help."""
    with click.Context(group, info_name=name) as context:
        for word in group.list_commands(context):
            command = group.get_command(context, word)
            assert command is not None
            if isinstance(command, click.Group):
                yield from commands(command, f"{name} {word}")
            else:
                yield f"{name} {word}", command


def reference() -> str:
    """The text of command-line.md."""
    parts = [_HEAD]
    for name, command in commands(main, "fks-backfill"):
        context = click.Context(command, info_name=name, max_content_width=WIDTH, terminal_width=WIDTH)
        context.help_option_names = ["-h", "--help"]
        text = command.get_help(context)
        block = "\n".join(f"    {line}".rstrip() for line in text.splitlines())
        parts.append(f"\n## {name.removeprefix('fks-backfill ')}\n\n{block}\n")
    return "".join(parts)


def tutorial(text: str) -> str:
    """The text of tutorial.md with the outputs of a session that is run now."""
    found = _SESSION.search(text)
    assert found is not None, "tutorial.md has no session"
    with (
        tempfile.TemporaryDirectory(prefix="fks-docs-", ignore_cleanup_errors=True) as name,
        LocalMarket(MarketConfig()) as market,
    ):
        market.plant_outage("binance", _OUTAGE, "BTCUSDT")
        session = Session(Path(name), market)
        try:
            ran = _COMMAND.sub(lambda one: session.block(one[1]), found[1])
        finally:
            session.end()
    return text[: found.start(1)] + ran + text[found.end(1) :]


class Session:
    """A shell in a folder of its own, whose commands go to the market and into a database of the session."""

    def __init__(self, folder: Path, market: LocalMarket) -> None:
        folder.chmod(0o755)  # root's database server passes through it
        self._folder, port = folder, urlsplit(market.url).port
        self._shown = {
            str(folder): "/home/me/project",
            str(CHECKOUT): "/home/me/project",
            f":{port}": ":8899",
        }
        self._market = f'eval "$(fks-backfill simulate --env --port {port} --home {folder / "sandbox"})"'
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("FKS_", "DAGSTER_"))
        }
        path = os.pathsep.join((str(Path(sys.executable).parent), kept["PATH"]))
        self._environment = {**kept, "PATH": path, "COLUMNS": "200"}

    def block(self, command: str) -> str:
        """The command and what it prints, as the document shows them."""
        statement = _STATEMENT.fullmatch(command)
        output = self._by_hand(shlex.split(statement[1])[0]) if statement else self.run(command)
        for real, shown in self._shown.items():
            output = output.replace(real, shown)
        lines = output.splitlines()
        if len(lines) > MOST_LINES:
            lines = [*lines[:FIRST], "...", *lines[-LAST:]]
        return "".join(f"    {line}".rstrip() + "\n" for line in (f"$ {command}", *lines))

    def end(self) -> None:
        self.run("fks-backfill db stop")
        EmbeddedPostgres(self._folder / "sandbox").remove()

    def run(self, command: str) -> str:
        done = subprocess.run(
            ["sh", "-c", f"{self._market}; {command}"],
            cwd=self._folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.stdout

    def _by_hand(self, statement: str) -> str:
        with psycopg.connect(self.run("fks-backfill db url").strip()) as connection:
            return connection.execute(statement.encode()).statusmessage or ""


if __name__ == "__main__":
    REFERENCE.write_text(reference(), encoding="utf-8")
    SETTINGS.write_text(with_tables(SETTINGS.read_text(encoding="utf-8")), encoding="utf-8")
    TUTORIAL.write_text(tutorial(TUTORIAL.read_text(encoding="utf-8")), encoding="utf-8")
