"""A proxy on loopback: forwards GET and CONNECT for any host to one server.

An unresolvable host name is reachable only through the proxy, so a test can detect the route of a request.
"""

from __future__ import annotations

import base64
import http.client
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Proxy:
    """The address of the proxy, and the received request lines (`GET http://host/x`, `CONNECT host:443`)."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.requests: list[str] = []


@contextmanager
def forwarding(target: str, *, refuse: int | None = None, user: str | None = None) -> Iterator[Proxy]:
    """A proxy for the server at the URL `target`.

    refuse: the status of all responses. user: the required `name:password`; otherwise the status is 407.
    """
    address = urlsplit(target)
    assert address.hostname is not None
    assert address.port is not None
    place = (address.hostname, address.port)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_CONNECT(self) -> None:
            if self._is_refused():
                return
            with socket.create_connection(place) as there:
                self.send_response_only(200)
                self.end_headers()
                back = threading.Thread(target=_pump, args=(there, self.connection), daemon=True)
                back.start()
                _pump(self.connection, there)
                back.join()
            self.close_connection = True

        def do_GET(self) -> None:
            if self._is_refused():
                return
            url = urlsplit(self.path)
            there = http.client.HTTPConnection(address.hostname or "", address.port, timeout=10)
            there.set_debuglevel(0)  # only the output of the tested client matters
            there.request("GET", f"{url.path}?{url.query}", headers=dict(self.headers))
            answer = there.getresponse()
            body = answer.read()
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            there.close()

        def _is_refused(self) -> bool:
            proxy.requests.append(f"{self.command} {self.path}")
            expected = f"Basic {base64.b64encode((user or '').encode()).decode()}"
            status = refuse
            if status is None and user and self.headers.get("Proxy-Authorization") != expected:
                status = 407
            if status is None:
                return False
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return True

        def log_message(self, *_: object) -> None:
            """No log."""

    class Loopback(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """Disconnecting clients are part of the tests."""

    httpd = Loopback(("127.0.0.1", 0), Handler)
    proxy = Proxy(httpd.server_address[1])
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield proxy
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Forwards bytes until one side closes."""
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
