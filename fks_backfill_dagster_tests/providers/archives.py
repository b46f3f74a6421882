"""Fetches from the small Binance with archives, compared with its truth."""

from __future__ import annotations

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.providers.base import FetchResult
from fks_backfill_dagster_tests.providers.conftest import Make
from fks_backfill_dagster_tests.providers.scripted import Server, SmallBinance, crypto, serve, span

JANUARY = span("2024-01-01", "2024-02-01")


def of(answer: FetchResult) -> Candles:
    return Candles.concat([delivery.candles for delivery in answer.deliveries]).sorted()


def fetch(
    make: Make, market: SmallBinance, window: TimeRange, timeframe: Timeframe = Timeframe.M1, **given: object
) -> tuple[FetchResult, Server]:
    with serve(market) as server:
        provider = make("binance", server.url, archive_url=server.url, **given)
        answer = provider.fetch(crypto(timeframe), window)
    assert of(answer).equals(market.truth(crypto(timeframe), window)), "the truth from any source"
    assert answer.requests == len(server.requests)
    return answer, server


def kinds(server: Server) -> list[str]:
    """The requests: monthly, daily, rest; each file once, without its checksum."""
    names = []
    for asked in server.requests:
        if asked.path.endswith(".zip"):
            names.append(asked.path.split("/")[3])
        elif asked.path == "/api/v3/klines":
            names.append("rest")
    return names
