"""The meaning of status codes, headers and failed connections."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import (
    MaxRetryError,
    NameResolutionError,
    NewConnectionError,
)

from fks_backfill_dagster.domain.timeframe import MICROS_PER_SECOND, to_micros
from fks_backfill_dagster.providers.base import (
    InvalidResponse,
    NotEntitled,
    PermanentError,
    ProviderError,
    RateLimited,
    TransientError,
    WrongKey,
)
from fks_backfill_dagster.providers.http.body import TooLarge
from fks_backfill_dagster.providers.http.limiter import system_micros
from fks_backfill_dagster.providers.keys import redact
from fks_backfill_dagster.providers.network import (
    Refusal,
    UnusableCertificates,
    proxy_of,
    refusal_of,
    refused,
)


class Unreachable(TransientError):
    """No connection (refused, unknown host), or no response in time."""


def status_error(
    provider: str, status: int, headers: Mapping[str, str], body: bytes, place: str, *, key: str | None = None
) -> ProviderError:
    """The error for a status other than 200, unless the provider's module handles it.

    429 and 418 are rate limits, 401 an invalid key, 403 a key that does not cover the data; 408, 425 and 5xx are
    transient. Everything else (451 for a blocked country, a redirect, 404) is permanent.
    """
    text = f"{place} returned {status}: {excerpt(body, key)}"
    wait = retry_after(headers)
    if status in (418, 429):
        return RateLimited(provider, text, retry_after=wait)
    if status == 407 and (proxy := proxy_of(place)) is not None:
        return _proxy_error(provider, refused(proxy, status, "", place))
    if status == 401:
        return WrongKey(provider, f"{text} (check its key)")
    if status == 403 and not body.lstrip().startswith(b"<"):  # an HTML page comes from a firewall
        return NotEntitled(provider, text)
    if status in (408, 425) or status >= 500:
        return TransientError(provider, text, retry_after=wait)
    if status == 451:
        return PermanentError(provider, f"{text} (it does not serve the country of this machine)")
    if 300 <= status < 400:
        return PermanentError(provider, f"{place} returned {status}, it has moved: correct base_url")
    return PermanentError(provider, text)


def network_error(
    provider: str,
    error: BaseException,
    place: str,
    *,
    key: str | None = None,
    setting: str | None = None,
) -> ProviderError:
    """The error for an exception of requests; its text contains neither the query nor the key.

    setting: the settings key of the address, for the remedy.
    """
    setting = setting or f"providers.{provider}.base_url"
    if isinstance(error, UnusableCertificates):
        return PermanentError(provider, f"{place} was not requested: {error}")
    if isinstance(error, requests.RequestException) and (refusal := refusal_of(error, place)) is not None:
        return _proxy_error(provider, refusal)
    if isinstance(error, requests.exceptions.InvalidURL | requests.exceptions.MissingSchema):
        return PermanentError(provider, f"{place} is not a valid address: correct {setting}")
    if isinstance(error, requests.TooManyRedirects):
        return PermanentError(provider, f"{place} has moved: correct {setting}")
    untrusted = re.search(r"certificate verify failed: ([\w ,'-]+)", str(error))
    if isinstance(error, requests.exceptions.SSLError) and untrusted:
        return PermanentError(
            provider,
            f"{place}: its certificate is not trusted ({untrusted[1].strip()}): if a proxy of your network signs it,"
            " set REQUESTS_CA_BUNDLE or SSL_CERT_FILE to a file with the certificates to trust",
        )
    if isinstance(error, requests.exceptions.SSLError):
        return TransientError(provider, f"{place}: no secure connection, its certificate does not match")
    if (why := _no_connection(error, place, setting, key)) is not None:
        return Unreachable(provider, why)
    if isinstance(error, TooLarge):
        return InvalidResponse(provider, f"{place} returned {error}, which is too large for a valid response")
    if isinstance(error, requests.exceptions.ContentDecodingError):
        return InvalidResponse(provider, f"{place} sent a body that cannot be read: {error}")
    return TransientError(provider, f"{place}: the connection broke before the response was complete")


def _no_connection(error: BaseException, place: str, setting: str, key: str | None) -> str | None:
    """Why there was no connection or no response in time; None if there was one."""
    check = f"check the network, or correct {setting}"
    cause = error.args[0] if error.args else None
    reason = cause.reason if isinstance(cause, MaxRetryError) else None
    if isinstance(error, requests.ConnectTimeout):
        return f"{place}: no connection (timed out): {check}"
    if isinstance(reason, NameResolutionError):
        return f"{place}: no connection (the host {urlsplit(place).hostname} is unknown): {check}"
    if isinstance(reason, NewConnectionError) and "refused" in str(reason):
        return f"{place}: no connection (refused): start the server, or correct {setting}"
    if isinstance(reason, NewConnectionError):
        why = redact(str(reason).rsplit(": ", 1)[-1], key)
        return f"{place}: no connection ({why}): {check}"
    if isinstance(error, requests.Timeout) or "timed out" in str(error):
        return f"{place} did not respond in time: {check}"
    return None


def _proxy_error(provider: str, refusal: Refusal) -> ProviderError:
    """Unreachable if the proxy did not respond; its refusals are permanent."""
    if refusal.status is None:
        return Unreachable(provider, refusal.text)
    if refusal.status < 500:
        return PermanentError(provider, refusal.text)
    return TransientError(provider, refusal.text)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds of a Retry-After header, a number or a date; None without a valid one.

    Not bounded here: TransientError does that. A date is relative to the server's clock if it has a Date header.
    """
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?", text):
        return float(text)
    until = header_time(headers, "Retry-After")
    if until is None:
        return None
    now = server_time(headers) or system_micros()
    return max(0.0, (until - now) / MICROS_PER_SECOND)


def server_time(headers: Mapping[str, str]) -> int | None:
    """The server's clock at the response, from its Date header (whole seconds), in microseconds."""
    return header_time(headers, "Date")


def header_time(headers: Mapping[str, str], name: str) -> int | None:
    """The instant in a header, in microseconds; None if it is missing or not a date since 1970."""
    try:
        moment = parsedate_to_datetime(headers.get(name, ""))
        # "-0000" means an unknown zone; HTTP dates are always UTC.
        named = to_micros(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    except (ArithmeticError, LookupError, TypeError, ValueError):  # a year of 400 digits is an OverflowError
        return None
    return named if named >= 0 else None


def excerpt(body: bytes, key: str | None = None) -> str:
    """The beginning of an error body in one short line, without the key."""
    text = " ".join(body[:4000].decode("utf-8", "replace").split())
    if not text:
        return "nothing"
    if sum(not c.isprintable() or c == "\ufffd" for c in text) > len(text) // 10:
        return f"{len(body)} bytes that are not text"
    if text.startswith("<"):
        return "an HTML page"
    return redact(text, key)[:200]


def place_of(url: str) -> str:
    """Scheme, host and path of a URL, for texts."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def host_of(url: str) -> str:
    """Scheme, host and port of a URL, as stored in the lineage; never a user or password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def seconds_to_next_minute(now: int) -> float:
    """From an instant (microseconds) to the next full minute, never 0."""
    return 60.0 - (now / MICROS_PER_SECOND) % 60.0
