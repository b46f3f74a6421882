"""Types of single settings: parsing, validation, error messages."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    SecretStr,
)

from fks_backfill_dagster.domain.series import DEFAULT_CALENDAR, AssetClass
from fks_backfill_dagster.domain.timeframe import Timeframe, iso, to_micros
from fks_backfill_dagster.loopback import is_loopback
from fks_backfill_dagster.settings.sources import (
    CLASS_CALENDARS,
    hint,
)

T = TypeVar("T")
Entries = TypeVar("Entries", bound=Collection[Any])


@dataclass(frozen=True, slots=True)
class Between:
    """The check of a number, both ends included. `unit` is for the reference in docs/settings.md."""

    low: float
    high: float
    unit: str

    def __call__(self, value: float) -> float:
        if not self.low <= value <= self.high:
            raise ValueError(f"{value} is not between {self.low:g} and {self.high:g}")
        return value


def between(low: float, high: float, unit: str) -> AfterValidator:
    return AfterValidator(Between(low, high, unit))


@dataclass(frozen=True, slots=True)
class Form:
    """A noun for the values of a type, for the reference in docs/settings.md. In Annotated, pydantic ignores it."""

    noun: str


def host_name(value: str) -> str:
    """A host as in a browser's address, without scheme, port and path."""
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]", value):
        raise ValueError(
            f"{value!r} is not the name of a host such as fks.example.com, without scheme and port"
        )
    return value.lower()


OTHERS: Final = "others"


def quoted(value: object) -> str:
    if isinstance(value, bool | None):
        return {True: "true", False: "false", None: "nothing"}[value]
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a section"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def login_mode(value: object) -> object:
    if value is True or value is False or value == OTHERS:
        return value
    raise ValueError(f"{quoted(value)} is not one of: true, false, {OTHERS}")


LEAST_TOKEN = 32  # characters


