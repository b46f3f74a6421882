"""Automation with a real daemon: no test calls a function of the definitions.

The servers are started once for all tests of this file. They begin with a refresh; each test then verifies one aspect
over GraphQL.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import pytest
import sqlalchemy as sa
from dagster import DagsterInstance
from dagster._core.scheduler.instigation import ScheduleInstigatorData

from fks_backfill_dagster.app import now
from fks_backfill_dagster.domain.partitions import Grain
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_HOUR, MICROS_PER_MINUTE, Timeframe, to_datetime
from fks_backfill_dagster.host.graphql import REPOSITORY
from fks_backfill_dagster.host.servers import WEBSERVER, dagster_folder
from fks_backfill_dagster.orchestration.jobs import CHECKS
from fks_backfill_dagster.orchestration.run_retention import HOUSEKEEPING
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.model import CHECKOUT
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.store.dagster_schema import DAGSTER_SCHEMA
from fks_backfill_dagster.store.queries import batches, read_candles
from fks_backfill_dagster_tests.host.site import Site, compute_log, site

pytestmark = pytest.mark.server

FRAME = 15 * MICROS_PER_MINUTE
BTC, ETH = ("ohlcv", "BTC_USDT", "15m"), ("ohlcv", "ETH_USDT", "15m")


@dataclass(frozen=True)
class Refreshed:
    """A site whose daemon has evaluated a due tick: BTC was synced until `cut`, ETH never.

    `runs`: the tags of the resulting runs by id; `targets`: the requests to the market.
    """

    site: Site
    cut: int
    runs: Mapping[str, Mapping[str, str]]
    targets: Sequence[str]

    def run_of(self, path: tuple[str, ...]) -> str:
        """The id of the run that materialized this asset last."""
        (last,) = self.site.asset(path, "assetMaterializations(limit: 1) { runId }")["assetMaterializations"]
        return str(last["runId"])


@pytest.fixture(scope="module")
def refreshed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Refreshed]:
    present = now()
    cut = present // FRAME * FRAME - 3 * MICROS_PER_HOUR
    start = (to_datetime(cut).replace(day=1) - timedelta(days=1)).replace(day=1)
    home = tmp_path_factory.mktemp("daemon") / "home"
    with (
        LocalMarket(MarketConfig(limits=False)) as market,
        site(home, market, ("BTC/USDT", "ETH/USDT"), "15m", f"{start:%Y-%m-%d}") as made,
    ):
        made.up(WEBSERVER)
        backfill(made, "BTC/USDT", f"{start:%Y-%m-%d}", to_datetime(cut).isoformat())
        market.reset_requests()
        start_schedule(made, "refresh_15m")
        pretend_started_before(made, timedelta(minutes=15))
        made.up()
        made.until(lambda: bool(made.runs()) and all(r["status"] == "SUCCESS" for r in made.runs()))
        runs = {run["id"]: run["tags"] for run in made.runs()}
        yield Refreshed(made, cut, runs, [line["target"] for line in market.journal()["last"]])


def backfill(made: Site, symbol: str, start: str, end: str) -> None:
    """By the command line, without Dagster."""
    line = ("backfill", symbol, "15m", "--start", start, "--end", end, "--json")
    subprocess.run(
        [sys.executable, "-m", "fks_backfill_dagster", *line],
        env=dict(made.environment),
        cwd=CHECKOUT,
        check=True,
        capture_output=True,
    )


def start_schedule(made: Site, name: str) -> None:
    """Starts it as the switch in the UI does."""
    found = made.web.query(
        "mutation($selector: ScheduleSelector!) { startSchedule(scheduleSelector: $selector) {"
        " __typename ... on PythonError { message } } }",
        selector={**REPOSITORY, "scheduleName": name},
    )["startSchedule"]
    assert found["__typename"] == "ScheduleStateResult", found


def pretend_started_before(made: Site, ago: timedelta) -> None:
    """Moves the start of every schedule back, so that a tick is due that no daemon has evaluated.

    A test cannot wait a quarter of an hour for a tick. A daemon finds its schedules in this state after a downtime, and
    then makes up for the last tick.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in made.environment.items():
            if name.startswith("FKS_"):
                patch.setenv(name, value)
        with DagsterInstance.from_config(str(dagster_folder(made.settings.home))) as instance:
            for state in instance.all_instigator_state():
                data = state.instigator_data
                assert isinstance(data, ScheduleInstigatorData)
                began = (data.start_timestamp or 0) - ago.total_seconds()
                instance.update_instigator_state(
                    state.with_data(ScheduleInstigatorData(data.cron_schedule, began))
                )


def test_a_tick_requests_the_runs(refreshed: Refreshed) -> None:
    (tick,) = refreshed.site.web.query(
        "query($selector: ScheduleSelector!) { scheduleOrError(scheduleSelector: $selector) { ... on Schedule {"
        " scheduleState { ticks { status runIds error { message } } } } } }",
        selector={**REPOSITORY, "scheduleName": "refresh_15m"},
    )["scheduleOrError"]["scheduleState"]["ticks"]
    assert (tick["status"], tick["error"]) == ("SUCCESS", None)
    assert set(tick["runIds"]) == set(refreshed.runs)
    assert {refreshed.run_of(BTC), refreshed.run_of(ETH)} == set(refreshed.runs)
    for tags in refreshed.runs.values():
        assert tags["dagster/schedule_name"] == "refresh_15m"
        assert (tags["fks/refresh"], tags["dagster/priority"]) == ("15m", "10")


