"""`batches list`: the origin of every batch, without any request."""

from __future__ import annotations

from pathlib import Path

import pytest

from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.cli.conftest import Command
from fks_backfill_dagster_tests.store.builders import MIDNIGHT, Shelf, archive, brought, candles_at, execute
from fks_backfill_dagster_tests.store.conftest import fresh


@pytest.fixture
def shelf(database: Database, database_url: str, settings: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    monkeypatch.setenv("FKS_DATABASE_URL", database_url)
    return Shelf.of(database, fresh("1h"))


def test_host_instrument_and_publication(shelf: Shelf, fks: Command) -> None:
    """At the end of each document; the host is a column of the table."""
    shelf.commit(shelf.span(0, 5), brought(candles_at(shelf.opens(0, 5)), host="http://127.0.0.1:8765"))
    shelf.commit(
        shelf.span(5, 9),
        archive(candles_at(shelf.opens(5, 9)), MIDNIGHT + MICROS_PER_DAY, host="https://data.binance.vision"),
    )
    newest, oldest = fks("batches", "list", "--json").json
    assert list(newest)[-8:-4] == ["undoes", "host", "instrument", "published_at"]
    assert list(newest)[-4:] == ["kind", "undone_by", "author", "reason"]
    assert (newest["host"], newest["instrument"], newest["published_at"]) == (
        "https://data.binance.vision",
        "BTCUSDT",
        "2024-01-02T00:00:00+00:00",
    )
    assert (oldest["host"], oldest["published_at"]) == ("http://127.0.0.1:8765", None)
    header, *rows = fks("batches", "list").stdout.splitlines()
    assert header.split()[-2:] == ["source", "host"]
    assert [row.split()[-1] for row in rows] == ["https://data.binance.vision", "http://127.0.0.1:8765"]


def test_a_batch_from_before_hosts_were_recorded(shelf: Shelf, fks: Command) -> None:
    shelf.put(0, 5)
    execute(shelf.database, "UPDATE fks.batch SET host = DEFAULT, instrument = NULL")
    (found,) = fks("batches", "list", "--json").json
    assert (found["host"], found["instrument"], found["published_at"]) == (None, None, None)
    assert fks("batches", "list").exit_code == 0
