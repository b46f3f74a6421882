"""The HTTP server: providers by path prefix on one port, and faults on the socket.

`make_app` returns the ASGI application, `run` serves it until it is stopped. The content of responses is
defined by the wire formats.
"""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import formatdate
from types import FrameType
from urllib.parse import parse_qsl

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from fks_backfill_dagster.domain.timeframe import iso
from fks_backfill_dagster.simulator.alphavantage import AlphaVantage
from fks_backfill_dagster.simulator.archive import Archives
from fks_backfill_dagster.simulator.binance import Binance
from fks_backfill_dagster.simulator.coingecko import CoinGecko
from fks_backfill_dagster.simulator.config import PROVIDERS, MarketConfig
from fks_backfill_dagster.simulator.control import Control
from fks_backfill_dagster.simulator.faults import (
    ROWS,
    TRANSPORT,
    Fault,
    Kind,
    Page,
    RequestedSpan,
    apply_fault,
    mixed,
)
from fks_backfill_dagster.simulator.journal import Entry, without_key
from fks_backfill_dagster.simulator.oanda import Oanda
from fks_backfill_dagster.simulator.polygon import Polygon
from fks_backfill_dagster.simulator.state import Sandbox
from fks_backfill_dagster.simulator.wire import JSON, Answer, Call, Reply, WireFormat
from fks_backfill_dagster.simulator.yahoo import Yahoo

_HTML = Reply(b"<!DOCTYPE html><html><body><h1>We'll be back soon</h1></body></html>", media_type="text/html")
_DRIPS = 20
TITLE = "fks-backfill local market"
"""The beginning of the index page."""


class PortInUse(OSError):
    """Another process listens on the port. The text names the address and the remedy."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The response, and the fault that was applied to it."""

    answer: Answer
    fault: Fault | None


