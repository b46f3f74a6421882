"""Every case of `make bench`, once and tiny: it works, and measures what it says. No limits: those are for full sizes.

The cases themselves end with SystemExit if the measured work differs from the expected one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import isfinite
from pathlib import Path

import pytest

from bench.__main__ import CASES
from bench.result import Result
from bench.size import TINY
from bench.world import World, world
from fks_backfill_dagster.embedded import EmbeddedPostgres

# The letters of the figures in the order in which a case returns them.
FIGURES = {
    "archives": "ac",
    "rest": "b",
    "memory": "d",
    "definitions": "e",
    "crowd": "ffffff",
    "weight": "gg",
    "dagster_overhead": "hi",
    "refresh": "jjkkk",
    "sensor": "mn",
    "audit": "l",
}
# Cases that start Dagster's servers.
LONG = ("dagster_overhead", "refresh", "sensor")
# A figure that is zero when all is well.
REJECTED = "(g) responses other than 200"


@pytest.fixture(scope="module")
def place() -> Iterator[World]:
    """The bench's world in the embedded server that all tests share."""
    server = EmbeddedPostgres(Path(os.environ["FKS_TEST_HOME"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FKS_DATABASE_URL", server.start())
        with world() as made:
            yield made
    server.release()


def check(name: str, results: list[Result]) -> None:
    """The figures of the case, one value each, positive and finite."""
    assert [result.name[:3] for result in results] == [f"({letter})" for letter in FIGURES[name]]
    for result in results:
        assert len(result.values) >= 1
        for value in result.values:
            assert isfinite(value), result.row()
            assert value > 0 or (result.name == REJECTED and value == 0), result.row()


@pytest.mark.server
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in CASES]
)
def test_a_case_measures_what_it_says(place: World, name: str) -> None:
    check(name, CASES[name](place, 1, TINY))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_figure_that_was_not_measured_is_found(value: float) -> None:
    with pytest.raises(AssertionError):
        check("rest", [Result("(b) a ratio", [value], 1.0, True, "")])
    check("rest", [Result("(b) a ratio", [0.1], 1.0, True, "")])


def test_a_missing_figure_is_found() -> None:
    with pytest.raises(AssertionError):
        check("archives", [Result("(a) a ratio", [1.0], 1.0, True, "")])
