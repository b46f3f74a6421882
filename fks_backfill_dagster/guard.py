"""ASGI middleware that decides which requests reach the routes of our web servers.

    Host -> Origin and Sec-Fetch-Site -> route, method and content type -> token -> the routes

A browser sends requests from any page that its user visits, also to servers on the loopback address, with
the user's cookies. A request must therefore be addressed to this server, come from one of its own pages or from no
page, and be of a kind that a page of another site cannot send without a preflight (`application/json`). Then its
sender must present the token, or be a process of the account that needs none.

Belongs here: which requests are refused, with which status and message, and the headers of every response. Does not
belong here: where the token is stored (`login`), the account of a connection (`peers`), the routes (the servers).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode

from fks_backfill_dagster.peers import Address, account_of

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
"""The host names of a server on the loopback address."""

TOKEN = "token"  # noqa: S105 - the name of a parameter
"""The query parameter of the token on a first visit."""

JSON = "application/json"

_FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip")
"""Headers that a proxy adds: the connected process is then not the sender of the request."""

_PORTS = {"http": "80", "https": "443"}

_HEADERS = {
    b"x-frame-options": b"DENY",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
}
_NO_FRAMES = (b"content-security-policy", b"frame-ancestors 'none'")


@dataclass(frozen=True, slots=True)
class Rules:
    """The requests that a server accepts.

    token: required of a request; None: only the other checks apply. cookie: the name of the cookie that replaces the
    token. hosts: names of the server besides the loopback ones. posts: path prefixes that accept only POST with
    JSON; every other path accepts GET and HEAD. closed: path prefixes that are refused. owner: the account whose own
    processes on this machine need no token; None: all need it. advice: the message of a 401.
    """

    token: str | None
    cookie: str
    hosts: frozenset[str] = frozenset()
    posts: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()
    owner: int | None = None
    advice: str = "Open the address that `fks-backfill up` prints: it contains the token."


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is refused: an HTTP status and one sentence."""

    status: int
    sentence: str


class Guard:
    """The middleware: refuses requests by `rules`, and adds headers to every response."""

    def __init__(self, app: App, rules: Rules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        request = Request.of(scope)
        refused = refusal(request, self._rules)
        if request.websocket:
            if refused is None and is_known(request, self._rules):
                await self._app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008})
            return
        if refused is not None:
            await _respond(send, refused.status, refused.sentence)
        elif is_known(request, self._rules):
            await self._app(scope, receive, _with_headers(send))
        elif self._rules.token is not None and is_same(request.query_token, self._rules.token):
            await _respond(send, 303, "", _redirect(request, self._rules.token, self._rules.cookie))
        else:
            await _respond(send, 401, self._rules.advice, [(b"www-authenticate", b"Bearer")])


@dataclass(frozen=True, slots=True)
class Request:
    """A request as the checks see it. `headers` by lower-case name, with all values of each.

    client, server: the two ends of the connection; None if unknown or not a TCP address.
    """

    method: str
    path: str
    raw_path: str
    query: str
    headers: Mapping[str, tuple[str, ...]]
    websocket: bool = False
    client: Address | None = None
    server: Address | None = None

    @classmethod
    def of(cls, scope: Scope) -> Request:
        headers: dict[str, tuple[str, ...]] = {}
        for name, value in scope["headers"]:
            key = name.decode("latin-1").lower()
            headers[key] = (*headers.get(key, ()), value.decode("latin-1"))
        raw = scope.get("raw_path") or scope["path"].encode()
        return cls(
            method=scope.get("method", "GET"),
            path=scope["path"],
            raw_path=raw.decode("latin-1"),
            query=scope.get("query_string", b"").decode("latin-1"),
            headers=headers,
            websocket=scope["type"] == "websocket",
            client=_address(scope.get("client")),
            server=_address(scope.get("server")),
        )

    def one(self, name: str) -> str | None:
        """The value of a header; None if it is missing or repeated."""
        found = self.headers.get(name, ())
        return found[0] if len(found) == 1 else None

    @property
    def query_token(self) -> str | None:
        """The token of a first visit, which opens a page and so is a GET."""
        if self.method != "GET" or self.websocket:
            return None
        return dict(parse_qsl(self.query)).get(TOKEN)


def refusal(request: Request, rules: Rules) -> Refusal | None:
    """The refusal that applies to every sender; None if there is none."""
    host = request.one("host")
    if host is None or _name(host) not in LOOPBACK | rules.hosts:
        return Refusal(421, "This server does not serve this Host; webserver.hosts adds names.")
    if not _is_own_page(request, host):
        return Refusal(403, "A page of another site sent this request.")
    if request.websocket:
        return None
    if request.path.startswith(rules.closed):
        return Refusal(403, "This route is closed by the settings.")
    if request.path.startswith(rules.posts):
        if request.method != "POST":
            return Refusal(405, "This route accepts only POST.")
        if _media_type(request) != JSON:
            return Refusal(415, f"This route accepts only {JSON}.")
    elif request.method not in ("GET", "HEAD"):
        return Refusal(405, f"This route does not accept {request.method}.")
    return None