class ProviderApp:
    """ASGI: one wire format below one prefix, with limits, faults, latency and the journal."""

    def __init__(self, sandbox: Sandbox, wire_format: WireFormat) -> None:
        self._sandbox = sandbox
        self._wire_format = wire_format

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived, began = time.time(), time.perf_counter()
        call = _call(scope)
        target = call.path + (f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else "")
        rejection = self._wire_format.charge(call)
        if rejection is not None:
            outcome = _Outcome(Answer(rejection, "refused", weight=0), None)
        else:
            outcome = self._outcome(call, target)
        answer = outcome.answer
        # Before it is sent: a client that has the response must find it in the journal.
        self._sandbox.journal.add(
            Entry(
                datetime.fromtimestamp(arrived, UTC).isoformat(),
                self._wire_format.name,
                answer.endpoint,
                without_key(target),
                answer.reply.status,
                round(time.perf_counter() - began, 6),
                answer.weight,
                None if outcome.fault is None else str(outcome.fault.kind),
            )
        )
        if self._sandbox.config.latency:
            await asyncio.sleep(self._sandbox.config.latency)
        await self._send(scope, receive, send, answer.reply, outcome.fault)

    def _outcome(self, call: Call, target: str) -> _Outcome:
        answer = self._wire_format.answer(call)
        with_rows = answer.rows is not None and answer.reply.status == 200
        kinds = TRANSPORT | ROWS if with_rows else TRANSPORT
        extent = Page(RequestedSpan(answer.span), lambda: _stamps(answer))
        fault = self._sandbox.faults.pick(self._wire_format.name, kinds, answer.symbol, target, extent)
        if fault is None:
            return _Outcome(answer, answer.fault)
        if fault.kind is Kind.OTHER_SYMBOL and answer.symbol is not None:
            return _Outcome(
                _with_other_rows(
                    answer, self._wire_format.with_other_symbol(call, answer.symbol, fault.other), fault
                ),
                fault,
            )
        return _Outcome(replace(answer, reply=self._faulty(answer, fault)), fault)

    def _faulty(self, answer: Answer, fault: Fault) -> Reply:
        """The reply with this fault; HANG, DRIP and RESET are applied at the socket."""
        reply = answer.reply
        if fault.kind is Kind.STATUS:
            own = self._wire_format.error(fault.status, max(int(fault.seconds), 1))
            return own if fault.body is None else _with_body(replace(own, status=fault.status), fault.body)
        if fault.kind is Kind.HTML:
            return _HTML
        if fault.kind is Kind.TRUNCATED:
            return replace(reply, body=reply.body[: len(reply.body) * 2 // 3])
        if fault.kind in ROWS and answer.rows is not None:
            return replace(reply, body=_with_faulty_rows(answer, fault))
        return reply

    async def _send(
        self, scope: Scope, receive: Receive, send: Send, reply: Reply, fault: Fault | None
    ) -> None:
        kind = None if fault is None else fault.kind
        if fault is not None and kind is Kind.HANG and await _client_disconnected(receive, fault.seconds):
            return
        headers = [
            (b"content-type", reply.media_type.encode()),
            (b"content-length", str(len(reply.body)).encode()),
            (b"date", formatdate(self._sandbox.clock.now() / 1e6, usegmt=True).encode()),
            *((k.encode(), v.encode()) for k, v in (*reply.headers, *self._wire_format.extra_headers())),
        ]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        if fault is not None and kind is Kind.DRIP:
            size = max(len(reply.body) // _DRIPS, 1)
            for at in range(0, len(reply.body), size):
                await send(
                    {"type": "http.response.body", "body": reply.body[at : at + size], "more_body": True}
                )
                if await _client_disconnected(receive, fault.seconds / _DRIPS):
                    return
        elif kind is Kind.RESET:
            half = reply.body[: len(reply.body) // 2]
            await send({"type": "http.response.body", "body": half, "more_body": True})
            await asyncio.sleep(0.05)  # a reset discards data that the client's kernel has not received yet
            _reset(scope)
            return
        body = b"" if kind is Kind.DRIP else reply.body
        await send({"type": "http.response.body", "body": body})


def _stamps(answer: Answer) -> list[int]:
    """The times of the rows of a JSON page as stamped (opens or closes), in microseconds."""
    rows = answer.rows
    if rows is None:
        return []
    return [int(row[rows.fields.ts]) * rows.unit for row in rows.take(orjson.loads(answer.reply.body))]


def _with_other_rows(original: Answer, other: Answer, fault: Fault) -> Answer:
    """The page of another symbol; with `fault.only` the original page with some of its rows."""
    rows = original.rows
    if fault.only is None or rows is None or other.reply.status != 200:
        return other
    document = orjson.loads(original.reply.body)
    replacements = rows.take(orjson.loads(other.reply.body))
    body = rows.put(document, mixed(rows.take(document), replacements, rows.fields, rows.unit, fault.only))
    return replace(original, reply=replace(original.reply, body=body))


def _with_faulty_rows(answer: Answer, fault: Fault) -> bytes:
    """A JSON page with bad rows."""
    rows = answer.rows
    assert rows is not None
    document = orjson.loads(answer.reply.body)
    return rows.put(document, apply_fault(fault, rows.take(document), rows.fields, rows.unit))


def _with_body(reply: Reply, body: str) -> Reply:
    """The reply with another body; its beginning decides the media type."""
    media_type = JSON if body.startswith(("{", "[")) else "text/html"
    return replace(reply, body=body.encode(), media_type=media_type)


def _call(scope: Scope) -> Call:
    prefix = scope.get("root_path", "")
    headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
    query = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
    base_url = f"{scope['scheme']}://{headers.get('host', '')}{prefix}"
    return Call(scope["path"].removeprefix(prefix), query, headers, base_url)


async def _client_disconnected(receive: Receive, seconds: float) -> bool:
    """Waits up to `seconds`; True as soon as the client has closed the connection."""
    try:
        async with asyncio.timeout(seconds):
            while (await receive())["type"] != "http.disconnect":
                pass
    except TimeoutError:
        return False
    return True


_transports: dict[tuple[str, int], asyncio.Transport] = {}


class _Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's protocol with a register of connections: ASGI cannot reset one."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if self.client is not None:
            _transports[self.client] = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self.client is not None:
            _transports.pop(self.client, None)
        super().connection_lost(exc)


def _reset(scope: Scope) -> None:
    """Closes with RST instead of FIN."""
    transport = _transports.get(tuple(scope["client"]))
    if transport is not None:
        immediately = struct.pack("ii", 1, 0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, immediately)
        transport.abort()


def make_app(config: MarketConfig) -> Starlette:
    """The local market as an ASGI application. Raises ReplayError on a bad replay directory."""
    sandbox = Sandbox(config)
    binance, archives, polygon = Binance(sandbox), Archives(sandbox), Polygon(sandbox)
    others = (Yahoo(sandbox), AlphaVantage(sandbox), Oanda(sandbox), CoinGecko(sandbox))
    wire_formats: tuple[WireFormat, ...] = (binance, archives, polygon, *others)

    def index(request: Request) -> Response:
        return PlainTextResponse(_index_page(sandbox, str(request.base_url).rstrip("/")))

    return Starlette(
        routes=[
            Route("/", index),
            *Control(sandbox, wire_formats, binance, archives, polygon).routes(),
            *(Mount(f"/{each.name}", app=ProviderApp(sandbox, each)) for each in wire_formats),
        ]
    )


def _index_page(sandbox: Sandbox, url: str) -> str:
    kind = f"replay of {sandbox.config.replay}" if sandbox.replays else "synthetic"
    symbols = "\n".join(f"  {provider:13} {', '.join(sandbox.symbols(provider))}" for provider in PROVIDERS)
    return (
        f"{TITLE} ({kind}), clock: {iso(sandbox.clock.now())}\n\n"
        f"Binance REST      {url}/binance/api/v3/klines?symbol=BTCUSDT&interval=1h\n"
        f"Binance archives  {url}/archive/data/spot/monthly/klines/...\n"
        f"Polygon           {url}/polygon/v2/aggs/ticker/X:BTCUSD/range/1/hour/2024-01-01/2024-01-02\n"
        f"Yahoo             {url}/yahoo/v8/finance/chart/AAPL?interval=1d&range=1mo\n"
        f"Alpha Vantage     {url}/alphavantage/query?function=TIME_SERIES_DAILY&symbol=AAPL&apikey=any\n"
        f"OANDA             {url}/oanda/v3/instruments/EUR_USD/candles?granularity=H1&count=24\n"
        f"CoinGecko         {url}/coingecko/api/v3/coins/bitcoin/ohlc?vs_currency=usd&days=1\n"
        f"Truth             {url}/sim/truth/binance/BTCUSDT/1h?start=2024-01-01&end=2024-01-02\n"
        f"Control           {url}/sim/outages /sim/faults /sim/clock /sim/limits /sim/requests /sim/prepare\n\n"
        f"Symbols:\n{symbols}\n"
    )


def listen(config: MarketConfig) -> socket.socket:
    """The listening socket. Raises PortInUse, or OSError for an address of another machine."""
    sock = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((config.host, config.port))
        sock.listen(1024)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"port {config.port} on {config.host} is in use: stop the process that uses it or choose another port"
            ) from None
        raise
    return sock


def make_server(config: MarketConfig) -> uvicorn.Server:
    """The server, not yet started. Raises ReplayError on a bad replay directory."""
    return uvicorn.Server(
        uvicorn.Config(
            make_app(config),
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_level="info" if config.access_log else "critical",
            access_log=config.access_log,
            date_header=False,  # the header follows the market's clock
            server_header=False,
            timeout_keep_alive=60,
            timeout_graceful_shutdown=1,  # a hanging response must not delay the shutdown
        )
    )


def run(config: MarketConfig, on_start: Callable[[str], None] | None = None) -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP; calls `on_start(url)` when it listens.

    Raises PortInUse or ReplayError before serving, and KeyboardInterrupt when it has ended by a signal.
    """
    server = make_server(config)
    with listen(config) as sock, _ended_by_signals(server):
        if on_start is not None:
            on_start(address(config, sock))
        server.run(sockets=[sock])


@contextmanager
def _ended_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """Within the block a signal ends the server, and raises KeyboardInterrupt after the block.

    An exception of a handler would be raised anywhere in the start of the event loop, which turns it into others:
    uvicorn handles signals itself only once that loop runs.
    """
    received: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        received.append(number)
        server.should_exit = True

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise KeyboardInterrupt


def address(config: MarketConfig, sock: socket.socket) -> str:
    """The URL of a listening socket, with its actual port."""
    return url_of(config.host, sock.getsockname()[1])


def url_of(host: str, port: int) -> str:
    """The URL of a local market at `host` and `port`; a loopback URL if it listens on all addresses."""
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
