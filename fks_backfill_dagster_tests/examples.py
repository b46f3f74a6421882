"""The number of examples of a property test: all of them in `make test-slow`, a part in every other run.

Each run draws different ones, so the parts add up over the runs; with CI=true hypothesis draws the same ones.
"""

from __future__ import annotations

import os

_PART = 4
_FEWEST = 10


def examples(thorough: int) -> int:
    """The value of `max_examples` for a test that draws `thorough` examples if FKS_TEST_THOROUGH is set."""
    return thorough if os.environ.get("FKS_TEST_THOROUGH") else max(thorough // _PART, min(thorough, _FEWEST))
