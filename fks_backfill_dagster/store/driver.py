"""The driver's own cursor, for what SQLAlchemy does not support: COPY, and identifiers quoted by psycopg."""

from __future__ import annotations

from typing import Any, cast

import psycopg
import sqlalchemy as sa


def cursor_of(connection: sa.Connection) -> psycopg.Cursor[Any]:
    """A psycopg cursor in the same transaction."""
    raw = cast("psycopg.Connection[Any]", connection.connection.driver_connection)
    return raw.cursor()
