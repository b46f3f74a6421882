"""`db list` and `db remove`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fks_backfill_dagster.embedded import binaries, clusters
from fks_backfill_dagster_tests.cli.conftest import Command

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root has clusters outside of their homes"),
]


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three clusters: of a home that exists, of one that is gone, and of an unknown one."""
    state = tmp_path / "state"
    monkeypatch.setattr(binaries, "ROOT_STATE", state)
    for name, home in {"kept": tmp_path, "orphan": tmp_path / "gone", "unknown": None}.items():
        folder = state / f"cluster-{name}"
        (folder / "pg").mkdir(parents=True)
        (folder / "pg" / "data").write_bytes(b"x" * 3_000_000)
        if home is not None:
            clusters.write_home(folder, home)
    return state


def left(state: Path) -> set[str]:
    return {path.name.removeprefix("cluster-") for path in state.iterdir()}


def test_a_list(fks: Command, state: Path, tmp_path: Path) -> None:
    shown = fks("db", "list")
    assert shown.exit_code == 0
    assert [line.split()[0].rpartition("-")[2] for line in shown.stdout.splitlines()[-3:]] == [
        "kept",
        "orphan",
        "unknown",
    ]
    assert "3 MB" in shown.stdout
    assert shown.stderr == "1 orphan, 3 MB: `fks-backfill db remove` removes them.\n"
    document = fks("db", "list", "--json").json
    assert [(one["home"], one["state"]) for one in document] == [
        (str(tmp_path), "in use"),
        (str(tmp_path / "gone"), "orphan"),
        (None, "unknown"),
    ]
    assert all(one["size_bytes"] >= 3_000_000 for one in document)


def test_orphans_are_removed_after_confirmation(fks: Command, state: Path) -> None:
    refused = fks("db", "remove")  # no input
    assert refused.exit_code == 1
    assert "cluster-orphan" in refused.stderr
    assert (
        refused.stderr.splitlines()[-1] == "Error: Nothing was removed; --yes removes without confirmation."
    )
    assert left(state) == {"kept", "orphan", "unknown"}
    assert fks("db", "remove", "--yes").stdout == "Removed 1 cluster, 3 MB.\n"
    assert left(state) == {"kept", "unknown"}
    assert fks("db", "remove", "--yes").stdout == "There is no cluster whose home is gone.\n"


def test_an_unknown_cluster_is_removed_by_name_only(fks: Command, state: Path) -> None:
    assert fks("db", "remove", "cluster-unknown", "--yes", "--json").json[0]["state"] == "unknown"
    assert left(state) == {"kept", "orphan"}


def test_a_cluster_whose_home_exists_is_never_removed(fks: Command, state: Path) -> None:
    refused = fks("db", "remove", str(state / "cluster-kept"), "--yes")
    assert (refused.exit_code, left(state)) == (1, {"kept", "orphan", "unknown"})
    assert "which exists" in refused.stderr


def test_a_wrong_name_is_a_usage_error(fks: Command, state: Path) -> None:
    refused = fks("db", "remove", "cluster-nothing", "--yes")
    assert refused.exit_code == 2
    assert "there is no cluster cluster-nothing" in refused.stderr
