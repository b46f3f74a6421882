"""Concatenated responses: seams, overlaps and progress."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.providers.base import InvalidResponse
from fks_backfill_dagster.providers.pages import Chain, agreeing, contradicting, joined
from fks_backfill_dagster_tests.providers.scripted import candles_at

MINUTE = 60_000_000


def page(*minutes: int, symbol: str = "X") -> Candles:
    return candles_at(np.array(minutes, dtype=np.int64) * MINUTE, symbol)


def seams(*pages: Candles) -> list[int]:
    return list(joined(pages)[1] // MINUTE)


class TestJoined:
    def test_a_seam_is_the_first_row_of_a_later_response(self) -> None:
        assert seams(page(1, 2), page(3, 4), page(7)) == [3, 7]
        assert seams(page(3, 4), page(1, 2)) == [3]
        assert seams(page(), page(1, 2), page(), page(3)) == [3]
        assert seams(page(1, 2)) == seams() == seams(page()) == []

    def test_a_response_inside_another_begins_and_ends_at_seams(self) -> None:
        assert seams(page(1, 2, 5, 6), page(3, 4)) == [3, 5]

    @given(st.lists(st.sets(st.integers(0, 40)), max_size=5))
    def test_between_two_seams_all_rows_are_of_one_response(self, minutes: list[set[int]]) -> None:
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
        """The result for these responses to the first and the second request, and the requested pages."""
        requested: list[list[int]] = []

        def request(some: Sequence[int]) -> Sequence[Candles]:
            requested.append(list(some))
            return answers[len(requested) - 1]

        return agreeing(range(len(answers[0])), request), requested

    def test_pages_that_agree_are_requested_once(self) -> None:
        found, requested = self.requests([page(1, 2, 3), page(3, 4), page(5)])
        assert requested == [[0, 1, 2]]
        assert found is not None
        assert len(found) == 3

    def test_neighbours_that_differ_are_requested_once_more(self) -> None:
        first = [page(1, 2), page(2, 3, symbol="ETH"), page(4)]
        found, requested = self.requests(first, [page(1, 2), page(2, 3)])
        assert requested == [[0, 1, 2], [0, 1]]
        assert found is not None
        assert joined(found)[0].equals(joined([page(1, 2), page(2, 3), page(4)])[0])

    def test_neighbours_that_still_differ_are_rejected(self) -> None:
        first = [page(1, 2), page(2, 3, symbol="ETH")]
        assert self.requests(first, first)[0] is None

    def test_missing_values_are_equal(self) -> None:
        one, other = page(1, 2), page(2, 3)
        one.volume[:] = other.volume[:] = np.nan
        assert contradicting([one, other]) == []


def chain(candles: int = 100, page_size: int = 50) -> Chain:
    return Chain("p", "http://host/path", TimeRange(0, candles * MINUTE), candles, page_size)


class TestChain:
    def test_honest_pages_of_any_size(self) -> None:
        for size in (1, 7, 50, 100):
            # Small pages are legitimate too, if there are few.
            made = chain(100 if size > 1 else 10)
            for first in range(0, made.candles, size):
                assert not made.is_done(page(*range(first, min(first + size, made.candles))).ts)

    def test_it_is_done_beyond_the_range(self) -> None:
        made = chain()
        assert not made.is_done(page(98, 99).ts)
        assert made.is_done(page(99, 100).ts)

    @pytest.mark.parametrize("again", [page(0, 1, 2), page(1, 2), page(2), page()], ids=len)
    def test_a_few_pages_without_a_newer_bar_are_accepted(self, again: Candles) -> None:
        made = chain()
        made.is_done(page(0, 1, 2).ts)
        for _ in range(3):
            made.is_done(again.ts)
        with pytest.raises(InvalidResponse, match="the last 4 of 5 pages had no newer bar"):
            made.is_done(again.ts)

    def test_a_newer_bar_ends_a_stretch_without_one(self) -> None:
        made = chain()
        for minute in range(5):
            made.is_done(page(minute).ts)
            for _ in range(3):
                made.is_done(page().ts)
        assert made.pages == 20

    def test_the_number_of_pages_is_limited_by_the_range(self) -> None:
        made = chain(100)
        for minute in range(20):
            made.is_done(page(minute).ts)
        with pytest.raises(InvalidResponse, match="21 pages had 21 bars, for a range of at most 100"):
            made.is_done(page(20).ts)

    def test_the_number_of_rows_is_limited_by_the_range(self) -> None:
        """Each page repeats all previous bars and has a newer one."""
        made = chain(100, 50)
        for minute in range(50, 55):
            made.is_done(page(*range(minute)).ts)
        with pytest.raises(InvalidResponse, match="6 pages had 315 bars, for a range of at most 100"):
            made.is_done(page(*range(55)).ts)