def test_only_new_candles_are_requested_and_stored(refreshed: Refreshed) -> None:
    # 12 candles have closed since, possibly 13. They are one request and one batch, unless a month ends among them.
    requested = [target for target in refreshed.targets if "BTCUSDT" in target]
    assert len(requested) in (1, 2)
    assert all("/api/v3/klines" in target for target in requested)
    window = TimeRange(refreshed.cut, refreshed.cut + 12 * FRAME)
    with refreshed.site.database() as database:
        stored = read_candles(
            database, Catalog(refreshed.site.settings).find_series("BTC/USDT", "15m"), window
        )
        new_batches = [one for one in batches(database) if one.symbol == "BTC/USDT" and one.run_id]
    truth = refreshed.site.market.truth("binance", "BTCUSDT", Timeframe.M15, window)
    assert len(stored) == 12
    assert all((ours == theirs).all() for ours, theirs in zip(stored.columns(), truth.columns(), strict=True))
    assert {batch.run_id for batch in new_batches} == {refreshed.run_of(BTC)}
    assert sum(batch.inserted for batch in new_batches) in (12, 13)


def test_refreshed_series_are_materialized(refreshed: Refreshed) -> None:
    for path in (BTC, ETH):
        tags = refreshed.runs[refreshed.run_of(path)]
        current = tags["dagster/asset_partition_range_end"]
        shown = refreshed.site.asset(
            path,
            "assetPartitionStatuses { ... on TimePartitionStatuses { ranges { status startKey endKey } } }"
            " assetMaterializations(limit: 1) { partition metadataEntries { label"
            " ... on IntMetadataEntry { intValue } ... on FloatMetadataEntry { floatValue } } }",
        )
        (last,) = shown["assetMaterializations"]
        assert last["partition"] == current
        numbers = {e["label"]: e.get("intValue", e.get("floatValue")) for e in last["metadataEntries"]}
        assert numbers["stored"] == numbers["expected"] > 0
        assert numbers["coverage"] == 1.0
        (status_range,) = shown["assetPartitionStatuses"]["ranges"]
        assert status_range == {
            "status": "MATERIALIZED",
            "startKey": tags["dagster/asset_partition_range_start"],
            "endKey": current,
        }


def test_the_page_of_a_series_describes_it(refreshed: Refreshed) -> None:
    shown = refreshed.site.asset(
        BTC,
        "description groupName kinds pools tags { key value } jobNames"
        " owners { ... on TeamAssetOwner { team } }"
        " metadataEntries { label ... on TextMetadataEntry { text } ... on TableSchemaMetadataEntry {"
        " schema { columns { name type } } } }"
        " internalFreshnessPolicy { __typename }"
        " assetChecksOrError { ... on AssetChecks { checks { name description } } }",
    )
    assert shown["description"] == "BTC/USDT: 15m candles, rows of fks.ohlcv."
    assert (shown["groupName"], shown["kinds"], shown["pools"]) == ("crypto", ["timescaledb"], ["crypto"])
    assert {tag["key"]: tag["value"] for tag in shown["tags"]}.items() >= {
        ("symbol", "BTC_USDT"),
        ("timeframe", "15m"),
    }
    assert shown["owners"] == [{"team": "market-data"}]
    entries = {entry["label"]: entry for entry in shown["metadataEntries"]}
    assert entries["dagster/table_name"]["text"] == "fks.ohlcv"
    columns = entries["dagster/column_schema"]["schema"]["columns"]
    with refreshed.site.database() as database, database.begin() as connection:
        real = connection.execute(
            sa.text(
                "SELECT attname, format_type(atttypid, NULL) FROM pg_attribute"
                " WHERE attrelid = 'fks.ohlcv'::regclass AND attnum > 0 ORDER BY attnum"
            )
        )
        names = {"double precision": "float8", "timestamp with time zone": "timestamptz"}
        assert [(c["name"], c["type"]) for c in columns] == [(n, names.get(t, t)) for n, t in real]
    assert shown["internalFreshnessPolicy"] is not None
    checks = {check["name"]: check["description"] for check in shown["assetChecksOrError"]["checks"]}
    assert set(checks) == {"completeness", "data_freshness", "ohlc_sanity"}
    assert all(checks.values())


