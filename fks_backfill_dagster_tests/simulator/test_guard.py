"""Protection of the control routes: requests from web pages of other sites change nothing."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.routing import Route

from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.simulator.server import make_app, url_of
from fks_backfill_dagster_tests.simulator.conftest import NOW
from fks_backfill_dagster_tests.simulator.wire import window

JSON = {"Content-Type": "application/json"}
OUTAGE = json.dumps({"provider": "all", "start": "2024-01-01", "end": "2024-01-02"})

POSTS = {
    "/sim/outages": OUTAGE,
    "/sim/faults": '{"provider": "binance", "kind": "html", "count": null}',
    "/sim/clock": '{"now": "2020-01-01"}',
    "/sim/limits": '{"binance": 1}',
    "/sim/prepare": '{"provider": "binance", "symbol": "BTC/USDT", "timeframe": "1d",'
    ' "start": "2024-01-01", "end": "2024-01-02"}',
}
A_DAY = window("2025-03-18", "2025-03-19")
TRUTH = "/sim/truth/binance/BTCUSDT/1d?start=2024-01-01&end=2024-01-03"


def send(
    market: LocalMarket,
    method: str,
    path: str,
    body: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Status and body; a Host header replaces the real one."""
    connection = http.client.HTTPConnection(urlsplit(market.url).netloc, timeout=10)
    try:
        connection.putrequest(method, path, skip_host="Host" in (headers or {}))
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        data = b"" if body is None else body.encode()
        if body is not None:
            connection.putheader("Content-Length", str(len(data)))
        connection.endheaders(data)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def state(market: LocalMarket) -> list[Any]:
    """The state that the control routes change."""
    return [
        json.loads(send(market, "GET", f"/sim/{name}")[1])
        for name in ("outages", "faults", "clock", "limits")
    ]


def control_routes() -> Iterator[tuple[str, str]]:
    """Every method of every control route, new ones included."""
    for route in make_app(MarketConfig()).routes:
        if isinstance(route, Route) and route.path.startswith("/sim/"):
            path = TRUTH if route.path.startswith("/sim/truth") else route.path
            yield from ((method, path) for method in sorted(route.methods or ()))


ROUTES = list(control_routes())


def test_there_are_routes_to_test() -> None:
    assert {path for _, path in ROUTES} == {*POSTS, "/sim/requests", TRUTH}
    assert {path for method, path in ROUTES if method == "POST"} == set(POSTS)


FOREIGN = [
    ({"Host": "evil.example:8899"}, 421),
    ({"Host": "127.0.0.1.evil.example"}, 421),
    ({"Host": "localhost.evil.example"}, 421),
    ({"Host": "evil@127.0.0.1"}, 421),
    ({"Host": "10.1.2.3"}, 421),
    ({"Host": ""}, 421),
    ({"Origin": "http://evil.example"}, 403),
    ({"Origin": "https://127.0.0.1"}, 403),
    ({"Origin": "http://127.0.0.1:1"}, 403),
    ({"Origin": "http://localhost"}, 403),
    ({"Origin": "null"}, 403),
    ({"Sec-Fetch-Site": "cross-site"}, 403),
    ({"Sec-Fetch-Site": "same-site"}, 403),
]


@pytest.mark.parametrize(("headers", "status"), FOREIGN)
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_page_of_another_site_is_rejected(
    market: LocalMarket, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    market.plant_outage("polygon", A_DAY, "BTC/USDT")
    before = state(market)
    body = POSTS[path] if method == "POST" else None
    got, text = send(market, method, path, body, headers | JSON)
    assert got == status
    if method != "HEAD":
        assert json.loads(text)["error"].startswith("the control routes ")
    assert state(market) == before


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
@pytest.mark.parametrize("path", POSTS)
def test_a_form_of_a_page_is_rejected_and_a_program_is_served(
    market: LocalMarket, path: str, kind: str
) -> None:
    """Requests that a page can send without a preflight have an Origin; those of `curl -d` have none."""
    before = state(market)
    headers = {"Content-Type": kind} if kind else {}
    for origin in ("http://evil.example", "null"):
        assert send(market, "POST", path, POSTS[path], headers | {"Origin": origin})[0] == 403
    assert state(market) == before
    assert send(market, "POST", path, POSTS[path], headers)[0] == 200


@pytest.mark.parametrize("path", POSTS)
def test_a_preflight_is_never_permitted(market: LocalMarket, path: str) -> None:
    requested = {"Origin": "http://evil.example", "Access-Control-Request-Method": "DELETE"}
    got, _ = send(market, "OPTIONS", path, None, requested)
    assert got == 405


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", [path for path in POSTS if path != "/sim/prepare"])
def test_get_changes_nothing(market: LocalMarket, method: str, path: str) -> None:
    market.plant_outage("polygon", A_DAY, "BTC/USDT")
    before = state(market)
    assert send(market, method, path, POSTS[path], JSON)[0] == 200
    assert state(market) == before


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:1", "localhost:8899", "LOCALHOST", "[::1]:8899", "127.8.8.8"]
)
@pytest.mark.parametrize("path", POSTS)
def test_programs_of_this_machine_are_served(market: LocalMarket, path: str, host: str) -> None:
    headers = {"Host": host, "Content-Type": "application/json; charset=utf-8"}
    assert send(market, "POST", path, POSTS[path], headers)[0] == 200
    assert send(market, "POST", path, POSTS[path], headers | {"Origin": f"http://{host}"})[0] == 200


def test_providers_accept_any_host(market: LocalMarket) -> None:
    """Containers use their own hostname for this machine; the data is synthetic."""
    assert send(market, "GET", "/binance/api/v3/ping", None, {"Host": "host.example:8899"})[0] == 200


def address_of_this_machine() -> str:
    """The address that this machine uses for outgoing connections."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no address but loopback")
        found = str(sock.getsockname()[0])
    if found.startswith("127."):
        pytest.skip("this machine has no address but loopback")
    return found


@pytest.mark.server
@pytest.mark.parametrize("everywhere", [False, True])
def test_the_bound_address_is_served(everywhere: bool) -> None:
    address = address_of_this_machine()
    with LocalMarket(MarketConfig(host="0.0.0.0" if everywhere else address, now=NOW)) as market:
        port = urlsplit(market.url).port
        market.url = f"http://{address}:{port}"
        market.post("/sim/limits", binance=7)
        for host in (f"evil.example:{port}", "10.255.255.254"):
            assert send(market, "POST", "/sim/limits", '{"binance": 9}', JSON | {"Host": host})[0] == 421
        assert json.loads(send(market, "GET", "/sim/limits")[1])["binance"]["limit"] == 7


def test_a_market_on_all_addresses_has_a_loopback_url() -> None:
    assert url_of("0.0.0.0", 1) == "http://127.0.0.1:1"
    assert url_of("::", 1) == "http://[::1]:1"
    assert url_of("10.1.2.3", 1) == "http://10.1.2.3:1"
