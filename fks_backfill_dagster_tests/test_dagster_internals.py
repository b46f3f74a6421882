"""The private names of Dagster that this project relies on: each is there in the locked version.

After a change of that version this test names each one that is gone, and where it is used.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

from fks_backfill_dagster.settings.model import CHECKOUT

PACKAGE = CHECKOUT / "fks_backfill_dagster"
DAGSTER = ("dagster", "dagster_postgres", "dagster_webserver", "dagster_graphql")


def private_names(root: Path) -> dict[tuple[str, str], list[str]]:
    """(module, name) -> the places that import it, for every import of a module that is private or not `dagster`."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            if node.module.split(".")[0] in DAGSTER and "." in node.module:
                for alias in node.names:
                    found.setdefault((node.module, alias.name), []).append(f"{path.name}:{node.lineno}")
    return found


NAMES = private_names(PACKAGE)


def test_there_are_some() -> None:
    assert ("dagster._core.storage.tags", "BACKFILL_ID_TAG") in NAMES


@pytest.mark.parametrize("name", NAMES, ids=".".join)
def test_it_is_there(name: tuple[str, str]) -> None:
    module, attribute = name
    places = ", ".join(NAMES[name])
    try:
        found = importlib.import_module(module)
    except ImportError:
        pytest.fail(f"{module} is gone, which is used in {places}")
    assert hasattr(found, attribute), f"{module}.{attribute} is gone, which is used in {places}"


def test_one_that_is_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import os\nfrom dagster._core.storage.tags import NO_SUCH_TAG\n")
    assert private_names(tmp_path) == {("dagster._core.storage.tags", "NO_SUCH_TAG"): ["a.py:2"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NAMES, ("dagster._core.storage.tags", "NO_SUCH_TAG"), ["a.py:2"])
        with pytest.raises(AssertionError, match=r"NO_SUCH_TAG is gone, which is used in a\.py:2"):
            test_it_is_there(("dagster._core.storage.tags", "NO_SUCH_TAG"))
