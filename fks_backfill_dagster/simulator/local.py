"""A local market for a test, a demo or a bench: in a thread, or in a separate process.

All requests use real HTTP, so both kinds behave alike, for tests as for users.
"""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlencode
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np
from pyarrow import ipc

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import Timeframe, iso
from fks_backfill_dagster.simulator.config import MarketConfig
from fks_backfill_dagster.simulator.server import address, listen, make_server, run

_START_SECONDS = 30.0

# Requests to this machine bypass proxies.
_open = build_opener(ProxyHandler({})).open


class LocalMarket:
    """A running local market as a context manager.

    `process=True` runs it in another process, for measurements that must not share an interpreter.
    On entry raises PortInUse or ReplayError, or RuntimeError if the server does not start.
    """

    def __init__(self, config: MarketConfig | None = None, *, process: bool = False) -> None:
        self._config = config or MarketConfig()
        self._process = process
        self.url = ""

    def __enter__(self) -> LocalMarket:
        if self._process:
            self._enter_process()
        else:
            self._enter_thread()
        return self

    def _enter_thread(self) -> None:
        self._server = make_server(self._config)
        self._socket = listen(self._config)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="local-market", daemon=True
        )
        self._thread.start()
        deadline = time.monotonic() + _START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the local market did not start")
            time.sleep(0.002)
        self.url = address(self._config, self._socket)

    def _enter_process(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        self._child = context.Process(target=_child, args=(self._config, theirs), daemon=True)
        self._child.start()
        theirs.close()
        started = ours.recv() if ours.poll(_START_SECONDS) else RuntimeError("the local market did not start")
        if isinstance(started, Exception):
            self._child.join()
            raise started
        self.url = started

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process:
            self._child.terminate()
            self._child.join()
        else:
            self._server.should_exit = True
            self._thread.join()
            self._socket.close()

    @property
    def binance_url(self) -> str:
        return f"{self.url}/binance"

    @property
    def archive_url(self) -> str:
        return f"{self.url}/archive"

    @property
    def polygon_url(self) -> str:
        return f"{self.url}/polygon"

    @property
    def yahoo_url(self) -> str:
        return f"{self.url}/yahoo"

    @property
    def alphavantage_url(self) -> str:
        return f"{self.url}/alphavantage"

    @property
    def oanda_url(self) -> str:
        return f"{self.url}/oanda"

    @property
    def coingecko_url(self) -> str:
        return f"{self.url}/coingecko"

    def truth(self, provider: str, symbol: str, timeframe: Timeframe, window: TimeRange) -> Candles:
        """The closed candles of `window` that `provider` serves without faults."""
        query = urlencode({"start": iso(window.start), "end": iso(window.end), "format": "arrow"})
        body = self._request("GET", f"/sim/truth/{provider}/{quote(symbol)}/{timeframe}?{query}")
        table = ipc.open_stream(body).read_all()
        columns = [table[name].to_numpy() for name in table.column_names]
        return Candles(columns[0].astype(np.int64, copy=False), *columns[1:])

    def plant_outage(
        self, provider: str, window: TimeRange, symbol: str | None = None, *, published: int | None = None
    ) -> None:
        """Removes all rows of `provider` (or `all`) that contain a minute of `window`, in every timeframe.

        `published`: the time of the market's clock from which on the rows are served.
        """
        self.post(
            "/sim/outages",
            provider=provider,
            symbol=symbol,
            start=iso(window.start),
            end=iso(window.end),
            published=None if published is None else iso(published),
        )

    def plant_halt(self, window: TimeRange, symbol: str | None = None, *, provider: str = "all") -> None:
        """No trades in `window`: coarser candles contain the trades before and after it."""
        edges = {"start": iso(window.start), "end": iso(window.end)}
        self.post("/sim/outages", kind="halt", provider=provider, symbol=symbol, **edges)

    def clear_outages(self) -> None:
        self._request("DELETE", "/sim/outages")

    def plant_fault(
        self,
        provider: str,
        kind: str,
        *,
        window: TimeRange | None = None,
        only: TimeRange | None = None,
        **options: Any,
    ) -> None:
        """`window` selects the responses that overlap it; `only` too, and limits changes to the rows in it.

        `options` are the other fields of a fault, as in the control route; `start` and `end` in ISO 8601
        are an alternative to `window`.
        """
        for prefix, span in (("", window), ("rows_", only)):
            if span is not None:
                options |= {f"{prefix}start": iso(span.start), f"{prefix}end": iso(span.end)}
        self.post("/sim/faults", provider=provider, kind=kind, **options)

    def clear_faults(self) -> None:
        self._request("DELETE", "/sim/faults")

    def requests(self, provider: str | None = None) -> int:
        """The number of requests, to all providers or one, since the start or the last reset."""
        summary = self.journal(last=0)
        if provider is None:
            return int(summary["total"])
        return int(summary["providers"].get(provider, {"requests": 0})["requests"])

    def journal(self, last: int = 1000) -> dict[str, Any]:
        """The JSON of /sim/requests."""
        document: dict[str, Any] = json.loads(self._request("GET", f"/sim/requests?last={last}"))
        return document

    def reset_requests(self) -> None:
        self._request("DELETE", "/sim/requests")

    def set_clock(self, now: int | None, *, runs: bool = False) -> None:
        """Sets the market's clock to `now` (microseconds); None is real time."""
        self.post("/sim/clock", now=None if now is None else iso(now), runs=runs or now is None)

    def prepare(self, provider: str, symbol: str, timeframe: Timeframe, window: TimeRange) -> dict[str, Any]:
        """Builds responses in advance; `provider` may be `archive`."""
        edges = {"start": iso(window.start), "end": iso(window.end)}
        document: dict[str, Any] = self.post(
            "/sim/prepare", provider=provider, symbol=symbol, timeframe=str(timeframe), **edges
        )
        return document

    def post(self, path: str, /, **document: Any) -> Any:
        """POSTs JSON to a control route. Raises ValueError with the market's message on an error."""
        return json.loads(self._request("POST", path, json.dumps(document).encode()))

    def _request(self, method: str, path: str, body: bytes | None = None) -> bytes:
        headers = {} if body is None else {"Content-Type": "application/json"}
        request = Request(f"{self.url}{path}", data=body, headers=headers, method=method)
        try:
            with _open(request, timeout=600) as response:
                content: bytes = response.read()
                return content
        except HTTPError as error:
            raise ValueError(json.loads(error.read())["error"]) from None


def _child(config: MarketConfig, results: Connection) -> None:
    """The child process: sends its URL, or the exception that prevented the start."""
    try:
        run(config, results.send)
    except (OSError, ValueError) as error:
        results.send(error)
