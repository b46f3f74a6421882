"""The worked example of docs/adding-a-provider.md passes the conformance tests that it defines."""

from __future__ import annotations

import re
from types import ModuleType

import pytest

from fks_backfill_dagster.providers.registry import BUILT, Registration
from fks_backfill_dagster.settings.model import CHECKOUT, KEY_VARIABLES

pytestmark = pytest.mark.server

DOCUMENT = CHECKOUT / "docs" / "adding-a-provider.md"
PROVIDER, CONFORMANCE = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)

example = ModuleType("example")
exec(compile(PROVIDER, DOCUMENT, "exec"), example.__dict__)
exec(compile(CONFORMANCE, DOCUMENT, "exec"))  # TestExample, which pytest collects here


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the checklist of the document has it."""
    entry = Registration(
        example.Example, example.DEFAULT_BASE_URL, requests_per_minute=example.REQUESTS_PER_MINUTE
    )
    monkeypatch.setitem(BUILT, "example", entry)
    monkeypatch.setitem(KEY_VARIABLES, "example", example.KEY_VARIABLE)
