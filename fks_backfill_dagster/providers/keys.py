"""Keys: which can be sent, and how they are kept out of texts, logs and output.

Belongs here: all that handles a key because it is one. Does not belong here: where a provider puts its key.

Our own texts are made without a key. The HTTP libraries' are not: urllib3 logs the URL of every request at DEBUG,
and that of an answer with a malformed header as a warning, and Alpha Vantage's key is in its URL. Levels and
handlers belong to whoever uses this package, so the records are changed before any handler sees them. http.client
prints whole requests, headers included, once somebody sets `HTTPConnection.debuglevel`: not those of our connections.
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
    """The key without surrounding blanks.

    Raises WrongKey for one that cannot go into a header: requests would quote it in its error.
    """
    key = key.strip()
    if not re.fullmatch(r"[!-~]+", key):
        raise WrongKey(provider, f"the value of {variable} is no key: it is empty or has odd characters")
    return key


def redact(text: str, key: str | None) -> str:
    """`text` without the key, in whatever way a URL may have quoted it."""
    if key:
        for form in {key, quote(key), quote(key, safe=""), quote_plus(key)}:
            text = text.replace(form, "***")
    return text


# --- logs -----------------------------------------------------------------------------------------

# A filter holds for its own logger only, not for those below it: every logger of these packages gets it.
_LIBRARIES = frozenset(("urllib3", "requests", "charset_normalizer", "chardet", "ccxt"))


_SHORTEST_KEY = 6


class _Redaction(logging.Filter):
    """Blanks the keys in a record, whatever its level."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: tuple[str, ...] = ()

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = self._without_keys(record.getMessage()), None
        if record.exc_info:  # its text quotes what the provider sent, which may repeat the request
            text = logging.Formatter().formatException(record.exc_info)
            record.exc_text, record.exc_info = self._without_keys(text), None
        return True

    def _without_keys(self, text: str) -> str:
        for key in self.keys:
            text = redact(text, key)
        return text

    def add(self, key: str) -> None:
        """Longest first: a key that is a part of another one must not leave the rest of it."""
        self.keys = tuple(sorted({*self.keys, key}, key=len, reverse=True))


_redaction = _Redaction()


def keep_out_of_logs(key: str) -> None:
    """From now on no record of the HTTP libraries' loggers holds this key.

    One of a few letters is none of a provider's, and would be blanked in every word.
    """
    if len(key) < _SHORTEST_KEY:
        return
    _redaction.add(key)
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] in _LIBRARIES:
            logging.getLogger(name).addFilter(_redaction)  # adds it once only


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
    """The adapter of requests, over connections that never print what they send."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **kwargs)
        if not proxy.lower().startswith("socks"):  # that one has pools of its own
            manager.pool_classes_by_scheme = _POOLS
        return manager
