"""A loopback HTTP server with scripted responses, and a minimal Binance for it.

Belongs here: sockets, recording of requests, honest klines and archives.
Does not belong here: faults; each test plants its own.
"""

from __future__ import annotations

import hashlib
import io
import ssl
import threading
import time
import zipfile
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit

import numpy as np
import orjson

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe


@dataclass(frozen=True)
class Received:
    """A received request."""

    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    at: float


@dataclass(frozen=True)
class Scripted:
    """A response. cut: closes the connection after that many bytes. delay: seconds before the response."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    delay: float = 0.0


class Server:
    """The running server: its `url`, and every received request."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[Received] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.lock = threading.Lock()


def always(response: Scripted) -> Callable[[Received], Scripted]:
    """The same response to every request."""
    return lambda _: response


@contextmanager
def serve(answer: Callable[[Received], Scripted], tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    """A running server. tls: serves HTTPS."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            asked = Received(
                unquote(parts.path), dict(parse_qsl(parts.query)), dict(self.headers), time.monotonic()
            )
            with server.lock:
                server.requests.append(asked)
                server.in_flight += 1
                server.most_in_flight = max(server.most_in_flight, server.in_flight)
            try:
                self._send(answer(asked))
            finally:
                with server.lock:
                    server.in_flight -= 1

        def _send(self, response: Scripted) -> None:
            time.sleep(response.delay)
            self.send_response_only(response.status)
            if "Date" not in response.headers:
                self.send_header("Date", self.date_time_string())
            self.send_header(
                "Content-Length", str(len(response.body))
            )  # first: later headers may be malformed
            for name, value in response.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(response.body[: response.cut])
            if response.cut is not None:
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            """No log."""

    class Loopback(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, *_: object) -> None:
            """Disconnecting clients are part of the tests."""

    httpd = Loopback(("127.0.0.1", 0), Handler)
    if tls is not None:
        httpd.socket = tls.wrap_socket(httpd.socket, server_side=True)
    server = Server(f"http{'s' if tls else ''}://127.0.0.1:{httpd.server_address[1]}")
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def json_said(document: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Scripted:
    return Scripted(orjson.dumps(document), status, {"Content-Type": "application/json", **(headers or {})})


def crypto(timeframe: Timeframe = Timeframe.M1, symbol: str = "BTC/USDT") -> Series:
    return Series(symbol, timeframe, AssetClass.CRYPTO)


NO_OUTAGE = RangeSet()


@dataclass
class SmallBinance:
    """Honest klines and archives of every symbol; prices depend on the open and the symbol only.

    rest, archive: may replace a response; called with the request and the honest response. outage: candles that neither
    REST nor archives have. unpublished: parts of the archive paths that return 404.
    """

    outage: RangeSet = NO_OUTAGE
    listed: int = 0
    header: bool = False
    unpublished: tuple[str, ...] = ()
    archive_missing: RangeSet = NO_OUTAGE
    rest: Callable[[Received, Scripted], Scripted] = lambda _, honest: honest
    archive: Callable[[Received, Scripted], Scripted] = lambda _, honest: honest

    def __call__(self, asked: Received) -> Scripted:
        if asked.path == "/api/v3/klines":
            return self.rest(asked, self._klines(asked))
        if asked.path.startswith("/data/spot/"):
            return self.archive(asked, self._archived(asked.path))
        return Scripted(b"<html>404</html>", 404)

    def truth(self, series: Series, window: TimeRange) -> Candles:
        opens = grid_of(series).opens(window)
        opens = opens[(opens >= self.listed) & ~self.outage.contains(opens)]
        return candles_at(opens, series.symbol.replace("/", ""))

    def _klines(self, asked: Received) -> Scripted:
        q = asked.query
        series = crypto(Timeframe(q["interval"]))
        start = max(int(q.get("startTime", 0)) * 1000, self.listed)
        end = int(q["endTime"]) * 1000 + 1 if "endTime" in q else start + 10**9 * 3600
        window = TimeRange(start, max(start, min(end, time.time_ns() // 1000)))
        candles = self.truth(Series(q["symbol"], series.timeframe, AssetClass.CRYPTO), window)
        return json_said(klines(candles.take(slice(0, int(q["limit"]))), series.timeframe))

    def _archived(self, path: str) -> Scripted:
        if any(part in path for part in self.unpublished):
            return Scripted(b"<Error><Code>NoSuchKey</Code></Error>", 404)
        *_, symbol, interval, name = path.removesuffix(".CHECKSUM").split("/")
        stem = name.removesuffix(".zip")
        period = _period(stem.removeprefix(f"{symbol}-{interval}-"))
        missing = self.outage | self.archive_missing | RangeSet([TimeRange(0, self.listed)])
        zipped = _archive_of(symbol, Timeframe(interval), period, missing, self.header, stem)
        return checksum_of(zipped, f"{stem}.zip") if path.endswith(".CHECKSUM") else Scripted(zipped)


_building = threading.Lock()
_built: dict[Hashable, bytes] = {}


def _archive_of(
    symbol: str, timeframe: Timeframe, period: TimeRange, missing: RangeSet, header: bool, stem: str
) -> bytes:
    """An honest file, built once: a month of minutes takes a while in plain Python."""
    key = (symbol, timeframe, period, missing, header, stem)
    with _building:
        if key not in _built:
            opens = grid_of(crypto(timeframe)).opens(period)
            candles = candles_at(opens[~missing.contains(opens)], symbol)
            _built[key] = zipped_csv(csv_of(candles, timeframe, header=header), stem)
        return _built[key]


def candles_at(opens: np.ndarray, symbol: str) -> Candles:
    base = 100 + sum(map(ord, symbol)) + (opens // 60_000_000 % 977) / 8
    return Candles(opens, base, base + 2, base - 2, base + 1, (opens // 60_000_000 % 31) / 4)


def klines(candles: Candles, timeframe: Timeframe) -> list[list[object]]:
    texts = [[f"{value:.8f}" for value in column] for column in candles.columns()[1:]]
    opens = (candles.ts // 1000).tolist()
    length = timeframe.micros // 1000
    return [
        [ts, *(text[i] for text in texts), ts + length - 1, "1.0", 1, "1.0", "1.0", "0"]
        for i, ts in enumerate(opens)
    ]


MICROS_FROM = 1_735_689_600_000_000  # 2025-01-01


def csv_of(candles: Candles, timeframe: Timeframe, *, header: bool = False) -> bytes:
    """Microseconds from 2025 on, as in the real files."""
    scale = np.where(candles.ts >= MICROS_FROM, 1, 1000)
    opens = (candles.ts // scale).tolist()
    closes = ((candles.ts + timeframe.micros) // scale - 1).tolist()
    columns = [opens, *(column.tolist() for column in candles.columns()[1:]), closes]
    form = "%d,%.8f,%.8f,%.8f,%.8f,%.8f,%d,1.0,1,1.0,1.0,0\n"
    head = "open_time,open,high,low,close,volume,close_time,q,n,tb,tq,ignore\n" if header else ""
    return (head + "".join([form % row for row in zip(*columns, strict=True)])).encode()


def zipped_csv(text: bytes, stem: str) -> bytes:
    """Deterministic: the same text gives the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        entry = zipfile.ZipInfo(f"{stem}.csv", date_time=(2024, 1, 1, 0, 0, 0))
        entry.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(entry, text)
    return buffer.getvalue()


def checksum_of(zipped: bytes, name: str) -> Scripted:
    return Scripted(f"{hashlib.sha256(zipped).hexdigest()}  {name}\n".encode())


def _period(text: str) -> TimeRange:
    start = np.datetime64(text)
    return TimeRange(*(int(edge.astype("datetime64[us]").astype(int)) for edge in (start, start + 1)))


def us(text: str) -> int:
    """`2024-01-05T03:00` in microseconds."""
    return int(np.datetime64(text, "us").astype(int))


def span(start: str, end: str) -> TimeRange:
    return TimeRange(us(start), us(end))
