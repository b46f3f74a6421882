"""Evidence that is added to a settlement: in which rows, and beside what."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.ledger.records import Evidence, LedgerGap, Outcome
from fks_backfill_dagster.ledger.settle import Settlement, with_evidence

UNDONE = Evidence("undo", 7, Outcome.UNDONE, "taken back by batch 3")
ABSENT = Evidence("binance", 5, Outcome.ABSENT)


@given(
    cuts=st.lists(st.integers(0, 60), min_size=2, max_size=12, unique=True).map(sorted),
    statuses=st.lists(st.sampled_from(GapStatus), min_size=12, max_size=12),
    opens=st.sets(st.integers(-5, 65)),
)
def test_exactly_the_unfilled_rows_with_one_of_the_opens(
    cuts: list[int], statuses: list[GapStatus], opens: set[int]
) -> None:
    rows = tuple(
        LedgerGap(first, past, past - first, status, evidence=(ABSENT,))
        for first, past, status in zip(cuts, cuts[1:], statuses, strict=False)
    )
    settlement = Settlement((1, 2), rows)
    found = with_evidence(settlement, UNDONE, np.array(sorted(opens), dtype=np.int64))
    assert found.removed == settlement.removed
    for row, new in zip(rows, found.added, strict=True):
        is_meant = row.status is not GapStatus.FILLED and any(row.start <= ts < row.end for ts in opens)
        assert new.evidence == ((ABSENT, UNDONE) if is_meant else (ABSENT,))
        assert (new.start, new.end, new.status) == (row.start, row.end, row.status)
        assert new.declined() == {"binance"}  # an undo is no response


def test_it_is_stored_like_any_other() -> None:
    assert Evidence.from_json(UNDONE.to_json()) == UNDONE
