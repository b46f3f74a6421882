"""Proxies and trusted certificates from the environment.

HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, in upper or lower case, and REQUESTS_CA_BUNDLE, CURL_CA_BUNDLE or
SSL_CERT_FILE have the same meaning as for curl and requests. A loopback address is never requested through a proxy.

Belongs here: the proxy and the certificates of a request, and the errors of a proxy.
Does not belong here: requests within the machine (the webserver, the local market), which never use a proxy.
"""

from __future__ import annotations

import os
import re
import ssl
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
from requests.utils import get_environ_proxies, select_proxy
from urllib3.exceptions import MaxRetryError

from fks_backfill_dagster.loopback import is_loopback
from fks_backfill_dagster.providers.keys import SilentAdapter, keep_out_of_logs

_BUNDLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")


class UnusableCertificates(requests.RequestException):
    """The certificate file that a variable names is not usable."""


@dataclass(frozen=True, slots=True)
class Proxy:
    """The proxy of an address. `str` shows its address and its variable, without user and password."""

    url: str = field(repr=False)
    variable: str

    def __str__(self) -> str:
        parts = urlsplit(self.url)
        return f"the proxy {parts.scheme}://{parts.netloc.rpartition('@')[2]} ({self.variable})"


class Session(requests.Session):
    """Takes only proxies and certificates from the environment; follows no redirects.

    `trust_env` stays off: it also reads .netrc, whose entries would replace the Authorization header.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trust_env = False
        self.max_redirects = 0
        for scheme in ("http://", "https://"):
            self.mount(scheme, SilentAdapter())

    def merge_environment_settings(self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
        """Raises UnusableCertificates."""
        proxy = proxy_of(url)
        if proxy is not None:
            proxies = {urlsplit(url).scheme: proxy.url}
        if urlsplit(url).scheme == "https":
            verify = trusted_certificates()
        return super().merge_environment_settings(url, proxies, stream, verify, cert)


def proxy_of(url: str) -> Proxy | None:
    """The proxy that the environment sets for this address; None: direct connection."""
    parts = urlsplit(url)
    if is_loopback(parts.hostname or ""):
        return None
    named = select_proxy(url, get_environ_proxies(url))
    if not named:
        return None
    found = named if "://" in named else f"http://{named}"
    _hide_password(found)
    return Proxy(found, _variable(parts.scheme))


@cache
def _hide_password(url: str) -> None:
    password = urlsplit(url).password or ""
    for form in {password, unquote(password)}:
        keep_out_of_logs(form)


def _variable(scheme: str) -> str:
    names = (f"{scheme}_proxy", f"{scheme}_proxy".upper(), "all_proxy", "ALL_PROXY")
    return next((name for name in names if os.environ.get(name)), "of this machine's settings")


def trusted_certificates() -> str | bool:
    """The certificate file or folder that the environment sets; True: the bundle of requests.

    Raises UnusableCertificates.
    """
    variable = next((name for name in _BUNDLES if os.environ.get(name)), None)
    if variable is None:
        return True
    path = os.environ[variable]
    try:
        _load(path)
    except OSError:  # an SSLError is one
        raise UnusableCertificates(
            f"{variable} is {path}, which contains no certificates in PEM format: correct it, or unset it"
        ) from None
    return path


@cache
def _load(path: str) -> None:
    """Raises OSError if the path is neither a folder nor a certificate file."""
    if not os.path.isdir(path):
        ssl.create_default_context(cafile=path)


# --- proxy errors -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a proxy did not forward a request. `status`: of its response, None without one."""

    text: str
    status: int | None = None


def refusal_of(error: requests.RequestException, place: str) -> Refusal | None:
    """The proxy error behind a failed request; None if the failure has another cause."""
    proxy = proxy_of(place)
    if proxy is None:
        return None
    host = urlsplit(place).hostname
    if isinstance(error, requests.exceptions.InvalidProxyURL):
        return Refusal(f"{proxy} is not a valid address: correct that variable", 400)
    if isinstance(error, requests.exceptions.InvalidSchema):
        return Refusal(f"{proxy} is not an HTTP proxy: set one, or install requests[socks] for SOCKS", 400)
    if not isinstance(error, requests.exceptions.ProxyError):
        return None
    cause = error.args[0] if error.args else None
    reason = cause.reason if isinstance(cause, MaxRetryError) else cause
    text = str(getattr(reason, "original_error", reason))
    tunnel = re.search(r"Tunnel connection failed: ([0-9]{3}) ?(.*)", text)
    if tunnel is None:
        why = text.rpartition(": ")[2] or "no connection"
        return Refusal(f"{proxy} cannot be reached ({why}): correct that variable, or add {host} to NO_PROXY")
    return refused(proxy, int(tunnel[1]), tunnel[2], place)


def refused(proxy: Proxy, status: int, phrase: str, place: str) -> Refusal:
    """The error for a proxy that responded itself instead of forwarding the request."""
    host = urlsplit(place).hostname
    if status == 407:
        text = f"{proxy} requires a user and a password: set them in that variable, as http://user:password@host:port"
    elif status < 500:
        text = f"{proxy} refuses connections to {host}: allow them in the proxy, or add {host} to NO_PROXY"
    else:
        text = f"{proxy} cannot reach {host}"
    return Refusal(f"{text} (it returned {status} {phrase.strip()})".replace(" )", ")"), status)
