"""The local market's own routes under /sim: truth, outages, faults, clock, limits, requests, prepare.

They control the market for tests and users. Real providers do not have them, and the journal does not count
them.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import pyarrow as pa
from pyarrow import csv, ipc
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import Timeframe, iso
from fks_backfill_dagster.simulator.archive import Archives
from fks_backfill_dagster.simulator.bars import Bars, Step
from fks_backfill_dagster.simulator.binance import MAX_LIMIT, Binance
from fks_backfill_dagster.simulator.config import (
    ALIASES,
    PROVIDERS,
    Absence,
    Outage,
    instant,
    plain_symbol,
)
from fks_backfill_dagster.simulator.faults import ROWS, Fault, Kind
from fks_backfill_dagster.simulator.guard import rejection_of
from fks_backfill_dagster.simulator.polygon import Polygon
from fks_backfill_dagster.simulator.state import Instrument, Sandbox
from fks_backfill_dagster.simulator.wire import WireFormat

_FAULT_FIELDS = frozenset(f.name for f in fields(Fault)) - {"id", "window", "only"}
_FAULT_FIELDS |= {"start", "end", "rows_start", "rows_end"}

_NUMBERS = frozenset({"count", "nth", "probability", "status", "seconds", "rows"})


class BadRequest(ValueError):
    """An invalid control request; the text states what is valid."""


class Control:
    """The handlers, over one `Sandbox` and its wire formats."""

    def __init__(
        self,
        sandbox: Sandbox,
        wire_formats: Sequence[WireFormat],
        binance: Binance,
        archives: Archives,
        polygon: Polygon,
    ) -> None:
        self._sandbox = sandbox
        self._wire_formats = {each.name: each for each in wire_formats}
        self._binance = binance
        self._archives = archives
        self._polygon = polygon

    def routes(self) -> list[Route]:
        return [
            Route("/sim/truth/{provider}/{symbol:path}/{timeframe}", self._guard(self.truth)),
            Route("/sim/outages", self._guard(self.outages), methods=["GET", "POST", "DELETE"]),
            Route("/sim/faults", self._guard(self.faults), methods=["GET", "POST", "DELETE"]),
            Route("/sim/requests", self._guard(self.requests), methods=["GET", "DELETE"]),
            Route("/sim/clock", self._guard(self.clock), methods=["GET", "POST"]),
            Route("/sim/limits", self._guard(self.limits), methods=["GET", "POST"]),
            Route("/sim/prepare", self._guard(self.prepare), methods=["POST"]),
        ]

    def _guard(self, handler: Callable[..., Any]) -> Callable[[Request], Any]:
        """Runs a handler in the thread pool; its errors become a 400 with their message.

        Requests that a page of another site could have sent are rejected before the handler (`guard`).
        """

        async def guarded(request: Request) -> Response:
            if (rejection := rejection_of(request, self._sandbox.config.host)) is not None:
                return rejection
            try:
                document = await request.json() if request.method == "POST" else {}
                if not isinstance(document, dict):
                    raise BadRequest("the body must be a JSON object")
                response: Response = await run_in_threadpool(handler, request, document)
                return response
            except (ValueError, TypeError, KeyError) as error:
                return JSONResponse({"error": _message(error)}, status_code=400)

        return guarded

    def truth(self, request: Request, _: dict[str, Any]) -> Response:
        """The closed candles of [start, end): CSV, or Arrow IPC with `format=arrow`."""
        provider = _provider(request.path_params["provider"])
        what = self._instrument(provider, request.path_params["symbol"])
        timeframe = _timeframe(request.path_params["timeframe"])
        listing = self._sandbox.listing(provider, what)
        # The candle that contains the first trade can open before it.
        start = _optional(request.query_params.get("start"), Step.of(timeframe).floor(listing.start))
        end = _optional(request.query_params.get("end"), self._sandbox.clock.now())
        bars = self._sandbox.truth(provider, what, timeframe, TimeRange(start, end))
        sink = io.BytesIO()
        if request.query_params.get("format", "csv") == "arrow":
            table = _arrow(bars)
            with ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            return Response(sink.getvalue(), media_type="application/vnd.apache.arrow.stream")
        csv.write_csv(_texts(bars), sink, csv.WriteOptions(quoting_style="none"))
        body = sink.getvalue().replace(b'"', b"", 12)  # pyarrow quotes the header in spite of quoting_style
        return Response(body, media_type="text/csv")

    def outages(self, request: Request, document: dict[str, Any]) -> Response:
        if request.method == "DELETE":
            self._sandbox.clear_outages()
        elif request.method == "POST":
            symbol = document.get("symbol")
            window = TimeRange(instant(document["start"]), instant(document["end"]))
            late = document.get("published")
            if (kind := document.get("kind", Absence.OUTAGE)) not in list(Absence):
                raise BadRequest(f"kind is one of {', '.join(Absence)}, not {kind!r}")
            planted = Outage(
                document["provider"],
                window,
                plain_symbol(symbol) if symbol else None,
                None if late is None else instant(late),
                Absence(kind),
            )
            self._sandbox.plant_outage(planted)
        return JSONResponse(
            [
                {
                    "kind": o.kind,
                    "provider": o.provider,
                    "symbol": o.symbol,
                    "start": iso(o.window.start),
                    "end": iso(o.window.end),
                    "published": None if o.published is None else iso(o.published),
                }
                for o in self._sandbox.outages()
            ]
        )

    def faults(self, request: Request, document: dict[str, Any]) -> Response:
        if request.method == "DELETE":
            self._sandbox.faults.clear()
        elif request.method == "POST":
            build = self._fault_builder(document)
            return JSONResponse({"id": self._sandbox.faults.plant(build).id})
        return JSONResponse(
            [
                {"id": f.id, "provider": f.provider, "kind": f.kind, "count": f.count, "hits": hits}
                for f, hits in self._sandbox.faults.planted()
            ]
        )

    def _fault_builder(self, document: dict[str, Any]) -> Callable[[int], Fault]:
        options = dict(document)
        if unknown := options.keys() - _FAULT_FIELDS:
            raise BadRequest(
                f"unknown {', '.join(sorted(unknown))}; the fields of a fault are {', '.join(sorted(_FAULT_FIELDS))}"
            )
        provider, kind = _known(options.pop("provider"), (*PROVIDERS, "archive")), Kind(options.pop("kind"))
        window = _window(options.pop("start", None), options.pop("end", None))
        only = _window(options.pop("rows_start", None), options.pop("rows_end", None))
        if only is not None and kind not in ROWS:
            raise BadRequest(f"rows_start and rows_end apply to row faults only, not to {kind}")
        if symbol := options.pop("symbol", None):
            options["symbol"] = self._wire_formats[provider].spell(plain_symbol(symbol))
        if other := options.get("other"):
            if kind is not Kind.OTHER_SYMBOL:
                raise BadRequest(f"other applies to the fault other_symbol only, not to {kind}")
            market = "binance" if provider == "archive" else provider
            options["other"] = self._instrument(market, other).name
        if (body := options.get("body")) is not None and not isinstance(body, str):
            options["body"] = json.dumps(body)
        for name, number in options.items():
            if name in _NUMBERS and not (
                isinstance(number, int | float) or (name == "count" and number is None)
            ):
                raise BadRequest(f"{name} of a fault must be a number, not {number!r}")
        market = "binance" if provider == "archive" else provider
        if kind is Kind.OTHER_SYMBOL and len(self._sandbox.symbols(market)) < 2:
            raise BadRequest(f"this replay has only one symbol of {market}: other_symbol needs a second one")
        if options.get("nth", 1) < 1:
            raise BadRequest("nth of a fault must be at least 1")
        return lambda number: Fault(number, provider, kind, window=window, only=only, **options)

    def requests(self, request: Request, _: dict[str, Any]) -> Response:
        if request.method == "DELETE":
            self._sandbox.journal.reset()
        return JSONResponse(self._sandbox.journal.summary(int(request.query_params.get("last", "20"))))

    def clock(self, request: Request, document: dict[str, Any]) -> Response:
        """POST {"now": ISO or null, "runs": bool} or {"advance": seconds}."""
        clock = self._sandbox.clock
        if request.method == "POST":
            if "advance" in document:
                later = clock.now() + int(float(document["advance"]) * 1_000_000)
                self._sandbox.set_clock(later, runs=clock.runs)
            else:
                now = None if document["now"] is None else instant(document["now"])
                self._sandbox.set_clock(now, runs=bool(document.get("runs", now is None)))
        return JSONResponse({"now": iso(clock.now()), "runs": clock.runs})

    def limits(self, request: Request, document: dict[str, Any]) -> Response:
        """POST {name: number or null}, names as in the response; null is no limit. Clears bans."""
        for name, limit in document.items():
            if name not in self._sandbox.meters or not (limit is None or isinstance(limit, int)):
                names = ", ".join(self._sandbox.meters)
                raise BadRequest(f"limits must be {{name: number or null}} with the names {names}")
            self._sandbox.meters[name].reset(limit)
        meters = self._sandbox.meters.items()
        return JSONResponse({name: {"limit": meter.limit, "used": meter.used} for name, meter in meters})

    def prepare(self, request: Request, document: dict[str, Any]) -> Response:
        """POST {provider: binance|archive|polygon, symbol, timeframe, start, end, limit, stride}."""
        began = time.perf_counter()
        provider, timeframe = document["provider"], _timeframe(document["timeframe"])
        window = TimeRange(instant(document["start"]), instant(document["end"]))
        _known(provider, ("binance", "archive", "polygon"))
        what = self._instrument("binance" if provider == "archive" else provider, document["symbol"])
        symbol = what.name
        if provider == "archive":
            count, size = self._archives.prepare(symbol, timeframe, window)
        elif provider == "binance":
            limit = int(document.get("limit", MAX_LIMIT))
            stride = int(document.get("stride", limit))  # smaller if the client's pages overlap
            count, size = self._binance.prepare(symbol, timeframe, window, limit, stride)
        else:
            base_url = f"{str(request.base_url).rstrip('/')}/polygon"
            ticker = self._polygon.spell(plain_symbol(document["symbol"]))
            count, size = self._polygon.prepare(ticker, timeframe, window, base_url)
        seconds = round(time.perf_counter() - began, 3)
        return JSONResponse({"answers": count, "bytes": size, "seconds": seconds})

    def _instrument(self, provider: str, symbol: str) -> Instrument:
        found = self._sandbox.find(provider, plain_symbol(symbol))
        if found is None:
            known = ", ".join(self._sandbox.symbols(provider))
            raise BadRequest(f"{provider} has no symbol {symbol!r}; examples: {known}")
        return found


def _provider(name: str) -> str:
    return _known(name, PROVIDERS)


def _known(name: str, names: Sequence[str]) -> str:
    """The provider by its address or by the project's name of it."""
    name = ALIASES.get(name, name)
    if name not in names:
        raise BadRequest(f"no provider {name!r}; available: {', '.join(names)}")
    return name


def _timeframe(name: str) -> Timeframe:
    if name not in list(Timeframe):
        raise BadRequest(f"no timeframe {name!r}; available: {', '.join(Timeframe)}")
    return Timeframe(name)


def _window(start: str | None, end: str | None) -> TimeRange | None:
    """Each edge is optional; None without both."""
    return TimeRange(_optional(start, 0), _optional(end, 2**62)) if start or end else None


def _optional(text: str | None, default: int) -> int:
    return default if text is None else instant(text)


def _message(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)


def _arrow(bars: Bars) -> pa.Table:
    """ts int64 microseconds and five float64 columns."""
    candles = bars.candles()
    return pa.table(
        dict(zip(("ts", "open", "high", "low", "close", "volume"), candles.columns(), strict=True))
    )


def _texts(bars: Bars) -> pa.Table:
    """The CSV format of `--replay`: ts as 2024-01-01T00:00:00Z, decimals as served."""
    stamps = pa.array(bars.ts.astype("datetime64[us]").astype("datetime64[s]").astype(str) + "Z")
    names = ("open", "high", "low", "close", "volume")
    return pa.table({"ts": stamps} | {n: pa.array(c) for n, c in zip(names, bars.texts(), strict=True)})
