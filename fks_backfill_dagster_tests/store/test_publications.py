"""Publications of one provider that disagree: the stored one does not depend on the order or the range."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.delivery import Delivery
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.writer.records import Committed
from fks_backfill_dagster_tests.examples import examples
from fks_backfill_dagster_tests.store.builders import MIDNIGHT, Shelf, archive, brought, candles_at
from fks_backfill_dagster_tests.store.conftest import fresh

DAY = MICROS_PER_DAY


def file(
    shelf: Shelf, first: int, past: int, version: int, published: int, provider: str = "binance"
) -> Delivery:
    """An archive that was published `published` days after MIDNIGHT, and fetched long after that."""
    candles = candles_at(shelf.opens(first, past), version)
    return archive(candles, MIDNIGHT + published * DAY, provider, requested_at=MIDNIGHT + 1000 * DAY)


def response(shelf: Shelf, first: int, past: int, version: int, requested: int) -> Delivery:
    return brought(candles_at(shelf.opens(first, past), version), requested_at=MIDNIGHT + requested * DAY)


def test_an_older_archive_replaces_nothing(hours: Shelf) -> None:
    """It replaces neither REST responses nor a later archive; its new candles are stored."""
    hours.commit(hours.span(0, 5), response(hours, 0, 5, 2, requested=10))
    hours.commit(hours.span(5, 10), file(hours, 5, 10, 4, published=8))
    before = (hours.batches(), hours.status(), hours.gaps())
    older = file(hours, 0, 10, 0, published=7)
    assert hours.commit(hours.span(0, 10), older) == Committed(0, 0, 0, outdated=10)
    assert hours.commit(hours.span(0, 10), older) == Committed(0, 0, 0, outdated=10)
    assert (hours.batches(), hours.status(), hours.gaps()) == before
    assert hours.rows("SELECT count(*) FROM fks.corrections WHERE symbol = :symbol") == [(0,)]
    assert hours.commit(hours.span(0, 12), file(hours, 0, 12, 0, published=7)) == Committed(
        2, 0, 0, outdated=10
    )
    assert hours.read().take(slice(0, 5)).equals(candles_at(hours.opens(0, 5), 2))
    assert hours.read().take(slice(5, 10)).equals(candles_at(hours.opens(5, 10), 4))
    assert hours.audit().differences == ()


def test_equal_candles_are_not_outdated(hours: Shelf) -> None:
    hours.commit(hours.span(0, 5), response(hours, 0, 5, 2, requested=10))
    assert hours.commit(hours.span(0, 5), file(hours, 0, 5, 2, published=7)) == Committed(0, 0, 0)


@pytest.mark.parametrize("published", [10, 11])
def test_an_archive_that_is_as_new_or_newer_replaces_candles(hours: Shelf, published: int) -> None:
    """The same file again with other content has the same time."""
    hours.commit(hours.span(0, 5), file(hours, 0, 5, 0, published=10))
    assert hours.commit(hours.span(0, 5), file(hours, 0, 5, 2, published=published)) == Committed(0, 5, 0)
    assert hours.read().equals(candles_at(hours.opens(0, 5), 2))


def test_a_response_replaces_any_stored_candle(hours: Shelf) -> None:
    """Its age is that of its request, even if a clock was set back since."""
    hours.commit(hours.span(0, 5), response(hours, 0, 5, 0, requested=10))
    assert hours.commit(hours.span(0, 5), response(hours, 0, 5, 2, requested=9)) == Committed(0, 5, 0)


def test_the_rule_holds_only_among_publications_of_one_provider(hours: Shelf) -> None:
    """Candles of another provider are corrected as usual."""
    hours.commit(hours.span(0, 5), response(hours, 0, 5, 0, requested=10))
    assert hours.commit(hours.span(0, 5), file(hours, 0, 5, 2, 1, provider="other")) == Committed(0, 5, 0)


def test_each_delivery_of_a_batch_is_compared_separately(hours: Shelf) -> None:
    """A daily archive, a monthly one and a response in one batch; and stored candles of several ages."""
    hours.commit(hours.span(0, 10), file(hours, 0, 10, 0, published=5))
    hours.commit(hours.span(10, 20), file(hours, 10, 20, 0, published=7))
    done = hours.commit(
        hours.span(0, 20),
        file(hours, 0, 5, 2, published=4),
        file(hours, 5, 15, 2, published=6),
        response(hours, 15, 20, 2, requested=9),
    )
    assert done == Committed(0, 10, 0, outdated=10)
    versions = [0] * 5 + [2] * 5 + [0] * 5 + [2] * 5
    found = hours.read()
    for n, version in enumerate(versions):
        assert found.take(slice(n, n + 1)).equals(candles_at(hours.opens(n, n + 1), version)), n


def test_after_an_undo_the_age_is_that_of_the_values(hours: Shelf) -> None:
    """Restored values have the age of their own batch."""
    hours.commit(hours.span(0, 5), file(hours, 0, 5, 0, published=5))
    hours.commit(hours.span(0, 5), response(hours, 0, 5, 2, requested=9))
    hours.undo(hours.batches()[1])
    assert hours.commit(hours.span(0, 5), file(hours, 0, 5, 4, published=4)) == Committed(0, 0, 0, outdated=5)
    assert hours.commit(hours.span(0, 5), file(hours, 0, 5, 4, published=6)) == Committed(0, 5, 0)


@dataclass(frozen=True)
class Publication:
    first: int
    past: int
    published: int


PUBLICATION = st.tuples(st.integers(0, 11), st.integers(1, 12), st.integers(0, 20)).map(
    lambda t: Publication(t[0], min(t[0] + t[1], 12), t[2])
)


@given(
    st.lists(PUBLICATION, min_size=1, max_size=5, unique_by=lambda p: p.published),
    st.randoms(use_true_random=False),
)
@settings(max_examples=examples(25))
def test_the_newest_publication_of_each_candle_is_stored(
    shared: Database, files: list[Publication], random: Random
) -> None:
    """Files of any ranges, in any order, some of them twice: each candle is from the newest file that has it."""
    shelf = Shelf.of(shared, fresh("1h"))
    order = files * 2
    random.shuffle(order)
    for one in order:
        version = 2 * one.published
        shelf.commit(
            shelf.span(one.first, one.past), file(shelf, one.first, one.past, version, one.published)
        )
    with shared.begin() as connection:
        stored = queries.stored_origins(connection, shelf.series, shelf.span(0, 12))
    expected = {
        n: max(f.published for f in files if f.first <= n < f.past)
        for n in range(12)
        if any(f.first <= n < f.past for f in files)
    }
    assert stored.ts.tolist() == [shelf.opens(n, n + 1)[0] for n in expected]
    assert stored.as_of.tolist() == [MIDNIGHT + published * DAY for published in expected.values()]
    read = shelf.read()
    for position, (n, published) in enumerate(expected.items()):
        candle = read.take(slice(position, position + 1))
        assert candle.equals(candles_at(shelf.opens(n, n + 1), 2 * published))
    assert shelf.audit().differences == ()