def login_token(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if len(text) < LEAST_TOKEN or not (text.isascii() and text.isprintable()) or " " in text:
        raise ValueError(
            f"must be {LEAST_TOKEN} or more printable ASCII characters without spaces, such as"
            " `openssl rand -hex 32` prints"
        )
    return value


def _seconds(value: float) -> float:
    if not 0 < value <= 600:
        raise ValueError(f"{value:g} is not a time above 0 and up to 600 seconds")
    return value


def _url(text: str) -> str:
    """Scheme, host and an optional path prefix, without the trailing slash.

    The error does not repeat the text: it may hold a password.
    """
    if not _has_host(text):
        raise ValueError("is not an address such as https://api.example.com")
    parts = urlsplit(text)
    if parts.username is not None or parts.password is not None:
        raise ValueError("holds a user or password; keys come from their own variables only")
    if "?" in text or "#" in text:
        raise ValueError("is scheme, host and path prefix only: leave out what follows '?' or '#'")
    return text.rstrip("/")


def leaves_unencrypted(url: str) -> bool:
    """Whether requests to this checked address leave the machine unencrypted."""
    parts = urlsplit(url)
    return parts.scheme == "http" and not is_loopback(parts.hostname or "")


def webhook_address(secret: SecretStr) -> SecretStr:
    """An alert's address. It is a secret: it suffices to post there."""
    if not _has_host(secret.get_secret_value()):
        raise ValueError("is not an address such as https://hooks.example.com/services/...")
    return secret


def _has_host(text: str) -> bool:
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    return (
        parts.scheme in ("http", "https")
        and bool(parts.hostname)
        and port != 0
        and not re.search(r"\s", text)
    )


def database_address(secret: SecretStr) -> SecretStr:
    address = secret.get_secret_value()
    try:
        parts = urlsplit(address)
        # The rest of a password with an unescaped @ would be parsed as the host.
        sound = parts.port != 0 and parts.netloc.count("@") <= 1
    except ValueError:  # its text would quote part of the address
        sound = False
    if not sound or not address.startswith(("postgresql://", "postgres://", "postgresql+psycopg://")):
        raise ValueError(
            "is not a PostgreSQL address such as postgresql://user:password@host:5432/database "
            "(special characters of a password are percent-encoded)"
        )
    return secret


def absolute_folder(path: Path) -> Path:
    # Unlike the methods of Path these return False for a path that may not be read.
    if os.path.exists(path) and not os.path.isdir(path):
        raise ValueError(f"{path} is a file; it must be a folder")
    return path


def _instant(raw: object) -> int:
    """A date or time as microseconds, not in the future; UTC where no zone is written."""
    micros = _any_instant(raw)
    if micros > to_micros(datetime.now(UTC)):
        raise ValueError(f"{raw} is not between 1970 and now")
    return micros


def _any_instant(raw: object) -> int:
    try:
        moment = datetime.fromisoformat(raw.strip()) if isinstance(raw, str) else raw
    except ValueError:
        moment = None
    if isinstance(moment, date) and not isinstance(moment, datetime):
        moment = datetime(moment.year, moment.month, moment.day, tzinfo=UTC)
    if not isinstance(moment, datetime):
        raise ValueError(f"{raw!r} is not a time such as 2017-08-17 or 2017-08-17T04:00:00Z")
    micros = to_micros(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    if micros < 0:
        raise ValueError(f"{raw} lies before 1970")
    return micros


def parse_timeframe(raw: object) -> Timeframe:
    """Parses a timeframe. Raises ValueError that names all eight, and the one of this length in another notation."""
    try:
        return Timeframe(str(raw))
    except ValueError:
        meant = _timeframe_of_length(str(raw))
        question = f"; did you mean {meant}?" if meant else ""
        raise ValueError(f"{str(raw)!r} is not a timeframe ({' '.join(Timeframe)}){question}") from None


def _timeframe_of_length(text: str) -> Timeframe | None:
    """The timeframe that `1H`, `60m`, `1 hour` or `1day` means; None if there is none of this length."""
    found = re.fullmatch(
        r"(\d{1,5})\s*(m|h|d|w)(in|ins|inute|inutes|our|ours|r|ay|ays|eek|eeks)?", text.lower()
    )
    if found is None:
        return None
    minutes = int(found[1]) * {"m": 1, "h": 60, "d": 1_440, "w": 10_080}[found[2]]
    return next((one for one in Timeframe if one.minutes == minutes), None)


def asset_class_of(raw: object) -> AssetClass:
    try:
        return AssetClass(str(raw))
    except ValueError:
        raise ValueError(f"{str(raw)!r} is not an asset class ({' '.join(AssetClass)})") from None


def _once_each(values: tuple[T, ...]) -> tuple[T, ...]:
    twice = next((value for index, value in enumerate(values) if value in values[:index]), None)
    if twice is not None:
        raise ValueError(f"names {twice} twice")
    return values


def not_empty(values: Entries) -> Entries:
    if not values:
        raise ValueError("is empty; it needs at least one entry")
    return values


def as_date(raw: object) -> date:
    """A calendar date of the market, without time and zone."""
    if isinstance(raw, date) and not isinstance(raw, datetime):
        return raw
    try:
        if not (isinstance(raw, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", raw.strip())):
            raise ValueError
        return date.fromisoformat(raw.strip())
    except ValueError:
        raise ValueError(f"{quoted(raw)} is not a date such as 2023-09-08") from None


def calendar_name(name: str) -> str:
    if name not in (*CLASS_CALENDARS, DEFAULT_CALENDAR):
        # Takes half a second and imports pandas: for other calendars only.
        from exchange_calendars import get_calendar_names

        known = get_calendar_names(include_aliases=True)
        if name not in known:
            raise ValueError(
                f"{name!r} is not an exchange calendar; {hint(name, (*CLASS_CALENDARS, *known))}"
            )
    return name


@cache
def resolved_calendar(calendar: str) -> str:
    """The exchange calendar of a name or an alias: NYSE is XNYS."""
    if calendar == DEFAULT_CALENDAR:
        return calendar
    from exchange_calendars import resolve_alias

    return str(resolve_alias(calendar))


def no_section(raw: object) -> object:
    """An empty section of the file is an empty mapping."""
    return {} if raw is None else raw


def nothing_is_empty(raw: object) -> object:
    """An empty list of the file is an empty tuple."""
    return () if raw is None else raw


# Strict models reject a list for a tuple, and YAML and JSON have lists only.
Many = Annotated[tuple[T, ...], Field(strict=False), AfterValidator(_once_each)]
Url = Annotated[str, AfterValidator(_url), Form("http or https address")]
_AS_ISO = PlainSerializer(iso, return_type=str, when_used="json")
Instant = Annotated[int, BeforeValidator(_instant), _AS_ISO, Form("date or time from 1970 to now")]
AnyInstant = Annotated[int, BeforeValidator(_any_instant), _AS_ISO, Form("date or time from 1970 on")]
EachTimeframe = Annotated[Timeframe, BeforeValidator(parse_timeframe), Form("timeframe")]
TimeoutSeconds = Annotated[float, AfterValidator(_seconds), Form("number above 0, up to 600 seconds")]
Date = Annotated[date, BeforeValidator(as_date)]
CalendarName = Annotated[str, AfterValidator(calendar_name)]
