"""The command line `fks-backfill`: one of the interfaces, beside the API and Dagster.

Belongs here: options, tables, progress, exit codes, and errors as one sentence with the remedy.
Does not belong here: any decision about candles; the commands call `app` and `pipeline` and print
the results.

Exit codes: 0 done, 1 something is left incomplete or invalid, 2 usage or settings, 128 + n ended by
signal n (130 by Ctrl-C).
Heavy modules are imported inside the commands, so that `--help` returns at once.
"""

from __future__ import annotations

from fks_backfill_dagster.cli.main import main

__all__ = ["main"]
