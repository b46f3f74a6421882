"""Responses put together: where each begins, and what their overlaps tell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.providers.pages import agreeing, contradicting, joined
from fks_backfill_dagster_tests.providers.scripted import candles_at

MINUTE = 60_000_000


def page(*minutes: int, symbol: str = "X") -> Candles:
    return candles_at(np.array(minutes, dtype=np.int64) * MINUTE, symbol)


def seams(*pages: Candles) -> list[int]:
    return (joined(pages)[1] // MINUTE).tolist()


class TestJoined:
    def test_a_seam_is_the_first_row_of_a_later_response(self) -> None:
        assert seams(page(1, 2), page(3, 4), page(7)) == [3, 7]
        assert seams(page(3, 4), page(1, 2)) == [3]
        assert seams(page(), page(1, 2), page(), page(3)) == [3]
        assert seams(page(1, 2)) == seams() == seams(page()) == []

    def test_a_response_inside_another_begins_and_ends_at_seams(self) -> None:
        assert seams(page(1, 2, 5, 6), page(3, 4)) == [3, 5]

    @given(st.lists(st.sets(st.integers(0, 40)), max_size=5))
    def test_between_two_seams_all_is_of_one_response(self, minutes: list[set[int]]) -> None:
        pages = [page(*sorted(some), symbol=str(at)) for at, some in enumerate(minutes)]
        rows, found = joined(pages)
        assert len(rows) == sum(map(len, pages))
        assert (np.diff(rows.ts) >= 0).all()
        assert not len(found) or int(found[0]) > int(rows.ts[0])
        if len(np.unique(rows.ts)) == len(rows):
            for part in np.split(np.arange(len(rows)), np.searchsorted(rows.ts, found)):
                owners = {at for at, one in enumerate(pages) if np.isin(rows.ts[part], one.ts).any()}
                assert len(owners) <= 1


class TestAgreeing:
    def requests(self, *answers: Sequence[Candles]) -> tuple[list[Candles] | None, list[list[int]]]:
        """What comes of these answers to the first and the second look, and what was requested."""
        asked: list[list[int]] = []

        def request(some: Sequence[int]) -> Sequence[Candles]:
            asked.append(list(some))
            return answers[len(asked) - 1]

        return agreeing(range(len(answers[0])), request), asked

    def test_pages_that_agree_are_requested_once(self) -> None:
        found, asked = self.requests([page(1, 2, 3), page(3, 4), page(5)])
        assert asked == [[0, 1, 2]]
        assert found is not None
        assert len(found) == 3

    def test_neighbours_that_differ_are_requested_once_more(self) -> None:
        first = [page(1, 2), page(2, 3, symbol="ETH"), page(4)]
        found, asked = self.requests(first, [page(1, 2), page(2, 3)])
        assert asked == [[0, 1, 2], [0, 1]]
        assert found is not None
        assert joined(found)[0].equals(joined([page(1, 2), page(2, 3), page(4)])[0])

    def test_and_then_given_up(self) -> None:
        first = [page(1, 2), page(2, 3, symbol="ETH")]
        assert self.requests(first, first)[0] is None

    def test_absent_values_are_the_same_value(self) -> None:
        one, other = page(1, 2), page(2, 3)
        one.volume[:] = other.volume[:] = np.nan
        assert contradicting([one, other]) == []
