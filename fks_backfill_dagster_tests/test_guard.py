"""The guard of the web servers refuses pages of other sites, and requests without the token."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fks_backfill_dagster.guard import (
    Guard,
    Message,
    Receive,
    Request,
    Rules,
    Scope,
    Send,
    cookie_value,
    is_known,
    refusal,
)

TOKEN = "correct-horse-battery-staple-0123456789"
HOST = "127.0.0.1:3000"
RULES = Rules(TOKEN, "fks_3000", frozenset({"fks.example.com"}), ("/graphql",), ("/report_asset",))
JSON = {"content-type": "application/json"}


def request(method: str = "GET", path: str = "/", query: str = "", **headers: str) -> Request:
    named = {"host": HOST} | {name.replace("_", "-"): value for name, value in headers.items()}
    return Request(method, path, path, query, {name: (value,) for name, value in named.items()})


def status(of: Request, rules: Rules = RULES) -> int | None:
    found = refusal(of, rules)
    return None if found is None else found.status


def post(path: str = "/graphql", **headers: str) -> Request:
    return request("POST", path, **{"content_type": "application/json", **headers})


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        HOST,
        "LOCALHOST:3000",
        "localhost.",
        "[::1]:3000",
        "[::1]",
        "fks.example.com",
        "FKS.example.com:443",
    ],
)
def test_its_own_hosts(host: str) -> None:
    assert status(request(host=host)) is None


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "evil.example:3000",
        "127.0.0.1@evil.example",
        "fks.example.com.evil.example",
        "xfks.example.com",
        "127.0.0.2",
        "0.0.0.0",
        "[::]",
        "::1",
        "",
        ":3000",
        "127.0.0.1, evil.example",
        "127.0.0.1:3000:80",
    ],
)
def test_other_hosts(host: str) -> None:
    """Another site's name may resolve to the loopback address (DNS rebinding)."""
    assert status(request(host=host)) == 421
    assert status(post(host=host)) == 421


def test_no_host_and_two() -> None:
    for values in ((), (HOST, HOST), (HOST, "evil.example")):
        assert status(Request("GET", "/", "/", "", {"host": values})) == 421


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        (HOST, f"http://{HOST}"),
        ("localhost:3000", "HTTP://LOCALHOST:3000"),
        ("fks.example.com", "https://fks.example.com"),  # a proxy terminated TLS
        ("fks.example.com", "https://fks.example.com:443"),
        ("fks.example.com:443", "https://fks.example.com"),
    ],
)
def test_its_own_pages(host: str, origin: str) -> None:
    assert status(post(host=host, origin=origin, sec_fetch_site="same-origin")) is None


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "http://127.0.0.1:9999",  # another server of this machine
        "http://127.0.0.1",
        "http://localhost:3000",  # another name is another site
        f"http://{HOST}.evil.example",
        f"http://evil.example#{HOST}",
        f"ftp://{HOST}",
        HOST,
        "null",
        "",
    ],
)
def test_pages_of_other_sites(origin: str) -> None:
    assert status(post(origin=origin)) == 403
    assert status(request(origin=origin)) == 403


def test_two_origins() -> None:
    headers = {
        "host": (HOST,),
        "origin": (f"http://{HOST}", "http://evil.example"),
        "content-type": ("application/json",),
    }
    assert status(Request("POST", "/graphql", "/graphql", "", headers)) == 403


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_requests_embedded_in_another_page(site: str) -> None:
    """A browser marks them with Sec-Fetch-Site, also without an Origin. Following a link is a navigation."""
    for mode, dest in itertools.product(
        ("no-cors", "cors", "navigate"), ("image", "script", "iframe", "empty", "document")
    ):
        found = status(request(sec_fetch_site=site, sec_fetch_mode=mode, sec_fetch_dest=dest))
        assert found == (None if (mode, dest) == ("navigate", "document") else 403)
    assert status(post(sec_fetch_site=site, sec_fetch_mode="navigate", sec_fetch_dest="document")) == 403


@pytest.mark.parametrize(
    "content",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/plain; application/json",  # a page sends this type without a preflight
        "application/jsonp",
        "application/graphql",
        "",
    ],
)
def test_simple_requests_of_a_page_are_no_queries(content: str) -> None:
    assert status(post(content_type=content)) == 415
    assert status(post(content_type=f"{content}; charset=utf-8")) == 415


def test_queries_are_posted_as_json() -> None:
    assert status(post(content_type="Application/JSON; charset=utf-8")) is None
    for method in ("GET", "HEAD", "PUT", "OPTIONS", "DELETE", "TRACE"):
        assert status(request(method, "/graphql", "query={version}", accept="text/html")) == 405


def test_pages_are_read() -> None:
    for path in ("/", "/assets/ohlcv/BTC_USDT/1h", "/logs/a/b.out", "/server_info"):
        assert status(request(path=path)) is None
        assert status(request("HEAD", path)) is None
        for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
            assert status(request(method, path, **{"content_type": "application/json"})) == 405


def test_reports_are_closed_by_default() -> None:
    for path in ("/report_asset_materialization/a", "/report_asset_check/a", "/report_asset_observation/a"):
        assert status(post(path)) == 403
        opened = Rules(TOKEN, "c", posts=("/graphql", "/report_asset"))
        assert status(post(path), opened) is None
        assert status(post(path, content_type="text/plain"), opened) == 415


