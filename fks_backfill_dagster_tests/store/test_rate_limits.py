"""The shared limiter and the circuit: with many processes and a counting server, and call by call."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import psycopg
import pytest
import sqlalchemy as sa

from fks_backfill_dagster.domain.rate_limits import (
    BUDGET_SECONDS,
    LONGEST_WAIT,
    CoolDown,
    Permit,
    RateLimits,
    RateWindow,
)
from fks_backfill_dagster.store import rate_limits
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.rate_limits import SharedCircuit, SharedLimiter, provider_states, reset
from fks_backfill_dagster_tests.store.builders import execute, fetch
from fks_backfill_dagster_tests.store.crowd import Crowd, counting_server

DAY = 86400.0
GO = 0.0


@pytest.fixture
def account() -> str:
    """An account for one test."""
    return uuid.uuid4().hex


def limiter_of(
    database: Database, account: str, *windows: RateWindow, longest: float = 60.0
) -> SharedLimiter:
    """A limiter as in another process."""
    return SharedLimiter(database, {"p": RateLimits(windows, account, longest)})


def go(limiter: SharedLimiter, weight: int = 1) -> Permit:
    """A permit; fails if the request has to wait."""
    permit = limiter.acquire("p", weight)
    assert permit.wait == 0
    return permit


class TestCrowd:
    def test_eight_processes_use_the_limit_and_never_more(self, database_url: str) -> None:
        """Requests reach the server up to 20 ms after their permits: that must not matter."""
        seconds, window = 3.5, RateWindow(60, 1.0)
        with counting_server(delay=0.005) as server:
            crowd = Crowd(database_url, server, (window,), threads=[2] * 8, late=0.02)
            arrivals = crowd.ask_for(seconds)
        assert arrivals.most_within(window.seconds) <= window.limit
        assert len(arrivals.at) >= 0.9 * window.limit * seconds / window.seconds
        assert len(set(arrivals.who)) == 8
        assert arrivals.least_share() >= 0.5

    @pytest.mark.parametrize("level", ["repeatable read", "serializable"])
    def test_in_a_database_with_another_isolation_level(self, database_url: str, level: str) -> None:
        """A statement that waited for its account's lock has to see the permits counted meanwhile."""
        window = RateWindow(40, 1.0)
        with psycopg.connect(database_url, autocommit=True) as connection:
            name = sa.make_url(database_url).database
            connection.execute(
                f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = '{level}'".encode()
            )
        with counting_server() as server:
            arrivals = Crowd(database_url, server, (window,), threads=[2] * 4).ask_for(1.6)
        assert 20 < arrivals.most_within(window.seconds) <= window.limit

    def test_a_refusal_of_one_request_stops_all_processes(self, database_url: str) -> None:
        with counting_server() as server:
            crowd = Crowd(database_url, server, (RateWindow(200, 1.0),), threads=[2] * 3)

            def refuse() -> None:
                time.sleep(0.7)
                server.refuse_next(418, 1.2)

            arrivals = crowd.ask_for(2.4, refuse)
        refused_at = arrivals.refused_at
        assert refused_at is not None
        since = arrivals.at[arrivals.at > refused_at] - refused_at
        # In flight when the refusal arrived: at most one for each of the other threads.
        assert np.sum(since < 0.3) <= 5
        assert np.sum((since >= 0.3) & (since < 1.2)) == 0
        assert np.sum(since >= 1.2) > 20


