"""The number of examples of a test: all of them in `make test-slow`, a part in every other run.

Each run of a property test draws different ones, so the parts add up over the runs; with CI=true hypothesis draws the
same ones.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from _pytest.mark import ParameterSet

_PART = 4
_FEWEST = 10


def examples(thorough: int) -> int:
    """The value of `max_examples` for a test that draws `thorough` examples if FKS_TEST_THOROUGH is set."""
    return thorough if os.environ.get("FKS_TEST_THOROUGH") else max(thorough // _PART, min(thorough, _FEWEST))


def thinned(
    *axes: Sequence[Any], every: int, names: Sequence[Callable[[Any], str]] = ()
) -> list[ParameterSet]:
    """Every combination of the axes for `parametrize`; all but each `every`th, counted diagonally, have the mark slow.

    So the main suite has each value of each axis (if the axes are at least `every` long), `make test-slow` the rest.
    """
    naming = names or [str] * len(axes)
    return [
        pytest.param(
            *(axis[at] for axis, at in zip(axes, places, strict=True)),
            id="-".join(name(axis[at]) for name, axis, at in zip(naming, axes, places, strict=True)),
            marks=[pytest.mark.slow] if sum(places) % every else [],
        )
        for places in itertools.product(*(range(len(axis)) for axis in axes))
    ]
