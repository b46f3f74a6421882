"""The account at the other end of a loopback connection, and its access through the guard."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest
import uvicorn

from fks_backfill_dagster import peers
from fks_backfill_dagster.guard import Guard, Receive, Rules, Scope, Send
from fks_backfill_dagster.peers import account_of
from fks_backfill_dagster_tests.accounts import as_other, needs_root, other_account
from fks_backfill_dagster_tests.odd_servers import until

TOKEN = "correct-horse-battery-staple-0123456789"

needs_table = pytest.mark.skipif(
    not Path("/proc/self/net/tcp").exists(), reason="this system does not publish the owners of sockets"
)


# The system's connection table


@pytest.mark.server
@needs_table
def test_a_connection_of_this_process() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        closing(socket.create_connection(listener.getsockname())) as client,
    ):
        server, place = listener.accept()
        with closing(server):
            assert account_of(place, listener.getsockname()) == os.geteuid()
            assert account_of((place[0], place[1] ^ 1), listener.getsockname()) is None
            client.close()
            until(lambda: account_of(place, listener.getsockname()) is None)


_CONNECT = (
    "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); sys.stdin.read()"
)


@pytest.mark.server
@needs_root
@needs_table
def test_a_connection_of_another_account() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        command = [*as_other(), sys.executable, "-c", _CONNECT, port]
        with subprocess.Popen(command, stdin=subprocess.PIPE, cwd="/") as process:
            server, place = listener.accept()
            with closing(server):
                assert account_of(place, listener.getsockname()) == other_account().pw_uid
                process.kill()


def line(local: str, remote: str, state: str, uid: int, inode: int) -> str:
    return f"   0: {local} {remote} {state} 0:0 00:0 0 {uid:5d}        0 {inode} 1 0 20 4 30"


HERE, THERE = ("127.0.0.1", 50_000), ("127.0.0.1", 3_000)


def written(address: tuple[str, int]) -> str:
    (number,) = struct.unpack("=I", socket.inet_aton(address[0]))
    return f"{number:08X}:{address[1]:04X}"


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([(HERE, THERE, "01", 1000, 77)], 1000),
        ([(THERE, HERE, "01", 1000, 77)], None),  # the server's own end
        ([(THERE, HERE, "01", 0, 78), (HERE, THERE, "01", 1000, 77)], 1000),
        ([(HERE, THERE, "06", 0, 0)], None),  # TIME_WAIT: without an owner, listed as root's
        ([(HERE, THERE, "05", 1000, 77)], None),
        ([(HERE, THERE, "01", 0, 0)], None),  # an orphan
        ([(("127.0.0.2", 50_000), THERE, "01", 1000, 77)], None),
        ([], None),
    ],
)
def test_the_lines_that_count(
    lines: list[tuple[tuple[str, int], tuple[str, int], str, int, int]],
    found: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = tmp_path / "tcp"
    rows = [line(written(one), written(two), state, uid, inode) for one, two, state, uid, inode in lines]
    table.write_text("\n".join(["  sl  local_address rem_address   st tx_queue", *rows, ""]))
    monkeypatch.setattr(peers, "_TABLE", table)
    assert account_of(HERE, THERE) == found


@pytest.mark.parametrize("client", [("::1", 50_000), ("testclient", 1), ("", 0), ("127.0.0.1", -1)])
def test_an_invalid_address_is_unknown(client: tuple[str, int]) -> None:
    assert account_of(client, THERE) is None


def test_a_system_without_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_TABLE", tmp_path / "none")
    assert account_of(HERE, THERE) is None


# The guard in front of a server


async def routes(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"in"})


@contextmanager
def serving(rules: Rules) -> Iterator[int]:
    """The port of a real server behind the guard."""
    config = uvicorn.Config(
        Guard(routes, rules), port=0, log_level="critical", lifespan="off", proxy_headers=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def status(port: int, **headers: str) -> int:
    with closing(HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request(
            "GET", "/", headers={name.replace("_", "-"): value for name, value in headers.items()}
        )
        return connection.getresponse().status


OWN = Rules(TOKEN, "fks_backfill_0", frozenset({"fks.example.com"}), owner=os.geteuid())


@pytest.mark.server
@needs_table
def test_the_account_itself_needs_no_token() -> None:
    with serving(OWN) as port:
        assert status(port) == 200
        assert status(port, Authorization="Bearer wrong") == 200
    with serving(Rules(TOKEN, "fks_backfill_0")) as port:
        assert status(port) == 401


@pytest.mark.server
@pytest.mark.parametrize(
    "headers",
    [
        {"X_Forwarded_For": "203.0.113.7"},
        {"Forwarded": "for=203.0.113.7"},
        {"Via": "1.1 proxy"},
        {"X_Real_IP": "203.0.113.7"},
        {"X_Forwarded_Host": "fks.example.com"},
        {"Host": "fks.example.com"},
    ],
    ids=lambda headers: "".join(headers),
)
def test_a_request_forwarded_by_a_proxy_needs_the_token(headers: dict[str, str]) -> None:
    with serving(OWN) as port:
        assert status(port, **headers) == 401
        assert status(port, **headers, Authorization=f"Bearer {TOKEN}") == 200


@pytest.mark.server
@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}])
def test_a_page_of_another_site_in_a_browser_of_the_account_is_refused(headers: dict[str, str]) -> None:
    with serving(OWN) as port:
        assert status(port, **headers) in (403, 421)


_GET = """
import http.client, sys
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=30)
connection.request("GET", "/", headers={"Authorization": "Bearer " + sys.argv[2]} if sys.argv[2:] else {})
print(connection.getresponse().status)
"""


def status_for_stranger(port: int, *token: str) -> int:
    command = [*as_other(), sys.executable, "-c", _GET, str(port), *token]
    return int(subprocess.run(command, cwd="/", capture_output=True, check=True, text=True).stdout)


@pytest.mark.server
@needs_root
def test_another_account_needs_the_token() -> None:
    with serving(OWN) as port:
        assert status_for_stranger(port) == 401
        assert status_for_stranger(port, TOKEN) == 200
