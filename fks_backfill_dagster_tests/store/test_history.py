"""Any sequence of commits, withdrawals, undos, and undos of undos, against a model that keeps every version.

After each step: candles, totals, ledger, corrections, the missing ranges of a plan, and an audit. At the end:
`ohlcv_as_of` returns every former state, at every recorded moment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.timeframe import to_datetime
from fks_backfill_dagster.ledger.gaps import find_gaps
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.writer.records import Committed, Withdrawal
from fks_backfill_dagster_tests.examples import examples
from fks_backfill_dagster_tests.store.builders import Shelf, brought, candles_at, origin_of
from fks_backfill_dagster_tests.store.conftest import fresh

CANDLES = 24

State = dict[int, int]  # the version of each stored candle


@dataclass
class Model:
    """Per candle its states, oldest first, as pairs (batch, version); the version of a withdrawal is None.

    A candle is stored if the last of its states whose batch is in effect has a version. `provider`: of each batch.
    `undoes`: of each undo the batch that it undoes; `stored_as`: its id in the database.
    """

    versions: dict[int, list[tuple[int, int | None]]] = field(default_factory=dict)
    provider: dict[int, str] = field(default_factory=dict)
    synced: set[int] = field(default_factory=set)
    changes: int = 0
    undoes: dict[int, int] = field(default_factory=dict)
    stored_as: dict[int, int] = field(default_factory=dict)
    useful: set[int] = field(default_factory=set)

    def is_in_effect(self, batch: int) -> bool:
        return not any(self.is_in_effect(undo) for undo, of in self.undoes.items() if of == batch)

    def top(self, n: int) -> tuple[int, int] | None:
        """The stored state of a candle."""
        kept = [one for one in self.versions.get(n, []) if self.is_in_effect(one[0])]
        batch, version = kept[-1] if kept else (0, None)
        return None if version is None else (batch, version)

    def state(self) -> State:
        tops = {n: self.top(n) for n in sorted(self.versions)}
        return {n: top[1] for n, top in tops.items() if top is not None}

    def commit(self, first: int, past: int, given: dict[int, int], version: int) -> Committed:
        """`given`: the batch that delivers each candle."""
        self.synced |= set(range(first, past))
        inserted = updated = 0
        for n, batch in given.items():
            top = self.top(n)
            if top is not None and top[1] == version:
                continue
            inserted, updated = inserted + (top is None), updated + (top is not None)
            self.versions.setdefault(n, []).append((batch, version))
            self.useful.add(batch)
        self.changes += updated
        return Committed(inserted, updated, len(set(range(first, past)) - set(self.state())))

    def withdraw(self, batch: int, opens: set[int], provider: str) -> int:
        """Returns the number of withdrawn candles: those that the provider delivered."""
        gone = 0
        for n in opens & set(self.state()):
            top = self.top(n)
            if top is not None and self.provider[top[0]] == provider:
                self.versions[n].append((batch, None))
                self.useful.add(batch)
                gone += 1
        self.changes += gone
        return gone

    def undo(self, number: int, batch: int) -> int:
        """Returns the number of changed candles."""
        before = {n: self.top(n) for n in self.versions}
        self.undoes[number] = batch
        changed = sum(top != self.top(n) for n, top in before.items())
        self.changes += changed
        return changed


COMMIT = st.tuples(
    st.just("commit"),
    st.integers(0, CANDLES - 1),
    st.integers(1, 12),
    st.sets(st.integers(0, CANDLES), max_size=6),  # left out
    st.integers(0, 3),  # version
    st.integers(1, 3),  # every n-th candle comes from the second provider
)
UNDO = st.tuples(st.just("undo"), st.integers(0, 20))
WITHDRAW = st.tuples(
    st.just("withdraw"),
    st.sets(st.integers(0, CANDLES - 1), min_size=1, max_size=12),
    st.sampled_from(["binance", "polygon"]),
)


@given(st.lists(COMMIT | WITHDRAW | UNDO, min_size=2, max_size=9))
@example(
    # The state below a withdrawal is undone, then a candle that came after it, then the withdrawal itself.
    [
        ("commit", 0, 4, set(), 0, 1),
        ("withdraw", {1, 2}, "polygon"),
        ("commit", 1, 2, set(), 2, 1),
        ("undo", 1),
        ("undo", 1),
        ("withdraw", {1, 2}, "polygon"),
        ("undo", 1),
    ]
)
@settings(max_examples=examples(40))
def test_any_history(shared: Database, steps: list[tuple[object, ...]]) -> None:
    shelf, model = Shelf.of(shared, fresh("1h")), Model()
    remembered: list[tuple[datetime, State]] = [(shelf.now(), {})]
    for number, step in enumerate(steps):
        match step:
            case ("commit", int(first), int(length), set(without), int(version), int(every)):
                commit(shelf, model, number, first, min(first + length, CANDLES), without, version, every)
            case ("withdraw", set(opens), str(provider)):
                withdraw(shelf, model, number, opens, provider)
            case ("undo", int(which)):
                undo(shelf, model, number, which)
        check(shelf, model)
        remembered.append((shelf.now(), model.state()))
    for moment, state in remembered:
        assert shelf.read(moment).equals(candles_of(shelf, state))
    for stamp in {b.committed_at for b in queries.batches(shared, shelf.series)}:
        # The time of a commit includes it, the microsecond before does not.
        after = next(state for moment, state in remembered if moment >= stamp)
        before = [state for moment, state in remembered if moment < stamp][-1]
        assert shelf.read(stamp).equals(candles_of(shelf, after))
        assert shelf.read(stamp - timedelta(microseconds=1)).equals(candles_of(shelf, before))


def commit(
    shelf: Shelf,
    model: Model,
    number: int,
    first: int,
    past: int,
    without: set[int],
    version: int,
    every: int,
) -> None:
    opens = shelf.opens(0, CANDLES)
    origin = {n: 2 * number + (n % every == 0) for n in range(first, past) if n not in without}
    model.provider |= {2 * number: "binance", 2 * number + 1: "polygon"}
    expected = model.commit(first, past, origin, version)
    deliveries = [
        brought(
            candles_at(opens[[n for n, b in origin.items() if b == batch]], version), name, f"model {batch}"
        )
        for batch, name in ((2 * number, "binance"), (2 * number + 1, "polygon"))
    ]
    assert shelf.commit(shelf.span(first, past), *deliveries) == expected


def withdraw(shelf: Shelf, model: Model, number: int, opens: set[int], provider: str) -> None:
    """The response covers the whole span of the opens, which becomes synced."""
    batch = 2 * number
    first, past = min(opens), max(opens) + 1
    gone = model.withdraw(batch, opens, provider)
    model.synced |= set(range(first, past))
    withdrawal = Withdrawal(origin_of(provider, f"model {batch}"), shelf.opens(0, CANDLES)[sorted(opens)])
    done = shelf.commit(shelf.span(first, past), withdrawn=(withdrawal,))
    missing = len(set(range(first, past)) - set(model.state()))
    assert done == Committed(0, 0, missing, withdrawn=gone)


def undo(shelf: Shelf, model: Model, number: int, which: int) -> None:
    """Undoes a batch in effect, which may be an undo: those have numbers from 1000 on."""
    wanted = [one for one in sorted(model.useful | model.undoes.keys()) if model.is_in_effect(one)]
    if not wanted:
        return
    batch = wanted[which % len(wanted)]
    identity = model.stored_as.get(batch) or next(
        b.id for b in queries.batches(shelf.database, shelf.series) if b.source == f"model {batch}"
    )
    changed = model.undo(1000 + number, batch)
    done = shelf.undo(identity)
    model.stored_as[1000 + number] = shelf.batches()[-1]
    assert (done.inserted, done.updated) == (0, changed)


def check(shelf: Shelf, model: Model) -> None:
    state, opens = model.state(), shelf.opens(0, CANDLES)
    stored = candles_of(shelf, state)
    assert shelf.read().equals(stored)
    status = shelf.status()
    assert status.total_candles == len(state)
    ends = (stored.ts[0], stored.ts[-1]) if state else (None, None)
    assert (status.oldest_data_time, status.newest_data_time) == tuple(
        None if ts is None else to_datetime(int(ts)) for ts in ends
    )
    absent = opens[sorted(model.synced - set(state))]
    assert [(g.start, g.end, g.missing) for g in shelf.gaps()] == [
        (g.start, g.end, g.missing) for g in find_gaps(absent, shelf.grid)
    ]
    assert status.open_gaps == len(shelf.gaps())
    never = opens[sorted(set(range(CANDLES)) - model.synced)]
    missing = shelf.missing()
    ours = missing[(missing >= opens[0]) & (missing <= opens[-1])]
    assert ours.tolist() == sorted([*absent.tolist(), *never.tolist()])
    ((changes,),) = shelf.rows(
        "SELECT count(*) FROM fks.corrections WHERE symbol = :symbol AND timeframe = :timeframe"
    )
    assert changes == model.changes
    lineage = {b.source for b in queries.batches(shelf.database, shelf.series) if b.undoes is None}
    assert lineage == {f"model {batch}" for batch in model.useful}
    audited = shelf.audit()
    assert audited.differences == ()
    assert (audited.candles, audited.expected, audited.missing, audited.explained) == (
        len(state),
        len(model.synced),
        len(absent),
        0,
    )


def candles_of(shelf: Shelf, state: State) -> Candles:
    opens = shelf.opens(0, CANDLES)
    parts = [
        candles_at(opens[np.array([n for n, v in state.items() if v == version], dtype=np.int64)], version)
        for version in range(4)
    ]
    return Candles.concat(parts).sorted()
