"""The token of Dagster's pages: its storage, and how commands read it.

It is FKS_API_TOKEN, or else one that is generated once per home and stored there, in a file that only its owner
can read. A browser session therefore survives a restart, and commands of this home find the token without an option.

Does not belong here: what the token gives access to (`guard`).
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from fks_backfill_dagster import ownership
from fks_backfill_dagster.settings.model import Settings
from fks_backfill_dagster.settings.types import OTHERS


def token_of(settings: Settings) -> str | None:
    """The token of these settings; None if none is required, or none was generated yet."""
    if not settings.webserver.login:
        return None
    if settings.api_token is not None:
        return settings.api_token.get_secret_value()
    with suppress(FileNotFoundError):
        return _file(settings.home).read_text().strip() or None
    return None


def owner_of(settings: Settings) -> int | None:
    """The account whose own processes need no token; None if all processes need it, or none does.

    A configured token is required of the own account, too.
    """
    return os.geteuid() if settings.webserver.login == OTHERS and settings.api_token is None else None


def make_token(settings: Settings) -> str | None:
    """Like `token_of`, but generates a missing token. `up` calls it under its lock."""
    if settings.webserver.login and token_of(settings) is None:
        ownership.write_text(_file(settings.home), secrets.token_urlsafe(32))
    return token_of(settings)


def _file(home: Path) -> Path:
    return home / "run" / "token"
