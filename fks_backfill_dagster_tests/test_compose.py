"""compose.yaml: no default password, and ports on loopback only."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import yaml

from fks_backfill_dagster.settings.model import CHECKOUT

FILE = CHECKOUT / "compose.yaml"


def test_ports_are_published_on_loopback_only() -> None:
    services = yaml.safe_load(FILE.read_text(encoding="utf-8"))["services"]
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert ports
    assert [port for port in ports if not str(port).startswith("127.0.0.1:")] == []
    assert [name for name, service in services.items() if service.get("network_mode") == "host"] == []


def test_a_password_has_no_default() -> None:
    """`${NAME:?message}`: compose starts nothing if the variable is missing or empty."""
    services = yaml.safe_load(FILE.read_text(encoding="utf-8"))["services"]
    found = {
        name: value
        for service in services.values()
        for name, value in service.get("environment", {}).items()
        if re.search("PASSWORD|SECRET|TOKEN|KEY", name)
    }
    assert found
    for name, value in found.items():
        assert re.fullmatch(rf"\$\{{{name}:\?[^}}]+\}}", str(value))
    assert "HOST_AUTH_METHOD" not in FILE.read_text(encoding="utf-8")


@pytest.mark.server
def test_the_error_without_the_password(tmp_path: object) -> None:
    if shutil.which("docker") is None:
        pytest.skip("docker is not installed")
    command = ["docker", "compose", "--file", str(FILE), "config", "--quiet"]
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp_path)}
    if subprocess.run(["docker", "compose", "version"], capture_output=True, env=environment).returncode != 0:
        pytest.skip("this docker has no compose")
    without = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert without.returncode != 0
    assert "choose one for the superuser fks" in without.stderr
    given = subprocess.run(
        command, capture_output=True, text=True, env=environment | {"POSTGRES_PASSWORD": "any"}
    )
    assert (given.returncode, given.stderr) == (0, "")
