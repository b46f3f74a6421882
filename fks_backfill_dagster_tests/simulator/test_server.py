"""The server: port, control routes, ways to run it."""

from __future__ import annotations

import signal

import pytest
import requests

from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig, Outage, PortInUse
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.simulator.server import run
from fks_backfill_dagster_tests.simulator.conftest import LIMITS, NOW
from fks_backfill_dagster_tests.simulator.wire import klines, window


def test_the_index_page_lists_addresses_and_clock(market: LocalMarket) -> None:
    text = requests.get(market.url, timeout=10).text
    assert f"{market.binance_url}/api/v3/klines" in text
    assert "2025-03-20T12:34:56" in text


def test_every_provider_has_its_address(market: LocalMarket) -> None:
    text = requests.get(market.url, timeout=10).text
    for url in (market.yahoo_url, market.alphavantage_url, market.oanda_url, market.coingecko_url):
        assert url in text
    assert "EURUSD" in text


def test_the_projects_name_of_yahoo_is_accepted(market: LocalMarket) -> None:
    requested = window("2025-03-10", "2025-03-15")
    truth = market.truth("yahoo", "AAPL", Timeframe.D1, requested)
    assert market.truth("yfinance", "AAPL", Timeframe.D1, requested).equals(truth)
    market.plant_outage("yfinance", window("2025-03-12", "2025-03-13"), "AAPL")
    assert len(market.truth("yahoo", "AAPL", Timeframe.D1, requested)) == len(truth) - 1
    assert len(market.truth("polygon", "AAPL", Timeframe.D1, requested)) == len(truth)


def test_limits_have_names(market: LocalMarket) -> None:
    limits = market.post("/sim/limits", oanda=7)
    assert limits["oanda"] == {"limit": 7, "used": 0}
    assert set(limits) == set(LIMITS)
    with pytest.raises(ValueError, match="with the names binance, polygon, yahoo"):
        market.post("/sim/limits", kraken=7)


@pytest.mark.parametrize("process", [False, True])
def test_a_port_in_use_is_an_error(market: LocalMarket, process: bool) -> None:
    port = int(market.url.rpartition(":")[2])
    with (
        pytest.raises(PortInUse, match=f"port {port} on 127.0.0.1 is in use"),
        LocalMarket(MarketConfig(port=port), process=process),
    ):
        pass


def test_a_market_in_another_process_is_the_same(market: LocalMarket) -> None:
    requested = window("2024-01-01", "2024-01-03")
    with LocalMarket(MarketConfig(now=NOW), process=True) as other:
        assert klines(other).content == klines(market).content
        assert other.truth("binance", "BTCUSDT", Timeframe.M1, requested).equals(
            market.truth("binance", "BTCUSDT", Timeframe.M1, requested)
        )


def test_requests_are_counted_and_reset(market: LocalMarket) -> None:
    assert market.requests() == 0
    klines(market)
    klines(market, symbol="NOPEUSDT")
    requests.get(f"{market.archive_url}/data/spot/nothing", timeout=10)
    assert (market.requests(), market.requests("binance"), market.requests("archive")) == (3, 2, 1)
    journal = market.journal()
    assert journal["providers"]["binance"]["weight"] == 4
    assert journal["providers"]["binance"]["endpoints"] == {"klines": 2}
    assert [entry["status"] for entry in journal["last"]] == [200, 400, 404]
    market.reset_requests()
    assert market.requests() == 0


def test_outages_are_listed_and_lifted(market: LocalMarket) -> None:
    market.plant_outage("binance", window("2024-01-01", "2024-01-02"), "BTC/USDT")
    (outage,) = requests.get(f"{market.url}/sim/outages", timeout=10).json()
    assert outage == {
        "kind": "outage",
        "provider": "binance",
        "symbol": "BTCUSDT",
        "start": "2024-01-01T00:00:00+00:00",
        "end": "2024-01-02T00:00:00+00:00",
        "published": None,
    }
    market.clear_outages()
    assert requests.get(f"{market.url}/sim/outages", timeout=10).json() == []