class TestLimit:
    def test_weights_and_their_expiry(self, shared: Database, account: str) -> None:
        limiter = limiter_of(shared, account, RateWindow(6, 0.4))
        limiter.release(go(limiter, 4))
        limiter.release(go(limiter, 2))
        began, waits = time.monotonic(), 0
        while permit := limiter.acquire("p", 6).wait:
            waits += 1
            time.sleep(permit)
        assert time.monotonic() - began >= 0.39
        assert waits < 15

    def test_a_request_heavier_than_the_limit_runs_alone(self, shared: Database, account: str) -> None:
        limiter = limiter_of(shared, account, RateWindow(3))
        limiter.release(go(limiter, 9))
        assert limiter.acquire("p", 1).wait > 0

    def test_requests_in_flight_count_as_the_newest(self, shared: Database, account: str) -> None:
        one, other = (limiter_of(shared, account, RateWindow(1, 1.5)) for _ in range(2))
        permit = go(one)
        time.sleep(1.55)
        assert other.acquire("p", 1).wait > 0
        one.release(permit)
        time.sleep(0.3)
        assert 0 < other.acquire("p", 1).wait <= 1.25

    def test_the_wait_for_a_killed_process_is_bounded(self, shared: Database, account: str) -> None:
        killed = limiter_of(shared, account, RateWindow(1, 0.3), longest=0.3)
        go(killed)
        other = limiter_of(shared, account, RateWindow(1, 0.3))
        began = time.monotonic()
        while wait := other.acquire("p", 1).wait:
            time.sleep(wait)
        assert 0.59 < time.monotonic() - began < 10  # less than the longest wait of the others, a minute

    def test_several_windows_and_a_budget_that_survives_a_restart(
        self, shared: Database, account: str
    ) -> None:
        windows = (RateWindow(1, 0.1), RateWindow(3, DAY))
        for _ in range(3):
            database = Database(shared.url.render_as_string(hide_password=False))
            limiter = limiter_of(database, account, *windows)
            while wait := limiter.acquire("p", 1).wait:
                assert wait <= 0.1
                time.sleep(wait)
            for (number,) in fetch(
                database, f"SELECT number FROM fks.pacing_request WHERE account = '{account}'"
            ):
                limiter.release(Permit(number=number))
            database.dispose()
        time.sleep(0.12)
        permit = limiter_of(shared, account, *windows).acquire("p", 1)
        assert permit.reason == "its 3 requests in 24 hours are used up: wait"
        assert DAY - 10 < permit.wait <= DAY * 65 / 64

    def test_two_keys_have_two_budgets(self, shared: Database, account: str) -> None:
        for one in (account, account + "2"):
            go(limiter_of(shared, one, RateWindow(1)))
        assert limiter_of(shared, account, RateWindow(1)).acquire("p", 1).wait > 0

    def test_no_rows_without_a_limit(self, shared: Database, account: str) -> None:
        limiter = limiter_of(shared, account)
        assert [limiter.acquire("p", 1) for _ in range(3)] == [Permit()] * 3
        assert fetch(shared, f"SELECT 1 FROM fks.pacing_request WHERE account = '{account}'") == []

    def test_old_slots_are_cleared(self, shared: Database, account: str) -> None:
        limiter = limiter_of(shared, account, RateWindow(100, 0.1))
        for _ in range(30):
            limiter.release(go(limiter))
            time.sleep(0.01)
        counted = fetch(
            shared, f"SELECT count(*), sum(weight) FROM fks.pacing_spent WHERE account = '{account}'"
        )
        assert counted[0][0] < 12
        assert counted[0][1] < 12

    def test_waiting_processes_get_permits_in_turn(self, shared: Database, account: str) -> None:
        window = RateWindow(2, 1.0)
        first, second, late = (limiter_of(shared, account, window) for _ in range(3))
        turns = [go(late), go(late)]
        assert min(first.acquire("p", 1).wait, second.acquire("p", 1).wait) > 0
        for permit in turns:
            late.release(permit)
        time.sleep(1.05)
        assert late.acquire("p", 1).wait > 0, "two are before it"
        assert go(second)
        assert go(first)

    def test_an_abandoned_ticket_blocks_no_other_process(self, shared: Database, account: str) -> None:
        gone, other = (limiter_of(shared, account, RateWindow(1, 0.2)) for _ in range(2))
        gone.release(go(gone))
        assert gone.acquire("p", 1).wait > 0
        began = time.monotonic()
        while wait := other.acquire("p", 1).wait:
            time.sleep(wait)
        assert time.monotonic() - began < 10

    def test_threads_of_a_process_share_one_query(self, shared: Database, account: str) -> None:
        limiter = limiter_of(shared, account, RateWindow(1, DAY))
        go(limiter)
        first, second = limiter.acquire("p", 1), limiter.acquire("p", 1)
        assert (second.reason, second.number) == (first.reason, 0)
        assert first.wait - 1 < second.wait < first.wait

    def test_python_and_sql_agree_on_budgets(self, shared: Database, account: str) -> None:
        """The function in the database has its own copy of the threshold."""
        for seconds, wait in ((BUDGET_SECONDS - 1, BUDGET_SECONDS / 8), (BUDGET_SECONDS, BUDGET_SECONDS)):
            limiter = limiter_of(shared, f"{account}{seconds}", RateWindow(1, seconds))
            go(limiter)
            assert limiter.acquire("p", 1).wait == pytest.approx(wait, rel=0.001)


class TestPenalty:
    def test_it_applies_to_all_processes(self, shared: Database, account: str) -> None:
        one, other = (limiter_of(shared, account, RateWindow(9)) for _ in range(2))
        go(other)
        one.cool_down("p", 0.3)
        one.cool_down("p", 0.1)
        permit = other.acquire("p", 1)
        assert permit.reason == "demanded by the provider: wait"
        assert 0.2 < permit.wait <= 0.3
        time.sleep(permit.wait)
        go(other)
        go(one)

    def test_it_applies_without_a_limit(self, shared: Database, account: str) -> None:
        limiter_of(shared, account).cool_down("p", 30)
        assert 29 < limiter_of(shared, account).acquire("p", 1).wait <= 30
        assert limiter_of(shared, account + "2").acquire("p", 1).wait == GO


