"""The two lock files: the packages that a user installs, and the additional ones of a developer (docs/adr/0024)."""

from __future__ import annotations

import re
import tomllib

import pytest

from fks_backfill_dagster.settings.model import CHECKOUT

USERS, DEVELOPERS = "requirements.lock", "requirements-dev.lock"


def text(name: str) -> str:
    return (CHECKOUT / name).read_text(encoding="utf-8")


def locked(name: str) -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+)==", text(name), re.MULTILINE))


def required(*extras: str) -> set[str]:
    """The names in the dependencies of pyproject.toml, or in these extras."""
    project = tomllib.loads(text("pyproject.toml"))["project"]
    optional = project["optional-dependencies"]
    lines = [line for extra in extras for line in optional[extra]] if extras else project["dependencies"]
    return {re.split(r"[^a-z0-9-]", line.lower())[0] for line in lines}


def test_each_lock_has_its_dependencies() -> None:
    assert required() <= locked(USERS)
    assert required("build") <= locked(USERS)
    assert required("dev") <= locked(DEVELOPERS)


def test_the_user_lock_has_no_developer_tools() -> None:
    tools = required("dev") | {"dagster-cloud-cli", "dagster-dg-core", "execnet", "mypy-extensions"}
    assert not tools & locked(USERS)


def test_no_distribution_is_locked_twice() -> None:
    assert not locked(USERS) & locked(DEVELOPERS)
    assert text(DEVELOPERS).startswith(f"-r {USERS}\n")


@pytest.mark.parametrize("name", [USERS, DEVELOPERS])
def test_a_lock_has_versions_and_hashes_and_no_address(name: str) -> None:
    entries = re.split(r"\n(?! )", text(name).strip())
    for entry in entries[1:] if name == DEVELOPERS else entries:
        assert re.match(
            r"[a-z0-9-]+==[^\s;]+( ; [^\\]+)? \\\n( +--hash=sha256:[0-9a-f]{64}( \\\n)?)+$", entry
        ), entry
    assert "://" not in text(name)