def test_late_rows_are_served_from_their_publication_on(market: LocalMarket) -> None:
    day, published = window("2025-03-18", "2025-03-19"), instant("2025-03-20T13:00")
    market.plant_outage("binance", day, "BTC/USDT", published=published)
    (outage,) = requests.get(f"{market.url}/sim/outages", timeout=10).json()
    assert outage["published"] == "2025-03-20T13:00:00+00:00"
    for now, count in ((published - 1, 0), (published, 24)):
        market.set_clock(now)
        assert len(market.truth("binance", "BTC/USDT", Timeframe.H1, day)) == count
        rows = klines(market, interval="1h", startTime=day.start // 1000, endTime=day.end // 1000 - 1).json()
        assert len(rows) == count


@pytest.mark.server
def test_configured_outages() -> None:
    outage = Outage.parse("binance@BTC/USDT=2024-01-05T03:00/2024-01-05T07:30Z")
    assert outage == Outage("binance", window("2024-01-05T03:00", "2024-01-05T07:30"), "BTCUSDT")
    with LocalMarket(MarketConfig(outages=(outage,))) as market:
        requested = window("2024-01-05", "2024-01-06")
        assert len(market.truth("binance", "BTC_USDT", Timeframe.M1, requested)) == 1440 - 270
        assert len(market.truth("polygon", "X:BTCUSD", Timeframe.M1, requested)) == 1440


@pytest.mark.parametrize(
    "text", ["binance", "binance=2024-01-01", "kraken=2024-01-01/2024-01-02", "binance=2024-01-02/2024-01-01"]
)
def test_an_invalid_outage_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not PROVIDER\[@SYMBOL\]=START/END"):
        Outage.parse(text)


def test_the_truth_ends_with_the_last_closed_candle(market: LocalMarket) -> None:
    truth = market.truth("binance", "BTCUSDT", Timeframe.H1, window("2025-03-20", "2025-03-21"))
    assert truth.ts[-1] == instant("2025-03-20T11:00")


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("kraken/BTCUSDT/1h", "no provider 'kraken'"),
        ("binance/NOPE/1h", "has no symbol 'NOPE'"),
        ("binance/BTCUSDT/7h", "no timeframe '7h'"),
        ("binance/BTCUSDT/1h?start=soon", "soon"),
        ("binance/BTCUSDT/1h?start=2024-02-01&end=2024-01-01", "starts"),
    ],
)
def test_an_invalid_request_returns_an_error_message(market: LocalMarket, path: str, sentence: str) -> None:
    answer = requests.get(f"{market.url}/sim/truth/{path}", timeout=10)
    assert answer.status_code == 400
    assert sentence in answer.json()["error"]


def test_the_clock_is_fixed_or_runs(market: LocalMarket) -> None:
    market.set_clock(instant("2024-06-01"))
    assert requests.get(f"{market.url}/sim/clock", timeout=10).json() == {
        "now": "2024-06-01T00:00:00+00:00",
        "runs": False,
    }
    market.set_clock(instant("2024-06-01"), runs=True)
    assert requests.get(f"{market.url}/sim/clock", timeout=10).json()["runs"] is True
    first = requests.get(f"{market.binance_url}/api/v3/time", timeout=10).json()["serverTime"]
    assert instant("2024-06-01") // 1000 <= first < instant("2024-06-01T00:01") // 1000


@pytest.mark.server
def test_latency_is_added() -> None:
    with LocalMarket(MarketConfig(latency=0.2)) as market:
        answer = requests.get(f"{market.binance_url}/api/v3/ping", timeout=10)
        assert answer.elapsed.total_seconds() >= 0.2


@pytest.mark.server
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_at_any_moment(number: signal.Signals) -> None:
    """Also before its event loop handles signals: a handler that raises there would break the loop's start."""
    reached = []

    def on_start(url: str) -> None:
        signal.raise_signal(number)
        reached.append(url)

    before = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(MarketConfig(port=0), on_start)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert reached, "nothing was raised within"
    with pytest.raises(requests.ConnectionError):
        requests.get(reached[0], timeout=10)
