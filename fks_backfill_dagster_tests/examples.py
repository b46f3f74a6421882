"""How many examples a property test draws: all of them in `make test-slow`, a part in every other run.

Each run draws others, so the parts add up over the runs; with CI=true hypothesis draws the same ones each time.
"""

from __future__ import annotations

import os

_PART = 4
_FEWEST = 10


def examples(thorough: int) -> int:
    """The number for `max_examples` of a test that draws `thorough` ones where FKS_TEST_THOROUGH is set."""
    return thorough if os.environ.get("FKS_TEST_THOROUGH") else max(thorough // _PART, min(thorough, _FEWEST))