class TestADay:
    """No wait lasts longer, whatever a provider requests, and whatever was stored before waits were bounded."""

    @pytest.mark.parametrize("named", [86_401.0, 3.2e9, 1e15, 1e300, math.inf])
    def test_a_penalty(self, shared: Database, account: str, named: float) -> None:
        limiter_of(shared, account).cool_down("p", named)
        permit = limiter_of(shared, account).acquire("p", 1)
        assert LONGEST_WAIT - 60 < permit.wait <= LONGEST_WAIT
        assert permit.reason == "demanded by the provider: wait"

    @pytest.mark.parametrize("named", [math.nan, -1.0, -1e300, -math.inf, 0.0])
    def test_an_invalid_penalty(self, shared: Database, account: str, named: float) -> None:
        limiter_of(shared, account).cool_down("p", named)
        go(limiter_of(shared, account))

    def test_a_stored_wait_of_a_century_ends_after_a_day(self, shared: Database, account: str) -> None:
        """It is shortened in the table when it is read: it must not stay a day ahead permanently."""
        limiter = limiter_of(shared, account)
        limiter.cool_down("p", 30)
        execute(shared, f"UPDATE fks.pacing SET closed_until = '2126-01-01' WHERE account = '{account}'")
        permit = limiter.acquire("p", 1)
        assert LONGEST_WAIT - 60 < permit.wait <= LONGEST_WAIT
        assert self.days_ahead(shared, account, "closed_until") <= 1
        time.sleep(0.02)
        assert limiter_of(shared, account).acquire("p", 1).wait < permit.wait
        limiter.cool_down("p", 30)
        assert self.days_ahead(shared, account, "closed_until") <= 1, "a new wait does not lengthen it"

    def test_a_stored_cool_down_of_a_century_ends_after_a_day(self, shared: Database, account: str) -> None:
        circuit = SharedCircuit(shared, {"p": RateLimits((), account)})
        for _ in range(5):
            circuit.failed("p", "p: answered 503")
        execute(shared, f"UPDATE fks.pacing SET resting_until = '2126-01-01' WHERE account = '{account}'")
        first = circuit.closed_for("p")
        assert first is not None
        assert LONGEST_WAIT - 60 < first.seconds <= LONGEST_WAIT
        assert self.days_ahead(shared, account, "resting_until") <= 1
        [[closed]] = fetch(shared, f"SELECT closed_until FROM fks.pacing WHERE account = '{account}'")
        assert closed is None, "what was not closed is not closed by it"

    def test_a_report_shows_a_day_at_most(self, database: Database) -> None:
        execute(database, "INSERT INTO fks.pacing VALUES ('p', '', '2126-01-01', 9, '2126-01-01', 'p: no')")
        [state] = provider_states(database)
        assert state.told_to_wait == LONGEST_WAIT
        assert state.rest is not None
        assert state.rest.seconds == LONGEST_WAIT

    @staticmethod
    def days_ahead(database: Database, account: str, column: str) -> float:
        query = f"SELECT extract(epoch FROM {column} - clock_timestamp()) / 86400 FROM fks.pacing"
        [[days]] = fetch(database, f"{query} WHERE account = '{account}'")
        return float(days)


class TestReset:
    def test_it_ends_waits_and_failures(self, shared: Database, account: str) -> None:
        other = f"{account}-2"
        circuit = SharedCircuit(shared, {"p": RateLimits((), account)})
        for _ in range(5):
            circuit.failed("p", "p: answered 503")
        for one in (account, other):
            limiter_of(shared, one).cool_down("p", 1e9)
        ended = reset(shared, "p", account)
        assert ended is not None
        assert ended.told_to_wait == pytest.approx(LONGEST_WAIT, abs=60)
        assert ended.rest is not None
        assert 0 < ended.rest.seconds <= 60
        assert (ended.failures, ended.reason) == (5, "p: answered 503")
        go(limiter_of(shared, account))
        assert circuit.closed_for("p") is None
        assert limiter_of(shared, other).acquire("p", 1).wait > 0, "another account stays as it is"
        circuit.failed("p", "p: answered 503")
        assert circuit.closed_for("p") is None, "failures are counted from the beginning"
        assert reset(shared, "p", account) is not None, "one failure is something to forget"
        assert reset(shared, "p", account) is None

    def test_used_permits_still_count(self, shared: Database, account: str) -> None:
        limiter = limiter_of(shared, account, RateWindow(1, DAY))
        go(limiter)
        limiter.cool_down("p", 60)
        assert reset(shared, "p", account) is not None
        assert (
            limiter_of(shared, account, RateWindow(1, DAY)).acquire("p", 1).reason
            != "demanded by the provider: wait"
        )
        assert limiter_of(shared, account, RateWindow(1, DAY)).acquire("p", 1).wait > 0

    def test_processes_with_a_cached_wait_notice(
        self, shared: Database, account: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rate_limits, "REMEMBERED_SECONDS", 0.05)
        limiter = limiter_of(shared, account)
        limiter.cool_down("p", 3600)
        assert limiter.acquire("p", 1).wait > 3500
        reset(shared, "p", account)
        deadline = time.monotonic() + 20
        while limiter.acquire("p", 1).wait:
            assert time.monotonic() < deadline
            time.sleep(0.01)


