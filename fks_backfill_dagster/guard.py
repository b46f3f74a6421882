"""The door of a web server of ours: which requests get to its routes. An ASGI middleware.

    Host -> Origin and Sec-Fetch-Site -> route, method and content type -> token -> the routes

A browser sends requests from any page that its user visits, also to servers on the loopback address, with
the user's cookies. So a request must be meant for this server, come from a page of its own or from no page,
and be of a kind that a page of another site cannot send without a preflight (`application/json`). Then its sender
has to know the token, or to be a process of the account that is let in without.

Belongs here: what is refused, with which status and sentence, and the headers of every answer. Does not belong
here: where the token is kept (`login`), whose a connection is (`peers`), the routes (the servers).
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
"""The names under which a server on the loopback address is reached."""

TOKEN = "token"  # noqa: S105 - the name of a parameter
"""The name of the token in the query of a first visit."""

JSON = "application/json"

_FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip")
"""Headers that a proxy adds: the process that has connected is not the one that has sent the request."""

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
    """What a server lets in.

    token: what a request has to carry; None: the other checks alone count. cookie: the name of the cookie
    that stands for the token. hosts: names of the server besides the loopback ones. posts: beginnings of paths
    that take POST with JSON and nothing else; every other path takes GET and HEAD. closed: beginnings of paths
    that are refused. owner: the account whose own processes on this machine need no token; None: all need it.
    advice: the sentence of a 401.
    """

    token: str | None
    cookie: str
    hosts: frozenset[str] = frozenset()
    posts: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()
    owner: int | None = None
    advice: str = "Open the address that `fks-backfill up` prints: it holds the token."


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not let in: an HTTP status and one sentence."""

    status: int
    sentence: str


class Guard:
    """The middleware: refuses what `rules` do not let in, and adds the headers of every answer."""

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
            await _answer(send, refused.status, refused.sentence)
        elif is_known(request, self._rules):
            await self._app(scope, receive, _with_headers(send))
        elif self._rules.token is not None and is_same(request.query_token, self._rules.token):
            await _answer(send, 303, "", _visit(request, self._rules.token, self._rules.cookie))
        else:
            await _answer(send, 401, self._rules.advice, [(b"www-authenticate", b"Bearer")])


@dataclass(frozen=True, slots=True)
class Request:
    """What the questions are about. `headers` by lower-case name, all values of each.

    client, server: the two ends of the connection; None where there is none, or not over IPv4.
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
        """The value of a header; None where it is absent, or there more than once."""
        found = self.headers.get(name, ())
        return found[0] if len(found) == 1 else None

    @property
    def query_token(self) -> str | None:
        """The token of a first visit, which is a page and so a GET."""
        if self.method != "GET" or self.websocket:
            return None
        return dict(parse_qsl(self.query)).get(TOKEN)


def refusal(request: Request, rules: Rules) -> Refusal | None:
    """Why the request is refused whoever sends it; None where it is not."""
    host = request.one("host")
    if host is None or _name(host) not in LOOPBACK | rules.hosts:
        return Refusal(421, "This server is not reached under this Host; webserver.hosts names further ones.")
    if not _is_own_page(request, host):
        return Refusal(403, "A page of another site has sent this request.")
    if request.websocket:
        return None
    if request.path.startswith(rules.closed):
        return Refusal(403, "This route is closed by the settings.")
    if request.path.startswith(rules.posts):
        if request.method != "POST":
            return Refusal(405, "This route takes POST alone.")
        if _media_type(request) != JSON:
            return Refusal(415, f"This route takes {JSON} alone.")
    elif request.method not in ("GET", "HEAD"):
        return Refusal(405, f"This route does not take {request.method}.")
    return None


def is_known(request: Request, rules: Rules) -> bool:
    """Whether the sender knows the token, by a header or by the cookie of an earlier visit, or needs none."""
    if rules.token is None or (rules.owner is not None and _is_of(rules.owner, request)):
        return True
    scheme, _, credentials = (request.one("authorization") or "").partition(" ")
    if scheme.lower() == "bearer" and is_same(credentials.strip(), rules.token):
        return True
    wanted = cookie_value(rules.token)
    return any(is_same(value, wanted) for value in _cookies(request, rules.cookie))


def _is_of(owner: int, request: Request) -> bool:
    """Whether a process of this account, on this machine, has sent the request itself.

    A proxy of the same account passes on requests of anyone: it is known by its headers, or by a Host that is not a
    loopback name.
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
    """What a browser keeps in the token's place: it opens the pages, and does not show the token."""
    return hmac.new(token.encode(), b"cookie of a visit", hashlib.sha256).hexdigest()


def _address(found: Sequence[Any] | None) -> Address | None:
    """One end of a connection as ASGI has it: a host and a port, or the path of a Unix socket and no port."""
    return None if not found or found[1] is None else (str(found[0]), int(found[1]))


def _name(host: str) -> str:
    """The name in a Host header, without its port; an IPv6 address in its brackets."""
    name, _, port = host.strip().lower().rpartition(":")
    if not name or "]" in port:  # there is no port
        name = host.strip().lower()
    return name.rstrip(".")


def _is_own_page(request: Request, host: str) -> bool:
    """Whether a page of this server has sent the request, a person by a link or an address, or a program.

    Sec-Fetch-Site calls another port of the same machine `same-site`: that is another server.
    """
    if "origin" in request.headers and not _is_origin_of(request.one("origin") or "", host):
        return False
    if request.one("sec-fetch-site") not in ("cross-site", "same-site"):
        return True
    is_visit = request.one("sec-fetch-mode") == "navigate" and request.one("sec-fetch-dest") == "document"
    return request.method in ("GET", "HEAD") and is_visit


def _is_origin_of(origin: str, host: str) -> bool:
    """Whether an Origin is that of the server under this Host: a proxy may have taken TLS off."""
    scheme, separator, place = origin.strip().lower().partition("://")
    if not separator or scheme not in _PORTS:
        return False
    usual = f":{_PORTS[scheme]}"
    return place.removesuffix(usual) == host.strip().lower().removesuffix(usual)


def _media_type(request: Request) -> str:
    return (request.one("content-type") or "").partition(";")[0].strip().lower()


def _cookies(request: Request, name: str) -> list[str]:
    """The values of a cookie. Those of other servers on this machine come along, well-formed or not."""
    pairs = (part.partition("=") for line in request.headers.get("cookie", ()) for part in line.split(";"))
    return [value.strip() for key, _, value in pairs if key.strip() == name]


def _visit(request: Request, token: str, cookie: str) -> list[tuple[bytes, bytes]]:
    """The headers that lead a first visit to the same page, without the token in its address."""
    kept = [
        (name, value) for name, value in parse_qsl(request.query, keep_blank_values=True) if name != TOKEN
    ]
    # Never "//host" or "/\\host", which a browser takes for another server.
    place = "/" + request.raw_path.lstrip("/\\") + (f"?{urlencode(kept)}" if kept else "")
    kept_by_browser = f"{cookie}={cookie_value(token)}; Path=/; HttpOnly; SameSite=Strict"
    return [(b"location", place.encode("latin-1")), (b"set-cookie", kept_by_browser.encode())]


async def _answer(send: Send, status: int, text: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
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
            # A second policy beside the server's own: a browser keeps to both.
            message = {**message, "headers": [*kept, *_HEADERS.items(), _NO_FRAMES]}
        await send(message)

    return guarded
