"""`python -m fks_backfill_dagster` is the command line."""

from __future__ import annotations

from fks_backfill_dagster.cli import main

if __name__ == "__main__":
    main(prog_name="fks-backfill")
