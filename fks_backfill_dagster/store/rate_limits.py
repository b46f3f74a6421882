"""Rate limits and circuits per provider and account, shared by all processes and machines.

Belongs here: the limiter and the circuit that are shared through the database, their state, and their manual reset.
The counting itself is the function `fks.pace_admit` (revision 0002), one round trip by the database's clock.
Does not belong here: the limits themselves (providers), what counts as a failure (pipeline).

A limit holds strictly in every window, as the provider counts: docs/adr/0010-rate-limit-in-sql.md.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace

import sqlalchemy as sa

from fks_backfill_dagster.domain.rate_limits import LONGEST_WAIT, CoolDown, Permit, RateLimits, bounded_wait
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import repeated

# After this many consecutive failures, over all processes and each after its own retries, the circuit opens: for
# FIRST_REST seconds, and twice as long with every further failure, up to LONGEST_REST.
FAILURES = 5
FIRST_REST = 60
LONGEST_REST = 3600

# How long a process caches a wait that the database returned: not to its end, because a manual reset may end it sooner.
REMEMBERED_SECONDS = 5.0

_ADMIT = sa.text(
    "SELECT wait_ms, closed, bound_by, admitted FROM fks.pace_admit(:provider, :account, :owner, :weight,"
    " CAST(:limits AS integer[]), CAST(:windows AS bigint[]), :longest)"
)
_RELEASE = sa.text("UPDATE fks.pacing_request SET over_at = clock_timestamp() WHERE number = :number")
_PENALISE = sa.text(
    "INSERT INTO fks.pacing AS p (provider, account, closed_until)"
    " VALUES (:provider, :account, clock_timestamp() + :seconds * interval '1 second')"
    " ON CONFLICT (provider, account)"
    " DO UPDATE SET closed_until = greatest(p.closed_until, excluded.closed_until)"
)
# A row from before waits were bounded may hold a wait of a century. It is shortened in the table as soon as a request
# reads it: shortened only on reading, it would stay a day ahead permanently.
_SHORTEN = sa.text(
    """
    UPDATE fks.pacing p SET
        closed_until = CASE WHEN p.closed_until > l.until THEN l.until ELSE p.closed_until END,
        resting_until = CASE WHEN p.resting_until > l.until THEN l.until ELSE p.resting_until END
    FROM (SELECT clock_timestamp() + :longest * interval '1 second' AS until) l
    WHERE provider = :provider AND account = :account AND (p.closed_until > l.until OR p.resting_until > l.until)
    """
)
_RESET = sa.text(
    """
    DELETE FROM fks.pacing WHERE provider = :provider AND account = :account
    RETURNING provider, account, failures, reason,
              CAST(extract(epoch FROM closed_until - clock_timestamp()) AS float8),
              CAST(extract(epoch FROM resting_until - clock_timestamp()) AS float8)
    """
)
_FAILED = sa.text(
    """
    INSERT INTO fks.pacing AS p (provider, account, failures, reason)
    VALUES (:provider, :account, 1, :reason)
    ON CONFLICT (provider, account) DO UPDATE SET
        failures = p.failures + 1,
        reason = excluded.reason,
        resting_until = CASE WHEN p.failures + 1 >= :threshold THEN clock_timestamp() + interval '1 second'
            * least(CAST(:longest AS float8), :first * 2 ^ least(p.failures + 1 - :threshold, 20)) END
    -- A failure while the circuit is open comes from a request sent before: all processes count as one failure.
    WHERE coalesce(p.resting_until <= clock_timestamp(), true)
    RETURNING CAST(extract(epoch FROM p.resting_until - clock_timestamp()) AS float8), p.failures, p.reason
    """
)
_SUCCEEDED = sa.text(
    """
    UPDATE fks.pacing p SET failures = 0, resting_until = NULL, reason = NULL
    FROM (SELECT provider, account, resting_until FROM fks.pacing
          WHERE provider = :provider AND account = :account AND failures > 0 FOR UPDATE) before
    WHERE p.provider = before.provider AND p.account = before.account
    RETURNING before.resting_until IS NOT NULL
    """
)
_COOL_DOWN = sa.text(
    "SELECT CAST(extract(epoch FROM resting_until - clock_timestamp()) AS float8), failures, reason"
    " FROM fks.pacing"
    " WHERE provider = :provider AND account = :account AND resting_until > clock_timestamp()"
)
_STATES = sa.text(
    """
    SELECT provider, account, failures, reason,
           CAST(extract(epoch FROM closed_until - clock_timestamp()) AS float8),
           CAST(extract(epoch FROM resting_until - clock_timestamp()) AS float8)
    FROM fks.pacing ORDER BY provider, account
    """
)


class SharedLimiter:
    """A Limiter (providers/http/limiter.py) that all processes on this database share.

    Waiting processes get permits in turn, whatever the number of their threads. A provider that is not in `rate_limits`
    has no rate limit, only cool-downs. Every method may raise StoreError. A permit whose connection was lost before
    it arrived counts as used until it expires.
    """

    def __init__(self, database: Database, rate_limits: Mapping[str, RateLimits]) -> None:
        self._database = database
        self._rate_limits = dict(rate_limits)
        self._owner = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._cached: dict[str, tuple[float, Permit]] = {}  # by provider: time of the response, response

    @repeated
    def acquire(self, provider: str, weight: int) -> Permit:
        if permit := self._cached_wait(provider):
            return permit
        limits = self._rate_limits.get(provider, RateLimits())
        with self._database.autocommit() as connection:
            parameters = {
                "provider": provider,
                "account": limits.account,
                "owner": self._owner,
                "weight": weight,
                "limits": [window.limit for window in limits.windows],
                "windows": [round(window.seconds * 1000) for window in limits.windows],
                "longest": limits.longest * 1000,
            }
            wait_ms, closed, bound_by, number = connection.execute(_ADMIT, parameters).one()
            if not wait_ms:
                return Permit(number=number)
            wait = wait_ms / 1000
            if closed and wait > LONGEST_WAIT:
                _shorten(connection, provider, limits.account)
                wait = LONGEST_WAIT
        permit = Permit(
            wait, "demanded by the provider: wait" if closed else limits.windows[bound_by - 1].reason
        )
        with self._lock:
            self._cached[provider] = (time.monotonic(), permit)
        return permit

    @repeated
    def release(self, permit: Permit) -> None:
        if permit.number:
            with self._database.autocommit() as connection:
                connection.execute(_RELEASE, {"number": permit.number})

    @repeated
    def cool_down(self, provider: str, seconds: float) -> None:
        account = self._rate_limits.get(provider, RateLimits()).account
        with self._database.autocommit() as connection:
            named = {"provider": provider, "account": account, "seconds": bounded_wait(seconds)}
            connection.execute(_PENALISE, named)

    def _cached_wait(self, provider: str) -> Permit | None:
        """A wait that another thread was given a moment ago: one query serves all threads."""
        with self._lock:
            received_at, permit = self._cached.get(provider, (0.0, Permit()))
        age = time.monotonic() - received_at
        return replace(permit, wait=permit.wait - age) if age < min(permit.wait, REMEMBERED_SECONDS) else None


class SharedCircuit:
    """A Circuit (providers/base.py) that all processes on this database share."""

    def __init__(self, database: Database, rate_limits: Mapping[str, RateLimits]) -> None:
        self._database = database
        self._accounts = {name: limits.account for name, limits in rate_limits.items()}

    @repeated
    def closed_for(self, provider: str) -> CoolDown | None:
        with self._database.autocommit() as connection:
            row = connection.execute(_COOL_DOWN, self._account(provider)).one_or_none()
            if row is not None and row[0] > LONGEST_WAIT:
                _shorten(connection, provider, self._accounts.get(provider, ""))
        return None if row is None else _rest(row[0], row[1], row[2])

    @repeated
    def failed(self, provider: str, reason: str) -> CoolDown | None:
        with self._database.autocommit() as connection:
            row = connection.execute(
                _FAILED,
                self._account(provider)
                | {"reason": reason, "threshold": FAILURES, "first": FIRST_REST, "longest": LONGEST_REST},
            ).one_or_none()
        return None if row is None or row[0] is None else _rest(row[0], row[1], row[2])

    @repeated
    def succeeded(self, provider: str) -> bool:
        with self._database.autocommit() as connection:
            return bool(connection.scalar(_SUCCEEDED, self._account(provider)))

    def _account(self, provider: str) -> dict[str, object]:
        return {"provider": provider, "account": self._accounts.get(provider, "")}


@dataclass(frozen=True, slots=True)
class ProviderState:
    """The state of one account at its provider.

    `told_to_wait`: seconds left of the wait that the provider requested. `rest`: set while the circuit is open.
    `failures`: consecutive ones up to now, with the `reason` of the last one.
    """

    provider: str
    account: str
    failures: int
    reason: str | None
    told_to_wait: float | None
    rest: CoolDown | None

    @property
    def is_out(self) -> bool:
        """Whether it gets no requests now."""
        return self.rest is not None or self.told_to_wait is not None


def provider_states(database: Database) -> list[ProviderState]:
    """Every account with a recorded wait or failure, by provider."""
    with database.begin() as connection:
        rows = connection.execute(_STATES).all()
    return [_state(*row) for row in rows]


def reset(database: Database, provider: str, account: str) -> ProviderState | None:
    """Ends every wait of this account and deletes its failures; its used permits still count.

    Returns its state before; None where there was nothing to reset. Other processes see the reset with their next
    request, waiting ones after some seconds.
    """
    with database.begin() as connection:
        row = connection.execute(_RESET, {"provider": provider, "account": account}).one_or_none()
    state = None if row is None else _state(*row)
    return state if state is not None and (state.is_out or state.failures) else None


def _state(
    provider: str,
    account: str,
    failures: int,
    reason: str | None,
    closed: float | None,
    cool_down: float | None,
) -> ProviderState:
    return ProviderState(
        provider,
        account,
        failures,
        reason,
        bounded_wait(closed) if closed is not None and closed > 0 else None,
        _rest(cool_down, failures, reason) if cool_down is not None and cool_down > 0 else None,
    )


def _rest(seconds: float, failures: int, reason: str | None) -> CoolDown:
    return CoolDown(bounded_wait(seconds), f"failed {failures} times in a row, last error: {reason}")


def _shorten(connection: sa.Connection, provider: str, account: str) -> None:
    """Shortens a wait that was stored before waits were bounded, to a day from now."""
    connection.execute(_SHORTEN, {"provider": provider, "account": account, "longest": LONGEST_WAIT})
