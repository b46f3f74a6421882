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


def test_an_undo_and_the_gap_that_it_reopens(shelf: Shelf, fks: Command) -> None:
    """Both name it; undoing the undo restores the candles and closes the gap."""
    shelf.put(0, 5)
    (delivery,) = fks("batches", "list", "--json").json
    assert fks("batches", "undo", str(delivery["id"]), "--json").json["candles_taken_back"] == 5
    undo, undone = fks("batches", "list", "--json").json
    assert (undo["kind"], undo["undoes"], undo["undone_by"]) == ("undo", delivery["id"], None)
    assert (undone["kind"], undone["undone_by"]) == ("delivery", undo["id"])
    notes = fks("batches", "list").stdout
    assert f"undo of {delivery['id']}" in notes
    assert f"undone by {undo['id']}" in notes
    gap, *_ = fks("gaps", shelf.series.symbol, "1h", "--start", "2024-01-01", "--json").json
    assert [(one["outcome"], one["detail"]) for one in gap["evidence"]] == [
        ("undone", f"taken back by batch {undo['id']}")
    ]
    shown = fks("gaps", shelf.series.symbol, "1h", "--start", "2024-01-01").stdout
    assert f"undo: taken back by batch {undo['id']}" in shown
    again = fks("batches", "undo", str(delivery["id"]))
    assert (again.exit_code, f"was undone before, by batch {undo['id']}" in again.stderr) == (1, True)
    assert fks("batches", "undo", str(undo["id"])).exit_code == 0
    assert len(shelf.read()) == 5
    assert shelf.gaps() == ()


def test_a_batch_from_before_hosts_were_recorded(shelf: Shelf, fks: Command) -> None:
    shelf.put(0, 5)
    execute(shelf.database, "UPDATE fks.batch SET host = DEFAULT, instrument = NULL")
    (found,) = fks("batches", "list", "--json").json
    assert (found["host"], found["instrument"], found["published_at"]) == (None, None, None)
    assert fks("batches", "list").exit_code == 0