def is_known(request: Request, rules: Rules) -> bool:
    """Whether the request carries the token, in a header or as the cookie of an earlier visit, or needs none."""
    if rules.token is None or (rules.owner is not None and _is_of(rules.owner, request)):
        return True
    scheme, _, credentials = (request.one("authorization") or "").partition(" ")
    if scheme.lower() == "bearer" and is_same(credentials.strip(), rules.token):
        return True
    wanted = cookie_value(rules.token)
    return any(is_same(value, wanted) for value in _cookies(request, rules.cookie))


def _is_of(owner: int, request: Request) -> bool:
    """Whether a process of this account on this machine sent the request itself.

    A proxy of the same account forwards requests of any sender: it is recognized by its headers, or by a Host that is
    not a loopback name.
    """
    if (
        request.client is None
        or request.server is None
        or any(name in request.headers for name in _FORWARDED)
    ):
        return False
    if _name(request.one("host") or "") not in LOOPBACK:
        return False
    return account_of(request.client, request.server) == owner


def is_same(given: str | None, wanted: str) -> bool:
    """Compares in constant time."""
    return given is not None and hmac.compare_digest(given.encode(), wanted.encode())


def cookie_value(token: str) -> str:
    """The value that a browser stores instead of the token: it opens the pages without revealing the token."""
    return hmac.new(token.encode(), b"cookie of a visit", hashlib.sha256).hexdigest()


def _address(found: Sequence[Any] | None) -> Address | None:
    """One end of a connection from its ASGI form: host and port, or the path of a Unix socket and no port."""
    return None if not found or found[1] is None else (str(found[0]), int(found[1]))


def _name(host: str) -> str:
    """The name in a Host header, without its port; an IPv6 address in its brackets."""
    name, _, port = host.strip().lower().rpartition(":")
    if not name or "]" in port:  # no port
        name = host.strip().lower()
    return name.rstrip(".")


def _is_own_page(request: Request, host: str) -> bool:
    """Whether the request comes from a page of this server, from a navigation of the user, or from a program.

    For Sec-Fetch-Site another port of the same machine is `same-site`: that is another server.
    """
    if "origin" in request.headers and not _is_origin_of(request.one("origin") or "", host):
        return False
    if request.one("sec-fetch-site") not in ("cross-site", "same-site"):
        return True
    is_visit = request.one("sec-fetch-mode") == "navigate" and request.one("sec-fetch-dest") == "document"
    return request.method in ("GET", "HEAD") and is_visit


def _is_origin_of(origin: str, host: str) -> bool:
    """Whether an Origin is that of the server under this Host; a proxy may have terminated TLS."""
    scheme, separator, place = origin.strip().lower().partition("://")
    if not separator or scheme not in _PORTS:
        return False
    usual = f":{_PORTS[scheme]}"
    return place.removesuffix(usual) == host.strip().lower().removesuffix(usual)


def _media_type(request: Request) -> str:
    return (request.one("content-type") or "").partition(";")[0].strip().lower()


def _cookies(request: Request, name: str) -> list[str]:
    """The values of a cookie. The header also has cookies of other servers on this machine, well-formed or not."""
    pairs = (part.partition("=") for line in request.headers.get("cookie", ()) for part in line.split(";"))
    return [value.strip() for key, _, value in pairs if key.strip() == name]


def _redirect(request: Request, token: str, cookie: str) -> list[tuple[bytes, bytes]]:
    """The headers that redirect a first visit to the same page, without the token in its address."""
    kept = [
        (name, value) for name, value in parse_qsl(request.query, keep_blank_values=True) if name != TOKEN
    ]
    # Never "//host" or "/\\host", which a browser resolves to another server.
    place = "/" + request.raw_path.lstrip("/\\") + (f"?{urlencode(kept)}" if kept else "")
    kept_by_browser = f"{cookie}={cookie_value(token)}; Path=/; HttpOnly; SameSite=Strict"
    return [(b"location", place.encode("latin-1")), (b"set-cookie", kept_by_browser.encode())]


async def _respond(send: Send, status: int, text: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    body = f"{text}\n".encode() if text else b""
    own = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    start = {"type": "http.response.start", "status": status}
    start["headers"] = [*own, (b"cache-control", b"no-store"), *headers]
    guarded = _with_headers(send)
    await guarded(start)
    await guarded({"type": "http.response.body", "body": body})


def _with_headers(send: Send) -> Send:
    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [pair for pair in message["headers"] if pair[0].lower() not in _HEADERS]
            # A second policy besides the server's own: a browser enforces both.
            message = {**message, "headers": [*kept, *_HEADERS.items(), _NO_FRAMES]}
        await send(message)

    return guarded
