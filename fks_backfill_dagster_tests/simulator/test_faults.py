"""Every kind of fault over HTTP."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.simulator.faults import ROWS, Kind
from fks_backfill_dagster_tests.simulator.wire import (
    aggs,
    archive,
    candles,
    chart,
    klines,
    of_candles,
    of_chart,
    of_klines,
    of_ohlc,
    of_series,
    ohlc,
    span,
    unzipped,
    vantage,
    window,
)

REQUESTED = window("2024-01-01", "2024-01-01T01:40")
AGGS = "X:BTCUSD/range/1/minute/2024-01-01/2024-01-01"
DAY = "daily/klines/BTCUSDT/1m/BTCUSDT-1m-2024-01-01.zip"
ORIGINAL_MINUTES = [REQUESTED.start // 1000 + n * 60_000 for n in range(100)]


def page(market: LocalMarket) -> requests.Response:
    return klines(market, **span(REQUESTED))


def polygon_page(market: LocalMarket) -> requests.Response:
    return aggs(market, AGGS)


def opens(rows: list[list[Any]]) -> list[int]:
    return [int(row[0]) for row in rows]


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 418, 403, 451])
def test_status_codes_twice_then_200(market: LocalMarket, status: int) -> None:
    market.plant_fault("binance", "status", status=status, count=2, seconds=7)
    answers = [page(market) for _ in range(3)]
    assert [a.status_code for a in answers] == [status, status, 200]
    assert answers[0].headers.get("Retry-After") == ("7" if status in (429, 418) else None)
    assert market.journal()["providers"]["binance"]["statuses"] == {str(status): 2, "200": 1}


def test_polygons_own_bodies(market: LocalMarket) -> None:
    market.plant_fault("polygon", "status", status=403)
    market.plant_fault("polygon", "status", status=429)
    assert aggs(market, AGGS).json()["status"] == "NOT_AUTHORIZED"
    assert "maximum requests per minute" in aggs(market, AGGS).json()["error"]


def test_hang_delays_the_response_or_the_client_times_out(market: LocalMarket) -> None:
    market.plant_fault("binance", "hang", seconds=0.4, count=2)
    with pytest.raises(requests.ReadTimeout):
        requests.get(f"{market.binance_url}/api/v3/ping", timeout=0.1)
    began = time.monotonic()
    assert page(market).status_code == 200
    assert time.monotonic() - began >= 0.4


def test_drip_is_slow_but_complete(market: LocalMarket) -> None:
    original = page(market).content
    market.plant_fault("binance", "drip", seconds=0.4)
    began = time.monotonic()
    assert page(market).content == original
    assert time.monotonic() - began >= 0.3


def test_reset_in_the_middle_of_the_body(market: LocalMarket) -> None:
    market.plant_fault("binance", "reset")
    with pytest.raises((requests.ConnectionError, requests.exceptions.ChunkedEncodingError), match="reset"):
        page(market)
    assert page(market).status_code == 200


@pytest.mark.parametrize("provider", ["binance", "polygon"])
def test_truncated_json_and_html_have_status_200(market: LocalMarket, provider: str) -> None:
    market.plant_fault(provider, "truncated")
    market.plant_fault(provider, "html")
    for content in (b"[" if provider == "binance" else b"{", b"<!DOCTYPE"):
        answer = page(market) if provider == "binance" else aggs(market, AGGS)
        assert answer.status_code == 200
        assert answer.content.startswith(content)
        with pytest.raises(requests.JSONDecodeError):
            answer.json()


def row_fault(market: LocalMarket, kind: str, **options: Any) -> tuple[list[list[Any]], list[list[Any]]]:
    """The original rows and the faulty ones."""
    original = page(market).json()
    market.plant_fault("binance", kind, **options)
    return original, page(market).json()


def test_empty_and_short_pages(market: LocalMarket) -> None:
    assert row_fault(market, "empty")[1] == []
    original, rows = row_fault(market, "short")
    assert rows == original[:50]


def test_duplicated_unsorted_missing_rows(market: LocalMarket) -> None:
    original, rows = row_fault(market, "duplicated")
    assert len(rows) == 110
    assert sorted(set(opens(rows))) == ORIGINAL_MINUTES
    _, rows = row_fault(market, "unsorted")
    assert opens(rows) != ORIGINAL_MINUTES
    assert sorted(opens(rows)) == ORIGINAL_MINUTES
    original, rows = row_fault(market, "missing")
    assert rows == original[:45] + original[55:]


def test_a_window_selects_the_rows(market: LocalMarket) -> None:
    original, rows = row_fault(market, "missing", start="2024-01-01T00:10", end="2024-01-01T00:13")
    assert rows == original[:10] + original[13:]
    market.plant_fault("binance", "missing", start="2024-01-03", end="2024-01-04")
    assert page(market).json() == original


def test_bad_values(market: LocalMarket) -> None:
    original, rows = row_fault(market, "off_grid")
    assert sum(ts % 60_000 == 7_000 for ts in opens(rows)) == 10
    assert sum(row[1] == "NaN" for row in row_fault(market, "nan")[1]) == 10
    assert sum(float(row[3]) < 0 for row in row_fault(market, "negative", rows=3)[1]) == 3
    assert sum(float(row[2]) < float(row[3]) for row in row_fault(market, "high_below_low")[1]) == 10
    assert page(market).json() == original


def test_another_symbols_page(market: LocalMarket) -> None:
    original, rows = row_fault(market, "other_symbol")
    assert opens(rows) == opens(original)
    assert of_klines(rows).equals(market.truth("binance", "ETHUSDT", Timeframe.M1, REQUESTED))
    market.plant_fault("polygon", "other_symbol", count=1)
    faulty = aggs(market, AGGS).json()
    assert faulty["ticker"] == "X:BTCUSD"
    assert faulty["results"][0]["c"] < aggs(market, AGGS).json()["results"][0]["c"] / 2


@pytest.mark.parametrize("kind", sorted(ROWS))
def test_polygon_and_archives_have_the_same_row_faults(market: LocalMarket, kind: str) -> None:
    original, file = aggs(market, AGGS, limit=50000).text, unzipped(archive(market, DAY).content)
    market.plant_fault("polygon", kind)
    market.plant_fault("archive", kind)
    assert aggs(market, AGGS, limit=50000).text != original
    body, checksum = archive(market, DAY).content, archive(market, f"{DAY}.CHECKSUM").text
    assert unzipped(body) != file
    assert checksum.split()[0] == sha256(body).hexdigest()
    market.clear_faults()
    assert unzipped(archive(market, DAY).content) == file


OTHERS: dict[str, Callable[[LocalMarket], requests.Response]] = {
    "yahoo": lambda market: chart(market, interval="5m", of=window("2025-03-17", "2025-03-20")),
    "alphavantage": lambda market: vantage(market, "TIME_SERIES_INTRADAY", interval="5min", month="2025-02"),
    "oanda": lambda market: candles(market, granularity="M5", of=window("2025-03-17", "2025-03-20")),
    "coingecko": lambda market: ohlc(market, days=7),
}
READ: dict[str, Callable[[requests.Response], Candles]] = {
    "yahoo": of_chart,
    "alphavantage": of_series,
    "oanda": of_candles,
    "coingecko": lambda answer: of_ohlc(answer, 0),
}


@pytest.mark.parametrize("provider", sorted(OTHERS))
@pytest.mark.parametrize("kind", sorted(ROWS))
def test_all_providers_have_row_faults(market: LocalMarket, provider: str, kind: str) -> None:
    original = READ[provider](OTHERS[provider](market))
    market.plant_fault(provider, kind)
    faulty = OTHERS[provider](market)
    assert faulty.status_code == 200
    if kind in ("duplicated", "unsorted"):  # Alpha Vantage's stamps are keys: only the text shows it
        again = OTHERS[provider](market)
        assert faulty.text != again.text
        assert len(faulty.content) > len(again.content) or kind == "unsorted"
        return
    bad = READ[provider](faulty)
    seen = {
        "empty": len(bad) == 0,
        "short": len(bad) == len(original) // 2,
        "missing": len(bad) == len(original) - 10,
        "off_grid": (bad.ts % 60_000_000 == 7_000_000).sum() == 10,
        "nan": np.isnan(bad.open).sum() == 10,
        "negative": (bad.low < 0).sum() == 10,
        "high_below_low": (bad.high < bad.low).sum() == 10,
        "other_symbol": len(bad) > 30 and not bad.equals(original),
    }
    assert seen[kind]
    assert READ[provider](OTHERS[provider](market)).equals(original)


@pytest.mark.parametrize("provider", sorted(OTHERS))
@pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 403, 404])
def test_all_providers_have_status_faults(market: LocalMarket, provider: str, status: int) -> None:
    market.plant_fault(provider, "status", status=status)
    answers = [OTHERS[provider](market) for _ in range(2)]
    expected = 200 if (provider, status) == ("alphavantage", 429) else status
    assert [answer.status_code for answer in answers] == [expected, 200]
    assert answers[0].content != answers[1].content
    assert market.journal()["providers"][provider]["requests"] == 2


@pytest.mark.parametrize("provider", ["oanda", "yahoo"])
def test_faults_match_by_symbol_and_window(market: LocalMarket, provider: str) -> None:
    symbol, other = ("EUR/USD", "GBP/USD") if provider == "oanda" else ("AAPL", "MSFT")
    market.plant_fault(provider, "empty", symbol=other, count=None)
    original = READ[provider](OTHERS[provider](market))
    assert len(original) > 100
    market.plant_fault(
        provider, "missing", symbol=symbol, start="2025-03-18T14:00", end="2025-03-18T15:00", count=None
    )
    hit = READ[provider](OTHERS[provider](market))
    assert len(hit) == len(original) - len(original.within(window("2025-03-18T14:00", "2025-03-18T15:00")))
    assert len(original) - len(hit) == 12


ERRORS = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "data/wire/errors.jsonl").read_text().splitlines()
]
NAMES = {"alpha_vantage": "alphavantage", "massive": "polygon"}


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: f"{case['provider']} {case['case']}")
def test_every_known_error_can_be_served(market: LocalMarket, case: dict[str, Any]) -> None:
    """Recorded errors are served unchanged, including those that the simulator does not produce."""
    provider = NAMES.get(case["provider"], case["provider"])
    body = case.get("body", case.get("body_text"))
    market.plant_fault(provider, "status", status=case["status"], body=body)
    requests_of = {**OTHERS, "binance": page, "polygon": polygon_page}
    answer = requests_of[provider](market)
    assert answer.status_code == case["status"]
    assert (answer.json() if "body" in case else answer.text) == body
    assert answer.headers["Content-Type"] == ("application/json" if "body" in case else "text/html")


def test_an_archive_without_some_hours(market: LocalMarket) -> None:
    market.plant_fault("archive", "missing", start="2024-01-01T06:00", end="2024-01-01T12:00")
    checksum = archive(market, f"{DAY}.CHECKSUM").text  # requested first, for the same bytes
    body = archive(market, DAY).content
    assert checksum.split()[0] == sha256(body).hexdigest()
    assert len(unzipped(body)) == 1440 - 360


def test_wrong_checksum_corrupt_zip_and_404(market: LocalMarket) -> None:
    original = archive(market, DAY).content
    market.plant_fault("archive", "wrong_checksum")
    assert archive(market, f"{DAY}.CHECKSUM").text.split()[0] != sha256(original).hexdigest()
    assert archive(market, f"{DAY}.CHECKSUM").text.split()[0] == sha256(original).hexdigest()
    market.plant_fault("archive", "corrupt_zip")
    corrupt = archive(market, DAY).content
    assert archive(market, f"{DAY}.CHECKSUM").text.split()[0] == sha256(corrupt).hexdigest()
    with (
        pytest.raises(Exception, match=r"(?i)crc|invalid|decompress"),
        zipfile.ZipFile(io.BytesIO(corrupt)) as file,
    ):
        file.read(file.namelist()[0])
    market.clear_faults()
    market.plant_fault("archive", "archive_404", path="BTCUSDT-1m-2024-01-01")
    assert archive(market, DAY).status_code == 404
    assert archive(market, f"{DAY}.CHECKSUM").status_code == 404
    assert archive(market, DAY.replace("01-01.zip", "01-02.zip")).status_code == 200


def test_matching_by_symbol_path_and_probability(market: LocalMarket) -> None:
    market.plant_fault("binance", "empty", symbol="ETH/USDT", count=None)
    market.plant_fault("binance", "status", path="interval=5m", count=None)
    assert len(page(market).json()) == 100
    assert klines(market, symbol="ETHUSDT").json() == []
    assert klines(market, interval="5m").status_code == 500
    market.clear_faults()
    market.plant_fault("binance", "status", probability=0.5)
    statuses = [page(market).status_code for _ in range(60)]
    assert 10 < statuses.count(500) < 50


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({"provider": "kraken", "kind": "html"}, "no provider 'kraken'"),
        ({"provider": "binance", "kind": "gremlin"}, "gremlin"),
        ({"provider": "binance"}, "kind is missing"),
        ({"provider": "binance", "kind": "html", "colour": "red"}, "unknown colour"),
        ({"provider": "binance", "kind": "status", "status": "bad"}, "status of a fault must be a number"),
    ],
)
def test_an_invalid_fault_is_rejected(market: LocalMarket, document: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        market.post("/sim/faults", **document)


def test_faults_report_their_hits(market: LocalMarket) -> None:
    market.plant_fault("binance", Kind.EMPTY.value, count=2)
    assert [len(page(market).json()) for _ in range(3)] == [0, 0, 100]
    (fault,) = requests.get(f"{market.url}/sim/faults", timeout=10).json()
    assert (fault["kind"], fault["hits"]) == ("empty", 2)
    assert [entry["fault"] for entry in market.journal()["last"]] == ["empty", "empty", None]
    assert instant("2024-01-01") == REQUESTED.start
