"""Series that come, go, change or end, as Dagster meets them."""

from __future__ import annotations

from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.orchestration.conftest import MakeProject
from fks_backfill_dagster_tests.orchestration.test_assets import statuses
from fks_backfill_dagster_tests.orchestration.test_schedules import pretend_synced
from fks_backfill_dagster_tests.store.builders import execute


def test_a_series_of_another_class_than_stored_fails_with_its_sentence_and_alone(
    project: MakeProject, market: LocalMarket, database: Database
) -> None:
    mine = project("BTC/USDT", "ETH/USDT")
    pretend_synced(database, "BTC/USDT", "1h", "2024-01-01", "2024-01-02")
    execute(database, "UPDATE fks.series SET asset_class = 'forex'")
    done = mine.materialize("1h", "2024-01-01")
    assert not done.success
    assert statuses(mine, mine.key("ETH/USDT", "1h"), "2024-01-01") == {"2024-01-01": "MATERIALIZED"}
    assert statuses(mine, mine.key("BTC/USDT", "1h"), "2024-01-01") == {"2024-01-01": "FAILED"}
    told = " ".join(str(entry) for entry in mine.instance.all_logs(done.run_id))
    assert "BTC/USDT 1h is stored as forex, and is now asked for as crypto" in told
