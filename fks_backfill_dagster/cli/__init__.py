"""The command line `fks-backfill`: a face, as the API and Dagster are.

Belongs here: options, tables, progress, exit codes, and errors as one sentence with the remedy.
Does not belong here: any decision about candles; the commands call `app` and `pipeline` and show
what they answer.

Exit codes: 0 done, 1 something is left incomplete or invalid, 2 usage or settings, 128 + n ended by
signal n (130 by Ctrl-C).
Nothing heavy is imported before a command runs: `--help` must answer at once.
"""

from __future__ import annotations

from fks_backfill_dagster.cli.main import main

__all__ = ["main"]
