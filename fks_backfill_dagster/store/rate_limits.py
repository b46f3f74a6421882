"""One limit per provider and account for all processes and machines, and the providers left alone.

Belongs here: the limiter and the circuit that are shared through the database, a look at both, and their reset
by hand. The counting itself is the function `fks.pace_admit` (revision 0002), one round trip by the database's clock.
Does not belong here: what the limits are (providers), when a provider has failed (pipeline).

A limit holds strictly in any window, as the provider counts: docs/adr/0010-rate-limit-in-sql.md.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace

import sqlalchemy as sa

from fks_backfill_dagster.domain.rate_limits import LONGEST_WAIT, Pace, Rest, Turn, bounded_wait
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import repeated

# So many failures in a row, over all processes and each after its own retries, let a provider rest: for
# FIRST_REST seconds, and twice as long with every further failure, up to LONGEST_REST.
FAILURES = 5
FIRST_REST = 60
LONGEST_REST = 3600

# For so long a process remembers what the database told it to wait: not to the end, which may come sooner by hand.
REMEMBERED_SECONDS = 5.0

_ADMIT = sa.text(
    "SELECT wait_ms, closed, bound_by, admitted FROM fks.pace_admit(:provider, :account, :owner, :weight,"
    " CAST(:limits AS integer[]), CAST(:windows AS bigint[]), :longest)"
)
_OVER = sa.text("UPDATE fks.pacing_request SET over_at = clock_timestamp() WHERE number = :number")
_PENALISE = sa.text(
    "INSERT INTO fks.pacing AS p (provider, account, closed_until)"
    " VALUES (:provider, :account, clock_timestamp() + :seconds * interval '1 second')"
    " ON CONFLICT (provider, account)"
    " DO UPDATE SET closed_until = greatest(p.closed_until, excluded.closed_until)"
)
# A table written before waits were bounded may hold a century. It is shortened in the table as soon as a request
# meets it: shortened only where it is read, it would stay a day ahead permanently.
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
        resting_until = CASE WHEN p.failures + 1 >= :patience THEN clock_timestamp() + interval '1 second'
            * least(CAST(:longest AS float8), :first * 2 ^ least(p.failures + 1 - :patience, 20)) END
    -- Who failed while it rests had asked before: one failure, not one for each process.
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
_RESTING = sa.text(
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

    Processes take turns while they wait, whatever the number of their threads. A provider that is not
    in `paces` has no limit and only obeys penalties. Every method may raise StoreError. A permit whose connection
    was lost before it arrived counts as used until it expires.
    """

    def __init__(self, database: Database, paces: Mapping[str, Pace]) -> None:
        self._database = database
        self._paces = dict(paces)
        self._owner = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._told: dict[str, tuple[float, Turn]] = {}  # when, and what

    @repeated
    def admit(self, provider: str, weight: int) -> Turn:
        if turn := self._as_told(provider):
            return turn
        pace = self._paces.get(provider, Pace())
        with self._database.autocommit() as connection:
            asked = {
                "provider": provider,
                "account": pace.account,
                "owner": self._owner,
                "weight": weight,
                "limits": [window.limit for window in pace.windows],
                "windows": [round(window.seconds * 1000) for window in pace.windows],
                "longest": pace.longest * 1000,
            }
            wait_ms, closed, bound_by, number = connection.execute(_ADMIT, asked).one()
            if not wait_ms:
                return Turn(number=number)
            wait = wait_ms / 1000
            if closed and wait > LONGEST_WAIT:
                _shorten(connection, provider, pace.account)
                wait = LONGEST_WAIT
        turn = Turn(wait, "told us to wait" if closed else pace.windows[bound_by - 1].reason)
        with self._lock:
            self._told[provider] = (time.monotonic(), turn)
        return turn

    @repeated
    def over(self, turn: Turn) -> None:
        if turn.number:
            with self._database.autocommit() as connection:
                connection.execute(_OVER, {"number": turn.number})

    @repeated
    def penalise(self, provider: str, seconds: float) -> None:
        account = self._paces.get(provider, Pace()).account
        with self._database.autocommit() as connection:
            named = {"provider": provider, "account": account, "seconds": bounded_wait(seconds)}
            connection.execute(_PENALISE, named)

    def _as_told(self, provider: str) -> Turn | None:
        """What another thread was told a moment ago holds for this one too, so that the database is asked once."""
        with self._lock:
            told_at, turn = self._told.get(provider, (0.0, Turn()))
        ago = time.monotonic() - told_at
        return replace(turn, wait=turn.wait - ago) if ago < min(turn.wait, REMEMBERED_SECONDS) else None


class SharedCircuit:
    """A Circuit (providers/base.py) that all processes on this database share."""

    def __init__(self, database: Database, paces: Mapping[str, Pace]) -> None:
        self._database = database
        self._accounts = {name: pace.account for name, pace in paces.items()}

    @repeated
    def closed_for(self, provider: str) -> Rest | None:
        with self._database.autocommit() as connection:
            row = connection.execute(_RESTING, self._who(provider)).one_or_none()
            if row is not None and row[0] > LONGEST_WAIT:
                _shorten(connection, provider, self._accounts.get(provider, ""))
        return None if row is None else _rest(row[0], row[1], row[2])

    @repeated
    def failed(self, provider: str, reason: str) -> Rest | None:
        with self._database.autocommit() as connection:
            row = connection.execute(
                _FAILED,
                self._who(provider)
                | {"reason": reason, "patience": FAILURES, "first": FIRST_REST, "longest": LONGEST_REST},
            ).one_or_none()
        return None if row is None or row[0] is None else _rest(row[0], row[1], row[2])

    @repeated
    def succeeded(self, provider: str) -> bool:
        with self._database.autocommit() as connection:
            return bool(connection.scalar(_SUCCEEDED, self._who(provider)))

    def _who(self, provider: str) -> dict[str, object]:
        return {"provider": provider, "account": self._accounts.get(provider, "")}


@dataclass(frozen=True, slots=True)
class ProviderState:
    """How one account stands with its provider now.

    `told_to_wait`: seconds for which the provider wants no request. `rest`: set while it is left alone.
    `failures`: in a row, up to now, with the `reason` of the last one.
    """

    provider: str
    account: str
    failures: int
    reason: str | None
    told_to_wait: float | None
    rest: Rest | None

    @property
    def is_out(self) -> bool:
        """Whether it is not asked now."""
        return self.rest is not None or self.told_to_wait is not None


def provider_states(database: Database) -> list[ProviderState]:
    """Every account that was ever told to wait or failed, by provider."""
    with database.begin() as connection:
        rows = connection.execute(_STATES).all()
    return [_state(*row) for row in rows]


def reset(database: Database, provider: str, account: str) -> ProviderState | None:
    """Ends every wait of this account and forgets its failures; what it spent of its limits still counts.

    Returns how it stood; None where there was nothing to end. Other processes notice with their next request,
    those that are waiting after some seconds.
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
    resting: float | None,
) -> ProviderState:
    return ProviderState(
        provider,
        account,
        failures,
        reason,
        bounded_wait(closed) if closed is not None and closed > 0 else None,
        _rest(resting, failures, reason) if resting is not None and resting > 0 else None,
    )


def _rest(seconds: float, failures: int, reason: str | None) -> Rest:
    return Rest(bounded_wait(seconds), f"it failed {failures} times in a row, at last: {reason}")


def _shorten(connection: sa.Connection, provider: str, account: str) -> None:
    """Cuts what was stored before waits were bounded to a day from now."""
    connection.execute(_SHORTEN, {"provider": provider, "account": account, "longest": LONGEST_WAIT})
