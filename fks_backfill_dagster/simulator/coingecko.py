"""CoinGecko's OHLC of coins: stamped at the close, coarser with age.

Only the wire format: ids, granularity, the rights of demo and paid keys, and its three shapes of errors.
Prices in `usd` are those of the USDT pairs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import chain
from typing import Any

import orjson

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass
from fks_backfill_dagster.domain.timeframe import (
    MICROS_PER_DAY,
    MICROS_PER_HOUR,
    MICROS_PER_MINUTE,
    MICROS_PER_SECOND,
    iso,
    to_micros,
)
from fks_backfill_dagster.simulator.bars import Bars, Step
from fks_backfill_dagster.simulator.faults import Fields
from fks_backfill_dagster.simulator.state import Instrument, Sandbox
from fks_backfill_dagster.simulator.wire import Answer, Call, Reply, Rows, dumped

COINS: Mapping[str, str] = {
    "aave": "AAVE",
    "avalanche-2": "AVAX",
    "binancecoin": "BNB",
    "bitcoin": "BTC",
    "bitcoin-cash": "BCH",
    "cardano": "ADA",
    "chainlink": "LINK",
    "cosmos": "ATOM",
    "dogecoin": "DOGE",
    "ethereum": "ETH",
    "litecoin": "LTC",
    "monero": "XMR",
    "near": "NEAR",
    "polkadot": "DOT",
    "ripple": "XRP",
    "shiba-inu": "SHIB",
    "solana": "SOL",
    "stellar": "XLM",
    "tron": "TRX",
    "uniswap": "UNI",
}
CURRENCIES = ("usd", "eur", "gbp", "jpy", "try", "brl", "btc", "eth", "bnb")
RANGE_START = to_micros(datetime(2018, 2, 9, tzinfo=UTC))
_DEMO_DAYS = 365
_DAY_IS_COMPLETE = 35 * MICROS_PER_MINUTE  # after midnight UTC
# The longest spans of /ohlc/range.
_RANGES = {"daily": (MICROS_PER_DAY, 180), "hourly": (MICROS_PER_HOUR, 744)}

ROWS = Rows(Fields(ts=0, open=1, high=2, low=3, text=False), take=list, put=lambda page, rows: dumped(rows))


class BadRequest(Exception):
    """A request that CoinGecko rejects; `document` is the error body, of one of three shapes."""

    def __init__(self, status: int, document: dict[str, Any]) -> None:
        super().__init__(str(document))
        self.status = status
        self.document = document


class CoinGecko:
    """GET /api/v3/coins/{id}/ohlc, /coins/{id}/ohlc/range, /coins/list, /ping."""

    name = "coingecko"

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def charge(self, call: Call) -> Reply | None:
        verdict = self._sandbox.meters["coingecko"].charge(1)
        return None if verdict.status is None else self.error(verdict.status, verdict.retry_after)

    def extra_headers(self) -> tuple[tuple[str, str], ...]:
        return ()

    def spell(self, plain: str) -> str:
        """The id of a pair's coin; a symbol without one is returned unchanged."""
        coins = {base: coin for coin, base in COINS.items()}
        return next(
            (coins[base] for base in coins if re.fullmatch(f"{base}(USD[TC]?|[A-Z]{{3}})", plain)), plain
        )

    def error(self, status: int, retry_after: int) -> Reply:
        if status == 429:
            message = (
                "You've exceeded the Rate Limit. Please visit https://www.coingecko.com/en/api/pricing to "
                "subscribe to our API plans for higher rate limits."
            )
            reply = _status(429, message)
            return Reply(orjson.dumps(reply), 429, headers=(("retry-after", str(retry_after)),))
        if status == 404:
            return Reply(orjson.dumps({"error": "coin not found"}), 404)
        return Reply(orjson.dumps(_status(status, "Internal Server Error")), status)

    def with_other_symbol(self, call: Call, symbol: str, other: str | None) -> Answer:
        preferred = () if other is None else (self.spell(other),)
        other = next(coin for coin in (*preferred, "ethereum", "bitcoin") if coin != symbol)
        path = call.path.replace(f"/{symbol}/", f"/{other}/")
        found = self.answer(Call(path, call.query, call.headers, call.base_url))
        return Answer(found.reply, found.endpoint, 1, symbol, found.span, found.rows)

    def answer(self, call: Call) -> Answer:
        path = call.path.removeprefix("/api/v3")
        if path == "/ping":
            return Answer(Reply(b'{"gecko_says":"(V3) To the Moon!"}'), "ping")
        if path == "/coins/list":
            coins = [{"id": coin, "symbol": base.lower(), "name": coin} for coin, base in COINS.items()]
            return Answer(Reply(orjson.dumps(coins)), "list")
        match = re.fullmatch(r"/coins/(?P<coin>[^/]+)/ohlc(?P<range>/range)?", path)
        if match is None:
            return Answer(Reply(b'{"error":"Incorrect path."}', 404), "unknown")
        endpoint = "range" if match["range"] else "ohlc"
        try:
            paid = self._check_key(call)
            what = self._coin(match["coin"], call.query)
            read = self._range if match["range"] else self._recent
            bars, step, span = read(what, call.query, paid)
        except BadRequest as error:
            return Answer(Reply(orjson.dumps(error.document), error.status), endpoint, 1, match["coin"])
        return Answer(Reply(_rows(bars, step)), endpoint, 1, match["coin"], span, ROWS)

    def _check_key(self, call: Call) -> bool:
        """Whether the key belongs to a paid plan. Without a key a request has the rights of a demo key."""
        paid = call.headers.get("x-cg-pro-api-key") or call.query.get("x_cg_pro_api_key")
        demo = call.headers.get("x-cg-demo-api-key") or call.query.get("x_cg_demo_api_key")
        if (paid or demo) in self._sandbox.config.bad_keys:
            raise BadRequest(
                401, _status(10002, "API Key Missing. Please make sure you're using the right key.")
            )
        return bool(paid)

    def _coin(self, coin: str, query: Mapping[str, str]) -> Instrument:
        currency = query.get("vs_currency", "")
        if currency not in CURRENCIES:
            raise BadRequest(400, {"error": "invalid vs_currency"})
        base = COINS.get(coin, "")
        found = self._sandbox.known("coingecko", AssetClass.CRYPTO, f"{base}{currency.upper()}")
        if not base or found is None:
            raise BadRequest(404, {"error": "coin not found"})
        return found

    def _recent(self, what: Instrument, query: Mapping[str, str], paid: bool) -> tuple[Bars, Step, TimeRange]:
        """Candles that close within the last `days`; the first may be partial, the last is forming."""
        days = query.get("days", "")
        if days != "max" and not re.fullmatch(r"[1-9][0-9]{0,4}", days):
            raise BadRequest(400, {"error": "Invalid value for days"})
        if not paid and (days == "max" or int(days) > _DEMO_DAYS):
            raise BadRequest(401, {"error": _too_old()})
        now = self._sandbox.clock.now()
        listed = self._sandbox.listing("coingecko", what).start
        start = max(listed, 0 if days == "max" else now - int(days) * MICROS_PER_DAY)
        step = Step(_granularity(-(-(now - start) // MICROS_PER_DAY) if days == "max" else int(days)))
        window = TimeRange(step.floor(start), now + 1)
        return self._sandbox.bars("coingecko", what.name, step, window), step, TimeRange(start, now + 1)

    def _range(self, what: Instrument, query: Mapping[str, str], paid: bool) -> tuple[Bars, Step, TimeRange]:
        """Closed candles of a paid plan, by open time. The last UTC day is available from 00:35."""
        if not paid:
            raise BadRequest(401, _status(10005, "This request is limited to PRO API subscribers..."))
        start, end = (query.get(name, "") for name in ("from", "to"))
        if query.get("interval") not in _RANGES or not (start.isdigit() and end.isdigit()):
            raise BadRequest(400, {"error": "Invalid from, to or interval"})
        length, most = _RANGES[query["interval"]]
        window = TimeRange(int(start), max(int(start), int(end)))
        window = TimeRange(window.start * MICROS_PER_SECOND, window.end * MICROS_PER_SECOND)
        if window.duration > most * length:
            raise BadRequest(400, {"error": f"The range is limited to {most} {query['interval']} candles"})
        step = Step(length)
        known = window.intersect(TimeRange(RANGE_START, max(RANGE_START, window.end)))
        bars = self._sandbox.closed("coingecko", what.name, step, known)
        late = self._sandbox.clock.now() - _DAY_IS_COMPLETE
        if length == MICROS_PER_DAY:
            bars = bars.take(bars.ts + length <= late)
        return bars, step, window


def _granularity(days: int) -> int:
    if days <= 2:
        return 30 * MICROS_PER_MINUTE
    return 4 * MICROS_PER_HOUR if days <= 30 else 4 * MICROS_PER_DAY


def _status(code: int, message: str) -> dict[str, Any]:
    return {"status": {"error_code": code, "error_message": message}}


def _too_old() -> dict[str, Any]:
    status = _status(
        10012,
        "Your request exceeds the allowed time range. Public API users are limited to querying historical "
        "data within the past 365 days.",
    )["status"]
    return {"status": {"timestamp": iso(to_micros(datetime.now(UTC))), **status}}


def _rows(bars: Bars, step: Step) -> bytes:
    """`[closeMs, o, h, l, c]`; the decimal texts are used as JSON numbers."""
    if len(bars) == 0:
        return b"[]"
    closes = ((bars.ts + step.length) // 1000).tolist()
    cells = tuple(chain.from_iterable(zip(closes, *bars.texts()[:4], strict=True)))
    return f"[{('[%d,%s,%s,%s,%s],' * len(bars) % cells)[:-1]}]".encode()
