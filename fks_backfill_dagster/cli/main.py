"""The root command group; turns errors into one sentence and an exit code."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from fks_backfill_dagster.cli.actions import actions
from fks_backfill_dagster.cli.audit import audit
from fks_backfill_dagster.cli.backfill import backfill
from fks_backfill_dagster.cli.batches import batches
from fks_backfill_dagster.cli.correct import correct
from fks_backfill_dagster.cli.corrections import corrections
from fks_backfill_dagster.cli.db import db
from fks_backfill_dagster.cli.export import export
from fks_backfill_dagster.cli.fill_gaps import fill_gaps
from fks_backfill_dagster.cli.findings import findings
from fks_backfill_dagster.cli.gaps import gaps
from fks_backfill_dagster.cli.launch import launch
from fks_backfill_dagster.cli.output import log, log_if_possible
from fks_backfill_dagster.cli.quarantine import quarantine
from fks_backfill_dagster.cli.series import series
from fks_backfill_dagster.cli.servers import demo, down, up
from fks_backfill_dagster.cli.signals import SIGNALLED, Signals
from fks_backfill_dagster.cli.simulate import simulate
from fks_backfill_dagster.cli.status import status
from fks_backfill_dagster.cli.validate import validate

DONE, INCOMPLETE, USAGE = 0, 1, 2


class Program(click.Group):
    """A group that reports errors in one line each, the project's own included; Click takes several."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Runs a command and exits; what it returns is its exit code, None is 0."""
        signals = Signals()
        with signals.handled():
            try:
                code = super().main(
                    args, prog_name, complete_var, standalone_mode=False, obj=signals, **extra
                )
            except click.Abort:
                code = _interrupted(signals)
            except click.exceptions.NoArgsIsHelpError as error:
                error.show()
                code = USAGE
            except click.ClickException as error:
                log(f"Error: {_sentence(error)}")
                code = error.exit_code
            except Exception as error:
                # Any exception: output to a closed terminal fails as well.
                code = _logged_exit_code(error) if signals.received is None else _interrupted(signals)
                if code is None:
                    raise
            _exit(code or DONE)

    def list_commands(self, context: click.Context) -> list[str]:
        """In the order of registration, which is the order of use."""
        return list(self.commands)


def _interrupted(signals: Signals) -> int:
    log_if_possible("Interrupted.")
    return signals.exit_code


def _exit(code: int) -> NoReturn:
    """Exits; after an interruption without anything that would delay that or change the exit code.

    Python would join the threads that still wait for a provider's response, up to its timeout, and would flush to a
    closed terminal.
    """
    if code <= SIGNALLED:
        sys.exit(code)
    threads = (t for t in threading.enumerate() if t is not threading.main_thread())
    is_held_up = any(not thread.daemon for thread in threads)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        is_held_up = True
    if is_held_up:
        os._exit(code)
    sys.exit(code)


def _sentence(error: click.ClickException) -> str:
    message = error.format_message()
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{message.rstrip('.')} (see `{error.ctx.command_path} --help`)."
    return message


def _logged_exit_code(error: Exception) -> int | None:
    """Logs an error that has a remedy and returns its exit code; None for any other, which is a bug."""
    from fks_backfill_dagster.embedded import EmbeddedError
    from fks_backfill_dagster.ownership import OwnershipError
    from fks_backfill_dagster.settings.model import SettingsError
    from fks_backfill_dagster.store.errors import StoreError

    if isinstance(error, SettingsError):
        for problem in error.problems:
            log(f"Error: {problem}")
        return USAGE
    if isinstance(error, StoreError | EmbeddedError | OwnershipError):
        log(f"Error: {error}")
        return INCOMPLETE
    return None


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="SYMBOL is BTC/USDT or BTC_USDT; TIMEFRAME one of 1m 5m 15m 30m 1h 4h 1d 1w. Times are ISO 8601,"
    " UTC where no zone is given, or 2024, 2024-01, -7d; an end is exclusive. With --json the result is one JSON"
    " document on stdout. Exit codes: 0 done, 1 something is left incomplete or invalid, 2 usage or settings, 128 + n"
    " ended by signal n (130 by Ctrl-C).",
)
@click.version_option(package_name="fks-backfill", prog_name="fks-backfill")
def main() -> None:
    """Store every candle that should exist in one table, and record why any other is absent."""


for command in (
    demo,
    up,
    down,
    launch,
    backfill,
    gaps,
    fill_gaps,
    status,
    audit,
    validate,
    findings,
    series,
    batches,
    correct,
    corrections,
    quarantine,
    actions,
    export,
    simulate,
    db,
):
    main.add_command(command)