_names = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=40)


@given(origin=_names, host=_names)
def test_no_foreign_origin_is_accepted(origin: str, host: str) -> None:
    """For any pair, a request is accepted only under one of our names and from a page of that name."""
    found = status(post(origin=origin, host=host))
    if found is None:
        assert origin.lower().split("://")[1].split(":")[0] in host.lower()
        assert host.lower().split(":")[0].rstrip(".") in {"127.0.0.1", "localhost", "fks.example.com", "["}


def test_requests_with_the_token() -> None:
    good = cookie_value(TOKEN)
    assert is_known(request(authorization=f"Bearer {TOKEN}"), RULES)
    assert is_known(request(authorization=f"bearer  {TOKEN} "), RULES)
    assert is_known(request(cookie=f"a=b; fks_3000={good}; odd"), RULES)
    assert is_known(request(cookie=f"fks_3000=old; fks_3000={good}"), RULES)
    assert is_known(request(), Rules(None, "fks_3000"))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": f"Bearer {TOKEN}x"},
        {"authorization": f"Bearer {TOKEN[:-1]}"},
        {"authorization": "Bearer \xe9"},
        {"cookie": f"fks_3000={TOKEN}"},  # the cookie is not the token
        {"cookie": f"fks_3001={cookie_value(TOKEN)}"},
        {"cookie": f"fks_3000={cookie_value('another')}"},
        {"cookie": f"x=fks_3000={cookie_value(TOKEN)}"},
    ],
)
def test_requests_without_the_token(headers: Mapping[str, str]) -> None:
    assert not is_known(request(**headers), RULES)


# --- as an application ---


async def _page(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"Referrer-Policy", b"unsafe-url")]}
    )
    await send({"type": "http.response.body", "body": b"page"})


def respond(kind: str = "http", rules: Rules = RULES, **of: object) -> list[Message]:
    """The messages that the guarded page sends in response to a request."""
    headers = of.pop("headers", {})
    assert isinstance(headers, dict)
    scope = {
        "type": kind,
        "method": "GET",
        "path": "/",
        "query_string": b"",
        "headers": [(k.encode(), v.encode()) for k, v in ({"host": HOST} | headers).items()],
        **of,
    }
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    asyncio.run(Guard(_page, rules)(scope, receive, send))
    return sent


def test_a_first_visit_redirects_to_the_page_without_the_token() -> None:
    start, body = respond(path="/runs", raw_path=b"/runs", query_string=f"token={TOKEN}&view=a%20b".encode())
    headers = dict(start["headers"])
    assert (start["status"], body["body"]) == (303, b"")
    assert headers[b"location"] == b"/runs?view=a+b"
    assert (
        headers[b"set-cookie"]
        == f"fks_3000={cookie_value(TOKEN)}; Path=/; HttpOnly; SameSite=Strict".encode()
    )
    assert TOKEN not in str(start)
    start, body = respond(headers={"cookie": f"fks_3000={cookie_value(TOKEN)}"})
    assert (start["status"], body["body"]) == (200, b"page")


@pytest.mark.parametrize("path", [b"//evil.example", b"/\\evil.example", b"\\\\evil.example/x", b"/%2f"])
def test_a_first_visit_redirects_to_no_other_server(path: bytes) -> None:
    start, _ = respond(path=path.decode(), raw_path=path, query_string=f"token={TOKEN}".encode())
    place = dict(start["headers"])[b"location"]
    assert place.startswith(b"/")
    assert not place.startswith((b"//", b"/\\"))


def test_without_the_token_the_response_is_the_advice() -> None:
    for query in (b"", b"token=", b"token=wrong", f"token={TOKEN}x".encode()):
        start, body = respond(query_string=query)
        assert start["status"] == 401
        assert b"fks-backfill up" in body["body"]
        assert b"set-cookie" not in dict(start["headers"])


def test_no_response_can_be_framed_or_leaks_its_address() -> None:
    for sent in (
        respond(),
        respond(headers={"authorization": f"Bearer {TOKEN}"}),
        respond(headers={"host": "evil"}),
    ):
        headers = [(name.lower(), value) for name, value in sent[0]["headers"]]
        assert (b"x-frame-options", b"DENY") in headers
        assert (b"content-security-policy", b"frame-ancestors 'none'") in headers
        assert [value for name, value in headers if name == b"referrer-policy"] == [b"no-referrer"]


@pytest.mark.parametrize(
    ("headers", "opened"),
    [
        ({"authorization": f"Bearer {TOKEN}"}, True),
        ({"cookie": f"fks_3000={cookie_value(TOKEN)}", "origin": f"http://{HOST}"}, True),
        ({"cookie": f"fks_3000={cookie_value(TOKEN)}", "origin": "http://127.0.0.1:9999"}, False),
        ({"cookie": f"fks_3000={cookie_value(TOKEN)}", "host": "evil.example"}, False),
        ({"origin": f"http://{HOST}"}, False),
        ({}, False),
    ],
)
def test_web_sockets(headers: dict[str, str], opened: bool) -> None:
    (message,) = respond("websocket", path="/graphql", headers=headers)
    assert message["type"] == ("websocket.accept" if opened else "websocket.close")
