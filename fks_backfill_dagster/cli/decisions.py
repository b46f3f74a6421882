"""Who decides and why: what a correction, a release or an acceptance records about the person."""

from __future__ import annotations

import getpass
from typing import TYPE_CHECKING

from fks_backfill_dagster.cli.output import Failed, log, many

if TYPE_CHECKING:
    from fks_backfill_dagster.domain.corrections import CorrectionError


def named_author(given: str | None, *, option: str = "--author", does: str = "decides") -> str:
    """The author of a decision: the given name, else that of the account.

    Raises ValueError for an empty name, Failed for an account without one (one that passwd does not list).
    """
    if given is not None:
        if not given.strip():
            raise ValueError(f"{option} is empty: give a name, or leave it out for that of this account")
        return given.strip()
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # by Python version
        raise Failed(f"This account has no name: state who {does} with {option} NAME.") from None


def given_reason(reason: str) -> str:
    """The reason in one line. Raises ValueError for an empty one."""
    if not reason.strip():
        raise ValueError(
            "--reason is empty: it is kept with the former values, and says why they were replaced"
        )
    return " ".join(reason.split())


def log_problems(source: str, place: str, error: CorrectionError) -> None:
    """The invalid rows of a refused correction; `place`: what their numbers count."""
    log(f"Error: {source}: {many(error.total, 'row')} invalid, so nothing was changed:")
    for one in error.first:
        log(f"  {place} {one.line:,}: {one.reason}")
    if error.total > len(error.first):
        log(f"  and {error.total - len(error.first):,} more")
