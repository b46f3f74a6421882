"""Keys: validation, and redaction in texts, logs and output.

Belongs here: the handling of keys as secrets. Does not belong here: where a provider expects its key.

The texts of this package contain no key, but those of the HTTP libraries may: urllib3 logs the URL of every request
at DEBUG, and the URL of a response with a malformed header as a warning, and Alpha Vantage's key is part of the URL.
Levels and handlers belong to the application that uses this package, so records are changed before any handler
receives them. http.client prints whole requests, headers included, if `HTTPConnection.debuglevel` is set; the
connections of this package ignore that.
"""

from __future__ import annotations

import logging
import re
from typing import Any
from urllib.parse import quote, quote_plus

from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from fks_backfill_dagster.providers.base import WrongKey


def usable_key(provider: str, key: str, variable: str) -> str:
    """The key without surrounding whitespace.

    Raises WrongKey for a key that is invalid in a header: requests would quote it in its error.
    """
    key = key.strip()
    if not re.fullmatch(r"[!-~]+", key):
        raise WrongKey(
            provider,
            f"the value of {variable} is not a valid key: it is empty or has invalid characters",
        )
    return key


def redact(text: str, key: str | None) -> str:
    """`text` without the key, also in its URL-quoted forms."""
    if key:
        for form in {key, quote(key), quote(key, safe=""), quote_plus(key)}:
            text = text.replace(form, "***")
    return text


# --- logs -----------------------------------------------------------------------------------------

# A filter applies to its own logger only, not to child loggers: every logger of these packages gets it.
_LIBRARIES = frozenset(("urllib3", "requests", "charset_normalizer", "chardet", "ccxt"))


_SHORTEST_KEY = 6


class _Redaction(logging.Filter):
    """Redacts the keys in a record of any level."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: tuple[str, ...] = ()

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = self._without_keys(record.getMessage()), None
        if record.exc_info:  # its text may quote a response that repeats the request
            text = logging.Formatter().formatException(record.exc_info)
            record.exc_text, record.exc_info = self._without_keys(text), None
        return True

    def _without_keys(self, text: str) -> str:
        for key in self.keys:
            text = redact(text, key)
        return text

    def add(self, key: str) -> None:
        """Keeps the longest first: replacing a key that is part of another one would leave the remainder of that."""
        self.keys = tuple(sorted({*self.keys, key}, key=len, reverse=True))


_redaction = _Redaction()


def keep_out_of_logs(key: str) -> None:
    """Redacts this key in all further records of the HTTP libraries' loggers.

    A very short one is ignored: it is not a real key, and would be redacted inside ordinary words.
    """
    if len(key) < _SHORTEST_KEY:
        return
    _redaction.add(key)
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] in _LIBRARIES:
            logging.getLogger(name).addFilter(_redaction)  # has no effect the second time


# --- output ---------------------------------------------------------------------------------------


class _Connection(HTTPConnection):
    debuglevel = 0


class _SecureConnection(HTTPSConnection):
    debuglevel = 0


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


_POOLS = {"http": _Pool, "https": _SecurePool}


class SilentAdapter(HTTPAdapter):
    """The adapter of requests, over connections that never print their requests."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **kwargs)
        if not proxy.lower().startswith("socks"):  # has pools of its own
            manager.pool_classes_by_scheme = _POOLS
        return manager