class TestCircuit:
    @pytest.fixture
    def circuit(self, shared: Database, account: str) -> SharedCircuit:
        return SharedCircuit(shared, {"p": RateLimits((), account)})

    @contextmanager
    def end_cool_down(self, database: Database, account: str) -> Iterator[None]:
        execute(database, f"UPDATE fks.pacing SET resting_until = now() WHERE account = '{account}'")
        yield

    def fail(self, circuit: SharedCircuit, times: int) -> CoolDown | None:
        for n in range(times):
            circuit.failed("p", f"p: answered 503 ({n + 1})")
        return circuit.closed_for("p")

    def test_five_failures_in_a_row(self, circuit: SharedCircuit, shared: Database, account: str) -> None:
        assert circuit.closed_for("p") is None
        assert self.fail(circuit, 4) is None
        other = SharedCircuit(shared, {"p": RateLimits((), account)})
        rest = self.fail(other, 1)
        assert rest is not None
        assert 59 < rest.seconds <= 60
        assert rest.reason == "failed 5 times in a row, last error: p: answered 503 (1)"
        assert circuit.closed_for("q") is None

    def test_a_success_between_them(self, circuit: SharedCircuit) -> None:
        assert self.fail(circuit, 4) is None
        circuit.succeeded("p")
        assert self.fail(circuit, 4) is None
        assert self.fail(circuit, 1) is not None
        circuit.succeeded("p")
        assert circuit.closed_for("p") is None

    def test_the_circuit_reports_opening_and_closing_once(self, circuit: SharedCircuit) -> None:
        reports = [circuit.failed("p", "p: answered 503") for _ in range(7)]
        assert [rest is not None for rest in reports] == [False] * 4 + [True] + [False] * 2
        assert reports[4] is not None
        assert 59 < reports[4].seconds <= 60
        assert reports[4].reason == "failed 5 times in a row, last error: p: answered 503"
        assert [circuit.succeeded("p"), circuit.succeeded("p")] == [True, False]
        circuit.failed("p", "p: answered 503")
        assert circuit.succeeded("p") is False, "one failure does not open the circuit"

    def test_cool_downs_double_up_to_an_hour(
        self, circuit: SharedCircuit, shared: Database, account: str
    ) -> None:
        self.fail(circuit, 4)
        cool_downs = []
        for _ in range(9):
            rest = self.fail(circuit, 1)
            assert rest is not None
            cool_downs.append(round(rest.seconds))
            with self.end_cool_down(shared, account):
                assert circuit.closed_for("p") is None
        assert cool_downs == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]

    def test_failures_during_a_cool_down_do_not_count(self, circuit: SharedCircuit) -> None:
        rest = self.fail(circuit, 9)
        assert rest is not None
        assert rest.seconds <= 60
        assert "5 times" in rest.reason


def test_provider_states(database: Database) -> None:
    assert provider_states(database) == []
    rate_limits = {"a": RateLimits((), "1"), "b": RateLimits((), "2")}
    circuit, limiter = SharedCircuit(database, rate_limits), SharedLimiter(database, rate_limits)
    for _ in range(5):
        circuit.failed("b", "b: no answer")
    circuit.failed("a", "a: no answer")
    limiter.cool_down("a", 40)
    first, second = provider_states(database)
    assert (first.provider, first.account, first.failures, first.rest) == ("a", "1", 1, None)
    assert first.told_to_wait == pytest.approx(40, abs=2)
    assert (second.provider, second.failures, second.told_to_wait) == ("b", 5, None)
    assert second.rest is not None
    assert second.rest.seconds == pytest.approx(60, abs=2)
