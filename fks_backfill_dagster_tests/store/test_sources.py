"""Candles of documented and of custom hosts do not mix in one database."""

from __future__ import annotations

import pytest

from fks_backfill_dagster.store import sources
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import MixedSources, StoreError
from fks_backfill_dagster.store.sources import HostInUse
from fks_backfill_dagster.store.writer.remove import remove_series
from fks_backfill_dagster_tests.store.builders import Shelf, brought, candles_at, execute, fetch
from fks_backfill_dagster_tests.store.conftest import fresh

DOCUMENTED = {"binance": "https://api.binance.com", "polygon": "https://api.massive.com"}
LOCAL = "http://127.0.0.1:40001"


def is_documented(provider: str, host: str) -> bool:
    return host == DOCUMENTED[provider]


def put(database: Database, provider: str, host: str | None) -> Shelf:
    """A series with candles of that host; None: from before hosts were recorded."""
    shelf = Shelf.of(database, fresh("1h"))
    window = shelf.span(0, 5)
    shelf.commit(window, brought(candles_at(shelf.opens(0, 5)), provider, host=host or LOCAL))
    if host is None:
        execute(database, f"UPDATE fks.batch SET host = DEFAULT WHERE series_id = {shelf.identity}")
    return shelf


def check(database: Database, **hosts: str) -> None:
    in_use = {name: HostInUse(host, not is_documented(name, host)) for name, host in hosts.items()}
    sources.check(database, in_use, is_documented)


REAL = DOCUMENTED["binance"]


def test_a_database_without_candles_accepts_both_kinds(database: Database) -> None:
    check(database, **DOCUMENTED)
    check(database, binance=LOCAL, polygon=LOCAL)
    check(database)


def test_candles_of_an_unknown_host_count_as_neither_kind(database: Database) -> None:
    """Older versions recorded no hosts: their sandboxes and their real databases both still work."""
    put(database, "binance", None)
    check(database, **DOCUMENTED)
    check(database, binance=LOCAL)


@pytest.mark.parametrize("name", ["binance", "polygon"])
def test_real_candles_and_a_local_market(database: Database, name: str) -> None:
    """For the same provider and for another one."""
    put(database, "binance", REAL)
    check(database, **DOCUMENTED)
    with pytest.raises(
        MixedSources, match=rf"holds candles of binance from {REAL}.* request {name} from {LOCAL}"
    ) as caught:
        check(database, **{**DOCUMENTED, name: LOCAL})
    assert isinstance(caught.value, StoreError)
    assert "FKS_HOME or FKS_DATABASE_URL" in str(caught.value)
    assert "allow_mixed_sources: true" in str(caught.value)


def test_candles_of_a_local_market_and_the_real_one(database: Database) -> None:
    put(database, "binance", LOCAL)
    with pytest.raises(
        MixedSources, match=f"holds candles of binance from {LOCAL}.* request binance from {REAL}"
    ):
        check(database, **DOCUMENTED)
    with pytest.raises(MixedSources, match=f"holds candles of binance from {LOCAL}.* request polygon"):
        check(database, polygon=DOCUMENTED["polygon"])


def test_a_local_market_on_another_port_is_the_same_source(database: Database) -> None:
    for port in (40001, 40002, 40003):
        put(database, "binance", f"http://127.0.0.1:{port}")
        check(database, binance=f"http://127.0.0.1:{port + 1}", polygon="http://localhost:1")


def test_settings_with_both_kinds_keep_the_kind_of_each_provider(database: Database) -> None:
    """One provider behind a proxy, the others not: allowed, from the first sync on."""
    hosts = {"binance": LOCAL, "polygon": DOCUMENTED["polygon"]}
    check(database, **hosts)
    put(database, "binance", LOCAL)
    check(database, **hosts)
    put(database, "polygon", DOCUMENTED["polygon"])
    check(database, **hosts)
    with pytest.raises(MixedSources, match=f"request polygon from {LOCAL}"):
        check(database, binance=LOCAL, polygon=LOCAL)
    with pytest.raises(MixedSources, match=f"request binance from {REAL}"):
        check(database, **DOCUMENTED)


def test_undone_and_removed_candles_do_not_count(database: Database) -> None:
    """A database with invented candles from a mistake can therefore be cleaned."""
    put(database, "binance", REAL)
    undone, removed = put(database, "binance", LOCAL), put(database, "polygon", LOCAL)
    with pytest.raises(MixedSources):
        check(database, binance=REAL)
    undone.undo(undone.batches()[0])
    with pytest.raises(MixedSources):
        check(database, polygon=DOCUMENTED["polygon"])
    remove_series(database, removed.series)
    check(database, **DOCUMENTED)
    assert sources.hosts(database) == {"binance": frozenset({REAL})}


def test_the_number_of_look_ups_does_not_depend_on_the_batches(database: Database) -> None:
    """The time does not grow with the lineage: 2,000 series run this check before every sync."""
    shelf = put(database, "binance", REAL)
    put(database, "binance", None)
    rows = (
        "INSERT INTO fks.batch (series_id, provider, transport, source, host, range_start, range_end, fetched_at,"
        " committed_at, inserted, updated)"
        f" SELECT {shelf.identity}, CASE mod(n, 2) WHEN 0 THEN 'binance' ELSE 'polygon' END, 'rest', '/',"
        " CASE mod(n, 2) WHEN 0 THEN 'https://api.binance.com' ELSE 'https://api.massive.com' END,"
        " '2020-01-01', '2020-01-02', now(), '2020-01-01', 1, 0 FROM generate_series(1, 100000) n"
    )
    execute(database, rows, "ANALYZE fks.batch")
    found = sources.hosts(database)
    assert found == {
        "binance": frozenset({REAL, sources.UNKNOWN}),
        "polygon": frozenset({DOCUMENTED["polygon"]}),
    }
    plan = fetch(database, f"EXPLAIN {sources._HOSTS}")
    assert not any("Seq Scan on batch" in str(line) for (line,) in plan)