def test_a_refresh_logs_its_result_and_evaluates_freshness_only(refreshed: Refreshed) -> None:
    """The page of its compute log shows the run log only, without Dagster's events."""
    run = refreshed.run_of(BTC)
    lines = compute_log(refreshed.site.web, run)
    assert len(lines) < 20
    planned, done = [line for line in lines if "BTC/USDT" in line]
    assert re.search("1[23] of .* candles are missing", planned)
    assert re.search("1[23] candles stored", done)
    messages = refreshed.site.messages(run)
    assert [text for kind, text in messages if kind == "LogMessageEvent"] == [
        line.partition("ohlcv_crypto_15m - ")[2] for line in lines
    ]
    assert "MaterializationEvent" in {kind for kind, _ in messages}
    evaluations = [text for kind, text in messages if kind == "AssetCheckEvaluationEvent"]
    assert len(evaluations) == 1, "one per series"
    assert "'data_freshness' on 'ohlcv/BTC_USDT/15m' passed" in evaluations[0]


@pytest.fixture(scope="module")
def checked(refreshed: Refreshed) -> str:
    """A run of all checks, as launched by the page of its job."""
    refreshed.site.market.reset_requests()
    run = refreshed.site.launch_job(CHECKS)
    assert refreshed.site.until_ended(run) == "SUCCESS"
    return run


def test_checks_run_alone_without_requests(refreshed: Refreshed, checked: str) -> None:
    made = refreshed.site
    assert made.market.requests() == 0
    for path in (BTC, ETH):
        outcomes = {o.name: o.passed for o in made.web.check_outcomes(path)}
        assert outcomes == {"ohlc_sanity": True, "completeness": True, "data_freshness": True}
    kinds = [kind for kind, _ in made.messages(checked)]
    assert kinds.count("AssetCheckEvaluationEvent") == 6
    assert "MaterializationEvent" not in kinds


def test_housekeeping_deletes_obsolete_runs(refreshed: Refreshed, checked: str) -> None:
    made = refreshed.site
    newer = made.launch_job(CHECKS)
    assert made.until_ended(newer) == "SUCCESS"
    with made.database() as database, database.begin() as connection:
        connection.execute(sa.text(_AGE.format(schema=DAGSTER_SCHEMA)))
    run = made.launch_job(HOUSEKEEPING)
    assert made.until_ended(run) == "SUCCESS"
    assert {one["id"] for one in made.runs()} == {newer, run, *refreshed.runs}
    (line,) = [text for kind, text in made.messages(run) if kind == "LogMessageEvent"]
    assert re.match(r"deleted 1 runs; \d+ events remain", line)


_AGE = "UPDATE {schema}.runs SET update_timestamp = update_timestamp - interval '4 days'"
"""Makes all runs older than `keep_runs_days`."""

# Expected warnings: the first start on a new database, ticks missed during the downtime.
_USUAL = re.compile("No cursor for event type|not trying to catch up")


def test_the_logs_contain_no_warnings(refreshed: Refreshed, checked: str) -> None:
    logs = {log.name: log.read_text() for log in (refreshed.site.settings.home / "logs").glob("*.log")}
    assert logs["webserver.log"]
    assert logs["daemon.log"]
    del logs["postgresql.log"]  # Dagster causes and handles conflicts with existing rows
    lines = [line for text in logs.values() for line in text.splitlines()]
    bad = [line for line in lines if re.search("warn|deprecat|error|traceback", line, re.I)]
    assert [line for line in bad if not _USUAL.search(line)] == []


# --- a backfill with configuration, as the dialog of an asset's page starts it ---


def launch_configured(made: Refreshed, config: str) -> str:
    """A backfill of BTC's month before `cut`, with this configuration of its op as YAML. Returns the id."""
    month = Grain.MONTH.key(Grain.MONTH.start(made.cut, -1))
    ranges = {"ranges": [{"start": month, "end": month}]}
    found = made.site.web.query(
        "mutation($params: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $params) {"
        " __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }",
        params={
            "partitionsByAssets": [{"assetKey": {"path": list(BTC)}, "partitions": ranges}],
            "runConfigData": f"ops: {{ohlcv_crypto_15m: {{config: {config}}}}}",
        },
    )["launchPartitionBackfill"]
    assert found["__typename"] == "LaunchBackfillSuccess", found
    return str(found["backfillId"])


@pytest.mark.slow
def test_the_configuration_of_a_backfill_reaches_its_runs(refreshed: Refreshed) -> None:
    """The month is stored already: only a refetch requests it."""
    web, identity = refreshed.site.web, launch_configured(refreshed, "{mode: refetch}")
    refreshed.site.until(lambda: any(run.finished for run in web.backfill_state(identity).runs), 120)
    (run,) = web.backfill_state(identity).runs
    assert run.status == "SUCCESS"
    text = "\n".join(text for _, text in refreshed.site.messages(run.id))
    assert re.search(
        r"BTC/USDT 15m: 0 of 2,\d+ candles are missing in .*; requesting 1 batches from binance", text
    )


@pytest.mark.slow
def test_a_backfill_with_an_unknown_mode_fails_without_a_run(refreshed: Refreshed) -> None:
    web, identity = refreshed.site.web, launch_configured(refreshed, "{mode: refetc}")
    refreshed.site.until(lambda: web.backfill_state(identity).error is not None, 120)
    found = web.backfill_state(identity)
    assert "root:ops:ohlcv_crypto_15m:config:mode" in str(found.error)
    assert "'backfill', 'refresh', 'fill_gaps', 'refetch'" in str(found.error)
    assert not found.runs
